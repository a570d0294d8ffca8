"""Exported files against the models that they were made from; ONNX where onnxscript and onnxruntime are installed."""

import dataclasses
import os
from pathlib import Path

import pytest
import torch
import torch.fx.experimental._config as fx_config

from florence_fast import export as exporting
from florence_fast import ops
from florence_fast.cli import main
from florence_fast.export import ParityError, export
from florence_fast.models import CoSwin, Florence, Swin
from tests.models.test_text import texts
from tests.models.tiny import COSWIN, FLORENCE, SWIN

TOWERS = {"coswin": CoSwin(COSWIN), "swin": Swin(dataclasses.replace(SWIN, num_classes=3))}


def close(found, expected):
    for ours, theirs in zip(expected, found, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5 * float(ours.abs().max()))


@pytest.fixture
def florence():
    return Florence(FLORENCE)


@pytest.mark.parametrize("tower", TOWERS)
def test_a_tower_takes_every_batch(tower, tmp_path):
    model = TOWERS[tower].train()
    done = export(model, tmp_path / "tower.pt2", format="torch-export")
    assert model.training and model.norm.training, "the model keeps its mode"
    assert done.inputs == {"image": ("batch", 3, 32, 32)}
    assert done.outputs == (("logits",) if tower == "swin" else ("features",))
    assert 0 <= done.errors[done.outputs[0]] < 1e-5 and "batches of 2 and 5" in str(done)
    program = torch.export.load(done.path)
    assert not [node for node in program.graph.nodes if "florence_fast" in str(node.target)]
    for batch in (1, 7):
        image = torch.randn(batch, 3, 32, 32)
        with torch.no_grad():
            close([program.module()(image)], [model.eval()(image)])


def test_both_parts_of_a_dual_encoder_take_batches_of_their_own(florence, tmp_path):
    done = export(florence, tmp_path / "deep" / "both.pt2", format="torch-export")
    assert done.outputs == ("image_features", "text_features", "logit_scale")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["both.pt2"]
    image, text = torch.randn(3, 3, 32, 32), texts(4, 12)
    with torch.no_grad():
        close(torch.export.load(done.path).module()(image, text), florence.eval()(image, text))


def test_one_part_and_a_static_batch(florence, tmp_path):
    done = export(florence, tmp_path / "text.pt2", format="torch-export", part="text", dynamic=False, batch_size=2)
    assert done.inputs == {"text": (2, 12)} and done.outputs == ("text_features",)
    run, text = torch.export.load(done.path).module(), texts(4, 12)
    with torch.no_grad():
        close([run(text)], [florence.eval().encode_text(text, normalize=True)])
    with pytest.raises(AssertionError, match=r"2"):
        run(texts(4, 12, 3))


# maps that windows of 4 divide and not, flat ones, and ones that are smaller than a window in one stage or in both
IMAGE_SIZES = [(72, 100), (32, 32), (33, 31), (40, 56), (64, 20), (4, 64), (16, 16)]
ONE_TOKEN = [(8, 8), (4, 4), (5, 7)]


def right_at_every_size(run, model, sizes):
    for size in sizes:
        image = torch.randn(3, 3, *size)
        with torch.no_grad():
            close([run(image)], [model(image)])


class Attention(torch.nn.Module):
    """Shifted windows of 4, with pads that nobody sees."""

    def forward(self, qkv, table):
        return ops.window_attention(qkv, table, window_size=4, num_heads=1, shift_size=2)


def test_shifted_windows_in_one_graph_for_every_map():
    qkv, table = torch.randn(2, 11, 15, 24), torch.randn(49, 1)
    free = {0: torch.export.Dim("images", min=1), 1: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}
    with ops.backend("reference"), fx_config.patch(backed_size_oblivious=True):
        program = torch.export.export(Attention(), (qkv, table), dynamic_shapes=(free, None))
    run = program.module(check_guards=False)
    for size in [(18, 25), (8, 8), (4, 12), (3, 9), (1, 1), (11, 15)]:
        qkv = torch.randn(3, *size, 24)
        close([run(qkv, table)], [Attention()(qkv, table)])


@pytest.mark.slow
def test_one_stage_takes_every_image_size(tmp_path):
    model = CoSwin(dataclasses.replace(COSWIN, depths=(2,), num_heads=(1,))).eval()
    done = export(model, tmp_path / "any.pt2", format="torch-export", dynamic_size=True)
    assert done.inputs == {"image": ("batch", 3, "height", "width")}
    assert "batches of 2 and 5, images of 32x32, 37x61, 15x34: features" in str(done)
    right_at_every_size(torch.export.load(done.path).module(), model, IMAGE_SIZES)


@pytest.mark.slow
@pytest.mark.parametrize("tower", TOWERS)
def test_every_image_size_is_right_or_refused(tower, tmp_path):
    model = TOWERS[tower].eval()
    export(model, tmp_path / "any.pt2", format="torch-export", dynamic_size=True)
    run = torch.export.load(tmp_path / "any.pt2").module()
    right_at_every_size(run, model, IMAGE_SIZES)
    for size in ONE_TOKEN:
        with pytest.raises(AssertionError, match="Guard failed"):
            run(torch.randn(3, 3, *size))
    # what the guards are careful about is no mistake in the graph
    right_at_every_size(torch.export.load(tmp_path / "any.pt2").module(check_guards=False), model, ONE_TOKEN)


@pytest.fixture(scope="module")
def onnx_runtime():
    pytest.importorskip("onnxscript")
    return pytest.importorskip("onnxruntime")


def run_onnx(runtime, path, **inputs):
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(out) for out in session.run(None, {name: x.numpy() for name, x in inputs.items()})]


