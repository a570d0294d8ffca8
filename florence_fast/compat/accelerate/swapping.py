"""Put our kernels into a model of another library, in place, and take them out again.

Instances are changed, never classes: a layer's ``forward`` is laid over that of its class as an attribute of the one
instance. Parameters, buffers and names stay as they are, so that files, optimisers and copies do not notice.
``LIBRARIES`` lists what is known, one file per library.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from florence_fast import native
from florence_fast.compat.accelerate import (
    hugging_face,
    hugging_face_v2,
    leaves,
    microsoft_merging,
    microsoft_swin,
    monai,
    timm,
    timm_v2_cr,
    torchvision,
)
from florence_fast.compat.accelerate.options import Options
from florence_fast.compat.accelerate.overlay import lay_over, take_off
from florence_fast.ops import dispatch

log = logging.getLogger(__name__)

LIBRARIES = (hugging_face, hugging_face_v2, timm, timm_v2_cr, torchvision, monai, microsoft_swin, microsoft_merging)
"""Modules with LOOKS_FOR, FORWARDS, ``kind(module)`` and ``replacement(module, options)``."""

_SIGNS = {"relative_position_bias_table", "relative_position_index", "relative_coords_table"}
"""Names of parameters and buffers by which window attention of unknown type is recognised, for the messages."""


@dataclass(frozen=True)
class Report:
    """What `accelerate` did to a model."""

    swapped: dict[str, list[str]] = field(default_factory=dict)
    """Kind of layer -> names of the layers that run on our kernels from now on."""
    already: dict[str, list[str]] = field(default_factory=dict)
    """Kind of layer -> names of the layers that did so before."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Name of a layer that was left alone -> why."""
    backend: str = ""
    """What the layers compute on where the model lies now, such as ``cpp: native kernels, avx2``."""

    def __str__(self) -> str:
        rows = [("swapped", kind, _names(names)) for kind, names in self.swapped.items()]
        rows += [("already swapped", kind, _names(names)) for kind, names in self.already.items()]
        counts = Counter(self.skipped.values())
        for reason, count in counts.items():
            names = [name for name, why in self.skipped.items() if why == reason]
            rows.append(("skipped", f"{count} left alone: {reason}", _names(names)))
        rows += [("backend", self.backend, "")] if self.backend else []
        first = max((len(row[0]) for row in rows), default=0)
        second = min(max((len(row[1]) for row in rows), default=0), 32)
        return "\n".join(f"{what:<{first}}  {kind:<{second}}  {names}".rstrip() for what, kind, names in rows)


def _names(names: list[str]) -> str:
    shown = ", ".join(names[:2]) + (f", ... {names[-1]}" if len(names) > 2 else "")
    return f"{len(names)}: {shown}"


def accelerate(
    model: nn.Module,
    *,
    attention: bool = True,
    merging: bool = True,
    mlp: bool = True,
    norm: bool = True,
    verbose: bool = False,
) -> Report:
    """Let the layers of ``model`` that we know compute on `florence_fast.ops`, in place.

    Known are the layers and the patch merges of Hugging Face's Swin (also in Donut, MaskFormer and CLAP), Swin V2 and
    Swin2SR, of timm's Swin, Swin-S3, Swin V2 and its other Swin V2 (``swinv2_cr_*``), of torchvision's Swin, Swin V2
    and Video Swin, of MONAI's Swin, and of what is laid out as Microsoft's. Outputs and gradients are the same to
    rounding. `restore` takes it back. Calls that the ops cannot serve go through the module's own forward:
    ``output_attentions=True``, dropout of attention weights in training, q, k, v that LoRA has replaced since. On a
    processor without bf16 or fp16 units the plain products outside these layers (patch embedding, head) are widened to
    float32 as well when they are 16 bits; the report does not list them.

    Args:
        model: any module; a layer itself as well. Best before torch.compile, which would compile again, and before
            fully_shard, which leaves no plain weights to look at.
        attention: compute window attention and the products around it. False calls the model's own attention, with
            whatever it was set to, replaced by or hooked with. MONAI's own computes the norm before it as well.
        merging: compute the merges between stages, with the norms in them.
        mlp: compute the feed-forward branches; False calls the model's own.
        norm: compute the norms of layers, with the residual sums before them; False calls the model's own.
        verbose: print the report. It is logged at level INFO either way, by the logger of this module.

    Returns:
        What was swapped, what already was, what was skipped and why, and the backend of the ops for a model that lies
        where this one does. What already was keeps the options it had.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: nothing was swapped, now or before; the message says what was found instead.

    Copies and pickles of the model are accelerated as well. Not for torch.nn.DataParallel, whose copies share the
    forwards of the first device; DistributedDataParallel is as it was.

    >>> model = transformers.SwinModel.from_pretrained("microsoft/swin-tiny-patch4-window7-224")
    >>> ff.accelerate(model).swapped["transformers SwinLayer"][-1]
    'encoder.layers.3.blocks.1'
    """
    _check(model)
    swapped: dict[str, list[str]] = {}
    already: dict[str, list[str]] = {}
    skipped: dict[str, str] = {}
    options = Options(attention, merging, mlp, norm)
    for name, module, library, kind in _known_layers(model):
        if _is_swapped(module):
            already.setdefault(kind, []).append(name)
            continue
        forward = library.replacement(module, options)
        if "forward" in module.__dict__:
            forward = "its forward is already replaced by something else"
        if isinstance(forward, str):
            skipped[name] = forward
        else:
            lay_over(module, forward)
            swapped.setdefault(kind, []).append(name)
    skipped |= _unknown_attention(model)
    report = Report(swapped, already, skipped, _backend_of(model))
    if not swapped and not already:
        raise ValueError(_nothing_swapped(model, report))
    leaves.swap(model, tuple(name for name, *_ in _known_layers(model)))
    log.info("%s", report)
    if native.extension() is None and report.backend.startswith("torch"):
        log.warning("%s; the layers of this model gain little on a CPU without it", native.NOT_BUILT)
    if verbose:
        print(report)
    return report


