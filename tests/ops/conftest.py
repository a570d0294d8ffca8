"""What the tests of the native kernels share: each instruction set in turn, and the backend in force."""

from collections.abc import Iterator

import pytest


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that asks for a level once for each; nothing is imported before tests are collected."""
    if "level" in metafunc.fixturenames:
        from florence_fast import native

        metafunc.parametrize("level", native.LEVELS, indirect=True)


@pytest.fixture
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each instruction set that runs here, in force."""
    from florence_fast import native

    if request.param not in native.levels():
        pytest.skip(f"{request.param} does not run here")
    monkeypatch.setenv("FLORENCE_FAST_CPU", request.param)
    return request.param


@pytest.fixture(autouse=True)
def cpp(request: pytest.FixtureRequest) -> Iterator[None]:
    """Force the backend in tests of native kernels, so that no other can take its place.

    They run on one thread but where threads are the matter.
    """
    if request.node.get_closest_marker("native") is None:
        yield
        return
    import torch

    from florence_fast import ops

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with ops.backend("cpp"):
        yield
    torch.set_num_threads(threads)
