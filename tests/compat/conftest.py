"""What several tests of `accelerate` look at."""

import pytest

from florence_fast import ops


@pytest.fixture
def calls(monkeypatch):
    """The keyword arguments of every call of the op."""
    seen = []
    original = ops.window_attention

    def counting(*args, **kwargs):
        seen.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(ops, "window_attention", counting)
    return seen
