"""How many threads the data pipeline's native functions and torch take, above all in a forked process.

OpenMP's threads do not survive a fork, and GNU's OpenMP waits for them for ever.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_forked = False


def number_of_threads(threads: int | None) -> int:
    """Return ``threads``, or torch's number for None; in a forked process always 1. No result depends on the number.

    Raises:
        ValueError: ``threads`` is no positive int.
    """
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= 4096):
        raise ValueError(f"threads must be an int from 1 to 4096, or None for torch's number, got {threads!r}")
    if _forked:
        return 1
    return torch.get_num_threads() if threads is None else threads


@contextmanager
def one_thread_after_fork() -> Iterator[None]:
    """Keep torch to one thread for the length of a call, if this process was forked."""
    threads = torch.get_num_threads() if _forked else 1
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _note_fork() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_note_fork)
