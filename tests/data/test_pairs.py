"""Tables and folders of pairs: what is read, what is refused at once, and what is wrong with one row only."""

import json
import pickle
from pathlib import Path

import pytest

from florence_fast.data.pairs import Concat, PairText, Subset, open_pairs
from tests.data.conftest import encode, sample, write_tar


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two pictures."""
    (tmp_path / "a.png").write_bytes(encode((1, 1, 1)))
    (tmp_path / "b.png").write_bytes(encode((2, 2, 2)))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "content", "keys"),
    [
        ("t.csv", 'title,filepath,n\n"red, apple",a.png,1\npear,b.png,2\n', {}),
        ("t.csv", "filepath\ttitle\na.png\tred, apple\nb.png\tpear\n", {}),
        ("t.tsv", "filepath\ttitle\na.png\tred, apple\n\nb.png\tpear\n", {}),
        ("t.csv", "\ufeffimage,text\na.png,'red, apple'\nb.png,pear\n".replace("'", '"'), {}),
        ("t.csv", "pic;words\na.png;red, apple\nb.png;pear\n", dict(img_key="pic", caption_key="words", separator=";")),
        ("t.jsonl", '{"image": "a.png", "text": "red, apple"}\n\n{"image": "b.png", "text": "pear"}\n', {}),
        (
            "t.jsonl",
            '{"p": "a.png", "c": "red, apple"}\n{"p": "b.png", "c": "pear"}',
            dict(img_key="p", caption_key="c"),
        ),
    ],
    ids=["comma", "tab-in-csv", "tsv-blank-line", "bom-and-other-names", "own-names", "jsonl", "jsonl-own-names"],
)
def test_tables(folder: Path, name: str, content: str, keys: dict[str, str]) -> None:
    (folder / name).write_text(content, encoding="utf-8")
    source = open_pairs(folder / name, **keys)
    assert [source.texts(i) for i in range(len(source))] == [PairText("red, apple"), PairText("pear")]
    assert [source.image(i).getpixel((0, 0)) for i in range(2)] == [(1, 1, 1), (2, 2, 2)]
    assert source.describe(1).startswith(f"{folder / name}:") and "b.png" in source.describe(1)


def test_pictures_may_be_relative_to_the_working_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "tables").mkdir()
    (folder / "tables" / "t.csv").write_text("filepath,title\na.png,apple\n")
    monkeypatch.chdir(folder)
    assert open_pairs("tables/t.csv").image(0).getpixel((0, 0)) == (1, 1, 1)


def test_jsonl_has_short_names_and_keywords(folder: Path) -> None:
    record = {"image": "a.png", "text": "apple", "short_name": "fruit", "keywords": ["red", "round"]}
    (folder / "t.jsonl").write_text(json.dumps(record))
    assert open_pairs(folder / "t.jsonl").texts(0) == PairText("apple", "fruit", ["red", "round"])


@pytest.mark.parametrize(
    ("name", "row", "fault"),
    [
        ("t.csv", b"a.png", "1 fields where the header has 2"),
        ("t.csv", b"a.png,x,y", "3 fields where the header has 2"),
        ("t.csv", b",pear", "no path of a picture"),
        ("t.csv", b"a.png, ", "no text"),
        ("t.csv", b"a.png,p\xe9ar", "the text is not UTF-8"),
        ("t.csv", b"a.png," + b"x" * 140_000, "field larger than field limit"),
        ("t.jsonl", b"{oops", "not JSON"),
        ("t.jsonl", b"[1]", "not a JSON object but list"),
        ("t.jsonl", b'{"image": "a.png"}', "no text"),
        ("t.jsonl", b'{"image": "a.png", "text": 3}', "no text"),
        ("t.jsonl", b'{"image": "a.png", "text": "x", "keywords": "y"}', "keywords must be a list of strings"),
        ("t.jsonl", b'{"image": "a.png", "text": "x", "keywords": [1]}', "keywords must be a list of strings"),
        ("t.jsonl", b'{"image": "a.png", "text": "x", "short_name": 1}', "short_name must be a string"),
    ],
)
def test_a_bad_row_spoils_itself_only(folder: Path, name: str, row: bytes, fault: str) -> None:
    good = [b'{"image": "a.png", "text": "apple"}', b'{"image": "b.png", "text": "pear"}']
    lines = good if name == "t.jsonl" else [b"filepath,title", b"a.png,apple", b"b.png,pear"]
    (folder / name).write_bytes(b"\n".join([*lines[:-1], row, lines[-1]]))
    source = open_pairs(folder / name)
    assert [source.texts(i).text for i in (0, 2)] == ["apple", "pear"]
    assert source.describe(1).startswith(f"{folder / name}:{len(lines)}")
    for read in (source.texts, source.image):
        with pytest.raises(ValueError, match=fault):
            read(1)


def test_a_missing_picture_shows_when_it_is_read(folder: Path) -> None:
    (folder / "t.csv").write_text("filepath,title\nnone.png,apple\n")
    source = open_pairs(folder / "t.csv")
    assert source.texts(0).text == "apple"
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        source.image(0)


def test_a_folder_of_classes_and_captions(tmp_path: Path) -> None:
    for name in ("red_apple/1.png", "red_apple/more/2.JPG", "plum-tree/3.png", "4.png", ".hidden/5.png", "6.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(encode((1, 2, 3)))
    (tmp_path / "4.txt").write_text(" a pear on a table\n")
    (tmp_path / "red_apple" / "1.txt").write_text("one apple")
    source = open_pairs(tmp_path)
    texts = {Path(source.describe(i)).name: i for i in range(len(source))}
    assert sorted(texts) == ["1.png", "2.JPG", "3.png", "4.png", "6.png"]
    read = {name: source.texts(i).text for name, i in texts.items() if name != "6.png"}
    assert read == {"1.png": "one apple", "2.JPG": "red apple", "3.png": "plum tree", "4.png": "a pear on a table"}
    with pytest.raises(ValueError, match=r"no 6\.txt beside it"):
        source.texts(texts["6.png"])
    assert source.image(texts["2.JPG"]).size == (8, 8)


def test_a_folder_of_tars_is_read_as_shards(tmp_path: Path) -> None:
    for name in "hgfedcba":
        write_tar(tmp_path / f"{name}.tar", sample(name, f"text {name}"))
    source = open_pairs(tmp_path)
    assert [source.texts(i).text for i in range(len(source))] == [f"text {name}" for name in "abcdefgh"]


def test_several_sources_are_joined_in_order(folder: Path) -> None:
    (folder / "1.csv").write_text("filepath,title\na.png,one\na.png,two\n")
    (folder / "2.csv").write_text("filepath,title\nb.png,three\n")
    write_tar(folder / "3.tar", sample("x", "four", (4, 4, 4)))
    specs = [f"{folder}/{{1,2}}.csv::{folder}/3.tar", [folder / "1.csv", folder / "2.csv", folder / "3.tar"]]
    for source in map(open_pairs, specs):
        assert isinstance(source, Concat)
        assert [source.texts(i).text for i in range(len(source))] == ["one", "two", "three", "four"]
        assert [source.image(i).getpixel((0, 0))[0] for i in range(4)] == [1, 1, 2, 4]
        assert "2.csv:2" in source.describe(2) and "3.tar: x" in source.describe(3)
        chosen = pickle.loads(pickle.dumps(Subset(source, [3, 0])))
        assert [chosen.texts(i).text for i in range(len(chosen))] == ["four", "one"]
        assert chosen.image(0).getpixel((0, 0)) == (4, 4, 4) and "3.tar" in chosen.describe(0)


@pytest.mark.parametrize(
    ("files", "spec", "error", "message"),
    [
        ({"train.csv": b""}, "trian.csv", FileNotFoundError, r"trian\.csv does not exist \(did you mean .*train\.csv"),
        ({}, "{0..3}.csv", FileNotFoundError, r"0\.csv does not exist, nor do 3 more of 4"),
        ({"t.csv": b""}, "t.csv", ValueError, "no column 'filepath'.*holds: nothing"),
        ({"t.csv": b"filepth,title\na,b\n"}, "t.csv", ValueError, r"'filepath' \(did you mean 'filepth'\?\)"),
        ({"t.csv": b"filepath,title\n"}, "t.csv", ValueError, "holds no image-text pair"),
        ({"t.jsonl": b"\n\n"}, "t.jsonl", ValueError, "holds no image-text pair"),
        ({"t.jsonl": b"oops\n{}\n"}, "t.jsonl", ValueError, "none of the 2 rows of .* is an image-text pair"),
        ({"t.xlsx": b"x"}, "t.xlsx", ValueError, "cannot tell how to read .*t.xlsx: wanted a folder, .csv"),
        ({"notes.md": b"x"}, ".", ValueError, "holds no picture"),
        ({"a.png": b"x", "b.png": b"x"}, ".", ValueError, "none of the 2 pictures in .* has a text: wanted NAME.txt"),
    ],
)
def test_what_cannot_be_read_is_refused_at_once(
    tmp_path: Path, files: dict[str, bytes], spec: str, error: type[Exception], message: str
) -> None:
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(error, match=message):
        open_pairs(f"{tmp_path}/{spec}")


@pytest.mark.parametrize(
    "spec", ["https://x.org/{0..9}.tar", "pipe:cat a.tar", "s3://bucket/a.tar", "a.tar::gs://b.tar"]
)
def test_remote_and_piped_shards_are_refused(spec: str) -> None:
    with pytest.raises(ValueError, match=r"only local files are read, got '.*copy them to a local folder first"):
        open_pairs(spec)


def test_no_path_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one file or folder"):
        open_pairs([])
