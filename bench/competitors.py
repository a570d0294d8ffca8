"""The competitors that every op has, and how one is found that may not be installed.

Our own backends, the library calls one by one, torch.compile of them; each is a small function that builds a callable
or raises ``Missing`` with the reason.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.session import Built, Missing, Plan
from florence_fast.ops import OPS, backend
from florence_fast.ops.cases import Function, Inputs
from florence_fast.verify import choose_backend

Build = Callable[[Inputs, Plan], Built]
Rival = Callable[[Inputs], Function]

SLOW = ("torch.compile", "torch.compile max-autotune")


def field(op: str, eager: Rival, more: dict[str, Build] | None = None) -> dict[str, Build]:
    """Return the competitors of an op: ours, the plain computation, those of ``more``, and the compiled ones."""
    return {
        "ours (triton)": ours(op, "triton"),
        "eager": library(eager),
        **(more or {}),
        "ours (torch)": ours(op, "torch"),
        "torch.compile": compiled(eager),
        "torch.compile max-autotune": compiled(eager, "max-autotune-no-cudagraphs"),
    }


def ours(op: str, name: str) -> Build:
    """Our op through one backend."""

    def build(inputs: Inputs, plan: Plan) -> Built:
        def run(**tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
            with backend(name):
                return OPS[op].function(**tensors, **inputs.options)

        try:
            with backend(name):
                choose_backend(op, inputs)
        except RuntimeError as reason:
            raise Missing(str(reason)) from reason
        return Built(run)

    return build


def library(rival: Rival) -> Build:
    """Run a rival's library calls one by one."""
    return lambda inputs, plan: Built(rival(inputs))


def compiled(rival: Rival, mode: str | None = None, rehearsed: bool = True) -> Build:
    """Compile a rival with torch.compile; a rehearsal traces it and generates no code, and once an op is enough."""

    def build(inputs: Inputs, plan: Plan) -> Built:
        if plan.rehearse and not rehearsed:
            raise Missing("left out of the rehearsal, which traces the plain computation")
        if mode is not None and not (plan.full and inputs.device.type == "cuda"):
            raise Missing("takes minutes to compile: only on a GPU, with --full")
        function = rival(inputs)
        backend = {"backend": "aot_eager"} if plan.rehearse else {"mode": mode}
        return Built(torch.compile(lambda **tensors: function(**tensors), dynamic=False, **backend))

    return build


def unless(reason: Callable[[Inputs], str | None], build: Build) -> Build:
    """Leave a competitor out where there is a ``reason`` to."""

    def checked(inputs: Inputs, plan: Plan) -> Built:
        against = reason(inputs)
        if against is not None:
            raise Missing(against)
        return build(inputs, plan)

    return checked


def found(package: str, path: str) -> Any:
    """Return what an installed package calls ``path``, e.g. ``found("apex", "normalization.FusedLayerNorm")``.

    Raises:
        Missing: it is not installed, cannot be imported, or is another package of this name, as apex on PyPI is.
    """
    try:
        thing: Any = importlib.import_module(package)
    except ModuleNotFoundError as error:
        absent = error.name == package
        raise Missing(f"{package} is not installed" if absent else f"{package} cannot be imported: {error}") from error
    except Exception as error:  # kernels of others look for a GPU when they are imported
        raise Missing(f"{package} cannot be imported: {type(error).__name__}: {error}") from error
    at = package
    for part in path.split("."):
        at = f"{at}.{part}"
        if not hasattr(thing, part):
            try:
                thing = importlib.import_module(at)
            except Exception as error:
                raise Missing(f"the installed {package} has no {path}") from error
        else:
            thing = getattr(thing, part)
    return thing


def needs_gpu(inputs: Inputs) -> None:
    """Raise ``Missing`` on a CPU."""
    if inputs.device.type != "cuda":
        raise Missing("runs on a GPU only")
