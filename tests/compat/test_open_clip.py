"""Our losses against a plain formula and open_clip's own; ``import florence_fast as open_clip``; patching open_clip.

What needs the real open_clip skips where it is absent, as in CI.
"""

import argparse
import copy
import importlib.util
import json
import pickle
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import florence_fast as ff
from florence_fast.compat import clip_benchmark
from florence_fast.compat import open_clip as compat
from florence_fast.compat.open_clip import ClipLoss, SigLipLoss, names
from florence_fast.evaluate.features import evaluation_transform
from florence_fast.train.loss import ContrastiveLoss
from tests.compat import third_party

needs_open_clip = pytest.mark.skipif(importlib.util.find_spec("open_clip") is None, reason="open_clip is not installed")


def load_open_clip():
    """Import the real open_clip, which needs torchvision; here and in other processes."""
    third_party.torchvision()
    return pytest.importorskip("open_clip")


def leaves(dtype: torch.dtype = torch.float64, pairs: int = 7) -> dict[str, Tensor]:
    features = F.normalize(torch.randn(2, pairs, 16, dtype=torch.float64), dim=-1).to(dtype)
    scalars = (torch.tensor([value], dtype=dtype) for value in (9.0, -3.0))
    names = ("images", "texts", "scale", "bias")
    return {name: x.requires_grad_() for name, x in zip(names, (*features, *scalars), strict=True)}


def plain_clip(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    logits, labels = scale * images @ texts.T + bias, torch.arange(len(images))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def plain_siglip(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    signs = 2 * torch.eye(len(images), dtype=images.dtype) - 1
    return -F.logsigmoid(signs * (scale * images @ texts.T + bias)).sum() / len(images)


LOSSES = pytest.mark.parametrize("name, plain", [("ClipLoss", plain_clip), ("SigLipLoss", plain_siglip)])


def value_and_grads(loss, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
    value = loss(*tensors.values())
    return value.detach(), *torch.autograd.grad(value, list(tensors.values()))


@LOSSES
def test_alone_a_loss_is_the_plain_formula(name, plain):
    tensors = leaves()
    found = value_and_grads(getattr(ff, name)(cache_labels=True), tensors)
    torch.testing.assert_close(found, value_and_grads(plain, tensors), rtol=1e-11, atol=1e-12)


@needs_open_clip
@LOSSES
@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-11), (torch.float32, 1e-5)], ids=["float64", "float32"])
def test_alone_a_loss_is_that_of_open_clip(name, plain, dtype, rtol):
    tensors = leaves(dtype)
    theirs = getattr(load_open_clip().loss, name)()
    ours = getattr(compat, name)()
    torch.testing.assert_close(value_and_grads(ours, tensors), value_and_grads(theirs, tensors), rtol=rtol, atol=rtol)
    assert ours(*tensors.values(), output_dict=True) == {"contrastive_loss": ours(*tensors.values())}
    assert list(theirs(*tensors.values(), output_dict=True)) == ["contrastive_loss"]


@LOSSES
def test_bfloat16_is_judged_in_float32(name, plain):
    tensors = leaves(torch.bfloat16)
    exact = {key: tensor.detach().double().requires_grad_() for key, tensor in tensors.items()}
    found, expected = (value_and_grads(f, x) for f, x in ((getattr(compat, name)(), tensors), (plain, exact)))
    theirs = value_and_grads(plain, tensors)
    assert found[0].dtype == torch.float32
    for ours, other, truth in zip(found[:4], theirs, expected, strict=False):
        scale = truth.abs().max()
        assert (ours - truth).abs().max() <= 2 * (other - truth).abs().max() + 1e-6 * scale


@LOSSES
def test_features_of_two_dtypes_meet_in_the_wider_one(name, plain):
    tensors = leaves(torch.float32)
    tensors["texts"] = tensors["texts"].detach().bfloat16().requires_grad_()
    loss = getattr(compat, name)()
    wider = [x.float() for x in tensors.values()]
    torch.testing.assert_close(loss(*tensors.values()), plain(*wider), rtol=1e-5, atol=0, check_stride=False)
    assert value_and_grads(loss, tensors)[2].dtype == torch.bfloat16


