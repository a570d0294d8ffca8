"""Draw the measured rows: bars against the competitors of each op, the roofline, and the contrastive loss by batch.

What others published stands in the same charts hatched or hollow, under the word "published".
"""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from bench.machine import slug
from bench.report.anchors import Anchors, Published
from bench.report.goals import NOT_MEASURED
from bench.report.rows import PRODUCTS, Device, bound, digits, exp2_count, figure, floors, groups, is_ours
from bench.store import Row
from florence_fast.files import replacing

DTYPES = ("bf16", "fp16", "fp32")
COLOURS = ("#d62728", "#4c78a8", "#54a24b", "#e9a23b", "#b279a2", "#72b7b2", "#9aa5b1", "#d88c9a", "#8c6d31", "#3b3b98")
MODE_MARKERS = {"forward": "o", "backward": "v", "both": "s"}
UNITS = {"inference": "images/s", "training": "images/s", "first_call": "ms"}
SCALING = "contrastive_loss"
MFU = "% MFU"
PUBLISHED_COLOUR = "#555555"
PUBLISHED_STEP = 0.4
"""Height of a published bar, where a group of ours has 1."""
RATES = ("TFLOP/s", "GB/s")
"""Units in which a size has a roofline."""


def chart_names(device: Device, anchors: Anchors) -> dict[str, str]:
    """Return the charts that a device's rows give: file name -> what it shows."""
    return {name: title for name, (title, _) in _charts(device, anchors).items()}


def draw(device: Device, anchors: Anchors, folder: Path) -> list[Path]:
    """Write the charts of a device into ``folder``; return the files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, (title, make) in _charts(device, anchors).items():
        whole = make(plt)
        whole.suptitle(title, fontsize=10)
        with replacing(folder / name) as beside:
            whole.savefig(beside, format="png")
        plt.close(whole)
        written.append(folder / name)
    return written


Make = Callable[[Any], Any]


def _charts(device: Device, anchors: Anchors) -> dict[str, tuple[str, Make]]:
    """The file name, the title and what draws it, for each chart that has something to show."""
    prefix, found = slug(device.name), {}
    # What others have measured on GPUs says nothing beside a CPU.
    published = anchors.published if device.is_gpu else []
    for op in dict.fromkeys(row["op"] for row in device.rows):
        rows = bar_rows(device, op)
        for unit in bar_units(rows, anchors.peak(device.name)):
            name = f"{prefix}_{op}{'_mfu' if unit == MFU else ''}.png"
            shown = [anchor for anchor in published if (anchor.op, anchor.unit) == (op, unit)]
            titled = f"{op} on {device.name}, {rows[0]['dtype']}"
            found[name] = (titled, partial(draw_bars, rows=rows, unit=unit, shown=shown, anchors=anchors))
    points = roofline_rows(device)
    if points:
        title = f"What binds on {device.name}: memory, the tensor cores or exp2"
        found[f"{prefix}_roofline.png"] = (title, partial(draw_roofline, rows=points, published=published))
    batches = scaling_rows(device)
    if batches:
        title = f"The contrastive loss by batch on {device.name}, {batches[0]['dtype']}, {batches[0]['mode']}"
        drawn = partial(draw_scaling, rows=batches, published=published, anchors=anchors)
        found[f"{prefix}_batch.png"] = (title, drawn)
    return found


def _in_first_dtype(rows: list[Row]) -> list[Row]:
    dtype = next((dtype for dtype in DTYPES if any(row["dtype"] == dtype for row in rows)), None)
    return [row for row in rows if row["dtype"] == dtype]


def bar_rows(device: Device, op: str) -> list[Row]:
    """Return the timed rows of an op in one dtype, without those of the backward alone where others are there."""
    rows = _in_first_dtype([row for row in device.timed() if row["op"] == op])
    return [row for row in rows if row["mode"] != "backward"] or rows


def bar_units(rows: list[Row], peak: float | None) -> list[str]:
    """Return the units of an op's bars: FLOPs where there are products, bytes where there are none; models have two."""
    if not rows:
        return []
    default = "TFLOP/s" if all(row.get("flops") for row in rows) else "GB/s"
    unit = UNITS.get(rows[0]["op"], default)
    units = [unit if any(figure(row, unit) for row in rows) else "ms"]
    return units + [MFU] * (unit == "images/s" and peak is not None and any(figure(row, MFU, peak) for row in rows))


