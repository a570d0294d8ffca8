"""Our image towers in timm's registry: ``timm.create_model("coswin_tiny.florence", features_only=True)``.

``import florence_fast`` does not import timm. It is enough that both are imported, in any order: `register_with_timm`
is called when the later one is there. The models are ours and not timm's classes; they have the methods that timm's
users and scripts know.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from florence_fast.models.config import IMAGENET_MEAN, IMAGENET_STD, ImageConfig
from florence_fast.models.factory import create_model
from florence_fast.models.registry import get_model_config, list_models

TAG = "florence"

default_cfgs: dict[str, Any] = {}
"""Where timm looks for what it knows of the models whose entry points this module defines."""

__all__ = ["register_with_timm"]

_FOR_LOADING = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
_UNUSED = ("drop_rate", "global_pool", "scriptable", "exportable", "no_jit", "strict_img_size")


def register_with_timm() -> list[str]:
    """Make every image tower of `list_models` one of timm's models, under its name and under ``NAME.florence``.

    Their keywords are those of `florence_fast.create_model`: img_size, window_size, in_chans, num_classes,
    drop_path_rate, features_only, out_indices, output_fmt. ``pretrained=True`` is an error, since there are no weights
    to be downloaded; ``checkpoint_path`` takes files. ``import florence_fast`` has the same effect as soon as timm is
    imported, before or after; calling it again is harmless.

    Returns:
        The names that were added now.

    Raises:
        ImportError: timm is not installed.

    >>> register_with_timm()[0]
    'coswin_nano'
    >>> timm.create_model("coswin_tiny.florence", features_only=True, window_size=8).feature_info.channels()
    [96, 192, 384, 768]
    """
    import timm
    from timm.models import generate_default_cfgs, register_model

    towers = [name for name in list_models() if isinstance(get_model_config(name), ImageConfig)]
    added = [name for name in towers if not timm.is_model(name)]
    for name in added:
        default_cfgs.update(generate_default_cfgs({f"{name}.{TAG}": _describe(get_model_config(name))}))
        register_model(_entry_point(name))
    return added


def _describe(config: ImageConfig) -> dict[str, Any]:
    """Say in timm's words what a model takes, for its transforms."""
    return {
        "url": "",
        "num_classes": config.num_classes,
        "input_size": (config.in_chans, config.img_size, config.img_size),
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "fixed_input_size": False,
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }


def _entry_point(name: str) -> Callable[..., nn.Module]:
    """Write the function that timm calls by this name."""

    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        if pretrained:
            raise ValueError(f"{name} has no weights for pretrained=True; give a file as checkpoint_path")
        for key in (*_FOR_LOADING, *_UNUSED):
            value = kwargs.pop(key, None)
            if key in _UNUSED and value not in (None, 0, 0.0, "avg", False):
                raise TypeError(f"{name} takes no {key}, got {value!r}")
        model = create_model(name, **kwargs)
        tower = getattr(model, "tower", model)
        described = {**_describe(tower.config), "architecture": name, "tag": TAG}
        model.pretrained_cfg = model.default_cfg = described
        model.num_classes = tower.config.num_classes
        return model

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"Build {name} of florence_fast."
    return build
