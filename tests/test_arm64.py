"""``csrc/`` compiled for arm64: what is in it, and, run by an emulator, the results that it has on this processor."""

import ctypes
import functools
import importlib.util
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from florence_fast import native, ops
from florence_fast.ops.window_attention import cpp as window_attention_cpp

pytestmark = [pytest.mark.slow, pytest.mark.native]

ROOT = Path(__file__).resolve().parent.parent
ON_ARM64 = platform.machine() in ("aarch64", "arm64")
ZIG = ["zig"] if shutil.which("zig") else [sys.executable, "-m", "ziglang"]
GCC = "c++" if ON_ARM64 else "aarch64-linux-gnu-g++"
COMPILERS = {"gcc": [GCC], "zig": [*ZIG, "c++", "-target", "aarch64-linux-gnu"]}
HERE = {
    "gcc": shutil.which(GCC) is not None,
    "zig": ZIG == ["zig"] or importlib.util.find_spec("ziglang") is not None,
}
EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
FILES = sorted({path.stem for path in (ROOT / "csrc/level").glob("*.cpp")} - {"table"})
KERNELS = re.findall(r"EACH\((\w+)\)", (ROOT / "csrc/kernels.h").read_text())


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, str]]:
    """Compile and link the extension for arm64, once; return the folder of its objects and what was said."""

    @functools.cache
    def build(name: str) -> tuple[Path, str]:
        if not HERE[name]:
            pytest.skip(f"no compiler for arm64: {' '.join(COMPILERS[name])}")
        folder = tmp_path_factory.mktemp(name)
        command = [sys.executable, "setup.py", "-v", "build_ext", "--build-temp", folder, "--build-lib", folder / "lib"]
        environment = os.environ | {"CXX": " ".join(COMPILERS[name])}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return folder, done.stdout + done.stderr

    return build


@pytest.mark.parametrize("name", COMPILERS)
def test_it_compiles_without_a_warning_and_links(name: str, build: Callable[[str], tuple[Path, str]]) -> None:
    folder, said = build(name)
    assert "warning:" not in said and "failed" not in said, said
    assert {path.name.split(".")[1] for path in folder.glob("*.*.o")} == {"scalar"}
    (library,) = folder.glob("lib/florence_fast/_C*.so")
    machine = struct.unpack_from("<H", library.read_bytes(), 18)[0]
    assert machine == 183, "of another processor than arm64"


@pytest.fixture(scope="module")
def objects(build: Callable[[str], tuple[Path, str]]) -> Path:
    """The folder of what GCC makes."""
    return build("gcc")[0]


def test_every_kernel_computes_with_vectors(objects: Path) -> None:
    objdump = shutil.which("objdump" if ON_ARM64 else "aarch64-linux-gnu-objdump")
    if not objdump:
        pytest.skip("needs objdump for arm64")
    for name in FILES:
        command = [objdump, "-d", objects / f"{name}.scalar.o"]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert re.search(r"\bf(mul|mla|add|sub)\s+v\d+\.4s", code), f"{name} has no vector of floats"


@pytest.fixture(scope="module")
def driver(objects: Path) -> list[str]:
    """A command that calls one kernel of them."""
    if not (ON_ARM64 or EMULATOR):
        pytest.skip("needs qemu-user to run what was compiled for arm64")
    program = objects / "call_kernel"
    sources = [ROOT / "tests/call_kernel.cpp", objects / "levels.o", *objects.glob("*.scalar.o")]
    flags = ["-std=c++20", "-O1", "-fopenmp", "-static", f"-I{ROOT / 'csrc'}"]
    subprocess.run([GCC, *flags, *sources, "-o", program], check=True, capture_output=True)
    return [str(program)] if ON_ARM64 else [EMULATOR, str(program)]


def flat(args: Any) -> Iterator[Any]:
    for arg in args:
        if isinstance(arg, list | tuple):
            yield from flat(arg)
        else:
            yield arg


