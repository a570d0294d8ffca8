"""What tuning has measured on one architecture, and the table of configurations that follows from it.

The record is a JSON file that is whole after every kernel, and that a later start goes on from. The table that launches
read, ``kernels/configs/sm_<arch>.json``, is its winners and nothing else.
"""

import json
from pathlib import Path
from typing import Any

from florence_fast.files import write_json
from florence_fast.provenance import kernel_sources as sources

Row = dict[str, Any]
Table = dict[str, dict[str, Row]]


class Record:
    """One row for each kernel and key, with where and when it was measured, and the buckets that are done.

    A row counts while the kernels, torch and Triton are the present ones; an older winner stays in the table until it
    is measured anew.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[tuple[str, str], Row] = {}
        self.buckets: dict[str, str] = {}
        if path.is_file():
            try:
                stored = json.loads(path.read_text(encoding="utf-8"))
                self.rows = {(row["kernel"], row["key"]): row for row in stored["rows"]}
                self.buckets = dict(stored["buckets"])
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{path} must hold a record of bench.gpu.tune, got {type(error).__name__}: {error}"
                ) from error

    def finished(self) -> set[tuple[str, str]]:
        """Return the kernels and keys that need not be measured again."""
        return {pair for pair, row in self.rows.items() if row["sources"] == sources()}

    def bucket_finished(self, bucket: str) -> bool:
        """Whether every kernel of a bucket is measured."""
        return self.buckets.get(bucket) == sources()

    def forget(self) -> None:
        """Let everything be measured anew; winners stay until then."""
        self.buckets = {}
        for row in self.rows.values():
            row["sources"] = None

    def put(self, row: Row) -> None:
        """Add a row, in place of an older one of its kernel and key, and write the file."""
        self.rows[row["kernel"], row["key"]] = {**row, "sources": sources()}
        self.write()

    def put_bucket(self, bucket: str) -> None:
        """Say that every kernel of a bucket is measured, and write the file."""
        self.buckets[bucket] = sources()
        self.write()

    def write(self) -> None:
        """Write the file, whole or not at all."""
        write_json(self.path, {"buckets": self.buckets, "rows": list(self.rows.values())})

    def table(self) -> Table:
        """Return the winners as a table of ``florence_fast.kernels.configs``."""
        found: Table = {}
        for (kernel, key), row in sorted(self.rows.items()):
            if row["status"] == "tuned":
                found.setdefault(kernel, {})[key] = row["config"]
        return found


def write_table(path: Path, table: Table) -> bool:
    """Write a table where it says something new, and return whether it does."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if table == known:
        return False
    write_json(path, table)
    return True
