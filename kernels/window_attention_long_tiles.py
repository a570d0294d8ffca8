"""What the kernels of ``window_attention_long`` share: the tiles that a window is cut into, its tokens and its scores.

A window's scores are blocks of 64 rows and chunks of columns. Sixteen rows or columns at the end have a part of their
own where they hold all that is left: 392 tokens are six blocks and 16 rows, not seven blocks.

Letters: C channels · M windows of one map · N tokens in one window · h heads · d head dim.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from florence_fast.kernels.configs import Config
from florence_fast.kernels.rel_pos_bias import BiasForm
from florence_fast.kernels.window_call import WindowCall
from florence_fast.kernels.window_index import BEYOND, PAD, hide_other_regions, list_windows

SIZES = ["tokens", "num_windows", "num_heads", "splits"]
"""Arguments whose divisibility tells the compiler nothing."""
MAX_LOG_SCALE = tl.constexpr(math.log(100.0))
GREATEST = tl.constexpr(1e12)
"""What a token is multiplied by at most to have the norm 1, as in torch.nn.functional.normalize."""


@triton.jit
def this_program(num_heads, splits, num_windows, CUT: tl.constexpr):
    """Head, part of the window, batch element and window in its map of this program; CUT says if there are parts."""
    head, window = tl.program_id(0) % num_heads, tl.program_id(0) // num_heads
    split = 0
    if CUT:
        split, window = window % splits, window // splits
    return head, split, window, window // num_windows, window % num_windows


@triton.jit
def blocks_of_split(split, splits, BLOCKS: tl.constexpr, CUT: tl.constexpr):
    """First block of this program's part, the one after it, and whether it is the part at the end."""
    if CUT:
        return split * BLOCKS // splits, (split + 1) * BLOCKS // splits, split == splits - 1
    else:
        return 0, BLOCKS, True


@triton.jit
def add_row_sums(x, sums, BY_PRODUCT: tl.constexpr, PRECISION: tl.constexpr):
    """Add the sums of the rows of x (n, m) to ``sums`` (n,); or (n, 16), all alike, by a product with ones.

    Where tensor cores have time left the product spares an addition for each element; x must then be in 16 bits.
    """
    if BY_PRODUCT:
        return tl.dot(x, tl.full((x.shape[1], 16), 1.0, x.dtype), sums, input_precision=PRECISION)
    else:
        return sums + tl.sum(x, 1)


@triton.jit
def no_row_sums(ROWS: tl.constexpr, BY_PRODUCT: tl.constexpr):
    """Zeros in the form of ``add_row_sums``."""
    return tl.zeros((ROWS, 16) if BY_PRODUCT else (ROWS,), tl.float32)


@triton.jit
def load_places(place_ptr, i, N: tl.constexpr, WITHIN: tl.constexpr):
    """Numbers, on their map, of tokens ``i`` of a window, PAD, or BEYOND; WITHIN says that none is beyond."""
    if WITHIN:
        return tl.load(place_ptr + i)
    else:
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
def load_statistic(ptr, i, N: tl.constexpr, other, WITHIN: tl.constexpr):
    """Load a number (n,) for each of the tokens ``i`` of a window, ``other`` for those beyond it."""
    if WITHIN:
        return tl.load(ptr + i)
    else:
        return tl.load(ptr + i, mask=i < N, other=other)


@triton.jit
def inverse_norms(x):
    """1/|x| of tokens (n, d), in float32."""
    x = x.to(tl.float32)
    return tl.minimum(tl.rsqrt(tl.sum(x * x, 1)), GREATEST)


@triton.jit
def directions(x, COSINE: tl.constexpr):
    """Give x/|x| (n, d) in the dtype of x, and what rounding left over, or in float32 x itself; else x itself, twice.

    Both together are exact to twice the bits, so that a product with each spares a factor for each score.
    """
    if COSINE:
        exact = x.to(tl.float32) * inverse_norms(x)[:, None]
        rounded = exact.to(x.dtype)
        if x.dtype == tl.float32:
            return rounded, x
        else:
            return rounded, (exact - rounded.to(tl.float32)).to(x.dtype)
    else:
        return x, x


@triton.jit
def scale_of(logit_scale_ptr, head, scale, COSINE: tl.constexpr):
    """What multiplies q k^T, or the cosine, before the bias is added."""
    if COSINE:
        return tl.exp(tl.minimum(tl.load(logit_scale_ptr + head).to(tl.float32), MAX_LOG_SCALE))
    else:
        return scale


