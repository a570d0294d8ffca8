"""Competitors that are not installed here would be called as their packages want it: stand-ins say what that is."""

import math
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from bench import competitors_losses, competitors_swin, competitors_windows
from bench.competitors import found
from bench.ops import (
    batched_nms,
    contrastive_loss,
    deform_conv2d,
    layer_norm,
    nms,
    sigmoid_loss,
    window_attention,
    window_attention_3d,
    window_attention_cosine,
    window_attention_partitioned,
)
from bench.session import Missing, Plan, entry_of
from florence_fast.ops import OPS
from florence_fast.ops.window_attention.cases import Shape
from florence_fast.verify import exact_results
from florence_fast.verify.compare import judge, relative_error, results


def test_a_package_is_missing_for_one_of_three_reasons(monkeypatch, tmp_path):
    with pytest.raises(Missing, match="no_such_package is not installed"):
        found("no_such_package", "thing")
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))
    with pytest.raises(Missing, match=r"the installed apex has no normalization\.fused_layer_norm"):
        found("apex", "normalization.fused_layer_norm")
    (tmp_path / "broken_here.py").write_text("raise RuntimeError('no GPU')")
    (tmp_path / "half_here.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Missing, match="broken_here cannot be imported: RuntimeError: no GPU"):
        found("broken_here", "thing")
    with pytest.raises(Missing, match="half_here cannot be imported: No module named"):
        found("half_here", "thing")
    assert found("torch", "nn.functional.gelu") is F.gelu


def pretend(monkeypatch, path: str, thing: object) -> None:
    """Install a package that has ``thing`` at this path, and let what needs a GPU run on the CPU."""
    *modules, last = path.split(".")
    for i in range(len(modules)):
        name = ".".join(modules[: i + 1])
        module = ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        if i:
            setattr(sys.modules[".".join(modules[:i])], modules[i], module)
    setattr(sys.modules[".".join(modules)], last, thing)
    for module in (competitors_windows, competitors_losses, competitors_swin, layer_norm):
        monkeypatch.setattr(module, "needs_gpu", lambda inputs: None)


def right(op: ModuleType, competitor: str, shape: object) -> bool:
    """Whether a competitor gives what the plain computation gives."""
    inputs = op.setup(shape, torch.float32, "cpu", 2)
    function = op.COMPETITORS[competitor](inputs, Plan()).function
    eager = op.COMPETITORS["eager"](inputs, Plan()).function
    found_here, plain = (results(each, inputs.tensors, inputs.grad_out) for each in (function, eager))
    return all(judgement.passed for judgement in judge(found_here, plain, exact_results(entry_of(op), inputs)))


def attention_of_xformers(q, k, v, attn_bias):
    """(B, N, h, d) in and out; rows of the bias begin at multiples of 8, and it has the shape of all scores."""
    assert attn_bias.shape == (q.shape[0], q.shape[2], q.shape[1], q.shape[1])
    assert attn_bias.stride(-2) % 8 == 0 and attn_bias.stride(-1) == 1
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_bias).transpose(1, 2)


@pytest.mark.parametrize("op", [window_attention, window_attention_3d, window_attention_partitioned])
def test_xformers_gets_padded_rows_and_the_windows_of_a_map_as_heads(monkeypatch, op):
    pretend(monkeypatch, "xformers.ops.memory_efficient_attention", attention_of_xformers)
    for shape in op.REHEARSAL.values():
        assert right(op, "xformers", shape)
    if op is window_attention:
        whole = window_attention.Shape(2, 6, 6, 2, window=3, shift=0, head_dim=16)
        assert right(op, "xformers", whole)


