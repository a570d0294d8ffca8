// One window and one head in cache: q, k, v gathered from the map, bias expanded, scores and their softmax.
//
// Letters: n tokens in a window, d head dim; `columns` is n and `width` is d, each rounded up to whole vectors.
#pragma once

#include <type_traits>

#include "math.h"
#include "product.h"
#include "scratch.h"
#include "window_map.h"

namespace ff::FF_LEVEL {

// Queries that are worked on at a time, so that their scores stay in cache however long the window is.
inline constexpr int64_t query_block = 64;

template <class Unit>
struct TileSizes {
  int64_t n, d, columns, width, depth, row_units, pairs;

  TileSizes(int64_t tokens, int64_t head_dim)
      : n(tokens),
        d(head_dim),
        columns(round_up(tokens, lanes)),
        width(round_up(head_dim, lanes)),
        depth(units<Unit>(head_dim)),
        row_units(round_up(units<Unit>(head_dim), lanes)),
        pairs(units<Unit>(tokens)) {}

  int64_t rows_size() const { return n * row_units; }              // tokens by rows of units
  int64_t transposed_size() const { return row_units * columns; }  // units by rows of tokens
  int64_t paired_size() const { return pairs * width; }            // pairs of tokens by rows of values
};

// Call body(Unit{}) with what the products of a map of T are made of.
template <class T, class Body>
inline void with_unit([[maybe_unused]] const WindowExtras& extras, const Body& body) {
  if constexpr (has_pairs && std::is_same_v<T, bf16>) {
    if (!extras.logit_scale) return body(Pair{});  // a cosine times 100 needs float32
  }
  body(float{});
}

// The bias of every head, (heads, n, columns), with -inf in the columns beyond n; one head for all without a bias.
//
// A table has a row for each offset between two tokens. Turned about and by heads, the offsets of a token to the
// neighbours in a line of the window lie side by side.
class ExpandedBias {
 public:
  ExpandedBias(int threads, const WindowMap& map, const WindowGeometry& geometry, const WindowExtras& extras)
      : heads_(extras.table || extras.bias ? geometry.heads : 1),
        n_(map.tokens()),
        columns_(round_up(map.tokens(), lanes)),
        values_(heads_ * n_ * columns_) {
    const int64_t full = map.full_tokens(), offsets = map.offsets();
    Scratch<float> turned(extras.table ? heads_ * offsets : 0);
    Scratch<int64_t> codes(n_);
    for (int64_t i = 0; i < n_; ++i) codes.data()[i] = extras.table ? map.code(i) : map.corner(i);
    const int64_t* code = codes.data();
    parallel(threads, heads_, [&](int64_t head) {
      float* line = extras.table ? turned.data() + head * offsets : nullptr;
      for (int64_t k = 0; line && k < offsets; ++k) line[k] = extras.table[(offsets - 1 - k) * heads_ + head];
      for (int64_t i = 0; i < n_; ++i) {
        float* row = values_.data() + (head * n_ + i) * columns_;
        const float* neighbours = line          ? line + map.same() - code[i]
                                  : extras.bias ? extras.bias + (head * full + code[i]) * full
                                                : nullptr;
        map.each_line([&](int64_t j, int64_t length) {
          const float* from = neighbours ? neighbours + code[j] : nullptr;
          each_vector(length, [&](int64_t x, auto part) { part.put(row + j + x, from ? part.get(from + x) : Vec{}); });
        });
        for (int64_t j = n_; j < columns_; ++j) row[j] = -__builtin_inff();
      }
    });
  }

  const float* row(int64_t head, int64_t i) const {
    return values_.get() + ((heads_ == 1 ? 0 : head) * n_ + i) * columns_;
  }

 private:
  int64_t heads_, n_, columns_;
  Scratch<float> values_;
};

// Where the rows of a window lie in memory: pads point to a row of their own.
template <class T>
class RowPointers {
 public:
  RowPointers(int64_t n, int64_t row_length, const float* fill) : n_(n), pointers_(n), fill_(row_length) {
    each_vector(row_length, [&](int64_t i, auto part) { part.put(fill_.data() + i, fill ? part.get(fill + i) : Vec{}); });
  }
  void point(const T* map, int64_t row_length, const int64_t* rows) {
    for (int64_t i = 0; i < n_; ++i) pointers_.data()[i] = rows[i] < 0 ? fill_.data() : map + rows[i] * row_length;
  }
  const T* operator[](int64_t i) const { return pointers_.get()[i]; }

 private:
  int64_t n_;
  Scratch<const T*> pointers_;
  Scratch<T> fill_;
};

// `lanes` units of a row of d values from the unit `first` on, zeros beyond d. The next head lies behind this one, and
// rows are too far apart for the processor to foresee it: its line is asked for now.
template <class Unit, class T>
inline Vec load_units(const T* row, int64_t first, int64_t d) {
  __builtin_prefetch(row + first * values_of<Unit> + d);
  const int64_t left = d - first * values_of<Unit>;
  constexpr int whole = lanes * values_of<Unit>;
  if constexpr (values_of<Unit> == 2) {
    if (left >= whole) return load_raw<Vec>(row + 2 * first);
    uint16_t values[whole] = {};
    if (left > 0) std::memcpy(values, row + 2 * first, left * sizeof(T));
    return load_raw<Vec>(values);
  } else {
    if (left >= whole) return load(row + first);
    return left > 0 ? load_first(row + first, static_cast<int>(left)) : Vec{};
  }
}

// `lanes` 16-bit values as integers, zeros beyond `left`.
inline VecBits load_halves(const void* from, int64_t left) {
  if (left >= lanes) return extend(load_raw<VecHalf>(from));
  VecHalf halves{};
  if (left > 0) std::memcpy(&halves, from, left * sizeof(uint16_t));
  return extend(halves);
}

// `count` rows from the row `first` on as units, one behind the other: the left side of a product.
template <class Unit, class T>
inline void gather(const RowPointers<T>& rows, int64_t column, const TileSizes<Unit>& s, int64_t first, int64_t count,
                   Unit* to) {
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t c = 0; c < s.row_units; c += lanes) {
      store(reinterpret_cast<float*>(to) + i * s.row_units + c, load_units<Unit>(rows[first + i] + column, c, s.d));
    }
  }
}

