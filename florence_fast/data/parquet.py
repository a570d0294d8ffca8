"""Rows of Parquet files, whose images are paths or lie in the file, as Hugging Face's data sets have them."""

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

from florence_fast.data.table_rows import Row, find_column, make_row
from florence_fast.errors import require

MAX_GROUP_BYTES = 1 << 30
ROWS_AT_A_TIME = 16


class ImagesInside:
    """The encoded images of a Parquet file by row. One row group is kept in memory, so neighbours cost one reading.

    Args:
        path: the file.
        column: with the bytes; a dot leads into a struct.
        group_sizes: rows of each row group.
    """

    def __init__(self, path: Path, column: str, group_sizes: list[int]) -> None:
        self.path, self.column = path, column
        self._starts = [0, *accumulate(group_sizes)]
        self._group, self._images = -1, []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_group": -1, "_images": []}

    def read(self, row: int) -> bytes | None:
        """Return the bytes of row ``row``, from 0, or None where it has none.

        Raises:
            ValueError: the file is damaged or no longer there, or its row group has more than 1 GiB of images.
        """
        group = bisect_right(self._starts, row) - 1
        if group != self._group:
            self._images, self._group = self._read_group(group), group
        return self._images[row - self._starts[group]].as_py()

    def _read_group(self, group: int) -> list[Any]:
        """Return the images of a group as Arrow's scalars. On one thread: Arrow's others do not survive a fork."""
        images: list[Any] = []
        num_bytes = 0
        outer, _, inner = self.column.partition(".")
        with _opened(self.path) as file:
            options = {"batch_size": ROWS_AT_A_TIME, "row_groups": [group], "use_threads": False}
            for batch in file.iter_batches(columns=[self.column], **options):
                found = batch.column(outer)
                images += found.field(inner) if inner else found
                num_bytes += found.nbytes
                if num_bytes > MAX_GROUP_BYTES:
                    raise ValueError(
                        f"a row group of {self.path} has more than {MAX_GROUP_BYTES:,} bytes of images: write the file "
                        "anew with row_group_size=100"
                    )
        return images


def read_parquet(path: Path, img_key: str, caption_key: str) -> tuple[list[Row], ImagesInside | None]:
    """Read the rows of a Parquet file; of its columns only those that are needed, and no image.

    Returns:
        The rows, and the images where they lie in the file: as bytes, or as structs of bytes and path.

    Raises:
        ValueError: it is no Parquet file, or has no such columns.
        ImportError: pyarrow is not installed.
    """
    with _opened(path) as file:
        schema, columns = file.schema_arrow, file.schema_arrow.names
        image = columns[find_column(path, columns, "it", img_key, "image")]
        text = columns[find_column(path, columns, "it", caption_key, "text")]
        more = [name for name in ("short_name", "keywords") if name in columns]
        bytes_in, path_in = _places(path, image, schema.field(image).type)
        inside = None
        if bytes_in:
            sizes = [file.metadata.row_group(n).num_rows for n in range(file.metadata.num_row_groups)]
            inside = ImagesInside(path, bytes_in, sizes)
        rows: list[Row] = []
        for batch in file.iter_batches(columns=[*filter(None, [path_in]), text, *more]):
            for row in batch.to_pylist():
                name = row.get(image)
                name = name["path"] if isinstance(name, dict) else name
                others = row.get("short_name"), row.get("keywords")
                rows.append(make_row(len(rows) + 1, name, row[text], *others, image_inside=inside is not None))
    return rows, inside


def _places(path: Path, column: str, kind: Any) -> tuple[str, str]:
    """Return where the bytes of the images are and where their paths; one of them may be empty.

    Raises:
        ValueError: the column holds neither.
    """
    from pyarrow import types

    def is_bytes(x: Any) -> bool:
        return types.is_binary(x) or types.is_large_binary(x)

    def is_text(x: Any) -> bool:
        return types.is_string(x) or types.is_large_string(x)

    if is_bytes(kind):
        return column, ""
    if is_text(kind) or (types.is_dictionary(kind) and is_text(kind.value_type)):
        return "", column
    fields = {field.name: field.type for field in kind} if types.is_struct(kind) else {}
    if "bytes" in fields and is_bytes(fields["bytes"]):
        return f"{column}.bytes", f"{column}.path" if "path" in fields and is_text(fields["path"]) else ""
    raise ValueError(
        f"column {column!r} of {path} must hold paths of images, their bytes, or structs of 'bytes' and 'path', got "
        f"{str(kind)[:80]}"
    )


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a Parquet file; what goes wrong in it is a ValueError."""
    require("pyarrow", "parquet")
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a readable Parquet file: {error}") from error
