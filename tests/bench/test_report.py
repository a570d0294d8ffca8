"""The report: what is committed is what the JSON gives; rows from the harness stand in for those of a measured GPU."""

import json
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from bench import harness
from bench.machine import Clock
from bench.ops import contrastive_loss, layer_norm, window_attention
from bench.report import charts as report_charts
from bench.report import command as report
from bench.report.anchors import load_anchors
from bench.report.charts import chart_names, draw
from bench.report.rows import Device, exp2_count, figure, floors, groups, read_devices, read_rows, roofline
from bench.report.tables import Sheet, op_sheet, page_text, reasons, report_text
from bench.session import Plan, Session
from bench.store import Store

ANCHORS = load_anchors()
H200, CPU = "NVIDIA H200", "CPU, AVX512"
OPS = {
    window_attention: ("swin_t_stage1_224", "swin_b_stage1_384_window12"),
    contrastive_loss: ("clip_16k_d512", "clip_4k_d768"),
    layer_norm: ("ragged",),
}
SECONDS = {"ours (triton)": 1e-3, "ours (torch)": 5e-3, "eager": 4e-3, "torch.compile": 3e-3, "sdpa + mask": 2e-3}


@dataclass(frozen=True)
class ModelShape:
    """One whole model."""

    model: str
    resolution: int
    batch: int


class Models:
    """What a row of whole models needs of an op's file."""

    OP = "inference"
    SHAPES: ClassVar = {"swin_base_384": ModelShape("swin_base", 384, 64)}
    COMPETITORS: ClassVar = dict.fromkeys(("ours (triton)", "eager", "torch.compile"))
    bytes_moved = staticmethod(lambda shape, dtype, mode: 10**9)
    flops = staticmethod(lambda shape, mode: 3 * 10**11)
    units = staticmethod(lambda shape: 1)
    budget_cases = staticmethod(lambda shape, dtype, mode: [])


def measure(folder, device: str, ops, dtypes) -> None:
    """Store a run as the harness does: every row through its own ``put``, with made-up times."""
    gpu = device != CPU
    facts = {
        "device": device, "arch": 90 if gpu else None, "num_sms": 132 if gpu else None,
        "driver": "570" if gpu else None, "torch": "2.8.0", "triton": "3.4.0", "cuda": None, "commit": "abc",
        "sources": "s", "date": "2026-01-02",
    }  # fmt: skip
    store = Store(folder / f"{'gpu' if gpu else 'cpu'}_rows.json", "s")
    rates = {"copy_rate": 4e12, "matrix_rate": 8e14} if gpu else {"copy_rate": 2e10, "matrix_rate": 1e11}
    session = Session(torch.device("cpu"), facts, store, folder, Clock(1), Plan(), show=lambda line: None, **rates)
    write, store.write = store.write, lambda: None
    for op, names in ops.items():
        for name in names:
            for dtype in dtypes:
                group = harness.Group(op, name, op.SHAPES[name], dtype, tuple(op.COMPETITORS), session)
                for mode in ("forward", "backward", "both"):
                    for competitor in op.COMPETITORS:
                        group.put(competitor, mode, made_up(group, competitor, mode, gpu))
    details = {"device": device}
    store.stages["environment"] = {"status": "done", "reason": None, "seconds": 3.25, "details": details}
    write()


