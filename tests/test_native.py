"""The native extension: which instructions it uses and who says so, what happens without it, and whose threads it runs
on."""

import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from florence_fast import info, native, ops
from florence_fast.ops.mlp import cpp as mlp_cpp
from tests.ops.test_every_op import example, outputs_and_gradients

ROOT = Path(__file__).resolve().parent.parent
NOT_BUILT = "the native extension was not built; it takes a C++ compiler at installation"
has_native = pytest.mark.skipif(native.extension() is None, reason="the native extension was not built")

# Ops that have native kernels; what is not here says itself why not.
HAVE_KERNELS = set(ops.OPS) - {"conv_embed", "window_attention_partitioned"}


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FLORENCE_FAST_CPU", "FLORENCE_FAST_BACKEND"):
        monkeypatch.delenv(name, raising=False)


def gelu(x: torch.Tensor) -> torch.Tensor:
    return mlp_cpp.bias_activation_fwd(x, None, "gelu", False)


@pytest.mark.native
@has_native
def test_levels_are_in_order_and_start_with_what_runs_everywhere() -> None:
    levels = native.levels()
    assert levels[0] == "scalar" and list(levels) == sorted(levels, key=native.LEVELS.index)
    assert native.level() == levels[-1]
    vectors = {"DEFAULT": "scalar", "AVX2": "avx2", "AVX512": "avx512"}
    assert vectors.get(torch.backends.cpu.get_cpu_capability(), "scalar") in levels


@pytest.mark.native
@has_native
def test_each_level_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 37)
    wanted = torch.nn.functional.gelu(x)
    for name in ("auto", *native.levels()):
        monkeypatch.setenv("FLORENCE_FAST_CPU", name)
        assert native.level() == (native.levels()[-1] if name == "auto" else name)
        assert native.multiplies_bfloat16() == (native.level() in ("avx512_bf16", "amx"))
        torch.testing.assert_close(gelu(x), wanted)


@pytest.mark.native
@has_native
def test_a_name_that_is_no_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLORENCE_FAST_CPU", "avx51")
    message = r"unknown FLORENCE_FAST_CPU 'avx51' \(did you mean 'avx512'\?\)"
    with pytest.raises(ValueError, match=message):
        native.level()
    args, kwargs = ops.OPS["window_attention"].example("cpu")
    with pytest.raises(ValueError, match=message):
        ops.window_attention(*args, **kwargs)


@pytest.mark.native
@has_native
def test_a_level_that_does_not_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = set(native.LEVELS) - set(native.levels())
    if not absent:
        monkeypatch.setattr(native, "levels", lambda: ("scalar", "avx2"))
        absent = {"amx"}
    for name in absent:
        monkeypatch.setenv("FLORENCE_FAST_CPU", name)
        with pytest.raises(RuntimeError, match=f"FLORENCE_FAST_CPU={name} does not run here; these do: scalar"):
            native.level()


@pytest.mark.parametrize("name", ["auto", "scalar", native.LEVELS[-1]])
def test_without_the_extension_there_is_no_level(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "extension", lambda: None)
    monkeypatch.setenv("FLORENCE_FAST_CPU", name)
    x = torch.ones(1)
    for ask in (native.level, native.multiplies_bfloat16, lambda: native.call("l2_normalize_fwd", x)):
        with pytest.raises(RuntimeError, match=re.escape(NOT_BUILT)):
            ask()


@pytest.mark.native
@has_native
def test_the_extension_itself_refuses_what_would_be_an_illegal_instruction() -> None:
    x = torch.randn(16)
    arguments = (1, 0, 0, 1, 16, x.data_ptr(), 0, x.data_ptr())
    with pytest.raises(ValueError, match="no level has the number 99"):
        native.extension().bias_activation_fwd(99, *arguments)
    for name in set(native.LEVELS) - set(native.levels()):
        with pytest.raises(RuntimeError, match=f"the level {name} does not run here"):
            native.extension().bias_activation_fwd(native.LEVELS.index(name), *arguments)


@pytest.mark.native
@has_native
def test_reasons() -> None:
    assert native.reasons() == native.reasons(torch.ones(1), None, torch.ones(1).half()) == []
    assert native.reasons(torch.ones(1).double(), torch.ones(1).long(), torch.ones(1, device="meta")) == [
        "native kernels run on the CPU, not on meta",
        "tensors must be float32, bfloat16 or float16, got torch.float64, torch.int64",
    ]


@pytest.mark.native
@has_native
def test_only_contiguous_memory_travels() -> None:
    x = torch.randn(4, 6).T
    with pytest.raises(AssertionError, match=r"contiguous memory, got strides \(1, 6\)"):
        native.call("bias_activation_fwd", x.dtype, 0, 6, 4, x, None, torch.empty(6, 4))


@pytest.mark.native
@has_native
@pytest.mark.parametrize("name", sorted(HAVE_KERNELS))
def test_it_is_what_a_cpu_uses(name: str) -> None:
    args, kwargs = ops.OPS[name].example("cpu")
    assert ops.dispatch.choose(name, *args, **kwargs) == "cpp"


