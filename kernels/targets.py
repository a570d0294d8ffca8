"""The GPU that a launch is for: its architecture, and how many multiprocessors it has.

Launchers ask here and nowhere else, so that the same launch can be computed for a GPU that is not in this machine.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Target:
    """A GPU: ``arch`` is the compute capability without its dot, 80 for 8.0."""

    arch: int
    num_sms: int


A100 = Target(80, 108)
H200 = Target(90, 132)
INTERPRETER = Target(80, 2)
"""What a CPU is taken for under Triton's interpreter: two runs of windows, so that their joint is exercised."""

_assumed: list[Target] = []


def target_of(device: torch.device) -> Target:
    """Return the GPU that ``device`` is; for any other device the one of ``assume``, or the interpreter's."""
    if device.type == "cuda":
        return _cuda_target(device.index or 0)
    return _assumed[-1] if _assumed else INTERPRETER


@contextmanager
def assume(target: Target) -> Iterator[None]:
    """Take tensors that are not on a GPU for tensors on ``target``."""
    _assumed.append(target)
    try:
        yield
    finally:
        _assumed.pop()


@functools.cache
def _cuda_target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    return Target(properties.major * 10 + properties.minor, properties.multi_processor_count)
