"""How many threads a native function of the data pipeline takes."""

import torch


def number_of_threads(threads: int | None) -> int:
    """Return ``threads``, or torch's number for None; in a worker process of a loader that is 1.

    Raises:
        ValueError: ``threads`` is no positive int.
    """
    if threads is None:
        return torch.get_num_threads()
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= 4096:
        raise ValueError(f"threads must be an int from 1 to 4096, or None for torch's number, got {threads!r}")
    return threads
