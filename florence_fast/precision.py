"""The words for precision, open_clip's and "auto", what each means on a device, and the one autocast region of all.

| word | weights | products |
|---|---|---|
| auto | fp32 | ``amp_bf16`` where the device multiplies bf16 in hardware, else ``fp32`` |
| fp32 | fp32 | fp32 |
| amp_bf16, amp_bfloat16 | fp32 | autocast to bf16 |
| amp | fp32 | autocast to fp16, gradients scaled in training; on a CPU the same as ``auto`` |
| bf16, fp16 | 16 bits but norms, bias tables and temperature; trained through fp32 copies | of the weights |
| pure_bf16, pure_fp16 | 16 bits, all of them; small updates are lost in training | of the weights |

Torch is imported by the functions alone, since the command line shows the words in ``--help``.
"""

from __future__ import annotations

import functools
import logging
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from florence_fast import processor
from florence_fast.errors import unknown

if TYPE_CHECKING:
    import torch
    from torch import nn

log = logging.getLogger(__name__)

PRECISIONS = ("auto", "fp32", "amp_bf16", "amp", "bf16", "fp16", "pure_bf16", "pure_fp16", "amp_bfloat16")
"""Every word that is accepted wherever a precision is asked for."""

_ALIASES = {"amp_bfloat16": "amp_bf16"}
_AUTOCAST = {"amp_bf16": "bfloat16", "amp": "float16"}
_WEIGHTS = {"bf16": "bfloat16", "pure_bf16": "bfloat16", "fp16": "float16", "pure_fp16": "float16"}
_TABLE = "relative_position_bias_table"

_M = TypeVar("_M", bound="nn.Module")


class Choice(NamedTuple):
    """The word that is in force, and why in one line."""

    precision: str
    reason: str

    def __str__(self) -> str:
        return f"precision {self.precision}: {self.reason}"


def check_precision(word: str) -> str:
    """Return ``word``, one of `PRECISIONS`.

    Raises:
        ValueError: it is none of them; the nearest one is named.
    """
    if word not in PRECISIONS:
        raise unknown("precision", word, PRECISIONS)
    return word


def choose_precision(word: str, device: str | torch.device) -> Choice:
    """Say which precision ``word`` means on ``device``, and why.

    Args:
        word: one of `PRECISIONS`.
        device: where the model runs.

    Returns:
        A word that is neither "auto" nor an alias, and on a CPU not "amp".

    Raises:
        ValueError: ``word`` is unknown.

    >>> print(choose_precision("auto", "cpu"))
    precision fp32: this processor has no bf16 units
    """
    check_precision(word)
    word = _ALIASES.get(word, word)
    kind = _device_type(device)
    if word == "auto" or (word == "amp" and kind == "cpu"):
        fast, reason = multiplies_bf16(device)
        return Choice("amp_bf16" if fast else "fp32", reason)
    return Choice(word, "as asked")


def resolve_precision(word: str, device: str | torch.device) -> str:
    """Return the precision that ``word`` means on ``device``: what `autocast` takes and what a run records.

    A choice that was left to the device is logged. A 16-bit format that was asked for on a CPU without units for it is
    warned of, once for each word.

    Raises:
        ValueError: ``word`` is unknown.

    >>> resolve_precision("fp32", "cpu")
    'fp32'
    """
    choice = choose_precision(word, device)
    if choice.reason != "as asked":
        log.info("%s", choice)
    elif _device_type(device) == "cpu" and choice.precision != "fp32":
        fast, reason = processor.units(format_of(choice.precision))
        if not fast:
            _warn_once(choice.precision, reason)
    return choice.precision


def multiplies_bf16(device: str | torch.device) -> processor.Units:
    """Say whether ``device`` is fast at bf16 products, and why: CUDA 8.0 or later, a CPU with units for them."""
    import torch

    device = torch.device(device)
    if device.type == "cpu":
        return processor.units("bf16")
    if device.type != "cuda":
        return processor.Units(False, f"bf16 on {device.type} was not tried; ask for it by its word")
    if not torch.cuda.is_available():
        return processor.Units(False, "no GPU was found")
    major, minor = torch.cuda.get_device_capability(device)
    name = f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor},"
    if major >= 8:
        return processor.Units(True, f"{name} multiplies bf16")
    return processor.Units(False, f"{name} has no bf16 units; amp (fp16) may be faster")


