"""Window attention for windows in 3-D, of more than 144 tokens, and by cosines: the rows and the keys in parts.

What ``window_attention`` says holds here too, except that a program owns one head of one window, or some of its rows,
and goes through blocks of 64 rows; each meets the keys in chunks, with a softmax that is corrected as it goes. Where
a window's tokens lie is read from the list of ``window_index``, for the arithmetic of three axes would cost as much
as the softmax. The bias is read per tile as ``window_attention_tall`` reads it. The forward of a training step keeps
the log-sum-exp of each row, in base 2.

Cosine attention (Swin V2) multiplies q k^T, of q and k as they are, by the inverse norms of both and by
exp(min(logit_scale, log 100)), all in float32: a cosine rounded to 16 bits would be wrong by 0.2 after a factor of 100.

Bytes of a window and head, at 2 bytes an element: forward 8 N d. Exponentials bind before them from N = 221 on an
H200 and 366 on an A100: N^2 / 16 clocks of a multiprocessor.

Letters: B batch · T frames · H W map height and width · C channels · M windows of one map · N tokens in one window ·
h heads · d head dim.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from florence_fast.kernels.configs import Config
from florence_fast.kernels.rel_pos_bias import BiasForm
from florence_fast.kernels.window_attention_tall import LOG2_E, bias_tile, fast_log2
from florence_fast.kernels.window_call import WindowCall
from florence_fast.kernels.window_index import BEYOND, PAD, hide_other_regions, list_windows

SIZES = ["tokens", "num_windows", "num_heads", "splits"]
"""Arguments whose divisibility tells the compiler nothing."""
MAX_LOG_SCALE = tl.constexpr(math.log(100.0))
EPSILON = tl.constexpr(1e-12)
"""The least norm that a token is divided by, as in torch.nn.functional.normalize."""


@triton.jit
def this_program(num_heads, splits, num_windows):
    """Head, part of the window, batch element and window in its map of this program."""
    head, rest = tl.program_id(0) % num_heads, tl.program_id(0) // num_heads
    split, window = rest % splits, rest // splits
    return head, split, window, window // num_windows, window % num_windows


@triton.jit
def load_places(place_ptr, i, N: tl.constexpr):
    """Numbers, on their map, of tokens ``i`` of a window, PAD, or BEYOND."""
    return tl.load(place_ptr + i, mask=i < N, other=BEYOND)


@triton.jit
def load_at(ptr, place, stride, fill_ptr, d, FILL: tl.constexpr, WHOLE: tl.constexpr):
    """Load the tokens (n, d) at their places; pads hold (d,) at ``fill_ptr`` if FILL, else zeros."""
    offset = place.to(tl.int64)[:, None] * stride + d[None, :]
    if WHOLE:
        return tl.load(ptr + offset)
    else:
        x = tl.load(ptr + offset, mask=(place >= 0)[:, None], other=0.0)
        if FILL:
            x = tl.where((place == PAD)[:, None], tl.load(fill_ptr + d)[None, :].to(x.dtype), x)
        return x


@triton.jit
def store_at(ptr, place, stride, x, d, WHOLE: tl.constexpr):
    """Store the tokens (n, d) at their places, in the dtype of the memory."""
    offset, x = place.to(tl.int64)[:, None] * stride + d[None, :], x.to(ptr.dtype.element_ty)
    if WHOLE:
        tl.store(ptr + offset, x)
    else:
        tl.store(ptr + offset, x, mask=(place >= 0)[:, None])


@triton.jit
def inverse_norms(x):
    """1/|x| of tokens (n, d), in float32."""
    x = x.to(tl.float32)
    return 1.0 / tl.maximum(tl.sqrt(tl.sum(x * x, 1)), EPSILON)


@triton.jit
def scale_of(logit_scale_ptr, head, scale, COSINE: tl.constexpr):
    """What multiplies q k^T, or the cosine, before the bias is added."""
    if COSINE:
        return tl.exp(tl.minimum(tl.load(logit_scale_ptr + head).to(tl.float32), MAX_LOG_SCALE))
    else:
        return scale


@triton.jit
def scores_of_tile(
    x, y, factor_x, factor_y, bias, region_ptr, i, j, N: tl.constexpr, COSINE: tl.constexpr, PRECISION: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """Give x y^T + bias, or the cosines times their factor + bias, of tokens ``i`` and ``j``, each way round."""
    if EDGE:
        region_i = tl.load(region_ptr + i, mask=i < N, other=0).to(tl.int32)
        region_j = tl.load(region_ptr + j, mask=j < N, other=0).to(tl.int32)
        bias = hide_other_regions(region_i, region_j, bias, PRECISION if x.dtype == tl.float32 else "tf32")
    if COSINE:
        scores = tl.dot(x, tl.trans(y), input_precision=PRECISION)
        return scores * (factor_x[:, None] * factor_y[None, :]) + bias
    else:
        return tl.dot(x, tl.trans(y), bias, input_precision=PRECISION)


@triton.jit
def _load_chunk(
    ptrs, first, C, d, WIDTH: tl.constexpr, WHOLE: tl.constexpr, N: tl.constexpr, FILL: tl.constexpr,
):  # fmt: skip
    """Load WIDTH keys from ``first`` on, and their values."""
    qkv_ptr, bias_ptr, fill_ptr, place_ptr, region_ptr, out_ptr, lse_ptr = ptrs
    place = load_places(place_ptr, first + tl.arange(0, WIDTH), N)
    k = load_at(qkv_ptr + C, place, 3 * C, fill_ptr + C, d, FILL, WHOLE)
    return k, load_at(qkv_ptr + 2 * C, place, 3 * C, fill_ptr + 2 * C, d, FILL, WHOLE)


@triton.jit
def _attend_chunk(
    q, k, v, factor, row, state, ptrs, first, scale, FIRST_ROW, COLUMNS: tl.constexpr, N: tl.constexpr,
    FRAGMENTS: tl.constexpr, COSINE: tl.constexpr, PRECISION: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Let the rows meet the keys from ``first`` on; ``state`` is their maxima, sums and results so far."""
    top, total, out = state
    qkv_ptr, bias_ptr, fill_ptr, place_ptr, region_ptr, out_ptr, lse_ptr = ptrs
    key = first + tl.arange(0, k.shape[0])
    bias = bias_tile(bias_ptr, FIRST_ROW, q.shape[0], first, k.shape[0], COLUMNS, FRAGMENTS)
    factor_k = inverse_norms(k) if COSINE else factor
    scores = scores_of_tile(q, k, factor, factor_k, bias, region_ptr, row, key, N, COSINE, PRECISION, EDGE)
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    p = tl.exp2(scores * scale - new_top[:, None])
    correction = tl.exp2(top - new_top)
    total = total * correction + tl.sum(p, 1)
    out = tl.dot(p.to(v.dtype), v, out * correction[:, None], input_precision=PRECISION)
    return new_top, total, out