def test_a_bias_that_a_softmax_does_not_see_has_a_gradient_of_zero():
    tensors = leaves()
    found = value_and_grads(ClipLoss(), tensors)
    assert found[-1].tolist() == [0.0]
    assert ClipLoss()(tensors["images"], tensors["texts"], 9.0) == found[0]
    without = SigLipLoss()(tensors["images"], tensors["texts"], 9.0, None)
    torch.testing.assert_close(without, plain_siglip(*list(tensors.values())[:3], 0), rtol=1e-12, atol=0)


@LOSSES
def test_a_loss_has_no_state_and_travels(name, plain):
    loss = getattr(compat, name)(rank=1, world_size=4)
    assert loss.state_dict() == {} and not list(loss.parameters())
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert (twin.rank, twin.world_size, repr(twin)) == (1, 4, repr(loss))


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: ClipLoss(use_horovod=True), "use_horovod=True is refused"),
        (lambda: ClipLoss(rank=2, world_size=2), r"rank must be in \[0, world_size=2\), got 2"),
        (lambda: SigLipLoss(dist_impl="bidirectional"), "unknown dist_impl 'bidirectional'; known: bidir, shift"),
        (lambda: SigLipLoss(rank=-1), r"rank must be in \[0, world_size=1\), got -1"),
        (lambda: ClipLoss(world_size=2)(torch.eye(3), torch.eye(3), 1.0), "rank 0 of 2, and .* rank 0 of 1"),
    ],
)
def test_what_open_clip_cannot_mean_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_the_combination_whose_gradient_is_of_no_loss_warns_where_it_matters():
    with pytest.warns(UserWarning, match="leaves out the gradients of all columns"):
        ClipLoss(local_loss=True, world_size=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ClipLoss(local_loss=True)
        ClipLoss(local_loss=True, gather_with_grad=True, world_size=2)


def test_the_names_of_open_clip_are_all_there():
    import florence_fast as open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(
        "florence_nano", pretrained="artists", load_weights=True, jit=False, force_quick_gelu=False, cache_dir="x"
    )
    tokenizer = open_clip.get_tokenizer("florence_nano", cache_dir="x")
    templates, classnames = open_clip.OPENAI_IMAGENET_TEMPLATES[:2], open_clip.IMAGENET_CLASSNAMES[:3]
    assert open_clip.build_zero_shot_classifier(model, tokenizer, classnames, templates).shape == (256, 3)
    assert ("florence_nano", "artists") in open_clip.list_pretrained()
    assert {"florence_nano", "coswin_tiny"} <= set(open_clip.list_models())
    assert open_clip.get_model_config("florence_nano") == model.config
    assert repr(open_clip.image_transform(64, is_train=False)) and callable(preprocess)
    assert open_clip.ClipLoss is ClipLoss and open_clip.SigLipLoss is SigLipLoss


def test_tokenize_is_the_tokenizer_without_a_name():
    tokens = ff.tokenize(["a photo of a cat", "a dog"])
    assert tokens.shape == (2, 77) and tokens[0, :7].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert torch.equal(ff.get_tokenizer()("a dog", 8), ff.tokenize("a dog", context_length=8))


def test_weights_that_are_not_wanted_are_not_loaded():
    torch.manual_seed(0)
    drawn = ff.create_model("florence_nano")
    torch.manual_seed(0)
    model = ff.create_model("florence_nano", "artists", load_weights=False, output_dict=None)
    assert torch.equal(model.visual.norm.weight, drawn.visual.norm.weight)
    assert torch.equal(model.text.token_embedding.weight, drawn.text.token_embedding.weight)


@pytest.mark.parametrize(
    "keyword, value",
    [("jit", True), ("force_quick_gelu", True), ("pretrained_image", True), ("force_patch_dropout", 0.5)],
)
def test_a_keyword_that_a_model_of_ours_cannot_follow_is_refused(keyword, value):
    with pytest.raises(ValueError, match=f"{keyword}={value!r} is open_clip's"):
        ff.create_model_and_transforms("florence_nano", **{keyword: value})


def test_the_way_of_resizing_is_the_models_and_its_transforms_follow():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 90, 3), dtype=np.uint8))
    for keywords in ({}, {"image_resize_mode": "squash", "image_interpolation": "bilinear"}):
        model, _, transform = ff.create_model_and_transforms("florence_nano", **keywords)
        given = dict(zip(("resize_mode", "interpolation"), keywords.values(), strict=False))
        wanted = ff.image_transform(64, False, 0.5, 0.25, **given)
        assert torch.equal(transform(image), wanted(image))
        assert torch.equal(evaluation_transform(model)(image), wanted(image))


