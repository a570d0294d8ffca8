"""`make compat`: what is recorded covers both ends and has no failure, and the command sees what it must not miss."""

import json
import re
import zipfile

import pytest

from bench.cpu import releases
from bench.cpu.releases import ENVIRONMENTS, Environment

NOT_OF_A_RELEASE = {"test_convergence.py"}
"""Minutes of training, about how rounding grows, which is the same whatever the release."""
ROWS = releases.read(releases.RESULTS / "compat.json")


def test_every_release_of_the_table_was_tested_and_nothing_failed():
    assert [row["name"] for row in ROWS] == [one.name for one in ENVIRONMENTS], "run make compat"
    for row, environment in zip(ROWS, ENVIRONMENTS, strict=True):
        assert not row["broken"] and row["failed"] == 0, row["name"]
        assert tuple(row["pins"]) == environment.pins, f"{row['name']}: run make compat"
        assert row["files"] and all(row["files"].values()), "tests of each file passed"
        assert row["passed"] == sum(row["files"].values())
        for pin in environment.pins:
            name, _, version = pin.partition("==")
            assert row["versions"][name].partition("+")[0] == version


def test_both_ends_are_covered():
    ends = {(row["library"], row["which"]): row["pins"][0] for row in ROWS}
    for library in ("transformers", "timm"):
        oldest, newest = (_numbers(ends[library, which]) for which in ("oldest", "newest"))
        between = [_numbers(row["pins"][0]) for row in ROWS if row["library"] == library]
        assert oldest == min(between) < max(between) == newest
    assert {library for library, which in ends if which == "newest"} >= {"monai", "open_clip_torch"}
    assert ("torchvision", "recent") in ends


def _numbers(pin):
    return [int(number) for number in pin.partition("==")[2].split(".")]


def test_every_package_is_pinned_and_every_test_of_a_library_is_run():
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for one in ENVIRONMENTS for pin in one.pins)
    assert len({one.name for one in ENVIRONMENTS}) == len(ENVIRONMENTS)
    for one in ENVIRONMENTS:
        assert one.pins[0].startswith(f"{one.library}=="), "the library is named first"
        assert all(list(releases.TESTS.glob(pattern)) for pattern in one.tests), f"{one.name}: {one.tests}"
    covered = {path for one in ENVIRONMENTS for pattern in one.tests for path in releases.TESTS.glob(pattern)}
    needs = re.compile(r"importorskip\(|third_party\.(torchvision|timm|monai)\(|compat\.hugging_face_models import")
    forgotten = [path.name for path in releases.TESTS.glob("test_*.py") if needs.search(path.read_text("utf-8"))]
    assert forgotten and set(forgotten) - {path.name for path in covered} == NOT_OF_A_RELEASE


def test_the_page_shows_the_releases():
    text = releases.page_text(releases.RESULTS)
    for row in ROWS:
        assert f"| {row['library']} | {row['pins'][0].partition('==')[2]} | {row['which']} |" in text


PASSES = "import toy\n\ndef test_toy():\n    assert toy.VERSION == '{version}'\n"
SKIPS = "import pytest\n\nnobody = pytest.importorskip('nobody')\n\ndef test_nobody():\n    pass\n"
SKIPS_ONE = "import pytest\n\n@pytest.mark.skip(reason='no toy')\ndef test_one():\n    pass\n"


