"""What several tests of `accelerate` look at."""

import pytest


@pytest.fixture
def calls(monkeypatch):
    """The keyword arguments of every call of the op."""
    from florence_fast import ops  # Triton comes with it, which must not be here before ../conftest.py has spoken

    seen = []
    original = ops.window_attention

    def counting(*args, **kwargs):
        seen.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(ops, "window_attention", counting)
    return seen
