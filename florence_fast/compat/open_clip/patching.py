"""Put our losses into the installed open_clip, and take them out again."""

from __future__ import annotations

import sys
from types import ModuleType

from florence_fast.compat.open_clip.losses import ClipLoss, SigLipLoss
from florence_fast.errors import require

LOSSES = {"ClipLoss": ClipLoss, "SigLipLoss": SigLipLoss}
_PACKAGES = ("open_clip", "open_clip_train")

# module and name -> the class that stood there
_replaced: dict[tuple[str, str], type] = {}


def patch_open_clip() -> list[str]:
    """Let open_clip build its contrastive losses from ours: everywhere that it keeps ``ClipLoss`` and ``SigLipLoss``.

    open_clip's ``create_loss`` and with it ``python -m open_clip_train.main`` then train on our kernels. Call it before
    the loss is made. ``CoCaLoss`` and ``DistillClipLoss`` derive from open_clip's own class, need its logits or its
    constructor, and stay as they are.

    Returns:
        What was swapped, e.g. ``["open_clip.ClipLoss", "open_clip.factory.ClipLoss", ...]``.

    Raises:
        ImportError: open_clip is not installed.
        ValueError: nothing was swapped: it is patched already, or holds no class of these names.

    >>> patch_open_clip()[0]
    'open_clip.ClipLoss'
    """
    theirs = _theirs()
    swapped = []
    for module in _modules():
        for name, ours in LOSSES.items():
            if module.__dict__.get(name) in theirs:
                _replaced[module.__name__, name] = module.__dict__[name]
                setattr(module, name, ours)
                swapped.append(f"{module.__name__}.{name}")
    if not swapped:
        state = "it is patched already" if _replaced else "it holds no such class of its own"
        raise ValueError(f"nothing in open_clip was swapped: looked for {' and '.join(LOSSES)}, and {state}")
    return swapped


def unpatch_open_clip() -> list[str]:
    """Give open_clip its own losses back.

    Returns:
        What was given back.

    Raises:
        ValueError: it is not patched.
    """
    if not _replaced:
        raise ValueError("nothing to give back: open_clip is not patched")
    given = []
    for (module, name), theirs in _replaced.items():
        if sys.modules.get(module) is not None:
            setattr(sys.modules[module], name, theirs)
            given.append(f"{module}.{name}")
    _replaced.clear()
    return given


def _theirs() -> set[type]:
    """Return open_clip's own classes, whoever holds them now."""
    require("open_clip", "open_clip")
    loss = sys.modules.get("open_clip.loss")
    held = {getattr(loss, name, None) for name in LOSSES} | set(_replaced.values())
    return {cls for cls in held if isinstance(cls, type) and cls not in LOSSES.values()}


def _modules() -> list[ModuleType]:
    """List what is imported of open_clip and of its training entry point, by name."""
    names = sorted(name for name in list(sys.modules) if name.split(".")[0] in _PACKAGES)
    return [sys.modules[name] for name in names if isinstance(sys.modules[name], ModuleType)]