def write_wheel(folder, version):
    """Write a package of one line, as pip takes it."""
    about = f"toy-{version}.dist-info"
    with zipfile.ZipFile(folder / f"toy-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("toy.py", f"VERSION = '{version}'\n")
        wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: toy\nVersion: {version}\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A table of one release, of a package that lies in a folder beside it, and the folder of its tests."""
    for name in ("wheels", "tests"):
        (tmp_path / name).mkdir()
    write_wheel(tmp_path / "wheels", "1.0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setattr(releases, "BUILD", tmp_path / "build")
    monkeypatch.setattr(releases, "TESTS", tmp_path / "tests")
    monkeypatch.setattr(releases, "ENVIRONMENTS", (Environment("toy", "newest", ("toy==1.0",), ("test_*.py",)),))
    (tmp_path / "tests" / "test_toy.py").write_text(PASSES.format(version="1.0"))
    return tmp_path


def run(folder):
    """Run the command; return its exit code and the row that it recorded."""
    code = releases.main(["--out", str(folder)])
    (row,) = releases.read(folder / "compat.json")
    return code, row


def test_a_release_that_works(toy, capsys):
    code, row = run(toy)
    stored = json.loads((toy / "compat.json").read_text())
    assert stored["seconds"] == round(row["seconds"])
    assert (code, row["broken"], row["passed"], row["files"]) == (0, [], 1, {"test_toy": 1})
    assert row["versions"]["toy"] == "1.0" and row["versions"]["torch"] == row["torch"] and row["seconds"] > 0
    assert "| toy | 1.0 | newest |  | 1 | 0 | 0 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "failed", "broken"),
    [
        ("def test_bad():\n    assert 1 == 2, 'no'\n", 1, "test_last.test_bad: AssertionError: no"),
        ("import nobody\n", 1, "test_last: ModuleNotFoundError: No module named 'nobody'"),
        ("import os\n\ndef test_crash():\n    os._exit(7)\n", 0, "pytest ended with code 7"),
    ],
    ids=["a-failure", "an-import", "a-crash"],
)
def test_what_fails_is_named_and_ends_the_command_with_1(toy, text, failed, broken):
    (toy / "tests" / "test_last.py").write_text(text)
    code, row = run(toy)
    assert code == 1 and row["failed"] == failed and row["broken"][0].startswith(broken), row["broken"]
    assert row["passed"] == failed, "those of the other file, unless the process is gone"


def test_a_file_of_which_every_test_was_skipped_is_a_failure(toy):
    (toy / "tests" / "test_one.py").write_text(SKIPS_ONE + "\ndef test_two():\n    pass\n")
    assert run(toy)[0] == 0
    (toy / "tests" / "test_two.py").write_text(SKIPS_ONE)
    (toy / "tests" / "test_three.py").write_text(SKIPS)
    code, row = run(toy)
    assert code == 1 and row["failed"] == 0
    assert row["broken"] == ["test_three.py: no test of it passed", "test_two.py: no test of it passed"]
    assert row["skipped"] == {"could not import 'nobody': No module named 'nobody'": 1, "no toy": 2}
    assert row["files"] == {"test_one": 1, "test_three": 0, "test_toy": 1, "test_two": 0}


def test_an_installation_is_kept_and_one_that_was_cut_short_is_done_again(toy, monkeypatch):
    (environment,) = releases.ENVIRONMENTS
    releases.install(environment)
    folder = releases.BUILD / "toy-1.0"
    module, stamp = folder / "toy.py", folder / "pins.txt"
    (toy / "wheels" / "toy-1.0-py3-none-any.whl").rename(toy / "gone.whl")
    releases.install(environment)
    assert releases.versions(environment)["toy"] == "1.0", "without a wheel to install"
    stamp.unlink()
    with pytest.raises(releases.Unusable, match=r"pip ended with code 1: .*toy==1\.0"):
        releases.install(environment)
    assert not stamp.exists()
    (toy / "gone.whl").rename(toy / "wheels" / "toy-1.0-py3-none-any.whl")
    releases.install(environment)
    assert module.is_file() and "toy==1.0" in stamp.read_text()


def test_another_release_than_the_pinned_one_is_a_failure(toy):
    assert run(toy)[0] == 0
    (about,) = (releases.BUILD / "toy-1.0").glob("*.dist-info")
    about.rename(about.with_name("toy-2.0.dist-info"))
    metadata = releases.BUILD / "toy-1.0" / "toy-2.0.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("1.0", "2.0"))
    code, row = run(toy)
    assert code == 1 and row["broken"] == ["toy-1.0 must have toy==1.0, got toy 2.0"] and row["passed"] == 0


def test_what_cannot_be_installed_is_a_row_and_the_others_go_on(toy, monkeypatch):
    absent = Environment("toy", "oldest", ("toy==0.1",), ("test_*.py",))
    monkeypatch.setattr(releases, "ENVIRONMENTS", (absent, *releases.ENVIRONMENTS))
    assert releases.main(["--out", str(toy)]) == 1
    first, second = releases.read(toy / "compat.json")
    assert first["broken"][0].startswith("pip ended with code 1") and second["passed"] == 1
    assert releases.main(["--out", str(toy), "--only", "toy-1"]) == 0
    assert [row["name"] for row in releases.read(toy / "compat.json")] == ["toy-0.1", "toy-1.0"]
    assert releases.main(["--out", str(toy), "--only", "nothing"]) == 1
