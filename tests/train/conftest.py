"""What the tests of training share."""

from collections.abc import Iterator

import pytest
import torch

from tests.train.processes import Processes


@pytest.fixture(scope="session")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """Processes for tests of collectives, started at the first of them and stopped at the end."""
    started = Processes(tmp_path_factory.mktemp("processes"))
    yield started
    started.stop()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Keep small runs on one thread: two that wait for a busy core take 20 times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
