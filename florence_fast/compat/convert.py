"""`convert`: read a checkpoint with one project's names and write it with another's.

Read: Microsoft's Swin and UniCL, timm's, torchvision's and Hugging Face's Swin, CLIP's text tower as Hugging Face and
open_clip write it, and our own. Written: ours, with the configuration inside; and a plain Swin under the names of the
others. Indices and masks in a file are dropped, and computed anew where the reader of the result wants them.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from florence_fast.compat import layouts
from florence_fast.compat.microsoft import coswin_from_swin
from florence_fast.compat.shapes import model_config, part, refuse_other_swins, shape_of
from florence_fast.errors import unknown
from florence_fast.files import replacing, write_json
from florence_fast.models.config import FlorenceConfig, ImageConfig, TextConfig
from florence_fast.models.factory import build_model
from florence_fast.models.layers import centre_bias_table
from florence_fast.models.layouts import State, drop_buffers, is_hugging_face_swin, is_unicl, to_our_layout, unwrap
from florence_fast.models.pretrained import match_state
from florence_fast.models.reading import Checkpoint, read_tensors
from florence_fast.models.registry import config_from_dict, get_model_config
from florence_fast.models.saving import CONFIG_KEY, CONFIG_NAME, WEIGHTS_NAME
from florence_fast.models.text import TextTower
from florence_fast.strict_json import format_json

Config = FlorenceConfig | ImageConfig | TextConfig

TEXT_CONFIG_KEY = "florence_fast_text_config"
"""The metadata of a text tower alone, which is no model that can be created by name."""

PICKLED = (".pth", ".pt", ".bin")
# what UniCL's released code computes and its tensors do not show
_UNICL_TEXT = {"act": "quick_gelu", "norm_eps": 1e-12}
_UNICL = {"init_logit_scale": 2.718281828459045, "max_logit_scale": None}


@dataclass(frozen=True)
class Conversion:
    """What `convert` did; printed, the same in words."""

    source: str
    out: str | None
    read_as: str
    written_as: str
    config: Config
    matched: int
    """Tensors that were carried over."""
    missing: list[str]
    """Names of the model that the source does not have; they are not in the result."""
    left_out: list[str]
    """Names of the source that the model, or the layout written, has no place for."""
    resized: list[str]
    """Bias tables and position embeddings that were interpolated or cut."""
    state: State = field(repr=False)
    """What was written, less the buffers."""

    def __str__(self) -> str:
        lines = [f"{self.source}: read as {self.read_as}, {self.matched} tensors carried over to {self.written_as}"]
        text = self.config.text if isinstance(self.config, FlorenceConfig) else self.config
        if isinstance(text, TextConfig) and self.read_as != "florence_fast":
            # no tensor shows these: a wrong guess gives other features without a word
            lines.append(f"taken for the text tower: {text.heads} heads, {text.act}, norm eps {text.norm_eps}")
        for title in ("missing", "left_out", "resized"):
            names = getattr(self, title)
            if names:
                lines += [f"{len(names)} {title.replace('_', ' ')}:", *(f"  {name}" for name in names)]
        return "\n".join([*lines, f"written: {self.out}"] if self.out else lines)


def _has_swin_blocks(state: State) -> bool:
    return "patch_embed.proj.weight" in state and any(name.startswith("layers.0.") for name in state)


_READERS: dict[str, tuple[Callable[[State], bool], Callable[[State], State]]] = {
    "open_clip": (layouts.open_clip.belongs, layouts.open_clip.read),
    "unicl": (is_unicl, to_our_layout),
    "hugging_face": (
        lambda state: is_hugging_face_swin(state) or layouts.clip_text.belongs(state),
        lambda state: (layouts.clip_text.read if layouts.clip_text.belongs(state) else to_our_layout)(state),
    ),
    "torchvision": (layouts.torchvision.belongs, layouts.torchvision.read),
    "timm": (
        lambda state: _has_swin_blocks(state) and "layers.0.downsample.reduction.weight" not in state,
        to_our_layout,
    ),
    "microsoft": (_has_swin_blocks, to_our_layout),
}
_WRITERS: dict[str, Callable[[State, ImageConfig], State]] = {
    "florence_fast": lambda state, config: state,
    "hugging_face": layouts.hugging_face.write,
    "timm": layouts.timm.write,
    "microsoft": layouts.microsoft.write,
    "torchvision": layouts.torchvision.write,
}
SOURCES = ("auto", *_READERS)
TARGETS = tuple(_WRITERS)


def convert(
    source: str | os.PathLike[str] | Mapping[str, torch.Tensor],
    out: str | os.PathLike[str] | None = None,
    *,
    layout: str = "auto",
    to: str = "florence_fast",
    model: str | None = None,
    window_size: int | None = None,
    image_size: int | None = None,
    context_length: int | None = None,
    warm_start_coswin: bool = False,
) -> Conversion:
    """Carry a checkpoint over to our names, or a plain Swin over to another project's.

    Args:
        source: a safetensors file, a ``.pth``/``.pt``/``.bin`` file of plain tensors, a folder with
            ``model.safetensors`` and perhaps ``config.json``, or a state_dict.
        out: a ``.safetensors`` file; a ``.pth``/``.pt`` file; or a folder, which gets ``model.safetensors`` and
            ``config.json``. None writes nothing.
        layout: whose names the source has: one of `SOURCES`.
        to: whose names to write: one of `TARGETS`.
        model: a model of `list_models()` that the result must fit; read from the shapes by default.
        window_size: another window; bias tables are interpolated bicubically.
        image_size: the image size to note in the configuration.
        context_length: another length of text: positions are cut at the end, or interpolated to reach further.
        warm_start_coswin: turn a plain Swin into a CoSwin (see `florence_fast.compat.microsoft`).

    Returns:
        What was carried over, what is missing and what was left out. A result with missing tensors is written
        without them, and loads with ``strict=False`` only.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: the file holds pickled objects, no name matches, shapes differ, or the target cannot hold the model.

    >>> convert("swin_tiny_patch4_window7_224.pth", "swin_tiny", window_size=12, image_size=384)
    """
    if layout not in SOURCES:
        raise unknown("layout to read", layout, SOURCES)
    if to not in TARGETS:
        raise unknown("layout to write", to, TARGETS)
    found = _read(source)
    read_as = _recognise(found) if layout == "auto" else layout
    state = drop_buffers(found.state)
    before = set(state)
    state = _READERS[read_as][1](state) if read_as in _READERS else to_our_layout(state)
    dropped = [] if read_as != "hugging_face" else _images_of_clip(before)
    if read_as == "open_clip" and not any(name.startswith("visual.") for name in state):
        dropped = sorted(name for name in before if name.startswith("visual."))
    refuse_other_swins(state)
    config = _source_config(found, state, read_as) if model is None else _named_config(model, state)
    if warm_start_coswin:
        state, config = _coswin_state(state), _coswin_config(config)
    config = _target_config(config, to)
    config = _with_sizes(config, window_size, image_size, context_length)
    state, resized = _fit_context(_with_prefix(state, config), config)
    state = _with_whole_tables(state, config, image_size)
    fitted, missing, unexpected = _match(state, config, str(found.path))
    resized += [name for name, tensor in fitted.items() if name in state and tensor.shape != state[name].shape]
    written = _WRITERS[to](fitted, config)
    if out is not None:
        _write(Path(out), written, config, to)
    if to != "florence_fast":
        unexpected += [name for name in state if name not in fitted and name not in unexpected]
    return Conversion(
        source=str(found.path),
        out=None if out is None else str(out),
        read_as=read_as,
        written_as=to,
        config=config,
        matched=len(fitted),
        missing=missing,
        left_out=sorted({*dropped, *unexpected}),
        resized=resized,
        state=written,
    )


def _read(source: str | os.PathLike[str] | Mapping[str, torch.Tensor]) -> Checkpoint:
    if isinstance(source, Mapping):
        return Checkpoint(Path("state_dict"), unwrap(source), None)
    return read_tensors(source)


def _recognise(found: Checkpoint) -> str:
    if found.config is not None and "model_type" not in found.config:
        return "florence_fast"
    for name, (belongs, _) in _READERS.items():
        if belongs(found.state):
            return name
    return "florence_fast"


def _images_of_clip(names: set[str]) -> list[str]:
    return sorted(name for name in names if name.startswith(("vision_model.", "visual_projection.")))


def _source_config(found: Checkpoint, state: State, read_as: str) -> Config:
    """Return the configuration that came with the tensors, or what their shapes say."""
    values = found.config or {}
    if values and "model_type" not in values:
        return config_from_dict(values)
    image, text, whole = {}, {}, {}
    if values.get("model_type") == "swin":
        image = layouts.hugging_face.image_fields(values)
    elif str(values.get("model_type", "")).startswith("clip"):
        text = layouts.hugging_face.text_fields(values)
    elif read_as == "hugging_face":
        text = {"act": "quick_gelu"}
    if read_as == "unicl":
        text, whole = _UNICL_TEXT, _UNICL
    return model_config(state, image, text, whole)


def _named_config(model: str, state: State) -> Config:
    """Return the configuration of a registered model; a tower gets as many classes as the source has."""
    config = get_model_config(model)
    if isinstance(config, ImageConfig) and "head.weight" in state:
        return dataclasses.replace(config, num_classes=shape_of(state, "head.weight", 2)[0])
    return config


def _coswin_state(state: State) -> State:
    if "patch_embed.proj.weight" in state:
        return coswin_from_swin(state)
    others = {name: tensor for name, tensor in state.items() if not name.startswith("visual.")}
    carried = coswin_from_swin(part(state, "visual."))
    return {**{f"visual.{name}": tensor for name, tensor in carried.items()}, **others}


def _coswin_config(config: Config) -> Config:
    if isinstance(config, FlorenceConfig):
        return dataclasses.replace(config, image=dataclasses.replace(config.image, kind="coswin"))
    return dataclasses.replace(config, kind="coswin") if isinstance(config, ImageConfig) else config


def _target_config(config: Config, to: str) -> Config:
    """Return the configuration of what is written, in which sizes may still change."""
    if to == "florence_fast":
        return config
    if isinstance(config, FlorenceConfig):
        config = config.image
    if not isinstance(config, ImageConfig) or config.kind != "swin":
        what = "a text tower" if isinstance(config, TextConfig) else "a CoSwin, whose stem and merges are other layers"
        raise ValueError(f"only a plain Swin can be written as {to}, and this is {what}")
    return config


def _with_sizes(config: Config, window_size: int | None, image_size: int | None, context_length: int | None) -> Config:
    image = {"window_size": window_size, "img_size": image_size}
    image = {name: value for name, value in image.items() if value is not None}
    text = {} if context_length is None else {"context_length": context_length}
    if isinstance(config, FlorenceConfig):
        parts = {"image": dataclasses.replace(config.image, **image), "text": dataclasses.replace(config.text, **text)}
        return dataclasses.replace(config, **parts)
    refused = text if isinstance(config, ImageConfig) else image
    if refused:
        tower = "an image tower" if isinstance(config, ImageConfig) else "a text tower"
        raise ValueError(f"{', '.join(refused)} cannot be changed: what is written is {tower}")
    return dataclasses.replace(config, **image, **text)


def _with_prefix(state: State, config: Config) -> State:
    """Put a tower that stands alone into the place that it has in a dual encoder."""
    if isinstance(config, FlorenceConfig) and "patch_embed.proj.weight" in state:
        return {f"visual.{name}": tensor for name, tensor in state.items()}
    return state


def _fit_context(state: State, config: Config) -> tuple[State, list[str]]:
    """Cut or interpolate the position embeddings of a text tower."""
    name = "text.positional_embedding"
    wanted = {FlorenceConfig: lambda c: c.text.context_length, TextConfig: lambda c: c.context_length}
    if name not in state or type(config) not in wanted:
        return state, []
    length, places = wanted[type(config)](config), state[name]
    shape_of(state, name, 2)
    if len(places) == length:
        return state, []
    if length < len(places):
        return {**state, name: places[:length]}, [name]
    longer = F.interpolate(places.float().T[None], size=length, mode="linear", align_corners=True)[0].T
    return {**state, name: longer.to(places.dtype).contiguous()}, [name]


def _with_whole_tables(state: State, config: Config, image_size: int | None) -> State:
    """Centre the bias tables of windows that the source cut to its map, unless ``image_size`` asks for a larger map.

    Interpolated, they would be others even at the size at which the source was trained.
    """
    image = config.image if isinstance(config, FlorenceConfig) else config
    tables = {name: table for name, table in state.items() if name.endswith(".relative_position_bias_table")}
    if not isinstance(image, ImageConfig) or not tables:
        return state
    windows = {name: (math.isqrt(len(table)) + 1) // 2 for name, table in tables.items()}
    whole = {}
    for name, window in windows.items():
        stage = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
        if stage is None or (2 * window - 1) ** 2 != len(tables[name]) or window >= max(windows.values()):
            continue
        is_larger = image_size is not None and math.ceil(image_size / 4 / 2 ** int(stage[1])) > window
        if not is_larger and window < image.window_size:
            whole[name] = centre_bias_table(tables[name], image.window_size)
    return state | whole


def _match(state: State, config: Config, source: str) -> tuple[State, list[str], list[str]]:
    """Compare with the model on the meta device; of a text tower alone the names keep their ``text.``."""
    with torch.device("meta"):
        if not isinstance(config, TextConfig):
            return match_state(build_model(config), state, source=source)
        tower = TextTower(config)
    fitted, missing, unexpected = match_state(tower, part(state, "text."), source=source)
    projections = {name: state[name] for name in ("text_projection.weight", "logit_scale") if name in state}
    others = [name for name in state if not name.startswith("text.") and name not in projections]
    fitted = {f"text.{name}": tensor for name, tensor in fitted.items()} | projections
    return fitted, [f"text.{name}" for name in missing], [f"text.{name}" for name in unexpected] + others


def _write(out: Path, state: State, config: Config, to: str) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    values = config.to_dict()
    if out.suffix in PICKLED:
        out.parent.mkdir(parents=True, exist_ok=True)
        # a file object, because torch does not say why writing to a path failed
        with replacing(out) as beside, open(beside, "wb") as file:
            torch.save({"model": tensors} if to == "microsoft" else tensors, file)
        return
    file = out if out.suffix == ".safetensors" else out / WEIGHTS_NAME
    file.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt"}
    if to == "florence_fast":
        metadata[TEXT_CONFIG_KEY if isinstance(config, TextConfig) else CONFIG_KEY] = format_json(values)
    with replacing(file) as beside:
        # copies, because tensors that share memory (the thirds of a qkv) cannot be written
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, beside, metadata=metadata)
    if file != out:
        write_json(out / CONFIG_NAME, layouts.hugging_face.config_json(config) if to == "hugging_face" else values)
