"""Logits a chunk at a time by library calls, in a scratch of fixed size: what both contrastive losses share.

Rows and columns are in the order of their labels, so the positives of some rows lie in few columns, side by side.

Letters: R rows (images) · N columns (texts) · D embedding dim · G gradient of a chunk of logits
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from florence_fast.ops.logits.by_label import ByLabel, unsorted

DEFAULT_CHUNK_SIZE = 4096
_ROWS_COMPARED = 256
"""So many rows at a time compare their labels with those of the columns that can hold a positive."""


class Chunk(NamedTuple):
    """Rows and columns of a chunk, and two tensors of its size whose content is nobody's."""

    rows: slice
    cols: slice
    logits: Tensor
    scratch: Tensor


class Chunks:
    """The chunks of scale * rows cols^T, (R, N), whose logits nobody keeps.

    Half precision is multiplied and summed in float32.
    """

    def __init__(self, ordered: ByLabel, scale: Tensor, chunk_size: int) -> None:
        wide = torch.promote_types(ordered.rows.dtype, torch.float32)
        self.rows, self.cols = ordered.rows.to(wide), ordered.cols.to(wide)
        self.scale = scale.to(wide)
        self.row_labels, self.col_labels = ordered.row_labels, ordered.col_labels
        self.size = chunk_size or DEFAULT_CHUNK_SIZE
        starts = range(0, len(self.rows), _ROWS_COMPARED)
        firsts = self.row_labels[list(starts)]
        lasts = self.row_labels[[min(start + _ROWS_COMPARED, len(self.rows)) - 1 for start in starts]]
        begin, end = torch.searchsorted(self.col_labels, firsts), torch.searchsorted(self.col_labels, lasts, right=True)
        self.spans = list(zip(starts, begin.tolist(), end.tolist(), strict=True))
        """First row of a block, and where the columns begin and end that share a label with one of its rows."""

    def __iter__(self) -> Iterator[Chunk]:
        """Yield every chunk with its logits; all share their memory."""
        scaled = self.rows * self.scale
        num_rows, num_cols = len(self.rows), len(self.cols)
        buffers = [self.rows.new_empty(min(self.size, num_rows) * min(self.size, num_cols)) for _ in range(2)]
        for row in range(0, num_rows, self.size):
            for col in range(0, num_cols, self.size):
                r, c = (slice(first, min(first + self.size, n)) for first, n in ((row, num_rows), (col, num_cols)))
                shape = r.stop - r.start, c.stop - c.start
                logits, scratch = (buffer[: shape[0] * shape[1]].view(shape) for buffer in buffers)
                yield Chunk(r, c, torch.mm(scaled[r], self.cols[c].T, out=logits), scratch)

    def positives(self, chunk: Chunk) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield the parts of a chunk that can hold positives: rows, columns, and which elements are some.

        Rows and columns are those of the chunk, counted from its first.
        """
        r, c = chunk.rows, chunk.cols
        for start, begin, end in self.spans:
            rows = slice(max(start, r.start), min(start + _ROWS_COMPARED, r.stop))
            cols = slice(max(begin, c.start), min(end, c.stop))
            if rows.start < rows.stop and cols.start < cols.stop:
                same = self.row_labels[rows, None] == self.col_labels[cols]
                yield _from(rows, r.start), _from(cols, c.start), same


def _from(span: slice, first: int) -> slice:
    return slice(span.start - first, span.stop - first)


def chunked_gradients(
    ordered: ByLabel,
    scale: Tensor,
    needs: list[bool],
    chunk_size: int,
    write_grad: Callable[[Chunks, Chunk], None],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of rows (R, D), cols (N, D) and scale (), None where ``needs`` is false.

    ``write_grad(chunks, chunk)`` turns the logits of a chunk into G in place, whose two products are added up.
    """
    chunks = Chunks(ordered, scale, chunk_size)
    # <rows, G cols> is d scale, so the scale needs the first product too.
    needs_rows, needs_cols = needs[0] or needs[2], needs[1]
    drows: Any = torch.zeros_like(chunks.rows) if needs_rows else None
    dcols: Any = torch.zeros_like(chunks.cols) if needs_cols else None
    for chunk in chunks:
        write_grad(chunks, chunk)
        if needs_rows:
            drows[chunk.rows].addmm_(chunk.logits, chunks.cols[chunk.cols])
        if needs_cols:
            dcols[chunk.cols].addmm_(chunk.logits.T, chunks.rows[chunk.rows])
    dscale = (chunks.rows * drows).sum().to(scale.dtype) if needs[2] else None
    return (
        unsorted(drows.mul_(chunks.scale), ordered.row_order).to(ordered.rows.dtype) if needs[0] else None,
        unsorted(dcols.mul_(chunks.scale), ordered.col_order).to(ordered.cols.dtype) if needs_cols else None,
        dscale,
    )