@triton.jit
def scores_of_tile(
    x, y, y_rest, factor_x, factor_y, bias, region_ptr, i, j, N: tl.constexpr, COSINE: tl.constexpr,
    PRECISION: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Give x y^T + bias of tokens ``i`` and ``j``, or, of cosines, factor_x x (factor_y y/|y|)^T + bias.

    ``y`` and ``y_rest`` are as ``directions`` gives them. ``factor_x`` (n,) is 1/|x|, and that of the queries, x or
    y, is also multiplied by exp(logit_scale): so float32 scores have the same bits as those of the log-sum-exp.
    """
    if EDGE:
        region_i = tl.load(region_ptr + i, mask=i < N, other=0).to(tl.int32)
        region_j = tl.load(region_ptr + j, mask=j < N, other=0).to(tl.int32)
        bias = hide_other_regions(region_i, region_j, bias, PRECISION if x.dtype == tl.float32 else "tf32")
    if COSINE and x.dtype == tl.float32:
        scores = tl.dot(x, tl.trans(y_rest), input_precision=PRECISION)
        return scores * (factor_x[:, None] * (inverse_norms(y_rest) * factor_y)[None, :]) + bias
    elif COSINE:
        scores = tl.dot(x, tl.trans(y), input_precision=PRECISION)
        scores = tl.dot(x, tl.trans(y_rest), scores, input_precision=PRECISION)
        return scores * (factor_x * factor_y)[:, None] + bias
    else:
        return tl.dot(x, tl.trans(y), bias, input_precision=PRECISION)


@dataclass(frozen=True)
class Tiles:
    """Into what a window's scores are cut: blocks of ``rows`` and a last, chunks of ``width`` columns and a tail."""

    rows: int
    width: int
    tokens: int
    fragments: bool
    few_rows: bool
    """Whether a last block may have 16 rows."""

    @property
    def last(self) -> int:
        """A part of its own costs as much as half a block: it must spare a tenth of the rows."""
        padded = triton.cdiv(self.tokens, self.rows) * self.rows
        spares = self.tokens > self.rows and padded > 1.1 * self.tokens
        return 16 if self.few_rows and spares and self.tokens % self.rows <= 16 else 0

    @property
    def blocks(self) -> int:
        return triton.cdiv(self.tokens - self.last, self.rows)

    @property
    def all_rows(self) -> int:
        return self.rows * self.blocks + self.last

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
        return self.rows, self.blocks, self.last, self.width, self.chunks, self.tail, self.fragments

    def form(self, dtype: torch.dtype, transposed: bool = False) -> BiasForm:
        return BiasForm(self.all_rows, self.columns, dtype, self.fragments, transposed)


def tiles_of(call: WindowCall, widest: int) -> Tiles:
    """Choose tiles of at most ``widest`` columns that registers hold, narrower ones where a window needs fewer so."""
    rows, fragments, floats = 64, True, 128 if call.head_dim <= 64 else 64
    if call.qkv.dtype == torch.float32:
        rows = 64 if call.precision == "tf32" and call.head_dim <= 32 else 32
        fragments, floats = False, 64 if call.head_dim < 128 else 32
    # On sm_80 the products of 16 rows have no layout without long spills.
    few_rows = call.target.arch >= 90
    wide = Tiles(rows, min(widest, floats), call.tokens, fragments, few_rows)
    narrow = Tiles(rows, wide.width // 2, call.tokens, fragments, few_rows)
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


def keeps_tokens(call: WindowCall, tiles: Tiles, tensors: int) -> bool:
    """Say whether so many ``tensors`` of a window's tokens stay in shared memory: where two programs so share it.

    That spares a tenth of the instructions. A head dim of 128 does not fit into registers beside them.
    """
    shared_kib = 228 if call.target.arch == 90 else 164
    tensors += call.logit_scale is not None
    kib = tensors * tiles.columns * call.head_dim * call.qkv.element_size() / 1024
    return call.head_dim <= 64 and 2 * (kib + 16) <= shared_kib and tiles.fragments


def sums_by_product(call: WindowCall) -> bool:
    """Say whether tensor cores add up rows: on an A100 they are as busy as what they would relieve."""
    return call.target.arch >= 90 and call.qkv.dtype != torch.float32
