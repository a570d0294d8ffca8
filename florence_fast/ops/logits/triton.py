"""Products of the chunks of a gradient that kernels write: what both contrastive losses share.

Letters: R rows (images) · N columns (texts) · D embedding dim · G gradient of a chunk of logits
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from florence_fast.kernels import logit_tiles
from florence_fast.kernels.targets import target_of
from florence_fast.ops.logits.by_label import ByLabel, unsorted

Span = tuple[int, int]


def chunked_gradients(
    ordered: ByLabel,
    scale: Tensor,
    needs: list[bool],
    chunk_size: int,
    write_grad: Callable[[Span, Span, Tensor], None],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of rows (R, D), cols (N, D) and scale (), None where ``needs`` is false.

    ``write_grad(rows from..to, columns from..to, grad)`` writes G of a chunk, whose two products the library adds up.
    """
    rows, cols = ordered.rows, ordered.cols
    size = chunk_size or logit_tiles.best_chunk(rows.shape[1], target_of(rows.device))
    scratch = rows.new_empty(min(size, len(rows)), min(size, len(cols)))
    # <rows, G cols> is d scale, so the scale needs the first product too.
    needs_rows, needs_cols = needs[0] or needs[2], needs[1]
    drows: Any = torch.zeros_like(rows, dtype=torch.float32) if needs_rows else None
    dcols: Any = torch.zeros_like(cols, dtype=torch.float32) if needs_cols else None
    for first_row in range(0, len(rows), size):
        for first_col in range(0, len(cols), size):
            row_end, col_end = min(first_row + size, len(rows)), min(first_col + size, len(cols))
            grad = scratch[: row_end - first_row, : col_end - first_col]
            write_grad((first_row, row_end), (first_col, col_end), grad)
            if needs_rows:
                _add_product_(drows[first_row:row_end], grad, cols[first_col:col_end])
            if needs_cols:
                _add_product_(dcols[first_col:col_end], grad.T, rows[first_row:row_end])
    return (
        unsorted(drows * scale.float(), ordered.row_order).to(rows.dtype) if needs[0] else None,
        unsorted(dcols * scale.float(), ordered.col_order).to(cols.dtype) if needs_cols else None,
        (rows.float() * drows).sum().to(scale.dtype) if needs[2] else None,
    )


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a b to ``total``, summing in float32."""
    if a.dtype == torch.float32 or not a.is_cuda:
        total.addmm_(a.float(), b.float())
    else:
        total += torch.mm(a, b, out_dtype=torch.float32)
