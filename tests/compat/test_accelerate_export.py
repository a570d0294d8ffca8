"""Accelerated models in torch.export, torch.onnx.export and torch.jit.script: files that every machine can load."""

import pytest
import torch

from florence_fast.compat.accelerate import accelerate

pytest.importorskip("transformers")

from tests.compat.hugging_face_models import build

BACKENDS = {"cpp", "torch", "triton", "reference"}


@pytest.fixture
def model():
    model = build().eval()
    assert accelerate(model)
    return model


def test_scripting_is_refused_with_what_to_do(model):
    with pytest.raises(RuntimeError, match=r"call ff\.restore\(model\) first"):
        torch.jit.script(model)


def test_an_exported_program_leaves_the_backend_to_the_machine_that_loads_it(model, tmp_path):
    images = torch.randn(1, 3, 32, 32)
    program = torch.export.export(model, (images,), strict=False)
    ours = [node for node in program.graph.nodes if "florence_fast" in str(node.target)]
    words = {value for node in ours for value in (*node.args, *node.kwargs.values()) if isinstance(value, str)}
    assert ours and "auto" in words and not words & BACKENDS
    torch.export.save(program, tmp_path / "swin.pt2")
    loaded = torch.export.load(tmp_path / "swin.pt2").module()
    with torch.no_grad():
        expected, found = (call(images).last_hidden_state for call in (model, loaded))
    torch.testing.assert_close(found, expected)


def test_an_onnx_file_holds_no_operation_of_ours(model, tmp_path):
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    file = tmp_path / "swin.onnx"
    torch.onnx.export(model, (torch.randn(1, 3, 32, 32),), file, dynamo=True, verbose=False)
    assert {node.domain for node in onnx.load(file).graph.node} <= {"", "ai.onnx"}
