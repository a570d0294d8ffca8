"""`accelerate` on MONAI's Swin, in 2-D and 3-D: the same numbers where windows shrink, pads stand and maps are odd."""

import copy
import pickle
import warnings
from collections import Counter

import pytest
import torch

from florence_fast.compat.accelerate import accelerate, restore
from tests.compat import third_party
from tests.compat.third_party import assert_as_good_in_bf16, assert_equal_to_rounding, error, randomize, run

nets = third_party.monai()
calls = third_party.calls

# maps of 32x48 to 4x6 under windows of 7x7, of 16x32x16 to 2x4x2 under windows of 4x7x3: ragged, and such that shrink
SIZE_2D, SIZE_3D = (64, 96), (32, 64, 32)
SIZES = {2: SIZE_2D, 3: SIZE_3D}


def build(axes, seed=0, **changes):
    """A Swin of four stages, the least that MONAI takes."""
    torch.manual_seed(seed)
    from monai.networks.nets.swin_unetr import SwinTransformer

    sizes = {"in_chans": 1, "embed_dim": 12, "depths": (2, 2, 1, 1), "num_heads": (1, 2, 2, 2)}
    shape = {2: {"window_size": (7, 7), "patch_size": (2, 2)}, 3: {"window_size": (4, 7, 3), "patch_size": (2, 2, 2)}}
    return randomize(
        SwinTransformer(spatial_dims=axes, **{**sizes, **shape[axes], "drop_path_rate": 0.0, **changes}).eval()
    )


def pair(*args, **kwargs):
    ours, theirs = build(*args, **kwargs), build(*args, **kwargs)
    accelerate(ours, verbose=False)
    return ours, theirs


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_same_output_and_gradients(axes, training, calls):
    ours, theirs = (model.train(training) for model in pair(axes))
    image = torch.randn(1, 1, *SIZES[axes])
    assert_equal_to_rounding(run(ours, image), run(theirs, image))
    assert calls.count("window_attention") == calls.count("mlp") == 6
    assert calls.count("patch_merging") == (4 if axes == 2 else 0)
    assert calls.count("layer_norm") == (12 if axes == 2 else 16), "two a block, and that of a merge of eight tokens"


def merge_without_two_corners(self, x):
    """As the older merge of MONAI 0.9 to 1.1: two of the eight tokens twice, two of them not at all."""
    assert x.ndim == 5 and not any(side % 2 for side in x.shape[1:4])
    corners = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1)]
    return self.reduction(self.norm(torch.cat([x[:, i::2, j::2, k::2] for i, j, k in corners], -1)))


MERGES = [(kind, size) for kind in ("merging", "mergingv2") for size in ((9, 14), (8, 6), (5, 8, 7), (4, 6, 8))]


@pytest.mark.parametrize(("kind", "size"), MERGES, ids=[f"{kind}-{'x'.join(map(str, s))}" for kind, s in MERGES])
def test_a_merge_alone(kind, size, calls):
    ours, theirs = (build(len(size), downsample=kind).layers1[0].downsample for _ in range(2))
    name = {"merging": "PatchMerging", "mergingv2": "PatchMergingV2"}[kind]
    assert accelerate(ours, verbose=False).swapped == {f"MONAI {name}": [""]}
    x = torch.randn(2, *size, 12)
    assert error(ours(x), theirs(x)) <= 1e-5
    assert calls == ["patch_merging" if len(size) == 2 else "layer_norm"]
    assert_equal_to_rounding(*(run(merge.double(), x.double()) for merge in (ours, theirs)), 1e-10)


def test_the_order_of_a_merge_is_that_of_its_own_forward(monkeypatch, calls):
    from monai.networks.nets.swin_unetr import PatchMerging

    of_all_eight = build(3, downsample="mergingv2").layers1[0].downsample
    x = torch.randn(1, 4, 6, 8, 12)
    monkeypatch.setattr(PatchMerging, "forward", merge_without_two_corners)
    ours, theirs = (build(3, downsample="merging").layers1[0].downsample for _ in range(2))
    accelerate(ours, verbose=False)
    assert_equal_to_rounding(run(ours, x), run(theirs, x))
    assert calls == ["layer_norm"] and error(ours(x), of_all_eight(x)) > 1e-2


def test_a_merge_that_cannot_be_asked_for_its_order_is_left_alone(monkeypatch):
    from monai.networks.nets.swin_unetr import PatchMergingV2

    merge = build(3, downsample="mergingv2").layers1[0].downsample
    monkeypatch.setattr(PatchMergingV2, "forward", lambda self, x: self.reduction(self.norm(x)))
    with pytest.raises(ValueError, match="could not be asked for its order: it gave"):
        accelerate(merge)
    monkeypatch.setattr(PatchMergingV2, "forward", lambda self, x, size: x)
    with pytest.raises(ValueError, match="could not be asked for its order: TypeError"):
        accelerate(merge)


