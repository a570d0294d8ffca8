// What the sigmoid loss does with a tile of logits between two products: one pass forward, one backward.
//
// Rows and columns are in the order of their labels, so the positives of a row are a run of columns.
#include "../parallel.h"
#include "logits.h"
#include "math.h"

namespace ff::FF_LEVEL {

namespace {

constexpr int64_t rows_of_task = 8;

// log(1 + e^x), relative error below 1e-6 also where it is small: log(1 + t) = 2 atanh(t / (2 + t)).
inline Vec softplus(Vec x) {
  const Vec t = exp_below_zero(-abs(x)), s = t / (2.0f + t);
  const Vec p = polynomial({1.0f, 0.333331585f, 0.200124547f, 0.139803022f, 0.140891686f}, s * s);
  return max(Vec{}, x) + 2.0f * s * p;
}

}  // namespace

void sigmoid_loss_fwd(int threads, int64_t rows, int64_t cols, int64_t first_col, float bias, const float* logits,
                      const int64_t* begin, const int64_t* end, float* loss) {
  parallel(threads, (rows + rows_of_task - 1) / rows_of_task, [&](int64_t task) {
    const int64_t last = task * rows_of_task + rows_of_task < rows ? task * rows_of_task + rows_of_task : rows;
    for (int64_t row = task * rows_of_task; row < last; ++row) {
      const float* in = logits + row * cols;
      const Run run(begin, end, row, first_col, cols);
      Vec total{};
      each_vector(cols, [&](int64_t i, auto part) {
        Vec x = part.get(in + i) + bias;
        if (run.meets_vector(i)) x = select(run.within_vector(i), -x, x);
        total += none_behind(softplus(x), part);
      });
      loss[row] += sum(total);
    }
  });
}

void sigmoid_loss_bwd(int threads, DType dtype, int64_t rows, int64_t cols, int64_t first_col, float bias,
                      const float* logits, const int64_t* begin, const int64_t* end, const float* d_loss, void* grad,
                      float* grad_sum, float* grad_by_logit) {
  with_type(dtype, [&]<class T>(T) {
    parallel(threads, (rows + rows_of_task - 1) / rows_of_task, [&](int64_t task) {
      const int64_t last = task * rows_of_task + rows_of_task < rows ? task * rows_of_task + rows_of_task : rows;
      for (int64_t row = task * rows_of_task; row < last; ++row) {
        const float* in = logits + row * cols;
        T* out = static_cast<T*>(grad) + row * cols;
        const Run run(begin, end, row, first_col, cols);
        Vec total{}, product{};
        each_vector(cols, [&](int64_t i, auto part) {
          const Vec logit = part.get(in + i);
          Vec x = logit + bias, d = splat(d_loss[row]);
          if (run.meets_vector(i)) {
            const VecInt positive = run.within_vector(i);
            x = select(positive, -x, x);
            d = select(positive, -d, d);
          }
          const Vec g = sigmoid(x) * d;
          part.put(out + i, g);
          total += none_behind(g, part);
          product += none_behind(g * logit, part);
        });
        grad_sum[row] += sum(total);
        grad_by_logit[row] += sum(product);
      }
    });
  });
}

}  // namespace ff::FF_LEVEL
