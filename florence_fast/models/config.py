"""The configurations of the models: frozen, checked when they are made, and the same as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from florence_fast.checks import number, positive, sequence, whole
from florence_fast.data.resizing import INTERPOLATIONS, RESIZE_MODES
from florence_fast.errors import unknown

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Far beyond every model that there is; they keep a configuration from a stranger from asking for terabytes.
_LARGEST_WIDTH = 65536
_LARGEST_LOGIT_SCALE = 1e6
_RANGES_IMAGE = {
    "img_size": (4, 65536),
    "in_chans": (1, 1024),
    "window_size": (1, 512),
    "num_classes": (0, 10_000_000),
}
_RANGES_TEXT = {
    "width": (1, _LARGEST_WIDTH),
    "heads": (1, 4096),
    "layers": (0, 256),
    "vocab_size": (1, 2**24),
    "context_length": (1, 32768),
}

_C = TypeVar("_C", bound="_Config")


class _Config:
    """To and from plain dictionaries, refusing keys that no field has."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types, configurations inside this one included."""
        return _plain(dataclasses.asdict(cast(Any, self)))

    @classmethod
    def from_dict(cls: type[_C], values: Mapping[str, Any]) -> _C:
        """Build the configuration from what `to_dict` gave.

        Raises:
            ValueError: a key that is not a field (with the nearest field), a missing one, or a value out of range.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"{cls.__name__} must be an object with named fields, got {type(values).__name__}")
        fields = {field.name: field for field in _fields(cls)}
        for key in values:
            if key not in fields:
                raise unknown(f"key of {cls.__name__}", key, fields)
        for name, field in fields.items():
            if field.default is dataclasses.MISSING and name not in values:
                raise ValueError(f"{cls.__name__} needs {name!r}, got only {sorted(map(str, values))}")
        nested = {"image": ImageConfig, "text": TextConfig} if cls is FlorenceConfig else {}
        return cls(**{k: nested[k].from_dict(v) if k in nested else _frozen(v) for k, v in values.items()})


def _fields(config: Any) -> tuple[dataclasses.Field[Any], ...]:
    """The fields of a subclass, all of which are dataclasses."""
    return dataclasses.fields(config)


def _plain(value: Any) -> Any:
    """Tuples become lists, all the way down."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _frozen(value: Any) -> Any:
    """Lists become tuples."""
    return tuple(_frozen(item) for item in value) if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class ImageConfig(_Config):
    """An image tower: its family, widths, depths and windows.

    Stage s has ``embed_dim * 2**s`` channels on a map of ``img_size / 4 / 2**s``. ``img_size`` is the size that
    transforms aim at; a tower takes every size.
    """

    kind: str
    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    img_size: int = 224
    in_chans: int = 3
    window_size: int = 7
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    drop_path_rate: float = 0.0
    num_classes: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("coswin", "swin"):
            raise unknown("kind of image tower", self.kind, ("coswin", "swin"))
        _set(self, "depths", tuple(whole("depths", depth, 0, 256) for depth in sequence("depths", self.depths)))
        _set(self, "num_heads", tuple(whole("num_heads", n, 1, 4096) for n in sequence("num_heads", self.num_heads)))
        if not 1 <= len(self.depths) <= 8:
            raise ValueError(f"depths must have 1 to 8 stages, got {len(self.depths)}")
        if len(self.depths) != len(self.num_heads):
            raise ValueError(
                f"num_heads must have one entry a stage, {len(self.depths)} for depths={self.depths}, "
                f"got {self.num_heads}"
            )
        _set(self, "embed_dim", whole("embed_dim", self.embed_dim, 1, _LARGEST_WIDTH >> len(self.depths) - 1))
        for stage, heads in enumerate(self.num_heads):
            if self.stage_width(stage) % heads:
                raise ValueError(
                    f"num_heads must divide the width of its stage: stage {stage} has {self.stage_width(stage)} "
                    f"channels, got {heads} heads"
                )
        for name, (low, high) in _RANGES_IMAGE.items():
            _set(self, name, whole(name, getattr(self, name), low, high))
        _check_mlp_ratio(self.mlp_ratio, self.embed_dim)
        if not isinstance(self.qkv_bias, bool):
            raise ValueError(f"qkv_bias must be true or false, got {self.qkv_bias!r}")
        if not 0 <= number("drop_path_rate", self.drop_path_rate) < 1:
            raise ValueError(f"drop_path_rate must lie in [0, 1), got {self.drop_path_rate}")

    def stage_width(self, stage: int) -> int:
        """Return the number of channels of ``stage`` (0 is the first)."""
        return self.embed_dim * 2**stage

    @property
    def num_features(self) -> int:
        """Channels of the last stage."""
        return self.stage_width(len(self.depths) - 1)


