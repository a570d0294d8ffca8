"""What ``import florence_fast as ff`` offers: every public name resolves, and a misspelt one names the nearest."""

import importlib

import pytest

import florence_fast as ff


@pytest.mark.parametrize("name", ff.__all__)
def test_every_public_name_resolves_and_is_listed(name):
    assert getattr(ff, name) is not None
    assert name in dir(ff)


def test_it_stands_in_for_open_clip():
    """What scripts call of open_clip, after ``import florence_fast as open_clip``."""
    called = {
        *("create_model", "create_model_and_transforms", "create_model_from_pretrained", "load_checkpoint"),
        *("get_tokenizer", "tokenize", "image_transform", "get_model_config", "add_model_config"),
        *("list_models", "list_pretrained", "build_zero_shot_classifier", "ClipLoss", "SigLipLoss"),
        *("OPENAI_IMAGENET_TEMPLATES", "SIMPLE_IMAGENET_TEMPLATES", "IMAGENET_CLASSNAMES"),
    }
    assert called <= set(ff.__all__)


@pytest.mark.parametrize("part", ff._SUBMODULES)
def test_every_part_says_what_is_public_and_has_it(part):
    module = importlib.import_module(f"florence_fast.{part}")
    assert module.__doc__
    assert [name for name in module.__all__ if not hasattr(module, name)] == []
    assert sorted(set(module.__all__)) == sorted(module.__all__)


def test_a_misspelt_name_gives_the_nearest():
    misspelt = "creat_model"
    with pytest.raises(AttributeError, match=r"no attribute 'creat_model' \(did you mean 'create_model'\?\)"):
        getattr(ff, misspelt)
