"""Rows and columns of a matrix of logits in the order of their labels, so that positives lie near the diagonal.

Letters: R rows (images) · N columns (texts) · D embedding dim
"""

import torch
from torch import Tensor


class ByLabel:
    """Features in the order of their labels. Labels become numbers of 32 bits; equal ones have equal numbers."""

    def __init__(self, rows: Tensor, cols: Tensor, row_labels: Tensor, col_labels: Tensor) -> None:
        everything = torch.cat([row_labels, col_labels]).sort().values
        self.row_order, self.col_order = row_labels.argsort(stable=True), col_labels.argsort(stable=True)
        self.rows, self.cols = rows[self.row_order].contiguous(), cols[self.col_order].contiguous()
        """(R, D) and (N, D)."""
        self.row_labels, self.col_labels = (
            torch.searchsorted(everything, labels[order]).int()
            for labels, order in ((row_labels, self.row_order), (col_labels, self.col_order))
        )


def unsorted(x: Tensor, order: Tensor) -> Tensor:
    """Put what is in the order of ``x[order]`` back in its place, in contiguous memory whatever the layout of ``x``."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    out[order] = x
    return out
