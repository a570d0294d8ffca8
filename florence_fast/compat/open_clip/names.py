"""What ``import florence_fast as open_clip`` calls: our models by their names, and all others from open_clip.

A name that we lack is passed on to the installed open_clip, imported only then, and what its model holds of window
attention is accelerated.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from florence_fast import models
from florence_fast.compat.accelerate import accelerate
from florence_fast.data.tokenizer import Tokenizer
from florence_fast.errors import require
from florence_fast.models.factory import LOCAL_DIR, local_path
from florence_fast.models.names import DualEncoderName, TowerName
from florence_fast.precision import weights_dtype
from florence_fast.text_files import read_json

EXTRA = "open_clip"
HF_HUB = "hf-hub:"
_THEIR_CONFIG = "open_clip_config.json"

# open_clip's keywords that say nothing about a model of ours -> the values that change nothing; None: any does
_WITHOUT_EFFECT: dict[str, tuple[Any, ...] | None] = {
    "aug_cfg": (None,),
    "cache_dir": None,
    "force_custom_text": None,
    "force_patch_dropout": (None,),
    "force_preprocess_cfg": (None,),
    "force_quick_gelu": (False,),
    "jit": (False,),
    "pretrained_image": (False,),
    "pretrained_image_path": (None,),
    "pretrained_text": None,
    "pretrained_text_path": (None,),
    "weights_only": (True,),
}


@overload
def create_model(
    model_name: DualEncoderName,
    pretrained: str | os.PathLike[str] | None = None,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    *,
    load_weights: bool = True,
    features_only: Literal[False] = False,
    **kwargs: Any,
) -> models.Florence: ...


@overload
def create_model(
    model_name: TowerName,
    pretrained: str | os.PathLike[str] | None = None,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    *,
    load_weights: bool = True,
    features_only: Literal[False] = False,
    **kwargs: Any,
) -> models.ImageTower: ...


@overload
def create_model(
    model_name: DualEncoderName | TowerName,
    pretrained: str | os.PathLike[str] | None = None,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    *,
    load_weights: bool = True,
    features_only: Literal[True],
    **kwargs: Any,
) -> models.FeatureExtractor: ...


@overload
def create_model(
    model_name: str | os.PathLike[str],
    pretrained: str | os.PathLike[str] | None = None,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    *,
    load_weights: bool = True,
    **kwargs: Any,
) -> Any: ...


def create_model(
    model_name: str | os.PathLike[str],
    pretrained: str | os.PathLike[str] | None = None,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    *,
    load_weights: bool = True,
    **kwargs: Any,
) -> nn.Module:
    """Build a model by name, with weights if asked: one of ours, or one of the installed open_clip or timm.

    Args:
        model_name: one of `list_models()`, the path of a saved model, or a name that open_clip knows (``"ViT-B-32"``,
            ``"hf-hub:..."``), or else timm (``"swin_tiny_patch4_window7_224"``).
        pretrained: for ours as in `florence_fast.models.create_model`; for open_clip's one of its tags or a file; for
            timm's whether to load weights.
        precision: open_clip's words.
        device: where the model goes.
        load_weights: False draws the weights, whatever ``pretrained`` says.
        kwargs: for ours those of `florence_fast.models.create_model`, and open_clip's where they change nothing; for
            others those of their library.

    Returns:
        The model. In one of open_clip or timm, layers that `accelerate` knows run on our kernels; others are as they
        were.

    Raises:
        ValueError: a name that none has, with the nearest ones; a keyword that would change a model of ours; a
            precision that is not known.

    >>> model = create_model("ViT-B-32", pretrained="openai")
    """
    if is_ours(model_name):
        return models.create_model(model_name, pretrained if load_weights else None, precision, device, **_ours(kwargs))
    if _is_timms(model_name):
        dtype = weights_dtype(precision)
        model = require("timm", EXTRA).create_model(model_name, pretrained=bool(pretrained and load_weights), **kwargs)
        return _accelerated(model.to(device, dtype))
    options = _theirs(pretrained, load_weights, precision=precision, device=device, **kwargs)
    return _accelerated(_open_clip(model_name).create_model(model_name, **options))


def create_model_and_transforms(
    model_name: str,
    pretrained: str | os.PathLike[str] | None = None,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    *,
    load_weights: bool = True,
    **kwargs: Any,
) -> tuple[Any, Callable[[Any], Tensor], Callable[[Any], Tensor]]:
    """Build a model and the two transforms that bring images to it.

    Returns:
        ``(model, transform for training, transform for evaluation)``; arguments and errors are `create_model`'s.

    >>> model, _, preprocess = create_model_and_transforms("ViT-B-32", pretrained="openai")
    """
    if is_ours(model_name):
        weights = pretrained if load_weights else None
        return models.create_model_and_transforms(model_name, weights, precision, device, **_ours(kwargs))
    options = _theirs(pretrained, load_weights, precision=precision, device=device, **kwargs)
    model, train, evaluate = _open_clip(model_name).create_model_and_transforms(model_name, **options)
    return _accelerated(model), train, evaluate


def create_model_from_pretrained(
    model_name: str,
    pretrained: str | os.PathLike[str] | None = None,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    return_transform: bool = True,
    **kwargs: Any,
) -> nn.Module | tuple[nn.Module, Callable[[Any], Tensor]]:
    """Build a model with weights, and the transform for evaluation.

    Raises:
        ValueError: no weights were named; drawn ones would be of no use.
        ValueError, RuntimeError: as in `create_model`; open_clip raises the second one without weights.
    """
    if is_ours(model_name):
        options = {"return_transform": return_transform, **_ours(kwargs)}
        return models.create_model_from_pretrained(model_name, pretrained, precision, device, **options)
    options = _theirs(pretrained, precision=precision, device=device, return_transform=return_transform, **kwargs)
    found = _open_clip(model_name).create_model_from_pretrained(model_name, **options)
    return (_accelerated(found[0]), found[1]) if return_transform else _accelerated(found)


def get_tokenizer(
    model_name: str = "", context_length: int | None = None, **kwargs: Any
) -> Callable[[str | list[str]], Tensor]:
    """Return the tokenizer of a model, ours or open_clip's: str or list of str -> (B, context_length) token ids.

    Args:
        model_name: as in `create_model`; the empty name gives CLIP's tokenizer, of 77 ids unless told otherwise.
        context_length: another length than the model's.
        kwargs: open_clip's, for its own models.

    Raises:
        ValueError: an unknown model, or an image tower, which reads no text.
    """
    if not model_name:
        return Tokenizer(context_length or 77)
    if is_ours(model_name):
        unknown_ones = sorted(kwargs.keys() - {"cache_dir"})
        if unknown_ones:
            raise TypeError(f"the tokenizer of {model_name} takes no {', '.join(unknown_ones)}")
        return models.get_tokenizer(model_name, context_length)
    return _open_clip(model_name).get_tokenizer(model_name, context_length=context_length, **kwargs)


def tokenize(texts: str | list[str], context_length: int = 77) -> Tensor:
    """Encode texts with CLIP's tokenizer, as ``open_clip.tokenize`` does: int64 (B, context_length).

    >>> tokenize(["a photo of a cat"]).shape
    torch.Size([1, 77])
    """
    return Tokenizer(context_length)(texts)


def get_model_config(model_name: str) -> Any:
    """Return the configuration of a model: ours as `florence_fast.models.get_model_config`, open_clip's as a dict.

    Raises:
        ValueError: no model has this name.
    """
    if model_name in models.list_models():
        return models.get_model_config(model_name)
    return _open_clip(model_name).get_model_config(model_name)


def add_model_config(path: str | os.PathLike[str]) -> None:
    """Register the configuration in a JSON file, or those of a directory, under the files' names.

    Those with open_clip's keys (``vision_cfg``) go to the installed open_clip.

    Raises:
        FileNotFoundError: nothing is there.
        ImportError: one is open_clip's, which is not installed.
    """
    path = Path(path)
    for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
        if file.is_file() and "vision_cfg" in read_json(file):
            _require().add_model_config(file)
        else:
            models.add_model_config(file)


def load_checkpoint(
    model: nn.Module, checkpoint_path: str | os.PathLike[str], strict: bool = True, **kwargs: Any
) -> Any:
    """Load a file into an existing model: ours with `florence_fast.models.load_checkpoint`, open_clip's with its own.

    Args:
        model: the model.
        checkpoint_path: the file; for ours a directory as well.
        strict: raise when the weights do not cover the model exactly.
        kwargs: weights_only, and device for a model of open_clip.

    Raises:
        ValueError: weights that do not fit, or ``weights_only=False`` for a model of ours.
    """
    if isinstance(model, models.Florence | models.ImageTower):
        kwargs.pop("device", None)
        return models.load_checkpoint(model, checkpoint_path, strict, **kwargs)
    return _require().load_checkpoint(model, str(checkpoint_path), strict=strict, **kwargs)


def is_ours(model_name: str | os.PathLike[str]) -> bool:
    """Say whether a name is that of a model of ours: registered, or a path without open_clip's configuration."""
    local = local_path(model_name)
    return model_name in models.list_models() if local is None else not (local / _THEIR_CONFIG).is_file()