def made_up(group, competitor: str, mode: str, gpu: bool) -> dict:
    """The outcome of a row, with the entries of ``harness.Group.measured``."""
    if competitor not in SECONDS or (competitor == "ours (triton)" and not gpu):
        return {"status": "missing", "reason": "not\ninstalled"}
    if (competitor, group.dtype, mode) == ("torch.compile", "bf16", "backward"):
        return {"status": "wrong", "reason": "too far from float64: dqkv"}
    median = SECONDS[competitor] * {"forward": 1, "backward": 2, "both": 3}[mode]
    moved = group.op.bytes_moved(group.shape, harness.DTYPES[group.dtype], mode)
    timed = {"median": median, "q20": 0.98 * median, "q80": 1.03 * median, "samples": 50, "repeats": 1}
    timed |= {"copy_ratio": moved / median / group.session.copy_rate}
    return {"status": "timed", "errors": [], **timed, **({"peak_bytes": 2**20, "sm_clock_mhz": 1700.0} if gpu else {})}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of results: a GPU in two dtypes, a CPU in one, and files that hold no rows of the harness."""
    path = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "predicted_clocks", lambda case, arch: None)
        measure(path, H200, {**OPS, Models: ("swin_base_384",)}, ("bf16", "fp32"))
        measure(path, CPU, OPS, ("fp32",))
    (path / "budget.json").write_text(json.dumps({"rows": [{"case": "a", "arch": 90}]}))
    (path / "demo.json").write_text(json.dumps({"seconds": 3}))
    return path


@pytest.fixture(scope="module")
def devices(folder):
    return read_devices(folder)


def row_of(device, op, shape, competitor, mode="forward", dtype="bf16"):
    return next(
        row for row in device.rows if row["key"] == f"{op}|{shape}|{dtype}|{mode}|{competitor}"
    )  # fmt: skip


def test_the_committed_report_and_page_are_those_of_the_results(capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().err


def test_without_rows_the_report_says_so():
    text = report_text([], ANCHORS)
    assert "No row of a GPU: not measured yet." in text and "No row of a CPU: not measured yet." in text
    assert text.count("| not measured yet |") == len(ANCHORS.goals)
    assert page_text([], ANCHORS).startswith("No GPU has run this: not measured yet.")


def test_devices_are_read_gpus_first_and_other_results_passed_by(devices):
    assert [device.name for device in devices] == [H200, CPU]
    assert [device.is_gpu for device in devices] == [True, False]
    assert all(row["device"] == device.name for device in devices for row in device.rows)
    assert all(list(device.stages) == ["environment"] for device in devices)


def test_a_file_that_is_broken_is_refused_by_name(tmp_path):
    path = tmp_path / "gpu_x.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"gpu_x\.json must hold JSON, got JSONDecodeError"):
        read_devices(tmp_path)
    row = {"key": "k", "competitor": "eager"}
    path.write_text(json.dumps({"rows": [row], "stages": {}}))
    with pytest.raises(
        ValueError, match=r"gpu_x\.json: row 'k' must have op, shape, sizes, dtype, mode, status, device"
    ):
        read_devices(tmp_path)
    row |= dict.fromkeys(("op", "shape", "sizes", "dtype", "mode", "device"), "x") | {"status": "timed", "median": None}
    for times in ({}, {"q20": 2, "median": 1, "q80": 3}, {"q20": 1, "median": 4, "q80": 3}, {"q20": 0, "median": 1}):
        path.write_text(json.dumps({"rows": [{**row, "q80": 3, **times}], "stages": {}}))
        with pytest.raises(ValueError, match="row 'k' must have 0 < q20 <= median <= q80"):
            read_rows(path)


def test_an_ops_table_holds_each_time_and_what_ours_reaches(devices):
    gpu, cpu = devices
    sheet = op_sheet(gpu, "window_attention")
    table = {tuple(row[:3]): dict(zip(sheet.head, row, strict=True)) for row in sheet.rows}
    assert len(table) == 2 * 2 * 3
    cells = table["swin_t_stage1_224", "bf16", "both"]
    assert (cells["ours (triton), ms"], cells["eager, ms"], cells["flex_attention, ms"]) == ("3.000", "12.0", "missing")
    assert cells["times the best other"] == "2.00x" and cells["ours, 20% to 80%"] == "2.940 to 3.090"
    moved = 128 * 56 * 56 * 96 * 11 * 2
    assert cells["ours, of copy"] == cells["ours, of the roofline"] == f"{moved / 3e-3 / 4e12:.0%}"
    assert (cells["ours, MiB"], cells["eager, MiB"]) == ("1", "1")
    assert table["swin_t_stage1_224", "bf16", "backward"]["torch.compile, ms"] == "wrong"
    assert "ours, MiB" not in op_sheet(cpu, "window_attention").head, "a column without a value is left out"
    assert op_sheet(cpu, "layer_norm").rows[0][-1] == "0.60x", "on a CPU ours is the library's backend"


def test_rows_without_a_time_are_told_once_with_their_reason(devices):
    lines = reasons(devices[0])
    assert "- window_attention, torch.compile: wrong, too far from float64: dqkv (2 rows)" in lines
    assert "- window_attention, flex_attention: missing, not installed (12 rows)" in lines
    assert len(lines) == len(set(lines))


def test_published_figures_stand_in_their_own_table_alone(devices):
    before, published = report_text(devices, ANCHORS).split("## Published elsewhere")
    assert all(f"| {figure.by} |" not in before for figure in ANCHORS.published)
    assert published.count("\n| ") == len(ANCHORS.published) + 2
    assert all(source.url in published for source in ANCHORS.sources.values())
    nothing = replace(ANCHORS, published=[])
    assert report_text(devices, nothing).split("## Published elsewhere")[0] == before, (
        "no table of ours depends on them"
    )


def test_the_report_names_the_machine_of_the_rows(devices):
    text = report_text(devices, ANCHORS)
    for line in ("| device | NVIDIA H200 |", "| driver | 570 |", "| torch | 2.8.0 |", "| triton | 3.4.0 |"):
        assert line in text
    for line in ("| commit | abc |", "| date | 2026-01-02 |", "| copy bandwidth, GB/s | 4,000 |"):
        assert line in text
    assert "| environment | done | 3.2 |  |" in text


def test_the_page_shows_gpus_in_bfloat16_with_goals_met_and_short(devices):
    text = page_text(devices, ANCHORS)
    assert "NVIDIA H200, driver 570, torch 2.8.0, Triton 3.4.0, commit abc, 2026-01-02; bf16" in text
    assert CPU not in text and "No GPU has run this" not in text
    assert [text.count(f"| swin_t_stage1_224 | {mode} |") for mode in ("forward", "backward", "both")] == [1, 0, 1]
    moved = 128 * 56 * 56 * 96 * 4 * 2
    part = f"{moved / 1e-3 / 4e12:.0%}"
    assert f"| window_attention | swin_t_stage1_224 | forward | 1.000 | 2.000 | sdpa + mask | 2.00x | {part} |" in text
    assert "short: 2.00x (worst of 1 row, swin_t_stage1_224 bf16), 0.80 of the goal" in text
    assert "met: 4.00x (worst of 1 row, swin_base_384 bf16)" in text
    assert "not measured yet" in text


def test_numbers_are_aligned_and_bars_in_cells_escaped():
    sheet = Sheet("", ["name", "ms", "none"], [["a|b", "1.5", ""], ["c", "missing", ""]])
    assert sheet.markdown().splitlines() == [
        "| name | ms | none |", "| --- | ---: | --- |", "| a\\|b | 1.5 |  |", "| c | missing |  |",
    ]  # fmt: skip


def test_figures_follow_from_a_row(devices):
    row = row_of(devices[0], "contrastive_loss", "clip_16k_d512", "eager", "both")
    assert figure(row, "ms") == pytest.approx(12) and figure(row, "GB") == pytest.approx(2**20 / 1e9)
    assert figure(row, "TFLOP/s") == pytest.approx(6 * 16384**2 * 512 / 12e-3 / 1e12)
    assert figure(row, "% MFU", 1e15) == pytest.approx(6 * 16384**2 * 512 / 12e-3 / 1e13)
    assert figure(row, "images/s") == pytest.approx(16384 / 12e-3) and figure(row, "% MFU") is None
    assert figure(row_of(devices[0], "layer_norm", "ragged", "eager"), "TFLOP/s") is None
    assert figure(row_of(devices[0], "window_attention", "swin_t_stage1_224", "flex_attention"), "ms") is None


def test_exponentials_and_floors_are_those_of_the_op(devices):
    windows = 128 * 64 * 3
    for mode, times in (("forward", 1), ("backward", 1), ("both", 2)):
        row = row_of(devices[0], "window_attention", "swin_t_stage1_224", "eager", mode)
        assert exp2_count(row) == times * windows * 49**2
        assert floors(row)["exp2"] == pytest.approx(times * windows * 49**2 / (16 * 132 * 1.7e9))
        assert exp2_count(row_of(devices[0], "contrastive_loss", "clip_4k_d768", "eager", mode)) == times * 4096**2
    assert floors(row_of(devices[0], "layer_norm", "ragged", "eager")).keys() == {"memory"}
    single = row_of(devices[0], "contrastive_loss", "clip_4k_d768", "eager", dtype="fp32")
    assert floors(single).keys() == {"memory", "exp2"}, "the rate of products is of bfloat16"
    assert roofline(single) is None, "it is not known what binds"
    loss = row_of(devices[0], "contrastive_loss", "clip_16k_d512", "eager")
    assert roofline(loss) == pytest.approx(2 * 16384**2 * 512 / 8e14 / 4e-3)


def test_rows_group_by_size_dtype_and_mode(devices):
    found = dict(groups(devices[0].rows))
    assert found["window_attention", "swin_t_stage1_224", "bf16", "both"].keys() == window_attention.COMPETITORS.keys()


def test_every_chart_is_drawn_under_its_name(devices, tmp_path):
    wanted = {
        H200: ["window_attention", "contrastive_loss", "layer_norm", "inference", "inference_mfu", "roofline", "batch"],
        CPU: ["window_attention", "contrastive_loss", "layer_norm", "batch"],
    }
    for device, slug in zip(devices, ("nvidia_h200", "cpu_avx512"), strict=True):
        names = chart_names(device, ANCHORS)
        assert list(names) == [f"{slug}_{name}.png" for name in wanted[device.name]]
        text = report_text(devices, ANCHORS)
        assert all(f"![{title}](../../docs/{name})" in text for name, title in names.items())
        if device.is_gpu:
            drawn = draw(device, ANCHORS, tmp_path / "docs")
            assert [path.name for path in drawn] == list(names)
            assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
            assert sorted(path.name for path in (tmp_path / "docs").iterdir()) == sorted(names), "nothing else is left"


@pytest.fixture
def plt():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    yield pyplot
    pyplot.close("all")


def drawn(plt, device, name):
    """The axes of one chart."""
    _, make = report_charts._charts(device, ANCHORS)[name]
    return make(plt)


def test_published_bars_are_hatched_and_named(devices, plt):
    whole = drawn(plt, devices[0], "nvidia_h200_window_attention.png")
    for axes, mode in zip(whole.axes, ("forward", "both"), strict=True):
        wanted = [a.value for a in ANCHORS.published if (a.op, a.mode) == ("window_attention", mode)]
        hatched = [bar for bar in axes.patches if bar.get_hatch()]
        assert [bar.get_width() for bar in hatched] == wanted
        assert all(bar.get_facecolor()[3] == 0 for bar in hatched), "hollow"
        labels = [label.get_text() for label in axes.get_yticklabels()]
        assert [label.startswith("published: ") for label in labels] == [False] * 2 + [True] * len(wanted)
        ours = [bar.get_width() for bar in axes.patches if not bar.get_hatch()]
        timed = [
            row
            for row in devices[0].timed()
            if (row["op"], row["dtype"], row["mode"]) == ("window_attention", "bf16", mode)
        ]
        assert ours == pytest.approx([figure(row, "TFLOP/s") for row in timed])
        assert [line.get_xdata()[0] for line in axes.lines] == pytest.approx(
            [figure(row, "TFLOP/s") / roofline(row) for row in timed if row["competitor"] == "eager"]
        )
    cpu = drawn(plt, devices[1], "cpu_avx512_window_attention.png")
    assert not [bar for axes in cpu.axes for bar in axes.patches if bar.get_hatch()]
    assert not [line for axes in cpu.axes for line in axes.lines], "no roofline in float32"
    named = [{text.get_text() for text in chart.legends[0].get_texts()} for chart in (whole, cpu)]
    assert named[0] >= {"roofline", "published by others"} and not named[1] & {"roofline", "published by others"}


def test_models_are_drawn_in_images_a_second_and_mfu(devices, plt):
    for name, unit in (("inference", "images/s"), ("inference_mfu", "% MFU")):
        axes = drawn(plt, devices[0], f"nvidia_h200_{name}.png").axes[0]
        wanted = [a.value for a in ANCHORS.published if (a.op, a.unit) == ("inference", unit)]
        assert wanted and [bar.get_width() for bar in axes.patches if bar.get_hatch()] == wanted
        best = max(bar.get_width() for bar in axes.patches if not bar.get_hatch())
        assert best == pytest.approx({"images/s": 64 / 1e-3, "% MFU": 100 * 3e11 / 1e-3 / 989.4e12}[unit])


def test_the_roofline_has_its_lines_and_hollow_points(devices, plt):
    axes = drawn(plt, devices[0], "nvidia_h200_roofline.png").axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    memory, tensor = lines["memory, 4,000 GB/s"], lines["tensor cores, 800 TFLOP/s"]
    assert [y / x for x, y in memory.get_xydata()] == pytest.approx([4] * 2)
    assert list(tensor.get_ydata()) == [800, 800] and memory.get_xdata()[1] == tensor.get_xdata()[0] == 200
    exp2 = lines["exp2, window attention, forward, d=32"].get_ydata()[0]
    assert exp2 == pytest.approx(4 * 32 * 16 * 132 * 1.7e9 / 1e12)
    hollow = [line for line in axes.lines if line.get_markerfacecolor() == "none"]
    wanted = [a for a in ANCHORS.published if (a.op, a.unit) == ("window_attention", "TFLOP/s")]
    assert [line.get_ydata()[0] for line in hollow] == [a.value for a in wanted]
    # At a window of 8, forward, each of 64 tokens has 4 x 64 FLOPs over 4 values of 2 bytes for each of d.
    assert hollow[0].get_xdata()[0] == 32


def test_the_batch_chart_has_a_line_for_each_competitor(devices, plt):
    time, memory = drawn(plt, devices[0], "nvidia_h200_batch.png").axes
    lines = {line.get_label(): line for line in time.lines}
    assert [(x, round(y, 6)) for x, y in lines["eager, D=512"].get_xydata()] == [(16384, 12)]
    published = [line for line in memory.lines if line.get_label().startswith("published: ")]
    assert all(line.get_markerfacecolor() == "none" and line.get_linestyle() == "None" for line in published)
    points = [value for line in published for value in line.get_ydata()]
    assert sorted(points) == sorted(a.value for a in ANCHORS.published if a.unit == "GB")
    cpu = drawn(plt, devices[1], "cpu_avx512_batch.png").axes[1]
    assert cpu.get_title() == "not measured yet" and not cpu.lines


def test_the_command_writes_a_report_that_its_check_accepts(folder, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(report, "draw", lambda device, anchors, docs: [docs / device.name])
    args = ["--results", str(folder), "--docs", str(tmp_path)]

    def refuse(text):
        raise AssertionError("other results do not change this page")

    monkeypatch.setattr(report.page, "fill", refuse)
    assert report.main([*args, "--check"]) == 1
    assert "REPORT.md differs from" in capsys.readouterr().err
    assert report.main(args) == 0
    shown = capsys.readouterr().out
    assert f"drawn: {tmp_path / H200}" in shown and "window_attention" in shown and "not measured yet" in shown
    assert report.main([*args, "--check"]) == 0
    path = folder / "REPORT.md"
    path.write_text(path.read_text().replace("2.00x", "9.00x"))
    assert report.main([*args, "--check"]) == 1
    (tmp_path / "gpu_x.json").write_text("{")
    assert report.main(["--results", str(tmp_path)]) == 2


def test_a_machine_for_gpus_needs_neither_matplotlib_nor_rich(folder, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    assert report.main(["--results", str(folder), "--docs", str(tmp_path / "docs")]) == 0
    shown = capsys.readouterr().out
    assert "matplotlib is not installed: no charts" in shown and not (tmp_path / "docs").exists()
    assert "| device | NVIDIA H200 |" in shown


def test_a_mode_of_its_own_has_a_panel_of_its_own(plt):
    row = {
        "key": "k", "op": "first_call", "shape": "swin", "sizes": {}, "dtype": "bf16", "mode": "cold", "device": H200,
        "competitor": "ours (triton)", "status": "timed", "median": 2.0, "q20": 2.0, "q80": 2.0,
    }  # fmt: skip
    (axes,) = drawn(plt, Device(H200, [row]), "nvidia_h200_first_call.png").axes
    assert axes.get_xlabel() == "cold, ms" and [bar.get_width() for bar in axes.patches] == [2000]