def draw_bars(plt: Any, rows: list[Row], unit: str, shown: list[Published], anchors: Anchors) -> Any:
    """Draw a panel for each mode: a group of bars for each size, with a mark at its roofline; published ones below."""
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    peak = anchors.peak(rows[0]["device"])
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    competitors = list(dict.fromkeys(row["competitor"] for row in rows))
    end = len(shapes) + PUBLISHED_STEP * max(sum(anchor.mode == mode for anchor in shown) for mode in modes)
    size = (7 * len(modes), 1.6 + 0.16 * (len(competitors) + 1) * end)
    whole, panels = plt.subplots(1, len(modes), figsize=size, dpi=100, layout="constrained", squeeze=False)
    for axes, mode in zip(panels[0], modes, strict=True):
        for place, shape in enumerate(shapes):
            group = [row for row in rows if (row["shape"], row["mode"]) == (shape, mode)]
            _bar_group(axes, place, group, competitors, unit, peak)
        ticks = dict(enumerate(shapes))
        for number, anchor in enumerate(anchor for anchor in shown if anchor.mode == mode):
            place = len(shapes) - 0.5 + PUBLISHED_STEP * (number + 0.5)
            bar = {"facecolor": "none", "edgecolor": PUBLISHED_COLOUR, "hatch": "////", "linewidth": 0.8}
            axes.barh(place, anchor.value, PUBLISHED_STEP * 0.6, **bar)
            axes.text(anchor.value, place, f" {anchor.value:,g}", va="center", fontsize=6, color=PUBLISHED_COLOUR)
            ticks[place] = f"published: {label(anchor, anchors)}"
        axes.set_yticks(list(ticks), list(ticks.values()), fontsize=7)
        axes.set_ylim(end - 0.45, -0.55)
        axes.set_xlabel(f"{mode}, {unit}", fontsize=8)
        axes.tick_params(axis="x", labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.12)
    _legend(plt, whole, competitors, roofline=any(axes.lines for axes in panels[0]), published=bool(shown))
    return whole


def _bar_group(axes: Any, place: int, group: list[Row], competitors: list[str], unit: str, peak: float | None) -> None:
    """Draw the competitors of one size, and the line that its roofline sets."""
    height = 0.84 / len(competitors)
    for row in group:
        number, value = competitors.index(row["competitor"]), figure(row, unit, peak)
        if value is None:
            continue
        y = place - 0.42 + (number + 0.5) * height
        axes.barh(y, value, height * 0.9, color=COLOURS[number % len(COLOURS)])
        clear = {"facecolor": "white", "edgecolor": "none", "pad": 0.3}  # the line of the roofline may pass here
        written = {"textcoords": "offset points", "va": "center", "fontsize": 5.5, "bbox": clear}
        axes.annotate(digits(value), (value, y), (3, 0), **written)
    seconds = bound(group[0]) if group and unit in RATES else None
    if seconds is not None:
        most = figure({**group[0], "median": seconds}, unit)
        axes.plot([most, most], [place - 0.45, place + 0.45], color="black", linewidth=1.4)


def _legend(plt: Any, whole: Any, competitors: list[str], roofline: bool, published: bool) -> None:
    handles = [
        plt.Rectangle((0, 0), 1, 1, color=COLOURS[number % len(COLOURS)], label=name)
        for number, name in enumerate(competitors)
    ]
    if roofline:
        handles.append(plt.Line2D([], [], color="black", linewidth=1.4, label="roofline"))
    if published:
        named = {"facecolor": "none", "edgecolor": PUBLISHED_COLOUR, "hatch": "////", "label": "published by others"}
        handles.append(plt.Rectangle((0, 0), 1, 1, **named))
    whole.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=7, frameon=False)