@dataclass(frozen=True)
class TextConfig(_Config):
    """A text tower. ``token_embed_dim`` factorises the embedding: vocabulary -> token_embed_dim -> width."""

    width: int
    heads: int
    layers: int
    vocab_size: int = 49408
    context_length: int = 77
    mlp_ratio: float = 4.0
    act: str = "gelu"
    norm_eps: float = 1e-5
    token_embed_dim: int | None = None

    def __post_init__(self) -> None:
        if self.act not in ("gelu", "quick_gelu"):
            raise unknown("activation", self.act, ("gelu", "quick_gelu"))
        for name, (low, high) in _RANGES_TEXT.items():
            _set(self, name, whole(name, getattr(self, name), low, high))
        if self.width % self.heads:
            raise ValueError(f"heads must divide width={self.width}, got {self.heads}")
        _check_mlp_ratio(self.mlp_ratio, self.width)
        positive("norm_eps", self.norm_eps, 1)
        if self.token_embed_dim is not None:
            _set(self, "token_embed_dim", whole("token_embed_dim", self.token_embed_dim, 1, _LARGEST_WIDTH))

    def check_tokenizer(self, tokenizer: object) -> None:
        """Refuse a tokenizer that gives ids for which this tower has no embedding.

        Args:
            tokenizer: one without ``vocab_size`` is not checked.

        Raises:
            ValueError: its ``vocab_size`` is more than the tower's.
        """
        ids = getattr(tokenizer, "vocab_size", None)
        if isinstance(ids, int) and ids > self.vocab_size:
            raise ValueError(f"text.vocab_size must be at least {ids}, that of the tokenizer, got {self.vocab_size}")


@dataclass(frozen=True)
class FlorenceConfig(_Config):
    """The dual encoder: two towers, the width they share, and the temperature.

    ``logit_scale_kind`` says what the parameter holds: ``"log"`` its logarithm, as open_clip has it, or ``"plain"``
    the factor itself. ``max_logit_scale`` bounds the factor; None leaves it free. ``init_logit_bias`` gives the model
    SigLIP's bias of the logits; None gives it none.

    ``resize_mode`` says how an image becomes a square, in training and in evaluation: "shortest" (its middle),
    "longest" (all of it, on a canvas) or "squash" (all of it, stretched); ``interpolation`` is "bicubic" or "bilinear".
    """

    image: ImageConfig
    text: TextConfig
    embed_dim: int
    logit_scale_kind: str = "log"
    image_mean: tuple[float, ...] = IMAGENET_MEAN
    image_std: tuple[float, ...] = IMAGENET_STD
    resize_mode: str = "shortest"
    interpolation: str = "bicubic"
    init_logit_scale: float = 1 / 0.07
    max_logit_scale: float | None = 100.0
    init_logit_bias: float | None = None

    def __post_init__(self) -> None:
        for name, kind in (("image", ImageConfig), ("text", TextConfig)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"{name} must be a {kind.__name__}, got {type(getattr(self, name)).__name__}")
        if self.logit_scale_kind not in ("log", "plain"):
            raise unknown("logit_scale_kind", self.logit_scale_kind, ("log", "plain"))
        for name, known in (("resize_mode", RESIZE_MODES), ("interpolation", tuple(INTERPOLATIONS))):
            if getattr(self, name) not in known:
                raise unknown(name, getattr(self, name), known)
        if self.image.num_classes:
            raise ValueError(f"a tower of Florence has no classifier, got image.num_classes={self.image.num_classes}")
        _set(self, "embed_dim", whole("embed_dim", self.embed_dim, 1, _LARGEST_WIDTH))
        mean, std = sequence("image_mean", self.image_mean), sequence("image_std", self.image_std)
        _set(self, "image_mean", tuple(number("image_mean", value) for value in mean))
        _set(self, "image_std", tuple(positive("image_std", value) for value in std))
        for name, values in (("image_mean", mean), ("image_std", std)):
            if len(values) not in (3, self.image.in_chans):
                raise ValueError(f"{name} must have one number a channel, {self.image.in_chans}, got {len(values)}")
        positive("init_logit_scale", self.init_logit_scale, _LARGEST_LOGIT_SCALE)
        if self.max_logit_scale is not None:
            number("max_logit_scale", self.max_logit_scale, 1, _LARGEST_LOGIT_SCALE)
        if self.init_logit_bias is not None:
            number("init_logit_bias", self.init_logit_bias, -_LARGEST_LOGIT_SCALE, _LARGEST_LOGIT_SCALE)


def _set(config: _Config, name: str, value: Any) -> None:
    """Store the checked form of a field: a list as a tuple, a number of NumPy as Python's."""
    object.__setattr__(config, name, value)


def _check_mlp_ratio(ratio: object, width: int) -> None:
    if int(positive("mlp_ratio", ratio, 64) * width) < 1:
        raise ValueError(f"mlp_ratio must leave a hidden width of at least 1, got {ratio} for a width of {width}")