def _backend_of(model: nn.Module) -> str:
    """Name the backend that runs window attention on the device of the model's first parameter."""
    device = next((parameter.device.type for parameter in model.parameters()), "cpu")
    args, kwargs = dispatch.OPS["window_attention"].example(device if device == "cuda" else "cpu")
    try:
        name = dispatch.choose("window_attention", *args, **kwargs)
    except RuntimeError as error:
        return str(error)
    if name == "cpp":
        return f"cpp: native kernels, {native.level()}"
    return f"torch: {native.NOT_BUILT}" if name == "torch" and native.extension() is None else name


def restore(model: nn.Module) -> list[str]:
    """Give every layer that `accelerate` changed its own forward again.

    Args:
        model: the model, or a copy of it.

    Returns:
        The names of the layers that were given back.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: none of its layers is accelerated.

    >>> ff.restore(model)[0]
    'encoder.layers.0.blocks.0'
    """
    _check(model)
    changed = [(name, module) for name, module in model.named_modules() if _is_swapped(module)]
    if not changed:
        raise ValueError(f"nothing to restore: no layer of this {type(model).__name__} is accelerated")
    for module in (*(module for _, module in changed), *leaves.swapped_in(model)):
        take_off(module)
    return [name for name, _ in changed]


def _check(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _known_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, Any, str]]:
    """Walk over the layers that a library's file knows: name, module, that file, kind."""
    for name, module in model.named_modules():
        for library in LIBRARIES:
            kind = library.kind(module)
            if kind is not None:
                yield name, module, library, kind


def _is_swapped(module: nn.Module) -> bool:
    forward: Callable[..., Any] | None = module.__dict__.get("forward")
    return isinstance(forward, partial) and any(forward.func in library.FORWARDS for library in LIBRARIES)


def _unknown_attention(model: nn.Module) -> dict[str, str]:
    """Name the modules that look like window attention and are inside no layer that is known."""
    known = tuple(f"{name}." if name else "" for name, *_ in _known_layers(model))
    found = {}
    for name, module in model.named_modules():
        owned = {*module._parameters, *module._buffers}
        looks_so = bool(owned & _SIGNS) or "windowattention" in type(module).__name__.lower()
        if looks_so and not name.startswith(known):
            ours = type(module).__module__.startswith("florence_fast.")
            found[name] = "it runs on florence_fast.ops as it is" if ours else f"unknown type {_type(module)}"
    return found


def _type(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _nothing_swapped(model: nn.Module, report: Report) -> str:
    looked = "; ".join(library.LOOKS_FOR for library in LIBRARIES)
    counts = Counter(report.skipped.values())
    found = "; ".join(f"{count} x {reason}" for reason, count in counts.items())
    what = f"what looks like window attention: {found}" if found else "nothing that looks like window attention"
    return f"nothing in this {type(model).__name__} was accelerated: looked for {looked}, found {what}"
