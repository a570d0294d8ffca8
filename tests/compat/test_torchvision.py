"""`accelerate` on torchvision's Swin, Swin V2 and Swin3D: the same numbers, and torchvision's feature extraction."""

import copy
import pickle
import warnings
from collections import Counter

import pytest
import torch

from florence_fast.compat.accelerate import accelerate, restore
from tests.compat import third_party
from tests.compat.third_party import assert_as_good_in_bf16, assert_equal_to_rounding, error, randomize, run

torchvision = third_party.torchvision()
calls = third_party.calls

SIZES = {"embed_dim": 24, "depths": [2, 2], "num_heads": [1, 2], "num_classes": 5, "stochastic_depth_prob": 0.0}
# maps: 18x23 and 9x12, 8x8 and 4x4, 2x3 and 1x2 under windows of 4
RAGGED, EXACT, SMALL = (2, 3, 72, 92), (2, 3, 32, 32), (2, 3, 8, 12)
# clips of 5x9x7 and 5x5x4, 4x8x8 and 4x4x4, 2x3x4 and 2x2x2 under windows of 4x4x4
RAGGED_3D, EXACT_3D, SMALL_3D = (2, 3, 10, 36, 28), (2, 3, 8, 32, 32), (2, 3, 4, 12, 16)
SHAPES = {"v1": [RAGGED, EXACT, SMALL], "v2": [RAGGED, EXACT, SMALL], "3d": [RAGGED_3D, EXACT_3D, SMALL_3D]}
CASES = [(kind, shape) for kind, shapes in SHAPES.items() for shape in shapes]
NAMES = [f"{kind}-{name}" for kind in SHAPES for name in ("ragged", "exact", "small")]


def build(kind, seed=0, **changes):
    torch.manual_seed(seed)
    models = torchvision.models
    sizes = {**SIZES, **changes}
    if kind == "3d":
        model = models.video.swin_transformer.SwinTransformer3d([2, 4, 4], window_size=[4, 4, 4], **sizes)
    else:
        v2 = models.swin_transformer.SwinTransformerBlockV2, models.swin_transformer.PatchMergingV2
        blocks = dict(zip(("block", "downsample_layer"), v2, strict=True)) if kind == "v2" else {}
        model = models.SwinTransformer([4, 4], window_size=[4, 4], **blocks, **sizes)
    return randomize(model.eval())


def pair(*args, **kwargs):
    ours, theirs = build(*args, **kwargs), build(*args, **kwargs)
    accelerate(ours, verbose=False)
    return ours, theirs


@pytest.mark.parametrize(("kind", "shape"), CASES, ids=NAMES)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_same_output_and_gradients(kind, shape, training, calls):
    ours, theirs = (model.train(training) for model in pair(kind))
    image = torch.randn(*shape)
    assert_equal_to_rounding(run(ours, image), run(theirs, image))
    assert calls.count("window_attention") == calls.count("mlp") == 4
    assert calls.count("patch_merging") == (kind != "v2")
    assert calls.count("layer_norm") == (9 if kind == "v2" else 8), "two a block, and that of a merge of V2"


@pytest.mark.parametrize("kind", ["v1", "v2"])
@pytest.mark.parametrize("shape", [(2, 9, 14, 24), (2, 3, 8, 5, 24), (8, 6, 24)], ids=["map", "clip", "no-batch"])
def test_a_merge_alone(kind, shape, calls):
    ours, theirs = (build(kind).features[2] for _ in range(2))
    accelerate(ours, verbose=False)
    x = torch.randn(*shape)
    assert_equal_to_rounding(run(ours, x), run(theirs, x))
    by_the_op = ["patch_merging"] if x.ndim > 3 else []  # which wants a batch
    assert calls == (["layer_norm"] if kind == "v2" else by_the_op)


@pytest.mark.parametrize("kind", SHAPES)
def test_as_good_in_bf16(kind):
    ours, theirs = pair(kind)
    exact = copy.deepcopy(theirs).double()
    image = torch.randn(*SHAPES[kind][0]).bfloat16()
    found = [run(model.bfloat16(), image) for model in (ours, theirs)]
    assert_as_good_in_bf16(*found, run(exact, image.double()))


@pytest.mark.parametrize("kind", SHAPES)
def test_as_good_under_autocast(kind):
    ours, theirs = pair(kind)
    image = torch.randn(*SHAPES[kind][0])
    exact = run(copy.deepcopy(theirs).double(), image.double())
    with torch.autocast("cpu", torch.bfloat16):
        found = [run(model, image) for model in (ours, theirs)]
    assert_as_good_in_bf16(*found, exact)