@pytest.mark.parametrize("size", [(12, 28, 6), (8, 8, 20), (4, 4, 4)], ids=["shrinks", "mixed", "all-shrink"])
def test_windows_that_shrink_read_the_bias_as_theirs(size, calls):
    ours, theirs = pair(3)
    image = torch.randn(2, 1, *size)
    assert_equal_to_rounding(run(ours, image), run(theirs, image))
    assert calls.count("window_attention") == 6


@pytest.mark.parametrize("axes", [2, 3])
def test_as_good_in_bf16(axes):
    ours, theirs = pair(axes)
    image = torch.randn(1, 1, *SIZES[axes])
    exact = run(copy.deepcopy(theirs).double(), image.double())
    with torch.autocast("cpu", torch.bfloat16):
        found = [run(model, image) for model in (ours, theirs)]
    assert_as_good_in_bf16(*found, exact)


def test_swin_unetr_whole(calls):
    def unetr():
        torch.manual_seed(0)
        model = nets.SwinUNETR(1, 2, feature_size=12, depths=(2, 1, 1, 1), num_heads=(1, 2, 2, 4), spatial_dims=3)
        return randomize(model.eval(), std=0.1)

    ours, theirs = unetr(), unetr()
    assert len(accelerate(ours, verbose=False).swapped["MONAI SwinTransformerBlock"]) == 5
    image = torch.randn(1, 1, 64, 64, 32)
    with torch.no_grad():
        assert error(ours(image), theirs(image)) <= 1e-5
    assert calls.count("window_attention") == 5


def test_drop_path_and_checkpoints_draw_the_same_numbers():
    found = []
    for model in pair(3, drop_path_rate=0.5, use_checkpoint=True):
        torch.manual_seed(3)
        found.append(run(model.train(), torch.linspace(-1, 1, 4 * 16**3).view(4, 1, 16, 16, 16)))
    assert_equal_to_rounding(*found)


@pytest.mark.parametrize("flash", [False, True])
def test_their_flash_attention_is_replaced_too(flash, calls):
    ours, theirs = pair(3, use_flash_attention=flash)
    image = torch.randn(1, 1, 16, 32, 16)
    with torch.no_grad():
        assert error(ours(image)[-1], theirs(image)[-1]) <= 1e-5
    assert calls.count("window_attention") == 6


def test_attention_dropout_and_a_missing_mask_run_their_attention(calls):
    ours, theirs = (model.train() for model in pair(2, attn_drop_rate=0.3))
    image = torch.randn(1, 1, *SIZE_2D)
    found = []
    for model in (ours, theirs):
        torch.manual_seed(3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.append(run(model, image))
    assert_equal_to_rounding(*found)
    assert "window_attention" not in calls and "mlp" in calls
    mine, other = (model.eval().layers1[0].blocks[1] for model in (ours, theirs))
    x = torch.randn(1, 16, 16, 12)
    assert error(mine(x, None), other(x, None)) <= 1e-5 and "window_attention" not in calls


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("part", ["attention", "merging", "mlp", "norm"])
def test_parts_are_switched_off(axes, part, calls):
    ours, theirs = build(axes), build(axes)
    accelerate(ours, verbose=False, **{part: False})
    image = torch.randn(1, 1, *SIZES[axes])
    with torch.no_grad():
        assert error(ours(image)[-1], theirs(image)[-1]) <= 1e-5
    merge = "patch_merging" if axes == 2 else "layer_norm"
    counts = Counter({"window_attention": 6, "mlp": 6, "layer_norm": 12}) + Counter({merge: 4})
    switched_off = {"attention": "window_attention", "merging": merge, "mlp": "mlp", "norm": "layer_norm"}[part]
    counts -= Counter({switched_off: {"merging": 4, "norm": 12}.get(part, 6)})
    if part == "attention":
        counts -= Counter({"layer_norm": 6})  # their method for it begins with the norm
    assert Counter(calls) == counts


def test_an_attention_that_is_switched_off_may_be_anything(calls):
    ours, theirs = build(2), build(2)
    for model in (ours, theirs):
        model.layers1[0].blocks[1].attn.register_forward_hook(lambda module, args, out: 2 * out)
    assert accelerate(copy.deepcopy(ours), verbose=False).skipped
    assert not accelerate(ours, attention=False, verbose=False).skipped
    image = torch.randn(1, 1, *SIZE_2D)
    assert error(ours(image)[-1], theirs(image)[-1]) <= 1e-5
    assert "window_attention" not in calls and calls.count("mlp") == 6


def test_compiles_into_one_graph():
    block, other = (model.layers1[0].blocks[0] for model in pair(3))
    x = torch.randn(1, 9, 8, 7, 12)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert error(compiled(x, None), other(x, None)) <= 1e-5


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_files_and_the_way_back(copied, calls):
    ours, theirs = pair(2)
    image = torch.randn(1, 1, *SIZE_2D)
    expected = ours(image)[-1]
    twin = copied(ours)
    calls.clear()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    assert torch.equal(twin(image)[-1], expected) and "window_attention" in calls
    assert list(twin.state_dict()) == list(theirs.state_dict())
    assert len(restore(twin)) == 10
    calls.clear()
    assert torch.equal(twin(image)[-1], theirs(image)[-1]) and not calls