def test_flash_window_attention_v2_gets_windows_that_are_cut_out(monkeypatch):
    def attention(q, k, v, logit_scale, bias, mask):
        """Cosines of q and k, times exp of ``logit_scale`` (h, 1, 1), as the package computes them."""
        assert logit_scale.shape == (q.shape[1], 1, 1) and logit_scale.dtype == bias.dtype == q.dtype
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
        scores = scores * logit_scale.clamp(max=math.log(100)).exp() + bias
        if mask is not None:
            scores = (scores.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
        return scores.softmax(-1) @ v

    pretend(monkeypatch, "flash_win_attn_v2.flash_window_attention_v2.flash_win_attn_v2", attention)
    shape = window_attention_cosine.REHEARSAL["tiny"]
    with pytest.raises(Missing, match="takes float16 and bfloat16 only"):
        right(window_attention_cosine, "flash-window-attention-v2", shape)
    op, dtype = window_attention_cosine, torch.bfloat16
    inputs = op.setup(shape, dtype, "cpu", 2)
    function = op.COMPETITORS["flash-window-attention-v2"](inputs, Plan()).function
    plain = results(op.COMPETITORS["eager"](inputs, Plan()).function, inputs.tensors, inputs.grad_out)
    found_here = results(function, inputs.tensors, inputs.grad_out)
    assert all(j.passed for j in judge(found_here, plain, exact_results("window_attention", inputs)))


def one_direction(q, k, scale):
    logits = scale * q @ k.T
    return F.cross_entropy(logits, torch.arange(len(q)), reduction="none")


class WindowAttentionOfMonai(torch.nn.Module):
    """What SwinUNETR's has, and how it is called: (B*M, N, C) in and out, a mask (M, N, N) or None."""

    def __init__(self, dim, num_heads, window_size, qkv_bias=False, use_flash_attention=False):
        super().__init__()
        assert use_flash_attention and not qkv_bias
        self.num_heads = num_heads
        offsets, tokens = math.prod(2 * side - 1 for side in window_size), math.prod(window_size)
        self.relative_position_bias_table = torch.nn.Parameter(torch.zeros(offsets, num_heads))
        places = torch.cartesian_prod(*map(torch.arange, window_size)).view(tokens, -1)
        self.index = torch.zeros(tokens, tokens, dtype=torch.long)
        for axis, side in enumerate(window_size):
            offset = places[:, None, axis] - places[None, :, axis] + side - 1
            self.index = self.index * (2 * side - 1) + offset
        self.qkv, self.proj = torch.nn.Linear(dim, 3 * dim), torch.nn.Linear(dim, dim)

    def forward(self, x, mask):
        assert not torch.is_grad_enabled(), "the option is for inference"
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self.relative_position_bias_table[self.index].permute(2, 0, 1)
        if mask is not None:
            bias = (bias + mask[:, None]).repeat(len(x) // len(mask), 1, 1, 1)
        return self.proj(F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype)).transpose(1, 2).reshape(x.shape))