def autocast(precision: str, device: str | torch.device) -> AbstractContextManager[Any]:
    """Return the autocast region of a precision; it changes nothing where products follow the weights.

    Args:
        precision: one of `PRECISIONS`; what `resolve_precision` has not seen is resolved here.
        device: where the model runs.

    Raises:
        ValueError: ``precision`` is unknown.
    """
    import torch

    name = _AUTOCAST.get(resolve_precision(precision, device))
    return nullcontext() if name is None else torch.autocast(_device_type(device), getattr(torch, name))


def weights_dtype(precision: str) -> torch.dtype | None:
    """Return the dtype that a precision gives to a model's weights, None where they stay fp32.

    Raises:
        ValueError: ``precision`` is unknown.
    """
    import torch

    name = _WEIGHTS.get(check_precision(precision))
    return None if name is None else getattr(torch, name)


def cast_weights(model: _M, precision: str) -> _M:
    """Bring weights, in place, to the dtype that a precision gives them.

    With "bf16" and "fp16" norms, tables of position biases and scalars (the temperature) are fp32, since what training
    adds to them is too little to be seen in 16 bits; with the "pure" words they are not. Any other word brings 16-bit
    weights to fp32. float64 is left alone.

    Raises:
        ValueError: ``precision`` is unknown.
    """
    import torch
    from torch import nn

    norms = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
    dtype, pure = weights_dtype(precision) or torch.float32, is_pure(precision)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dtype in (torch.float32, torch.bfloat16, torch.float16):
                kept = not pure and (parameter.ndim == 0 or isinstance(module, norms) or name.endswith(_TABLE))
                parameter.data = parameter.data.to(torch.float32 if kept else dtype)
    return model


def is_pure(precision: str) -> bool:
    """Say whether a precision casts every weight, and training keeps no fp32 copy of any."""
    return precision.startswith("pure_")


def check_same_weights(earlier: str, now: str) -> None:
    """Refuse to continue training at a precision that keeps other weights: lost bits do not come back.

    Raises:
        ValueError: ``earlier`` and ``now`` differ in the dtype of their weights, or in what else is 16 bits.
    """
    if (weights_dtype(earlier), is_pure(earlier)) != (weights_dtype(now), is_pure(now)):
        raise ValueError(
            f"the run was trained at precision {earlier}, whose weights are of another kind than those of {now}: "
            f"continue it with precision {earlier}"
        )


def input_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype that a model wants its images in: that of its largest parameter.

    The first one will not do, which may be the temperature or a norm, and stays fp32 beside 16-bit weights.
    """
    return max(model.parameters(), key=lambda parameter: parameter.numel()).dtype


def gradient_scaler(precision: str, device: str | torch.device) -> torch.amp.GradScaler:
    """Return what scales the loss in training, so that small gradients do not vanish in fp16; it does nothing else.

    "amp" and "fp16" scale. "pure_fp16" does not, as in open_clip: gradients are divided again in fp32 alone. Where the
    weights are fp16, so are the sums over the batch that are their gradients, and the scale starts lower.

    Raises:
        ValueError: ``precision`` is unknown.
    """
    import torch

    precision = choose_precision(precision, device).precision
    start = 2.0**8 if precision == "fp16" else 2.0**16
    return torch.amp.GradScaler(_device_type(device), init_scale=start, enabled=precision in ("amp", "fp16"))


def format_of(precision: str) -> str:
    """Return "fp32", "bf16" or "fp16": what a resolved precision multiplies."""
    if precision == "fp32":
        return "fp32"
    return "bf16" if precision.endswith("bf16") else "fp16"


def _device_type(device: str | torch.device) -> str:
    return str(device).partition(":")[0]


@functools.cache
def _warn_once(word: str, reason: str) -> None:
    log.warning(
        "precision %s gains nothing here, since %s: use fp32, or auto, which chooses by the device", word, reason
    )