// Units by rows of tokens, zeros for tokens beyond n: the right side of a product that sums over units.
template <class Unit, class T>
inline void gather_transposed(const RowPointers<T>& rows, int64_t column, const TileSizes<Unit>& s, Unit* to) {
  for (int64_t i = 0; i < s.columns; i += lanes) {
    for (int64_t c = 0; c < s.row_units; c += lanes) {
      Vec square[lanes];
#pragma GCC unroll 16
      for (int r = 0; r < lanes; ++r) {
        square[r] = i + r < s.n ? load_units<Unit>(rows[i + r] + column, c, s.d) : Vec{};
      }
      transpose_square(square);
#pragma GCC unroll 16
      for (int r = 0; r < lanes; ++r) store(reinterpret_cast<float*>(to) + (c + r) * s.columns + i, square[r]);
    }
  }
}

// The same rows, or pairs of them zipped together, as rows of d values: the right side of a product that sums over them.
template <class Unit, class T>
inline void gather_paired(const RowPointers<T>& rows, int64_t column, const TileSizes<Unit>& s, int64_t first,
                          int64_t count, Unit* to) {
  if constexpr (values_of<Unit> == 1) {
    gather(rows, column, s, first, count, to);
  } else {
    for (int64_t i = 0; i < count; i += 2) {
      const T* low = rows[first + i] + column;
      const T* high = i + 1 < count ? rows[first + i + 1] + column : nullptr;
      __builtin_prefetch(low + s.d);
      if (high) __builtin_prefetch(high + s.d);
      for (int64_t c = 0; c < s.width; c += lanes) {
        const VecBits pair = load_halves(low + c, s.d - c) | (high ? load_halves(high + c, s.d - c) << 16 : VecBits{});
        std::memcpy(to + i / 2 * s.width + c, &pair, sizeof pair);
      }
    }
  }
}

// Divide rows by their lengths, as torch.nn.functional.normalize does; keep one over the lengths.
inline void normalise_rows(float* rows, const TileSizes<float>& s, float* inverse) {
  for (int64_t i = 0; i < s.n; ++i) {
    float* row = rows + i * s.row_units;
    Vec squares{};
    for (int64_t c = 0; c < s.row_units; c += lanes) squares += load(row + c) * load(row + c);
    const float length = __builtin_sqrtf(sum(squares));
    inverse[i] = 1.0f / (length > 1e-12f ? length : 1e-12f);
    for (int64_t c = 0; c < s.row_units; c += lanes) store(row + c, load(row + c) * inverse[i]);
  }
}

// The same from rows that were gathered before.
inline void transpose_rows(const float* rows, const TileSizes<float>& s, float* to) {
  for (int64_t i = 0; i < s.columns; i += lanes) {
    for (int64_t c = 0; c < s.row_units; c += lanes) {
      Vec square[lanes];
      for (int r = 0; r < lanes; ++r) square[r] = i + r < s.n ? load(rows + (i + r) * s.row_units + c) : Vec{};
      transpose_square(square);
      for (int r = 0; r < lanes; ++r) store(to + (c + r) * s.columns + i, square[r]);
    }
  }
}

// e^(scale s + bias - max) of `count` rows of scores, at most `lanes` of them, into `to`; bias and to are as long as the
// scores. Returns the sums of the rows by lane. Keys of another region than the row's own count as 0.
template <Accuracy accuracy, class To>
inline Vec exponentials(int count, float* scores, float scale, const float* bias, int64_t columns,
                        const int32_t* regions, const int32_t* row_regions, To* to) {
  Vec partial[lanes] = {};
  for (int i = 0; i < count; ++i) {
    float* row = scores + i * columns;
    const float* bias_row = bias + i * columns;
    Vec top = splat(-__builtin_inff());
    for (int64_t j = 0; j < columns; j += lanes) {
      Vec value = load(row + j) * scale + load(bias_row + j);
      if (regions) value = select(load_raw<VecInt>(regions + j) == row_regions[i], value, splat(-__builtin_inff()));
      store(row + j, value);
      top = max(value, top);
    }
    partial[i] = top;
  }
  const Vec highest = largest_of_rows(partial);
  for (int i = 0; i < count; ++i) {
    const float* row = scores + i * columns;
    Vec total{};
    for (int64_t j = 0; j < columns; j += lanes) {
      const Vec value = exp_below_zero<accuracy>(load(row + j) - highest[i]);
      store(to + i * columns + j, value);
      total += value;
    }
    partial[i] = total;
  }
  return sums_of_rows(partial);
}

}  // namespace ff::FF_LEVEL