def monai_partition(x, window_size):
    cut = [part for size, side in zip(x.shape[1:-1], window_size, strict=True) for part in (size // side, side)]
    axes = range(1, len(cut) + 1)
    windows = x.view(len(x), *cut, -1).permute(0, *axes[::2], *axes[1::2], len(cut) + 1)
    return windows.reshape(-1, math.prod(window_size), x.shape[-1])


def monai_reverse(windows, window_size, dims):
    grid = [size // side for size, side in zip(dims[1:], window_size, strict=True)]
    x = windows.view(dims[0], *grid, *window_size, -1)
    axes = [axis for i in range(1, len(grid) + 1) for axis in (i, i + len(grid))]
    return x.permute(0, *axes, 2 * len(grid) + 1).reshape(*dims, -1)


@pytest.fixture
def monai(monkeypatch):
    pretend(monkeypatch, "monai.networks.nets.swin_unetr.WindowAttention", WindowAttentionOfMonai)
    module = sys.modules["monai.networks.nets.swin_unetr"]
    module.window_partition, module.window_reverse = monai_partition, monai_reverse
    return module


@pytest.mark.parametrize("op", [window_attention, window_attention_3d])
def test_monai_attends_in_the_place_of_its_projections(monai, op):
    unshifted = {window_attention: Shape(2, 14, 14, 2, shift=0, head_dim=16)}.get(op)
    for shape in (*op.REHEARSAL.values(), *([unshifted] if unshifted else [])):
        inputs = op.setup(shape, torch.float32, "cpu", 2)
        built = op.COMPETITORS["monai (sdpa)"](inputs, Plan())
        assert built.forward_only == "with a gradient MONAI takes its plain path, which is eager's"
        with torch.no_grad():
            out = built.function(**inputs.tensors)
        assert relative_error(out, exact_results("window_attention", inputs)["out"]) < 1e-5


def test_monai_is_missing_where_it_is_old_or_numbers_pairs_in_another_way(monai):
    build = window_attention.COMPETITORS["monai (sdpa)"]
    small = window_attention.setup(Shape(1, 5, 5, 1, head_dim=16), torch.float32, "cpu", 2)
    with pytest.raises(Missing, match="larger than the map"):
        build(small, Plan())
    monai.WindowAttention = lambda dim, num_heads, window_size: None
    with pytest.raises(Missing, match=r"no use_flash_attention in SwinUNETR: 1\.6 or newer"):
        build(small, Plan())
    del monai.window_reverse
    with pytest.raises(Missing, match=r"the installed monai has no networks\.nets\.swin_unetr\.window_reverse"):
        build(small, Plan())


def roll_and_partition(x, batch, height, width, channels, shift, side):
    assert x.is_contiguous() and x.shape == (batch, height, width, channels)
    x = x.roll((shift, shift), (1, 2)).view(batch, height // side, side, width // side, side, channels)
    return x.transpose(2, 3).reshape(-1, side, side, channels)


def merge_and_roll(windows, batch, height, width, channels, shift, side):
    assert windows.is_contiguous() and windows.shape[1:] == (side, side, channels)
    x = windows.view(batch, height // side, width // side, side, side, channels).transpose(2, 3)
    return x.reshape(batch, height, width, channels).roll((shift, shift), (1, 2))


@pytest.fixture
def swin_window_process(monkeypatch):
    """Both directions have the sizes and the shift of the forward."""
    name = "roll_and_window_partition_forward"
    pretend(monkeypatch, f"swin_window_process.{name}", roll_and_partition)
    module = sys.modules["swin_window_process"]
    module.window_merge_and_roll_forward = merge_and_roll
    module.roll_and_window_partition_backward = lambda grad, *sizes: merge_and_roll(grad, *back(sizes))
    module.window_merge_and_roll_backward = lambda grad, *sizes: roll_and_partition(grad, *back(sizes))
    return module


def back(sizes):
    return *sizes[:4], -sizes[4], sizes[5]


def test_window_process_rolls_and_partitions_and_has_gradients(swin_window_process):
    for shape in (window_attention.REHEARSAL["tiny_shifted"], Shape(2, 8, 8, 2, window=4, shift=2, head_dim=16)):
        assert right(window_attention, "window_process", shape)


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        (Shape(1, 14, 14, 1, shift=0), torch.float32, "nothing to fuse where windows are not shifted"),
        (Shape(1, 14, 15, 1), torch.float32, "maps only that the window divides"),
        (Shape(1, 14, 21, 1), torch.float32, "square maps only"),
        (Shape(1, 14, 14, 1), torch.bfloat16, "float16 and float32 only"),
    ],
)
def test_window_process_is_left_out_of_what_it_cannot_do(swin_window_process, shape, dtype, reason):
    inputs = window_attention.setup(shape, dtype, "cpu", 2)
    with pytest.raises(Missing, match=reason):
        window_attention.COMPETITORS["window_process"](inputs, Plan())


LOSSES = {
    "open_clip": (
        "open_clip.ClipLoss",
        lambda local_loss, gather_with_grad: (
            lambda a, b, scale: (one_direction(a, b, scale).mean() + one_direction(b, a, scale).mean()) / 2
        ),
    ),
    "Inf-CL": ("inf_cl.cal_flash_loss", lambda q, k, labels=None, scale=None, head_dim=256: one_direction(q, k, scale)),
    "cut-cross-entropy": (
        "cut_cross_entropy.linear_cross_entropy",
        lambda e, c, targets, filter_eps: F.cross_entropy(e @ c.T, targets),
    ),
}


@pytest.mark.parametrize("competitor", LOSSES)
def test_the_losses_of_others_are_ours_in_both_directions(monkeypatch, competitor):
    pretend(monkeypatch, *LOSSES[competitor])
    assert right(contrastive_loss, competitor, contrastive_loss.Shape(24, 256))
    with pytest.raises(Missing, match="has no labels"):
        right(contrastive_loss, competitor, contrastive_loss.Shape(24, 256, 5))


def test_inf_cl_takes_256_channels_at_a_time(monkeypatch):
    pretend(monkeypatch, *LOSSES["Inf-CL"])
    with pytest.raises(Missing, match="D must be a multiple of 256 here, got 32"):
        right(contrastive_loss, "Inf-CL", contrastive_loss.Shape(24, 32))


def test_siglip_kernel_gets_the_logarithm_of_the_scale(monkeypatch):
    def loss(image_features, text_features, log_temperature, bias):
        logits = log_temperature.exp() * image_features @ text_features.T + bias
        sign = 2 * torch.eye(len(logits)) - 1
        return -F.logsigmoid(sign * logits).sum() / len(logits)

    pretend(monkeypatch, "siglip_kernel.fused_siglip_loss", loss)
    assert right(sigmoid_loss, "siglip-kernel", sigmoid_loss.Shape(30, 16))


def test_norms_and_torchvision_are_called_with_their_arguments(monkeypatch):
    def apex(x, weight, bias, shape, eps):
        return F.layer_norm(x, shape, weight, bias, eps)

    def liger(x, weight, bias, eps):
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

    def deform(input, offset, weight, bias, padding, mask):
        return OPS["deform_conv2d"].reference(input, offset, weight, bias, padding=padding, mask=mask)

    pretend(monkeypatch, "apex.normalization.fused_layer_norm.mixed_dtype_fused_layer_norm_affine", apex)
    pretend(monkeypatch, "liger_kernel.transformers.functional.liger_layer_norm", liger)
    assert right(layer_norm, "apex", layer_norm.Shape(9, 24)) and right(layer_norm, "liger", layer_norm.Shape(9, 24))
    pretend(monkeypatch, "torchvision.ops.deform_conv2d", deform)
    assert right(deform_conv2d, "torchvision", deform_conv2d.REHEARSAL["tiny"])
    for op, name in ((nms, "nms"), (batched_nms, "batched_nms")):
        pretend(monkeypatch, f"torchvision.ops.{name}", OPS[name].reference)
        assert right(op, "torchvision", op.REHEARSAL["tiny"])
