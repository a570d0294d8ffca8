"""What the tests of training share."""

from collections.abc import Iterator

import pytest

from tests.train.processes import Processes


@pytest.fixture(scope="session")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """Processes for tests of collectives, started at the first of them and stopped at the end."""
    started = Processes(tmp_path_factory.mktemp("processes"))
    yield started
    started.stop()
