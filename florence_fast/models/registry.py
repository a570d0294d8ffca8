"""Registry of named model configurations.

``florence_*`` are dual encoders, ``coswin_*`` their image towers alone, ``swin_*`` the published Swin sizes and
``unicl_swin_*`` the models that Microsoft released with UniCL. `num_parameters` counts any of them without memory.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch

from florence_fast.errors import unknown
from florence_fast.models.config import FlorenceConfig, ImageConfig, TextConfig
from florence_fast.text_files import read_json

ModelConfig: TypeAlias = FlorenceConfig | ImageConfig

_CONFIGS: dict[str, ModelConfig] = {}

# width, depths, heads, drop path of the image tower; width, layers, heads of the text tower; shared width
_FLORENCE = {
    "tiny": ((96, (2, 2, 6, 2), (3, 6, 12, 24), 0.2), (512, 12, 8), 512),
    "small": ((96, (2, 2, 18, 2), (3, 6, 12, 24), 0.3), (512, 12, 8), 512),
    "base": ((128, (2, 2, 18, 2), (4, 8, 16, 32), 0.5), (512, 12, 8), 512),
    "large": ((192, (2, 2, 18, 2), (6, 12, 24, 48), 0.5), (768, 12, 12), 768),
    "huge": ((256, (2, 2, 24, 6), (8, 16, 32, 64), 0.5), (1152, 12, 18), 1024),
}

# The demo's model: 64 px, small enough to train on two cores and to ship. Its first stage has no blocks: at 16 x 16
# tokens they cost as much as all others together, and the two convolutions see the detail that 64 pixels hold.
_NANO = FlorenceConfig(
    image=ImageConfig("coswin", 48, (0, 2, 3, 1), (3, 6, 12, 24), img_size=64, window_size=4, drop_path_rate=0.05),
    text=TextConfig(192, heads=3, layers=2, context_length=16, token_embed_dim=40),
    embed_dim=256,
    image_mean=(0.5, 0.5, 0.5),
    image_std=(0.25, 0.25, 0.25),
)


def _tower(kind: str, size: tuple[int, tuple[int, ...], tuple[int, ...], float]) -> ImageConfig:
    width, depths, heads, drop_path = size
    return ImageConfig(kind, width, depths, heads, drop_path_rate=drop_path)


def register_model_config(name: str, config: ModelConfig) -> None:
    """Add a named configuration, or replace the one of that name."""
    _CONFIGS[name] = config


def add_model_config(path: str | Path) -> None:
    """Register the configuration in a JSON file, or those of a directory, under the files' names (open_clip's way)."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no model configuration at {path}")
    for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
        register_model_config(file.stem, config_from_dict(read_json(file)))


def config_from_dict(values: Mapping[str, Any]) -> ModelConfig:
    """Build the configuration of a dual encoder or of an image tower, whichever the keys describe.

    Raises:
        ValueError: not an object, an unknown or missing key, or a value that no model can have.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"a model's configuration must be an object with named fields, got {type(values).__name__}")
    return (ImageConfig if "kind" in values else FlorenceConfig).from_dict(values)


def get_model_config(name: str) -> ModelConfig:
    """Return the configuration of a registered model.

    Raises:
        ValueError: no model has this name; the message holds the nearest one.
    """
    if name not in _CONFIGS:
        raise unknown("model", name, _CONFIGS)
    return _CONFIGS[name]


def list_models(filter: str = "*") -> list[str]:
    """Return the names of the registered models that match a shell pattern, e.g. ``"coswin_*"``."""
    return [name for name in _CONFIGS if fnmatch.fnmatchcase(name, filter)]


def num_parameters(name: str) -> int:
    """Return the parameter count of a registered model, built without memory on the meta device.

    >>> num_parameters("florence_huge")
    888936881
    """
    from florence_fast.models.factory import build_model

    with torch.device("meta"):
        model = build_model(get_model_config(name))
    return sum(parameter.numel() for parameter in model.parameters())


register_model_config("florence_nano", _NANO)
for _size, (_image, (_width, _layers, _heads), _embed_dim) in _FLORENCE.items():
    _text = TextConfig(_width, heads=_heads, layers=_layers)
    register_model_config(f"florence_{_size}", FlorenceConfig(_tower("coswin", _image), _text, _embed_dim))
register_model_config("coswin_nano", _NANO.image)
for _size, (_image, _, _) in _FLORENCE.items():
    register_model_config(f"coswin_{_size}", _tower("coswin", _image))
for _size in ("tiny", "small", "base", "large"):
    register_model_config(f"swin_{_size}", _tower("swin", _FLORENCE[_size][0]))
for _size in ("tiny", "base"):
    # the released code starts its logarithm at 1 and leaves it free
    _text = TextConfig(512, heads=8, layers=12, act="quick_gelu", norm_eps=1e-12)
    register_model_config(
        f"unicl_swin_{_size}",
        FlorenceConfig(_tower("swin", _FLORENCE[_size][0]), _text, 512, init_logit_scale=math.e, max_logit_scale=None),
    )
