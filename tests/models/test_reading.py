"""Weight files that are damaged, misshapen, wrapped or hostile: a ValueError with the name, or the right tensors."""

import argparse
import io
import json
import random
from fractions import Fraction

import pytest
import torch
from safetensors.torch import save, save_file

from florence_fast.models import Florence, create_model
from florence_fast.models.layouts import unwrap
from florence_fast.models.pretrained import load_state
from florence_fast.models.reading import read_checkpoint, read_tensors
from tests.models.tiny import FLORENCE

SMALL = {"patch_embed.proj.weight": torch.arange(192.0).reshape(4, 3, 4, 4), "norm.weight": torch.ones(4)}


def pickled(value, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


WHOLE = {
    "zip.pt": pickled(SMALL),
    "old.pth": pickled(SMALL, _use_new_zipfile_serialization=False),
    "new.safetensors": save(SMALL, metadata={"florence_fast_config": json.dumps(FLORENCE.to_dict())}),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_damaged_file_is_refused_or_holds_tensors(name, tmp_path):
    draw, refused = random.Random(1), 0
    for _ in range(150):
        data, kind = bytearray(WHOLE[name]), draw.randrange(3)
        if kind == 0:
            data = data[: draw.randrange(len(data))]
        elif kind == 1:
            for _ in range(draw.choice([1, 2, 8])):
                data[draw.randrange(len(data))] = draw.randrange(256)
        else:
            at = draw.randrange(len(data))
            del data[at : at + draw.randrange(1, 60)]
        (tmp_path / name).write_bytes(data)
        try:
            read_checkpoint(tmp_path / name)
        except ValueError as error:
            assert name in str(error)
            refused += 1
    assert refused > 50


LOOP: dict = {"a": torch.zeros(1)}
LOOP["model"] = LOOP


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({1: torch.zeros(1)}, "tensors must have names, got the key 1"),
        ({"a": torch.zeros(1), 3: torch.zeros(1)}, "tensors must have names, got the key 3"),
        (LOOP, "nested more than 8 deep"),
        ({"a": torch.zeros(2, 2).to_sparse()}, r"a must be a dense tensor, got a torch\.sparse_coo one"),
        ({"a": torch.zeros(2, device="meta")}, "a must be a tensor with values, got one on the device meta"),
        ({"module.a": torch.zeros(1), "_orig_mod.module.a": torch.zeros(1)}, "two tensors are called 'a'"),
        (
            {"model": {"a": torch.zeros(1)}, "config": Fraction(1)},
            "pickled fractions.Fraction, and pickles can run code",
        ),
        ([torch.zeros(1)], "must hold a dictionary of tensors, got list"),
    ],
    ids=["int", "mixed", "loop", "sparse", "meta", "twice", "object", "list"],
)
def test_strange_dictionaries_are_refused_by_name(value, message, tmp_path):
    torch.save(value, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=message) as caught:
        read_tensors(tmp_path / "x.pt")
    assert "x.pt" in str(caught.value) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", WHOLE)
def test_an_empty_file_says_so(name, tmp_path):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=f"{name} is empty: 0 bytes"):
        read_tensors(tmp_path / name)


@pytest.mark.parametrize("config", ["{", "[" * 100_000, "[]", "3", '{"florence": 1, "model_type": "florence_fast"}'])
def test_a_configuration_that_is_none_is_refused(config, tmp_path):
    save_file(SMALL, tmp_path / "a.safetensors", metadata={"florence_fast_config": config})
    save_file(SMALL, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(config)
    for path in (tmp_path / "a.safetensors", tmp_path):
        with pytest.raises(ValueError, match=r"florence_fast_config|config\.json|configuration"):
            Florence.from_pretrained(path)


PREFIXES = [
    "module.",
    "_orig_mod.",
    "_orig_mod.module.",
    "module._orig_mod.",
    "model.",
    "module.model.",
    "model._orig_mod.module.",
    "_forward_module.model.",
    "_fsdp_wrapped_module._orig_mod.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_wrappers_are_taken_off(prefix):
    state = Florence(FLORENCE).state_dict()
    assert unwrap({prefix + name: t for name, t in state.items()}).keys() == state.keys()
    assert unwrap({"state_dict": {prefix + name: t for name, t in state.items()}}).keys() == state.keys()


def test_wrappers_of_single_modules_and_the_counter_of_an_average_are_taken_out():
    state = Florence(FLORENCE).state_dict()
    inside = {
        f"module.{name.replace('blocks.1.', 'blocks.1._checkpoint_wrapped_module.')}": t for name, t in state.items()
    }
    assert unwrap({"n_averaged": torch.tensor(3), **inside}).keys() == state.keys()


def test_the_arguments_of_a_script_beside_the_weights_do_no_harm(tmp_path):
    state = Florence(FLORENCE).state_dict()
    torch.save({"model": state, "args": argparse.Namespace(lr=0.1), "epoch": 3}, tmp_path / "a.pth")
    assert read_tensors(tmp_path / "a.pth").state.keys() == state.keys()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float8_e5m2])
def test_weights_that_are_no_numbers_are_refused_by_name(value, dtype):
    model = Florence(FLORENCE)
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    load_state(model, state)
    spoilt = state["text.ln_final.bias"].float()
    spoilt[3] = value
    state["text.ln_final.bias"] = spoilt.to(dtype)
    with pytest.raises(ValueError, match=r"text\.ln_final\.bias of x\.pth holds NaN or infinite numbers"):
        load_state(model, state, source="x.pth")


def test_numbers_whose_sum_overflows_are_numbers_all_the_same():
    model = Florence(FLORENCE)
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    state["text.ln_final.bias"] = torch.full((16,), torch.finfo(torch.float64).max, dtype=torch.float64)
    load_state(model.double(), state)
    assert torch.equal(model.text.ln_final.bias, state["text.ln_final.bias"])


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_weights_of_another_kind_are_refused_by_name(dtype):
    model = Florence(FLORENCE)
    with pytest.raises(ValueError, match=f"logit_scale of state must hold floating-point numbers, got {dtype}"):
        load_state(model, {name: tensor.to(dtype) for name, tensor in model.state_dict().items()})


def test_a_configuration_that_the_tensors_do_not_have_is_refused_before_memory_is_asked_for(tmp_path):
    config = FLORENCE.to_dict()
    config["text"] |= {"width": 65536, "heads": 1024, "layers": 100, "vocab_size": 2**24}
    save_file(
        Florence(FLORENCE).state_dict(),
        tmp_path / "a.safetensors",
        metadata={"florence_fast_config": json.dumps(config)},
    )
    with pytest.raises(ValueError, match=r"does not fit|have another shape"):
        Florence.from_pretrained(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="another model than florence_nano"):
        create_model("florence_nano", tmp_path / "a.safetensors")
