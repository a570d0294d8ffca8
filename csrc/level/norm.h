// LayerNorm of rows that lie in one piece or in several: what layer_norm and patch_merging share.
//
// A row is read three times, the first time from memory and then from the first cache. A few 16-bit rows go through
// each step one after the other, so that the sums over one and its root are awaited while others are read: up to 1.3
// times as fast. Rows of floats, which wait for memory, go alone: in groups they took up to twice as long, and so did
// rows of either kind that were read side by side. Letters: C channels of a row.
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

// A row of parameters, or of one value where there are none.
class RowOf {
 public:
  RowOf(const float* given, float value, int64_t columns) : own_(given ? 0 : columns), data_(given) {
    if (given) return;
    for (int64_t i = 0; i < columns; ++i) own_.data()[i] = value;
    data_ = own_.data();
  }
  const float* data() const { return data_; }

 private:
  Scratch<float> own_;
  const float* data_;
};

// A row of C = pieces * length elements.
template <class T, int pieces>
struct Row {
  T* at[pieces];
  int64_t length;

  // Call body(piece, offset in the piece, offset in the row, part, k), k < sums: neighbours differ in it, so that a sum
  // for each k waits for itself half as often as one for all would.
  template <class Body>
  void each(const Body& body) const {
    for (int p = 0; p < pieces; ++p) {
      int64_t i = 0;
      for (; i + 2 * lanes <= length; i += 2 * lanes) {
        body(p, i, p * length + i, Whole{}, 0);
        body(p, i + lanes, p * length + i + lanes, Whole{}, 1);
      }
      each_vector(length - i, [&](int64_t rest, auto part) { body(p, i + rest, p * length + i + rest, part, 0); });
    }
  }
};
struct Sums {
  Vec of[2] = {};
  void add(int k, Vec x) { of[k] += x; }
  Vec total() const { return of[0] + of[1]; }
};

// The lanes beyond the last element as zeros, so that they can be summed.
inline Vec existing(Vec x, Whole) { return x; }
inline Vec existing(Vec x, First part) { return select(lane_index() < part.count, x, Vec{}); }

// Of each row of a group: (x - mean) * rstd - shift is the norm. The shift is what rounding took from the mean.
struct Moments {
  float mean[most_rows], rstd[most_rows], shift[most_rows];
};

// From the sums of the rows, which a first pass has taken. Also written for the backward.
template <class T, int pieces>
inline Moments moments_of(int count, const Row<T, pieces>* rows, const Vec* sums, float eps, float* mean, float* rstd) {
  const float scale = 1.0f / static_cast<float>(pieces * rows[0].length);
  Moments moments;
  Vec off[most_rows], squares[most_rows];
  for (int j = 0; j < count; ++j) moments.mean[j] = sum(sums[j]) * scale;
  for (int j = 0; j < count; ++j) {
    const Row<T, pieces> row = rows[j];
    const float centre = moments.mean[j];
    Sums first, second;
    row.each([&](int p, int64_t i, int64_t, auto part, int k) {
      const Vec d = existing(part.get(row.at[p] + i) - centre, part);
      first.add(k, d);
      second.add(k, d * d);
    });
    off[j] = first.total();
    squares[j] = second.total();
  }
  for (int j = 0; j < count; ++j) {
    const float rest = sum(off[j]) * scale, variance = sum(squares[j]) * scale - rest * rest;
    moments.rstd[j] = rstd[j] = 1.0f / __builtin_sqrtf((variance < 0.0f ? 0.0f : variance) + eps);
    moments.shift[j] = rest * moments.rstd[j];
    mean[j] = moments.mean[j] + rest;
  }
  return moments;
}

// Write norm * weight + bias of row j of a group.
template <class T, class N, int pieces>
inline void normalise(const Row<T, pieces>& row, const Moments& moments, int j, const float* weight, const float* bias,
                      N* norm) {
  const float mean = moments.mean[j], rstd = moments.rstd[j], shift = moments.shift[j];
  row.each([&](int p, int64_t i, int64_t column, auto part, int) {
    const Vec y = (part.get(row.at[p] + i) - mean) * rstd - shift;
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
  Vec gradients[most_rows], products[most_rows];
  if (needs_rows) {
    for (int j = 0; j < count; ++j) {
      const Row<T, pieces> row = rows[j];
      const N* grad_row = grad + j * columns;
      const float centre = mean[j];
      Sums first, second;
      row.each([&](int p, int64_t i, int64_t column, auto part, int k) {
        const Vec g = part.get(grad_row + column) * part.get(weight + column);
        first.add(k, g);
        second.add(k, g * (part.get(row.at[p] + i) - centre));
      });
      gradients[j] = first.total();
      products[j] = second.total();
    }
  }
  for (int j = 0; j < count; ++j) {
    const Row<T, pieces> row = rows[j];
    const N* grad_row = grad + j * columns;
    const float centre = mean[j], factor = rstd[j];
    const float level = needs_rows ? sum(gradients[j]) * scale * factor : 0.0f;
    const float along = needs_rows ? sum(products[j]) * scale * factor * factor : 0.0f;
    row.each([&](int p, int64_t i, int64_t column, auto part, int) {
      const Vec g = part.get(grad_row + column), norm = (part.get(row.at[p] + i) - centre) * factor;
      if (d_weights) {
        part.put(d_weights + column, part.get(d_weights + column) + g * norm);
        part.put(d_weights + columns + column, part.get(d_weights + columns + column) + g);
      }
      if (needs_rows) put(j, p, i, part, g * part.get(weight + column) * factor - level - norm * along);
    });
  }
}

}  // namespace ff::FF_LEVEL
