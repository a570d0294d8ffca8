"""Which precision a word means on a device, on processors that are held to other instructions than their own."""

import logging
from collections.abc import Callable, Iterator

import pytest
import torch

from florence_fast import precision, processor
from florence_fast.precision import PRECISIONS, autocast, choose_precision, resolve_precision

HELD = ("FLORENCE_FAST_CPU", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
Given = Callable[..., None]


@pytest.fixture
def given_flags(monkeypatch: pytest.MonkeyPatch) -> Iterator[Given]:
    """Let the processor be one with these flags, and PyTorch one that uses what they stand for."""

    def give(*flags: str, machine: str = "x86_64", library: bool = True) -> None:
        monkeypatch.setattr(processor, "_cpuinfo_flags", lambda: frozenset(("fpu", *flags)))
        monkeypatch.setattr(processor.platform, "machine", lambda: machine)
        monkeypatch.setattr(processor, "_library_multiplies", lambda format: library)
        processor._units.cache_clear()

    for name in HELD:
        monkeypatch.delenv(name, raising=False)
    precision._warn_once.cache_clear()
    yield give
    processor._units.cache_clear()
    precision._warn_once.cache_clear()


@pytest.mark.parametrize(
    ("flags", "machine", "wanted", "reason"),
    [
        (("avx2",), "x86_64", "fp32", "no bf16 units"),
        (("avx2", "avx512f"), "x86_64", "fp32", "no bf16 units"),
        (("avx512f", "avx512_bf16"), "x86_64", "amp_bf16", "AVX-512 bf16"),
        (("avx512_bf16", "amx_bf16"), "AMD64", "amp_bf16", "AMX"),
        (("asimd",), "aarch64", "fp32", "no bf16 units"),
        (("asimd", "bf16"), "aarch64", "amp_bf16", "Arm bf16"),
    ],
)
def test_auto_follows_the_processor(given_flags: Given, flags, machine, wanted, reason) -> None:
    given_flags(*flags, machine=machine)
    choice = choose_precision("auto", "cpu")
    assert choice.precision == wanted
    assert reason in choice.reason
    assert "\n" not in str(choice)
    assert choose_precision("amp", "cpu") == choice


@pytest.mark.parametrize(
    ("variable", "value", "fast"),
    [
        ("FLORENCE_FAST_CPU", "avx2", False),
        ("FLORENCE_FAST_CPU", "avx512", False),
        ("FLORENCE_FAST_CPU", "avx512_bf16", True),
        ("ATEN_CPU_CAPABILITY", "avx2", False),
        ("ATEN_CPU_CAPABILITY", "default", False),
        ("ATEN_CPU_CAPABILITY", "avx512", True),
        ("ONEDNN_MAX_CPU_ISA", "AVX2", False),
        ("ONEDNN_MAX_CPU_ISA", "avx512_core", False),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_AMX", True),
        ("DNNL_MAX_CPU_ISA", "AVX2", False),
    ],
)
def test_a_variable_that_holds_the_processor_counts_at_once(
    given_flags: Given, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, fast: bool
) -> None:
    given_flags("avx512_bf16", "amx_bf16")
    assert processor.units("bf16").fast
    monkeypatch.setenv(variable, value)
    found = processor.units("bf16")
    assert found.fast == fast
    assert fast or f"{variable}={value}" in found.reason


def test_a_pytorch_that_leaves_the_units_unused_counts(given_flags: Given) -> None:
    given_flags("amx_bf16", library=False)
    assert choose_precision("auto", "cpu").precision == "fp32"


@pytest.mark.parametrize(
    ("capability", "wanted"), [((7, 5), "fp32"), ((8, 0), "amp_bf16"), ((9, 0), "amp_bf16"), ((12, 0), "amp_bf16")]
)
def test_auto_follows_the_gpu(monkeypatch: pytest.MonkeyPatch, capability, wanted) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    choice = choose_precision("auto", "cuda:1")
    assert choice.precision == wanted
    assert f"a card, compute capability {capability[0]}.{capability[1]}" in choice.reason
    assert choose_precision("amp", "cuda").precision == "amp"


def test_every_word_resolves_to_one_that_resolves_to_itself(given_flags: Given) -> None:
    for flags in ((), ("amx_bf16", "amx_fp16")):
        given_flags(*flags)
        for word in PRECISIONS:
            resolved = resolve_precision(word, "cpu")
            assert resolved not in ("auto", "amp", "amp_bfloat16")
            assert resolve_precision(resolved, "cpu") == resolved
    assert resolve_precision("amp_bfloat16", "cpu") == "amp_bf16"


def test_a_slow_word_warns_once_and_names_the_way_out(given_flags: Given, caplog: pytest.LogCaptureFixture) -> None:
    given_flags("avx2")
    for word in ("amp_bf16", "amp_bfloat16", "amp_bf16", "fp32", "auto", "amp"):
        resolve_precision(word, "cpu")
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "amp_bf16 gains nothing here, since this processor has no bf16 units: use fp32, or auto" in warning
    assert "\n" not in warning


def test_a_fast_word_does_not_warn(given_flags: Given, caplog: pytest.LogCaptureFixture) -> None:
    given_flags("avx512_bf16")
    for word in ("amp_bf16", "bf16", "auto", "fp32"):
        resolve_precision(word, "cpu")
    resolve_precision("fp16", "cuda")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("call", [choose_precision, resolve_precision, autocast, precision.gradient_scaler])
def test_an_unknown_word_names_the_nearest(call) -> None:
    with pytest.raises(ValueError, match=r"unknown precision 'amp_bf61' \(did you mean 'amp_bf16'\?\)"):
        call("amp_bf61", "cpu")


def test_autocast_is_of_the_word(given_flags: Given) -> None:
    x = torch.ones(2, 2)
    for flags, auto in (((), torch.float32), (("amx_bf16",), torch.bfloat16)):
        given_flags(*flags)
        for word, dtype in {"auto": auto, "amp": auto, "fp32": torch.float32, "amp_bf16": torch.bfloat16}.items():
            with autocast(word, torch.device("cpu")):
                assert (x @ x).dtype == dtype, word
    with autocast("bf16", "cpu"):
        assert (x @ x).dtype == torch.float32, "its products follow the weights"


@pytest.mark.parametrize("word", PRECISIONS)
def test_only_fp16_scales_gradients(word: str) -> None:
    scaler = precision.gradient_scaler(word, "cpu")
    assert scaler.is_enabled() == (word == "fp16")
    assert scaler.get_scale() == (256 if word == "fp16" else 1)


def test_units_of_this_machine_are_said_without_the_native_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("florence_fast.native._C", None)
    for format in ("bf16", "fp16"):
        found = processor.units(format)
        assert isinstance(found.fast, bool)
        assert format in found.reason
