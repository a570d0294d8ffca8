"""Tables and folders of pairs: what is read, what is refused at once, and what is wrong with one row only."""

import gzip
import json
import os
import pickle
import sys
from pathlib import Path

import pytest

from florence_fast.data.images import open_image
from florence_fast.data.pairs import Concat, PairText, Subset, open_pairs
from tests.data.conftest import encode, sample, write_tar


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two images."""
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


def test_images_may_be_relative_to_the_working_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
        ("t.csv", b",pear", "no path of an image"),
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
        ("t.jsonl", b"[" * 100_000, "JSON nested more than 100 deep"),
        ("t.jsonl", b'{"image": "a.png", "text": "cut \\ud83d"}', "the text holds half a character"),
        ("t.jsonl", b'{"image": "caf\\udce9.png", "text": "x"}', "the path of an image holds half a character"),
        ("t.jsonl", b'{"image": "a.png", "text": "x", "keywords": ["\\ud83d"]}', "the keyword holds half a character"),
        ("t.jsonl", b'{"image": "a.png", "text": "x", "short_name": "\\ud83d"}', "the short name holds half a char"),
        ("t.jsonl", b'{"image": "a.png", "text": "%s"}' % (b"x" * 10_001), "the text has 10,001 characters"),
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


QUOTED = [
    # (what stands in the table after the header, the texts read, line numbers, rows whose quote marks are signs)
    ('a.png,"one\ntwo, 3\nthree"\nb.png,pear\n', ["one\ntwo, 3\nthree", "pear"], [2, 5], 0),
    ('a.png,"say ""hi"", all"\n"b.png","pear"\n', ['say "hi", all', "pear"], [2, 3], 0),
    ('a.png,"open\nb.png,pear\na.png,plum\n', ['"open', "pear", "plum"], [2, 3, 4], 1),
    ('a.png,"open\nb.png,"red, pear"\na.png,plum\n', ['"open', "red, pear", "plum"], [2, 3, 4], 1),
    ('a.png,"open\nb.png,closing"\n', ['"open', 'closing"'], [2, 3], 1),
    ('a.png,"open\nb.png,"open too\na.png,plum\n', ['"open', '"open too', "plum"], [2, 3, 4], 2),
    ('a.png,"hi" he said\nb.png,a 5" nail\n', ['"hi" he said', 'a 5" nail'], [2, 3], 1),
    ('a.png,pear\nb.png,"open at the end\n', ["pear", '"open at the end'], [2, 3], 1),
    ('a.png,"' + "x\n" * 200 + '"\nb.png,pear\n', ['"x', "pear"], [2, 203], 2),
]


@pytest.mark.parametrize(("rows", "texts", "lines", "stray"), QUOTED)
@pytest.mark.parametrize(("name", "separator"), [("t.csv", ","), ("t.tsv", "\t"), ("t.csv", ";")])
def test_a_quote_mark_costs_no_other_row(
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    rows: str,
    texts: list[str],
    lines: list[int],
    stray: int,
    name: str,
    separator: str,
) -> None:
    (folder / name).write_text(("filepath,title\n" + rows).replace(",", separator))
    source = open_pairs(folder / name)
    pairs = [row for row in source.rows if not row.fault]
    assert [row.text.text for row in pairs] == [text.replace(",", separator) for text in texts]
    assert [row.number for row in pairs] == lines
    assert (f"{stray} rows hold a quote mark" in caplog.text) == (stray > 0)


@pytest.mark.parametrize(
    ("rows", "texts"),
    [
        ('"one\ntwo, 3\nthree",a.png\npear,b.png\n', ["one\ntwo, 3\nthree", "pear"]),
        ('"open,a.png\npear,b.png\n', ['"open', "pear"]),
        ('"open\npear,b.png\nplum,a.png\n', [None, "pear", "plum"]),
        ('"open,a.png\n5 feet 2",b.png\n', ['"open', '5 feet 2"']),
    ],
)
def test_a_quote_mark_before_the_image_costs_no_other_row(folder: Path, rows: str, texts: list[str | None]) -> None:
    (folder / "t.csv").write_text("title,filepath\n" + rows)
    source = open_pairs(folder / "t.csv")
    assert [row.text.text if row.text else None for row in source.rows] == texts


def test_rows_without_known_suffixes_are_known_by_their_fields(folder: Path) -> None:
    (folder / "t.csv").write_text('filepath,title\na,apple\nb,"open\nc,pear\nd,"two\nlines"\n')
    assert [row.text.text for row in open_pairs(folder / "t.csv").rows] == ["apple", '"open', "pear", "two\nlines"]


@pytest.mark.parametrize("separator", ["\t", "\\t", "tab", "TAB"])
def test_a_tab_may_be_typed_in_several_ways(folder: Path, separator: str) -> None:
    (folder / "t.csv").write_text("filepath\ttitle\na.png\tred, apple\n")
    assert open_pairs(folder / "t.csv", separator=separator).texts(0).text == "red, apple"


@pytest.mark.parametrize("separator", [", ", "", '"', "\n", "tabs", 3])
def test_what_cannot_separate_is_refused(folder: Path, separator: object) -> None:
    (folder / "t.csv").write_text("filepath,title\na.png,x\n")
    with pytest.raises(ValueError, match="separator must be one character, or one of tab, "):
        open_pairs(folder / "t.csv", separator=separator)


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("t.csv", ["filepath;title", "a.png;red, apple"]),
        ("t.tsv", ["filepath,title", 'a.png,"red, apple"']),
        ("t.csv", ["n|title|filepath", "1|red, apple|a.png"]),
        ("t.csv", ["n,m;title;filepath", "1,2;red, apple;a.png"]),
        ("t.csv", ["sep=;", "filepath;title", "a.png;red, apple"]),
        ("t.csv", ['\ufeff"SEP=;"\r', "filepath;title\r", "a.png;red, apple\r"]),
    ],
)
def test_the_header_shows_the_separator(folder: Path, name: str, lines: list[str]) -> None:
    (folder / name).write_text("\n".join(lines))
    source = open_pairs(folder / name)
    assert source.texts(0).text == "red, apple" and source.image(0).size == (8, 8)


def test_lines_are_counted_with_the_one_that_names_the_separator(folder: Path) -> None:
    (folder / "t.csv").write_text("sep=;\nfilepath;title\na.png;red, apple\n")
    assert open_pairs(folder / "t.csv").describe(0).endswith("t.csv:3 (a.png)")


def test_a_table_with_other_columns_says_how_to_name_them(folder: Path) -> None:
    (folder / "t.csv").write_text("Datei;title\na.png;red, apple\n")
    with pytest.raises(ValueError, match=r"no column 'filepath'.*Datei, title; name one with img_key \(--csv-img-key"):
        open_pairs(folder / "t.csv")


def test_byte_order_marks_are_no_part_of_a_table(folder: Path) -> None:
    mark = "\ufeff"
    (folder / "t.csv").write_text(f"{mark}{mark}filepath,title\n{mark}a.png,{mark}apple{mark}\n", encoding="utf-8")
    (folder / "t.jsonl").write_text(
        f'{mark}{{"image": "a.png", "text": "{mark}apple"}}\n{mark}{{"image": "b.png", "text": "pear"}}\n',
        encoding="utf-8",
    )
    assert open_pairs(folder / "t.csv").texts(0).text == "apple"
    assert open_pairs(folder / "t.csv").image(0).size == (8, 8)
    assert [open_pairs(folder / "t.jsonl").texts(i).text for i in range(2)] == ["apple", "pear"]


def test_rows_that_are_no_pairs_are_counted(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "t\x1b[2J.csv").write_text("filepath,title\na.png,apple\na.png,\n,pear\nb.png,plum\n")
    source = open_pairs(folder / "t\x1b[2J.csv")
    assert "2 of 4 rows are no image-text pairs, the first is in line 3: it has no text" in caplog.text
    assert "\x1b" not in caplog.text + source.describe(0)


def test_parquet_needs_an_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (folder / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(ImportError, match=r"'pyarrow' is needed .* extra 'parquet'"):
        open_pairs(folder / "t.parquet")


def test_parquet(folder: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = {"path": ["a.png", None, "b.png"], "caption": ["apple", "x", "pear"], "keywords": [["red"], [], None]}
    table = pyarrow.table(rows)
    parquet.write_table(table, folder / "t.parquet")
    source = open_pairs(folder / "t.parquet", img_key="path", caption_key="caption")
    assert source.texts(0) == PairText("apple", None, ["red"]) and source.texts(2) == PairText("pear")
    assert source.image(2).getpixel((0, 0)) == (2, 2, 2)
    with pytest.raises(ValueError, match="it has no path of an image"):
        source.texts(1)
    with pytest.raises(ValueError, match=r"no column 'filepath' .*; it holds: path, caption, keywords"):
        open_pairs(folder / "t.parquet")
    parquet.write_table(pyarrow.table({"image": [[1]], "text": ["x"]}), folder / "list.parquet")
    with pytest.raises(ValueError, match=r"column 'image' of .* must hold paths of images, their bytes, .* got list"):
        open_pairs(folder / "list.parquet")
    (folder / "cut.parquet").write_bytes((folder / "t.parquet").read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"cut\.parquet is not a readable Parquet file"):
        open_pairs(folder / "cut.parquet")


@pytest.mark.parametrize("kind", ["bytes", "structs"])
def test_images_inside_parquet(folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In groups of two rows, read in any order; a row without bytes is a path, as in Hugging Face's data sets."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    a, b = (folder / "a.png").read_bytes(), (folder / "b.png").read_bytes()
    images: list = [a, b, b"no image", b, None]
    if kind == "structs":
        images = [{"bytes": data, "path": f"{n}.png"} for n, data in enumerate(images[:4])]
        images.append({"bytes": None, "path": "a.png"})
    table = pyarrow.table({"image": images, "text": list("vwxyz")})
    parquet.write_table(table, folder / "inside.parquet", row_group_size=2)
    source = pickle.loads(pickle.dumps(open_pairs(folder / "inside.parquet")))
    expected = {index: open_image(data).getpixel((0, 0)) for index, data in ((3, b), (0, a), (1, b))}
    assert {index: source.image(index).getpixel((0, 0)) for index in expected} == expected
    assert [source.texts(index).text for index in range(5)] == list("vwxyz")
    with pytest.raises(ValueError, match="cannot read"):
        source.image(2)
    if kind == "structs":
        assert source.image(4).getpixel((0, 0)) == expected[0] and source.describe(1).endswith("(1.png)")
    else:
        with pytest.raises(ValueError, match="it has no image"):
            source.image(4)
    monkeypatch.setattr("florence_fast.data.parquet.MAX_GROUP_BYTES", 10)
    with pytest.raises(ValueError, match="row_group_size=100"):
        source.image(0)
    (folder / "inside.parquet").unlink()
    with pytest.raises(ValueError, match="not a readable Parquet file"):
        source.image(0)


def test_globs_are_sorted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (2, 10, 1):
        (folder / f"part-{number:02}.csv").write_text(f"filepath,title\na.png,text {number}\n")
        write_tar(folder / f"{number:02}.tar", sample("x", f"text {number}"))
    (folder / "[1].csv").write_text("filepath,title\na.png,brackets\n")
    monkeypatch.chdir(folder)
    for spec in ("part-*.csv", "??.tar", "part-{01,02}*.csv::part-1?.csv"):
        source = open_pairs(spec)
        assert [source.texts(i).text for i in range(len(source))] == ["text 1", "text 2", "text 10"]
    assert open_pairs(folder / "[1].csv").texts(0).text == "brackets"
    with pytest.raises(FileNotFoundError, match=r"no file matches '.*none-\*\.csv'"):
        open_pairs(f"{folder}/none-*.csv")


def test_pipes_are_refused(folder: Path) -> None:
    os.mkfifo(folder / "t.csv")
    with pytest.raises(ValueError, match=r"t\.csv is neither a file nor a folder but a pipe"):
        open_pairs(folder / "t.csv")


def test_a_table_that_is_none_is_refused(folder: Path) -> None:
    (folder / "t.csv").write_text("filepath,title\na.png,apple\n", encoding="utf-16")
    with pytest.raises(ValueError, match=r"t\.csv is UTF-16: save it as UTF-8"):
        open_pairs(folder / "t.csv")
    (folder / "t.csv").write_bytes("filepath,title\na.png,apple\n".encode("utf-16-le"))
    with pytest.raises(ValueError, match=r"t\.csv begins with null characters, as UTF-16"):
        open_pairs(folder / "t.csv")
    (folder / "t.csv").write_bytes(gzip.compress(b"filepath,title\na.png,apple\n"))
    with pytest.raises(ValueError, match=r"t\.csv is gzipped"):
        open_pairs(folder / "t.csv")
    with open(folder / "t.csv", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match=r"t\.csv has a line of more than"):
        open_pairs(folder / "t.csv")


def test_a_missing_image_shows_when_it_is_read(folder: Path) -> None:
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


def test_what_lies_beside_shards_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tar(tmp_path / "a.tar", sample("x", "text"))
    (tmp_path / "b.csv").write_text("filepath,title\n")
    (tmp_path / "c").mkdir()
    assert len(open_pairs(os.fsencode(tmp_path))) == 1
    assert "read as 1 shards; 2 other files and folders in it are left out (b.csv, ...)" in caplog.text


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
        ({"notes.md": b"x"}, ".", ValueError, "holds no image"),
        ({"a.png": b"x", "b.png": b"x"}, ".", ValueError, "none of the 2 images in .* has a text: wanted NAME.txt"),
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
