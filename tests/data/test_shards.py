"""WebDataset tars read map-style: members, braces, and shards that are cut short, empty or no tars."""

import gzip
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest

from florence_fast.data.pairs import PairText
from florence_fast.data.shards import TarPairs, expand_braces
from tests.data.conftest import encode, sample, write_tar


@pytest.mark.parametrize(
    ("spec", "paths"),
    [
        ("plain.tar", ["plain.tar"]),
        ("{008..010}.tar", ["008.tar", "009.tar", "010.tar"]),
        ("{8..10}.tar", ["8.tar", "9.tar", "10.tar"]),
        ("{a,b}-{0..1}.tar", ["a-0.tar", "a-1.tar", "b-0.tar", "b-1.tar"]),
        ("{name}.tar", ["{name}.tar"]),
    ],
)
def test_braces(spec: str, paths: list[str]) -> None:
    assert expand_braces(spec) == paths


def test_a_range_that_counts_down_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must count upwards, got \{3\.\.1\}"):
        expand_braces("{3..1}.tar")


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz"])
def test_members_make_pairs(tmp_path: Path, suffix: str) -> None:
    members = sample("one", "Red Apple", (9, 8, 7), short_name="apple", keywords=["fruit", "red"])
    members |= {"dir/two.jpg": encode((200, 0, 0), kind="JPEG"), "dir/two.txt": "für zwei\n".encode()}
    members |= {"three.webp": encode((0, 0, 200), kind="WEBP"), "three.json": b'{"caption": "third", "width": 8}'}
    members |= {
        "four.PNG": encode((4, 4, 4)),
        "four.txt": b"from txt",
        "four.json": b'{"text": "x", "keywords": ["k"]}',
    }
    source = TarPairs([write_tar(tmp_path / f"a{suffix}", members)])
    assert [source.texts(i) for i in range(len(source))] == [
        PairText("Red Apple", "apple", ["fruit", "red"]),
        PairText("für zwei"),
        PairText("third"),
        PairText("from txt", None, ["k"]),
    ]
    assert source.image(0).getpixel((0, 0)) == (9, 8, 7) and source.image(3).getpixel((0, 0)) == (4, 4, 4)
    assert source.image(1).getpixel((4, 4))[0] > 190 and source.image(2).getpixel((4, 4))[2] > 190
    assert source.describe(1) == f"{tmp_path / f'a{suffix}'}: dir/two"


def test_pairs_of_several_shards_follow_each_other_and_travel_to_other_processes(tmp_path: Path) -> None:
    paths = [write_tar(tmp_path / f"{n}.tar", sample("same", f"text {n}", (n, n, n))) for n in range(3)]
    source = pickle.loads(pickle.dumps(TarPairs(paths)))
    assert [source.texts(i).text for i in range(len(source))] == ["text 0", "text 1", "text 2"]
    assert [source.image(i).getpixel((0, 0))[0] for i in range(3)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("members", "read", "fault"),
    [
        ({"x.png": b"x"}, "texts", "it has no text"),
        ({"x.txt": b"text"}, "image", "it has no picture"),
        ({"x.png": b"junk", "x.txt": b"text"}, "image", "cannot read picture"),
        ({"x.png": b"x", "x.txt": b"  "}, "texts", "it has no text"),
        ({"x.png": b"x", "x.txt": b"\xff\xfe"}, "texts", "can't decode byte 0xff"),
        ({"x.png": b"x", "x.json": b"{"}, "texts", "Expecting property name"),
        ({"x.png": b"x", "x.json": b"[]"}, "texts", "its json is not an object but list"),
        ({"x.png": b"x", "x.json": b'{"text": "t", "keywords": "k"}'}, "texts", "keywords a list of strings"),
        ({"x.png": b"x", "x.pkl": pickle.dumps({"text": "t"})}, "texts", "it has no text"),
    ],
)
def test_a_bad_sample_spoils_itself_only(tmp_path: Path, members: dict[str, bytes], read: str, fault: str) -> None:
    source = TarPairs([write_tar(tmp_path / "a.tar", {**members, **sample("good", "good")})])
    with pytest.raises(ValueError, match=fault):
        getattr(source, read)(0)
    assert source.texts(1).text == "good" and source.image(1).size == (8, 8)


