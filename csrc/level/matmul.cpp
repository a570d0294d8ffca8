// Products of float32 matrices in memory: C = A B + bias (Goto and van de Geijn, ACM TOMS 34(3), 2008).
//
// C is computed in tiles that stay in registers. A block of B is copied into panels of a tile's width, a block of A into
// panels of a tile's height, so that a tile reads both in order, whatever their strides. Letters: M N K sizes.
#include "product.h"
#include "scratch.h"

namespace ff::FF_LEVEL {

namespace {

// Sums fill the registers: 32 with AVX-512, 16 before, less a row of B and one value of A.
inline constexpr int tile_m = lanes == 16 ? 12 : lanes == 8 ? 6 : 4, tile_n = 2 * lanes;
static_assert(tile_m <= lanes || tile_m % lanes == 0, "pack() stores beyond a row only where the next row follows");
inline constexpr int64_t block_m = 96, block_n = 384, block_k = 256;  // A's block fits the L2 cache, a panel of B the L1
inline constexpr int64_t spare = lanes;                               // a panel's last store reaches beyond its end
inline constexpr double task_flops = 1e8;  // tasks depend on sizes alone, and so does the order of every sum
inline constexpr int64_t few_tasks = 8, most_parts = 32;

// at[row * row_stride + column * column_stride]
struct Strided {
  const float* at;
  int64_t row_stride, column_stride;

  Strided from(int64_t row, int64_t column) const {
    return {at + row * row_stride + column * column_stride, row_stride, column_stride};
  }
};

// Copy x (depth, width) into panels of `tile` columns: to[panel][k][column], zeros beyond the width.
template <int tile>
void pack(Strided x, int64_t depth, int64_t width, float* to) {
  const int64_t panel_size = depth * tile + spare, whole = width / tile;
  if (x.column_stride == 1) {
    // Row by row. Where a vector is longer than what is left of a row of the panel, the next row overwrites its end.
    constexpr int vectors = (tile + lanes - 1) / lanes;
    for (int64_t k = 0; k < depth; ++k) {
      const float* row = x.at + k * x.row_stride;
      for (int64_t panel = 0; panel < whole; ++panel) {
        const float* from = row + panel * tile;
        float* place = to + panel * panel_size + k * tile;
        if (width - panel * tile >= vectors * lanes) {
#pragma GCC unroll 4
          for (int v = 0; v < vectors; ++v) store(place + v * lanes, load(from + v * lanes));
        } else {
          std::memcpy(place, from, tile * sizeof(float));
        }
      }
    }
  } else if (x.row_stride == 1) {
    for (int64_t panel = 0; panel < whole; ++panel) {
      const float* from = x.at + panel * tile * x.column_stride;
      float* place = to + panel * panel_size;
      int64_t k = 0;
      for (; k + lanes <= depth; k += lanes) {
#pragma GCC unroll 4
        for (int first = 0; first < tile; first += lanes) {
          Vec square[lanes];
#pragma GCC unroll 16
          for (int i = 0; i < lanes; ++i) {
            square[i] = first + i < tile ? load(from + (first + i) * x.column_stride + k) : Vec{};
          }
          transpose_square(square);
#pragma GCC unroll 16
          for (int i = 0; i < lanes; ++i) store(place + (k + i) * tile + first, square[i]);
        }
      }
      for (; k < depth; ++k) {
        for (int i = 0; i < tile; ++i) place[k * tile + i] = from[i * x.column_stride + k];
      }
    }
  }
  const bool strided = x.column_stride != 1 && x.row_stride != 1;
  for (int64_t panel = strided ? 0 : whole; panel * tile < width; ++panel) {
    const int64_t count = width - panel * tile < tile ? width - panel * tile : tile;
    for (int64_t k = 0; k < depth; ++k) {
      const float* from = x.at + k * x.row_stride + panel * tile * x.column_stride;
      float* place = to + panel * panel_size + k * tile;
      for (int i = 0; i < tile; ++i) place[i] = i < count ? from[i * x.column_stride] : 0.0f;
    }
  }
}

struct Place {
  float* at;
  int64_t stride, width;   // columns of C that the tile has, up to tile_n
  bool add;                // to what is there
  const float* bias;       // or null
};

template <int rows>
void tile(int64_t depth, const float* a, const float* b, Place c) {
  Vec sum[rows][2];
#pragma GCC unroll 16
  for (int m = 0; m < rows; ++m) {
    sum[m][0] = sum[m][1] = Vec{};
    __builtin_prefetch(c.at + m * c.stride, 1);
    __builtin_prefetch(c.at + m * c.stride + lanes, 1);
  }
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; ++k) {
    const Vec first = load(b + k * tile_n), second = load(b + k * tile_n + lanes);
#pragma GCC unroll 16
    for (int m = 0; m < rows; ++m) {
      const float left = a[k * tile_m + m];
      sum[m][0] += left * first;
      sum[m][1] += left * second;
    }
  }
  if (c.width == tile_n) {
    const Vec bias[2] = {c.bias ? load(c.bias) : Vec{}, c.bias ? load(c.bias + lanes) : Vec{}};
#pragma GCC unroll 16
    for (int m = 0; m < rows; ++m) {
      float* to = c.at + m * c.stride;
      store(to, sum[m][0] + (c.add ? load(to) : bias[0]));
      store(to + lanes, sum[m][1] + (c.add ? load(to + lanes) : bias[1]));
    }
  } else {
    alignas(64) float copy[rows][tile_n];
#pragma GCC unroll 16
    for (int m = 0; m < rows; ++m) store(copy[m], sum[m][0]), store(copy[m] + lanes, sum[m][1]);
    for (int m = 0; m < rows; ++m) {
      float* to = c.at + m * c.stride;
      for (int64_t n = 0; n < c.width; ++n) to[n] = copy[m][n] + (c.add ? to[n] : c.bias ? c.bias[n] : 0.0f);
    }
  }
}

// A tile of so many rows, of which there are kernels for 1 to `rows`.
template <int rows>
void tile_of(int64_t height, int64_t depth, const float* a, const float* b, Place c) {
  if constexpr (rows > 1) {
    if (height < rows) return tile_of<rows - 1>(height, depth, a, b, c);
  }
  tile<rows>(depth, a, b, c);
}

// C (M, N) = A (M, K) B (K, N) + bias by one thread; `left` and `right` have room for a block of A and of B.
void product_of_blocks(int64_t M, int64_t N, int64_t K, Strided a, Strided b, Place c, float* left, float* right) {
  const int64_t steps = K > block_k ? (K + block_k - 1) / block_k : 1;
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t k = part_begin(K, steps, step), depth = part_begin(K, steps, step + 1) - k;
    pack<tile_n>(b.from(k, 0), depth, N, right);
    for (int64_t m = 0; m < M; m += block_m) {
      const int64_t height = M - m < block_m ? M - m : block_m;
      const Strided rows = a.from(m, k);
      pack<tile_m>({rows.at, rows.column_stride, rows.row_stride}, depth, height, left);
      for (int64_t n = 0; n < N; n += tile_n) {
        const int64_t width = N - n < tile_n ? N - n : tile_n;
        for (int64_t i = 0; i < height; i += tile_m) {
          tile_of<tile_m>(height - i, depth, left + i / tile_m * (depth * tile_m + spare),
                          right + n / tile_n * (depth * tile_n + spare),
                          {c.at + (m + i) * c.stride + n, c.stride, width, step > 0, c.bias ? c.bias + n : nullptr});
        }
      }
    }
  }
}