def label(anchor: Published, anchors: Anchors) -> str:
    """Name a published figure in a chart: by whom, at which size, on what."""
    size = next((f"{name} {anchor.sizes[name]}" for name in ("window", "model") if name in anchor.sizes), "")
    return f"{anchor.by}, {size + ', ' if size else ''}{anchors.sources[anchor.source].device}"


def roofline_rows(device: Device) -> list[Row]:
    """Return a GPU's timed rows in 16 bits that have FLOPs: the rates of a CPU's cores say nothing of its float32."""
    rows = [row for row in device.timed() if row["dtype"] in ("bf16", "fp16") and row.get("flops")]
    return _in_first_dtype([row for row in rows if floors(row).keys() >= {"memory", "tensor"}]) if device.is_gpu else []


def draw_roofline(plt: Any, rows: list[Row], published: list[Published]) -> Any:
    """Draw FLOPs a second over FLOPs a byte: ours filled, the best competitor light, published ones hollow."""
    whole, axes = plt.subplots(figsize=(11, 6.5), dpi=100, layout="constrained")
    copy, matrix = rows[-1]["copy_bytes_per_second"], rows[-1]["matrix_flops_per_second"]
    reach = [row["flops"] / row["bytes_moved"] for row in rows] + [matrix / copy]
    span = (min(reach) / 3, max(reach) * 3)
    ridge = matrix / copy
    axes.plot(
        [span[0], ridge], [span[0] * copy / 1e12, matrix / 1e12], color="black", label=f"memory, {copy / 1e9:,.0f} GB/s"
    )
    axes.plot(
        [ridge, span[1]], [matrix / 1e12] * 2, color="#777777", label=f"tensor cores, {matrix / 1e12:,.0f} TFLOP/s"
    )
    for number, (name, value) in enumerate(exp2_lines(rows).items()):
        style = (0, (6 - number % 5, 2))
        axes.axhline(value / 1e12, color="#b279a2", linestyle=style, linewidth=1, label=f"exp2, {name}")
    ops = list(dict.fromkeys(row["op"] for row in rows))
    for (op, _, _, mode), group in groups(rows):
        best = min((row for row in group.values() if is_ours(row)), key=lambda row: row["median"], default=None)
        other = min((row for row in group.values() if not is_ours(row)), key=lambda row: row["median"], default=None)
        for row, alpha in ((other, 0.3), (best, 1.0)):
            if row is not None:
                place = (row["flops"] / row["bytes_moved"], figure(row, "TFLOP/s"))
                axes.plot(
                    *place, MODE_MARKERS[mode], color=COLOURS[ops.index(op) % len(COLOURS)], alpha=alpha, markersize=6
                )
    hollow = {"markerfacecolor": "none", "markeredgecolor": PUBLISHED_COLOUR, "markersize": 7, "linestyle": "none"}
    for anchor in published:
        intensity = window_intensity(anchor)
        if intensity is not None and anchor.op in ops:
            axes.plot(intensity, anchor.value, MODE_MARKERS[anchor.mode], **hollow)
    handles = axes.get_legend_handles_labels()[0]
    for number, op in enumerate(ops):
        handles.append(
            plt.Line2D([], [], color=COLOURS[number % len(COLOURS)], marker="o", linestyle="none", label=f"{op}, ours")
        )
    for mode in dict.fromkeys(row["mode"] for row in rows):
        handles.append(plt.Line2D([], [], color="#333333", marker=MODE_MARKERS[mode], linestyle="none", label=mode))
    handles.append(
        plt.Line2D([], [], color="#333333", alpha=0.3, marker="o", linestyle="none", label="best competitor")
    )
    handles.append(plt.Line2D([], [], marker="o", **hollow, label="published by others, their devices"))
    axes.set(xscale="log", yscale="log", xlim=span, xlabel="FLOPs a byte that must move", ylabel="TFLOP/s")
    axes.grid(color="#eeeeee", which="both")
    whole.legend(handles=handles, fontsize=7, frameon=False, loc="outside right upper")
    return whole


