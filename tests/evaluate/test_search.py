"""Search in a folder: what counts as an image, the order of the hits, broken files, the page."""

import pytest
import torch
from PIL import Image

from florence_fast.evaluate import ImageFolder, ImageIndex, index_images, search
from florence_fast.evaluate.contact_sheet import contact_sheet
from tests.evaluate.stand_ins import COLOURS, ColourModel, tokenizer, transform


@pytest.fixture
def folder(tmp_path):
    for name, colour in {"b": "blue", "deep/r": "red", "deep/er/g": "green"}.items():
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (300, 100), COLOURS[colour]).save(path)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".thumbnails").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / ".thumbnails/t.png")
    return tmp_path


def test_a_folder_holds_the_images_below_it_and_no_hidden_ones(folder):
    names = [str(path.relative_to(folder)) for path in ImageFolder(folder).paths]
    assert names == ["b.png", "deep/er/g.png", "deep/r.png"]


def test_the_best_image_comes_first(folder):
    index = index_images(ColourModel(), folder, transform=transform)
    hits = search(ColourModel(), tokenizer, index, "something yellow", top=2)
    # Yellow is as near to red as to green, and blue is far: ties are in the order of the paths.
    assert [hit.path.name for hit in hits] == ["g.png", "r.png"]
    assert hits[0].score == pytest.approx(0.5**0.5)


def test_a_broken_image_does_not_move_the_others(folder, caplog):
    (folder / "a.png").write_bytes(b"no image at all")
    index = index_images(ColourModel(), folder, transform=transform)
    assert search(ColourModel(), tokenizer, index, "blue", top=1)[0].path == folder / "b.png"
    assert "a.png" in caplog.text


def test_files_of_other_kinds_are_counted(folder, caplog, tmp_path_factory):
    others = tmp_path_factory.mktemp("others")
    for name in ("a.heic", "b.HEIC"):
        (folder / name).touch()
        (others / name).touch()
    ImageFolder(folder)
    assert "left out: 2 of kind .heic (a.heic, ...)" in caplog.text
    with pytest.raises(ValueError, match=r"no images .*; it holds 2 of kind \.heic"):
        ImageFolder(others)


def test_folders_that_cannot_be_searched_are_refused(folder, tmp_path_factory):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        ImageFolder(folder / "nowhere")
    with pytest.raises(NotADirectoryError, match=r"got a file: .*b\.png"):
        ImageFolder(folder / "b.png")
    with pytest.raises(ValueError, match="no images"):
        ImageFolder(tmp_path_factory.mktemp("empty"))


def test_more_hits_than_images_gives_all_images(folder):
    index = ImageIndex([folder / "b.png"], torch.tensor([[0.0, 0, 1]]))
    assert len(index.search(torch.tensor([0.0, 0, 1]), top=5)) == 1


def test_the_page_holds_its_images_and_escapes_every_word(folder):
    (folder / "b.png").rename(folder / '"<i>.png')
    index = index_images(ColourModel(), folder, transform=transform)
    page = contact_sheet("<script>", search(ColourModel(), tokenizer, index, "red"), folder)
    assert page.count('src="data:image/webp;base64,') == 3
    assert "<script>" not in page and "<i>" not in page and "&quot;&lt;i&gt;.png" in page
    assert "deep/r.png" in page and str(folder) not in page
