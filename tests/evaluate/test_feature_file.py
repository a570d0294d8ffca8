"""Features kept in a file: only new and changed images are encoded, and what is no index is not overwritten."""

import json
import os
from contextlib import nullcontext

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from florence_fast.cli import main
from florence_fast.evaluate import Hit, index_images, search
from florence_fast.evaluate.search import Hits
from florence_fast.models import Florence, create_model, get_tokenizer


@pytest.fixture
def model():
    torch.manual_seed(0)
    return create_model("florence_nano", img_size=16).eval()


@pytest.fixture
def folder(tmp_path):
    for name, colour in {"red": "red", "blue": "blue", "caf\udce9": "green"}.items():
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("RGB", (20, 20), colour).save(tmp_path / "images" / f"{name}.png")
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    return tmp_path / "images"


@pytest.fixture
def encoded(monkeypatch):
    """How many images each forward pass takes."""
    sizes, encode = [], Florence.encode_image

    def counted(self, image, normalize=False):
        sizes.append(len(image))
        return encode(self, image, normalize)

    monkeypatch.setattr(Florence, "encode_image", counted)
    return sizes


def test_a_second_search_encodes_only_what_is_new_or_has_changed(model, folder, encoded, tmp_path):
    file = tmp_path / "index" / "features.safetensors"
    plain = index_images(model, folder)
    first = index_images(model, folder, file=file)
    assert first.paths == plain.paths and torch.equal(first.features, plain.features)
    assert encoded == [3, 3] and [path.name for path in file.parent.iterdir()] == [file.name]
    written = file.stat().st_mtime_ns
    again = index_images(model, folder, file=file)
    assert encoded == [3, 3] and file.stat().st_mtime_ns == written
    assert again.paths == plain.paths and torch.equal(again.features, plain.features)
    Image.new("RGB", (20, 20), "yellow").save(folder / "new.png")
    Image.new("RGB", (20, 20), "black").save(folder / "red.png")
    os.utime(folder / "red.png", ns=(1, 1))
    (folder / "blue.png").unlink()
    changed = index_images(model, folder, file=file)
    expected = index_images(model, folder)
    assert encoded == [3, 3, 2, 3]
    assert changed.paths == expected.paths and torch.allclose(changed.features, expected.features, atol=1e-6)


def test_features_of_another_model_are_computed_anew(model, folder, encoded, tmp_path):
    file = tmp_path / "features"
    index_images(model, folder, file=file)
    with torch.no_grad():
        model.logit_scale += 1
    index_images(model, folder, file=file)
    assert encoded == [3, 3]


@pytest.mark.parametrize("spoil", ["text", "cut", "other", "list"])
def test_a_file_that_is_no_index_is_refused_and_kept(spoil, model, folder, tmp_path):
    file = tmp_path / "features"
    index_images(model, folder, file=file)
    if spoil in ("text", "cut"):
        file.write_bytes(b"my notes" if spoil == "text" else file.read_bytes()[:-40])
    else:
        metadata = {"florence_fast_image_index": '{"key": 3, "images": [["a", "b", 3]]}'} if spoil == "list" else None
        save_file({"features": torch.zeros(1, 2)}, file, metadata=metadata)
    before = file.read_bytes()
    with _expected(spoil):
        index_images(model, folder, file=file)
    assert spoil == "list" or file.read_bytes() == before
    with pytest.raises(ValueError, match="leave out transform or file"):
        index_images(model, folder, file=file, transform=lambda image: image)


def _expected(spoil):
    """A list under another model's key is not looked at: it is replaced."""
    return nullcontext() if spoil == "list" else pytest.raises(ValueError, match="is no index of images")


def test_a_notebook_shows_the_hits(model, folder):
    hits = search(model, get_tokenizer("florence_nano"), index_images(model, folder), "<b>red</b>", top=2)
    assert isinstance(hits, Hits) and hits == list(hits) and len(hits) == 2
    page = hits._repr_html_()
    assert page.count("data:image/webp;base64,") == 2 and "&lt;b&gt;red" in page
    assert 'src="data:,"' in Hits([Hit(folder / "gone.png", 0.5)])._repr_html_()


def test_the_command_takes_several_queries_and_an_index(folder, tmp_path, capsys, encoded):
    out, index = tmp_path / "found", tmp_path / "index"
    args = ["search", "--images", str(folder), "--out", str(out), "--index", str(index), "--device", "cpu"]
    args += ["--query", "red", "--query", "blue", "--top", "2"]
    assert main(args) == main(args) == 0
    assert encoded == [3]
    searches = json.loads((out / "results.json").read_text())["searches"]
    assert [found["query"] for found in searches] == ["red", "blue"]
    assert all(len(found["hits"]) == 2 for found in searches)
    page = (out / "contact_sheet.html").read_text()
    assert page.count("<h1>") == 2 and page.count("data:image/webp") == 4