def exp2_lines(rows: list[Row]) -> dict[str, float]:
    """Return the FLOPs a second at which exp2 binds window attention, by mode and head dim; none without a clock."""
    found = {}
    for row in rows:
        if row["op"].startswith("window_attention") and "exp2" in floors(row) and exp2_count(row):
            found[f"window attention, {row['mode']}, d={row['sizes']['head_dim']}"] = row["flops"] / floors(row)["exp2"]
    return found


def window_intensity(anchor: Published) -> float | None:
    """Return FLOPs a byte of a published figure of window attention in 16 bits; None for any other.

    The products do 2 N^2 d each over the streams of N d values that must pass through memory.
    """
    if anchor.op != "window_attention" or anchor.unit != "TFLOP/s" or "window" not in anchor.sizes:
        return None
    streams = {"forward": 4, "backward": 7, "both": 11}[anchor.mode]
    return PRODUCTS[anchor.mode] * 2 * anchor.sizes["window"] ** 2 / (streams * 2)


def scaling_rows(device: Device) -> list[Row]:
    """Return the timed rows of CLIP's loss in one dtype, of both passes where there are such rows."""
    rows = [row for row in device.timed() if row["op"] == SCALING and {"batch", "dim"} <= row["sizes"].keys()]
    rows = [row for row in rows if not row["sizes"].get("names")]
    rows = _in_first_dtype(rows)
    return [row for row in rows if row["mode"] == "both"] or [row for row in rows if row["mode"] == "forward"]


def draw_scaling(plt: Any, rows: list[Row], published: list[Published], anchors: Anchors) -> Any:
    """Draw time and peak memory over the batch: a line for each competitor and embedding dim."""
    whole, panels = plt.subplots(1, 2, figsize=(12, 6), dpi=100, layout="constrained")
    competitors = list(dict.fromkeys(row["competitor"] for row in rows))
    dims = sorted({row["sizes"]["dim"] for row in rows})
    for axes, unit in zip(panels, ("ms", "GB"), strict=True):
        for number, competitor in enumerate(competitors):
            for dim, style in zip(dims, ("-", "--", ":", "-.") * len(dims), strict=False):
                points = _points(rows, competitor, dim, unit)
                if points:
                    line = {"color": COLOURS[number % len(COLOURS)], "linestyle": style, "marker": "o", "markersize": 4}
                    axes.plot(*zip(*points, strict=True), **line, label=f"{competitor}, D={dim}")
        shown = [a for a in published if (a.op, a.mode, a.unit) == (SCALING, rows[0]["mode"], unit)]
        for number, by in enumerate(dict.fromkeys(anchor.by for anchor in shown)):
            points = [(anchor.sizes["batch"], anchor.value) for anchor in shown if anchor.by == by]
            device = next(anchors.sources[anchor.source].device for anchor in shown if anchor.by == by)
            hollow = {"markerfacecolor": "none", "markeredgecolor": PUBLISHED_COLOUR, "linestyle": "none"}
            named = {"marker": "sD^v<>"[number % 6], "label": f"published: {by}, {device}"}
            axes.plot(*zip(*points, strict=True), **named, **hollow)
        axes.set(yscale="log", xlabel="pairs", ylabel={"ms": "ms", "GB": "peak memory, GB"}[unit])
        axes.set_xscale("log", base=2)
        axes.grid(color="#eeeeee")
        if not any(figure(row, unit) for row in rows):
            axes.set_title(NOT_MEASURED, fontsize=9)
    named = {name: handle for axes in panels for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    whole.legend(named.values(), named.keys(), loc="outside lower center", ncols=4, fontsize=7, frameon=False)
    return whole


def _points(rows: Iterable[Row], competitor: str, dim: int, unit: str) -> list[tuple[float, float]]:
    chosen = [row for row in rows if (row["competitor"], row["sizes"]["dim"]) == (competitor, dim)]
    found = [(row["sizes"]["batch"], figure(row, unit)) for row in chosen]
    return sorted((batch, value) for batch, value in found if value is not None)