def test_pickles_and_hidden_files_are_not_members(tmp_path: Path) -> None:
    members = {"x.pkl": b"", "x.pyd": b"", "._one.png": b"", "readme": b"", **sample("one", "text")}
    source = TarPairs([write_tar(tmp_path / "a.tar", members)])
    assert [set(s.members) for s in source.samples] == [{"png", "json"}]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cut_at", ["in-header", "in-member", "at-member"])
def test_a_shard_cut_short_is_used_up_to_the_cut(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, packed: bool, cut_at: str
) -> None:
    whole = write_tar(tmp_path / "a.tar", sample("one", "first") | sample("two", "second")).read_bytes()
    # A member is a header and its data, both padded to 512 bytes: the second sample begins at 2048.
    length = {"in-header": 2048 + 100, "in-member": 2048 + 512 + 30, "at-member": 2048}[cut_at]
    data = gzip.compress(whole[:length]) if packed else whole[:length]
    (tmp_path / "cut.tar").write_bytes(data)
    with caplog.at_level(logging.WARNING):
        source = TarPairs([tmp_path / "cut.tar"])
    assert "cut.tar is cut short" in caplog.text
    assert source.texts(0).text == "first" and source.image(0).size == (8, 8)
    assert len(source) <= 2
    if len(source) == 2:
        with pytest.raises(ValueError, match="cut short: 30 of"):
            source.image(1)


@pytest.mark.parametrize("damage", ["cut-short", "overwritten"])
def test_a_damaged_gzip_is_used_up_to_the_damage(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    noise = np.random.default_rng(0).bytes(200_000)
    members = sample("one", "first") | {"noise.png": noise, "noise.txt": b"second"} | sample("two", "third")
    packed = bytearray(write_tar(tmp_path / "a.tar.gz", members).read_bytes())
    packed[150_000:] = b"" if damage == "cut-short" else b"\xff" * len(packed[150_000:])
    (tmp_path / "a.tar.gz").write_bytes(packed)
    source = TarPairs([tmp_path / "a.tar.gz"])
    assert source.texts(0).text == "first" and source.image(0).size == (8, 8)
    assert len(source) <= 2 and "a.tar.gz is " in caplog.text


def test_a_gzip_of_several_parts_is_joined(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "a.tar", sample("one", "first") | sample("two", "second")).read_bytes()
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress(whole[:700]) + gzip.compress(whole[700:]))
    assert [sample.key for sample in TarPairs([tmp_path / "b.tar.gz"]).samples] == ["one", "two"]


def test_a_whole_shard_is_no_cause_for_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    TarPairs([write_tar(tmp_path / f"a{suffix}", sample("one", "first")) for suffix in (".tar", ".tar.gz")])
    assert not caplog.records


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"", "is not a readable tar: empty file"),
        (b"not a tar" * 200, "is not a readable tar"),
        (gzip.compress(b""), "is not a readable tar: empty file"),
        ({"x.txt": b"t"}, "holds no picture: wanted members KEY.webp, KEY.png"),
        ({"x.png": b"p"}, "holds no text: wanted members KEY.txt, KEY.json"),
        ({}, "holds no picture"),
    ],
    ids=["empty-file", "no-tar", "empty-gzip", "no-picture", "no-text", "no-member"],
)
def test_a_shard_without_pairs_is_refused(tmp_path: Path, data: bytes | dict[str, bytes], fault: str) -> None:
    path = tmp_path / "bad.tar"
    write_tar(path, data) if isinstance(data, dict) else path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"bad\.tar {fault}"):
        TarPairs([path])


def test_two_members_of_one_name_are_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"x.png": b"", "x.PNG": b"", "x.txt": b"t"})
    with pytest.raises(ValueError, match=r"holds two members 'x\.PNG'"):
        TarPairs([path])
