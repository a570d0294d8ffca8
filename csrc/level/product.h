// Products of matrices that lie in cache, and the layouts that they read.
//
// C = A B with A read one 4-byte unit at a time, B and C by rows of vectors. A unit is one float, or two neighbours of
// the summed axis in bf16 where the processor multiplies those in one instruction: a "pair", then K counts pairs.
#pragma once

#include "tiles.h"
#include "vec.h"

namespace ff::FF_LEVEL {

struct Pair { uint32_t bits; };  // the lower half is the first of the two

#if defined(__AVX512BF16__)  // AMX's pairs are the same
inline constexpr bool has_pairs = true;
#else
inline constexpr bool has_pairs = false;
#endif

template <class Unit>
inline constexpr int values_of = 1;
template <>
inline constexpr int values_of<Pair> = 2;

inline Vec multiply_add(Vec sum, float a, const float* b) { return sum + a * load(b); }
inline Vec multiply_add(Vec sum, Pair a, const Pair* b) {
#if defined(__AVX512BF16__)
  const __m512i repeated = _mm512_set1_epi32(static_cast<int>(a.bits));
  return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)repeated, (__m512bh)load_raw<__m512i>(b));
#else
  (void)a, (void)b;
  return sum;
#endif
}

// A(m, k) = a[m * row_stride + k * k_stride]
template <class Unit>
struct Left {
  const Unit* a;
  int64_t row_stride, k_stride;
};

// How many units hold so many values.
template <class Unit>
inline int64_t units(int64_t values) { return (values + values_of<Unit> - 1) / values_of<Unit>; }

// Exchange rows and columns of a square of units.
inline void transpose_square(Vec (&rows)[lanes]) {
#if defined(__AVX512F__)
#pragma GCC unroll 4
  for (int distance = 1; distance < lanes; distance *= 2) {
    // Blocks of `distance` lanes change places between the two rows of each pair.
    VecInt low{}, high{};
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) {
      low[i] = i & distance ? lanes + i - distance : i;
      high[i] = i & distance ? lanes + i : i + distance;
    }
#pragma GCC unroll 16
    for (int r = 0; r < lanes; ++r) {
      if (r & distance) continue;
      const __m512 a = (__m512)rows[r], b = (__m512)rows[r + distance];
      rows[r] = (Vec)_mm512_permutex2var_ps(a, (__m512i)low, b);
      rows[r + distance] = (Vec)_mm512_permutex2var_ps(a, (__m512i)high, b);
    }
  }
#elif defined(__AVX2__)
  // Pairs, then fours within each half of a vector, then the halves change places.
  __m256 pairs[lanes], fours[lanes];
#pragma GCC unroll 4
  for (int r = 0; r < lanes; r += 2) {
    pairs[r] = _mm256_unpacklo_ps((__m256)rows[r], (__m256)rows[r + 1]);
    pairs[r + 1] = _mm256_unpackhi_ps((__m256)rows[r], (__m256)rows[r + 1]);
  }
#pragma GCC unroll 2
  for (int r = 0; r < lanes; r += 4) {
    fours[r] = _mm256_shuffle_ps(pairs[r], pairs[r + 2], 0x44);
    fours[r + 1] = _mm256_shuffle_ps(pairs[r], pairs[r + 2], 0xee);
    fours[r + 2] = _mm256_shuffle_ps(pairs[r + 1], pairs[r + 3], 0x44);
    fours[r + 3] = _mm256_shuffle_ps(pairs[r + 1], pairs[r + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    rows[r] = (Vec)_mm256_permute2f128_ps(fours[r], fours[r + 4], 0x20);
    rows[r + 4] = (Vec)_mm256_permute2f128_ps(fours[r], fours[r + 4], 0x31);
  }
#else
  float square[lanes][lanes];
  for (int r = 0; r < lanes; ++r) {
    for (int i = 0; i < lanes; ++i) square[i][r] = rows[r][i];
  }
  for (int r = 0; r < lanes; ++r) rows[r] = load(square[r]);
#endif
}

// Lane r becomes the sum, or the largest, of rows[r]; the rows are used up.
inline Vec sums_of_rows(Vec (&rows)[lanes]) {
  transpose_square(rows);
#pragma GCC unroll 4
  for (int width = lanes / 2; width > 0; width /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < width; ++i) rows[i] += rows[i + width];
  }
  return rows[0];
}
inline Vec largest_of_rows(Vec (&rows)[lanes]) {
  transpose_square(rows);
#pragma GCC unroll 4
  for (int width = lanes / 2; width > 0; width /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < width; ++i) rows[i] = max(rows[i], rows[i + width]);
  }
  return rows[0];
}

#if defined(FF_HAS_TILES)