def outputs(name: str, args: Any, kwargs: Any) -> Any:
    torch.manual_seed(0)
    return ops.OPS[name].function(*args, **kwargs)


@pytest.mark.parametrize("name", ops.OPS)
def test_without_the_extension_every_op_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args, kwargs = ops.OPS[name].example("cpu")
    usual = outputs(name, args, kwargs)
    monkeypatch.setattr(native, "extension", lambda: None)
    assert native.levels() == () and native.reasons(torch.ones(1)) == [NOT_BUILT]
    assert ops.dispatch.choose(name, *args, **kwargs) == "torch"
    torch.testing.assert_close(outputs(name, args, kwargs), usual)
    if name in HAVE_KERNELS:
        with ops.backend("cpp"), pytest.raises(RuntimeError, match=re.escape(f"cannot run {name}: {NOT_BUILT}")):
            outputs(name, args, kwargs)


@pytest.mark.native
@has_native
def test_info_names_the_level_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLORENCE_FAST_CPU", "scalar")
    (said,) = [row["what"] for row in info.devices() if row["device"] == "cpu, native kernels"]
    assert said == f"scalar; {', '.join(native.levels())} run here"


def test_without_the_extension_info_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "extension", lambda: None)
    assert {"device": "cpu, native kernels", "what": NOT_BUILT} in info.devices()
    rows = {(row["op"], row["backend"]): row["here"] for row in info.ops()}
    if not torch.cuda.is_available():
        assert all(rows[name, "cpp"] == [NOT_BUILT] for name in HAVE_KERNELS)
        assert all(rows[name, "torch"] == ["used here"] for name in ops.OPS)


THREADS = """
import json, os, torch
from florence_fast import native
from florence_fast.ops.mlp import cpp as mlp_cpp
from tests.ops.test_every_op import example, outputs_and_gradients

def threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(2)
x = torch.randn(1000, 1000)
(x + x) @ x  # torch's pool is running
before = threads()
for count in (2, 1, 2):
    torch.set_num_threads(count)
    mlp_cpp.bias_activation_fwd(x, None, "gelu", False)
pools = {line.split()[-1] for line in open("/proc/self/maps") if "omp.so" in line or "omp5.so" in line}
print(json.dumps([before, threads(), sorted(pools)]))
"""


@pytest.mark.native
@has_native
@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_it_runs_on_the_threads_of_torch() -> None:
    """A second OpenMP runtime in the process would bring threads of its own, and both would fight for the cores."""
    shown = subprocess.run([sys.executable, "-c", THREADS], cwd=ROOT, capture_output=True, text=True, check=True)
    before, after, pools = json.loads(shown.stdout)
    assert after == before and len([pool for pool in pools if "gomp" in pool]) == 1, shown.stdout


@pytest.mark.native
@has_native
def test_bit_equal_for_any_number_of_threads_and_callers() -> None:
    """The interpreter lock is free while a kernel runs: several threads may be in one at once."""
    x, usual = torch.randn(300, 501), torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(gelu(x))
    finally:
        torch.set_num_threads(usual)
    with ThreadPoolExecutor(4) as pool:
        found += pool.map(gelu, [x] * 8)
    assert all(torch.equal(other, found[0]) for other in found[1:])


@pytest.mark.native
def test_no_code_of_one_level_can_be_linked_into_another() -> None:
    """The linker keeps one copy of a weak symbol: one of std, compiled with AVX-512, would reach plain processors."""
    nm, objects = shutil.which("nm"), sorted(ROOT.glob("build/temp.*/*.*.o"))
    if not nm or not objects:
        pytest.skip("needs nm and the objects of a build")
    found = []
    for path in objects:
        level = path.name.split(".")[1]
        assert level in native.LEVELS, path
        shown = subprocess.run([nm, "-C", "--defined-only", str(path)], capture_output=True, text=True, check=True)
        symbols = re.findall(r"^\w* W (.*)$", shown.stdout, re.MULTILINE)
        ours = rf"\bff::{level}::|^__clang_call_terminate$"  # which Clang adds: two calls, no vector
        found += [f"{path.name}: {name}" for name in symbols if not re.search(ours, name)]
    assert not found, "\n".join(found)


@pytest.mark.native
@has_native
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64, "meta"], ids=str)
@pytest.mark.parametrize("name", sorted(HAVE_KERNELS))
def test_the_default_dtype_and_device_are_not_ours(name: str, default: torch.dtype | str) -> None:
    """Memory that a kernel writes to has the type that the kernel writes, wherever new tensors go at the time."""
    args, kwargs = example(name, "cpu")
    expected, usual = outputs_and_gradients(name, args, kwargs), torch.get_default_dtype()
    try:
        if isinstance(default, torch.dtype):
            torch.set_default_dtype(default)
        with torch.device(default if default == "meta" else "cpu"), ops.backend("cpp"):
            got = outputs_and_gradients(name, args, kwargs)
    finally:
        torch.set_default_dtype(usual)
    assert len(got) == len(expected)
    for x, y in zip(got, expected, strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)
