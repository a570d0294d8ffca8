"""Bar chart of a profile's ranges: total time, and time outside of nested ranges."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from florence_fast.files import replacing

TEAL, PALE = "#0f766e", "#a7d8d2"
MOST = 24


def draw_ranges(path: Path, found: dict[str, Any]) -> None:
    """Write a PNG of the ``MOST`` longest ranges.

    Args:
        path: the file; its folder is made.
        found: what `profile` returns.
    """
    rows = found["ranges"][:MOST][::-1]
    names = [row["name"] for row in rows]
    figure = Figure(figsize=(9, 1.4 + 0.28 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.barh(names, [row["total_ms"] for row in rows], color=PALE, label="with the ranges inside")
    axes.barh(names, [row["self_ms"] for row in rows], color=TEAL, label="of its own", height=0.5)
    for row in rows:
        axes.annotate(f" {100 * row['share']:.1f}%", (row["total_ms"], row["name"]), va="center", fontsize=8)
    workload, unit = found["workload"], "of kernels" if found["time"] == "kernels" else "of CPU time"
    kind = "training step" if workload["train"] else "forward pass"
    axes.set_title(
        f"{workload['model']}, {kind}, batch {workload['batch_size']}, {workload['precision']}: {found['device']}",
        loc="left",
        fontsize=10,
    )
    axes.set_xlabel(f"milliseconds {unit} a step, profiler included")
    axes.margins(x=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", labelsize=8)
    axes.legend(loc="lower right", frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        figure.savefig(beside, dpi=120, format="png")
