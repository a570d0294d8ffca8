"""WebDataset tars read map-style: members, braces, and shards that are cut short, empty or no tars."""

import gzip
import io
import logging
import pickle
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest

from florence_fast.data.pairs import PairText
from florence_fast.data.shards import MAX_BYTES, TarPairs, expand_braces
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
        ({"x.txt": b"text"}, "image", "it has no image"),
        ({"x.png": b"junk", "x.txt": b"text"}, "image", "cannot read image"),
        ({"x.png": b"x", "x.txt": b"  "}, "texts", "it has no text"),
        ({"x.png": b"x", "x.txt": b"\xff\xfe"}, "texts", "can't decode byte 0xff"),
        ({"x.png": b"x", "x.json": b"{"}, "texts", "Expecting property name"),
        ({"x.png": b"x", "x.json": b"[]"}, "texts", "its json is not an object but list"),
        ({"x.png": b"x", "x.json": b'{"text": "t", "keywords": "k"}'}, "texts", "keywords must be a list of strings"),
        ({"x.png": b"x", "x.json": b"[" * 100_000}, "texts", "its json is JSON nested more than 100 deep"),
        ({"x.png": b"x", "x.json": b'{"text": "cut \\ud83d"}'}, "texts", "half a character"),
        ({"x.png": b"x", "x.json": b'{"text": NaN}'}, "texts", "its json is not JSON: it holds NaN"),
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
        ({"x.txt": b"t"}, "holds no image: wanted members KEY.webp, KEY.png"),
        ({"x.png": b"p"}, "holds no text: wanted members KEY.txt, KEY.json"),
        ({}, "holds no image"),
    ],
    ids=["empty-file", "no-tar", "empty-gzip", "no-image", "no-text", "no-member"],
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


def header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    """A member's header with whatever stands for its size."""
    block = bytearray(512)
    block[: len(name)] = name
    block[124 : 124 + len(size)] = size
    block[148:156], block[156:157], block[257:265] = b" " * 8, kind, b"ustar\x0000"
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def binary(number: int) -> bytes:
    """A size as GNU tar writes large ones."""
    return b"\x80" + number.to_bytes(11, "big") if number >= 0 else b"\xff" + (number + 256**11).to_bytes(11, "big")


PAX = {
    "pax-length": b"99999999999999999999 path=x\n",
    "pax-length-of-zero": b"0 path=x\n",
    "pax-size": b"13 size=-512\n",
    "pax-size-of-letters": b"11 size=x0\n",
    "pax-size-of-many-digits": b"40 size=" + b"9" * 31 + b"\n",
}
HOSTILE = {
    "negative": (header(b"k2.txt", binary(-512)), "damaged at byte 2,048: .* is no size"),
    "octal-minus": (header(b"k2.txt", b"-0000001000\0"), "damaged at byte 2,048: .* is no size"),
    "beyond-63-bits": (header(b"k2.txt", b"\x80" + b"\xff" * 11), "damaged at byte 2,048: .* is no size"),
    "no-checksum": (b"x" * 512, "damaged at byte 2,048"),
    "exabyte": (header(b"k2.txt", binary(1 << 60)) + b"x" * 512, "cut short"),
    "extended-petabyte": (
        header(b"p", binary(1 << 50), b"x") + b"x" * 512,
        "damaged at byte 2,048: an extended header of",
    ),
    "long-name-of-20-GB": (
        header(b"p", binary(20 << 30), b"L") + b"x" * 512,
        "damaged at byte 2,048: an extended header of",
    ),
    **{
        name: (header(b"p", b"%011o\0" % len(data), b"x") + data.ljust(512, b"\0"), "damaged at byte 2,048")
        for name, data in PAX.items()
    },
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_header_that_lies_ends_the_shard_and_not_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, packed: bool
) -> None:
    block, fault = HOSTILE[name]
    data = write_tar(tmp_path / "good.tar", sample("good", "good")).read_bytes()[:2048] + block + bytes(1024)
    (tmp_path / "bad.tar").write_bytes(gzip.compress(data) if packed else data)
    source = TarPairs([tmp_path / "bad.tar"])
    assert re.search(rf"bad\.tar is {fault}", caplog.text)
    assert source.texts(0).text == "good" and source.image(0).size == (8, 8)
    for index in range(1, len(source)):
        with pytest.raises(ValueError, match=r"more than the limit of|no image"):
            source.texts(index)


@pytest.mark.parametrize("packed", [False, True])
def test_a_member_too_large_is_unreadable_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    monkeypatch.setitem(MAX_BYTES, "png", 1 << 20)
    large = header(b"large.png", binary((1 << 20) + 1)), header(b"large.txt", b"5\0") + b"large".ljust(512, b"\0")
    good = write_tar(tmp_path / "good.tar", sample("good", "good")).read_bytes()
    data = large[0] + bytes((1 << 20) + 512) + large[1] + good
    path = tmp_path / "bad.tar"
    path.write_bytes(gzip.compress(data) if packed else data)
    source = TarPairs([path])
    assert [source.texts(i).text for i in range(2)] == ["large", "good"] and source.image(1).size == (8, 8)
    with pytest.raises(ValueError, match="its png has 1,048,577 bytes, more than the limit"):
        source.image(0)


