"""Files are whole or as before, with the umask's mode, and a full disk is named as such whoever was writing."""

import errno
import os
import resource
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from florence_fast.files import remove_leftovers, replacing, write_text
from florence_fast.train.checkpoint import CheckpointStore

TENSORS = {"weight": torch.zeros(1_000_000)}


def _plain(path: Path) -> None:
    path.write_bytes(bytes(4_000_000))


def _torch(path: Path) -> None:
    with open(path, "wb") as file:
        torch.save(TENSORS, file)


def _safetensors(path: Path) -> None:
    save_file(TENSORS, path)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let writing beyond ``size`` bytes fail, as on a full disk; Python ignores the signal that comes with it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("write", [_plain, _torch, _safetensors])
def test_no_space_is_the_systems_error_and_names_the_file(tmp_path: Path, write: Callable[[Path], None]) -> None:
    path = tmp_path / "model.bin"
    write_text(path, "before")
    with largest_file(1_000_000), pytest.raises(OSError, match="File too large") as caught, replacing(path) as beside:
        write(beside)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(path))
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["model.bin"]


def test_no_space_for_a_checkpoint_names_it_and_keeps_the_earlier_one(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, {"step": 1})
    with largest_file(1_000_000), pytest.raises(OSError, match=r"File too large: '.*step_2\.pt'"):
        store.save(2, dict(TENSORS))
    assert store.latest_valid() == store.path(1)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_1.pt", "step_1.pt.sha256"]


def test_an_error_that_was_being_handled_before_is_not_taken_for_the_writers(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="state"):
        try:
            raise OSError(errno.EPIPE, "of something else")
        except OSError:
            with replacing(tmp_path / "file"):
                raise KeyError("state")  # noqa: B904 - the context is what this test is about


def test_an_error_about_another_file_keeps_its_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="'absent'"), replacing(tmp_path / "file"):
        Path("absent").read_text()


@pytest.mark.parametrize("write", [_plain, _torch, _safetensors])
def test_the_mode_is_that_of_any_new_file(tmp_path: Path, write: Callable[[Path], None]) -> None:
    earlier = os.umask(0o027)
    try:
        with replacing(tmp_path / "file") as beside:
            write(beside)
    finally:
        os.umask(earlier)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_the_place_to_write_to_is_new_and_private_and_has_the_files_name(tmp_path: Path) -> None:
    places = set()
    for _ in range(3):
        with replacing(tmp_path / "file.png") as beside:
            assert beside.name == "file.png"
            assert not beside.exists()
            assert stat.S_IMODE(beside.parent.stat().st_mode) == 0o700
            places.add(beside)
            beside.write_bytes(b"")
    assert len(places) == 3


def test_leftovers_of_every_writer_are_removed_and_nothing_else(tmp_path: Path) -> None:
    kept = tmp_path / "elsewhere"
    kept.mkdir()
    (kept / "file").write_text("kept")
    (tmp_path / "step_1.pt.abc.tmp").mkdir()
    (tmp_path / "step_1.pt.abc.tmp" / "step_1.pt").write_text("half")
    (tmp_path / "step_1.pt.123.tmp").write_text("half")
    (tmp_path / ".tmpBeAFLK").write_text("what a killed save_file leaves")
    (tmp_path / "link.tmp").symlink_to(kept)
    assert len(remove_leftovers(tmp_path)) == 4
    assert os.listdir(tmp_path) == ["elsewhere"]
    assert (kept / "file").read_text() == "kept"


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match=r"not a file that can be replaced: '.*fifo'"):
        write_text(tmp_path / "fifo", "text")
    with pytest.raises(IsADirectoryError, match=tmp_path.name):
        write_text(tmp_path, "text")
    with pytest.raises(FileNotFoundError, match="absent/file"), replacing(tmp_path / "absent" / "file"):
        pass
