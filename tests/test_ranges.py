"""Ranges: where they are and what they are called, that they cost nothing while off, and that no graph holds one."""

import contextlib
import importlib.machinery
import os
import re
import subprocess
import sys
import timeit
import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from florence_fast import ops, ranges
from florence_fast.data.pair_loader import PairLoader
from florence_fast.data.pairs import open_pairs
from florence_fast.models import tower as tower_module
from florence_fast.models.florence import Florence, build_tower
from florence_fast.ranges import annotate, annotated, enabled
from florence_fast.train import GradCache
from florence_fast.train.config import Stage
from tests.models.tiny import COSWIN, FLORENCE, SWIN
from tests.train.tiny_run import tiny_trainer, write_pairs

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def off(monkeypatch) -> None:
    """Start with ranges off, whatever the variable says in the surroundings."""
    monkeypatch.setattr(ranges, "_open", None)


@contextlib.contextmanager
def recording() -> Iterator[list[Any]]:
    """Give a list that holds the profiler's events of ours when the block is over."""
    found: list[Any] = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        yield found
    found += [event for event in profiler.events() if event.name.startswith(ranges.PREFIX)]


def counted(events: list[Any]) -> dict[str, int]:
    """How often each range was opened, without the prefix."""
    return dict(Counter(event.name.removeprefix(ranges.PREFIX) for event in events))


def parent(event: Any) -> str | None:
    """The name of the innermost range of ours around one."""
    outer = event.cpu_parent
    while outer is not None and not outer.name.startswith(ranges.PREFIX):
        outer = outer.cpu_parent
    return outer and outer.name.removeprefix(ranges.PREFIX)


class Nvtx(types.ModuleType):
    """What the ``nvtx`` package does, kept in a list."""

    def __init__(self) -> None:
        super().__init__("nvtx")
        self.__spec__ = importlib.machinery.ModuleSpec("nvtx", None)
        self.calls: list[tuple[str, ...]] = []

    def push_range(self, message: str, *, domain: str) -> None:
        self.calls.append(("push", message, domain))

    def pop_range(self, *, domain: str) -> None:
        self.calls.append(("pop", domain))


@pytest.fixture
def nvtx(monkeypatch) -> Nvtx:
    """The stand-in, as if it were installed."""
    monkeypatch.setitem(sys.modules, "nvtx", Nvtx())
    return sys.modules["nvtx"]


def without_nvtx(monkeypatch: pytest.MonkeyPatch, *, cuda_is_built: bool) -> None:
    monkeypatch.setitem(sys.modules, "nvtx", None)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: cuda_is_built)


