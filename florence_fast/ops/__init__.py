"""The ops: check the arguments, choose the backend, run. Each op is a folder, described in spec.py."""

from florence_fast.ops.boxes import box_iou, generalized_box_iou
from florence_fast.ops.contrastive_loss import contrastive_loss, contrastive_loss_reference
from florence_fast.ops.conv_embed import conv_embed, conv_embed_reference
from florence_fast.ops.deform_conv2d import deform_conv2d, deform_conv2d_reference
from florence_fast.ops.dispatch import OPS, Explanation, backend, explain
from florence_fast.ops.l2_normalize import l2_normalize, l2_normalize_reference
from florence_fast.ops.layer_norm import layer_norm, layer_norm_reference
from florence_fast.ops.linear import linear
from florence_fast.ops.mlp import mlp, mlp_reference
from florence_fast.ops.nms import batched_nms, batched_nms_reference, nms, nms_reference
from florence_fast.ops.patch_merging import patch_merging, patch_merging_reference
from florence_fast.ops.sigmoid_loss import sigmoid_loss, sigmoid_loss_reference
from florence_fast.ops.spec import Op
from florence_fast.ops.window_attention import window_attention, window_attention_reference
from florence_fast.ops.window_attention_partitioned import (
    window_attention_partitioned,
    window_attention_partitioned_reference,
)

__all__ = [
    "OPS",
    "Explanation",
    "Op",
    "backend",
    "batched_nms",
    "batched_nms_reference",
    "box_iou",
    "contrastive_loss",
    "contrastive_loss_reference",
    "conv_embed",
    "conv_embed_reference",
    "deform_conv2d",
    "deform_conv2d_reference",
    "explain",
    "generalized_box_iou",
    "l2_normalize",
    "l2_normalize_reference",
    "layer_norm",
    "layer_norm_reference",
    "linear",
    "mlp",
    "mlp_reference",
    "nms",
    "nms_reference",
    "patch_merging",
    "patch_merging_reference",
    "sigmoid_loss",
    "sigmoid_loss_reference",
    "window_attention",
    "window_attention_partitioned",
    "window_attention_partitioned_reference",
    "window_attention_reference",
]