def _theirs(pretrained: str | os.PathLike[str] | None, load_weights: bool = True, **options: Any) -> dict[str, Any]:
    """Word what a model of open_clip is built with; ``load_weights`` is named only where it says something (3.x)."""
    weights = os.fspath(pretrained) if isinstance(pretrained, os.PathLike) else pretrained
    return {"pretrained": weights, **options, **({} if load_weights else {"load_weights": False})}


def _ours(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Leave out what open_clip's keywords say that is so for every model of ours; raise for what is not."""
    kept = dict(kwargs)
    for key in _WITHOUT_EFFECT.keys() & kept.keys():
        values, given = _WITHOUT_EFFECT[key], kept.pop(key)
        if values is not None and given not in values:
            raise ValueError(f"{key}={given!r} is open_clip's and not for our models: leave it out, or {values[0]!r}")
    if kept.get("output_dict", False) is None:
        kept["output_dict"] = False
    return kept


def _accelerated(model: nn.Module) -> nn.Module:
    """Accelerate what can be of a model that nobody asked to accelerate, which is not an error if it is nothing."""
    if not isinstance(model, torch.jit.ScriptModule):
        with contextlib.suppress(ValueError):
            accelerate(model, verbose=False)
    return model


def _is_timms(model_name: str) -> bool:
    """Say whether timm is to build this: it is installed and has the name, and open_clip has not."""
    if model_name.startswith((HF_HUB, LOCAL_DIR)) or importlib.util.find_spec("timm") is None:
        return False
    if importlib.util.find_spec("open_clip") and _require().get_model_config(model_name) is not None:
        return False
    return require("timm", EXTRA).is_model(model_name)


def _require() -> ModuleType:
    return require("open_clip", EXTRA)


def _open_clip(model_name: str) -> ModuleType:
    """Import open_clip for a name that is not ours, or raise with the nearest names that there are."""
    ours = models.list_models()
    if importlib.util.find_spec("open_clip") is None:
        near = _near(model_name, ours)
        raise ValueError(
            f"unknown model {model_name!r}{near}; known: {', '.join(ours[:12])}, ... Other names are passed on to "
            f"open_clip, which is not installed: pip install 'florence_fast[{EXTRA}]'"
        )
    open_clip = _require()
    if model_name.startswith((HF_HUB, LOCAL_DIR)) or open_clip.get_model_config(model_name) is not None:
        return open_clip
    theirs = open_clip.list_models()
    raise ValueError(
        f"unknown model {model_name!r}{_near(model_name, [*ours, *theirs])}; known: {len(ours)} of florence_fast "
        f"({', '.join(ours[:4])}, ...) and {len(theirs)} of open_clip"
    )


def _near(name: str, choices: list[str]) -> str:
    near = difflib.get_close_matches(name, choices, n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
