"""The package as others get it: a wheel, an editable installation, a bare checkout; each finds the kernels once."""

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import florence_fast

ROOT = Path(__file__).resolve().parent.parent
FIND_KERNELS = "import florence_fast, florence_fast.kernels as k; print(k.__file__)"


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """Run a command without the surrounding PYTHONPATH; show everything that it said when it fails."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | variables
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout.strip()


@pytest.fixture(scope="session")
def checkout(tmp_path_factory) -> Path:
    """A copy of what git tracks or would track, so that building leaves nothing in the real tree."""
    target = tmp_path_factory.mktemp("checkout")
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split("\0")
    for name in filter(None, tracked):
        if (ROOT / name).is_symlink():
            (target / name).symlink_to((ROOT / name).readlink())
        elif (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes((ROOT / name).read_bytes())
    return target


@pytest.fixture(scope="session")
def wheel(checkout, tmp_path_factory) -> Path:
    """A wheel of Python alone, built with no network."""
    return build_wheel(checkout, tmp_path_factory.mktemp("wheel"), FLORENCE_FAST_NO_NATIVE="1")


def build_wheel(checkout: Path, out: Path, **variables: str) -> Path:
    """Build a wheel: no build isolation, no dependencies, no index."""
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index"]
    run(*pip, "--wheel-dir", out, checkout, cwd=out, **variables)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture
def empty_environment(tmp_path) -> Path:
    """The interpreter of a new virtual environment that sees this one's packages, but not its florence_fast."""
    venv.create(tmp_path / "venv", system_site_packages=False, with_pip=False)
    return tmp_path / "venv" / "bin" / "python"


def test_a_wheel_holds_the_kernels_exactly_once(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    kernels = sorted(name for name in names if "kernels/" in name)
    sources = sorted(f"florence_fast/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").rglob("*.py"))
    assert [name for name in kernels if name.endswith(".py")] == sources
    assert not [name for name in names if name.startswith(("kernels", "tests", "bench", "scripts", "csrc"))]


def test_a_wheel_carries_data_licence_and_version(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for needed in (
        "florence_fast/py.typed",
        "florence_fast/data/clip_merges.txt.gz",
        "florence_fast/demo/photograph.webp",
    ):
        assert needed in names
    artists = {path.name for path in (ROOT / "florence_fast/data/artists").glob("*.tar.gz")}
    assert artists == {Path(name).name for name in names if name.startswith("florence_fast/data/artists/")}
    assert {"LICENSE", "NOTICE"} <= {Path(name).name for name in names if ".dist-info/" in name}
    assert wheel.name.startswith(f"florence_fast-{florence_fast.__version__}-")


def test_an_installed_wheel_finds_its_own_kernels(wheel, empty_environment, tmp_path):
    site = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", site, wheel, cwd=tmp_path)
    # A stranger's top-level `kernels` beside us, as Hugging Face's package of that name would lie there.
    (site / "kernels").mkdir()
    (site / "kernels/__init__.py").write_text("")
    found = run(empty_environment, "-c", FIND_KERNELS, cwd=tmp_path, PYTHONPATH=str(site))
    assert found == str(site / "florence_fast/kernels/__init__.py")
    paths = run(
        empty_environment, "-c", "import florence_fast as f; print(len(f.__path__))", cwd=tmp_path, PYTHONPATH=str(site)
    )
    assert paths == "1"


def test_a_bare_checkout_finds_the_kernels_beside_it(checkout, empty_environment, tmp_path):
    from_inside = run(empty_environment, "-c", FIND_KERNELS, cwd=checkout)
    from_outside = run(empty_environment, "-c", FIND_KERNELS, cwd=tmp_path, PYTHONPATH=str(checkout))
    assert from_inside == from_outside == str(checkout / "florence_fast/kernels/__init__.py")
    assert (checkout / "florence_fast/kernels").resolve() == checkout / "kernels"


def test_nothing_beside_the_package_is_a_module_of_it(checkout, empty_environment, tmp_path):
    """`import florence_fast.setup` would run setup()."""
    for name in ("setup", "tests", "bench"):
        code = f"import importlib.util as u; print(u.find_spec('florence_fast.{name}'))"
        assert run(empty_environment, "-c", code, cwd=checkout) == "None"


def test_an_editable_installation_finds_the_checkout(checkout, empty_environment, tmp_path):
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index"]
    run(*pip, "--target", site, "--editable", checkout, cwd=tmp_path, FLORENCE_FAST_NO_NATIVE="1")
    code = f"import site; site.addsitedir({str(site)!r}); {FIND_KERNELS}"
    assert run(empty_environment, "-c", code, cwd=tmp_path) == str(checkout / "florence_fast/kernels/__init__.py")


def test_without_a_compiler_it_installs_without_the_extension_and_says_why(checkout, tmp_path):
    """Whatever an earlier build left in the folders of the build is not packed."""
    library = checkout / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    left = [library / "florence_fast" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"]
    left += [library / "florence_fast" / "kernels" / "old.py", library / "kernels" / "__init__.py"]
    for file in left:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"of an earlier build")
    built = build_wheel(checkout, tmp_path, CXX="no-such-compiler")
    wheel = zipfile.ZipFile(built)
    names = wheel.namelist()
    assert "florence_fast/native.py" in names
    assert not [name for name in names if name.startswith(("florence_fast/_C", "kernels/")) or name.endswith("/old.py")]
    assert b"no-such-compiler" in wheel.read("florence_fast/_native_failure.txt")


def test_the_first_line_of_a_command_says_that_the_build_failed(monkeypatch, capsys):
    from florence_fast import cli

    monkeypatch.setattr(cli, "build_failure", lambda: "c++: not found")
    assert cli.main(["info", "--help"]) == cli.main(["--version"]) == 0
    assert "native" not in capsys.readouterr().err
    assert cli.main(["nothing"]) == 2
    assert "note: the native kernels were not built (c++: not found)" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.native
def test_a_wheel_from_a_source_archive_holds_the_extension(checkout, empty_environment, tmp_path):
    code = "from setuptools.build_meta import build_sdist; print(build_sdist('.'))"
    archive = run(sys.executable, "-c", code, cwd=checkout).splitlines()[-1]
    built = build_wheel(checkout / archive, tmp_path)
    assert [name for name in zipfile.ZipFile(built).namelist() if name.startswith("florence_fast/_C")]
    assert "linux" in built.name, "a wheel with an extension is of one platform"


def test_constraints_fix_every_direct_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(name for group in extras.values() for name in group)]
    names = {normal(requirement) for requirement in wanted}
    fixed = {normal(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert names <= fixed, f"not in constraints.txt: {sorted(names - fixed)}"


def normal(requirement: str) -> str:
    """The distribution's name alone, as indexes compare it."""
    name = requirement.split(";")[0].split("=")[0].split(">")[0].strip()
    return name.lower().replace("_", "-")


def test_the_oldest_python_is_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (oldest,) = re.findall(r"^>=(3\.\d+)$", project["project"]["requires-python"])
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    said = {page.name: re.findall(r"Python (3\.\d+) or newer", page.read_text(encoding="utf-8")) for page in pages}
    assert {version for versions in said.values() for version in versions} == {oldest}
    assert project["tool"]["basedpyright"]["pythonVersion"] == oldest


def test_the_address_of_the_repository_is_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    address = project["project"]["urls"]["Repository"]
    for name in ("mkdocs.yml", "CITATION.cff"):
        assert f": {address}\n" in (ROOT / name).read_text(encoding="utf-8"), name
