"""Features of a folder's images in one file, so that a second search encodes only what is new or has changed.

The file is safetensors: the features, and in its metadata the name, modification time and size of each image and a
digest of the model that encoded them.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from florence_fast.files import replacing
from florence_fast.models.florence import Florence
from florence_fast.strict_json import format_json, parse_json

log = logging.getLogger(__name__)

_KEY = "florence_fast_image_index"
_VERSION = 1


class Stamp(NamedTuple):
    """What tells that an image is the one that was encoded: its name, its modification time in ns, its bytes."""

    name: str
    modified: int
    size: int


def stamps(paths: Sequence[Path], folder: Path) -> list[Stamp | None]:
    """Return the stamp of each path, named relative to ``folder``; None for a file that is gone."""
    found: list[Stamp | None] = []
    for path in paths:
        try:
            status = path.stat()
            found.append(Stamp(os.path.relpath(path, folder), status.st_mtime_ns, status.st_size))
        except OSError:
            found.append(None)
    return found


def with_file(
    file: Path, key: str, wanted: Sequence[Stamp | None], encode: Callable[[list[int]], tuple[list[int], Tensor]]
) -> tuple[list[int], Tensor]:
    """Return the features of images, from ``file`` where it has them, and write what it then should hold.

    Args:
        file: the file, which need not exist.
        key: digest of the model; features under another one are not used.
        wanted: a stamp for each image.
        encode: from the numbers of images to those that could be read and their features (N, D).

    Returns:
        The numbers of the images that have features, in order, and the features (N, D).

    Raises:
        ValueError: ``file`` is something else, or damaged.
    """
    known = _read(file, key) if file.exists() else {}
    rows = {number: known[stamp] for number, stamp in enumerate(wanted) if stamp is not None and stamp in known}
    missing = [number for number in range(len(wanted)) if number not in rows]
    log.info("%s: %d of %d images have their features there", file, len(rows), len(wanted))
    if missing:
        numbers, features = encode(missing)
        rows.update(zip(numbers, features, strict=True))
    order = sorted(rows)
    joined = torch.stack([rows[number] for number in order])
    kept = [(stamp, row) for number, row in zip(order, joined, strict=True) if (stamp := wanted[number]) is not None]
    if known.keys() != {stamp for stamp, _ in kept}:
        _write(file, key, [stamp for stamp, _ in kept], torch.stack([row for _, row in kept]))
    return order, joined


def model_digest(model: Florence, precision: str) -> str:
    """Return a digest of the weights and settings that decide a model's features."""
    digest = hashlib.blake2b(f"{_VERSION} {precision} {model.config}".encode(), digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def check_feature_file(file: Path) -> None:
    """Refuse a file that is there and no index of ours, before any work and rather than overwriting it.

    Raises:
        ValueError: it is something else, or damaged.
    """
    if file.exists():
        _read(file, "")


def _read(file: Path, key: str) -> dict[Stamp, Tensor]:
    """Read the features by stamp; none if another model made them."""
    try:
        with safe_open(file, framework="pt") as opened:
            text = (opened.metadata() or {}).get(_KEY)
            if text is None:
                raise ValueError("it holds no features of images")
            content = parse_json(text, "its list of images")
            if content["key"] != key:
                return {}
            features = opened.get_tensor("features")
        found = {Stamp(*map(_checked, row, (str, int, int))): feature for row, feature in _pairs(content, features)}
    except (SafetensorError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{file} is no index of images: {error}; delete it, or name another file") from error
    return found


def _pairs(content: dict, features: Tensor) -> list[tuple[list, Tensor]]:
    if features.ndim != 2 or len(features) != len(content["images"]) or not torch.isfinite(features).all():
        raise ValueError(f"features of the shape {tuple(features.shape)} for {len(content['images'])} images")
    return list(zip(content["images"], features, strict=True))


def _checked(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{value!r} is no {kind.__name__}")
    return value


def _write(file: Path, key: str, images: list[Stamp], features: Tensor) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", _KEY: format_json({"key": key, "images": [list(stamp) for stamp in images]})}
    with replacing(file) as beside:
        save_file({"features": features.contiguous()}, beside, metadata=metadata)
