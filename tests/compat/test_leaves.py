"""16-bit models on processors without units for them: what lies outside the known layers is widened, and restored."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

import florence_fast as ff
from florence_fast import processor
from florence_fast.compat.accelerate import leaves
from florence_fast.ops import _product
from florence_fast.processor import Units

transformers = pytest.importorskip("transformers")

OUTSIDE = {"swin.embeddings.patch_embeddings.projection", "classifier"}


@pytest.fixture(autouse=True)
def units(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    def pretend(fast: bool) -> None:
        monkeypatch.setattr(processor, "units", lambda format: Units(fast, "as pretended"))
        monkeypatch.setattr(_product, "_lacks_units", lambda format: not fast)

    pretend(False)
    return pretend


def _model() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"image_size": 56, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "num_labels": 5}
    return transformers.SwinForImageClassification(transformers.SwinConfig(**sizes)).eval()


def _names(model: nn.Module) -> set[str]:
    found = set(map(id, leaves.swapped_in(model)))
    return {name for name, module in model.named_modules() if id(module) in found}


@pytest.mark.parametrize("how", ["bf16", "fp16", "autocast"])
def test_logits_and_gradients_are_as_exact_as_eager_and_nothing_multiplies_in_16_bits(how: str, monkeypatch) -> None:
    model, x = _model(), torch.randn(2, 3, 56, 56)
    exact = copy.deepcopy(model).double()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "autocast": torch.float32}[how]
    eager, ours = copy.deepcopy(model).to(dtype), model.to(dtype)
    ff.accelerate(ours, verbose=False)
    assert _names(ours) == OUTSIDE

    def run(net: nn.Module, dtype: torch.dtype) -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast" and dtype == torch.float32):
            logits = net(x.to(dtype)).logits
        logits.sum().backward()
        return [logits.detach().double(), *(p.grad.double() for p in net.parameters())]

    true, plain = run(exact, torch.float64), run(eager, dtype)

    def forbidden(module: nn.Module, *_: torch.Tensor) -> torch.Tensor:
        raise AssertionError(f"{type(module).__name__} ran its own product")

    monkeypatch.setattr(nn.Linear, "forward", forbidden)
    monkeypatch.setattr(nn.Conv2d, "forward", forbidden)
    found = run(ours, dtype)
    errors = [torch.stack([(a - b).norm() for a, b in zip(run_, true, strict=True)]) for run_ in (found, plain)]
    assert errors[0][0] <= 2 * errors[1][0]
    assert errors[0].norm() <= 2 * errors[1].norm()


def test_float32_is_the_modules_own_to_the_bit() -> None:
    head = nn.Sequential(nn.Conv2d(3, 4, 3, padding_mode="reflect", padding=1), nn.Flatten(), nn.Linear(64, 2))
    x = torch.randn(2, 3, 4, 4)
    wanted = head(x)
    assert leaves.swap(head, ()) == ["0", "2"]
    assert torch.equal(head(x), wanted)
    assert head.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_copies_and_pickles_keep_it_and_restore_takes_it_back() -> None:
    model = _model()
    ff.accelerate(model, verbose=False)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert _names(copied) == OUTSIDE
        assert all("embeddings" not in name and name != "classifier" for name in ff.restore(copied))
        assert not any("forward" in vars(module) for module in copied.modules())


def test_nothing_is_laid_over_where_the_processor_has_the_units(units: Callable[[bool], None]) -> None:
    units(True)
    model = _model()
    ff.accelerate(model, verbose=False)
    assert not _names(model)


def test_a_layer_that_was_left_alone_is_left_alone_to_its_last_module() -> None:
    model = _model()
    left = model.swin.encoder.layers[0].blocks[0]
    left.register_forward_hook(lambda *_: None)
    left.attention.register_forward_hook(lambda *_: None)
    report = ff.accelerate(model, verbose=False)
    assert list(report.skipped) == ["swin.encoder.layers.0.blocks.0"]
    assert _names(model) == OUTSIDE


def test_what_was_hooked_or_replaced_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].register_forward_hook(lambda *_: None)
    model[1].forward = lambda x: x
    assert leaves.swap(model, ()) == ["2"]
