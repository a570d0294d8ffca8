"""``bench.cpu.hashing`` measures every work, and says why a competitor is missing."""

import json

from bench.cpu import hashing


def test_every_work_has_our_time_and_the_others_one_or_a_reason(tmp_path, capsys):
    assert hashing.main(["--hashes", "2000", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "hashing.json").read_text())["rows"]
    assert len(rows) == 6 and all(row["times"]["ours"] > 0 for row in rows)
    assert all(len(row["times"]) + len(row["missing"]) >= 2 for row in rows)
    assert "near_duplicates, 2,000 hashes" in capsys.readouterr().out
