"""The run as a chart: loss, and accuracy on the unseen artist, against seconds of training."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

TEAL, CORAL, GREY = "#0f766e", "#dc5f45", "#888888"


def draw_curves(path: Path, history: Sequence[dict[str, Any]]) -> None:
    """Draw the loss beside the zero-shot accuracy.

    Args:
        path: the PNG to write.
        history: records of ``results.jsonl``: those with "loss" and "seconds", those with "top1", "top5", "image_size".
    """
    losses = [record for record in history if "loss" in record]
    measured = [record for record in history if "top1" in record]
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)

    # A line through one point cannot be seen.
    marker = "o" if len(losses) == 1 else None
    left.plot([r["seconds"] for r in losses], [r["loss"] for r in losses], color=TEAL, marker=marker)
    left.set(title="contrastive loss", xlabel="seconds of training", ylim=(0, None), xlim=(0, None))

    seconds = [r["seconds"] for r in measured]
    for key, name, colour in (("top5", "among the first 5", CORAL), ("top1", "first", TEAL)):
        shares = [100 * r[key] for r in measured]
        right.plot(seconds, shares, color=colour, marker="o", markersize=3, label=f"{name}: {shares[-1]:.1f}%")
    for before, after in pairwise(measured):
        if before["image_size"] != after["image_size"]:
            right.axvline(before["seconds"], color=GREY, linewidth=0.8, linestyle=":")
            right.annotate(
                f" {after['image_size']} px",
                (before["seconds"], 1),
                color=GREY,
                xycoords=("data", "axes fraction"),
                va="top",
            )
    right.set(title="right name of an unseen artist's image, %", xlabel="seconds of training", xlim=(0, None))
    right.set_ylim(0, None)
    right.legend(loc="lower right", frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#eeeeee")
    figure.savefig(path, dpi=120)
