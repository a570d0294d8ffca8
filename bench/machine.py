"""What a row says about the machine: device, driver, versions, clocks, and the two rates that everything is held to."""

import functools
import hashlib
import importlib.metadata
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from florence_fast.provenance import checkout_commit
from florence_fast.timing import time_calls

ROOT = Path(__file__).parents[1]
PACKAGES = (
    *("torch", "triton", "transformers", "timm", "torchvision", "xformers", "apex", "open_clip_torch"),
    *("liger_kernel", "inf_cl", "siglip-kernel", "numpy", "pytest"),
)
WHAT_DECIDES_A_ROW = (
    "kernels",
    "florence_fast/ops",
    "florence_fast/verify",
    "bench/ops",
    "bench/competitors.py",
    "bench/competitors_losses.py",
    "bench/competitors_windows.py",
    "bench/gpu/models.py",
    "bench/gpu/pretraining.py",
    "bench/session.py",
    "bench/harness.py",
)
KINDS = ("py", "json", "cpp", "h")
"""What counts as a source in a folder."""


def facts(device: torch.device) -> dict[str, Any]:
    """Return what every row carries about where and when it was made."""
    found: dict[str, Any] = {
        "device": device_name(device),
        "arch": None,
        "num_sms": None,
        "driver": None,
        "torch": torch.__version__,
        "triton": version("triton"),
        "cuda": torch.version.cuda,
        "commit": checkout_commit(),
        "sources": sources(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found |= {"arch": card.major * 10 + card.minor, "num_sms": card.multi_processor_count}
        found["driver"] = smi("driver_version").get("driver_version")
    return found


def device_name(device: torch.device) -> str:
    """Return the card's name, or the processor's vector instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.backends.cpu.get_cpu_capability()}"


def where(row: Mapping[str, Any]) -> str:
    """Return the processor and the vector instructions of a row; older rows have no processor."""
    return ", ".join(part for part in (row.get("processor"), row["device"]) if part)


def slug(name: str) -> str:
    """Return a device's name as a part of a file's name.

    >>> slug("NVIDIA H100 80GB HBM3")
    'nvidia_h100_80gb_hbm3'
    """
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def version(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def sources(parts: tuple[str, ...] = WHAT_DECIDES_A_ROW, torch_: str = torch.__version__, triton: Any = None) -> str:
    """Return a digest of the files, and of the versions, that decide a row: a row of other sources is out of date.

    It is not the commit, because storing the results is a commit as well. With the versions of a stored row, the
    digest differs from the row's only where a file has changed.
    """
    digest = hashlib.sha256(f"{torch_} {version('triton') if triton is None else triton}".encode())
    for part in parts:
        path = ROOT / part
        inside = [file for kind in KINDS for file in path.rglob(f"*.{kind}")]
        for file in [path] if path.is_file() else sorted(inside):
            digest.update(file.relative_to(ROOT).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def recorded(rows: Sequence[Mapping[str, Any]], parts: tuple[str, ...] = WHAT_DECIDES_A_ROW) -> str:
    """Say when rows were recorded, and whether a file that decides them has changed since."""
    dates = sorted({row["date"] for row in rows})
    when = f"recorded {dates[0]}" + (f" to {dates[-1]}" if len(dates) > 1 else "")
    runs = {(row["sources"], row["torch"], str(row["triton"])) for row in rows}
    stale = any(digest != sources(parts, *versions) for digest, *versions in runs)
    return f"{when}, before the latest change of the code that it measures" if stale else when


def smi(*fields: str) -> dict[str, str]:
    """Ask nvidia-smi about the first card; empty where it is not there or does not know."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (value.strip() for value in shown.split(",")), strict=True))


def clocks_under_load(call: Callable[[], Any], seconds_of_call: float) -> dict[str, float | None]:
    """Return the multiprocessors' clock in MHz, the temperature and the power while ``call`` runs again and again."""
    fields = {"clocks.sm": "sm_clock_mhz", "temperature.gpu": "temperature", "power.draw": "power_watts"}
    for _ in range(min(1000, max(3, round(0.15 / seconds_of_call)))):
        call()
    shown = smi(*fields)
    torch.cuda.synchronize()
    return {name: _number(shown.get(field)) for field, name in fields.items()}


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text is not None else None
    except ValueError:
        return None


def copy_bandwidth(device: torch.device, *, small: bool) -> float:
    """Return bytes a second, read and written, of a large copy on ``device``."""
    size = (8 << 20) if small else (1 << 30) if device.type == "cuda" else (256 << 20)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timing = time_calls({"copy": [lambda: target.copy_(source)]}, device, 0.05 if small else 0.5)["copy"]
    return 2 * size / timing.median


def matrix_rate(device: torch.device, *, small: bool) -> float:
    """Return FLOPs a second of a large bfloat16 product on ``device``."""
    side = 128 if small else 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    timing = time_calls({"product": [lambda: a @ b]}, device, 0.05 if small else 0.5)["product"]
    return 2 * side**3 / timing.median


class Clock:
    """The time that a run may take."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes

    def left(self) -> float:
        """Seconds until the limit; negative behind it."""
        return self.end - time.monotonic()
