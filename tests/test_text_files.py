"""Text files of others: byte-order marks, other encodings, and files that are no files."""

import os
from pathlib import Path

import pytest

from florence_fast.text_files import read_json, read_lines, read_text


def test_byte_order_marks_are_no_part_of_a_text(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_bytes("\ufeff\ufeffred apple\r\n\n\ufeffpear\u2028tree \n".encode())
    assert read_text(path) == "red apple\r\n\n\ufeffpear\u2028tree \n"
    assert read_lines(path) == ["red apple", "pear\u2028tree"]
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(path) == {"a": 1}


def test_what_is_no_such_text_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_bytes("red apple".encode("utf-16"))
    with pytest.raises(ValueError, match=r"names\.txt is not UTF-8: .*it seems to be UTF-16: save it as UTF-8"):
        read_text(path)
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match=r"names\.txt is larger than the 67,108,864 bytes"):
        read_text(path)
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(ValueError, match=r"pipe\.txt is not a plain file"):
        read_text(tmp_path / "pipe.txt")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"deep\.json is JSON nested"):
        read_json(tmp_path / "deep.json")
