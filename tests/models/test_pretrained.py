"""Saving and loading: what was saved comes back, what does not fit is refused by name, nothing half-written stays."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from florence_fast.files import replacing
from florence_fast.models import CoSwin, Florence, Swin
from florence_fast.models.layouts import to_our_layout, unwrap
from florence_fast.models.pretrained import (
    find_pretrained,
    list_pretrained,
    load_checkpoint,
    load_state,
    read_checkpoint,
)
from tests.models.test_text import texts
from tests.models.tiny import COSWIN, FLORENCE, SWIN


@pytest.fixture
def model():
    return Florence(FLORENCE).eval()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_one_file_is_enough(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer_config.json",
    ]
    (tmp_path / "saved" / "model.safetensors").rename(tmp_path / "alone.safetensors")
    again = Florence.from_pretrained(tmp_path / "alone.safetensors")
    assert again.config == FLORENCE
    assert same(again.state_dict(), model.state_dict())
    with safe_open(tmp_path / "alone.safetensors", framework="pt") as file:
        inside = json.loads(file.metadata()["florence_fast_config"])
    assert inside == json.loads((tmp_path / "saved" / "config.json").read_text())["florence"] == FLORENCE.to_dict()


def test_a_directory_comes_back_with_the_window_it_was_given(model, tmp_path):
    model.set_input_size(img_size=64, window_size=6)
    again = Florence.from_pretrained(model.save_pretrained(tmp_path))
    assert (again.config, again.visual.layers[0].blocks[0].attn.window_size) == (model.config, 6)
    image, text = torch.randn(1, 3, 64, 64), texts(5)
    for ours, theirs in zip(again.eval()(image, text), model(image, text), strict=True):
        assert torch.equal(ours, theirs)


def test_weights_without_a_config_use_the_one_beside_them(model, tmp_path):
    model.save_pretrained(tmp_path)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert Florence.from_pretrained(tmp_path).config == FLORENCE
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="holds no florence_fast_config"):
        Florence.from_pretrained(tmp_path)


def test_a_tower_saves_and_loads_itself_and_is_found_in_a_dual_encoder(model, tmp_path):
    tower = CoSwin(COSWIN)
    assert same(CoSwin.from_pretrained(tower.save_pretrained(tmp_path / "tower")).state_dict(), tower.state_dict())
    assert load_checkpoint(tower, model.save_pretrained(tmp_path / "both")) == []
    assert same(tower.state_dict(), model.visual.state_dict())
    with pytest.raises(ValueError, match="holds a CoSwin, not a Swin"):
        Swin.from_pretrained(tmp_path / "tower")
    with pytest.raises(ValueError, match="holds a CoSwin, not a Florence"):
        Florence.from_pretrained(tmp_path / "tower")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "model.safetensors"
    with replacing(target) as beside:
        beside.write_bytes(b"whole")
    with pytest.raises(OSError, match="disk full"), replacing(target) as beside:
        beside.write_bytes(b"ha")
        raise OSError("disk full")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("model.safetensors", b"whole")]


@pytest.mark.parametrize(
    ("latest", "newest"),
    [("step_9.pt\n", 9), (None, 20), ("step_9", 9), ("step_400.pt", 20), (b"\xf3tep_9.pt", 20)],
    ids=["named", "no-pointer", "no-suffix", "not-there", "damaged"],
)
def test_the_folder_of_a_run_stands_for_its_newest_weights(model, tmp_path, latest, newest):
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    model.save_pretrained(tmp_path / "saved")
    for step in (9, 20):
        (checkpoints / f"step_{step}.pt").write_bytes(b"what a run goes on from is not read")
        shutil.copy(tmp_path / "saved" / "model.safetensors", checkpoints / f"step_{step}.safetensors")
    if latest is not None:
        (checkpoints / "latest").write_bytes(latest if isinstance(latest, bytes) else latest.encode())
    for folder in (tmp_path / "run", checkpoints):
        found = read_checkpoint(folder)
        assert found.path == checkpoints / f"step_{newest}.safetensors"
        assert same(found.state, model.state_dict())
    for file in checkpoints.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"run holds no model\.safetensors"):
        read_checkpoint(tmp_path / "run")


@pytest.mark.parametrize("wrap", ["plain", "model", "state_dict", "ddp", "compiled"])
def test_what_training_scripts_save_is_read(model, tmp_path, wrap):
    state = model.state_dict()
    prefix = {"ddp": "module.", "compiled": "_orig_mod."}.get(wrap, "")
    saved = {prefix + name: tensor for name, tensor in state.items()}
    torch.save({wrap: saved, "epoch": 3} if wrap in ("model", "state_dict") else saved, tmp_path / "a.pt")
    assert same(read_checkpoint(tmp_path / "a.pt").state, state)


def test_bf16_weights_are_read_into_fp32(model, tmp_path):
    save_file({k: t.bfloat16() for k, t in model.state_dict().items()}, tmp_path / "half.safetensors")
    again = Florence(FLORENCE)
    load_checkpoint(again, tmp_path / "half.safetensors")
    assert again.text_projection.weight.dtype == torch.float32
    assert torch.equal(again.text_projection.weight, model.text_projection.weight.bfloat16().float())


def test_tables_of_another_window_and_a_longer_context_are_fitted(model):
    image = dataclasses.replace(COSWIN, window_size=6)
    other = Florence(
        dataclasses.replace(FLORENCE, image=image, text=dataclasses.replace(FLORENCE.text, context_length=8))
    )
    load_state(other, model.state_dict())
    assert torch.equal(other.text.positional_embedding, model.text.positional_embedding[:8])
    model.set_input_size(window_size=6)
    assert same(other.visual.state_dict(), model.visual.state_dict())


def test_timms_names_of_both_generations():
    ours = {k: t for k, t in Swin(dataclasses.replace(SWIN, num_classes=4)).state_dict().items()}
    new = {
        k.replace("layers.0.downsample", "layers.1.downsample").replace("head.", "head.fc."): t for k, t in ours.items()
    }
    assert same(to_our_layout(new), ours)
    assert same(to_our_layout(ours | {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(1)}), ours)


def change(state, drop=(), **add):
    return {k: t for k, t in state.items() if k not in drop} | add


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda s: {"encoder.weight": torch.zeros(1)},
            r"no name in x\.pth .* holds encoder\.weight, wanted logit_scale",
        ),
        (lambda s: change(s, drop=["logit_scale"]), "missing logit_scale; unexpected nothing; strict=False"),
        (lambda s: change(s, more=torch.zeros(1)), "missing nothing; unexpected more; strict=False"),
        (
            lambda s: change(s, logit_scale=torch.zeros(2)),
            r"1 tensors of x\.pth have another shape: logit_scale \(2,\), wanted \(\)",
        ),
        (
            lambda s: {k: t[:5] if k.endswith("text.positional_embedding") else t for k, t in s.items()},
            r"text\.positional_embedding \(5, 16\), wanted \(12, 16\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_anything_is_loaded(model, spoil, message):
    before = {k: t.clone() for k, t in model.state_dict().items()}
    other = {k: t + 1 for k, t in before.items()}
    with pytest.raises(ValueError, match=message):
        load_state(model, spoil(other), source="x.pth")
    assert same(model.state_dict(), before)


def test_not_strict_loads_what_there_is_and_says_what_is_missing(model):
    state = change({k: t + 1 for k, t in model.state_dict().items()}, drop=["logit_scale"], more=torch.zeros(1))
    assert load_state(model, state, strict=False) == ["logit_scale"]
    assert torch.equal(model.text.ln_final.weight, torch.full((16,), 2.0))
    with pytest.raises(ValueError, match="no name in state belongs to this model"):
        load_state(model, {"encoder.weight": torch.zeros(1)}, strict=False)


class Opens:
    """Unpickling this would run code."""

    def __reduce__(self):
        return (print, ("executed",))


def test_pickled_objects_are_never_read(model, tmp_path, capsys):
    torch.save({"model": model.state_dict(), "config": Opens()}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=r"bad\.pth does not hold plain tensors alone"):
        read_checkpoint(tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="weights_only=False is refused"):
        load_checkpoint(model, tmp_path / "bad.pth", weights_only=False)
    assert "executed" not in capsys.readouterr().out


def test_damaged_and_strange_files_are_refused(tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    (tmp_path / "cut.pth").write_bytes(b"PK")
    (tmp_path / "weights.h5").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    for name, kind, message in [
        ("cut.safetensors", ValueError, r"cut\.safetensors is not a whole safetensors file"),
        ("cut.pth", ValueError, r"cut\.pth does not hold plain tensors alone"),
        ("weights.h5", ValueError, r"weights\.h5 must end in \.safetensors or in one of \.pth"),
        ("empty", FileNotFoundError, r"empty holds no model\.safetensors"),
        ("list.pt", ValueError, r"list\.pt must hold a dictionary of tensors, got list"),
        ("none.pt", ValueError, r"no tensors found under the keys \['epoch'\]"),
        ("gone.pt", FileNotFoundError, r"no checkpoint at .*gone\.pt"),
    ]:
        with pytest.raises(kind, match=message):
            read_checkpoint(tmp_path / name)
    with pytest.raises(ValueError, match="no tensors found"):
        unwrap({"model": {}})


def test_tags_are_the_files_that_are_there(model, tmp_path, monkeypatch):
    monkeypatch.setattr("florence_fast.models.pretrained.SHIPPED", tmp_path)
    assert list_pretrained() == []
    save_file({"logit_scale": torch.zeros(())}, tmp_path / "florence_nano-artists.safetensors")
    assert list_pretrained() == [("florence_nano", "artists")]
    assert list_pretrained(as_str=True) == ["florence_nano:artists"]
    assert find_pretrained("florence_nano", "artists") == tmp_path / "florence_nano-artists.safetensors"
    with pytest.raises(ValueError, match=r"tag of florence_nano 'artist' \(did you mean 'artists'\?\)"):
        find_pretrained("florence_nano", "artist")
    with pytest.raises(ValueError, match="pretrained tag of florence_tiny 'artists'"):
        find_pretrained("florence_tiny", "artists")
    for path in ("nowhere/weights", "weights.pth", tmp_path / "gone"):
        with pytest.raises(FileNotFoundError, match="no such file or directory"):
            find_pretrained("florence_nano", path)
