"""How many threads a native function of the data pipeline takes."""

import os

import torch

_forked = False


def number_of_threads(threads: int | None) -> int:
    """Return ``threads``, or torch's number for None; in a forked process it is always 1.

    OpenMP's threads do not survive a fork, and GNU's OpenMP waits for them for ever. No result depends on the number.

    Raises:
        ValueError: ``threads`` is no positive int.
    """
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= 4096):
        raise ValueError(f"threads must be an int from 1 to 4096, or None for torch's number, got {threads!r}")
    if _forked:
        return 1
    return torch.get_num_threads() if threads is None else threads


def _note_fork() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_note_fork)
