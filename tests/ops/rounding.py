"""Bounds that follow from the arithmetic: our error against float64, beside that of the plain computation."""

import torch
from torch import Tensor


def relative_error(x: Tensor, exact: Tensor) -> float:
    """Return ``||x - exact|| / ||exact||`` in float64."""
    return ((x.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def assert_as_exact(got: Tensor, plain: Tensor, exact: Tensor, name: str = "values", factor: int = 2) -> None:
    """Fail if ``got`` is further from ``exact`` than ``factor`` times the plain low-precision computation is.

    The bound is held by the norm of the error and, with twice that factor, by its largest element. A processor whose
    library happens to sum in a luckier order must not decide: four roundings of the largest element are always allowed.

    Args:
        got: result of the code under test, in its own dtype, any shape.
        plain: the same result by plain PyTorch operations in the dtype of ``got``.
        exact: the same result in float64. Where it is not finite, ``got`` must equal it.
        name: what the failure message calls the result.
        factor: 2 for results; 3 for gradients that pass through more sums than the plain form has.
    """
    assert got.shape == exact.shape == plain.shape, f"{name}: {got.shape}, {plain.shape}, {exact.shape}"
    exact, finite = exact.detach(), exact.detach().isfinite()
    got_f64, plain_f64 = got.detach().double(), plain.detach().double()
    assert torch.equal(torch.where(finite, 0.0, got_f64), torch.where(finite, 0.0, exact)), f"{name}: not finite"
    if not finite.any():
        return
    errors, usual = ((x - exact)[finite] for x in (got_f64, plain_f64))
    rounding = 4 * torch.finfo(got.dtype).eps * exact[finite].abs().max()
    worst = errors.abs().argmax()
    for what, error, allowed in (
        ("norm", errors.norm(), factor * usual.norm() + rounding),
        ("largest", errors.abs().max(), 2 * factor * usual.abs().max() + rounding),
    ):
        assert error <= allowed, (
            f"{name}: {what} of the error {error:.2e}, allowed {allowed:.2e}; "
            f"worst {got_f64[finite][worst]} instead of {exact[finite][worst]}"
        )
