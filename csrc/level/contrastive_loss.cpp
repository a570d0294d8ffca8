// What a contrastive loss does with a tile of logits between two products: one pass forward, one backward.
//
// Rows and columns are in the order of their labels, so the positives of a row are a run of columns. A log-sum-exp is
// kept as a maximum and the sum of what lies below it (see Statistics in ops/contrastive_loss.py).
#include "../parallel.h"
#include "logits.h"
#include "math.h"
#include "scratch.h"

namespace ff::FF_LEVEL {

namespace {

constexpr int64_t group = 8;    // rows that share one update of their columns' sums
constexpr int64_t band = 128;   // rows of one task, which has sums of its own for every column

// What lies behind the last column must change no maximum.
inline Vec below_all(Vec x, Whole) { return x; }
inline Vec below_all(Vec x, First part) {
  return select(lane_index() < part.count, x, splat(-__builtin_inff()));
}

inline float exp_below_zero_of(float x) { return exp_below_zero(splat(x))[0]; }

// Rows' and columns' sums of `count` rows; a column's are read and written once for all of them.
template <int count>
void add_rows(int64_t cols, const float* logits, float* row_top, float* row_sum, float* col_top, float* col_sum) {
  Vec total[count];
  float top[count];
  for (int k = 0; k < count; ++k) {
    Vec most = splat(row_top[k]);
    each_vector(cols, [&](int64_t i, auto part) {
      most = max(most, below_all(part.get(logits + k * cols + i), part));
    });
    top[k] = largest(most);
    total[k] = Vec{};
  }
  each_vector(cols, [&](int64_t i, auto part) {
    Vec x[count];
    const Vec before = part.get(col_top + i);
    Vec most = before;
    for (int k = 0; k < count; ++k) {
      x[k] = below_all(part.get(logits + k * cols + i), part);
      most = max(most, x[k]);
    }
    Vec sum_of_col = part.get(col_sum + i) * exp_below_zero(before - most);
    // Two exponentials an element: one made from the other by a factor would lose a loss near 0.
    for (int k = 0; k < count; ++k) {
      total[k] += exp_below_zero(x[k] - top[k]);
      sum_of_col += exp_below_zero(x[k] - most);
    }
    part.put(col_top + i, most);
    part.put(col_sum + i, sum_of_col);
  });
  for (int k = 0; k < count; ++k) {
    row_sum[k] = row_sum[k] * exp_below_zero_of(row_top[k] - top[k]) + sum(total[k]);
    row_top[k] = top[k];
  }
}

}  // namespace

void contrastive_loss_fwd(int threads, int64_t rows, int64_t cols, int64_t first_col, const float* logits,
                          const int64_t* begin, const int64_t* end, float* row_top, float* row_sum, float* col_top,
                          float* col_sum, float* positive) {
  const int64_t bands = (rows + band - 1) / band;
  Scratch<float> tops(bands * cols), sums(bands * cols);
  parallel(threads, bands, [&](int64_t task) {
    float *top = tops.data() + task * cols, *total = sums.data() + task * cols;
    each_vector(cols, [&](int64_t i, auto part) {
      part.put(top + i, splat(-__builtin_inff()));
      part.put(total + i, Vec{});
    });
    const int64_t last = task * band + band < rows ? task * band + band : rows;
    int64_t row = task * band;
    for (; row + group <= last; row += group) {
      add_rows<group>(cols, logits + row * cols, row_top + row, row_sum + row, top, total);
    }
    for (; row < last; ++row) add_rows<1>(cols, logits + row * cols, row_top + row, row_sum + row, top, total);
    for (row = task * band; row < last; ++row) {
      const Run run(begin, end, row, first_col, cols);
      if (run.begin >= run.end) continue;
      Vec total_of_run{};
      each_vector(run.end - run.begin, [&](int64_t i, auto part) {
        total_of_run += part.get(logits + row * cols + run.begin + i);
      });
      positive[row] += sum(total_of_run);
    }
  });
  constexpr int64_t step = 256;
  parallel(threads, (cols + step - 1) / step, [&](int64_t task) {
    const int64_t from = task * step, length = cols - from < step ? cols - from : step;
    each_vector(length, [&](int64_t i, auto part) {
      const Vec before = part.get(col_top + from + i);
      Vec most = before;
      for (int64_t b = 0; b < bands; ++b) most = max(most, part.get(tops.data() + b * cols + from + i));
      Vec total = part.get(col_sum + from + i) * exp_below_zero(before - most);
      for (int64_t b = 0; b < bands; ++b) {
        total += part.get(sums.data() + b * cols + from + i) *
                 exp_below_zero(part.get(tops.data() + b * cols + from + i) - most);
      }
      part.put(col_top + from + i, most);
      part.put(col_sum + from + i, total);
    });
  });
}

void contrastive_loss_bwd(int threads, DType dtype, int64_t rows, int64_t cols, int64_t first_col,
                          const float* logits, const int64_t* begin, const int64_t* end, const float* row_lse,
                          const float* d_row, const float* col_lse, const float* d_col, const float* d_positive,
                          void* grad, float* grad_by_logit) {
  with_type(dtype, [&]<class T>(T) {
    parallel(threads, (rows + group - 1) / group, [&](int64_t task) {
      const int64_t last = task * group + group < rows ? task * group + group : rows;
      for (int64_t row = task * group; row < last; ++row) {
        const float* in = logits + row * cols;
        T* out = static_cast<T*>(grad) + row * cols;
        const Run run(begin, end, row, first_col, cols);
        Vec product{};
        each_vector(cols, [&](int64_t i, auto part) {
          const Vec x = part.get(in + i);
          Vec g = exp_below_zero(x - row_lse[row]) * d_row[row] +
                  exp_below_zero(x - part.get(col_lse + i)) * part.get(d_col + i);
          // A positive enters before g is rounded: a probability near 1 cancels against it in one number.
          if (run.meets_vector(i)) g += select(run.within_vector(i), splat(d_positive[row]), Vec{});
          part.put(out + i, g);
          product += none_behind(g * x, part);
        });
        if (grad_by_logit) grad_by_logit[row] += sum(product);
      }
    });
  });
}

}  // namespace ff::FF_LEVEL
