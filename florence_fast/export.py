"""Export models to ONNX, torch.export and AOTInductor files that run without this package, checked against eager.

Everything is traced inside ``ops.backend("reference")``: the graph holds PyTorch's own operations alone. Batches of
every size fit, unless told otherwise, and with ``dynamic_size`` images of every size from 4 pixels on: windows, pads,
shifts and masks are then computed from the image's size by the graph itself, and nothing in it was decided by the size
at which it was traced. A torch-export file holds guards as well, which refuse maps that end as a single token.
AOTInductor compiles it too, at many times the length of one size: minutes for two blocks.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.fx.experimental._config as fx_config
from torch import Tensor, nn

from florence_fast import ops
from florence_fast.errors import require, unknown
from florence_fast.models import Florence, ImageTower

FORMATS = {"onnx": ".onnx", "torch-export": ".pt2", "aoti": ".pt2"}
PARTS = ("image", "text", "both")
_AXES = {2: "height", 3: "width"}
"""Of images."""

Arrays = tuple[Tensor, ...]

# relative to the largest value of an output; the reference computes in another order than the kernels
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}
_LOW_PRECISION_TOLERANCE = 3e-2


class ParityError(Exception):
    """The exported file does not compute what the model computes."""


@dataclass(frozen=True)
class Exported:
    """What `export` wrote; printed, the same in words."""

    path: Path
    format: str
    inputs: dict[str, tuple[int | str, ...]]
    """Name -> shape; a word where every size fits."""
    outputs: tuple[str, ...]
    errors: dict[str, float]
    """Name of an output -> largest difference from eager relative to the largest value; empty if not checked."""
    checked: str
    """What was compared, or why nothing could be."""

    def __str__(self) -> str:
        inputs = ", ".join(f"{name} ({', '.join(map(str, shape))})" for name, shape in self.inputs.items())
        errors = ", ".join(f"{name} {error:.1e}" for name, error in self.errors.items())
        lines = [f"{self.path}: {self.format}, {inputs} -> {', '.join(self.outputs)}"]
        return "\n".join([*lines, f"parity with eager, {self.checked}" + (f": {errors}" if errors else "")])


class _Part(nn.Module):
    def __init__(self, model: Florence) -> None:
        super().__init__()
        self.model = model


class _Image(_Part):
    def forward(self, image: Tensor) -> Tensor:
        return self.model.encode_image(image, normalize=True)


class _Text(_Part):
    def forward(self, text: Tensor) -> Tensor:
        return self.model.encode_text(text, normalize=True)


class _Both(_Part):
    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        factor = self.model.logit_factor()
        return self.model.encode_image(image, normalize=True), self.model.encode_text(text, normalize=True), factor * 1


@dataclass(frozen=True)
class _Plan:
    module: nn.Module
    sizes: dict[str, tuple[int, ...]]
    """Input -> its shape behind the batch."""
    outputs: tuple[str, ...]
    vocab_size: int
    device: torch.device

    def draw(self, batch: int, image_size: tuple[int, int] | None = None) -> Arrays:
        """Random inputs: standard normal images, (H, W) if not of the plan's size, and texts of every length."""
        drawn = []
        for name, size in self.sizes.items():
            if name == "image":
                drawn.append(torch.randn(batch, size[0], *(image_size or size[1:]), device=self.device))
            else:
                drawn.append(torch.randint(1, self.vocab_size, (batch, *size), device=self.device))
        return tuple(drawn)


