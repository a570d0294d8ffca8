"""Draw the static budget: for each GPU, the clocks of every unit as a part of the clocks that memory takes."""

from pathlib import Path
from typing import Any

from florence_fast.files import replacing

COLOURS = {
    "issue": "#9aa5b1",
    "fma": "#4c78a8",
    "alu": "#72b7b2",
    "mufu": "#b279a2",
    "tensor": "#54a24b",
    "lsu": "#e9a23b",
}
NAMES = {
    "issue": "instruction issue",
    "fma": "float32 arithmetic",
    "alu": "compare, select, integer",
    "mufu": "exp2",
    "tensor": "tensor cores",
    "lsu": "loads, stores, shuffles",
}


def draw(rows: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Write one picture for each GPU: the bfloat16 cases at head dim 32 with a bar for each unit; return the files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for machine in dict.fromkeys(row["machine"] for row in rows):
        chosen = [row for row in rows if row["machine"] == machine and _drawn(row)]
        if not chosen:
            continue
        figure, axes = plt.subplots(figsize=(9, 1.3 + 0.82 * len(chosen)), dpi=110, layout="constrained")
        _fill(axes, chosen)
        axes.set_title(f"Window attention on {_article(machine)} {machine}, from the machine code: one window and head")
        path = folder / f"budget_{machine.lower()}.png"
        with replacing(path) as beside:
            figure.savefig(beside, format="png")
        plt.close(figure)
        written.append(path)
    return written


def _drawn(row: dict[str, Any]) -> bool:
    return row["dtype"] == "bf16" and row["head_dim"] == 32 and not row["safe_dots"] and not row["error"]


def _article(machine: str) -> str:
    return "an" if machine.startswith(("A", "H")) else "a"


def _fill(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Draw the bars of all cases, the first on top, and the line that memory sets."""
    height = 0.8 / len(COLOURS)
    for number, (pipe, colour) in enumerate(COLOURS.items()):
        places = [case + (number - (len(COLOURS) - 1) / 2) * height for case in range(len(rows))]
        parts = [row["pipes"][pipe] / row["memory_floor"] for row in rows]
        bars = axes.barh(places, parts, height * 0.92, color=colour, label=NAMES[pipe])
        clocks = [f"{row['pipes'][pipe]:,.0f}" for row in rows]
        labels = axes.bar_label(bars, clocks, padding=2, fontsize=6, color="#555555", zorder=4)
        _clear(labels)
    axes.axvline(1, color="#d62728", linewidth=1.6, label="what memory takes")
    labels = [f"{_label(row)}\nmemory {row['memory_floor']:,.0f} clocks" for row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.set_xlim(0, max(1.12, *(row["ratio"] + 0.12 for row in rows)))
    axes.xaxis.set_major_formatter(lambda part, _: f"{part:.0%}")
    axes.set_xlabel("clocks of each unit, as a part of the clocks in which memory moves the window", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#e5e5e5")
    axes.set_axisbelow(True)
    axes.legend(loc="upper center", bbox_to_anchor=(0.42, -0.07), ncols=4, fontsize=8, frameon=False)


def _clear(labels: list[Any]) -> None:
    """Keep the line of memory from crossing the numbers."""
    for label in labels:
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.4})


def _label(row: dict[str, Any]) -> str:
    """The case in two or three words; all are of the same dtype and head dim."""
    words = [f"{row['window']}x{row['window']}", row["direction"], *["shifted"] * row["shifted"]]
    return " ".join(words)