def test_a_gzip_that_unpacks_to_a_thousand_times_its_size_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("florence_fast.data.shards.UNPACKED_AT_LEAST", 1 << 20)
    write_tar(tmp_path / "a.tar.gz", {f"{n}.png": bytes(1 << 18) for n in range(5)} | {"0.txt": b"x"})
    with pytest.raises(ValueError, match=r"a\.tar\.gz unpacks to more than 1,048,576 bytes: unpack it to a plain tar"):
        TarPairs([tmp_path / "a.tar.gz"])


def test_zeros_behind_a_gzipped_tar_are_not_kept(tmp_path: Path) -> None:
    data = write_tar(tmp_path / "a.tar", sample("one", "first")).read_bytes()
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress(data + bytes(40 << 20), 1) + bytes(512))
    source = TarPairs([tmp_path / "b.tar.gz"])
    assert source.texts(0).text == "first" and len(source._unpacked[0]) < 1000


def test_dots_belong_to_the_key(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = sample("v1.0003", "third") | sample("dir.x/v1.0004", "fourth") | sample("x", "plain")
    members |= {"x.mask.png": b"", "x.en.txt": b"", "v1.0009.jpg": b"", "x.cls": b"1", "y.cls": b"2"}
    source = TarPairs([write_tar(tmp_path / "a.tar", members)])
    assert [s.key for s in source.samples] == ["v1.0003", "dir.x/v1.0004", "x", "v1.0009"]
    assert [source.texts(i).text for i in range(3)] == ["third", "fourth", "plain"]
    assert "2 of a pair that has its own (x.mask.png, ...)" in caplog.text and "2 of kind .cls (x.cls" in caplog.text


@pytest.mark.parametrize("zeros", [512, 1024, 10240, 1 << 20])
@pytest.mark.parametrize("packed", [False, True])
def test_joined_tars_are_read_to_their_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, zeros: int, packed: bool
) -> None:
    parts = [write_tar(tmp_path / f"{n}.tar", sample(n, n)).read_bytes()[:2048] for n in "abc"]
    data = b"".join(part + bytes(zeros) for part in parts)
    (tmp_path / "joined.tar").write_bytes(gzip.compress(data) if packed else data)
    source = TarPairs([tmp_path / "joined.tar"])
    assert [source.texts(i).text for i in range(len(source))] == ["a", "b", "c"] and not caplog.records


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_form_of_tar_is_read_as_the_standard_library_reads_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, form: int
) -> None:
    long = "d" * 90 + "/" + "n" * 90
    names = ["a.png", "a.txt", f"{long}.png", f"{long}.txt"]
    if form != tarfile.USTAR_FORMAT:
        names += [f"{'x' * 300}.png", "größe.png", "größe.txt"]
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as tar:
        for kind, link in ((tarfile.DIRTYPE, ""), (tarfile.SYMTYPE, "a.png"), (tarfile.LNKTYPE, "a.png")):
            member = tarfile.TarInfo(f"special-{kind.decode()}.png")
            member.type, member.linkname = kind, link
            tar.addfile(member)
        for number, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size, member.mtime = number * 511, 1.5
            tar.addfile(member, io.BytesIO(bytes(number * 511)))
    source = TarPairs([tmp_path / "a.tar"])
    found = {f"{s.key}.{suffix}": place for s in source.samples for suffix, place in s.members.items()}
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert found == {member.name: (member.offset_data, member.size) for member in tar if member.isreg()}
    assert "members left out: 2 that are links or devices" in caplog.text


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    members = {"a.png": b"", "a.txt": mark + b"apple", "b.png": b"", "b.json": mark + b'{"text": "pear"}'}
    members |= {"c.png": b"", "c.txt": mark, "c.json": b'{"text": "plum", "keywords": [1, "k"]}'}
    source = TarPairs([write_tar(tmp_path / "a.tar", members)])
    assert [source.texts(i) for i in range(3)] == [
        PairText("apple"),
        PairText("pear"),
        PairText("plum", None, ["1", "k"]),
    ]


def test_names_that_act_on_a_terminal_are_escaped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = sample("a\x1b[2J", "x") | {"caf\udce9.cls": b""}
    source = TarPairs([write_tar(tmp_path / "x\x1b.tar", members)])
    assert source.describe(0).endswith(r"x\x1b.tar: a\x1b[2J") and source.texts(0).text == "x"
    assert "\x1b" not in caplog.text and r"caf\xe9.cls" in caplog.text


@pytest.mark.parametrize("spec", ["{0..99999999999}.tar", "{0..9999}{0..9999}.tar"])
def test_braces_that_stand_for_too_many_files_are_refused(spec: str) -> None:
    with pytest.raises(ValueError, match=r"more than (the limit of )?1,000,000"):
        expand_braces(spec)