def caller(driver: list[str], called: set[str]) -> Callable[..., None]:
    """Stand in for ``native.call``: a process of the driver for each call, whose memory comes back into the tensors."""
    integer, number, block = 0, 1, 2

    def call(name: str, *args: Any) -> None:
        called.add(name)
        words, blocks = [], {}
        for arg in flat(args):
            if isinstance(arg, Tensor) and arg.numel():
                assert arg.is_contiguous(), "native.call refuses it"
                words += [block, list(blocks).index(arg.data_ptr()) if arg.data_ptr() in blocks else len(blocks)]
                blocks.setdefault(arg.data_ptr(), arg.nbytes)
            elif isinstance(arg, float):
                words += [number, *struct.unpack("<q", struct.pack("<d", arg))]
            elif isinstance(arg, torch.dtype):
                words += [integer, native.DTYPES[arg]]
            else:
                words += [integer, 0 if arg is None or isinstance(arg, Tensor) else int(arg)]
        threads = 2
        header = [KERNELS.index(name), threads, len(words) // 2, len(blocks), *words]
        header += [x for address, size in blocks.items() for x in (size, address % 64)]
        given = struct.pack(f"<{len(header)}q", *header)
        given += b"".join(ctypes.string_at(address, size) for address, size in blocks.items())
        back = subprocess.run(driver, input=given, capture_output=True, check=True).stdout
        assert len(back) == sum(blocks.values()), f"{name} gave {len(back)} bytes back"
        at = 0
        for address, size in blocks.items():
            ctypes.memmove(address, back[at : at + size], size)
            at += size

    return call


def leaf(*shape: int, dtype: torch.dtype = torch.float32, factor: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * factor).to(dtype).requires_grad_()


def examples(dtype: torch.dtype) -> dict[str, tuple[Callable[..., Any], list[Any], dict[str, Any]]]:
    """Calls whose sizes fill no vector and no tile, so that what is left over is seen too."""

    def attention(shape: tuple[int, ...], window: Any, **more: Any) -> tuple[Callable[..., Any], list[Any], Any]:
        qkv = leaf(2, *shape, 3 * 2 * 19, dtype=dtype)
        return ops.window_attention, [qkv], {"window_size": window, "num_heads": 2, **more}

    features = [leaf(21, 11, dtype=dtype), leaf(21, 11, dtype=dtype), torch.tensor(1.5).requires_grad_()]
    by_label = {"labels": torch.randint(0, 9, (21,)), "chunk_size": 8}
    x, norm = leaf(3, 7, 45, dtype=dtype), [leaf(45), leaf(45)]
    sampling = [leaf(2, 6, 9, 10, dtype=dtype), leaf(2, 36, 9, 10, factor=2.0), leaf(4, 6, 3, 3, dtype=dtype)]
    corners = torch.rand(400, 2) * 9
    boxes = torch.cat([corners, corners + 4 * torch.rand(400, 2)], 1)
    mlp = [leaf(*shape, dtype=dtype) for shape in ((9, 13), (37, 13), (37,), (5, 37), (5,))]
    merging = [leaf(2, 5, 7, 11, dtype=dtype), leaf(44), leaf(44), leaf(22, 44, dtype=dtype, factor=0.2)]
    bias = {"bias": leaf(2, 16, 16), "qkv_bias": leaf(114), "pad_mode": "bias"}
    return {
        "window_attention, shifted": attention((9, 11), 4, shift_size=2, rel_pos_bias_table=leaf(49, 2)),
        "window_attention, cosine": attention((9, 11), 4, logit_scale=leaf(2, 1, 1), **bias),
        "window_attention, 3-D": attention((3, 7, 8), (2, 6, 7), shift_size=(1, 3, 3)),
        **{f"mlp, {kind}": (ops.mlp, mlp, {"activation": kind}) for kind in ("gelu", "gelu_tanh", "quick_gelu")},
        "layer_norm": (ops.layer_norm, [x, *norm], {}),
        "layer_norm, residual": (ops.layer_norm, [x, *norm], {"residual": leaf(3, 7, 45)}),
        "l2_normalize": (ops.l2_normalize, [x], {}),
        "patch_merging": (ops.patch_merging, merging, {}),
        "contrastive_loss": (ops.contrastive_loss, features, by_label),
        "sigmoid_loss": (ops.sigmoid_loss, [*features, torch.tensor(-2.0).requires_grad_()], by_label),
        "deform_conv2d": (ops.deform_conv2d, sampling, {"padding": 1, "mask": leaf(2, 18, 9, 10)}),
        "nms": (ops.nms, [boxes, torch.rand(400), 0.4], {}),
    }


def results(function: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return what it gives, and the gradients of everything that has one."""
    out = function(*args, **kwargs)
    outs = list(out) if isinstance(out, tuple) else [out]
    leaves = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.requires_grad]
    if not leaves:
        return outs
    weights = [torch.linspace(-1, 2, x.numel()).view_as(x).to(x) for x in outs]
    return [*outs, *torch.autograd.grad(outs, leaves, weights)]


@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
def test_it_computes_what_this_processor_does(
    dtype: torch.dtype, driver: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the same code, but that arm64 has products and sums in one rounding."""
    if native.extension() is None:
        pytest.skip("the native extension was not built")
    monkeypatch.setenv("FLORENCE_FAST_CPU", "scalar")
    called: set[str] = set()
    tolerance = 1e-6 if dtype == torch.float32 else 1e-4  # relative
    for name, example in examples(dtype).items():
        with ops.backend("cpp"):
            wanted = results(*example)
            with monkeypatch.context() as patch:
                patch.setattr(native, "call", caller(driver, called))
                patch.setattr(window_attention_cpp, "_addresses", lambda tensors: tensors)
                got = results(*example)
        for i, (x, y) in enumerate(zip(got, wanted, strict=True)):
            error = (x.double() - y.double()).norm() / y.double().norm()
            assert x.dtype == y.dtype and error <= tolerance, f"{name}, result {i}: {error:.1e}"
            assert x.dtype.is_floating_point or torch.equal(x, y), name
    assert called == set(KERNELS)
