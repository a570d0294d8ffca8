"""What the files of bench/ops say: formulas against the tensors and the products of the plain computation."""

import itertools
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench.ops
from bench import competitors, competitors_losses, harness, machine
from bench.budget.cases import CASES
from bench.gpu import stages
from bench.ops import (
    batched_nms,
    contrastive_loss,
    layer_norm_residual,
    nms,
    patch_merging,
)
from bench.session import Missing, Plan, Session, dtypes_of, entry_of, modes_of
from bench.store import Store
from florence_fast.ops import OPS
from florence_fast.ops.cases import Inputs, each
from florence_fast.ops.contrastive_loss.cases import repeated_setup, setup
from florence_fast.verify import exact_results
from florence_fast.verify.compare import relative_error, results

EVERY = stages.ops()
SIZES = [pytest.param(op, shape, id=f"{op.OP}-{name}") for op in EVERY for name, shape in op.REHEARSAL.items()]
SMALL = {"rel_pos_bias_table", "bias", "bias1", "bias2", "norm_weight", "norm_bias", "logit_scale", "logit_bias"}
"""Tensors whose size is not that of the batch and that the formulas leave out."""


def rival(op: ModuleType, inputs: Inputs) -> Callable:
    return op.COMPETITORS["eager"](inputs, Plan(rehearse=True)).function


def test_every_op_is_measured_by_a_stage_of_its_own():
    assert {entry_of(op) for op in EVERY} == set(OPS)
    files = {path.stem for path in Path(bench.ops.__file__).parent.glob("*.py")} - {"__init__"}
    names = [op.OP for op in EVERY]
    assert files == set(names) and len({op.PLACE for op in EVERY}) == len(EVERY)
    named = [stage.name for stage in stages.stages()]
    assert [name for name in named if name in names] == names and names[0] == "window_attention"
    assert named.index("tune") > named.index("nms") and named[-1] == "demo"


@pytest.mark.parametrize("op", EVERY, ids=lambda op: op.OP)
def test_every_size_has_a_dtype_and_the_names_of_its_competitors_are_known(op):
    assert set(op.SLOW_TO_BUILD) <= set(op.COMPETITORS)
    assert {"eager", "ours (triton)", "ours (torch)"} <= set(op.COMPETITORS)
    assert op.REHEARSAL and not set(op.REHEARSAL) & set(op.SHAPES)
    for shape in (*op.SHAPES.values(), *op.REHEARSAL.values()):
        assert dtypes_of(op, shape, stages.DTYPES)
        assert op.units(shape) >= 1
    assert all("fp32" in dtypes_of(op, shape, stages.DTYPES) for shape in op.REHEARSAL.values())


@pytest.mark.parametrize(("op", "shape"), SIZES)
def test_the_bytes_are_those_of_the_tensors(op, shape):
    inputs = op.setup(shape, torch.float32, "cpu", 0)
    norm = "norm" in op.OP and "weight" in inputs.tensors
    small = SMALL | ({"weight"} if norm else set())
    read = sum(x.numel() for name, x in inputs.tensors.items() if name not in small)
    outs = () if inputs.grad_out is None else each(inputs.grad_out)
    written = sum(x.numel() for x in outs if x.ndim)
    forward, itemsize = read + written, 4
    assert op.bytes_moved(shape, torch.float32, "forward") == forward * itemsize
    assert op.bytes_moved(shape, torch.bfloat16, "forward") == forward * 2
    if modes_of(op) == ("forward",):
        return
    # The sum is kept in place of its two terms, which have one gradient.
    saved = read // 2 if op is layer_norm_residual else read
    backward = 2 * saved + written
    assert op.bytes_moved(shape, torch.float32, "backward") == backward * itemsize
    assert op.bytes_moved(shape, torch.float32, "both") == (forward + backward) * itemsize


@pytest.mark.parametrize(("op", "shape"), SIZES)
def test_the_flops_are_those_of_the_plain_computation(op, shape):
    inputs = op.setup(shape, torch.float32, "cpu", 0)
    function = rival(op, inputs)
    with FlopCounterMode(display=False) as forward:
        function(**inputs.tensors)
    assert op.flops(shape, "forward") == forward.get_total_flops()
    if modes_of(op) == ("forward",):
        return
    with FlopCounterMode(display=False) as both:
        results(function, inputs.tensors, inputs.grad_out)
    assert op.flops(shape, "both") == both.get_total_flops()
    assert op.flops(shape, "backward") == op.flops(shape, "both") - op.flops(shape, "forward")


@pytest.mark.parametrize(("op", "shape"), SIZES)
def test_the_plain_computation_is_that_of_the_reference(op, shape):
    inputs = op.setup(shape, torch.float32, "cpu", 3)
    exact = exact_results(entry_of(op), inputs)
    plain = results(rival(op, inputs), inputs.tensors, inputs.grad_out)
    assert set(plain) == set(exact)
    for name, wanted in exact.items():
        assert relative_error(plain[name], wanted) < 1e-4, name


def test_the_static_budget_knows_the_names_that_the_ops_look_up():
    known, unpredicted = {case.name for case in CASES}, []
    for op in EVERY:
        sizes = itertools.product(op.SHAPES.values(), modes_of(op))
        asked = [name for shape, mode in sizes for name in op.budget_cases(shape, "bf16", mode)]
        unpredicted += [] if known & set(asked) else [op.OP]
    assert unpredicted == ["mlp", "conv_embed", "deform_conv2d", "batched_nms", "nms"]


