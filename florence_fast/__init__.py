"""florence_fast: Florence (2021, arXiv 2111.11432), its models, training and evaluation on fused kernels.

Everything public is reachable from here and is imported when it is first used, so that ``import florence_fast``
costs nothing and needs neither torch nor triton until something asks for them.
"""

import importlib
from functools import partial
from typing import TYPE_CHECKING, Any

from florence_fast.on_import import after_import
from florence_fast.version import __version__

_SUBMODULES = ("data", "evaluate", "models", "ops", "tasks", "train")
_HOMES = {
    "add_model_config": "compat.open_clip",
    "create_model": "compat.open_clip",
    "create_model_and_transforms": "compat.open_clip",
    "create_model_from_pretrained": "compat.open_clip",
    "get_model_config": "compat.open_clip",
    "get_tokenizer": "compat.open_clip",
    "list_models": "models",
    "list_pretrained": "models",
    "load_checkpoint": "compat.open_clip",
    "register_model_config": "models",
    "Florence": "models",
    "image_transform": "data",
    "IMAGENET_CLASSNAMES": "data",
    "OPENAI_IMAGENET_TEMPLATES": "data",
    "SIMPLE_IMAGENET_TEMPLATES": "data",
    "build_zero_shot_classifier": "evaluate",
    "tokenize": "compat.open_clip",
    "ClipLoss": "compat.open_clip",
    "SigLipLoss": "compat.open_clip",
    "accelerate": "compat",
    "restore": "compat",
    "patch_open_clip": "compat.open_clip",
    "unpatch_open_clip": "compat.open_clip",
    "register_with_timm": "compat.timm_registry",
    "register_with_transformers": "compat.transformers_registry",
    "backend": "ops",
}

__all__ = ["__version__", *_SUBMODULES, *_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:  # the same table for editors and type checkers, which run no __getattr__; a test compares them
    from florence_fast import data, evaluate, models, ops, tasks, train
    from florence_fast.compat import accelerate, restore
    from florence_fast.compat.open_clip import (
        ClipLoss,
        SigLipLoss,
        add_model_config,
        create_model,
        create_model_and_transforms,
        create_model_from_pretrained,
        get_model_config,
        get_tokenizer,
        load_checkpoint,
        patch_open_clip,
        tokenize,
        unpatch_open_clip,
    )
    from florence_fast.compat.timm_registry import register_with_timm
    from florence_fast.compat.transformers_registry import register_with_transformers
    from florence_fast.data import (
        IMAGENET_CLASSNAMES,
        OPENAI_IMAGENET_TEMPLATES,
        SIMPLE_IMAGENET_TEMPLATES,
        image_transform,
    )
    from florence_fast.evaluate import build_zero_shot_classifier
    from florence_fast.models import Florence, list_models, list_pretrained, register_model_config
    from florence_fast.ops import backend


def __getattr__(name: str) -> Any:
    """Import ``name`` from the module that defines it, at its first use (PEP 562)."""
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        from florence_fast.errors import did_you_mean

        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{did_you_mean(name, __all__)}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _call(home: str, name: str) -> None:
    getattr(importlib.import_module(f"{__name__}.{home}"), name)()


# Whoever imports one of these, before this package or after it, finds our models there.
for _library, _name in {
    "timm": "timm_registry.register_with_timm",
    "transformers.models.auto.configuration_auto": "transformers_registry.register_config",
    "transformers.models.auto.image_processing_auto": "transformers_registry.register_image_processor",
    "transformers.models.auto.processing_auto": "transformers_registry.register_processor",
    "transformers.models.auto.tokenization_auto": "transformers_registry.register_tokenizer",
}.items():
    after_import(_library, partial(_call, *f"compat.{_name}".rsplit(".", 1)))
