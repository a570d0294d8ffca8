"""Registered models against the parameter counts of the design and of the papers, and configurations against JSON."""

import copy
import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from florence_fast.models import (
    FlorenceConfig,
    ImageConfig,
    TextConfig,
    TextTower,
    add_model_config,
    get_model_config,
    list_models,
    num_parameters,
)
from florence_fast.models.factory import build_model
from florence_fast.models.registry import config_from_dict

COUNTS = {
    "coswin_tiny": 29_461_530,
    "coswin_small": 50_779_434,
    "coswin_base": 90_192_952,
    "coswin_large": 202_750_548,
    "coswin_huge": 637_368_368,
    "swin_tiny": 28_288_354 - 769_000,  # the published counts are those with 1,000 classes
    "swin_small": 49_606_258 - 769_000,
    "swin_base": 87_768_224 - 1_025_000,
    "swin_large": 196_532_476 - 1_537_000,
    "florence_huge": 888_936_881,
    "unicl_swin_tiny": 27_519_354 + 63_165_952 + (768 + 512) * 512 + 1,
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_count(name):
    assert num_parameters(name) == COUNTS[name]


@pytest.mark.parametrize(("name", "count"), [("florence_huge", 248_291_712), ("unicl_swin_base", 63_165_952)])
def test_parameter_count_of_text_tower(name, count):
    with torch.device("meta"):
        tower = TextTower(get_model_config(name).text)
    assert sum(p.numel() for p in tower.parameters()) == count


def test_nano_is_small_enough_to_ship_in_bf16():
    assert 2 * num_parameters("florence_nano") <= 15_000_000


def test_paper_sizes_have_heads_of_32():
    for name in list_models("*coswin_*") + list_models("swin_*"):
        config = get_model_config(name)
        if name != "coswin_nano":
            assert {config.stage_width(s) // h for s, h in enumerate(config.num_heads)} == {32}, name


@pytest.mark.parametrize("name", list_models())
def test_every_model_is_built_and_its_config_survives_json(name):
    config = get_model_config(name)
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with torch.device("meta"):
        model = build_model(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not list(model.buffers())


def test_an_older_config_keeps_the_way_in_which_images_were_resized():
    config = get_model_config("florence_nano")
    older = {key: value for key, value in config.to_dict().items() if key not in ("resize_mode", "interpolation")}
    assert FlorenceConfig.from_dict(older) == config
    assert (config.resize_mode, config.interpolation) == ("shortest", "bicubic")
    for key, value in {"resize_mode": "center", "interpolation": "nearest"}.items():
        with pytest.raises(ValueError, match=f"unknown {key} {value!r}"):
            FlorenceConfig.from_dict({**older, key: value})


def test_a_model_made_on_the_meta_device_is_drawn_afterwards():
    with torch.device("meta"):
        model = build_model(get_model_config("florence_nano"))
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    model.reset_parameters()
    assert [name for name, p in model.named_parameters() if not p.isfinite().all()] == []


def test_list_models_filters():
    assert list_models("unicl_*") == ["unicl_swin_tiny", "unicl_swin_base"]
    assert {"florence_nano", "coswin_huge", "swin_large"} < set(list_models())


def test_a_config_file_becomes_a_model(tmp_path, monkeypatch):
    from florence_fast.models import registry

    monkeypatch.setattr(registry, "_CONFIGS", dict(registry._CONFIGS))
    config = ImageConfig("swin", 8, (1, 1), (1, 2), window_size=4)
    (tmp_path / "mine.json").write_text(json.dumps(config.to_dict()))
    add_model_config(tmp_path)
    assert get_model_config("mine") == config
    with pytest.raises(FileNotFoundError, match="nowhere"):
        add_model_config(tmp_path / "nowhere.json")


TEXT = {"width": 8, "heads": 2, "layers": 1}
IMAGE = {"kind": "swin", "embed_dim": 8, "depths": [1], "num_heads": [2]}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: get_model_config("florence_nanoo"), "did you mean 'florence_nano'"),
        (lambda: TextConfig.from_dict({**TEXT, "head": 2}), "key of TextConfig 'head'.*did you mean 'heads'"),
        (lambda: TextConfig.from_dict({"width": 8}), "TextConfig needs 'heads'"),
        (lambda: TextConfig(8, 3, 1), "heads must divide width=8, got 3"),
        (lambda: TextConfig(8, 2, 1, act="gelo"), "activation 'gelo'.*'gelu'"),
        (lambda: ImageConfig.from_dict({**IMAGE, "kind": "coswim"}), "'coswim'.*did you mean 'coswin'"),
        (lambda: ImageConfig.from_dict({**IMAGE, "num_heads": [1, 2]}), "one entry a stage, 1 for depths"),
        (lambda: ImageConfig.from_dict({**IMAGE, "num_heads": [3]}), "stage 0 has 8 channels, got 3 heads"),
        (lambda: ImageConfig.from_dict({**IMAGE, "window_size": 0}), "window_size must be at least 1, got 0"),
        (lambda: ImageConfig.from_dict({**IMAGE, "drop_path_rate": 1.0}), r"drop_path_rate must lie in \[0, 1\)"),
        (
            lambda: FlorenceConfig.from_dict({"image": IMAGE, "text": TEXT, "embed_dim": 4, "logit_scale_kind": "lg"}),
            "logit_scale_kind 'lg'",
        ),
        (
            lambda: FlorenceConfig.from_dict({"image": {**IMAGE, "num_classes": 3}, "text": TEXT, "embed_dim": 4}),
            "image.num_classes=3",
        ),
    ],
)
def test_bad_configurations_say_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()


DUAL = {"image": {**IMAGE, "window_size": 2}, "text": TEXT, "embed_dim": 4}
STRANGE = (-1, 0, -0.5, 2.5, 10**18, -(10**18), math.nan, math.inf, "96", "x", None, [], [2, 2], [-1], [[1]], {}, True)


@pytest.mark.parametrize(
    ("part", "field"),
    [
        (part, field.name)
        for part, cls in (("image", ImageConfig), ("text", TextConfig), ("", FlorenceConfig))
        for field in dataclasses.fields(cls)
    ],
)
def test_every_field_refuses_values_that_no_model_has_and_names_itself(part, field):
    """What is accepted can be built, without memory, and written as JSON."""
    refused = 0
    for value in STRANGE:
        values = copy.deepcopy(DUAL)
        (values[part] if part else values)[field] = value
        try:
            config = FlorenceConfig.from_dict(values)
        except ValueError as error:
            words = {"act": "activation", "image": "ImageConfig", "text": "TextConfig", "embed_dim": "num_heads"}
            assert field in str(error) or words.get(field, "?") in str(error), (value, error)
            refused += 1
            continue
        with torch.device("meta"):
            build_model(config)
        json.dumps(config.to_dict(), allow_nan=False)
    assert refused >= len(STRANGE) // 2


def test_numbers_of_numpy_and_lists_become_those_of_json():
    config = ImageConfig("swin", np.int64(8), [1, 1], [np.int32(2), 2])
    assert config == ImageConfig("swin", 8, (1, 1), (2, 2))
    assert hash(config) and json.loads(json.dumps(config.to_dict()))["depths"] == [1, 1]


@pytest.mark.parametrize("values", [[], "x", None, 3])
def test_a_configuration_must_be_an_object(values):
    with pytest.raises(ValueError, match="configuration must be an object"):
        config_from_dict(values)