def export(
    model: Florence | ImageTower,
    path: str | os.PathLike[str],
    *,
    format: str = "onnx",
    part: str | None = None,
    image_size: int | None = None,
    dynamic: bool = True,
    dynamic_size: bool = False,
    batch_size: int = 1,
) -> Exported:
    """Write a model as a file that other runtimes load, and compare what the file computes with the model.

    Args:
        model: a dual encoder or an image tower, on any device.
        path: ends in ``.onnx``, or in ``.pt2`` for the other formats; appears only when it has passed.
        format: ``"onnx"``, ``"torch-export"`` or ``"aoti"`` (compiled C++ for this machine's kind of processor).
        part: of a dual encoder: ``"image"`` (image -> normalised features), ``"text"`` (text -> normalised features)
            or ``"both"`` (image, text -> both and the factor of the cosines), the default. A tower has ``"image"``.
        image_size: side of the images, the model's by default.
        dynamic: take batches of every size.
        dynamic_size: take images of other sizes too, square or not; such a graph is larger and takes longer to write.
            ``"aoti"`` needs minutes even for two blocks.
        batch_size: the size of every batch when not ``dynamic``.

    Returns:
        Names, shapes and the errors against eager.

    Raises:
        ValueError: an unknown word, a wrong suffix, or a combination that cannot be.
        ImportError: ONNX is asked for and onnxscript is not installed.
        ParityError: the file gives something else than the model.

    >>> print(export(ff.create_model("florence_nano", "artists"), "nano.onnx"))
    """
    path = Path(path)
    part = _check(model, path, format, part, dynamic, dynamic_size)
    plan = _plan(model, part, image_size)
    with _evaluating(model), torch.no_grad():
        shapes = _free_axes(plan, dynamic, dynamic_size)
        program = _trace(plan, shapes, 2 if dynamic else batch_size, dynamic_size)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}-") as folder:
            beside = Path(folder) / path.name
            _WRITERS[format](program, beside, plan, shapes)
            errors, checked = _compare(beside, format, plan, (2, 5) if dynamic else (batch_size,), dynamic_size)
            # weights beyond 2 GB lie in a second file beside an ONNX graph
            for file in sorted(Path(folder).iterdir()):
                os.replace(file, path.parent / file.name)
    batch = "batch" if dynamic else batch_size
    inputs: dict[str, tuple[int | str, ...]] = {name: (batch, *size) for name, size in plan.sizes.items()}
    if dynamic_size:
        inputs["image"] = (batch, plan.sizes["image"][0], *_AXES.values())
    return Exported(path, format, inputs, plan.outputs, errors, checked)


def _check(model: nn.Module, path: Path, format: str, part: str | None, dynamic: bool, dynamic_size: bool) -> str:
    if format not in FORMATS:
        raise unknown("format", format, FORMATS)
    if part is not None and part not in PARTS:
        raise unknown("part", part, PARTS)
    if not isinstance(model, Florence | ImageTower):
        raise ValueError(f"model must be a Florence or an image tower, got {type(model).__name__}")
    if isinstance(model, ImageTower) and part not in (None, "image"):
        raise ValueError(f"an image tower has no part {part!r}")
    if dynamic_size and (not dynamic or part == "text"):
        raise ValueError(f"dynamic_size needs dynamic and images, got dynamic={dynamic} and part {part!r}")
    if path.suffix != FORMATS[format]:
        raise ValueError(f"a file of format {format!r} ends in {FORMATS[format]}, got {path.name!r}")
    part = part or ("both" if isinstance(model, Florence) else "image")
    if format == "onnx":
        require("onnxscript", "export")
    return part


def _plan(model: Florence | ImageTower, part: str, image_size: int | None) -> _Plan:
    tower = model.visual if isinstance(model, Florence) else model
    side = image_size or tower.config.img_size
    sizes: dict[str, tuple[int, ...]] = {"image": (tower.config.in_chans, side, side)}
    device = next(model.parameters()).device
    if isinstance(model, ImageTower):
        return _Plan(model, sizes, ("logits" if model.config.num_classes else "features",), 0, device)
    text = model.config.text
    sizes["text"] = (text.context_length,)
    outputs = ("image_features", "text_features", "logit_scale")
    module = {"image": _Image, "text": _Text, "both": _Both}[part](model)
    if part != "both":
        sizes, outputs = {part: sizes[part]}, (f"{part}_features",)
    return _Plan(module, sizes, outputs, text.vocab_size, device)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode, and every module back into its own afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _free_axes(plan: _Plan, dynamic: bool, dynamic_size: bool) -> tuple[dict[int, Any] | None, ...] | None:
    """Return torch.export's ``dynamic_shapes``, one entry an input, or None if every shape is fixed."""
    if not dynamic:
        return None
    shapes = []
    for name in plan.sizes:
        axes: dict[int, Any] = {0: torch.export.Dim(f"{name}s", min=1)}
        if dynamic_size and name == "image":
            axes |= dict.fromkeys(_AXES, torch.export.Dim.DYNAMIC)
        shapes.append(axes)
    return tuple(shapes)


