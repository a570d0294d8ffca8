"""Which launch configurations are worth a measurement, and when one has won: for bench.gpu.tune and a user's call."""

from collections.abc import Callable
from itertools import product

from florence_fast.kernels.configs import Config

REGISTERS = 65536
"""Of a multiprocessor, by the compute capability's table in NVIDIA's CUDA C++ Programming Guide."""
MAX_REGISTERS = 255
"""Of a thread, from the same table."""

ROUNDS = 3
"""How often the best candidate and what it would replace are timed in turns."""
MIN_GAIN = 0.01
"""What every time of the winner must be below every time of the other, as a part of that."""


def candidates(default: Config) -> list[Config]:
    """Return the configurations around a kernel's default that are worth a measurement, the default left out.

    Half and twice its warps with a stage less and a stage more; and half and twice as many programs on a
    multiprocessor, or one more. A limit on registers is tried where it lets that many programs be there at once.
    """
    warps = {max(1, default.num_warps // 2), default.num_warps, min(16, 2 * default.num_warps)}
    stages = {max(1, default.num_stages - 1), default.num_stages, min(4, default.num_stages + 1)}
    share = default.programs_per_sm
    found = [Config(w, s, share) for w, s in product(sorted(warps), sorted(stages))]
    for programs in sorted({max(1, share // 2), share, share + 1, 2 * share}):
        config = Config(default.num_warps, default.num_stages, programs)
        registers = REGISTERS // (32 * config.num_warps * programs) // 8 * 8
        found.append(config)
        if 32 <= registers < MAX_REGISTERS:
            found.append(Config(config.num_warps, config.num_stages, programs, registers))
    return [config for config in dict.fromkeys(found) if config != default]


def lead(seconds_of: Callable[[Config], float], config: Config, usual: Config) -> float:
    """Time two configurations in turns, and return how far apart the worst of one and the best of the other are.

    Clocks and temperature drift while candidates are timed, so a lead over a time from before says little.
    """
    before, after = [], []
    for _ in range(ROUNDS):
        before.append(seconds_of(usual))
        after.append(seconds_of(config))
    return 1 - max(after) / min(before)
