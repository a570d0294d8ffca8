"""Tuning at a user's first call, where FLORENCE_FAST_AUTOTUNE=1 asks for it: which launch of each kernel is fastest.

A call of an op runs as always, and its result is what the caller gets. If one of its kernels has no configuration that
was measured on this device, the call is repeated with others: what gives the same values is timed, the fastest is kept
in the user's cache, and later calls, in later processes too, are launched so while the variable is set.
"""

import logging
import math
import threading
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from florence_fast import env
from florence_fast.errors import unknown
from florence_fast.kernels.configs import Config, Request, forced, measured, usual, watched
from florence_fast.kernels.configs.search import MIN_GAIN, candidates, lead
from florence_fast.ops._measured_configs import MeasuredConfigs, measured_configs
from florence_fast.timing import time_calls

Call = Callable[[], Any]

SECONDS = 0.05
"""How long a candidate is timed, warm-up not counted."""

logger = logging.getLogger(__name__)
_lock = threading.RLock()
_given_up: set[tuple[torch.device, str, str]] = set()
"""Kernels and keys that this process could not measure, and tries no more."""


def wanted(x: Tensor) -> bool:
    """Say whether a call on ``x`` is to be launched as measurement says.

    Raises:
        ValueError: FLORENCE_FAST_AUTOTUNE is neither 0 nor 1.
    """
    if not _on_gpu(x):
        return False
    value = env.read("FLORENCE_FAST_AUTOTUNE")
    if value not in ("0", "1"):
        raise unknown("FLORENCE_FAST_AUTOTUNE", value, ("0", "1"))
    return value == "1"


def run(function: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Return ``function(x, *args, **kwargs)``, an op's implementation, and tune its kernels if nobody has yet.

    The implementation changes none of its arguments, so that it may be run again.
    """
    configs, call = measured_configs(x.device), partial(function, x, *args, **kwargs)
    with measured(configs.table), watched(this_thread=True) as requests:
        out = call()
    if _open(requests, configs, x.device) and not _must_not_wait():
        # Events are recorded on the device in force, which need not be that of the tensor.
        with (
            _lock,
            measured(configs.table),
            torch.no_grad(),
            torch.cuda.device(x.device) if x.is_cuda else nullcontext(),
        ):
            try:
                _tune(call, _tensors(out), configs, x.device)
            except torch.OutOfMemoryError as error:
                _give_up(requests, x.device, f"no memory for a second run: {error}")
                torch.cuda.empty_cache()
    return out


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def _must_not_wait() -> bool:
    """Say whether a graph is being captured or traced, in which nothing can be timed or compared."""
    return torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def _open(requests: list[Request], configs: MeasuredConfigs, device: torch.device) -> list[Request]:
    """Return the requests that nothing measured answers, each kernel and key once."""
    found = {(request.kernel, request.key): request for request in requests}
    return [
        request
        for (kernel, key), request in found.items()
        if key not in configs.table.get(kernel, {}) and (device, kernel, key) not in _given_up
    ]


def _tune(call: Call, out: list[Tensor], configs: MeasuredConfigs, device: torch.device) -> None:
    """Measure the open kernels of a call, one after the other."""
    # What a call does but once, as compilation or a test of the device, is over: these are the launches that repeat.
    with watched(this_thread=True) as requests:
        again = _tensors(call())
    if _apart(again, out):
        _give_up(requests, device, "two runs alike give different values")
        return
    for request in _open(requests, configs, device):
        before = usual(request)
        config, gain = _fastest(call, request, before, out, device)
        configs.add(request.kernel, request.key, config)
        said = f"{gain:.1%} faster with {config}" if config != before else f"stays with {config}"
        logger.info("tuned %s %s: %s", request.kernel, request.key, said)


def _give_up(requests: list[Request], device: torch.device, why: str) -> None:
    _given_up.update((device, request.kernel, request.key) for request in requests)
    kernels = ", ".join(sorted({request.kernel for request in requests}))
    logger.warning("not tuned: %s: %s", kernels, why)


def _fastest(
    call: Call, request: Request, before: Config, out: list[Tensor], device: torch.device
) -> tuple[Config, float]:
    """Return the fastest configuration of one kernel and by how much it leads; ``before`` unless one leads clearly."""

    def seconds_of(config: Config) -> float:
        with forced(request.kernel, config, this_thread=True):
            return time_calls({"call": [call]}, device, SECONDS)["call"].median

    usual_seconds, best, best_seconds = seconds_of(before), before, math.inf
    for config in candidates(before):
        try:
            with forced(request.kernel, config, this_thread=True):
                if _apart(_tensors(call()), out):
                    logger.warning("%s %s gives other values with %s", request.kernel, request.key, config)
                    continue
            seconds = seconds_of(config)
        except Exception as error:  # too much shared memory or too few registers are findings, as any other
            logger.debug("%s %s cannot be launched with %s: %s", request.kernel, request.key, config, error)
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # raises if the device is lost, which must not pass for a finding
                torch.cuda.empty_cache()
            continue
        if seconds < best_seconds:
            best, best_seconds = config, seconds
    if best_seconds >= usual_seconds:
        return before, 0.0
    gain = lead(seconds_of, best, before)
    return (best, gain) if gain >= MIN_GAIN else (before, 0.0)


def _tensors(out: Any) -> list[Tensor]:
    return list(out) if isinstance(out, tuple) else [out]


def _apart(found: list[Tensor], wanted: list[Tensor]) -> bool:
    """Say whether results differ by more than sums in another order do."""
    return not all(_distance(x, y) <= _limit(y) for x, y in zip(found, wanted, strict=True))


def _limit(x: Tensor) -> float:
    """Two roundings; of a float32 sum that nearly cancels more is left, and a wrong kernel is farther off still."""
    return max(1e-3, 2 * torch.finfo(x.dtype).eps) if x.is_floating_point() else 0.0


def _distance(x: Tensor, wanted: Tensor) -> float:
    """Return ||x - wanted|| / ||wanted|| over what is finite in both; NaN where only one is not."""
    if x.shape != wanted.shape or x.dtype != wanted.dtype:
        return math.inf
    if not wanted.is_floating_point():
        return 0.0 if torch.equal(x, wanted) else math.inf
    same = (x == wanted) | (x.isnan() & wanted.isnan())
    wide = torch.promote_types(wanted.dtype, torch.float32)
    difference = (x.to(wide) - wanted.to(wide)).masked_fill_(same, 0).norm().item()
    if difference == 0:
        return 0.0
    norm = wanted.to(wide).nan_to_num(0.0, 0.0, 0.0).norm().item()
    return difference / norm if norm else math.inf