class Dispatched(TorchDispatchMode):
    """The names of the ops that are run, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_off_adds_no_op_and_no_event(monkeypatch):
    tower, image = build_tower(COSWIN).eval(), torch.randn(2, 3, 32, 32)
    with Dispatched() as off, recording() as events:
        tower(image)
    monkeypatch.setattr(tower_module, "annotate", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(ranges, "annotate", lambda *_: contextlib.nullcontext())
    with Dispatched() as without, torch.profiler.profile() as profiler:
        tower(image)
    assert events == [] and off.names == without.names and len(off.names) > 20
    assert not [event.name for event in profiler.events() if event.name.startswith("profiler::")]


def test_off_costs_less_than_a_microsecond():
    def numbered() -> None:
        with annotate("image.stage", 2):
            return

    decorated = annotated("grad_cache.loss")(lambda: None)
    for call in (numbered, decorated):
        seconds = min(timeit.repeat(call, number=2000, repeat=20)) / 2000
        assert seconds < 1e-6, f"{1e9 * seconds:.0f} ns a call"


@pytest.mark.parametrize("config", [COSWIN, SWIN], ids=["coswin", "swin"])
def test_stages_merges_and_ops_of_an_image_tower(config):
    tower, image = build_tower(config).eval(), torch.randn(2, 3, 32, 32)
    with enabled(), recording() as events:
        tower(image)
    found = counted(events)
    parts = {"image.stem": 1, "image.stage0": 1, "image.merge0": 1, "image.stage1": 1}
    assert {name: count for name, count in found.items() if name.startswith("image.")} == parts
    attentions = [event for event in events if event.name == "ff.op.window_attention"]
    assert [parent(event) for event in attentions] == ["image.stage0"] * 2 + ["image.stage1"] * 2
    with enabled(), recording() as events:
        tower.forward_intermediates(image)
    assert {name: count for name, count in counted(events).items() if name.startswith("image.")} == parts


def test_every_op_has_a_range_forward_and_backward():
    for entry in ops.OPS.values():
        args, kwargs = entry.example("cpu")
        args = [x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args]
        with enabled(), recording() as events, ops.backend("torch"):
            out = entry.function(*args, **kwargs)
            outputs = [x for x in (out if isinstance(out, tuple) else (out,)) if x.requires_grad]
            if outputs:
                sum(x.sum() for x in outputs).backward()
        names = set(counted(events))
        wanted = OF_OTHER_MAKE.get(entry.name, {f"op.{entry.name}", f"op.{entry.name}_backward"})
        assert wanted <= names, f"{entry.name}: {names}"


# conv_embed is made of torch's ops, the other two are one op without a backward.
OF_OTHER_MAKE = {"conv_embed": {"op.conv_embed"}, "nms": {"op.nms"}, "batched_nms": {"op.nms"}}


def test_a_failing_call_closes_its_range(nvtx):
    with enabled(nvtx=True), pytest.raises(ZeroDivisionError), annotate("outer"), annotate("inner"):
        raise ZeroDivisionError
    assert [call[0] for call in nvtx.calls] == ["push", "push", "pop", "pop"]


def test_a_range_ends_with_its_block_and_not_when_it_is_forgotten():
    with enabled(), recording() as events:
        kept = annotate("kept")
        with kept:
            torch.ones(1)
        with annotate("next"):
            torch.ones(1)
    assert [(event.name, parent(event)) for event in events] == [("ff.kept", None), ("ff.next", None)]
    assert [[child.name for child in event.cpu_children] for event in events] == [["aten::ones"]] * 2


def test_phases_of_the_gradient_cache():
    model, image = Florence(FLORENCE), torch.randn(5, 3, 32, 32)
    tokens = torch.randint(1, 63, (5, 12))
    cache = GradCache(model, lambda i, t, scale: (i * t).sum() * scale, micro_batch_size=2)
    with enabled(), recording() as events:
        cache.step(image, tokens)
    found = counted(events)
    phases = {name: count for name, count in found.items() if name.startswith("grad_cache.")}
    once = dict.fromkeys(("grad_cache.first_pass", "grad_cache.loss", "grad_cache.second_pass"), 1)
    assert phases == {**once, "grad_cache.forward": 6, "grad_cache.backward": 3}
    outer = Counter(parent(event) for event in events if event.name == "ff.grad_cache.forward")
    assert outer == {"grad_cache.first_pass": 3, "grad_cache.second_pass": 3}
    assert found["text.embedding"] == found["text.blocks"] == found["image.stage0"] == 6
    assert found["op.window_attention"] == 24 and found["op.window_attention_backward"] == 12


def test_steps_of_the_data(tmp_path):
    source = open_pairs(write_pairs(tmp_path / "pairs", 12))
    batches = PairLoader(source, batch_size=4, image_size=16).batches(0)
    with enabled(), recording() as events:
        next(batches)
        next(batches)
    assert counted(events) == {"data.decode": 2, "data.assemble": 2, "data.texts": 2}
    assert {parent(event) for event in events if event.name == "ff.data.texts"} == {"data.assemble"}
    assert {parent(event) for event in events if event.name != "ff.data.texts"} == {None}


def test_steps_of_the_trainer(tmp_path):
    pairs = write_pairs(tmp_path / "pairs", 16)
    trainer = tiny_trainer(pairs, tmp_path / "out", stages=(Stage(2, 16),), batch_size=8, save_every_steps=None)
    with enabled(), recording() as events:
        trainer.run()
    found = counted(events)
    steps = dict.fromkeys(("train.step", "train.data", "train.gradients", "train.prepare", "train.optimizer"), 2)
    assert {k: v for k, v in found.items() if k.startswith("train.")} == {**steps, "train.checkpoint": 1}
    parents = {event.name.removeprefix("ff."): parent(event) for event in events}
    assert parents["train.step"] is parents["train.checkpoint"] is None
    assert {parents[name] for name in ("train.data", "train.gradients", "train.optimizer")} == {"train.step"}
    assert (parents["data.decode"], parents["train.prepare"]) == ("train.data", "train.gradients")


def test_compiled_graphs_are_whole_and_hold_no_range():
    tower, image = build_tower(COSWIN).eval(), torch.randn(2, 3, 32, 32)
    expected, graphs = tower(image), []

    def keep(graph: torch.fx.GraphModule, inputs: list[Any]) -> torch.fx.GraphModule:
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph

    torch.compiler.reset()
    torch.compile(tower, backend=keep, fullgraph=True)(image)
    torch.compiler.reset()
    with enabled():
        compiled = torch.compile(tower, backend=keep, fullgraph=True)
        compiled(image)
        with recording() as events:
            torch.testing.assert_close(compiled(image), expected)
    off, on = graphs
    assert off == on and not [name for name in on if "record_function" in name or "profiler" in name]
    found = counted(events)
    assert found["op.window_attention"] == 4 and not [name for name in found if name.startswith("image.")]


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_holds_no_range(strict):
    tower, image = build_tower(COSWIN).eval(), torch.randn(2, 3, 32, 32)
    with enabled(), recording():
        program = torch.export.export(tower, (image,), strict=strict)
    targets = [str(node.target) for node in program.graph.nodes]
    assert any("window_attention" in name for name in targets)
    assert not [name for name in targets if "record_function" in name or "profiler" in name]
    torch.testing.assert_close(program.module()(image), tower(image))


def test_nvtx_ranges_are_nested_in_a_domain_of_ours(nvtx):
    with annotate("before"), enabled(nvtx=True):
        with annotate("outer"), annotate("image.stage", 3):
            pass
        with enabled(), annotate("still"):
            pass
    domain = ranges.DOMAIN
    with annotate("after"):
        pass
    pushed = [("push", name, domain) for name in ("ff.outer", "ff.image.stage3", "ff.still")]
    assert nvtx.calls == [pushed[0], pushed[1], ("pop", domain), ("pop", domain), pushed[2], ("pop", domain)]


def test_torch_with_cuda_stands_in_for_the_package(monkeypatch):
    without_nvtx(monkeypatch, cuda_is_built=True)
    calls = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda name: calls.append(name))
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: calls.append("pop"))
    with enabled(nvtx=True), annotate("op.mlp"):
        assert calls == ["ff.op.mlp"]
    assert calls == ["ff.op.mlp", "pop"]


def test_without_either_the_extra_is_named(monkeypatch):
    without_nvtx(monkeypatch, cuda_is_built=False)
    with pytest.raises(ImportError, match=r"florence_fast\[profile\]"), enabled(nvtx=True):
        raise AssertionError("not reached")
    with enabled(), recording() as events, annotate("here"):
        torch.ones(1)
    assert counted(events) == {"here": 1}


def test_the_real_package_takes_our_calls():
    pytest.importorskip("nvtx")
    with enabled(nvtx=True), recording() as events, annotate("outer"), annotate("inner"):
        torch.ones(1)
    assert counted(events) == {"outer": 1, "inner": 1}


def test_the_variable_turns_them_on_for_a_process(tmp_path):
    (tmp_path / "nvtx.py").write_text(
        "def push_range(message, *, domain): print('push', message, domain)\ndef pop_range(*, domain): print('pop')\n"
    )
    code = "from florence_fast.ranges import annotate\nwith annotate('op.mlp'): print('inside')"

    def run(value: str) -> subprocess.CompletedProcess:
        path = os.pathsep.join([str(tmp_path), str(ROOT)])
        surroundings = {**os.environ, "PYTHONPATH": path, "FLORENCE_FAST_NVTX": value}
        return subprocess.run([sys.executable, "-c", code], env=surroundings, capture_output=True, text=True)

    assert run("1").stdout.splitlines() == ["push ff.op.mlp florence_fast", "inside", "pop"]
    assert run("0").stdout.splitlines() == run("").stdout.splitlines() == ["inside"]
    wrong = run("yes")
    assert wrong.returncode == 1 and "unknown FLORENCE_FAST_NVTX 'yes'; known: 0, 1" in wrong.stderr


def test_the_guide_lists_every_name_in_the_source():
    guide = (ROOT / "docs" / "profiling.md").read_text()
    named = set(re.findall(r"`ff\.([a-z_.0-9]+)`", guide))
    source = [path for path in (ROOT / "florence_fast").rglob("*.py") if path.name != "ranges.py"]
    used = {name for path in source for name in re.findall(r'annotated?\("([a-z_.]+)"', path.read_text())}
    loops = {"image.stage", "image.merge"}
    parts = {name for name in used - loops if not name.startswith("op.")}
    assert parts == {name for name in named if not name.startswith("op.") and not name.endswith("0")}
    assert {f"{name}0" for name in loops} <= named
    assert {name for name in named if name.startswith("op.")} <= {
        f"op.{op}{way}" for op in ops.OPS for way in ("", "_backward")
    }