@triton.jit
def _attend_rows(
    ptrs, split, splits, C, factor, scale, N: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr, CHUNKS: tl.constexpr, TAIL: tl.constexpr, FRAGMENTS: tl.constexpr, FILL: tl.constexpr,
    PADS: tl.constexpr, COSINE: tl.constexpr, PRECISION: tl.constexpr, RESIDENT: tl.constexpr,
    KEEP_LSE: tl.constexpr, FAST_LOG2: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Attend from this program's part of the rows of a window to all its keys."""
    qkv_ptr, bias_ptr, fill_ptr, place_ptr, region_ptr, out_ptr, lse_ptr = ptrs
    COLUMNS: tl.constexpr = WIDTH * CHUNKS + TAIL
    WHOLE: tl.constexpr = not PADS and WIDTH * CHUNKS <= N
    WHOLE_TAIL: tl.constexpr = not PADS and COLUMNS == N
    d, keys = tl.arange(0, D), ()
    if RESIDENT:
        for chunk in tl.static_range(CHUNKS):
            keys = keys + (_load_chunk(ptrs, chunk * WIDTH, C, d, WIDTH, WHOLE, N, FILL),)  # noqa: RUF005
    if TAIL > 0:
        k_tail, v_tail = _load_chunk(ptrs, CHUNKS * WIDTH, C, d, TAIL, WHOLE_TAIL, N, FILL)
    for block in range(split * BLOCKS // splits, (split + 1) * BLOCKS // splits):
        row = block * ROWS + tl.arange(0, ROWS)
        place = load_places(place_ptr, row, N)
        q = load_at(qkv_ptr, place, 3 * C, fill_ptr, d, FILL, False)
        factor_q = inverse_norms(q) * factor if COSINE else row.to(tl.float32)
        state = (
            tl.full((ROWS,), float("-inf"), tl.float32),
            tl.zeros((ROWS,), tl.float32),
            tl.zeros((ROWS, D), tl.float32),
        )
        # fmt: off
        if RESIDENT:
            for chunk in tl.static_range(CHUNKS):
                state = _attend_chunk(q, keys[chunk][0], keys[chunk][1], factor_q, row, state, ptrs, chunk * WIDTH,
                                      scale, block * ROWS, COLUMNS, N, FRAGMENTS, COSINE, PRECISION, EDGE)
        else:
            for chunk in range(CHUNKS):
                k, v = _load_chunk(ptrs, chunk * WIDTH, C, d, WIDTH, WHOLE, N, FILL)
                state = _attend_chunk(q, k, v, factor_q, row, state, ptrs, chunk * WIDTH, scale, block * ROWS,
                                      COLUMNS, N, FRAGMENTS, COSINE, PRECISION, EDGE)
        if TAIL > 0:
            state = _attend_chunk(q, k_tail, v_tail, factor_q, row, state, ptrs, CHUNKS * WIDTH, scale, block * ROWS,
                                  COLUMNS, N, FRAGMENTS, COSINE, PRECISION, EDGE)
        # fmt: on
        top, total, out = state
        store_at(out_ptr, place, C, out * (1.0 / total)[:, None], d, False)
        if KEEP_LSE:
            tl.store(lse_ptr + row, top + fast_log2(total, FAST_LOG2), mask=row < N)


@triton.jit(do_not_specialize=SIZES)
def _window_attention_long_fwd_kernel(
    qkv_ptr,  # (B, T, H, W, 3, h, d)
    bias_ptr,  # (h, ROWS*BLOCKS, COLUMNS), divided by scale, if that is not of cosines
    fill_ptr,  # (3, h, d), what pads hold; read if FILL
    logit_scale_ptr,  # (h,), read if COSINE
    place_ptr,  # (M, N)
    region_ptr,  # (M, N)
    edge_ptr,  # (M,)
    out_ptr,  # (B, T, H, W, h, d)
    lse_ptr,  # (B*M, h, N) float32; written if KEEP_LSE
    tokens,  # T*H*W
    num_windows,  # M
    num_heads,
    splits,  # programs that share the rows of a window
    scale,
    N: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    TAIL: tl.constexpr,
    FRAGMENTS: tl.constexpr,
    FILL: tl.constexpr,
    PADS: tl.constexpr,
    HAS_EDGES: tl.constexpr,
    COSINE: tl.constexpr,
    PRECISION: tl.constexpr,
    RESIDENT: tl.constexpr,  # whether all keys and values of the window stay in shared memory
    KEEP_LSE: tl.constexpr,
    FAST_LOG2: tl.constexpr,
):
    COLUMNS: tl.constexpr = WIDTH * CHUNKS + TAIL
    head, split, window, b, m = this_program(num_heads, splits, num_windows)
    C = num_heads * D
    first_token = b.to(tl.int64) * tokens
    qkv_ptr += first_token * (3 * C) + head * D
    out_ptr += first_token * C + head * D
    fill_ptr += head * D
    bias_ptr += head * (ROWS * BLOCKS * COLUMNS)
    place_ptr, region_ptr = place_ptr + m * N, region_ptr + m * N
    lse_ptr += (window.to(tl.int64) * num_heads + head) * N
    factor = scale_of(logit_scale_ptr, head, scale, COSINE)
    log2_scale = LOG2_E if COSINE else scale * LOG2_E
    ptrs = (qkv_ptr, bias_ptr, fill_ptr, place_ptr, region_ptr, out_ptr, lse_ptr)
    # fmt: off
    if HAS_EDGES and tl.load(edge_ptr + m) != 0:
        _attend_rows(ptrs, split, splits, C, factor, log2_scale, N, D, ROWS, BLOCKS, WIDTH, CHUNKS, TAIL, FRAGMENTS,
                     FILL, PADS, COSINE, PRECISION, RESIDENT, KEEP_LSE, FAST_LOG2, True)
    else:
        _attend_rows(ptrs, split, splits, C, factor, log2_scale, N, D, ROWS, BLOCKS, WIDTH, CHUNKS, TAIL, FRAGMENTS,
                     False, False, COSINE, PRECISION, RESIDENT, KEEP_LSE, FAST_LOG2, False)
    # fmt: on


@dataclass(frozen=True)
class Tiles:
    """Into what a window's scores are cut: blocks of ``rows``, and chunks of ``width`` columns and a tail."""

    rows: int
    width: int
    tokens: int
    fragments: bool

    @property
    def blocks(self) -> int:
        return triton.cdiv(self.tokens, self.rows)

    @property
    def tail(self) -> int:
        rest = self.tokens % self.width
        padded = max(16, triton.next_power_of_2(rest)) if rest else 0
        return 0 if padded == self.width else padded

    @property
    def chunks(self) -> int:
        return triton.cdiv(self.tokens - self.tail, self.width)

    @property
    def columns(self) -> int:
        return self.width * self.chunks + self.tail

    @property
    def constants(self) -> tuple[int | bool, ...]:
        """ROWS to FRAGMENTS of every kernel."""
        return self.rows, self.blocks, self.width, self.chunks, self.tail, self.fragments

    def form(self, dtype: torch.dtype, transposed: bool = False) -> BiasForm:
        return BiasForm(self.rows * self.blocks, self.columns, dtype, self.fragments, transposed)


def tiles_of(call: WindowCall, widest: int) -> Tiles:
    """Choose tiles of at most ``widest`` columns that registers hold, narrower ones where a window needs fewer so."""
    rows, fragments, floats = 64, True, 128 if call.head_dim <= 64 else 64
    if call.qkv.dtype == torch.float32:
        rows = 64 if call.precision == "tf32" and call.head_dim <= 32 else 32
        fragments, floats = False, 64 if call.head_dim < 128 else 32
    wide = Tiles(rows, min(widest, floats), call.tokens, fragments)
    narrow = Tiles(rows, wide.width // 2, call.tokens, fragments)
    return narrow if narrow.columns < 0.9 * wide.columns else wide


def config_of_tiles(tiles: Tiles, head_dim: int) -> Config:
    """Return a configuration whose code the static budget has found free of long spills."""
    return Config(4, 1, 2) if tiles.fragments and head_dim < 128 else Config(8, 1, 1)


def splits_of(call: WindowCall, config: Config, blocks: int) -> int:
    """Return into how many programs a window and head is cut, so that few windows fill the GPU too."""
    at_once = config.programs_per_sm * call.target.num_sms
    return max(1, min(blocks, triton.cdiv(at_once, max(1, call.windows * call.num_heads))))


def windows_of(call: WindowCall) -> tuple[Tensor, Tensor, Tensor]:
    """List the tokens of the windows of one map."""
    return list_windows(call.size, call.window, call.shift, call.cyclic, not call.fills, call.qkv.device)


def flags_of(call: WindowCall) -> tuple[bool | str, ...]:
    """FILL to PRECISION of every kernel."""
    return call.fills, call.ragged, call.has_edges, call.logit_scale is not None, call.precision


def keeps_keys(call: WindowCall, tiles: Tiles) -> bool:
    """Say whether all keys and values of a window stay in shared memory: where two programs so share it.

    That spares a tenth of the instructions. Cosine attention would compute the norms again all the same, and a head
    dim of 128 does not fit into registers beside them.
    """
    shared_kib = 228 if call.target.arch == 90 else 164
    kib = 2 * tiles.columns * call.head_dim * call.qkv.element_size() / 1024
    fits = call.head_dim <= 64 and 2 * (kib + 16) <= shared_kib
    return fits and tiles.fragments and call.logit_scale is None


def long_forward(call: WindowCall, out: Tensor, lse: Tensor | None) -> None:
    """Attend, and leave the log-sum-exp of each row in ``lse`` if it is given."""
    tiles = tiles_of(call, 128)
    config = call.config("window_attention_long_fwd", call.tokens, config_of_tiles(tiles, call.head_dim))
    splits = splits_of(call, config, tiles.blocks)
    _window_attention_long_fwd_kernel[(call.windows * splits * call.num_heads,)](
        call.qkv,
        call.expand(tiles.form(call.qkv.dtype)),
        call.fill,
        call.qkv if call.logit_scale is None else call.logit_scale,
        *windows_of(call),
        out,
        out if lse is None else lse,
        math.prod(call.size),
        call.windows_per_map,
        call.num_heads,
        splits,
        call.scale,
        call.tokens,
        call.head_dim,
        *tiles.constants,
        *flags_of(call),
        keeps_keys(call, tiles),
        lse is not None,
        call.qkv.device.type != "cpu",
        **config.options,
    )
