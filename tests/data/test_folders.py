"""Folders of classes: links, capitals, names that are no classes, and what is left out."""

import logging
import os
from pathlib import Path

import pytest

from florence_fast.data.folder_walk import files_below
from florence_fast.data.left_out import LeftOut
from florence_fast.data.pairs import open_pairs
from tests.data.conftest import encode


def fill(folder: Path, *names: str) -> Path:
    """Put images, or texts that say their own name, into a folder."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"text of " + os.fsencode(name) if name.lower().endswith(".txt") else encode((1, 2, 3)))
    return folder


def texts(folder: Path) -> list[str]:
    source = open_pairs(folder)
    return [source.texts(index).text for index in range(len(source))]


def test_class_folders_may_be_links(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path, "f/cats/a.png", "elsewhere/b.png", "elsewhere/deep/c.png")
    (tmp_path / "f/dogs").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "f/cats/d.png").symlink_to(tmp_path / "elsewhere/b.png")
    assert texts(tmp_path / "f") == ["cats", "cats", "dogs", "dogs"]
    assert not caplog.records


def test_loops_of_links_end_and_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path, "f/cats/a.png", "f/dogs/b.png", "outside/c.png")
    (tmp_path / "f/cats/up").symlink_to(tmp_path / "f")
    (tmp_path / "f/root").symlink_to("/")
    (tmp_path / "f/cats/dogs").symlink_to(tmp_path / "f/dogs")
    (tmp_path / "f/dogs/cats").symlink_to(tmp_path / "f/cats")
    (tmp_path / "f/self").symlink_to(tmp_path / "f/self")
    (tmp_path / "f/gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "f/owls").symlink_to(tmp_path / "outside")
    (tmp_path / "outside/back").symlink_to(tmp_path / "f/dogs")
    assert texts(tmp_path / "f") == ["cats", "dogs", "owls"]
    assert "3 links to folders that are read already" in caplog.text
    assert "2 links to a folder around them" in caplog.text
    assert "2 broken links, pipes or devices" in caplog.text


def test_folders_that_link_to_each_other_are_read_once(tmp_path: Path) -> None:
    names = [f"class {n}" for n in range(12)]
    fill(tmp_path, *(f"{name}/a.png" for name in names))
    for name in names:
        for other in names:
            if other != name:
                (tmp_path / name / f"to {other}").symlink_to(tmp_path / other)
    left_out = LeftOut()
    assert files_below(tmp_path, left_out) == sorted(tmp_path / name / "a.png" for name in names)
    assert str(left_out).startswith("132 links to folders that are read already")


def test_the_order_is_that_of_the_paths(tmp_path: Path) -> None:
    fill(tmp_path, "b/1.png", "a-b/2.png", "a/3.png", "a/b/4.png", "5.png")
    assert files_below(tmp_path, LeftOut()) == sorted(path for path in tmp_path.rglob("*.png"))


def test_capitals_are_seen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path, "A.JPG", "A.TXT", "B.Png", "B.txt", "B.TXT", "c/D.PNG")
    assert texts(tmp_path) == ["text of A.TXT", "text of B.txt", "c"]


def test_byte_order_marks_are_no_part_of_a_caption(tmp_path: Path) -> None:
    fill(tmp_path, "a.png", "b.png", "\ufeffc/1.png")
    (tmp_path / "a.txt").write_text("\ufeffred apple\r\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("pear", encoding="utf-16")
    source = open_pairs(tmp_path)
    assert (source.texts(0).text, source.texts(2).text) == ("red apple", "c")
    with pytest.raises(ValueError, match=r"b\.txt is not UTF-8: .*UTF-16: save it as UTF-8"):
        source.texts(1)


def test_what_is_left_out_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path, "c/a.png", "c/b.heic", "c/d.HEIC", "c/notes", "c/alone.txt", ".hidden/x.heic", "c/.y.heic")
    os.mkfifo(tmp_path / "c/pipe.png")
    assert texts(tmp_path) == ["c"]
    (record,) = [record for record in caplog.records if "left out" in record.message]
    for part in ("2 of kind .heic (b.heic, ...)", "1 without a suffix (notes)", "1 texts without an image"):
        assert part in record.message
    assert "1 broken links, pipes or devices (c/pipe.png)" in record.message


def test_what_was_understood_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path, "red_apple/a.png", "pear/b.png", "pear/b.txt", "plum/c.png")
    with caplog.at_level(logging.INFO):
        open_pairs(tmp_path)
    assert "3 images, 1 with a text of their own, the others of 2 classes" in caplog.text
    assert ": plum, red apple" in caplog.text


def test_one_class_for_all_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path, "images/cat/a.png", "images/dog/b.png")
    assert texts(tmp_path) == ["images", "images"]
    assert "the others of 1 classes by the names of their folders: images" in caplog.text


@pytest.mark.parametrize(
    ("names", "suggested"),
    [
        (("train", "val"), "train"),
        (("Train", "TEST", "valid"), "Train"),
        (("train",), "train"),
        (("train2017", "val2017", "annotations"), "train2017"),
        (("test_images",), "test_images"),
    ],
)
def test_parts_of_a_data_set_are_no_classes(tmp_path: Path, names: tuple[str, ...], suggested: str) -> None:
    fill(tmp_path, *(f"{name}/cat/a.png" for name in names))
    with pytest.raises(ValueError, match=rf"holds parts of a data set in place of .*give one of them: .*/{suggested}$"):
        open_pairs(tmp_path)


def test_trains_are_a_class_and_captions_are_no_classes(tmp_path: Path) -> None:
    assert texts(fill(tmp_path / "1", "train/a.png", "bus/b.png")) == ["bus", "train"]
    assert texts(fill(tmp_path / "2", "train/a.png", "train/a.txt", "val/b.png", "val/b.txt")) == [
        "text of train/a.txt",
        "text of val/b.txt",
    ]


def test_wordnet_ids_have_imagenets_names(tmp_path: Path) -> None:
    fill(tmp_path, "n01440764/a.JPEG", "n15075141/b.JPEG", "n02099601/c.JPEG", "other/d.JPEG")
    assert texts(tmp_path) == ["tench", "Golden Retriever", "toilet paper", "other"]
    fill(tmp_path, "n00000001/a.JPEG")
    with pytest.raises(ValueError, match=r"1 of the 5 class folders in .* are WordNet ids that are none of ImageNet's"):
        open_pairs(tmp_path)


def test_a_class_that_is_not_utf_8_costs_its_own_pairs(tmp_path: Path) -> None:
    fill(tmp_path, "cat/a.png", os.fsdecode(b"th\xe9/b.png"), "cat/\x1b[2J.png")
    source = open_pairs(tmp_path)
    assert source.texts(0).text == source.texts(1).text == "cat"
    with pytest.raises(ValueError, match=r"half a character \(a lone surrogate\): th\\xe9"):
        source.texts(2)
    assert source.describe(0).endswith(r"cat/\x1b[2J.png") and source.describe(2).endswith(r"th\xe9/b.png")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open every folder")
def test_folders_that_cannot_be_opened_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path, "c/a.png", "locked/b.png")
    (tmp_path / "locked").chmod(0)
    assert texts(tmp_path) == ["c"]
    (tmp_path / "locked").chmod(0o700)
    assert "1 folders that cannot be opened (locked)" in caplog.text
