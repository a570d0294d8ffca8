"""Attention in windows that are cut out already: ``softmax(scale q k^T + bias + mask) v``, forward and backward.

A program owns one head, a block of a window's tokens and a run of windows, mask by mask, and reads q, k and v by their
strides. No scores are ever in memory: the forward keeps the log-sum-exp of each row, in base 2, and the backward
computes the probabilities anew. Up to 64 tokens are one tile: bias and mask stay in registers until the mask changes,
and one launch gives every gradient. More tokens meet in tiles, with a softmax that is corrected as it goes, and a run
is one window. The backward then takes three launches: dq and delta, the sum of p dp of a row; dk and dv; the gradient
of bias and mask, over runs again. Tiles of the backward but those for dq are transposed, keys by queries, so that no
product has a transposed product on its left, which some Triton versions get wrong on Hopper.

Bias and mask are expanded once a call to whole tiles, times log2(e), -inf for keys beyond the window. Their gradients
are sums of what each run leaves, added in the order of the runs. Statistics are float32; results have the dtype of q.

Bytes of a window and head, at 2 bytes an element: forward 8 N d, backward 14 N d, with more than 64 tokens 30 N d.
Compiled for sm_80 and sm_90 at d = 32 it must show 16-byte loads of the streams, tensor instructions for the products,
no stack in the forward and less than 64 bytes of it in the backward.

Letters: B maps · M windows of one map · N tokens in one window · h heads · d head dim.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from florence_fast.kernels.configs import Config, config_of
from florence_fast.kernels.rel_pos_bias import fragment_place
from florence_fast.kernels.targets import target_of
from florence_fast.kernels.window_attention_tall import LOG2_E, bias_tile
from florence_fast.kernels.window_index import span_of_run

SIZES = ["num_maps", "num_masks", "num_heads", "num_runs"]
"""Arguments whose divisibility tells the compiler nothing."""
SCRATCH_BYTES = 128 << 20
"""What the partial gradients of the bias may take, if no mask wants more."""
LOWEST = {torch.float32: -1e30, torch.bfloat16: -1e30, torch.float16: -4e4}
"""What a finite bias or mask is raised to, so that it stays finite: a row that is masked as a whole has a softmax."""


@triton.jit
def _expand_kernel(
    source_ptr,  # (count, N, N), or nothing
    expanded_ptr,  # (count, ROWS*COLUMNS)
    N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FRAGMENTS: tl.constexpr, TRANSPOSED: tl.constexpr,
    SOURCE: tl.constexpr, HIDE: tl.constexpr, LOWEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Expand what is "added", or says what is "allowed", or "none"; keys beyond the window get -inf if HIDE."""
    PARTS: tl.constexpr = (ROWS * COLUMNS + BLOCK - 1) // BLOCK
    number, f = (tl.program_id(0) // PARTS).to(tl.int64), tl.program_id(0) % PARTS * BLOCK + tl.arange(0, BLOCK)
    row, column = f // COLUMNS, f % COLUMNS
    if FRAGMENTS:
        row, column = fragment_place(f % (64 * COLUMNS))
        row += f // (64 * COLUMNS) * 64
    i, j = (column, row) if TRANSPOSED else (row, column)
    value = tl.zeros((BLOCK,), tl.float32)
    if SOURCE != "none":
        read = (i < N) & (j < N)
        value = tl.load(source_ptr + number * (N * N) + i * N + j, mask=read, other=0).to(tl.float32)
        if SOURCE == "allowed":
            value = tl.where((value != 0) | ~read, 0.0, float("-inf"))
        else:
            value = tl.where((value < LOWEST) & (value > float("-inf")), LOWEST, value) * LOG2_E
    if HIDE:
        value = tl.where(j < N, value, float("-inf"))
    expanded_ptr += number * (ROWS * COLUMNS) + f
    tl.store(expanded_ptr, value.to(expanded_ptr.dtype.element_ty), mask=f < ROWS * COLUMNS)


@triton.jit
def _at(ptr, strides, w, head):
    """Point at the tokens of one window and head."""
    return ptr + (w * strides[0] + head.to(tl.int64) * strides[1])


@triton.jit
def _load_tokens(ptr, stride, i, N: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, WHOLE: tl.constexpr):
    """Load tokens ``i`` of a window (n, WIDE), zeros beyond N and D; WHOLE says that none is beyond N."""
    d = tl.arange(0, WIDE)
    ptr += i[:, None] * stride + d[None, :]
    if WHOLE and D == WIDE:
        return tl.load(ptr)
    else:
        real = (i < N)[:, None] if D == WIDE else (i < N)[:, None] & (d < D)[None, :]
        return tl.load(ptr, mask=real, other=0.0)


@triton.jit
def _load_pair(pair, i, N: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, WHOLE: tl.constexpr):
    """Load the same tokens of two tensors."""
    first_ptr, first_stride, second_ptr, second_stride = pair
    first = _load_tokens(first_ptr, first_stride, i, N, D, WIDE, WHOLE)
    return first, _load_tokens(second_ptr, second_stride, i, N, D, WIDE, WHOLE)


@triton.jit
def _store_tokens(ptr, i, x, N: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr):
    """Store tokens ``i`` of a window (N, D) that lies in one piece, in the dtype of the memory."""
    d = tl.arange(0, WIDE)
    real = (i < N)[:, None] if D == WIDE else (i < N)[:, None] & (d < D)[None, :]
    tl.store(ptr + i[:, None] * D + d[None, :], x.to(ptr.dtype.element_ty), mask=real)


@triton.jit
def _added_tile(
    ptrs, row, first, ROWS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, FRAGMENTS: tl.constexpr,
    HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Read what is added to a tile of the scores, times log2(e)."""
    bias_ptr, mask_ptr = ptrs
    added = bias_tile(bias_ptr, row, ROWS, first, WIDTH, COLUMNS, FRAGMENTS)
    if HAS_MASK:
        added += bias_tile(mask_ptr, row, ROWS, first, WIDTH, COLUMNS, FRAGMENTS)
    return added


@triton.jit
def _this_program(num_heads, num_runs, num_windows, BLOCKS: tl.constexpr):
    """Block, head, run, and the ends of the run: windows are counted mask by mask, neighbours share them."""
    block, rest = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    start, stop = span_of_run(num_windows, rest // num_heads, num_runs)
    return block, rest % num_heads, rest // num_heads, start, stop


@triton.jit
def _attend(q, k, v, added, scale, state, FIRST: tl.constexpr, PRECISION: tl.constexpr):
    """Let the rows meet some keys; ``state`` is their maxima, sums and results before, which FIRST ignores."""
    top, total, out = state
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + added
    new_top = tl.max(scores, 1) if FIRST else tl.maximum(top, tl.max(scores, 1))
    # A row that has seen no key yet keeps a sum of zero, and one that never does ends as 0 / 0.
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2(scores - base[:, None])
    if FIRST:
        return base, tl.sum(p, 1), tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    else:
        correction = tl.exp2(top - base)
        out = tl.dot(p.to(v.dtype), v, out * correction[:, None], input_precision=PRECISION)
        return new_top, total * correction + tl.sum(p, 1), out


@triton.jit(do_not_specialize=SIZES)
def _window_attention_partitioned_fwd_kernel(
    q_ptr, k_ptr, v_ptr,  # (B*M, h, N, d) by their strides
    bias_ptr,  # (h, ROWS*BLOCKS, COLUMNS)
    mask_ptr,  # (M, ROWS*BLOCKS, COLUMNS), read if HAS_MASK
    out_ptr,  # (B*M, h, N, d)
    lse_ptr,  # (B*M, h, N) float32; written if KEEP_LSE
    q_strides, k_strides, v_strides, num_maps, num_masks, num_heads, num_runs, scale, N: tl.constexpr, D: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    FRAGMENTS: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr, KEEP_LSE: tl.constexpr,
):  # fmt: skip
    AREA: tl.constexpr = ROWS * BLOCKS * COLUMNS
    block, head, run, start, stop = _this_program(num_heads, num_runs, num_maps * num_masks, BLOCKS)
    row, key, scale = block * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH), scale * LOG2_E
    bias_ptr, m = bias_ptr + head * AREA, start // num_maps
    top, total = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    nothing = (top, total, tl.zeros((ROWS, WIDE), tl.float32))
    for _ in range(start // num_maps, tl.cdiv(stop, num_maps)):
        ptrs = (bias_ptr, mask_ptr + m.to(tl.int64) * AREA)
        if COLUMNS == WIDTH:
            added = _added_tile(ptrs, block * ROWS, 0, ROWS, WIDTH, COLUMNS, FRAGMENTS, HAS_MASK)
        for b in range(tl.maximum(start - num_maps * m, 0), tl.minimum(stop - num_maps * m, num_maps)):
            w = (num_masks * b + m).to(tl.int64)
            pair = (_at(k_ptr, k_strides, w, head), k_strides[2], _at(v_ptr, v_strides, w, head), v_strides[2])
            q = _load_tokens(_at(q_ptr, q_strides, w, head), q_strides[2], row, N, D, WIDE, ROWS * BLOCKS == N)
            state = nothing
            for first in range(0, COLUMNS, WIDTH):
                k, v = _load_pair(pair, first + key, N, D, WIDE, COLUMNS == N)
                if COLUMNS > WIDTH:
                    added = _added_tile(ptrs, block * ROWS, first, ROWS, WIDTH, COLUMNS, FRAGMENTS, HAS_MASK)
                state = _attend(q, k, v, added, scale, state, COLUMNS == WIDTH, PRECISION)
            top, total, out = state
            statistic = (w * num_heads + head) * N
            _store_tokens(out_ptr + statistic * D, row, out * (1.0 / total)[:, None], N, D, WIDE)
            if KEEP_LSE:
                tl.store(lse_ptr + statistic + row, top + tl.log2(total), mask=row < N)
        m += 1


@triton.jit
def _probabilities(x, y, x_side, y_side, lse, added, scale, PRECISION: tl.constexpr):
    """Give the probabilities of a tile and their gradient; those beyond the window, whose lse is inf, are zero."""
    scores = tl.dot(x, tl.trans(y), input_precision=PRECISION) * scale + added
    return tl.exp2(scores - lse), tl.dot(x_side, tl.trans(y_side), input_precision=PRECISION)


@triton.jit(do_not_specialize=SIZES)
def _window_attention_partitioned_bwd_kernel(
    q_ptr, k_ptr, v_ptr,  # (B*M, h, N, d) by their strides
    bias_ptr,  # (h, ROWS*BLOCKS, COLUMNS), transposed unless FORM is "rows"
    mask_ptr,  # (M, ROWS*BLOCKS, COLUMNS), likewise, read if HAS_MASK
    dout_ptr,  # (B*M, h, N, d)
    lse_ptr,  # (B*M, h, N) float32
    delta_ptr,  # (B*M, h, N) float32; written by "rows", read by the other forms if a window is more than one tile
    dq_ptr,  # (B*M, h, N, d); written by "rows", or by "tile" if it is the whole window
    dk_ptr, dv_ptr,  # (B*M, h, N, d); written by "keys", or by "tile" if it is the whole window
    partial_ptr,  # (runs, h, ROWS*BLOCKS, COLUMNS) float32, transposed; written by "tile"
    q_strides, k_strides, v_strides, num_maps, num_masks, num_heads, num_runs, scale, N: tl.constexpr, D: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    FRAGMENTS: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """Differentiate a "tile" for the scores, a block of "rows" for q or one of "keys" for k and v."""
    AREA: tl.constexpr = ROWS * BLOCKS * COLUMNS
    ACROSS: tl.constexpr = COLUMNS // WIDTH if FORM == "tile" else 1
    ONE_TILE: tl.constexpr = AREA == ROWS * WIDTH
    WHOLE: tl.constexpr = ROWS * BLOCKS == N
    part, head, run, start, stop = _this_program(num_heads, num_runs, num_maps * num_masks, BLOCKS * ACROSS)
    block, first_column = part // ACROSS * ROWS, part % ACROSS * WIDTH
    row, column, log2_scale = block + tl.arange(0, ROWS), first_column + tl.arange(0, WIDTH), scale * LOG2_E
    bias_ptr, m, zeros = bias_ptr + head * AREA, start // num_maps, tl.zeros((ROWS, WIDE), tl.float32)
    if FORM == "tile":
        gradient = tl.zeros((ROWS, WIDTH), tl.float32)
    for _ in range(start // num_maps, tl.cdiv(stop, num_maps)):
        ptrs = (bias_ptr, mask_ptr + m.to(tl.int64) * AREA)
        if FORM == "tile":
            added = _added_tile(ptrs, block, first_column, ROWS, WIDTH, COLUMNS, FRAGMENTS, HAS_MASK)
        for b in range(tl.maximum(start - num_maps * m, 0), tl.minimum(stop - num_maps * m, num_maps)):
            w = (num_masks * b + m).to(tl.int64)
            statistic = (w * num_heads + head) * N
            here_lse, here_delta = lse_ptr + statistic, delta_ptr + statistic
            queries = (_at(q_ptr, q_strides, w, head), q_strides[2], dout_ptr + statistic * D, D)
            keys = (_at(k_ptr, k_strides, w, head), k_strides[2], _at(v_ptr, v_strides, w, head), v_strides[2])
            if FORM == "tile":
                k, v = _load_pair(keys, row, N, D, WIDE, WHOLE)
                q, dout = _load_pair(queries, column, N, D, WIDE, COLUMNS == N)
                lse = tl.load(here_lse + column, mask=column < N, other=float("inf"))
                p, dp = _probabilities(k, q, v, dout, lse[None, :], added, log2_scale, PRECISION)
                delta = tl.sum(p * dp, 0) if ONE_TILE else tl.load(here_delta + column, mask=column < N, other=0.0)
                ds = p * (dp - delta[None, :])
                gradient += ds
                if ONE_TILE:
                    low = ds.to(q.dtype)
                    dv = tl.dot(p.to(q.dtype), dout, input_precision=PRECISION)
                    dk = tl.dot(low, q, input_precision=PRECISION)
                    dq = tl.trans(tl.dot(tl.trans(k), low, input_precision=PRECISION))
                    _store_tokens(dq_ptr + statistic * D, column, dq * scale, N, D, WIDE)
                    _store_tokens(dk_ptr + statistic * D, row, dk * scale, N, D, WIDE)
                    _store_tokens(dv_ptr + statistic * D, row, dv, N, D, WIDE)
            if FORM == "rows":
                q, dout = _load_pair(queries, row, N, D, WIDE, WHOLE)
                lse = tl.load(here_lse + row, mask=row < N, other=float("inf"))
                # Each key is met once: sum p (dp - delta) k = sum p dp k - delta sum p k.
                delta, seen, moved = tl.zeros((ROWS,), tl.float32), zeros, zeros
                for first in range(0, COLUMNS, WIDTH):
                    k, v = _load_pair(keys, first + column, N, D, WIDE, COLUMNS == N)
                    tile = _added_tile(ptrs, block, first, ROWS, WIDTH, COLUMNS, FRAGMENTS, HAS_MASK)
                    p, dp = _probabilities(q, k, dout, v, lse[:, None], tile, log2_scale, PRECISION)
                    seen = tl.dot(p.to(k.dtype), k, seen, input_precision=PRECISION)
                    p *= dp
                    moved = tl.dot(p.to(k.dtype), k, moved, input_precision=PRECISION)
                    delta += tl.sum(p, 1)
                _store_tokens(dq_ptr + statistic * D, row, (moved - delta[:, None] * seen) * scale, N, D, WIDE)
                tl.store(here_delta + row, delta, mask=row < N)
            if FORM == "keys":
                k, v = _load_pair(keys, row, N, D, WIDE, WHOLE)
                dk, dv = zeros, zeros
                for first in range(0, COLUMNS, WIDTH):
                    q, dout = _load_pair(queries, first + column, N, D, WIDE, COLUMNS == N)
                    lse = tl.load(here_lse + first + column, mask=first + column < N, other=float("inf"))
                    delta = tl.load(here_delta + first + column, mask=first + column < N, other=0.0)
                    tile = _added_tile(ptrs, block, first, ROWS, WIDTH, COLUMNS, FRAGMENTS, HAS_MASK)
                    p, dp = _probabilities(k, q, v, dout, lse[None, :], tile, log2_scale, PRECISION)
                    dv = tl.dot(p.to(q.dtype), dout, dv, input_precision=PRECISION)
                    dk = tl.dot((p * (dp - delta[None, :])).to(q.dtype), q, dk, input_precision=PRECISION)
                _store_tokens(dk_ptr + statistic * D, row, dk * scale, N, D, WIDE)
                _store_tokens(dv_ptr + statistic * D, row, dv, N, D, WIDE)
        m += 1
    if FORM == "tile":
        partial_ptr += (run * num_heads + head).to(tl.int64) * AREA
        tl.store(partial_ptr + row[:, None] * COLUMNS + column[None, :], gradient)


@dataclass(frozen=True)
class _Call:
    """The arguments of a launcher, q, k and v with a contiguous last axis, and what follows from them."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    mask: Tensor | None
    scale: float
    precision: str
    num_masks: int

    @property
    def one_tile(self) -> bool:
        """Whether a window is one tile: registers do not hold 64 x 64 beside 64 channels of float32."""
        return self.q.shape[2] <= (64 if self.q.dtype != torch.float32 or self.q.shape[3] <= 32 else 32)

    @property
    def tiles(self) -> tuple[int, int, int, int, bool]:
        """ROWS to FRAGMENTS of every kernel."""
        tokens, narrow = self.q.shape[2], self.q.dtype == torch.float32
        side = max(16, triton.next_power_of_2(tokens)) if self.one_tile else 32 if narrow else 64
        width = side if self.one_tile else 32
        return side, triton.cdiv(tokens, side), width, triton.cdiv(tokens, width) * width, not (narrow or self.one_tile)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the scores of a window, in whole tiles."""
        rows, blocks, _, columns, _ = self.tiles
        return rows * blocks, columns

    def arguments(self, runs: int) -> tuple[object, ...]:
        """The arguments q_strides to PRECISION of every kernel."""
        windows, num_heads, tokens, head_dim = self.q.shape
        strides = (x.stride()[:3] for x in (self.q, self.k, self.v))
        sizes = (windows // self.num_masks, self.num_masks, num_heads, runs, self.scale, tokens, head_dim)
        wide = max(16, triton.next_power_of_2(head_dim))
        return *strides, *sizes, wide, *self.tiles, self.mask is not None, self.precision

    def config(self, kernel: str, backward: bool) -> Config:
        default = Config(num_warps=4, num_stages=2, programs_per_sm=2 if backward or self.q.shape[3] > 64 else 3)
        if (self.q.dtype == torch.float32 and self.one_tile) or (backward and self.q.shape[3] > 32):
            default = Config(num_warps=8, num_stages=1, programs_per_sm=1)
        tokens, head_dim = self.q.shape[2:]
        return config_of(kernel, target_of(self.q.device).arch, self.q.dtype, tokens, head_dim, default)

    def runs(self, config: Config, programs_per_run: int, needs_mask: bool = False) -> int:
        """Into how many runs the windows are cut; none crosses from one mask to the next if its gradient is wanted."""
        runs = config.programs_per_sm * target_of(self.q.device).num_sms // (programs_per_run * self.q.shape[1])
        runs = max(1, min(runs, len(self.q), SCRATCH_BYTES // (4 * self.q.shape[1] * math.prod(self.shape))))
        return self.num_masks * max(1, runs // self.num_masks) if needs_mask else runs

    def expand(self, transposed: bool = False) -> tuple[Tensor, Tensor]:
        """Write bias and mask as the kernels read them; what is not there is zeros, or of no meaning."""
        area, dtype, expanded = math.prod(self.shape), torch.float32 if self.one_tile else self.q.dtype, []
        for source, count in ((self.bias, self.q.shape[1]), (self.mask, self.num_masks)):
            if source is None and expanded:
                return expanded[0], expanded[0]
            expanded.append(self.q.new_empty(count, area, dtype=dtype))
            kind = "none" if source is None else "allowed" if source.dtype == torch.bool else "added"
            _expand_kernel[(count * triton.cdiv(area, 1024),)](
                expanded[-1] if source is None else source.contiguous(), expanded[-1], self.q.shape[2], *self.shape,
                self.tiles[-1], transposed, kind, source is self.bias, LOWEST[dtype], 1024,
            )  # fmt: skip
        return expanded[0], expanded[1]


def _call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float, tf32: bool) -> _Call:
    """Put the arguments together; what a kernel cannot walk through by 32-bit strides of tokens is copied."""
    readable = (x if x.stride(3) == 1 and x.shape[2] * x.stride(2) < 1 << 31 else x.contiguous() for x in (q, k, v))
    return _Call(*readable, bias, mask, scale, "tf32" if tf32 else "ieee", 1 if mask is None else len(mask))


def window_attention_partitioned_fwd(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float, train: bool,
    tf32: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the result and, if ``train``, the log-sum-exp of each row, in base 2, (B*M, h, N)."""
    call, out = _call(q, k, v, bias, mask, scale, tf32), q.new_empty(q.shape)
    lse = q.new_empty(q.shape[:3] if train else 0, dtype=torch.float32)
    if out.numel() > 0:
        config, blocks = call.config("window_attention_partitioned_fwd", backward=False), call.tiles[1]
        runs = call.runs(config, 1) if call.one_tile else len(q)
        tensors = (call.q, call.k, call.v, *call.expand(), out, lse)
        _window_attention_partitioned_fwd_kernel[(runs * q.shape[1] * blocks,)](
            *tensors, *call.arguments(runs), train, **config.options
        )
    return out, lse


def window_attention_partitioned_bwd(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, lse: Tensor,
    needs: Sequence[bool], scale: float, tf32: bool = False,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Return the gradients of q, k, v, bias and mask, None where ``needs`` is false."""
    call, num_heads, (needs_bias, needs_mask) = _call(q, k, v, bias, mask, scale, tf32), q.shape[1], needs[3:]
    (_, blocks, width, columns, _), tokens = call.tiles, q.shape[2]
    grads, delta = [q.new_empty(q.shape) for _ in range(3)], torch.empty_like(lse)
    partial = lse.new_zeros(call.num_masks, num_heads, *(call.shape if q.numel() == 0 else (0, 0)))
    config = call.config("window_attention_partitioned_bwd", backward=True)

    def launch(form: str, runs: int, programs: int, added: tuple[Tensor, Tensor]) -> None:
        tensors = (call.q, call.k, call.v, *added, grad_out, lse, delta, *grads, partial)
        grid = (runs * num_heads * programs,)
        _window_attention_partitioned_bwd_kernel[grid](*tensors, *call.arguments(runs), form, **config.options)

    if q.numel() > 0:
        transposed = call.expand(transposed=True)
        if not call.one_tile:
            launch("rows", len(q), blocks, call.expand())
            if needs[1] or needs[2]:
                launch("keys", len(q), blocks, transposed)
        if call.one_tile or needs_bias or needs_mask:
            tiles = blocks * columns // width
            runs = call.runs(config, tiles, needs_mask)
            partial = lse.new_empty(runs, num_heads, *call.shape)
            launch("tile", runs, tiles, transposed)
    used = partial[..., :tokens, :tokens].mT
    return (
        *(grad if need else None for grad, need in zip(grads, needs[:3], strict=True)),
        used.sum(0).to(bias.dtype).contiguous() if needs_bias else None,
        used.unflatten(0, (call.num_masks, -1)).sum((1, 2)).to(mask.dtype).contiguous() if needs_mask else None,
    )
