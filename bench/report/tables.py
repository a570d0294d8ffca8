"""The tables of the report: the text of ``bench/results/REPORT.md`` and of the page's measured parts."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from bench.machine import recorded
from bench.report.anchors import Anchors, Published
from bench.report.charts import chart_names
from bench.report.goals import NOT_MEASURED, Verdict, judge_all, outcome, wanted
from bench.report.rows import Device, digits, fastest, groups, is_ours, roofline
from bench.store import Row

SHORT_OF_TIME = ("missing", "wrong", "error")
PAGE_DTYPE = "bf16"


@dataclass(frozen=True)
class Sheet:
    """A table, to be written as Markdown or printed."""

    title: str
    head: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """Return the table's lines; the columns behind the first are aligned to the right where they hold numbers."""
        marks = ["---:" if self._numeric(column) else "---" for column in range(len(self.head))]
        lines = [self.head, marks, *([cell.replace("|", "\\|") for cell in row] for row in self.rows)]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def rich(self) -> Any:
        """Return the table for a rich console."""
        from rich.table import Table

        table = Table(title=self.title, title_justify="left")
        for column, name in enumerate(self.head):
            table.add_column(name, justify="right" if self._numeric(column) else "left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def _numeric(self, column: int) -> bool:
        cells = [row[column] for row in self.rows if row[column] not in ("", *SHORT_OF_TIME)]
        return bool(cells) and all(cell[0].isdigit() for cell in cells)


def milliseconds(seconds: float) -> str:
    """Write a time with about three digits.

    >>> milliseconds(0.0001234), milliseconds(0.01234), milliseconds(1.234)
    ('0.123', '12.3', '1,234')
    """
    value = seconds * 1e3
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.3f}"


def mebibytes(row: Row | None) -> str:
    """Write a row's peak memory; nothing where none was measured."""
    return "" if row is None or row.get("peak_bytes") is None else f"{row['peak_bytes'] / 2**20:,.0f}"


def share(part: float | None) -> str:
    """Write a part as percent; nothing for None."""
    return "" if part is None else f"{part:.0%}"


def facts_sheet(device: Device) -> Sheet:
    """What the rows carry about the machine; several values where rows of several runs stand together."""
    names = {
        "driver": "driver",
        "torch": "torch",
        "triton": "triton",
        "cuda": "CUDA",
        "commit": "commit",
        "date": "date",
    }
    rows = [["device", device.name], *([title, _values(device.rows, name)] for name, title in names.items())]
    rates = {
        "copy_bytes_per_second": ("copy bandwidth, GB/s", 1e9),
        "matrix_flops_per_second": ("product, TFLOP/s", 1e12),
    }
    for name, (title, unit) in rates.items():
        found = [row[name] / unit for row in device.rows if row.get(name)]
        if found:
            low, high = digits(min(found)), digits(max(found))
            rows.append([title, low if low == high else f"{low} to {high}"])
    return Sheet(device.name, ["", ""], [row for row in rows if row[1]])


def _values(rows: Iterable[Row], name: str) -> str:
    return ", ".join(sorted({str(row[name]) for row in rows if row.get(name) is not None}))


def stages_sheet(device: Device) -> Sheet:
    """How each stage of ``make gpu`` ended."""
    rows = [
        [name, record["status"], f"{record['seconds']:.1f}", " ".join(str(record.get("reason") or "").split())[:120]]
        for name, record in device.stages.items()
    ]
    return Sheet("stages", ["stage", "ended", "seconds", "reason"], rows)


def op_sheet(device: Device, op: str) -> Sheet:
    """Every size of an op: milliseconds of each competitor, and what the fastest of ours reaches."""
    rows = [row for row in device.rows if row["op"] == op]
    competitors = list(dict.fromkeys(row["competitor"] for row in rows))
    head = ["shape", "dtype", "mode", *(f"{name}, ms" for name in competitors), *OURS_COLUMNS]
    body = []
    for (_, shape, dtype, mode), found in groups(rows):
        cells = [_time(found.get(competitor)) for competitor in competitors]
        body.append([shape, dtype, mode, *cells, *(column(found) for column in OURS_COLUMNS.values())])
    kept = [i for i in range(len(head)) if any(row[i] for row in body)]
    return Sheet(op, [head[i] for i in kept], [[row[i] for i in kept] for row in body])