int64_t panels(int64_t width, int tile) { return (width + tile - 1) / tile; }

}  // namespace

void matmul(int threads, int64_t M, int64_t N, int64_t K, const float* a, int64_t a_row_stride, int64_t a_column_stride,
            const float* b, int64_t b_row_stride, int64_t b_column_stride, const float* bias, float* c,
            int64_t c_row_stride) {
  if (M == 0 || N == 0) return;
  const int64_t across = N > block_n ? (N + block_n - 1) / block_n : 1;
  const int64_t width = round_up((N + across - 1) / across, tile_n);
  const int64_t suited = static_cast<int64_t>(task_flops / (2.0 * static_cast<double>(width) * static_cast<double>(K + 1)));
  const int64_t tallest = suited < 2 * block_m ? 2 * block_m : suited, least = (M + tallest - 1) / tallest;
  const int64_t height = round_up((M + least - 1) / least, tile_m);
  const int64_t down = (M + height - 1) / height;
  // Few blocks of a deep product: parts of its depth are tasks too, and are added up in order.
  int64_t parts = 1;
  if (down * across < few_tasks && K >= 8 * block_k) {
    parts = static_cast<int64_t>(2.0 * static_cast<double>(M) * static_cast<double>(N) * static_cast<double>(K) / task_flops);
    parts = parts < 1 ? 1 : parts > most_parts ? most_parts : parts;
  }
  Scratch<float> partial(parts > 1 ? parts * M * N : 0);
  parallel(threads, down * across * parts, [&](int64_t task) {
    const int64_t part = task % parts, m = task / parts % down * height, n = task / parts / down * width;
    const int64_t rows = M - m < height ? M - m : height, columns = N - n < width ? N - n : width;
    if (rows <= 0 || columns <= 0) return;
    const int64_t k = part_begin(K, parts, part), depth = part_begin(K, parts, part + 1) - k;
    const int64_t longest = depth < block_k ? depth : block_k;
    Scratch<float> left(panels(block_m, tile_m) * (longest * tile_m + spare));
    Scratch<float> right(panels(columns, tile_n) * (longest * tile_n + spare));
    const Place place = parts > 1 ? Place{partial.data() + part * M * N + m * N + n, N, columns, false, nullptr}
                                  : Place{c + m * c_row_stride + n, c_row_stride, columns, false, bias ? bias + n : nullptr};
    product_of_blocks(rows, columns, depth, {a + m * a_row_stride + k * a_column_stride, a_row_stride, a_column_stride},
                      {b + k * b_row_stride + n * b_column_stride, b_row_stride, b_column_stride}, place, left.data(),
                      right.data());
  });
  if (parts == 1) return;
  parallel(threads, M, [&](int64_t m) {
    float* to = c + m * c_row_stride;
    each_vector(N, [&](int64_t n, auto vector) {
      Vec sum = bias ? vector.get(bias + n) : Vec{};
      for (int64_t part = 0; part < parts; ++part) sum += vector.get(partial.data() + (part * M + m) * N + n);
      vector.put(to + n, sum);
    });
  });
}

}  // namespace ff::FF_LEVEL
