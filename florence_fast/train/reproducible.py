"""Bitwise reproducible runs: deterministic algorithms, seeds per step, and generators that can be stored."""

import logging
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from florence_fast.strict_json import format_json, parse_json
from florence_fast.train.differences import differences

_memory: Any = torch.utils.deterministic  # a module whose one attribute its class defines

logger = logging.getLogger(__name__)


@contextmanager
def deterministic_algorithms(enabled: bool) -> Iterator[None]:
    """Let torch use deterministic algorithms only, inside the ``with`` block; the earlier choice comes back after.

    Uninitialised memory is not filled meanwhile: that costs a pass over every new tensor and finds faults of ops,
    which is their tests' work.
    """
    if not enabled:
        yield
        return
    mode, filling = torch.get_deterministic_debug_mode(), _memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    _memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        _memory.fill_uninitialized_memory = filling


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch's global generators from (seed, step, rank), so that drop path depends on nothing else.

    Whatever drew numbers between two steps (an evaluation, a callback) leaves no trace in the training.
    """
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> 1))


def rng_state(generators: Mapping[str, np.random.Generator]) -> dict[str, Any]:
    """Collect the state of torch's generators (CPU and every CUDA device) and of the named NumPy generators.

    The result holds tensors and strings only, which ``torch.load(weights_only=True)`` reads.
    """
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": numpy_states(generators),
    }


def numpy_states(generators: Mapping[str, np.random.Generator]) -> dict[str, str]:
    """Return the state of every generator as JSON."""
    return {name: format_json(_plain(g.bit_generator.state)) for name, g in generators.items()}


def set_rng_state(state: Mapping[str, Any], generators: Mapping[str, np.random.Generator]) -> None:
    """Put back what `rng_state` collected.

    Raises:
        ValueError: the state names other NumPy generators than the run has.
    """
    if state["numpy"].keys() != generators.keys():
        raise ValueError(
            f"the checkpoint holds the NumPy generators {sorted(state['numpy'])}, the run has {sorted(generators)}"
        )
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
    for name, text in state["numpy"].items():
        generators[name].bit_generator.state = _arrays(parse_json(text))


def environment(device: torch.device, world_size: int) -> dict[str, str | int]:
    """Describe what equal bits depend on besides the seed: torch, threads, processor, device, processes."""
    return {
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "world_size": world_size,
    }


def warn_of_differences(kind: str, earlier: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Name every entry in which a resumed run differs from its checkpoint; nested entries have dotted names."""
    for name, before, after in differences(earlier, now):
        logger.warning(
            "%s %s differs from the checkpoint's: %r, now %r; losses need not be equal to the bit",
            kind,
            name,
            before,
            after,
        )


def _plain(value: Any) -> Any:
    """Turn the arrays inside a bit generator's state into lists that `_arrays` recognises."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, np.ndarray):
        return {"dtype": str(value.dtype), "values": value.tolist()}
    return value.item() if isinstance(value, np.generic) else value


def _arrays(value: Any) -> Any:
    """Undo `_plain`."""
    if isinstance(value, dict) and value.keys() == {"dtype", "values"}:
        return np.array(value["values"], dtype=value["dtype"])
    return {key: _arrays(inner) for key, inner in value.items()} if isinstance(value, dict) else value