def _time(row: Row | None) -> str:
    if row is None:
        return ""
    return milliseconds(row["median"]) if row["status"] == "timed" else row["status"]


def our_best(rows: dict[str, Row]) -> Row | None:
    """Return the fastest row of ours."""
    return fastest(row for row in rows.values() if row["status"] == "timed" and is_ours(row))


def best_competitor(rows: dict[str, Row]) -> Row | None:
    """Return the fastest row of the others."""
    return fastest(row for row in rows.values() if row["status"] == "timed" and not is_ours(row))


def times_best(rows: dict[str, Row]) -> str:
    """Write how many times as fast as the best competitor ours is."""
    ours, other = our_best(rows), best_competitor(rows)
    return "" if ours is None or other is None else f"{other['median'] / ours['median']:.2f}x"


def _of_ours(write: Callable[[Row], str]) -> Callable[[dict[str, Row]], str]:
    def column(rows: dict[str, Row]) -> str:
        ours = our_best(rows)
        return "" if ours is None else write(ours)

    return column


OURS_COLUMNS: dict[str, Callable[[dict[str, Row]], str]] = {
    "ours, 20% to 80%": _of_ours(lambda row: f"{milliseconds(row['q20'])} to {milliseconds(row['q80'])}"),
    "ours, of copy": _of_ours(lambda row: share(row.get("copy_ratio"))),
    "ours, of the roofline": _of_ours(lambda row: share(roofline(row))),
    "ours, MiB": _of_ours(mebibytes),
    "eager, MiB": lambda rows: mebibytes(rows.get("eager")),
    "times the best other": times_best,
}


def reasons(device: Device) -> list[str]:
    """Say for each competitor of an op why rows of it have no time, each reason once."""
    found: dict[str, int] = {}
    for row in device.rows:
        if row["status"] != "timed":
            said = " ".join(str(row.get("reason")).split())[:200]
            line = f"{row['op']}, {row['competitor']}: {row['status']}, {said}"
            found[line] = found.get(line, 0) + 1
    return [f"- {line} ({count} {'row' if count == 1 else 'rows'})" for line, count in found.items()]


def goals_sheet(verdicts: list[Verdict]) -> Sheet:
    """Every goal and how it stands on each device."""
    with_device = len({verdict.device for verdict in verdicts} - {None}) > 1
    head = ["goal", "wanted", *["device"] * with_device, "how it stands"]
    rows = [
        [verdict.goal.name, wanted(verdict.goal), *[verdict.device or ""] * with_device, outcome(verdict)]
        for verdict in verdicts
    ]
    return Sheet("goals", head, rows)


def published_sheet(anchors: Anchors) -> Sheet:
    """The figures of others, with their sources."""
    rows = []
    for figure in anchors.published:
        source = anchors.sources[figure.source]
        link = f"[{source.title}]({source.url}){f', {source.date}' if source.date else ''}"
        value = f"{figure.value:,g} {figure.unit}"
        rows.append([figure.by, figure.op, figure.mode, sizes(figure), value, source.device, link])
    return Sheet("published", ["published by", "op", "mode", "sizes", "figure", "device", "source"], rows)


def sizes(figure: Published) -> str:
    """Write the sizes of a published figure."""
    words = []
    for name, value in figure.sizes.items():
        words.append(f"{name.replace('_', ' ')} {value:,}" if isinstance(value, int) else value)
    return ", ".join([*words, *[figure.dtype] * (figure.dtype is not None)])


def report_text(devices: list[Device], anchors: Anchors) -> str:
    """Return the whole of REPORT.md."""
    parts = ["# What was measured", INTRODUCTION, "## Goals", goals_sheet(judge_all(devices, anchors)).markdown()]
    if not any(device.is_gpu for device in devices):
        parts += [
            "## GPUs",
            f"No row of a GPU: {NOT_MEASURED}. [GPU_QUEUE.md](../GPU_QUEUE.md) lists what waits for one.",
        ]
    if all(device.is_gpu for device in devices):
        parts += ["## CPUs", f"No row of a CPU: {NOT_MEASURED}."]
    for device in devices:
        parts += [f"## {device.name}", facts_sheet(device).markdown()]
        if device.stages:
            parts += ["### Stages", stages_sheet(device).markdown()]
        for op in dict.fromkeys(row["op"] for row in device.rows):
            parts += [f"### {op}", op_sheet(device, op).markdown()]
        parts += [f"![{title}](../../docs/{name})" for name, title in chart_names(device, anchors).items()]
        if any(row["status"] != "timed" for row in device.rows):
            parts += ["### Rows without a time", "\n".join(reasons(device))]
    setups = [f"- {source.title}: {source.setup}." for source in anchors.sources.values()]
    parts += ["## Published elsewhere", PUBLISHED, published_sheet(anchors).markdown(), "\n".join(setups)]
    return "\n\n".join(parts) + "\n"


