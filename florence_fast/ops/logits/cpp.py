"""Logits a chunk at a time for native kernels: library products, one native pass between them.

What is done with a chunk goes once through memory, so chunks are of a size that stays in a processor's last cache.

Letters: R rows (images) · N columns (texts) · D embedding dim · G gradient of a chunk of logits
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from florence_fast import native
from florence_fast.ops._product import linear
from florence_fast.ops.logits.by_label import ByLabel, unsorted

DEFAULT_CHUNK_SIZE = 2048


class Chunk(NamedTuple):
    """Rows and columns of a chunk, and its logits, whose memory is the caller's to use."""

    rows: slice
    cols: slice
    logits: Tensor


class Chunks:
    """The chunks of scale * rows cols^T, (R, N), in float32."""

    def __init__(self, ordered: ByLabel, scale: Tensor, chunk_size: int) -> None:
        self.rows, self.cols, self.scale = ordered.rows.float(), ordered.cols.float(), scale.float()
        self.size = chunk_size or DEFAULT_CHUNK_SIZE
        col_labels, row_labels = ordered.col_labels.contiguous(), ordered.row_labels.contiguous()
        self.begin = torch.searchsorted(col_labels, row_labels)
        self.end = torch.searchsorted(col_labels, row_labels, right=True)
        """The positives of row i are the columns from begin[i] to end[i]."""

    def __iter__(self) -> Iterator[Chunk]:
        """Yield every chunk; drop its logits before the next one is asked for, so that their memory serves again."""
        scaled = self.rows * self.scale
        for r in _slices(len(self.rows), self.size):
            for c in _slices(len(self.cols), self.size):
                yield Chunk(r, c, linear(scaled[r], self.cols[c]))


def _slices(length: int, size: int) -> Iterator[slice]:
    for first in range(0, length, size):
        yield slice(first, min(first + size, length))


def grad_dtype(features: Tensor, scale: Tensor) -> torch.dtype:
    """Return in what G meets the features again: bfloat16 for such features where the processor multiplies it.

    Elsewhere that product is no faster; in float16 G would fall below the smallest number. The gradient of a scale of
    0 cannot be had from the logits, as below.
    """
    fast = features.dtype == torch.bfloat16 and native.multiplies_bfloat16() and bool(scale != 0)
    return torch.bfloat16 if fast else torch.float32


def chunked_gradients(
    ordered: ByLabel,
    scale: Tensor,
    needs: list[bool],
    chunk_size: int,
    write_grad: Callable[[Chunks, Chunk, Tensor, Tensor], None],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of rows (R, D), cols (N, D) and scale (), None where ``needs`` is false.

    ``write_grad(chunks, chunk, grad, by_logit)`` writes G, whose two products are added up, over the logits of the
    chunk or into memory for bfloat16, and adds what G times logit is for each row to ``by_logit``, from which the
    gradient of the scale is had before G is rounded.
    """
    chunks, dtype = Chunks(ordered, scale, chunk_size), grad_dtype(ordered.rows, scale)
    rows, cols = (ordered.rows, ordered.cols) if dtype == torch.bfloat16 else (chunks.rows, chunks.cols)
    drows: Any = torch.zeros_like(chunks.rows) if needs[0] or (needs[2] and dtype == torch.float32) else None
    # Transposed, because that product is as fast as the others and the one with G^T on the left is not.
    dcols: Any = torch.zeros_like(chunks.cols.T, memory_format=torch.contiguous_format) if needs[1] else None
    rows_transposed = rows.T.contiguous() if needs[1] else None
    by_logit = chunks.rows.new_zeros(len(rows))
    for r, c, logits in chunks:
        grad = logits if dtype == torch.float32 else torch.empty_like(logits, dtype=dtype)
        write_grad(chunks, Chunk(r, c, logits), grad, by_logit[r])
        del logits
        if drows is not None:
            drows[r] += linear(grad, cols[c].T)
        if dcols is not None and rows_transposed is not None:
            dcols[:, c] += linear(rows_transposed[:, r], grad.T)
        del grad
    dscale: Any = None
    if needs[2]:
        # <rows, G cols> without the factor of the logits; the other form divides by a scale that is not 0.
        if dtype == torch.float32 and drows is not None:
            dscale = (chunks.rows * drows).sum()
        else:
            dscale = by_logit.sum(dtype=torch.float64) / chunks.scale
    return (
        unsorted(drows.mul_(chunks.scale), ordered.row_order).to(ordered.rows.dtype)
        if needs[0] and drows is not None
        else None,
        unsorted(dcols.mul_(chunks.scale).T, ordered.col_order).to(ordered.cols.dtype) if dcols is not None else None,
        dscale.to(scale.dtype) if needs[2] else None,
    )
