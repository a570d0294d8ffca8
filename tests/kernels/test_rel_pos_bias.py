"""The bias between its table and the forms that kernels read, both ways."""

import math

import pytest
import torch
from torch import Tensor

from florence_fast.kernels.rel_pos_bias import (
    MASKED,
    MASKED_FP16,
    BiasForm,
    expand_bias,
    fold_bias_grad,
    place_bias_grad,
)
from florence_fast.ops.windows import corner_index, offset_index

HEADS = 2


def whole(table: Tensor, window: tuple[int, ...], full: tuple[int, ...]) -> Tensor:
    """(h, N, N) by indexing."""
    tokens = math.prod(window)
    rows = table[offset_index(window, full, table.device)]
    return rows.view(tokens, tokens, HEADS).permute(2, 0, 1)


@pytest.mark.parametrize("window", [(7, 7), (5, 7)], ids=["full", "shortened"])
def test_expanded_row_by_row(window: tuple[int, int], device: str, poisoned_memory: None) -> None:
    full, tokens = (7, 7), window[0] * window[1]
    table = torch.randn(169, HEADS, device=device)
    form = BiasForm(64, 64, torch.float32)
    got = expand_bias(table, None, HEADS, 0.25, full, window, form, table.device).view(HEADS, 64, 64)
    torch.testing.assert_close(got[:, :tokens, :tokens], whole(table, window, full) / 0.25)
    assert (got[:, tokens:, :tokens] == 0).all() and (got[:, :, tokens:] == MASKED).all()
    corner = corner_index(window, full, table.device)
    bias = torch.randn(HEADS, 49, 49, device=device)
    got = expand_bias(None, bias, HEADS, 0.25, full, window, form, table.device).view(HEADS, 64, 64)
    torch.testing.assert_close(got[:, :tokens, :tokens], bias[:, corner][:, :, corner] / 0.25)
    got = expand_bias(None, None, HEADS, 0.25, full, window, form, table.device).view(HEADS, 64, 64)
    assert not got[:, :, :tokens].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(144, 144), (192, 144), (128, 128)])
def test_expanded_in_order_of_fragments(rows: int, columns: int, dtype: torch.dtype, device: str) -> None:
    """Eight neighbours in memory are the four corners, two columns each, that one thread of a warp holds."""
    window = (12, 12) if columns == 144 else (8, 16)
    table = torch.randn((2 * window[0] - 1) * (2 * window[1] - 1), HEADS, device=device)
    form = BiasForm(rows, columns, dtype, fragments=True)
    got = expand_bias(table, None, HEADS, 1.0, window, window, form, table.device).float()
    wanted = torch.zeros(HEADS, rows, columns, device=device)
    wanted[:, : window[0] * window[1], : window[0] * window[1]] = whole(table, window, window).to(dtype).float()
    at = 0
    for top in range(0, rows // 64 * 64, 64):
        for left, width in ((0, 128), (128, columns - 128)):
            for column in range(left, left + width, 16):
                for warp in range(4):
                    for lane in range(32):
                        row, pair = top + 16 * warp + lane // 4, column + 2 * (lane % 4)
                        corners = [(row, pair), (row + 8, pair), (row, pair + 8), (row + 8, pair + 8)]
                        held = torch.cat([wanted[:, y, x : x + 2] for y, x in corners], 1)
                        # The interpreter cuts where a GPU rounds.
                        torch.testing.assert_close(got[:, at : at + 8], held, rtol=2**-7, atol=0)
                        at += 8
    torch.testing.assert_close(got[:, at:], wanted[:, rows // 64 * 64 :].flatten(1), rtol=2**-7, atol=0)


@pytest.mark.parametrize("runs", [1, 5, 70])
@pytest.mark.parametrize("window", [(7, 7), (5, 7), (3, 2)], ids=str)
def test_gradients_are_folded(runs: int, window: tuple[int, int], device: str, poisoned_memory: None) -> None:
    full, tokens = (7, 7), window[0] * window[1]
    partial = torch.randn(runs, HEADS, 64, 64, device=device)
    table = torch.randn(169, HEADS, device=device, dtype=torch.float64, requires_grad=True)
    used = partial.double().sum(0)[:, :tokens, :tokens]
    (wanted,) = torch.autograd.grad(whole(table, window, full), table, used)
    got = fold_bias_grad(partial, table.detach().float(), full, window)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-4)
    bias = torch.randn(HEADS, 49, 49, device=device, dtype=torch.float64, requires_grad=True)
    corner = corner_index(window, full, bias.device)
    (wanted,) = torch.autograd.grad(bias[:, corner][:, :, corner], bias, used)
    got = place_bias_grad(partial, bias.detach().float(), full, window)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("window", [(3, 4, 5), (2, 4, 3)], ids=["full", "shortened"])
def test_expanded_in_three_axes_and_transposed(window: tuple[int, ...], device: str, poisoned_memory: None) -> None:
    full, tokens = (3, 4, 5), math.prod(window)
    table, bias = torch.randn(5 * 7 * 9, HEADS, device=device), torch.randn(HEADS, 60, 60, device=device)
    corner = corner_index(window, full, table.device)
    wanted = {"table": whole(table, window, full) / 0.25, "bias": bias[:, corner][:, :, corner] / 0.25}
    for transposed in (False, True):
        form = BiasForm(64, 64, torch.float32, transposed=transposed)
        for name, sources in {"table": (table, None), "bias": (None, bias)}.items():
            got = expand_bias(*sources, HEADS, 0.25, full, window, form, table.device).view(HEADS, 64, 64)
            got = got.mT if transposed else got
            torch.testing.assert_close(got[:, :tokens, :tokens], wanted[name])
            assert (got[:, :, tokens:] == MASKED).all()


def test_minus_infinity_becomes_finite(device: str) -> None:
    bias = torch.full((HEADS, 6, 6), -torch.inf, device=device)
    for dtype, wanted in ((torch.float32, MASKED), (torch.float16, MASKED_FP16)):
        got = expand_bias(None, bias, HEADS, 0.5, (2, 3), (2, 3), BiasForm(16, 16, dtype), bias.device)
        assert (got.view(HEADS, 16, 16)[:, :6, :6] == torch.tensor(wanted, dtype=dtype)).all()


@pytest.mark.parametrize(
    ("full", "window"), [((2, 3, 4), (2, 3, 4)), ((3, 4, 5), (2, 4, 3)), ((1, 40), (1, 40))], ids=str
)
def test_gradients_are_folded_in_three_axes_and_over_long_ones(full, window, device, poisoned_memory) -> None:
    tokens, offsets = math.prod(window), math.prod(2 * w - 1 for w in full)
    partial = torch.randn(3, HEADS, 64, 64, device=device)
    table = torch.randn(offsets, HEADS, device=device, dtype=torch.float64, requires_grad=True)
    used = partial.double().sum(0)[:, :tokens, :tokens]
    (wanted,) = torch.autograd.grad(whole(table, window, full), table, used)
    got = fold_bias_grad(partial, table.detach().float(), full, window)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-4)
    bias = torch.randn(HEADS, math.prod(full), math.prod(full), device=device, dtype=torch.float64, requires_grad=True)
    corner = corner_index(window, full, bias.device)
    (wanted,) = torch.autograd.grad(bias[:, corner][:, :, corner], bias, used)
    got = place_bias_grad(partial, bias.detach().float(), full, window)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-4)