// A tile of the left side: as it lies, or copied where it is transposed or has an edge, which is filled with zeros.
template <int t>
inline void load_left_tile(Left<Pair> left, int64_t rows, int64_t depth) {
  if (left.k_stride == 1 && rows >= tile_rows && depth >= tile_units) return tile_load<t>(left.a, left.row_stride);
  alignas(64) Pair copy[tile_rows][tile_units] = {};
  const int64_t height = rows < tile_rows ? rows : tile_rows, length = depth < tile_units ? depth : tile_units;
  if (left.row_stride == 1 && height == tile_rows) {
    Vec square[lanes] = {};
    for (int64_t k = 0; k < length; ++k) square[k] = load_raw<Vec>(left.a + k * left.k_stride);
    transpose_square(square);
    std::memcpy(copy, square, sizeof copy);
  } else {
    for (int64_t m = 0; m < height; ++m) {
      for (int64_t k = 0; k < length; ++k) copy[m][k] = left.a[m * left.row_stride + k * left.k_stride];
    }
  }
  tile_load<t>(copy, tile_units);
}

template <int t>
inline void load_right_tile(const Pair* b, int64_t b_stride, int64_t depth) {
  if (depth >= tile_rows) return tile_load<t>(b, b_stride);
  alignas(64) Pair copy[tile_rows][tile_units] = {};
  for (int64_t k = 0; k < depth; ++k) std::memcpy(copy[k], b + k * b_stride, sizeof copy[k]);
  tile_load<t>(copy, tile_units);
}

template <int t>
inline void store_tile(float* c, int64_t c_stride, int64_t rows) {
  if (rows >= tile_rows) return tile_store<t>(c, c_stride);
  alignas(64) float copy[tile_rows][tile_units];
  tile_store<t>(copy, tile_units);
  for (int64_t m = 0; m < rows; ++m) std::memcpy(c + m * c_stride, copy[m], sizeof copy[m]);
}

template <int t>
inline void begin_tile(bool accumulate, const float* c, int64_t c_stride, int64_t rows) {
  if (!accumulate) return tile_zero<t>();
  if (rows >= tile_rows) return tile_load<t>(c, c_stride);
  alignas(64) float copy[tile_rows][tile_units] = {};
  for (int64_t m = 0; m < rows; ++m) std::memcpy(copy[m], c + m * c_stride, sizeof copy[m]);
  tile_load<t>(copy, tile_units);
}

// As many tiles of a row of C as `columns` says, up to four, share each tile of A.
template <int columns>
inline void product_tiles(bool accumulate, int64_t height, int64_t depth, Left<Pair> left, const Pair* b,
                          int64_t b_stride, float* c, int64_t c_stride) {
  for (int64_t m = 0; m < height; m += tile_rows) {
    const int64_t rows = height - m;
    float* to = c + m * c_stride;
    begin_tile<0>(accumulate, to, c_stride, rows);
    if constexpr (columns > 1) begin_tile<1>(accumulate, to + lanes, c_stride, rows);
    if constexpr (columns > 2) begin_tile<2>(accumulate, to + 2 * lanes, c_stride, rows);
    if constexpr (columns > 3) begin_tile<3>(accumulate, to + 3 * lanes, c_stride, rows);
    for (int64_t k = 0; k < depth; k += tile_units) {
      const Pair* right = b + k * b_stride;
      load_left_tile<4>({left.a + m * left.row_stride + k * left.k_stride, left.row_stride, left.k_stride}, rows, depth - k);
      load_right_tile<5>(right, b_stride, depth - k);
      tile_multiply<0, 4, 5>();
      if constexpr (columns > 1) load_right_tile<6>(right + lanes, b_stride, depth - k), tile_multiply<1, 4, 6>();
      if constexpr (columns > 2) load_right_tile<5>(right + 2 * lanes, b_stride, depth - k), tile_multiply<2, 4, 5>();
      if constexpr (columns > 3) load_right_tile<6>(right + 3 * lanes, b_stride, depth - k), tile_multiply<3, 4, 6>();
    }
    store_tile<0>(to, c_stride, rows);
    if constexpr (columns > 1) store_tile<1>(to + lanes, c_stride, rows);
    if constexpr (columns > 2) store_tile<2>(to + 2 * lanes, c_stride, rows);
    if constexpr (columns > 3) store_tile<3>(to + 3 * lanes, c_stride, rows);
  }
}

inline void product_by_tiles(bool accumulate, int64_t height, int64_t width, int64_t depth, Left<Pair> left,
                             const Pair* b, int64_t b_stride, float* c, int64_t c_stride) {
  for (int64_t n = 0; n < width; n += 4 * lanes) {
    switch ((width - n) / lanes) {
      case 1: product_tiles<1>(accumulate, height, depth, left, b + n, b_stride, c + n, c_stride); break;
      case 2: product_tiles<2>(accumulate, height, depth, left, b + n, b_stride, c + n, c_stride); break;
      case 3: product_tiles<3>(accumulate, height, depth, left, b + n, b_stride, c + n, c_stride); break;
      default: product_tiles<4>(accumulate, height, depth, left, b + n, b_stride, c + n, c_stride);
    }
  }
}