@pytest.mark.parametrize("names", [None, 5], ids=["clip", "unicl"])
def test_a_repeated_batch_has_the_loss_and_gradients_that_follow_from_the_draw(names):
    inputs = repeated_setup(36, 16, names, 3, torch.float64, "cpu", 4)
    assert len(inputs.tensors["image_features"]) == 36 and len(inputs.smaller.tensors["text_features"]) == 12
    followed = inputs.enlarged(exact_results("contrastive_loss", inputs.smaller))
    computed = exact_results("contrastive_loss", inputs)
    assert set(followed) == set(computed)
    for name, wanted in computed.items():
        assert relative_error(followed[name], wanted) < 1e-12, name
    whole = repeated_setup(12, 16, names, 1, torch.float64, "cpu", 4)
    assert whole.smaller is None and torch.equal(whole.tensors["image_features"], inputs.tensors["image_features"][:12])
    with pytest.raises(ValueError, match="batch must be a multiple of repeats, got 10 and 3"):
        repeated_setup(10, 16, names, 3, torch.float64, "cpu")


@pytest.fixture
def session(tmp_path) -> Session:
    facts = machine.facts(torch.device("cpu"))
    store = Store(tmp_path / "gpu_here.json", facts["sources"])
    clock, plan = machine.Clock(5), Plan(rehearse=True)
    return Session(torch.device("cpu"), facts, store, tmp_path, clock, plan, 0.0, 1e9, 1e9, show=lambda line: None)


def rows_with(op: ModuleType, session: Session, function: Callable) -> dict[str, dict]:
    """Measure an op with eager and one competitor more; return the rows of that one by mode."""
    build = {"eager": op.COMPETITORS["eager"], "other": competitors.library(lambda inputs: function(inputs))}
    replaced = {"COMPETITORS": build, "SLOW_TO_BUILD": ()}
    harness.run_op(SimpleNamespace(**{**vars(op), **replaced}), session, ("fp32",))
    rows = [row for row in session.store.rows.values() if row["competitor"] == "other"]
    assert {row["status"] for row in session.store.rows.values() if row["competitor"] == "eager"} == {"timed"}
    return {row["mode"]: row for row in rows}


def test_of_a_repeated_batch_every_number_is_judged(session):
    def last_rows_wrong(inputs):
        plain = rival(contrastive_loss, inputs)

        def run(image_features, text_features, logit_scale):
            part = torch.ones(len(image_features), 1)
            part[-1] = 0.5
            return plain(image_features * part + (image_features * (1 - part)).detach(), text_features, logit_scale)

        return run

    op = SimpleNamespace(**{**vars(contrastive_loss), "REHEARSAL": {"t": contrastive_loss.REHEARSAL["tiny_repeated"]}})
    rows = rows_with(op, session, last_rows_wrong)
    assert {row["status"] for row in rows.values()} == {"wrong"}
    assert "too far from float64: dimage_features" in rows["both"]["reason"]


def test_boxes_have_one_mode_and_a_wrong_index_is_red(session):
    for op in (nms, batched_nms):
        rows = rows_with(op, session, lambda inputs: lambda boxes, scores: torch.arange(len(boxes)))
        assert list(rows) == ["forward"] and rows["forward"]["status"] == "wrong"
    inputs = batched_nms.setup(batched_nms.REHEARSAL["tiny"], torch.float32, "cpu", 1)
    kept = OPS["batched_nms"].function(**inputs.tensors, **inputs.options)
    assert 1 < len(kept) < len(inputs.tensors["scores"])
    assert torch.equal(rival(batched_nms, inputs)(**inputs.tensors), kept)


def test_of_several_results_each_is_judged(session):
    def no_sum(inputs):
        plain = rival(layer_norm_residual, inputs)
        return lambda **tensors: (tensors["x"] + 1.001 * tensors["residual"], plain(**tensors)[1])

    rows = rows_with(layer_norm_residual, session, no_sum)
    assert "too far from float64: out0, dresidual" in rows["backward"]["reason"]


def test_a_million_pairs_are_for_bfloat16_and_for_our_kernels_alone():
    shape = contrastive_loss.SHAPES["clip_1m_d512"]
    assert shape.batch >= 1_000_000 and contrastive_loss.SHAPES["clip_64k_d512"].batch == 65_536
    assert dtypes_of(contrastive_loss, shape, stages.DTYPES) == ("bf16",)
    features = torch.empty(shape.batch, shape.dim, device="meta", dtype=torch.bfloat16)
    inputs = SimpleNamespace(tensors={"image_features": features}, options={"labels": None}, device=features.device)
    for name, build in contrastive_loss.COMPETITORS.items():
        if name != "ours (triton)":
            with pytest.raises(Missing, match="measured up to 131,072 pairs"):
                build(inputs, Plan())


@pytest.mark.parametrize(("gigabytes", "labels", "has_room"), [(80, None, True), (80, 1, True), (40, None, False)])
def test_all_logits_are_written_where_they_have_room(monkeypatch, gigabytes, labels, has_room):
    card = SimpleNamespace(total_memory=gigabytes * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    features = torch.empty(65536, 512, device="meta", dtype=torch.bfloat16)
    inputs = SimpleNamespace(
        tensors={"image_features": features}, options={"labels": labels}, device=torch.device("cuda")
    )
    reason = competitors_losses.logits_have_no_room(inputs)
    assert (reason is None) == has_room
    assert has_room or "all logits need about 43 GB, and the device has 40" in reason


def test_the_draws_of_one_seed_are_equal_and_those_of_two_are_not():
    shape = patch_merging.REHEARSAL["tiny_ragged"]
    first, again, other = (patch_merging.setup(shape, torch.float32, "cpu", seed).tensors["x"] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert setup(4, 8, None, torch.float32, "cpu").options == {"labels": None}