INTRODUCTION = (
    "Written by `python -m bench.report` from the JSON files beside it; a test holds it to them. Times are medians. "
    "The roofline of a row is the longest of what memory, the tensor cores and exp2 take, at the rates of a large copy "
    "and a large bfloat16 product in the same run and at the clock under load; the rate of products in float32 was not "
    "measured, so its rows have none where there are products. A goal is held to the worst of the rows that it speaks "
    "of, unless it says best."
)
PUBLISHED = (
    "Measured by others, on their machines and by their rules: no figure of ours, and only for a look beside ours. "
    "The charts show them hatched or hollow."
)


def page_text(devices: list[Device], anchors: Anchors) -> str:
    """Return what docs/benchmarks.md shows: the goals, and for each GPU the rows in bfloat16."""
    gpus = [device for device in devices if device.is_gpu]
    parts = []
    if not gpus:
        parts.append(f"No GPU has run this: {NOT_MEASURED}. These are the goals that the rows will be held to.")
    for device in gpus:
        sheet = page_sheet(device)
        words = {"driver": "driver ", "torch": "torch ", "triton": "Triton ", "commit": "commit ", "date": ""}
        facts = [f"{word}{_values(device.rows, name)}" for name, word in words.items() if _values(device.rows, name)]
        parts.append(f"{', '.join([device.name, *facts])}; {PAGE_DTYPE}, milliseconds.")
        parts.append(sheet.markdown() if sheet.rows else f"Rows in {PAGE_DTYPE}: {NOT_MEASURED}.")
        parts += [f"![{title}]({name})" for name, title in chart_names(device, anchors).items()]
    parts.append(goals_sheet(judge_all(gpus, anchors)).markdown())
    return "\n\n".join(parts)


def page_sheet(device: Device) -> Sheet:
    """Ours beside the best competitor, one row a size, forward and both passes."""
    head = ["op", "size", "mode", "ours", "best other", "", "times", "of copy", "of the roofline", "MiB"]
    rows = []
    for (op, shape, dtype, mode), found in groups(device.rows):
        ours, other = our_best(found), best_competitor(found)
        if dtype != PAGE_DTYPE or mode == "backward" or ours is None:
            continue
        others = ["", ""] if other is None else [milliseconds(other["median"]), other["competitor"]]
        parts = [times_best(found), share(ours.get("copy_ratio")), share(roofline(ours)), mebibytes(ours)]
        rows.append([op, shape, mode, milliseconds(ours["median"]), *others, *parts])
    return Sheet(device.name, head, rows)


def cpu_text(devices: list[Device]) -> str:
    """Write what processors have shown, for the page: each competitor, and its time as a multiple of ours."""
    texts = []
    for device in devices:
        timed = [row for row in device.timed() if not device.is_gpu]
        if not timed:
            continue
        lines = []
        for (op, shape, dtype, mode), rows in groups(timed):
            ours = fastest(row for row in rows.values() if is_ours(row))
            for name, row in rows.items():
                ratio = "" if ours is None or row is ours else f"{row['median'] / ours['median']:.2f}x"
                memory = "" if row.get("peak_bytes") is None else f"{row['peak_bytes'] / 1e9:.2f}"
                work = f"{op}: {shape}, {dtype}, {'forward' if mode == 'forward' else 'forward and backward'}"
                lines.append([work, name, milliseconds(row["median"]), ratio, memory])
        sheet = Sheet("", ["work", "by", "ms", "times ours", "GB over the inputs"], lines)
        first = timed[0]
        machine = f"{device.name}, {first['threads']} threads, torch {first['torch']}"
        texts.append(f"{machine}; medians, competitors taking turns; {recorded(timed)}.\n")
        texts.append(sheet.markdown())
    return "\n".join(texts) if texts else "Not measured yet."
