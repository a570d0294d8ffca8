"""The windows that a program walks through, against a plain enumeration, and addresses beyond 32 bits."""

import pytest
import torch
import triton
import triton.language as tl

from florence_fast.kernels.window_index import (
    count_windows,
    first_token,
    grid_of,
    list_windows,
    locate_window,
    next_window,
    place_tokens,
    span_of_run,
)
from florence_fast.ops.windows import blocked_pairs, cut_map, partition


@triton.jit
def _walk_kernel(
    seen_ptr, B, H, W, shift_h, shift_w, run, num_runs, WH: tl.constexpr, WW: tl.constexpr, EDGE: tl.constexpr
):
    geometry = (B, H, W, 1, shift_h, shift_w)
    grid = grid_of(geometry, WH, WW)
    start, stop = span_of_run(B * count_windows(grid, EDGE), run, num_runs)
    b, wy, wx = locate_window(start, grid, EDGE)
    for i in range(start, stop):
        tl.store(seen_ptr + 3 * i, b)
        tl.store(seen_ptr + 3 * i + 1, wy)
        tl.store(seen_ptr + 3 * i + 2, wx)
        b, wy, wx = next_window(b, wy, wx, grid, EDGE)


CUTS = {
    "exact": ((4, 6), (2, 3), (0, 0)),
    "shifted": ((4, 6), (2, 3), (1, 1)),
    "ragged-and-shifted-down": ((5, 9), (2, 3), (1, 0)),
    "ragged-down-one-across": ((7, 4), (2, 4), (0, 0)),
    "pads-in-two-windows-of-an-axis": ((8, 9), (7, 7), (5, 6)),
    "one-window": ((2, 2), (2, 2), (0, 0)),
}


@pytest.mark.parametrize(("size", "window", "shift"), CUTS.values(), ids=CUTS.keys())
@pytest.mark.parametrize("num_runs", [1, 3])
def test_runs_visit_every_window_once_and_in_order(size, window, shift, num_runs, device) -> None:
    batch, rows, columns = 3, -(-size[0] // window[0]), -(-size[1] // window[1])

    def is_edge(wy: int, wx: int) -> bool:
        # The last token of an inner window is on the map after the roll is undone, without wrapping.
        ends = (wy + 1) * window[0] + shift[0], (wx + 1) * window[1] + shift[1]
        return ends[0] > size[0] or ends[1] > size[1]

    every = [(b, y, x) for b in range(batch) for y in range(rows) for x in range(columns)]
    for edge in (False, True):
        wanted = [at for at in every if is_edge(*at[1:]) == edge]
        seen = torch.full((len(wanted) + 1, 3), -1, dtype=torch.int32, device=device)
        for run in range(num_runs):
            _walk_kernel[(1,)](seen, batch, *size, *shift, run, num_runs, *window, edge)
        assert seen[:-1].tolist() == [list(at) for at in wanted]
        assert seen[-1].tolist() == [-1, -1, -1]


@triton.jit
def _addresses_kernel(
    inner_ptr, edge_ptr, b, wy, wx, B, H, W, C, shift, WH: tl.constexpr, WW: tl.constexpr, N: tl.constexpr
):
    geometry = (B, H, W, C, shift, shift)
    i = tl.arange(0, N)
    first = first_token(b, wy, wx, geometry, WH, WW)
    place, _, _ = place_tokens(i, wy, wx, geometry, WH, WW, False, False, True, False, False)
    tl.store(inner_ptr + i, first * (3 * C) + place * (3 * C))
    place, _, _ = place_tokens(i, wy, wx, geometry, WH, WW, False, False, True, False, True)
    tl.store(edge_ptr + i, first * (3 * C) + place * (3 * C))


@pytest.mark.parametrize(
    ("batch", "side", "channels"), [(1024, 64, 1024), (2, 4096, 256)], ids=["many-images", "large-image"]
)
def test_addresses_beyond_32_bits(batch: int, side: int, channels: int, device: str) -> None:
    b, shift, window = batch - 1, 2, 4
    last = side // window - 1
    inner, edge = (torch.zeros(16, dtype=torch.int64, device=device) for _ in range(2))
    _addresses_kernel[(1,)](inner, edge, b, last, last, batch, side, side, channels, shift, window, window, 16)

    def address(i: int, wraps: bool) -> int:
        y, x = (last * window + shift + place for place in divmod(i, window))
        if wraps:
            y, x = y % side, x % side
        return ((b * side + y) * side + x) * 3 * channels

    assert address(0, False) > 2**31
    assert inner.tolist() == [address(i, False) for i in range(16)]
    assert edge.tolist() == [address(i, True) for i in range(16)]


LISTS = {
    "one-window": ((1, 2, 2), (1, 2, 2), (0, 0, 0), (False, False, False), True),
    "shifted": ((4, 4, 6), (2, 2, 3), (1, 1, 2), (False, False, False), True),
    "shifted-on-one-axis": ((2, 4, 6), (2, 2, 3), (0, 0, 1), (False, False, False), True),
    "ragged-masked": ((3, 5, 7), (2, 2, 3), (1, 0, 2), (False, False, False), True),
    "ragged-filled-cyclic": ((3, 5, 7), (2, 4, 3), (1, 2, 1), (True, False, True), False),
    "pads-in-two-windows-of-an-axis": ((1, 8, 9), (1, 7, 7), (0, 5, 6), (False, False, True), True),
}


@pytest.mark.parametrize(("size", "window", "shift", "cyclic", "mask_pads"), LISTS.values(), ids=LISTS.keys())
def test_list_of_windows(size, window, shift, cyclic, mask_pads, device, poisoned_memory) -> None:
    """Against the definition's partition of a map that holds each token's own number, from 1, and pads of 0."""
    cut, tokens = cut_map(size, window, shift), size[0] * size[1] * size[2]
    number = torch.arange(1, tokens + 1, device=device).view(1, *size, 1)
    wanted = partition(number, cut, 1, 1, torch.int64).view(cut.num_windows, cut.num_tokens) - 1
    place, region, edge = list_windows(size, cut.window, cut.shift, cyclic, mask_pads, torch.device(device))
    assert torch.equal(place.long(), wanted)
    blocked = blocked_pairs(cut, cyclic, mask_pads, device)
    apart = region[:, :, None] != region[:, None, :]
    # Whether two pads see each other is nobody's concern.
    matters = (wanted >= 0)[:, :, None] | (wanted >= 0)[:, None, :]
    assert not (matters & (apart if blocked is None else apart != blocked)).any()
    assert torch.equal(edge.bool(), apart.flatten(1).any(1) | (wanted < 0).any(1))
