"""Replace the forward of one module instance, and restore it."""

from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

from torch import nn

_SCRIPTING = "__prepare_scriptable__"
"""The attribute that torch.jit.script looks for on each module before it compiles one."""


def lay_over(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Let ``module`` compute ``forward(module, ...)``; copies and pickles of it do so as well."""
    module.forward = partial(forward, module)  # flat, so that its func is the library's forward
    setattr(module, _SCRIPTING, _refuse_scripting)


def take_off(module: nn.Module) -> None:
    """Give ``module`` its own forward again."""
    del module.forward
    module.__dict__.pop(_SCRIPTING, None)


def _refuse_scripting() -> NoReturn:
    raise RuntimeError(
        "torch.jit.script cannot compile an accelerated model: call ff.restore(model) first; "
        "torch.compile and torch.export take the model as it is"
    )
