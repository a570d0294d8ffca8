// LayerNorm of rows that lie in one piece or in several: what layer_norm and patch_merging share.
//
// Of 16-bit rows, moments are taken about the first element while the row comes from memory: sum and sum of squares at
// once. Its distance from the mean is at most the root of C standard deviations, so that the difference of squares loses
// at most log2 C of float's 24 bits, where 8 or 11 are wanted. A few such rows go through each step one after the other,
// so that the sums over one and its root are awaited while others are read: up to 1.3 times as fast. Rows of floats are
// read once more for the squares, and go alone, since they wait for memory: in groups they took up to twice as long, and
// so did rows of either kind that were read side by side. Letters: C channels of a row.
#pragma once

#include "scratch.h"

namespace ff::FF_LEVEL {

inline constexpr int most_rows = 4;  // of a group
template <class T>
inline constexpr int group_of = sizeof(T) == sizeof(float) ? 1 : most_rows;

// Call body(first row, number of rows) for the groups of [begin, end), of rows of T.
template <class T, class Body>
inline void each_group(int64_t begin, int64_t end, const Body& body) {
  constexpr int most = group_of<T>;
  for (; begin < end; begin += most) body(begin, end - begin < most ? static_cast<int>(end - begin) : most);
}

// The same for all rows, in tasks that are worth their start and the same for any number of threads.
template <class T, class Body>
inline void each_group(int threads, int64_t rows, int64_t columns, const Body& body) {
  const int64_t step = (1 + (int64_t{1} << 13) / columns) * most_rows;
  parallel(threads, (rows + step - 1) / step, [&](int64_t task) {
    each_group<T>(task * step, task * step + step < rows ? task * step + step : rows, body);
  });
}

// Call body(first row, number of rows, sums) for every group. totals (2, C) gets what is added to all sums (2, C), one
// for each of at most 64 runs of rows; null totals make null sums.
template <class T, class Body>
inline void sum_over_groups(int threads, int64_t rows, int64_t columns, float* totals, const Body& body) {
  constexpr int64_t most_runs = 64, least_rows = 16;
  const int64_t wanted = rows / least_rows, runs = wanted > most_runs ? most_runs : wanted < 1 ? 1 : wanted;
  Scratch<float> partial(totals ? runs * 2 * columns : 0);
  parallel(threads, runs, [&](int64_t run) {
    float* sums = totals ? partial.data() + run * 2 * columns : nullptr;
    if (sums) std::memset(sums, 0, 2 * columns * sizeof(float));
    each_group<T>(part_begin(rows, runs, run), part_begin(rows, runs, run + 1),
                  [&](int64_t row, int count) { body(row, count, sums); });
  });
  if (totals) add_partials(threads, runs, 2 * columns, partial.data(), totals);
}

// Two vectors at a time, in the order of memory, or in that of `load_two` for rows of bf16 beside which nothing else is.
template <class T>
inline constexpr bool takes_apart = false;
template <>
inline constexpr bool takes_apart<bf16> = true;

template <bool apart>
struct Twice {
  template <class T>
  TwoVec get(const T* p) const {
    if constexpr (apart) return load_two(p);
    return {load(p), load(p + lanes)};
  }
  template <class T>
  void put(T* p, TwoVec x) const {
    if constexpr (apart) return store_two(p, x);
    store(p, x.first);
    store(p + lanes, x.second);
  }
};

// A row of C = pieces * length elements.
template <class T, int pieces>
struct Row {
  T* at[pieces];
  int64_t length;

  // Call body(piece, offset in the piece, offset in the row, part).
  template <bool apart = false, class Body>
  void each(const Body& body) const {
    for (int p = 0; p < pieces; ++p) {
      int64_t i = 0;
      for (; i + 2 * lanes <= length; i += 2 * lanes) body(p, i, p * length + i, Twice<apart>{});
      each_vector(length - i, [&](int64_t rest, auto part) { body(p, i + rest, p * length + i + rest, part); });
    }
  }
};

// Neighbours are summed apart, so that each sum waits for itself half as often.
struct Sums {
  Vec of[2] = {};
  void add(Vec x) { of[0] += x; }
  void add(TwoVec x) {
    of[0] += x.first;
    of[1] += x.second;
  }
  float total() const { return sum(of[0] + of[1]); }
};

// The lanes beyond the last element as zeros, so that they can be summed.
template <bool apart>
inline TwoVec existing(TwoVec x, Twice<apart>) { return x; }
inline Vec existing(Vec x, Whole) { return x; }
inline Vec existing(Vec x, First part) { return select(lane_index() < part.count, x, Vec{}); }

// A row of parameters, or of one value where there are none, in the order in which rows of T in pieces are read.
template <class T>
class RowOf {
 public:
  RowOf(const float* given, float value, int64_t pieces, int64_t length)
      : own_(given && !takes_apart<T> ? 0 : pieces * length), data_(given) {
    if (given && !takes_apart<T>) return;
    data_ = own_.get();
    for (int64_t i = 0; i < pieces * length; ++i) own_.data()[i] = given ? given[i] : value;
    if (!given) return;
    for (int64_t p = 0; p < pieces; ++p) {
      for (int64_t i = p * length; i + 2 * lanes <= (p + 1) * length; i += 2 * lanes) {
        for (int64_t lane = 0; lane < 2 * lanes; ++lane) {
          own_.data()[i + lane] = given[i + (lane < lanes ? 2 * lane : 2 * (lane - lanes) + 1)];
        }
      }
    }
  }
  const float* data() const { return data_; }

