"""Build what pyproject.toml cannot say: the native extension from ``csrc/``.

A top-level distribution named ``kernels`` would shadow Hugging Face's package of that name, so that folder is a package
below ours, by the symbolic link ``florence_fast/kernels``, and never installed as itself. The extension is optional:
without a compiler the package installs without it and says so. FLORENCE_FAST_NO_NATIVE=1 skips it;
FLORENCE_FAST_SANITIZE=1 builds it for AddressSanitizer and UBSan, FLORENCE_FAST_EMULATE_AMX=1 with a stand-in for AMX's
tiles, so that their code can be tested where there are none.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()

AVX512 = ["-march=x86-64-v4", "-mprefer-vector-width=512"]
LEVELS = {"scalar": []}
LEVELS_OF_X86 = {
    **LEVELS,
    "avx2": ["-march=x86-64-v3"],
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512bf16"],
    "amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
"""The instruction sets that ``csrc/level/`` is compiled for, and the flags of each."""

EXACT = {"nms": ["-ffp-contract=off"]}
"""Files of ``csrc/level/`` that promise the bits of the definition, where no product may melt into a sum."""

FLAGS = [
    *(
        "-std=c++20",
        "-O3",
        "-fPIC",
        "-fopenmp",
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
        "-Wno-psabi",
        "-Wno-unknown-warning-option",  # of Clang: the next is GCC's alone
        "-Wno-maybe-uninitialized",
        "-Wno-uninitialized",
    ),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
]
SANITIZE = ["-g", "-O1", "-DFF_DEBUG", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


FAILURE = "_native_failure.txt"
"""Beside the package's modules after a build that failed: why, for `florence-fast info`."""


class FreshBuild(build_py):
    """Copy the modules into an empty folder: what an earlier build left there would be packed into the wheel."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class NinjaBuild(build_ext):
    """Compile the extension with ninja, which takes every core and only what has changed."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        failure = target.parent / FAILURE
        failure.unlink(missing_ok=True)
        try:
            (folder / "build.ninja").write_text(ninja_file(target, folder))
            command = [*ninja(), "-C", str(folder), *([] if self.verbose else ["--quiet"])]
            pipe = subprocess.PIPE
            done = subprocess.run(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, errors="replace")
            print(done.stdout, end="", flush=True)
            if done.returncode:
                raise CompileError(first_error(done.stdout))
        except (OSError, subprocess.CalledProcessError, CompileError) as error:
            target.unlink(missing_ok=True)  # of an earlier build, from other sources
            failure.write_text(f"{' '.join(str(error).split())}\n", encoding="utf-8")
            tell(f"florence_fast: the native kernels were not built ({error}); PyTorch's operations stand in for them")
            raise CompileError(f"{error}; the package works without it, on its other backends") from error

    def copy_extensions_to_source(self) -> None:
        """Copy what was built beside the sources; after a failure what an earlier build left there goes."""
        super().copy_extensions_to_source()
        for ext in self.extensions:
            name = Path(self.get_ext_filename(self.get_ext_fullname(ext.name)))
            failure, beside = Path(self.build_lib) / name.parent / FAILURE, ROOT / name.parent / FAILURE
            beside.unlink(missing_ok=True)
            if failure.is_file():
                (ROOT / name).unlink(missing_ok=True)
                shutil.copyfile(failure, beside)


def first_error(output: str) -> str:
    """Return the first line of a compiler's output that speaks of an error."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "ninja failed")


def tell(message: str) -> None:
    """Say something to the person at the terminal; pip shows what a build prints only with -v."""
    try:
        with open("/dev/tty", "w") as terminal:
            terminal.write(f"\n{message}\n")
    except OSError:
        print(message, file=sys.stderr, flush=True)


def ninja() -> list[str]:
    """Return the command of ninja: the package's if there is one, else what the system has."""
    try:
        import ninja
    except ImportError:
        return ["ninja"]
    return [str(Path(ninja.BIN_DIR) / "ninja")]


def compiles_for_x86(compiler: str) -> bool:
    """Ask the compiler rather than this machine, because it may compile for another."""
    command = [*shlex.split(compiler), "-dumpmachine"]
    shown = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return shown.split("-")[0] in ("x86_64", "amd64")


def ninja_file(target: Path, folder: Path) -> str:
    """Write out the build: the files of a level once a level, the others once, then the link."""
    import pybind11

    sanitize = SANITIZE if os.environ.get("FLORENCE_FAST_SANITIZE") == "1" else []
    compiler = os.environ.get("CXX", "c++")
    x86 = compiles_for_x86(compiler)
    includes = [f"-isystem{sysconfig.get_path('include')}", f"-isystem{pybind11.get_include()}"]
    emulate = os.environ.get("FLORENCE_FAST_EMULATE_AMX") == "1"
    defines = [*(["-DFF_X86"] if x86 else []), *(["-DFF_EMULATE_AMX"] if emulate else [])]
    flags = shlex.join([*FLAGS, *defines, *includes, *sanitize])
    lines = [
        "rule compile",
        f"  command = {compiler} {flags} $level_flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler} -shared {shlex.join(FLAGS + sanitize)} $in -o $out",
    ]
    objects = []

    def compile_(source: Path, name: str, level_flags: list[str]) -> None:
        objects.append(str(folder / f"{name}.o"))
        lines.append(f"build {objects[-1]}: compile {source}")
        lines.append(f"  level_flags = {shlex.join(level_flags)}")

    csrc = ROOT / "csrc"
    for source in sorted([*csrc.glob("*.cpp"), *csrc.glob("host/*.cpp")]):
        compile_(source, source.stem, [])
    for source in sorted(csrc.glob("level/*.cpp")):
        for level, level_flags in (LEVELS_OF_X86 if x86 else LEVELS).items():
            if emulate and level == "amx":
                level_flags = [flag for flag in level_flags if "amx" not in flag]
            compile_(
                source,
                f"{source.stem}.{level}",
                [f"-DFF_LEVEL={level}", f"-DFF_LEVEL_IS_{level.upper()}", *level_flags, *EXACT.get(source.stem, [])],
            )
    lines.append(f"build {target}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def extensions() -> list[Extension]:
    """Return the extension, unless it is not wanted or the system is one whose compilers do not know our vectors."""
    if os.environ.get("FLORENCE_FAST_NO_NATIVE") == "1" or sys.platform == "win32":
        return []
    sources = sorted(
        str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".h")
    )
    return [Extension("florence_fast._C", sources=[], depends=sources, optional=True)]


setup(
    packages=find_packages(include=["florence_fast", "florence_fast.*"]),
    package_data={"florence_fast.kernels": ["configs/*.json"]},
    ext_modules=extensions(),
    cmdclass={"build_ext": NinjaBuild, "build_py": FreshBuild},
)
