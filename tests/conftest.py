"""What every test shares: Triton's interpreter, seeds, devices, and memory that is poisoned before it is written.

Triton reads ``TRITON_INTERPRET`` when it is imported, and compiling and interpreting cannot share a process.
So the variable is set here before any test module is imported, except under ``-m gpu``.
"""

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, max_examples=25, deadline=None)
settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    """Interpret kernels on the CPU unless this run is for a GPU; it happens before torch or triton is imported."""
    if config.getoption("markexpr") != "gpu":
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests of what this machine does not have, saying so."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed torch's generators before every test; the value is there to be printed."""
    import torch

    torch.manual_seed(0)
    return 0


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Each device on which an op must agree with its definition."""
    return request.param


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill every uninitialised floating-point tensor with NaN, so that reading one cannot go unnoticed."""
    import torch

    mode, filling = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("warn")
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.set_deterministic_debug_mode(mode)
    torch.utils.deterministic.fill_uninitialized_memory = filling
