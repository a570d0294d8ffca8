"""The results of one device: a JSON file that is whole after every row, and that a later run goes on from."""

import json
from pathlib import Path
from typing import Any

from florence_fast.files import write_json

Row = dict[str, Any]


class Store:
    """Rows by key, and one record for each stage.

    A row counts as finished while the sources that decided it are the present ones. A missing competitor does not: to
    ask again costs nothing, and it may have been installed. An error does, or a crash would stop every later run.
    """

    def __init__(self, path: Path, sources: str) -> None:
        self.path = path
        self.sources = sources
        self.rows: dict[str, Row] = {}
        self.stages: dict[str, Row] = {}
        if path.is_file():
            try:
                stored = json.loads(path.read_text(encoding="utf-8"))
                self.rows = {row["key"]: row for row in stored["rows"]}
                self.stages = stored["stages"]
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{path} must hold results of bench.gpu, got {type(error).__name__}: {error}"
                ) from error

    def forget(self, stage: str) -> None:
        """Drop what is known of a stage, so that it is measured anew."""
        self.rows = {key: row for key, row in self.rows.items() if row["stage"] != stage}
        self.stages.pop(stage, None)

    def finished(self, key: str) -> bool:
        """Whether the row of this key need not be made again."""
        row = self.rows.get(key)
        return row is not None and row["sources"] == self.sources and row["status"] != "missing"

    def stage_finished(self, name: str) -> bool:
        """Whether a stage ended well with the present sources."""
        record = self.stages.get(name, {})
        return record.get("sources") == self.sources and record.get("status") == "done"

    def put(self, row: Row) -> None:
        """Add a row, in place of an older one of its key, and write the file."""
        self.rows[row["key"]] = row
        self.write()

    def put_stage(self, name: str, record: Row) -> None:
        """Record how a stage ended, and write the file."""
        self.stages[name] = record
        self.write()

    def write(self) -> None:
        """Write the file, whole or not at all."""
        write_json(self.path, {"stages": self.stages, "rows": list(self.rows.values())})
