"""What every test shares: Triton's interpreter, seeds, devices, poisoned memory, and a count of what was proved.

Triton reads ``TRITON_INTERPRET`` when it is imported, and compiling and interpreting cannot share a process.
So the variable is set here before any test module is imported, except under ``-m gpu``.
"""

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings

from tests.counts import COUNTS

settings.register_profile("repeatable", derandomize=True, max_examples=25, deadline=None)
settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    """Interpret kernels on the CPU unless this run is for a GPU; it happens before torch or triton is imported."""
    config.stash[COUNTS] = Counter()
    if config.getoption("markexpr") != "gpu":
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Send the counts of a worker of pytest-xdist to the process that prints the summary."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["counts"] = dict(session.config.stash[COUNTS])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Add the counts of a worker; the number of ops is the same in all of them."""
    counts = node.config.stash[COUNTS]
    for words, number in getattr(node, "workeroutput", {}).get("counts", {}).items():
        counts[words] = number if words == "ops" else counts[words] + number


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say how many ops there are, how often one was checked, and how many kernels were compiled."""
    counts = config.stash[COUNTS]
    if counts:
        terminalreporter.write_line(", ".join(f"{number:,} {words}" for words, number in counts.items()))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests of what this machine does not have, saying so."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session", autouse=True)
def counted_opchecks(pytestconfig: pytest.Config) -> Iterator[None]:
    """Count the calls of torch.library.opcheck."""
    import torch

    from florence_fast.ops import OPS

    opcheck, counts = torch.library.opcheck, pytestconfig.stash[COUNTS]
    counts["ops"] = len(OPS)

    def counted(*args: Any, **kwargs: Any) -> Any:
        counts["opchecks"] += 1
        return opcheck(*args, **kwargs)

    torch.library.opcheck = counted
    yield
    torch.library.opcheck = opcheck


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed torch's generators before every test; the value is there to be printed."""
    import torch

    torch.manual_seed(0)
    return 0


@pytest.fixture(autouse=True)
def registered_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take back the model configurations that a test registers."""
    from florence_fast.models import registry

    monkeypatch.setattr(registry, "_CONFIGS", dict(registry._CONFIGS))


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


@pytest.fixture(scope="session")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Processes for tests of collectives, started at the first of them and stopped at the end."""
    from tests.train.processes import Processes

    started = Processes(tmp_path_factory.mktemp("processes"))
    yield started
    started.stop()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Keep small runs on one thread: two that wait for a busy core take 20 times as long."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
