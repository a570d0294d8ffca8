"""Our towers as timm's models: built by name, described for its transforms, with the methods its scripts call."""

import pytest
import torch

import florence_fast as ff
from florence_fast.compat.timm_registry import register_with_timm
from tests.compat import third_party

timm = third_party.timm()
SMALL = {"img_size": 64, "window_size": 4}


def test_both_imports_register_and_a_call_adds_nothing():
    assert register_with_timm() == []
    assert {"coswin_nano", "coswin_huge", "swin_tiny"} <= set(timm.list_models("*swin_*"))
    assert "coswin_tiny.florence" in timm.list_models("coswin*", include_tags=True)
    assert timm.is_model("coswin_tiny") and not timm.is_model("florence_tiny")


@pytest.mark.parametrize("name", ["coswin_nano.florence", "coswin_nano"])
def test_is_the_model_of_ours(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, drop_path_rate=0.0, **SMALL).eval()
    torch.manual_seed(0)
    same = ff.create_model("coswin_nano", num_classes=7, drop_path_rate=0.0, **SMALL).eval()
    image = torch.randn(2, 3, 64, 96)
    assert torch.equal(model(image), same(image)) and model.num_classes == 7
    assert list(model.state_dict()) == list(same.state_dict())


def test_features_only():
    model = timm.create_model("coswin_nano.florence", features_only=True, out_indices=(1, 3), **SMALL)
    maps = model(torch.randn(1, 3, 64, 96))
    assert [m.shape[1] for m in maps] == model.feature_info.channels() == [96, 384]


def test_transforms_and_scripts_find_what_they_look_for():
    model = timm.create_model("coswin_nano.florence", num_classes=7, **SMALL)
    timm_optim = pytest.importorskip("timm.optim")
    data = timm.data.resolve_model_data_config(model)
    assert data["input_size"] == (3, 64, 64) and data["interpolation"] == "bicubic"
    assert timm.get_pretrained_cfg("coswin_nano.florence").tag == "florence"
    if hasattr(timm_optim, "param_groups_layer_decay"):
        groups = timm_optim.param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.7)
        assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    model.reset_classifier(3)
    model.set_grad_checkpointing()
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 3)


def test_a_checkpoint_is_loaded(tmp_path):
    model = timm.create_model("coswin_nano", **SMALL).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    loaded = timm.create_model("coswin_nano", checkpoint_path=str(tmp_path / "weights.pth"), **SMALL).eval()
    image = torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded(image), model(image))


def test_what_we_lack_is_an_error():
    with pytest.raises(ValueError, match="coswin_nano has no weights for pretrained=True"):
        timm.create_model("coswin_nano", pretrained=True)
    with pytest.raises(TypeError, match=r"coswin_nano takes no drop_rate, got 0\.1"):
        timm.create_model("coswin_nano", drop_rate=0.1)
    with pytest.raises(TypeError, match=r"takes no keyword 'windw_size'.*window_size"):
        timm.create_model("coswin_nano", windw_size=4)
