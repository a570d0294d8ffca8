"""Does this device's compiler multiply a transposed product right? ``dot(trans(dot(x, y^T)), z)``, against float64.

Triton 3.4.0 up to but not including 3.7.1 gets it wrong on Hopper at 64-wide tiles, and the compiled code looks the
same in good and bad versions: only a numeric test on the device can tell. The backward of window attention has this
form (dV = P^T dO, dK = dS^T Q) and a safe one.

Letters: N side of a tile · d width of the other operand.
"""

from typing import Any

import torch
import triton
import triton.language as tl

TILE = 64
WIDTHS = (16, 32, 64, 128)
ROUNDS = 4


@triton.jit
def _transposed_product_kernel(x_ptr, y_ptr, z_ptr, out_ptr, rounds, N: tl.constexpr, D: tl.constexpr):
    """x, y, z: (rounds, N, d), out: (N, d) float32, the sum over rounds of (x y^T)^T z."""
    rows, cols = tl.arange(0, N), tl.arange(0, D)
    total = tl.zeros((N, D), tl.float32)
    for i in range(rounds):
        at = i * N * D + rows[:, None] * D + cols[None, :]
        x, y, z = tl.load(x_ptr + at), tl.load(y_ptr + at), tl.load(z_ptr + at)  # (N, d)
        p = tl.dot(x, tl.trans(y), input_precision="ieee")  # (N, N)
        total = tl.dot(tl.trans(p.to(z.dtype)), z, total, input_precision="ieee")
    tl.store(out_ptr + rows[:, None] * D + cols[None, :], total)


def transposed_product_error(dtype: torch.dtype, width: int, num_warps: int, device: str) -> tuple[float, float]:
    """Return the relative errors of the kernel and of PyTorch's own products in ``dtype``."""
    draw = torch.Generator(device).manual_seed(0)
    x, y, z = (
        (torch.randn(ROUNDS, TILE, width, generator=draw, device=device) * width**-0.25).to(dtype) for _ in range(3)
    )
    out = torch.full((TILE, width), torch.nan, device=device)
    _transposed_product_kernel[(1,)](x, y, z, out, ROUNDS, N=TILE, D=width, num_warps=num_warps)
    exact = ((x.double() @ y.double().mT).mT @ z.double()).sum(0)
    plain = ((x @ y.mT).mT @ z).float().sum(0)
    return tuple(((found.double() - exact).norm() / exact.norm()).item() for found in (out, plain))


def run(device: str, dtypes: tuple[torch.dtype, ...], widths: tuple[int, ...] = WIDTHS) -> list[dict[str, Any]]:
    """Try every dtype, width and number of warps; "right" means at most twice the plain error."""
    rows = []
    for dtype in dtypes:
        for width in widths:
            for num_warps in (4, 8):
                error, plain = transposed_product_error(dtype, width, num_warps, device)
                limit = 2 * max(plain, torch.finfo(dtype).eps / 4)
                row = {"dtype": str(dtype).removeprefix("torch."), "width": width, "num_warps": num_warps}
                rows.append({**row, "error": error, "plain_error": plain, "right": error <= limit})
    return rows


def run_backwards(
    device: torch.device, dtypes: tuple[torch.dtype, ...], windows: tuple[int, ...]
) -> list[dict[str, Any]]:
    """Ask the test by which window attention chooses its backward, for shifted windows and a head dim of 32."""
    from florence_fast.ops.window_attention.triton import fast_dots_are_right

    rows = []
    for dtype in dtypes:
        for window in windows:
            right = fast_dots_are_right(device, dtype, False, [window] * 2, [window // 2] * 2, 32)
            verdict = "right" if right else "WRONG: the safe form is taken"
            rows.append({"dtype": str(dtype).removeprefix("torch."), "window": window, "verdict": verdict})
    return rows
