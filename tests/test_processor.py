"""What the system says about the processor."""

import platform
from pathlib import Path

import pytest

from florence_fast import processor

SHOWN = "processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: Intel(R) Xeon(R) Gold 6454S\n\nprocessor\t: 1\n"


@pytest.fixture(autouse=True)
def anew() -> None:
    processor._cpuinfo.cache_clear()
    yield
    processor._cpuinfo.cache_clear()


def test_linux_describes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text(SHOWN)
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    assert (processor.vendor(), processor.name()) == ("GenuineIntel", "Intel(R) Xeon(R) Gold 6454S")


@pytest.mark.parametrize(
    ("given", "vendor"), [("AMD64 Family 25 Model 1 Stepping 1, AuthenticAMD", "AuthenticAMD"), ("arm", ""), ("", "")]
)
def test_elsewhere_python_does(given: str, vendor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "none")
    monkeypatch.setattr(platform, "processor", lambda: given)
    assert processor.vendor() == vendor
    assert processor.name() == (given or platform.machine())