 private:
  Scratch<float> own_;
  const float* data_;
};

// What the first pass over a row of T takes from it.
template <class T>
struct FirstPass {
  static constexpr bool whole = sizeof(T) == 2;  // then no other pass is needed
  float pivot;
  Sums values = {}, squares = {};

  explicit FirstPass(float first) : pivot(whole ? first : 0.0f) {}
  template <class V, class Part>
  void add(V x, Part part) {
    if constexpr (whole) {
      const V d = existing(x - pivot, part);
      values.add(d);
      squares.add(d * d);
    } else {
      values.add(x);
    }
  }
};

// Of each row of a group: (x - centre) * rstd - shift is the norm. The shift is what is left of the mean.
struct Moments {
  float centre[most_rows], rstd[most_rows], shift[most_rows];
};

// The moments of the rows of a group; written for the backward, too. first_pass(j) passes over row j.
template <class T, int pieces, class Pass>
inline Moments moments_of(int count, const Row<const T, pieces>* rows, const Pass& first_pass, float eps, float* mean,
                          float* rstd) {
  const float scale = 1.0f / static_cast<float>(pieces * rows[0].length);
  Moments moments;
  float rest[most_rows] = {}, squares[most_rows] = {};
  for (int j = 0; j < count; ++j) {
    const FirstPass<T> pass = first_pass(j);
    moments.centre[j] = pass.pivot;
    rest[j] = pass.values.total() * scale;
    if constexpr (FirstPass<T>::whole) squares[j] = pass.squares.total() * scale;
  }
  if constexpr (!FirstPass<T>::whole) {
    for (int j = 0; j < count; ++j) {
      const Row<const T, pieces> row = rows[j];
      const float centre = moments.centre[j] = rest[j];
      Sums first, second;
      row.each([&](int p, int64_t i, int64_t, auto part) {
        const auto d = existing(part.get(row.at[p] + i) - centre, part);
        first.add(d);
        second.add(d * d);
      });
      rest[j] = first.total() * scale;
      squares[j] = second.total() * scale;
    }
  }
  for (int j = 0; j < count; ++j) {
    const float variance = squares[j] - rest[j] * rest[j];
    moments.rstd[j] = rstd[j] = 1.0f / __builtin_sqrtf((variance < 0.0f ? 0.0f : variance) + eps);
    moments.shift[j] = rest[j] * moments.rstd[j];
    mean[j] = moments.centre[j] + rest[j];
  }
  return moments;
}

// Write norm * weight + bias of row j of a group; weight and bias are RowOf<T>.
template <class T, int pieces>
inline void normalise(const Row<const T, pieces>& row, const Moments& moments, int j, const float* weight,
                      const float* bias, T* norm) {
  const float centre = moments.centre[j], rstd = moments.rstd[j], shift = moments.shift[j];
  row.template each<takes_apart<T>>([&](int p, int64_t i, int64_t column, auto part) {
    const auto y = (part.get(row.at[p] + i) - centre) * rstd - shift;
    part.put(norm + column, y * part.get(weight + column) + part.get(bias + column));
  });
}

// The gradients of the rows of a group from that of their norms, grad (count, C). d_weights (2, C) takes the sums of
// weight and bias, if it is not null, and put(row, piece, offset in the piece, part, gradient) takes the others, if
// `needs_rows`.
template <class T, class N, int pieces, class Put>
inline void norm_backward(int count, const Row<T, pieces>* rows, const N* grad, const float* mean, const float* rstd,
                          const float* weight, float* d_weights, bool needs_rows, const Put& put) {
  const int64_t columns = pieces * rows[0].length;
  const float scale = 1.0f / static_cast<float>(columns);
  // Of the weighted gradient: its mean, and its mean product with the norm.
  float gradients[most_rows], products[most_rows];
  if (needs_rows) {
    for (int j = 0; j < count; ++j) {
      const Row<T, pieces> row = rows[j];
      const N* grad_row = grad + j * columns;
      const float centre = mean[j];
      Sums first, second;
      row.each([&](int p, int64_t i, int64_t column, auto part) {
        const auto g = part.get(grad_row + column) * part.get(weight + column);
        first.add(g);
        second.add(g * (part.get(row.at[p] + i) - centre));
      });
      gradients[j] = first.total();
      products[j] = second.total();
    }
  }
  for (int j = 0; j < count; ++j) {
    const Row<T, pieces> row = rows[j];
    const N* grad_row = grad + j * columns;
    const float centre = mean[j], factor = rstd[j];
    const float level = needs_rows ? gradients[j] * scale * factor : 0.0f;
    const float along = needs_rows ? products[j] * scale * factor * factor : 0.0f;
    row.each([&](int p, int64_t i, int64_t column, auto part) {
      const auto g = part.get(grad_row + column), norm = (part.get(row.at[p] + i) - centre) * factor;
      if (d_weights) {
        part.put(d_weights + column, part.get(d_weights + column) + g * norm);
        part.put(d_weights + columns + column, part.get(d_weights + columns + column) + g);
      }
      if (needs_rows) put(j, p, i, part, g * part.get(weight + column) * factor - level - norm * along);
    });
  }
}

}  // namespace ff::FF_LEVEL
