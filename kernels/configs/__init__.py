"""How each kernel is launched: warps, stages and programs, from tables that measurement writes.

A table is a file ``sm_<arch>.json`` beside this one: ``{"<kernel>": {"<dtype>/n<tokens>/d<head dim>": {...}}}``. What
no table knows runs with the default that the kernel gives.
"""

import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Config:
    """Launch options of one kernel; ``programs_per_sm`` is how many of its programs share a multiprocessor."""

    num_warps: int = 4
    num_stages: int = 2
    programs_per_sm: int = 2
    maxnreg: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Return what goes into the launch beside the kernel's arguments."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.maxnreg is None else {**options, "maxnreg": self.maxnreg}


def config_of(kernel: str, arch: int, dtype: torch.dtype, tokens: int, head_dim: int, default: Config) -> Config:
    """Return the measured configuration of ``kernel`` for this architecture, dtype and shape, or ``default``."""
    key = f"{str(dtype).removeprefix('torch.')}/n{tokens}/d{head_dim}"
    return replace(default, **_table(arch).get(kernel, {}).get(key, {}))


@functools.cache
def _table(arch: int) -> dict[str, dict[str, dict[str, Any]]]:
    path = Path(__file__).with_name(f"sm_{arch}.json")
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