def _image_sizes(plan: _Plan) -> tuple[tuple[int, int], ...]:
    """Sizes (H, W) at which a file for all of them is compared: the plan's, a larger and a smaller one, not square."""
    side = plan.sizes["image"][1]
    return (side, side), (side + 5, 2 * side - 3), (max(side // 2 - 1, 4), side + 2)


def _trace(plan: _Plan, shapes: Any, batch: int, dynamic_size: bool) -> torch.export.ExportedProgram:
    side = plan.sizes["image"][1] if dynamic_size else 0
    # not square, since sides of one size might be taken for the same side
    drawn = plan.draw(batch, (side + 12, side + 28) if dynamic_size else None)
    # otherwise PyTorch would guard against maps of one token at each step, hundreds of times
    oblivious = cast(Any, fx_config).patch(backed_size_oblivious=dynamic_size)
    with ops.backend("reference"), oblivious:
        program = torch.export.export(plan.module.eval(), drawn, dynamic_shapes=shapes)
    ours = sorted({str(node.target) for node in program.graph.nodes if "florence_fast" in str(node.target)})
    assert not ours, f"the graph of an exported model must hold no op of ours, found {ours}"
    return program


def _write_onnx(program: torch.export.ExportedProgram, path: Path, plan: _Plan, shapes: Any) -> None:
    # It warns that torchvision's ops will not be translated; there are none.
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        named = shapes and tuple({axis: _AXES.get(axis, dim) for axis, dim in axes.items()} for axes in shapes)
        names = {"input_names": list(plan.sizes), "output_names": list(plan.outputs), "dynamic_shapes": named}
        found = torch.onnx.export(program, (), dynamo=True, verbose=False, **names)
    finally:
        registration.setLevel(level)
    assert found is not None, "torch.onnx.export returns a program when no path is given"
    found.save(path)


def _write_torch_export(program: torch.export.ExportedProgram, path: Path, plan: _Plan, shapes: Any) -> None:
    torch.export.save(program, path)


def _write_aoti(program: torch.export.ExportedProgram, path: Path, plan: _Plan, shapes: Any) -> None:
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))


_WRITERS = {"onnx": _write_onnx, "torch-export": _write_torch_export, "aoti": _write_aoti}


def _load(path: Path, format: str) -> Callable[..., Any]:
    """Return the file as a function from tensors to tensors."""
    if format == "torch-export":
        return torch.export.load(path).module()
    if format == "aoti":
        return torch._inductor.aoti_load_package(str(path))
    runtime = require("onnxruntime", "export")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(*inputs: Tensor) -> Arrays:
        given = {name: value.cpu().numpy() for name, value in zip(names, inputs, strict=True)}
        return tuple(torch.from_numpy(out) for out in session.run(None, given))

    return run


def _compare(
    path: Path, format: str, plan: _Plan, batches: tuple[int, ...], dynamic_size: bool
) -> tuple[dict[str, float], str]:
    """Run the file beside the model, with the kernels that the model uses, on images and texts of its own.

    Raises:
        ParityError: an output is too far away, or not a number.
    """
    try:
        load = _load(path, format)
    except ImportError as error:
        return {}, f"not checked: {error}"
    checked = f"batches of {' and '.join(map(str, batches))}"
    sizes: tuple[tuple[int, int] | None, ...] = (None,)
    if dynamic_size:
        sizes = _image_sizes(plan)
        checked += ", images of " + ", ".join(f"{height}x{width}" for height, width in sizes)
    errors = dict.fromkeys(plan.outputs, 0.0)
    for batch, size in itertools.product(batches, sizes):
        inputs = plan.draw(batch, size)
        expected, found = (_tuple(function(*inputs)) for function in (plan.module, load))
        for name, ours, theirs in zip(plan.outputs, expected, found, strict=True):
            difference = (theirs.to(ours.device).double() - ours.double()).abs().max()
            error = float(difference / ours.double().abs().max().clamp_min(1e-30))
            limit = TOLERANCE.get(ours.dtype, _LOW_PRECISION_TOLERANCE)
            if not error <= limit:
                shapes = " and ".join(str(tuple(x.shape)) for x in inputs)
                raise ParityError(f"{format} gives {name} with an error of {error:.1e} for {shapes}, over {limit}")
            errors[name] = max(errors[name], error)
    return errors, checked


def _tuple(out: Any) -> Arrays:
    return tuple(out) if isinstance(out, tuple | list) else (out,)