@pytest.mark.parametrize("tower", TOWERS)
def test_a_tower_in_onnx(onnx_runtime, tower, tmp_path):
    model = TOWERS[tower].eval()
    # 40 pixels: maps of 10 and 5, which windows of 4 do not divide
    done = export(model, tmp_path / "tower.onnx", image_size=40)
    assert done.errors and max(done.errors.values()) < 1e-5
    for batch in (1, 7):
        image = torch.randn(batch, 3, 40, 40)
        with torch.no_grad():
            close(run_onnx(onnx_runtime, done.path, image=image), [model(image)])


@pytest.mark.slow
@pytest.mark.parametrize("tower", TOWERS)
def test_every_image_size_in_onnx(onnx_runtime, tower, tmp_path):
    model = TOWERS[tower].eval()
    done = export(model, tmp_path / "any.onnx", dynamic_size=True)
    session = onnx_runtime.InferenceSession(str(done.path), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["images", 3, "height", "width"]
    right_at_every_size(
        lambda image: torch.from_numpy(session.run(None, {"image": image.numpy()})[0]), model, IMAGE_SIZES + ONE_TOKEN
    )


def test_a_dual_encoder_in_onnx(onnx_runtime, florence, tmp_path):
    done = export(florence, tmp_path / "both.onnx")
    image, text = torch.randn(3, 3, 32, 32), texts(4, 12)
    session = onnx_runtime.InferenceSession(str(done.path), providers=["CPUExecutionProvider"])
    shapes = {value.name: value.shape for value in session.get_inputs()}
    assert shapes == {"image": ["images", 3, 32, 32], "text": ["texts", 12]}
    assert tuple(value.name for value in session.get_outputs()) == done.outputs
    found = run_onnx(onnx_runtime, done.path, image=image, text=text)
    with torch.no_grad():
        close(found, florence.eval()(image, text))


def test_what_cannot_be_checked_says_so(onnx_runtime, florence, tmp_path, monkeypatch):
    def without_runtime(module, extra):
        if module == "onnxruntime":
            raise ImportError("onnxruntime is not here")

    monkeypatch.setattr(exporting, "require", without_runtime)
    done = export(florence, tmp_path / "text.onnx", part="text")
    assert done.path.is_file() and done.errors == {} and "not checked: onnxruntime is not here" in str(done)


def test_a_file_that_computes_something_else_never_appears(florence, tmp_path, monkeypatch):
    load = exporting._load
    monkeypatch.setattr(exporting, "_load", lambda *args: lambda *inputs: load(*args)(*inputs) * 1.01)
    with pytest.raises(ParityError, match=r"text_features with an error of 1\.0e-02 for \(2, 12\), over"):
        export(florence, tmp_path / "text.pt2", format="torch-export", part="text")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
def test_compiled_ahead_of_time(florence, tmp_path, dynamic):
    done = export(florence, tmp_path / "both.pt2", format="aoti", dynamic=dynamic, batch_size=3)
    image, text = torch.randn(3, 3, 32, 32), texts(4, 12, 7)
    with torch.no_grad():
        close(torch._inductor.aoti_load_package(str(done.path))(image, text), florence.eval()(image, text))


@pytest.mark.slow
def test_one_stage_compiled_for_every_image_size(tmp_path):
    model = CoSwin(dataclasses.replace(COSWIN, depths=(2,), num_heads=(1,))).eval()
    done = export(model, tmp_path / "any.pt2", format="aoti", dynamic_size=True)
    right_at_every_size(torch._inductor.aoti_load_package(str(done.path)), model, IMAGE_SIZES + ONE_TOKEN)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "onxx"}, "did you mean 'onnx'"),
        ({"part": "imag"}, "did you mean 'image'"),
        ({"format": "aoti"}, r"format 'aoti' ends in \.pt2, got 'x\.onnx'"),
        ({"dynamic_size": True, "dynamic": False}, "needs dynamic and images, got dynamic=False"),
        ({"dynamic_size": True, "part": "text"}, "needs dynamic and images, got dynamic=True and part 'text'"),
    ],
    ids=["format", "part", "suffix", "dynamic-size-static", "dynamic-size-of-text"],
)
def test_what_cannot_be_is_refused_before_anything_is_traced(florence, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        export(florence, tmp_path / "x.onnx", **options)
    with pytest.raises(ValueError, match="an image tower has no part 'text'"):
        export(TOWERS["swin"], tmp_path / "x.onnx", part="text")
    with pytest.raises(ValueError, match="must be a Florence or an image tower, got Linear"):
        export(torch.nn.Linear(1, 1), tmp_path / "x.onnx")


def test_without_onnxscript_the_extra_is_named(florence, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"florence_fast\[export\]"):
        export(florence, tmp_path / "x.onnx")


def test_the_command(florence, tmp_path, capsys):
    folder = florence.save_pretrained(tmp_path / "model")
    out = tmp_path / "text.pt2"
    assert main(["export", str(folder), str(out), "--format", "torch-export", "--part", "text"]) == 0
    shown = capsys.readouterr().out
    assert "text (batch, 12) -> text_features" in shown and "parity with eager, batches of 2 and 5" in shown
    assert out.is_file()
    for args, said in [
        (["swin_tiny", "x.onnx"], "comes without weights"),
        (["swin_tini", "x.onnx"], "did you mean 'swin_tiny'"),
        ([str(folder), "x.onnx", "--format", "onxx"], "did you mean 'onnx'"),
        ([str(folder), "x.onnx", "--part", "imag"], "did you mean 'image'"),
        ([str(folder), "x.pt", "--format", "aoti"], "ends in .pt2"),
    ]:
        assert main(["export", *args]) == 2
        assert said in capsys.readouterr().err
    assert not Path("x.onnx").exists() and os.listdir(tmp_path)