@pytest.mark.parametrize(
    "call",
    [
        lambda: ff.create_model("ViT-B-32", pretrained="openai"),
        lambda: ff.create_model_and_transforms("ViT-B-32"),
        lambda: ff.create_model_from_pretrained("ViT-B-32", "openai"),
        lambda: ff.get_tokenizer("ViT-B-32"),
        lambda: ff.get_model_config("ViT-B-32"),
    ],
)
def test_without_open_clip_the_error_says_what_to_install(monkeypatch, call):
    monkeypatch.setattr(names.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"unknown model 'ViT-B-32'; known: .*pip install 'florence_fast\[open_clip\]'"
    ):
        call()
    with pytest.raises(ValueError, match="did you mean 'florence_nano'"):
        ff.create_model("florence_nanoo")


def test_clip_benchmark_gets_a_model_a_transform_and_a_tokenizer():
    from PIL import Image

    model, transform, tokenizer = clip_benchmark.load("florence_nano", "artists", cache_dir=None, device="cpu")
    images = transform(Image.new("RGB", (80, 60)))[None]
    assert not model.training
    assert model.encode_image(images).shape == model.encode_text(tokenizer(["a cat"])).shape == (1, 256)
    with pytest.raises(ValueError, match="reads no text"):
        clip_benchmark.load("coswin_nano", "", None, "cpu")


@pytest.fixture
def tiny_vit(tmp_path):
    """A small model of open_clip's under a name of its own, as a user's JSON file adds one."""
    load_open_clip()
    sizes = {"width": 32, "layers": 2}
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "patch_size": 16, "head_width": 16, **sizes},
        "text_cfg": {"context_length": 12, "vocab_size": 49408, "heads": 2, **sizes},
    }
    (tmp_path / "ViT-tiny-test.json").write_text(json.dumps(config))
    ff.add_model_config(tmp_path / "ViT-tiny-test.json")
    return "ViT-tiny-test"


@needs_open_clip
def test_a_name_that_we_lack_is_open_clips(tiny_vit, tmp_path):
    from PIL import Image

    open_clip = load_open_clip()
    torch.manual_seed(1)
    theirs, _, transform = open_clip.create_model_and_transforms(tiny_vit)
    torch.save(theirs.state_dict(), tmp_path / "weights.pt")
    model, _, preprocess = ff.create_model_and_transforms(tiny_vit, pretrained=tmp_path / "weights.pt")
    image = preprocess(Image.new("RGB", (50, 40), (10, 200, 90)))[None]
    assert torch.equal(image, transform(Image.new("RGB", (50, 40), (10, 200, 90)))[None])
    tokens = ff.get_tokenizer(tiny_vit)(["a cat", "a dog"])
    assert tokens.shape == (2, 12) and torch.equal(tokens, open_clip.get_tokenizer(tiny_vit)(["a cat", "a dog"]))
    for found, expected in zip(model(image, tokens), theirs.eval()(image, tokens), strict=True):
        torch.testing.assert_close(found, expected)
    classifier = ff.build_zero_shot_classifier(model, ff.get_tokenizer(tiny_vit), ["cat", "dog"], ["a {}."])
    assert classifier.shape == (24, 2)
    assert ff.get_model_config(tiny_vit)["embed_dim"] == 24
    fresh = ff.create_model(tiny_vit)
    ff.load_checkpoint(fresh, tmp_path / "weights.pt")
    assert torch.equal(fresh.visual.conv1.weight, theirs.visual.conv1.weight)
    loaded, *_ = clip_benchmark.load(tiny_vit, str(tmp_path / "weights.pt"), None, "cpu")
    torch.testing.assert_close(loaded.encode_image(image), theirs.encode_image(image))


@needs_open_clip
def test_a_name_that_neither_has_gives_the_nearest_of_both():
    load_open_clip()
    with pytest.raises(ValueError, match=r"'ViT-B-33' \(did you mean 'ViT-B-32'.* of open_clip"):
        ff.create_model("ViT-B-33")
    with pytest.raises(ValueError, match="did you mean 'florence_nano'"):
        ff.get_tokenizer("florence_nanoo")


