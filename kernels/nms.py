"""Greedy suppression of overlapping boxes: which pairs overlap, as bits, and then who is kept, in one program.

Boxes come sorted: those of one class together, the best first. The first kernel writes, for each box, one bit for each
later box of its class that it would suppress. The second walks over the boxes, 32 at a time: it settles the 32 among
themselves in registers, and adds to the suppressed what those suppress that are kept. Nothing returns to the host in
between, and pairs of different classes cost nothing.

Bytes: 20 N in, and N^2/16 of bits out and in for one class of N boxes, of which the second kernel reads the rows of
the kept ones alone. Values are float32, rounded as separate operations: the same pairs as on a CPU.

Letters: N boxes · W words of 32 bits that hold one bit a box.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BITS = tl.constexpr(32)
_BLOCK_WORDS = 8

SIZES = ["num_boxes", "num_words"]
"""Arguments whose divisibility tells the compiler nothing: another number of boxes must not compile again."""


@triton.jit
def _load_boxes(box_ptr, index, num_boxes):
    """Load four coordinates and the area of boxes."""
    real, box_ptr = index < num_boxes, box_ptr + index.to(tl.int64) * 4
    x1, y1 = tl.load(box_ptr, mask=real, other=0.0), tl.load(box_ptr + 1, mask=real, other=0.0)
    x2, y2 = tl.load(box_ptr + 2, mask=real, other=0.0), tl.load(box_ptr + 3, mask=real, other=0.0)
    return x1, y1, x2, y2, (x2 - x1) * (y2 - y1)


@triton.jit(do_not_specialize=SIZES)
def _nms_overlap_kernel(
    box_ptr,  # (N, 4) float32
    end_ptr,  # (N,) int32, where the class of a box ends
    overlap_ptr,  # (N, W) int32
    num_boxes,
    num_words,
    threshold,
    BLOCK_WORDS: tl.constexpr,
):
    parts = tl.cdiv(num_words, BLOCK_WORDS)
    block, first_word = tl.program_id(0) // parts, tl.program_id(0) % parts * BLOCK_WORDS
    row, bit = block * BITS + tl.arange(0, BITS), tl.arange(0, BITS)
    reach = tl.load(end_ptr + tl.minimum(block * BITS + BITS, num_boxes) - 1)
    # Words before those of the block, or past its last class, are never read.
    if (first_word + BLOCK_WORDS > block) & (first_word * BITS < reach):
        end = tl.load(end_ptr + row, mask=row < num_boxes, other=0)
        x1, y1, x2, y2, area = _load_boxes(box_ptr, row, num_boxes)
        row_ptr = overlap_ptr + row.to(tl.int64) * num_words
        for word in range(first_word, tl.minimum(first_word + BLOCK_WORDS, num_words)):
            column = word * BITS + bit
            cx1, cy1, cx2, cy2, column_area = _load_boxes(box_ptr, column, num_boxes)
            width = tl.minimum(x2[:, None], cx2[None, :]) - tl.maximum(x1[:, None], cx1[None, :])
            height = tl.minimum(y2[:, None], cy2[None, :]) - tl.maximum(y1[:, None], cy1[None, :])
            intersection = tl.maximum(width, 0.0) * tl.maximum(height, 0.0)
            union = area[:, None] + column_area[None, :] - intersection
            later = (column[None, :] > row[:, None]) & (column[None, :] < end[:, None])
            hit = (tl.div_rn(intersection, union) > threshold) & later
            bits = tl.sum(tl.where(hit, (1 << bit)[None, :], 0), 1)
            tl.store(row_ptr + word, bits, mask=row < num_boxes)


@triton.jit(do_not_specialize=SIZES)
def _nms_settle_kernel(
    overlap_ptr,  # (N, W) int32
    end_ptr,  # (N,) int32, where the class of a box ends
    removed_ptr,  # (W,) int32, zeros; in the end one bit for each box that is not kept
    num_boxes,
    num_words,
    BLOCK_WORDS: tl.constexpr,
):
    for block in range(0, num_words):
        removed = tl.load(removed_ptr + block)
        first = block * BITS
        row_ptr = overlap_ptr + first.to(tl.int64) * num_words
        for i in tl.static_range(BITS):
            row = tl.load(row_ptr + i * num_words + block, mask=first + i < num_boxes, other=0)
            removed |= tl.where((removed >> i) & 1 == 0, row, 0)
        tl.store(removed_ptr + block, removed)
        reach = tl.cdiv(tl.load(end_ptr + tl.minimum(first + BITS, num_boxes) - 1), BITS)
        for start in range(block + 1, reach, BLOCK_WORDS):
            word = start + tl.arange(0, BLOCK_WORDS)
            later = tl.load(removed_ptr + word, mask=word < reach, other=0)
            for i in tl.static_range(BITS):
                kept = ((removed >> i) & 1 == 0) & (first + i < num_boxes)
                later |= tl.load(row_ptr + i * num_words + word, mask=(word < reach) & kept, other=0)
            tl.store(removed_ptr + word, later, mask=word < reach)
        # The next word may have been written by another thread.
        tl.debug_barrier()


def nms_kept(boxes: Tensor, end: Tensor, threshold: float) -> Tensor:
    """Say which of the sorted boxes (N, 4) are kept, (N,) bool; ``end`` (N,) says where the class of each ends."""
    num_boxes, num_words = len(boxes), triton.cdiv(len(boxes), 32)
    overlap = torch.empty(num_boxes, num_words, dtype=torch.int32, device=boxes.device)
    removed = torch.zeros(num_words, dtype=torch.int32, device=boxes.device)
    tiles = num_words * triton.cdiv(num_words, _BLOCK_WORDS)
    # Without fused multiply-add: a bit of difference in an area would keep other boxes than on a CPU.
    _nms_overlap_kernel[(tiles,)](
        boxes, end, overlap, num_boxes, num_words, threshold, _BLOCK_WORDS, num_warps=4, enable_fp_fusion=False
    )
    block_words = min(512, max(32, triton.next_power_of_2(num_words)))
    _nms_settle_kernel[(1,)](
        overlap, end, removed, num_boxes, num_words, block_words, num_warps=max(1, block_words // 64)
    )
    bit = torch.arange(32, dtype=torch.int32, device=boxes.device)
    return (removed[:, None] >> bit & 1 == 0).flatten()[:num_boxes]
