"""Import libraries that CI does not have, or skip: torchvision, timm, MONAI; and what their tests have in common."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

from florence_fast import ops

_KEPT = []


def _declare_torchvision_ops():
    """Declare torchvision's ops beside a torch for which its library was not built; none of them is ever called."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or hasattr(torch.ops.torchvision, "nms"):
        return
    for library in Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(library)
            return
        except OSError:
            continue
    text = (Path(spec.origin).parent / "_meta_registrations.py").read_text()
    names = {"nms", *re.findall(r'register_(?:meta|fake)\("(?:torchvision::)?(\w+)"', text)}
    declared = torch.library.Library("torchvision", "DEF")
    for name in sorted(names):
        declared.define(f"{name}(Tensor input) -> Tensor")
    _KEPT.append(declared)  # it ends with the object


def torchvision():
    """Import torchvision."""
    _declare_torchvision_ops()
    return pytest.importorskip("torchvision")


def timm():
    """Import timm, which needs torchvision."""
    torchvision()
    return pytest.importorskip("timm")


def monai():
    """Import the nets of MONAI, whose Swin needs einops."""
    pytest.importorskip("einops")
    pytest.importorskip("monai")
    return pytest.importorskip("monai.networks.nets")


def randomize(model, std=0.2):
    """Draw every parameter, biases and bias tables too, so that no two of them can be mistaken; norms near one."""
    for name, parameter in model.named_parameters():
        scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 and not name.endswith("table") else std
        torch.nn.init.normal_(parameter, std=scale)
        if "norm" in name and name.endswith("weight") and parameter.ndim == 1:
            parameter.data += 1
    return model


def run(model, *inputs, call=None):
    """Output and gradients by name, of a loss in which no two outputs count alike."""
    model.zero_grad()
    output = (call or model)(*inputs)
    outputs = output if isinstance(output, (list, tuple)) else [output]
    loss = sum((o * torch.linspace(-9, 9, o.numel(), dtype=o.dtype).sin().view_as(o)).sum() for o in outputs)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {**{f"output {i}": o.detach() for i, o in enumerate(outputs)}, **grads}


def error(found, expected):
    """The largest error, relative to the largest value."""
    found, expected = found.double(), expected.double()
    return ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


def assert_equal_to_rounding(found, expected, bound=1e-5):
    """Hold every tensor against its twin, those of a few numbers (logit scales) on the scale of them all."""
    assert found.keys() == expected.keys()
    few = [name for name in expected if expected[name].numel() < 8]
    scale = max((expected[name].abs().max().item() for name in few), default=0.0)
    for name in expected:
        off = (found[name].double() - expected[name].double()).abs().max().item()
        allowed = bound * (scale if name in few else expected[name].abs().max().item())
        assert off <= allowed, f"{name}: {off:.2e} of {expected[name].abs().max():.2e}"


def assert_as_good_in_bf16(ours, theirs, exact, factor=2.0):
    """Hold the error against float64 in the L2 norm below ``factor`` times the other's, over output and gradients.

    Tensors of a few numbers, of which the error would be one draw more than a measure, are taken together. So are those
    of the networks that make Swin V2's biases: what reaches them of a layer's error is a few numbers a head.
    """
    few = [name for name in exact if exact[name].numel() < 64]
    networks = [name for name in exact if name not in few and ("cpb_mlp" in name or "meta_mlp" in name)]
    for names in [*([name] for name in exact if name not in (*few, *networks)), few, networks]:
        mine, others, right = (
            torch.cat([torch.zeros(1), *(run[name].double().flatten() for name in names)])
            for run in (ours, theirs, exact)
        )
        found = [((x - right).norm() / right.norm().clamp_min(1e-30)).item() for x in (mine, others)]
        assert found[0] <= factor * found[1] + 1e-3, f"{names}: {found}"


@pytest.fixture
def calls(monkeypatch):
    """The names of the ops of ours that ran, in order."""
    seen = []

    def count(name, op):
        def counting(*args, **kwargs):
            seen.append(name)
            return op(*args, **kwargs)

        monkeypatch.setattr(ops, name, counting)

    for name in ("window_attention", "mlp", "layer_norm", "patch_merging"):
        count(name, getattr(ops, name))
    return seen