#endif

template <bool accumulate, int rows, int vectors, class Unit>
inline void product_tile(int64_t depth, Left<Unit> left, const Unit* b, int64_t b_stride, float* c, int64_t c_stride) {
  Vec sum[rows][vectors];
#pragma GCC unroll 16
  for (int m = 0; m < rows; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < vectors; ++n) sum[m][n] = accumulate ? load(c + m * c_stride + n * lanes) : Vec{};
  }
  for (int64_t k = 0; k < depth; ++k) {
#pragma GCC unroll 16
    for (int m = 0; m < rows; ++m) {
      const Unit unit = left.a[m * left.row_stride + k * left.k_stride];
#pragma GCC unroll 4
      for (int n = 0; n < vectors; ++n) sum[m][n] = multiply_add(sum[m][n], unit, b + k * b_stride + n * lanes);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < rows; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < vectors; ++n) store(c + m * c_stride + n * lanes, sum[m][n]);
  }
}

template <bool accumulate, int rows, int vectors, class Unit>
inline void product_rows(int64_t height, int64_t depth, Left<Unit> left, const Unit* b, int64_t b_stride, float* c,
                         int64_t c_stride) {
  int64_t m = 0;
  for (; m + rows <= height; m += rows) {
    const Left<Unit> here{left.a + m * left.row_stride, left.row_stride, left.k_stride};
    product_tile<accumulate, rows, vectors>(depth, here, b, b_stride, c + m * c_stride, c_stride);
  }
  if constexpr (rows > 1) {
    const Left<Unit> rest{left.a + m * left.row_stride, left.row_stride, left.k_stride};
    product_rows<accumulate, rows / 2, vectors>(height - m, depth, rest, b, b_stride, c + m * c_stride, c_stride);
  }
}

// The same in tiles of `rows` and of one row less, where the height is made of those: a short tile at the end would wait
// for each of its few sums. 49 rows, those of a window of 7 x 7, are 4 tiles of 6 and 5 of 5.
template <bool accumulate, int rows, int vectors, class Unit>
inline void product_even_rows(int64_t height, int64_t depth, Left<Unit> left, const Unit* b, int64_t b_stride, float* c,
                              int64_t c_stride) {
  const int64_t tiles = (height + rows - 1) / rows, large = height - tiles * (rows - 1);
  if (large < 0) return product_rows<accumulate, rows, vectors>(height, depth, left, b, b_stride, c, c_stride);
  int64_t m = 0;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const Left<Unit> here{left.a + m * left.row_stride, left.row_stride, left.k_stride};
    if (tile < large) {
      product_tile<accumulate, rows, vectors>(depth, here, b, b_stride, c + m * c_stride, c_stride);
      m += rows;
    } else {
      product_tile<accumulate, rows - 1, vectors>(depth, here, b, b_stride, c + m * c_stride, c_stride);
      m += rows - 1;
    }
  }
}

// C (height x width) = or += A B, depth in units; width a multiple of `lanes`, rows of B and C padded to it.
template <bool accumulate = false, class Unit>
inline void product(int64_t height, int64_t width, int64_t depth, Left<Unit> left, const Unit* b, int64_t b_stride,
                    float* c, int64_t c_stride) {
#if defined(FF_HAS_TILES)
  if constexpr (values_of<Unit> == 2) {
    return product_by_tiles(accumulate, height, width, depth, left, b, b_stride, c, c_stride);
  }
#endif
  // Sums fill the registers: 32 with AVX-512, 16 before, less a row of B and one value of A.
  constexpr bool many = lanes == 16;
  int64_t n = 0;
  if constexpr (lanes == 8) {
    for (; n + 2 * lanes <= width; n += 2 * lanes) {
      product_even_rows<accumulate, 6, 2>(height, depth, left, b + n, b_stride, c + n, c_stride);
    }
    if (n < width) product_even_rows<accumulate, 10, 1>(height, depth, left, b + n, b_stride, c + n, c_stride);
    return;
  }
  if constexpr (many) {
    for (; n + 4 * lanes <= width; n += 4 * lanes) {
      product_rows<accumulate, 6, 4>(height, depth, left, b + n, b_stride, c + n, c_stride);
    }
  }
  for (; n + 2 * lanes <= width; n += 2 * lanes) {
    product_rows<accumulate, many ? 12 : 4, 2>(height, depth, left, b + n, b_stride, c + n, c_stride);
  }
  if (n < width) product_rows<accumulate, 8, 1>(height, depth, left, b + n, b_stride, c + n, c_stride);
}

inline int64_t round_up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

}  // namespace ff::FF_LEVEL
