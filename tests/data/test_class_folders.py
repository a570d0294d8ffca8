"""Class folders: numbers of classes, what is refused, and batches with labels."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from florence_fast.data.class_folders import ClassFolders, LabelLoader


def _write(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (len(name), 0, 0)).save(folder / name)
    return folder


def test_classes_are_the_folders_at_the_top_in_their_order(tmp_path: Path) -> None:
    source = ClassFolders(_write(tmp_path, "b_2/x.png", "a-1/deep/y.png", "a-1/z.PNG", "n99999999/w.png"))
    assert source.classes == ("a-1", "b_2", "n99999999")
    assert [(Path(source.describe(i)).name, source.labels[i]) for i in range(4)] == [
        ("y.png", 0),
        ("z.PNG", 0),
        ("x.png", 1),
        ("w.png", 2),
    ]
    other = ClassFolders(_write(tmp_path / "val", "b_2/x.png"), source.classes)
    assert other.classes == source.classes and other.labels == [1]


def test_what_is_no_class_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"c\.png lies in no class folder"):
        ClassFolders(_write(tmp_path / "one", "a/a.png", "c.png"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no image; known are"):
        ClassFolders(tmp_path / "empty")
    with pytest.raises(ValueError, match="cats is none of the 2 classes"):
        ClassFolders(_write(tmp_path / "two", "cats/a.png"), ["cat", "dog"])


def test_batches_hold_the_labels_of_their_images(tmp_path: Path) -> None:
    source = ClassFolders(_write(tmp_path, *(f"{name}/{i}.png" for name in ("a", "bb", "ccc") for i in range(3))))
    batches = LabelLoader(source, batch_size=9, image_size=4, seed=1).batches(0)
    for batch in (next(batches), next(batches)):
        assert sorted(batch.indices.tolist()) == list(range(9)) and len(batch) == 9
        assert batch.labels.tolist() == [source.labels[i] for i in batch.indices]
        reds = [len(str(Path(source.describe(i)).relative_to(tmp_path))) for i in batch.indices.tolist()]
        assert torch.equal(batch.images[:, 0, 0, 0], torch.tensor(reds, dtype=torch.uint8))
    assert not torch.equal(batch.indices, next(batches).indices)


def test_workers_give_the_same_batches(tmp_path: Path) -> None:
    source = ClassFolders(_write(tmp_path, *(f"{name}/{i}.png" for name in ("a", "bb") for i in range(4))))
    settings = {"batch_size": 3, "image_size": 4, "crop": "random_resized"}
    loaders = [LabelLoader(source, num_workers=n, **settings).batches(5) for n in (0, 1)]
    for _ in range(3):
        here, there = (next(batches) for batches in loaders)
        assert torch.equal(here.images, there.images) and torch.equal(here.labels, there.labels)
    for batches in loaders:
        batches.close()
