"""The backward of ``window_attention_long``: three kernels, each computing the probabilities anew.

The first gives dq and delta, the second dk and dv, the third the gradient of the bias.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from florence_fast.kernels.window_attention_long_bias_grad import _window_attention_long_bias_grad_kernel
from florence_fast.kernels.window_attention_long_dkdv import _window_attention_long_dkdv_kernel
from florence_fast.kernels.window_attention_long_dq import _window_attention_long_dq_kernel
from florence_fast.kernels.window_attention_long_tiles import (
    MAX_LOG_SCALE,
    config_of_tiles,
    flags_of,
    keeps_tokens,
    splits_of,
    sums_by_product,
    tiles_of,
    windows_of,
)
from florence_fast.kernels.window_call import WindowCall

SCRATCH_BYTES = 128 << 20
"""What the partial gradients of the bias may take."""


def long_backward(
    call: WindowCall, grad_out: Tensor, lse: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return dqkv, the partial sums of the gradients of the N x N bias and of what pads hold, and of ``logit_scale``.

    What ``needs``, in the order of ``window_attention_bwd``, does not ask for may be left out.
    """
    cosine = call.logit_scale is not None
    item, modern = call.qkv.dtype, call.target.arch >= 90
    # Wider tiles need fewer instructions. Only these two kernels have the registers, and only here.
    tiles, wide = tiles_of(call, 64), tiles_of(call, 128 if modern and call.head_dim <= 32 and not cosine else 64)
    default = config_of_tiles(tiles, call.head_dim)
    config = call.config("window_attention_long_bwd", call.tokens, default)
    splits = splits_of(call, config, tiles.blocks)
    programs = call.windows * splits
    dqkv, delta = torch.empty_like(call.qkv), torch.empty_like(lse)
    dlog_partial = call.partial(*((programs, call.num_heads) if call.logit_scale is not None else (0,)))
    dfill_partial = call.partial(*((programs, call.qkv.shape[-1]) if call.fills else (0,)))
    dbias_partial = call.partial(0, call.num_heads, wide.all_rows, wide.columns)
    if programs > 0:
        expanded, windows = call.expand(tiles.form(item)), windows_of(call)
        inputs = (call.fill, call.qkv if call.logit_scale is None else call.logit_scale, *windows)
        maps = (math.prod(call.size), call.windows_per_map, call.num_heads)
        flags, cut = flags_of(call), splits > 1
        constants, wide_constants = ((call.tokens, call.head_dim, *form.constants, *flags) for form in (tiles, wide))
        gradients = (grad_out, dqkv, lse, delta)
        # On sm_80 a product and one with the transposed factor do not share a copy of it.
        keeps_keys = keeps_tokens(call, tiles, 2 if modern else 3)
        keeps_queries = keeps_tokens(call, wide, 2 if modern else 4) and wide.columns <= 400
        grid = (programs * call.num_heads,)
        _window_attention_long_dq_kernel[grid](
            call.qkv,
            expanded,
            *inputs,
            *gradients,
            dlog_partial,
            *maps,
            splits,
            call.scale,
            *constants,
            keeps_keys,
            sums_by_product(call),
            cut,
            **config.options,
        )
        if needs[0] or needs[3]:
            turned = call.expand(wide.form(item, transposed=True))
            _window_attention_long_dkdv_kernel[grid](
                call.qkv,
                turned,
                *inputs,
                *gradients,
                dfill_partial,
                *maps,
                splits,
                call.scale,
                *wide_constants,
                keeps_queries,
                cut,
                **config.options,
            )
        if needs[1] or needs[2]:
            config = call.config("window_attention_long_bias_grad", call.tokens, default)
            down, across = wide.blocks + (wide.last > 0), wide.chunks + (wide.tail > 0)
            programs = down * across * call.num_heads
            bytes_per_run = 4 * call.num_heads * wide.all_rows * wide.columns
            runs = max(1, min(call.runs(config, programs), SCRATCH_BYTES // bytes_per_run))
            dbias_partial = call.partial(runs, *dbias_partial.shape[1:])
            _window_attention_long_bias_grad_kernel[(programs * runs,)](
                call.qkv,
                expanded if wide.form(item) == tiles.form(item) else call.expand(wide.form(item)),
                *inputs,
                grad_out,
                lse,
                delta,
                dbias_partial,
                *maps,
                runs,
                call.windows,
                call.scale,
                *wide_constants,
                **config.options,
            )
    dlogit_scale = None
    if call.logit_scale is not None:
        # The clamp passes the gradient at its border, as torch.clamp does.
        summed = dlog_partial.sum(0).view_as(call.logit_scale)
        dlogit_scale = torch.where(call.logit_scale <= MAX_LOG_SCALE.value, summed, 0).to(call.logit_scale.dtype)
    return dqkv, dbias_partial, dfill_partial, dlogit_scale
