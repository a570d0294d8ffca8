"""`create_model` and its companions, with the names and the order of arguments of open_clip and timm."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor, nn

from florence_fast.errors import did_you_mean
from florence_fast.models.config import IMAGENET_MEAN, IMAGENET_STD, FlorenceConfig, ImageConfig
from florence_fast.models.florence import Florence, build_tower
from florence_fast.models.names import DualEncoderName, TowerName
from florence_fast.models.pretrained import find_pretrained, fit_state, list_pretrained
from florence_fast.models.reading import Checkpoint, holds_weights, read_checkpoint, read_config
from florence_fast.models.registry import ModelConfig, config_from_dict, get_model_config, list_models
from florence_fast.models.tower import FeatureExtractor, ImageTower
from florence_fast.precision import cast_weights, check_precision

LOCAL_DIR = "local-dir:"

# keyword of create_model -> the part of the configuration and the field that it sets
_OVERRIDES = {
    "img_size": ("image", "img_size"),
    "force_image_size": ("image", "img_size"),
    "in_chans": ("image", "in_chans"),
    "window_size": ("image", "window_size"),
    "drop_path_rate": ("image", "drop_path_rate"),
    "num_classes": ("image", "num_classes"),
    "context_length": ("text", "context_length"),
    "force_context_length": ("text", "context_length"),
    "image_mean": ("", "image_mean"),
    "image_std": ("", "image_std"),
    "image_resize_mode": ("", "resize_mode"),
    "image_interpolation": ("", "interpolation"),
    "init_logit_scale": ("", "init_logit_scale"),
    "init_logit_bias": ("", "init_logit_bias"),
}
# fields in which weights may differ from the named configuration and still be that model's
_FREE = {
    "image": {"img_size", "window_size", "drop_path_rate", "num_classes"},
    "text": {"context_length"},
    "": {
        "image_mean",
        "image_std",
        "resize_mode",
        "interpolation",
        "init_logit_scale",
        "max_logit_scale",
        "init_logit_bias",
    },
}


def build_model(config: ModelConfig) -> Florence | ImageTower:
    """Build a dual encoder or an image tower with drawn weights; the meta device is respected."""
    return Florence(config) if isinstance(config, FlorenceConfig) else build_tower(config)


def build_with(config: ModelConfig, checkpoint: Checkpoint, strict: bool = True) -> Florence | ImageTower:
    """Build a model and load a checkpoint, which is compared with it before any memory is asked for.

    Raises:
        ValueError: as `load_state`.
    """
    with torch.device("meta"):
        blueprint = build_model(config)
    matching, _ = fit_state(blueprint, checkpoint.state, strict=strict, source=str(checkpoint.path))
    model = build_model(config)
    model.load_state_dict(matching, strict=False)
    return model


@overload
def create_model(
    model_name: DualEncoderName,
    pretrained: str | os.PathLike[str] | None = None,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    *,
    features_only: Literal[False] = False,
    **options: Any,
) -> Florence: ...


@overload
def create_model(
    model_name: TowerName,
    pretrained: str | os.PathLike[str] | None = None,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    *,
    features_only: Literal[False] = False,
    **options: Any,
) -> ImageTower: ...


@overload
def create_model(
    model_name: str | os.PathLike[str],
    pretrained: str | os.PathLike[str] | None = None,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    *,
    features_only: Literal[True],
    **options: Any,
) -> FeatureExtractor: ...


@overload
def create_model(
    model_name: str | os.PathLike[str],
    pretrained: str | os.PathLike[str] | None = None,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    **options: Any,
) -> Any: ...


def create_model(
    model_name: str | os.PathLike[str],
    pretrained: str | os.PathLike[str] | None = None,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    *,
    strict: bool = True,
    features_only: bool = False,
    out_indices: int | Sequence[int] | None = None,
    output_fmt: str = "NCHW",
    output_dict: bool = False,
    **overrides: Any,
) -> Florence | ImageTower | FeatureExtractor:
    """Build a model by name, with weights if asked.

    Args:
        model_name: one of `list_models()`; or the path of a folder or file of `save_pretrained`, whose model and
            weights are taken, with or without ``"local-dir:"`` before it. A registered name wins over a folder.
        pretrained: a tag of `list_pretrained()`, a directory of `save_pretrained`, or a file: safetensors, or
            ``.pth``/``.pt`` with tensors alone, in our own layout or that of Microsoft's Swin or UniCL, timm's or
            Hugging Face's Swin. The configuration inside such a file is followed.
        precision: open_clip's words: fp32, amp and amp_bf16 (fp32 weights, for autocast), bf16 and fp16 (weights but
            norms, bias tables and the temperature), pure_bf16 and pure_fp16 (all weights); auto means fp32 weights.
        device: where the model goes.
        strict: raise when the weights do not cover the model exactly.
        features_only: return the image tower as a backbone that gives a list of maps.
        out_indices: with ``features_only``, the stages to return.
        output_fmt: with ``features_only``, "NCHW" or "NHWC".
        output_dict: a dual encoder returns a dict instead of a tuple.
        overrides: img_size (force_image_size), window_size, in_chans, drop_path_rate, num_classes (towers),
            context_length (force_context_length), image_mean, image_std, image_resize_mode ("shortest", "longest",
            "squash"), image_interpolation ("bicubic", "bilinear"), init_logit_scale, init_logit_bias (gives the model
            SigLIP's logit_bias).

    Returns:
        `Florence` for a dual encoder, an `ImageTower` for a tower, a `FeatureExtractor` with ``features_only``; in
        evaluation mode when weights were loaded, as open_clip leaves it.

    Raises:
        ValueError: an unknown name, tag or precision (with the nearest one), or weights of another model.
        TypeError: a keyword that nothing takes.
        FileNotFoundError: ``pretrained`` is a path and nothing is there.

    >>> model = create_model("florence_nano", img_size=32)
    >>> model.encode_image(torch.randn(2, 3, 32, 32)).shape
    torch.Size([2, 256])
    """
    check_precision(precision)
    config, checkpoint = _plan(model_name, pretrained)
    config = _override(config, overrides)
    model = build_model(config) if checkpoint is None else build_with(config, checkpoint, strict).eval()
    if isinstance(model, Florence):
        model.output_dict = output_dict
    if features_only:
        model = FeatureExtractor(model.visual if isinstance(model, Florence) else model, out_indices, output_fmt)
    return cast_weights(model, precision).to(device)


def _plan(
    model_name: str | os.PathLike[str], pretrained: str | os.PathLike[str] | None
) -> tuple[ModelConfig, Checkpoint | None]:
    """Find configuration and weights; a configuration that comes with the weights is followed where it may differ."""
    named = model_config(model_name)
    if pretrained is None or pretrained is False or pretrained == "":
        local = local_path(model_name)
        return named, None if local is None else read_checkpoint(local)
    checkpoint = read_checkpoint(find_pretrained(os.fspath(model_name), pretrained))
    if checkpoint.config is None:
        return named, checkpoint
    saved = config_from_dict(checkpoint.config)
    if isinstance(named, ImageConfig) and isinstance(saved, FlorenceConfig):
        saved = saved.image
    differences = _differences(named, saved)
    if differences:
        raise ValueError(f"{checkpoint.path} holds another model than {model_name}: {'; '.join(differences[:4])}")
    return saved, checkpoint


def local_path(model_name: str | os.PathLike[str]) -> Path | None:
    """Return the folder or file of weights that a model's name is, or None for the name of a registered model.

    Raises:
        TypeError: it is neither a str nor a path.
    """
    if not isinstance(model_name, str | os.PathLike):
        raise TypeError(f"a model's name must be a str or a path, got {type(model_name).__name__}")
    name = os.fspath(model_name)
    if name.startswith(LOCAL_DIR):
        return Path(name.removeprefix(LOCAL_DIR))
    if not isinstance(model_name, os.PathLike) and (name in list_models() or not _looks_like_a_path(name)):
        return None
    return Path(name)


def _looks_like_a_path(name: str) -> bool:
    """Say whether a name has a separator, or is that of a folder or file with weights; others may be of open_clip."""
    return (os.sep in name and ":" not in name) or holds_weights(Path(name))


def model_config(model_name: str | os.PathLike[str]) -> ModelConfig:
    """Return the configuration of what `create_model` builds for a name, a folder or a file.

    Raises:
        ValueError, FileNotFoundError: as `create_model`.
    """
    local = local_path(model_name)
    if local is None:
        return get_model_config(os.fspath(model_name))
    values = read_config(local)
    if values is None:
        raise ValueError(f"{local} holds no configuration: give the model's name, and this as pretrained=")
    return config_from_dict(values)


def model_of_weights(pretrained: str | os.PathLike[str] | None) -> str | None:
    """Return the name under which `create_model` builds the model that weights are of: their own path.

    Args:
        pretrained: as for `create_model`.

    Returns:
        None for a tag, for no weights, and for weights that state no configuration.

    Raises:
        FileNotFoundError, ValueError: ``pretrained`` is a path, and what is there are no weights.
    """
    tags = [tag for _, tag in list_pretrained()]
    if not pretrained or pretrained in ("none", *tags) or not Path(pretrained).exists():
        return None
    return None if read_config(pretrained) is None else os.fspath(pretrained)


def _differences(named: ModelConfig, saved: ModelConfig) -> list[str]:
    """Say in which fields, of those that shape a model, two configurations differ."""
    if type(named) is not type(saved):
        return [f"{type(saved).__name__} instead of {type(named).__name__}"]
    found = []
    for part in ("image", "text", "") if isinstance(named, FlorenceConfig) else ("image",):
        ours, theirs = (getattr(c, part) if isinstance(c, FlorenceConfig) and part else c for c in (named, saved))
        for field in dataclasses.fields(ours):
            a, b = getattr(ours, field.name), getattr(theirs, field.name)
            if a != b and field.name not in _FREE[part] and not dataclasses.is_dataclass(a):
                found.append(f"{part}{'.' if part else ''}{field.name} {b} instead of {a}")
    return found


def _override(config: ModelConfig, overrides: dict[str, Any]) -> ModelConfig:
    """Apply the keywords that the user gave to the part of the configuration that each belongs to."""
    for key, value in overrides.items():
        if key not in _OVERRIDES:
            raise TypeError(f"create_model takes no keyword {key!r}{did_you_mean(key, _OVERRIDES)}")
        if value is None:
            continue
        part, field = _OVERRIDES[key]
        value = tuple(value) if isinstance(value, list) else value
        if isinstance(config, FlorenceConfig) and part:
            value, field = dataclasses.replace(getattr(config, part), **{field: value}), part
        elif isinstance(config, ImageConfig) and part != "image":
            raise TypeError(f"{key!r} belongs to a dual encoder, and this model is an image tower")
        config = dataclasses.replace(config, **{field: value})
    return config


def create_model_and_transforms(
    model_name: str,
    pretrained: str | os.PathLike[str] | None = None,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    **kwargs: Any,
) -> tuple[Any, Callable[[Any], Tensor], Callable[[Any], Tensor]]:
    """Build a model and the two transforms that bring images to it.

    Returns:
        ``(model, transform for training, transform for evaluation)``; the keywords are `create_model`'s.
    """
    model = create_model(model_name, pretrained, precision, device, **kwargs)
    return model, transform_of(model, is_train=True), transform_of(model, is_train=False)


def create_model_from_pretrained(
    model_name: str,
    pretrained: str | os.PathLike[str] | None = None,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    return_transform: bool = True,
    **kwargs: Any,
) -> Any:
    """Build a model with weights, and the transform for evaluation.

    Raises:
        ValueError: no weights were named; drawn ones would be of no use.
    """
    if not pretrained and local_path(model_name) is None:
        raise ValueError(
            f"create_model_from_pretrained({model_name!r}) needs pretrained=: a tag, a directory or a file"
        )
    model = create_model(model_name, pretrained, precision, device, **kwargs).eval()
    return (model, transform_of(model, is_train=False)) if return_transform else model


def transform_of(model: nn.Module, is_train: bool) -> Callable[[Any], Tensor]:
    """Return the transform from a PIL image to the (3, H, W) tensor that ``model`` was made for."""
    from florence_fast.data.transforms import image_transform

    config: ModelConfig = cast(Any, model.tower if isinstance(model, FeatureExtractor) else model).config
    if isinstance(config, FlorenceConfig):
        size, mean, std = config.image.img_size, config.image_mean, config.image_std
        return image_transform(size, is_train, mean, std, config.resize_mode, config.interpolation)
    return image_transform(config.img_size, is_train, IMAGENET_MEAN, IMAGENET_STD)


def get_tokenizer(model_name: str, context_length: int | None = None) -> Callable[[str | list[str]], Tensor]:
    """Return the tokenizer of a model: str or list of str -> (B, context_length) token ids.

    Args:
        model_name: as in `create_model`.
        context_length: another length than the model's.

    Raises:
        ValueError: an unknown model, an image tower, which reads no text, or a text tower whose ``vocab_size`` is less
            than the tokenizer's.
    """
    from florence_fast.data.tokenizer import Tokenizer

    config = model_config(model_name)
    if not isinstance(config, FlorenceConfig):
        raise ValueError(f"{model_name} is an image tower and reads no text")
    tokenizer = Tokenizer(context_length or config.text.context_length)
    config.text.check_tokenizer(tokenizer)
    return tokenizer
