"""The configurations of the models: frozen, checked when they are made, and the same as JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeVar

from florence_fast.errors import unknown

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_C = TypeVar("_C", bound="_Config")


class _Config:
    """To and from plain dictionaries, refusing keys that no field has."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types, configurations inside this one included."""
        return _plain(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls: type[_C], values: dict[str, Any]) -> _C:
        """Build the configuration from what `to_dict` gave.

        Raises:
            ValueError: a key that is not a field (with the nearest field), a missing one, or a value out of range.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for key in values:
            if key not in fields:
                raise unknown(f"key of {cls.__name__}", key, fields)
        for name, field in fields.items():
            if field.default is dataclasses.MISSING and name not in values:
                raise ValueError(f"{cls.__name__} needs {name!r}, got only {sorted(values)}")
        nested = {"image": ImageConfig, "text": TextConfig} if cls is FlorenceConfig else {}
        return cls(**{k: nested[k].from_dict(v) if k in nested else _frozen(v) for k, v in values.items()})


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
        if len(self.depths) != len(self.num_heads):
            raise ValueError(
                f"num_heads must have one entry a stage, {len(self.depths)} for depths={self.depths}, "
                f"got {self.num_heads}"
            )
        for stage, heads in enumerate(self.num_heads):
            if self.stage_width(stage) % heads:
                raise ValueError(
                    f"num_heads must divide the width of its stage: stage {stage} has {self.stage_width(stage)} "
                    f"channels, got {heads} heads"
                )
        if self.window_size < 1:
            raise ValueError(f"window_size must be at least 1, got {self.window_size}")
        if not 0 <= self.drop_path_rate < 1:
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
        if self.width % self.heads:
            raise ValueError(f"heads must divide width={self.width}, got {self.heads}")


@dataclass(frozen=True)
class FlorenceConfig(_Config):
    """The dual encoder: two towers, the width they share, and the temperature.

    ``logit_scale_kind`` says what the parameter holds: ``"log"`` its logarithm, as open_clip has it, or ``"plain"``
    the factor itself. ``max_logit_scale`` bounds the factor; None leaves it free.
    """

    image: ImageConfig
    text: TextConfig
    embed_dim: int
    logit_scale_kind: str = "log"
    image_mean: tuple[float, ...] = IMAGENET_MEAN
    image_std: tuple[float, ...] = IMAGENET_STD
    init_logit_scale: float = 1 / 0.07
    max_logit_scale: float | None = 100.0

    def __post_init__(self) -> None:
        if self.logit_scale_kind not in ("log", "plain"):
            raise unknown("logit_scale_kind", self.logit_scale_kind, ("log", "plain"))
        if self.image.num_classes:
            raise ValueError(f"a tower of Florence has no classifier, got image.num_classes={self.image.num_classes}")