def test_features_are_dropped_in_training(calls):
    ours = build("v1", dropout=0.5).features[1][1].attn  # theirs draws window by window: another order of draws
    accelerate(ours, verbose=False)
    x = torch.randn(2, 18, 23, 24)
    assert not torch.equal(ours.train()(x), ours(x))
    ours.dropout = 1.0
    assert not ours(x).any() and ours.eval()(x).any()
    assert calls.count("window_attention") == 4


@pytest.mark.parametrize("kind", SHAPES)
def test_stochastic_depth_draws_the_same_numbers(kind):
    ours, theirs = (model.train() for model in pair(kind, stochastic_depth_prob=0.5))
    image = torch.randn(8, *SHAPES[kind][1][1:])
    found = []
    for model in (ours, theirs):
        torch.manual_seed(3)
        found.append(run(model, image))
    assert_equal_to_rounding(*found)


def test_attention_dropout_runs_their_attention_and_our_mlp(calls):
    ours, theirs = (model.train() for model in pair("v1", attention_dropout=0.3))
    image = torch.randn(*EXACT)
    found = []
    for model in (ours, theirs):
        torch.manual_seed(3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.append(run(model, image))
    assert_equal_to_rounding(*found)
    assert "window_attention" not in calls and "mlp" in calls
    ours.eval()(image)
    assert "window_attention" in calls


def test_the_bias_of_k_counts_as_zero_in_v2():
    ours, theirs = pair("v2")
    for model in (ours, theirs):
        torch.nn.init.ones_(model.features[1][0].attn.qkv.bias)
    image = torch.randn(*RAGGED)
    found = [run(model, image) for model in (ours, theirs)]
    assert_equal_to_rounding(*found)
    assert not found[0]["features.1.0.attn.qkv.bias"][24:48].any()


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("part", ["attention", "merging", "mlp", "norm"])
def test_parts_are_switched_off(kind, part, calls):
    ours, theirs = build(kind), build(kind)
    accelerate(ours, verbose=False, **{part: False})
    image = torch.randn(*SHAPES[kind][1])
    assert error(ours(image), theirs(image)) <= 1e-5
    merge = "layer_norm" if kind == "v2" else "patch_merging"
    counts = Counter(window_attention=4, mlp=4, layer_norm=8) + Counter([merge])
    switched_off = {"attention": "window_attention", "merging": merge, "mlp": "mlp", "norm": "layer_norm"}[part]
    counts -= Counter({switched_off: {"merging": 1, "norm": 8}.get(part, 4)})
    assert Counter(calls) == counts


def test_attention_of_the_published_models(calls):
    with torch.device("meta"):
        models = [torchvision.models.swin_t(), torchvision.models.swin_v2_t(), torchvision.models.video.swin3d_t()]
    for model in models:
        kinds = accelerate(model, verbose=False).swapped
        assert sum(len(names) for kind, names in kinds.items() if "Attention" in kind) == 12


def test_feature_extraction_traces_their_forwards(calls):
    from torchvision.models.feature_extraction import create_feature_extractor

    ours, theirs = pair("v1")
    image = torch.randn(*EXACT)
    features = create_feature_extractor(ours, ["features.3"])(image)["features.3"]
    expected = create_feature_extractor(theirs, ["features.3"])(image)["features.3"]
    assert torch.equal(features, expected) and not calls


@pytest.mark.parametrize("kind", SHAPES)
def test_compiles_into_one_graph(kind):
    ours, theirs = pair(kind)
    image = torch.randn(*SHAPES[kind][0])
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert error(compiled(image), theirs(image)) <= 1e-5


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_and_the_way_back(copied, calls):
    ours, theirs = pair("3d")
    image = torch.randn(*RAGGED_3D)
    expected = ours(image)
    twin = copied(ours)
    calls.clear()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    assert torch.equal(twin(image), expected) and "window_attention" in calls
    assert list(twin.state_dict()) == list(theirs.state_dict())
    restore(twin)
    calls.clear()
    assert torch.equal(twin(image), theirs(image)) and not calls


def test_checkpointed_blocks():
    ours, theirs = (model.train() for model in pair("v1"))
    image = torch.randn(*EXACT)

    def call(model):
        x = model.features[0](image)
        for block in model.features[1]:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
        return x

    assert_equal_to_rounding(*(run(model, call=lambda model=model: call(model)) for model in (ours, theirs)))