@needs_open_clip
def test_a_swin_inside_a_model_of_open_clip_is_accelerated(tiny_vit, tmp_path):
    third_party.timm()
    config = {**ff.get_model_config(tiny_vit), "vision_cfg": {"timm_model_name": "swin_tiny_patch4_window7_224"}}
    config["vision_cfg"] |= {"timm_pool": "", "timm_proj": "linear", "image_size": 224}
    (tmp_path / "swin-tiny-test.json").write_text(json.dumps(config))
    ff.add_model_config(tmp_path)
    torch.manual_seed(2)
    theirs = load_open_clip().create_model("swin-tiny-test").eval()
    torch.save(theirs.state_dict(), tmp_path / "weights.pt")
    model = ff.create_model("swin-tiny-test", pretrained=str(tmp_path / "weights.pt")).eval()
    assert [name for name in ff.restore(copy.deepcopy(model)) if name.startswith("visual.trunk.layers.3")]
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        found, expected = model.encode_image(image), theirs.encode_image(image)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_swin_of_timm_by_its_name_is_accelerated():
    timm = third_party.timm()
    if importlib.util.find_spec("open_clip"):
        load_open_clip()
    torch.manual_seed(4)
    theirs = timm.create_model("swin_tiny_patch4_window7_224", num_classes=3).eval()
    torch.manual_seed(4)
    model = ff.create_model("swin_tiny_patch4_window7_224", num_classes=3).eval()
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(model(image), theirs(image), rtol=1e-4, atol=1e-5)
    assert ff.restore(model)
    with pytest.raises(ValueError, match="precision 'half'"):
        ff.create_model("swin_tiny_patch4_window7_224", precision="half")


@pytest.fixture
def patched():
    """The real open_clip with our losses inside, for the length of a test."""
    open_clip = load_open_clip()
    own = open_clip.loss.ClipLoss, open_clip.loss.SigLipLoss
    swapped = compat.patch_open_clip()
    yield open_clip, swapped, own
    if compat.patching._replaced:
        compat.unpatch_open_clip()


@needs_open_clip
def test_open_clip_builds_our_losses_until_it_is_given_back_its_own(patched):
    open_clip, swapped, own = patched
    expected = {
        "open_clip.ClipLoss",
        *(f"open_clip.{m}.{n}" for m in ("loss", "factory") for n in compat.patching.LOSSES),
    }
    assert set(swapped) == expected
    arguments = {"distill": False, "model": "ViT-B-32", "local_loss": True, "gather_with_grad": True, "horovod": False}
    arguments |= {"rank": 1, "world_size": 2, "loss_dist_impl": "shift", "siglip": False}
    loss = open_clip.create_loss(argparse.Namespace(**arguments))
    assert type(loss) is ClipLoss and (loss.local_loss, loss.gather_with_grad, loss.rank) == (True, True, 1)
    siglip = open_clip.create_loss(argparse.Namespace(**{**arguments, "siglip": True}))
    assert type(siglip) is SigLipLoss and siglip.dist_impl == "shift"
    with pytest.raises(ValueError, match=r"nothing in open_clip was swapped: .*patched already"):
        compat.patch_open_clip()
    assert set(compat.unpatch_open_clip()) == expected
    assert (open_clip.factory.ClipLoss, open_clip.factory.SigLipLoss) == own == (open_clip.ClipLoss, own[1])
    with pytest.raises(ValueError, match="open_clip is not patched"):
        compat.unpatch_open_clip()


@needs_open_clip
def test_a_training_step_of_open_clip_with_our_loss_is_its_own(patched, tiny_vit):
    open_clip, _, (theirs, _) = patched
    grads = []
    for kind in (theirs, open_clip.ClipLoss):
        torch.manual_seed(3)
        model = open_clip.create_model(tiny_vit, output_dict=True).double()
        images = torch.randn(5, 3, 32, 32, dtype=torch.float64)
        out = model(images, torch.randint(1, 49000, (5, 12)))
        sum(kind(cache_labels=True)(**out, output_dict=True).values()).backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and "logit_scale" in grads[0]
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-9, atol=1e-12)


def test_patching_an_open_clip_that_is_absent_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "open_clip", None)
    with pytest.raises(ImportError, match=r"pip install 'florence_fast\[open_clip\]'"):
        compat.patch_open_clip()


def test_our_own_loss_is_the_same_number():
    tensors = list(leaves().values())[:3]
    assert ClipLoss()(*tensors) == ContrastiveLoss()(*tensors)
