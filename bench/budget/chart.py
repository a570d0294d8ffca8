"""Draw the static budget: for each GPU, the clocks of every unit as a part of the clocks that set the floor.

One chart of window attention, whose floor is memory, one of its long windows, whose floor is the exponentials, and
one of the other ops, whose floor is memory or the products.
"""

from pathlib import Path
from typing import Any

from bench.budget.rules import exp2_floor
from florence_fast.files import replacing

COLOURS = {
    "issue": "#9aa5b1",
    "fma": "#4c78a8",
    "alu": "#72b7b2",
    "mufu": "#b279a2",
    "tensor": "#54a24b",
    "lsu": "#e9a23b",
    "shared": "#d88c9a",
    "memory": "#d62728",
}
NAMES = {
    "issue": "instruction issue",
    "fma": "float32 arithmetic",
    "alu": "compare, select, integer",
    "mufu": "exp2",
    "tensor": "tensor cores",
    "lsu": "loads, stores, shuffles",
    "shared": "shared memory",
    "memory": "memory",
}
WINDOW_BARS = ("issue", "fma", "alu", "mufu", "tensor", "lsu")


def draw(rows: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Write three charts for each GPU: the bfloat16 cases with a bar for each unit; return the files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for machine in dict.fromkeys(row["machine"] for row in rows):
        for prefix, (subject, units, wanted, bars) in CHARTS.items():
            chosen = [row for row in rows if row["machine"] == machine and wanted(row)]
            if not chosen:
                continue
            figure, axes = plt.subplots(figsize=(9, 1.3 + 0.82 * len(chosen)), dpi=110, layout="constrained")
            _fill(axes, chosen, bars)
            axes.set_title(f"{subject} on {_article(machine)} {machine}, from the machine code: one {units}")
            path = folder / f"{prefix}_{machine.lower()}.png"
            with replacing(path) as beside:
                figure.savefig(beside, format="png")
            plt.close(figure)
            written.append(path)
    return written


def _is_window(row: dict[str, Any]) -> bool:
    mine = row["op"] == "window_attention" and row["dtype"] == "bf16" and not row["error"]
    return mine and row["head_dim"] == 32 and not _is_long(row) and not row["safe_dots"]


def _is_long(row: dict[str, Any]) -> bool:
    return row["limits"]["of_exp2"] is not None and row["dtype"] == "bf16" and not row["error"]


def _is_other(row: dict[str, Any]) -> bool:
    return row["op"] != "window_attention" and shown(row) and not row["error"]


CHARTS = {
    "budget": ("Window attention", "window and head", _is_window, WINDOW_BARS),
    "budget_long": ("Attention in long windows", "window and head", _is_long, tuple(COLOURS)),
    "budget_ops": ("The other ops", "tile or row", _is_other, tuple(COLOURS)),
}
"""By file: what is shown, of how much each, which rows, and which units."""


def shown(row: dict[str, Any]) -> bool:
    """Whether a case of another op is shown on the page: one size of each form, if a floor is promised for it."""
    limits = row["limits"]
    promised = limits["of_memory"] is not None or limits["tensor_share"] is not None
    return row["tier"] == "quick" and promised


def floor(row: dict[str, Any]) -> float:
    """Return the clocks that an ideal kernel needs: memory's, or those of exponentials or products if they are more."""
    if row["op"] != "window_attention":
        return max(row["memory_floor"], row["product_floor"])
    return exp2_floor(row) if _is_long(row) else row["memory_floor"]


def _article(machine: str) -> str:
    return "an" if machine.startswith(("A", "H")) else "a"


def _fill(axes: Any, rows: list[dict[str, Any]], pipes: tuple[str, ...]) -> None:
    """Draw the bars of all cases, the first on top, and the line that memory or the products set."""
    height = 0.8 / len(pipes)
    widest = 1.0
    for number, pipe in enumerate(pipes):
        places = [case + (number - (len(pipes) - 1) / 2) * height for case in range(len(rows))]
        clocks = [row["memory_floor"] if pipe == "memory" else row["pipes"][pipe] for row in rows]
        parts = [count / floor(row) for count, row in zip(clocks, rows, strict=True)]
        widest = max(widest, *parts)
        bars = axes.barh(places, parts, height * 0.92, color=COLOURS[pipe], label=NAMES[pipe])
        numbers = [f"{count:,.0f}" if count else "" for count in clocks]
        _clear(axes.bar_label(bars, numbers, padding=2, fontsize=6, color="#555555", zorder=4))
    what = "memory takes"
    if "memory" in pipes:
        what = f"memory or the {'exponentials' if all(map(_is_long, rows)) else 'products'} take"
    axes.axvline(1, color="#d62728", linewidth=1.6, label=f"what {what}")
    labels = [f"{_label(row)}\n{_floor_name(row)} {floor(row):,.0f} clocks" for row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.set_xlim(0, widest + 0.12)
    axes.xaxis.set_major_formatter(lambda part, _: f"{part:.0%}")
    axes.set_xlabel(f"clocks of each unit, as a part of the clocks that {what}", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#e5e5e5")
    axes.set_axisbelow(True)
    axes.legend(loc="upper center", bbox_to_anchor=(0.42, -0.07), ncols=4, fontsize=8, frameon=False)


def _clear(labels: list[Any]) -> None:
    """Keep the line of the floor from crossing the numbers."""
    for label in labels:
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.4})


def _label(row: dict[str, Any]) -> str:
    """The case in a few words; all are bfloat16, and windows have the same head dim."""
    return row["case"].replace(" d32", "").replace(" bf16", "")


def _floor_name(row: dict[str, Any]) -> str:
    if floor(row) == row["memory_floor"]:
        return "memory"
    return "exp2" if _is_long(row) else "products"
