"""The stored rows by device, and the figures that follow from a row: speed, floors, part of the roofline."""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bench.store import Row

EXP2_PER_CLOCK = 16
"""What one multiprocessor of an A100 or H100 computes in a clock."""
PASSES = {"forward": 1, "backward": 1, "both": 2}
PRODUCTS = {"forward": 2, "backward": 4, "both": 6}
"""Products of N x N x d in window attention, as its formula of FLOPs counts them."""
NEEDED = ("op", "shape", "sizes", "dtype", "mode", "status", "device")
OURS = "ours"


@dataclass
class Device:
    """All that was measured on one device."""

    name: str
    rows: list[Row] = field(default_factory=list)
    stages: dict[str, Row] = field(default_factory=dict)

    @property
    def is_gpu(self) -> bool:
        return not self.name.startswith("CPU")

    def timed(self) -> list[Row]:
        return [row for row in self.rows if row["status"] == "timed"]


def read_devices(folder: Path) -> list[Device]:
    """Read every file of ``folder`` that holds rows of the harness: GPUs first, then CPUs; other results are passed by.

    Raises:
        ValueError: a file is no JSON, or a row lacks what every row has; the message names them.
    """
    devices: dict[str, Device] = {}
    for path in sorted(folder.glob("*.json")):
        for device in _read(path):
            known = devices.setdefault(device.name, Device(device.name))
            known.rows += device.rows
            known.stages |= device.stages
    return sorted(devices.values(), key=lambda device: (not device.is_gpu, device.name))


def read_rows(path: Path) -> list[Row]:
    """Read the rows of one file of the harness.

    Raises:
        ValueError: the file holds none.
    """
    rows = [row for device in _read(path) for row in device.rows]
    if not rows:
        raise ValueError(f"{path} must hold rows of the benchmarks, got none")
    return rows


def _read(path: Path) -> list[Device]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} must hold JSON, got {type(error).__name__}: {error}") from error
    rows = stored.get("rows") if isinstance(stored, dict) else None
    # Other results have rows as well: those of the static budget are compiled kernels.
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and {"key", "competitor"} <= row.keys() for row in rows
    ):
        return []
    devices: dict[str, Device] = {}
    for row in rows:
        _check(row, path)
        devices.setdefault(row["device"], Device(row["device"])).rows.append(row)
    for name, record in stored.get("stages", {}).items():
        device = (record.get("details") or {}).get("device")
        for known in devices.values():
            if device in (None, known.name):
                known.stages[name] = record
    return list(devices.values())


def _check(row: Row, path: Path) -> None:
    missing = [name for name in NEEDED if name not in row]
    if missing:
        raise ValueError(f"{path}: row {row['key']!r} must have {', '.join(missing)}")
    if row["status"] != "timed":
        return
    times = [row.get(name) for name in ("q20", "median", "q80")]
    if not all(isinstance(time, int | float) for time in times) or not 0 < times[0] <= times[1] <= times[2]:
        raise ValueError(f"{path}: row {row['key']!r} must have 0 < q20 <= median <= q80, got {times}")


def is_ours(row: Row) -> bool:
    """Whether the row is of one of this package's backends."""
    return row["competitor"].startswith(OURS)


def fastest(rows: Iterable[Row]) -> Row | None:
    """Return the row with the smallest median; None if there is no row."""
    return min(rows, key=lambda row: row["median"], default=None)


def groups(rows: Iterable[Row]) -> Iterator[tuple[tuple[str, str, str, str], dict[str, Row]]]:
    """Give (op, shape, dtype, mode) with the rows by competitor, in the order of the rows."""
    found: dict[tuple[str, str, str, str], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row["op"], row["shape"], row["dtype"], row["mode"]), {})[row["competitor"]] = row
    yield from found.items()


def figure(row: Row, unit: str, peak: float | None = None) -> float | None:
    """Return a timed row's figure in a unit of the published ones, or None where the row has none.

    Args:
        peak: the FLOPs a second that the device's maker states, for "% MFU".
    """
    if row["status"] != "timed":
        return None
    if unit == "images/s":
        batch = row["sizes"].get("batch")
        return batch / row["median"] if batch else None
    raw, scale = {
        "TFLOP/s": (row.get("flops"), 1e-12 / row["median"]),
        "GB/s": (row.get("bytes_moved"), 1e-9 / row["median"]),
        "ms": (row["median"], 1e3),
        "GB": (row.get("peak_bytes"), 1e-9),
        "% MFU": (row.get("flops"), 100 / row["median"] / peak if peak else 0),
    }[unit]
    return raw * scale if raw and scale else None


def digits(value: float) -> str:
    """Write a figure with about three digits.

    >>> digits(3612.4), digits(36.12), digits(0.0036124)
    ('3,612', '36.1', '0.00361')
    """
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def exp2_count(row: Row) -> float:
    """Return the exponentials that the op cannot but compute: one a logit, and again in the backward.

    Window attention has N^2 of them for each window and head, which its FLOPs over the products and the head dim are.
    """
    head_dim = row["sizes"].get("head_dim")
    if row["op"].startswith("window_attention") and head_dim:
        logits = row["flops"] / (2 * PRODUCTS[row["mode"]] * head_dim)
    elif row["op"] == "contrastive_loss":
        logits = row["sizes"].get("batch", 0) ** 2
    else:
        return 0
    return PASSES[row["mode"]] * logits


def floors(row: Row) -> dict[str, float]:
    """Return the seconds that memory, the tensor cores and exp2 need at the rates measured in the same run.

    The rate of products was measured in bfloat16: rows in float32 have no floor from it. A CPU has none from exp2.
    """
    found = {}
    if row.get("bytes_moved") and row.get("copy_bytes_per_second"):
        found["memory"] = row["bytes_moved"] / row["copy_bytes_per_second"]
    if row.get("flops") and row.get("matrix_flops_per_second") and row["dtype"] in ("bf16", "fp16"):
        found["tensor"] = row["flops"] / row["matrix_flops_per_second"]
    if row.get("sm_clock_mhz") and row.get("num_sms"):
        rate = EXP2_PER_CLOCK * row["num_sms"] * row["sm_clock_mhz"] * 1e6
        found["exp2"] = exp2_count(row) / rate
    return {name: seconds for name, seconds in found.items() if math.isfinite(seconds) and seconds > 0}


def bound(row: Row) -> float | None:
    """Return the seconds that bind: the longest floor; None where no floor is known, or not that of its products."""
    known = floors(row)
    complete = "tensor" in known or not row.get("flops")
    return max(known.values()) if known and complete else None


def roofline(row: Row) -> float | None:
    """Return the part of the roofline that a timed row reaches; None where it is not known what binds."""
    seconds = bound(row)
    return None if seconds is None else seconds / row["median"]
