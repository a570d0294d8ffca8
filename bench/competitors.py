"""The competitors that every op has: our own backends, the library calls one by one, and torch.compile of them."""

from collections.abc import Callable

import torch
from torch import Tensor

from bench.session import Built, Missing, Plan
from florence_fast.ops import OPS, backend
from florence_fast.verify import choose_backend
from florence_fast.verify.cases import Function, Inputs

Build = Callable[[Inputs, Plan], Built]


def ours(op: str, name: str) -> Build:
    """Our op through one backend."""

    def build(inputs: Inputs, plan: Plan) -> Built:
        def run(**tensors: Tensor) -> Tensor:
            with backend(name):
                return OPS[op].function(**tensors, **inputs.options)

        try:
            with backend(name):
                choose_backend(op, inputs)
        except RuntimeError as reason:
            raise Missing(str(reason)) from reason
        return Built(run)

    return build


def library(rival: Callable[[Inputs], Function]) -> Build:
    """Run a rival's library calls one by one."""
    return lambda inputs, plan: Built(rival(inputs))


def compiled(rival: Callable[[Inputs], Function], mode: str | None = None) -> Build:
    """Compile a rival with torch.compile; a rehearsal traces it and generates no code."""

    def build(inputs: Inputs, plan: Plan) -> Built:
        if mode is not None and not (plan.full and inputs.grad_out.device.type == "cuda"):
            raise Missing("takes minutes to compile: only on a GPU, with --full")
        function = rival(inputs)
        backend = {"backend": "aot_eager"} if plan.rehearse else {"mode": mode}
        return Built(torch.compile(lambda **tensors: function(**tensors), dynamic=False, **backend))

    return build
