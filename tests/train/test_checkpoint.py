"""Checkpoints are whole or passed over by name, few enough, and readable without unpickling anything but tensors."""

import logging
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from florence_fast.train.checkpoint import CheckpointStore, CorruptCheckpointError
from florence_fast.train.reproducible import rng_state, set_rng_state


def _steps(folder: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("step_")) for path in folder.glob("step_*.pt"))


def _corrupt(path: Path) -> None:
    """Flip one bit in the middle; size and name stay."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _state(step: int) -> dict[str, object]:
    return {"step": step, "weights": torch.full((64,), float(step))}


def test_round_trip_with_weights_and_pointer(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    path = store.save(7, _state(7), lambda beside: beside.write_bytes(b"weights"))
    assert path == tmp_path / "checkpoints" / "step_7.pt"
    assert store.load(path)["step"] == 7
    assert path.with_suffix(".safetensors").read_bytes() == b"weights"
    assert (path.parent / "latest").read_text() == "step_7.pt\n"
    assert sorted(file.name for file in path.parent.iterdir()) == [
        "latest",
        "step_7.pt",
        "step_7.pt.sha256",
        "step_7.safetensors",
    ]


def test_the_digest_is_what_sha256sum_reads(tmp_path: Path) -> None:
    CheckpointStore(tmp_path).save(1, _state(1))
    checked = subprocess.run(["sha256sum", "-c", "step_1.pt.sha256"], cwd=tmp_path, capture_output=True, text=True)
    assert (checked.returncode, checked.stdout) == (0, "step_1.pt: OK\n")


def test_the_last_k_stay(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in (1, 2, 10):
        store.save(step, _state(step), lambda beside: beside.write_bytes(b"weights"))
    assert _steps(tmp_path) == [2, 10]
    assert not list(tmp_path.glob("step_1.*"))


def test_a_corrupt_one_does_not_count_among_those_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in (1, 2):
        store.save(step, _state(step))
    _corrupt(tmp_path / "step_2.pt")
    store.save(3, _state(3))
    assert _steps(tmp_path) == [1, 2, 3]
    store.save(4, _state(4))
    assert _steps(tmp_path) == [3, 4]


@pytest.mark.parametrize("damage", ["bit", "cut", "digest-lost"])
def test_a_corrupt_checkpoint_is_named_and_passed_over(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    writer = CheckpointStore(tmp_path)
    for step in (1, 2):
        writer.save(step, _state(step))
    newest = tmp_path / "step_2.pt"
    if damage == "bit":
        _corrupt(newest)
    elif damage == "cut":
        newest.write_bytes(newest.read_bytes()[:-100])
    else:
        newest.with_name("step_2.pt.sha256").unlink()
    store = CheckpointStore(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert store.latest_valid() == tmp_path / "step_1.pt"
    assert "step_2.pt" in caplog.text
    with pytest.raises(CorruptCheckpointError, match=r"step_2\.pt"):
        store.load(newest)


@pytest.mark.parametrize(
    ("name", "found", "said"),
    [
        ("latest", 3, "latest names no checkpoint of this folder"),
        ("step_3.pt.sha256", 2, "step_3.pt is corrupt: step_3.pt.sha256 holds another SHA-256"),
        ("step_3.pt", 2, "step_3.pt is corrupt"),
    ],
)
@pytest.mark.parametrize("bit", [0x01, 0x80])
def test_one_flipped_bit_anywhere_leaves_a_checkpoint_to_go_on_from(
    tmp_path: Path, name: str, found: int, said: str, bit: int, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2, 3):
        CheckpointStore(tmp_path).save(step, _state(step))
    data = bytearray((tmp_path / name).read_bytes())
    data[2] ^= bit
    (tmp_path / name).write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert CheckpointStore(tmp_path).latest_valid() == tmp_path / f"step_{found}.pt"
    assert said in caplog.text


def test_a_checkpoint_that_the_drive_cannot_read_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        CheckpointStore(tmp_path).save(step, _state(step))
    (tmp_path / "step_2.pt").unlink()
    (tmp_path / "step_2.pt").mkdir()
    with caplog.at_level(logging.WARNING):
        assert CheckpointStore(tmp_path).latest_valid() == tmp_path / "step_1.pt"
    assert "passed over: [Errno 21] Is a directory" in caplog.text


def test_nothing_valid_is_an_error_and_nothing_at_all_is_none(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path).latest_valid() is None
    CheckpointStore(tmp_path).save(1, _state(1))
    _corrupt(tmp_path / "step_1.pt")
    with pytest.raises(CorruptCheckpointError, match="none of the 1 checkpoints"):
        CheckpointStore(tmp_path).latest_valid()
    with pytest.raises(FileNotFoundError, match=r"step_9\.pt"):
        CheckpointStore(tmp_path).load(tmp_path / "step_9.pt")


def test_the_pointer_wins_over_a_later_step_of_an_abandoned_course(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in (10, 20, 12):
        store.save(step, _state(step))
    assert store.latest_valid() == tmp_path / "step_12.pt"
    _corrupt(tmp_path / "step_12.pt")
    assert CheckpointStore(tmp_path).latest_valid() == tmp_path / "step_10.pt"


def test_a_failing_write_leaves_the_earlier_checkpoint_and_no_leftovers(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, _state(1))
    before = (tmp_path / "step_1.pt").read_bytes()
    with pytest.raises(Exception, match="pickle"):
        store.save(1, {"step": 1, "unwritable": lambda: None})
    assert (tmp_path / "step_1.pt").read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["latest", "step_1.pt", "step_1.pt.sha256"]
    (tmp_path / "step_5.pt.123.tmp").write_bytes(b"half")
    store.remove_leftovers()
    assert not list(tmp_path.glob("*.tmp"))


def test_every_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the digest has its name before the checkpoint, the checkpoint before the pointer."""
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(descriptor: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        events.append("sync " + name.split(f".{os.getpid()}")[0])
        fsync(descriptor)

    def watched_replace(beside: Path, path: Path) -> None:
        events.append(f"name {path.name}")
        replace(beside, path)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    CheckpointStore(tmp_path).save(1, _state(1))
    files = ("step_1.pt.sha256", "step_1.pt", "latest")
    assert events == [event for file in files for event in (f"sync {file}", f"name {file}", f"sync {tmp_path.name}")]


def test_a_pickled_object_is_not_read(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    path = store.save(1, {"path": Path("anything")})
    with pytest.raises(Exception, match="Weights only load failed"):
        store.load(path)


@pytest.mark.parametrize("bits", [np.random.PCG64, np.random.Philox, np.random.MT19937, np.random.SFC64])
def test_every_generator_goes_on_where_it_was(tmp_path: Path, bits: type) -> None:
    generators = {"noise": np.random.Generator(bits(3))}
    generators["noise"].standard_normal(5)
    path = CheckpointStore(tmp_path).save(1, {"rng": rng_state(generators)})
    expected = torch.rand(4), generators["noise"].integers(1 << 60, size=4)
    generators = {"noise": np.random.Generator(bits(0))}
    set_rng_state(CheckpointStore(tmp_path).load(path)["rng"], generators)
    assert torch.equal(torch.rand(4), expected[0])
    assert np.array_equal(generators["noise"].integers(1 << 60, size=4), expected[1])
    with pytest.raises(ValueError, match=r"holds the NumPy generators \['noise'\], the run has \[\]"):
        set_rng_state(CheckpointStore(tmp_path).load(path)["rng"], {})
