// LayerNorm (arXiv 1607.06450), alone or behind the sum of a residual stream and a branch, in one pass over memory.
//
// Beside norms in the dtype of what is normalised, mean and rstd of each row are returned for the backward, in float.
#include "norm.h"

namespace ff::FF_LEVEL {

namespace {

// What a stream of A and a branch of B sum up to: theirs if they agree, float otherwise.
template <class A, class B> struct Promoted { using type = float; };
template <class A> struct Promoted<A, A> { using type = A; };

template <class T>
inline Row<const T, 1> row_of(const T* matrix, int64_t row, int64_t columns) {
  return {{matrix + row * columns}, columns};
}

// The factors of the branch of a row.
struct Factors {
  const float* of_sample;
  int64_t rows_of_sample;
  float operator()(int64_t row) const { return of_sample ? of_sample[row / rows_of_sample] : 1.0f; }
};

// Call body(X{}, R{}) with the element types of x and of the residual.
template <class Body>
inline void with_types(DType x, DType residual, const Body& body) {
  with_type(x, [&]<class X>(X) { with_type(residual, [&]<class R>(R) { body(X{}, R{}); }); });
}

}  // namespace

void layer_norm_fwd(int threads, DType x_dtype, DType residual_dtype, int64_t rows, int64_t columns,
                    int64_t rows_of_sample, const void* x, const void* residual, const float* residual_scale,
                    const float* weight, const float* bias, float eps, void* total, void* norm, float* mean,
                    float* rstd) {
  const Factors factors{residual_scale, rows_of_sample};
  // Normalise what lies at `in` once first_pass(row) has put it there and summed it.
  const auto run = [&]<class S>(const S* in, const auto& first_pass) {
    const RowOf<S> weights(weight, 1.0f, 1, columns), biases(bias, 0.0f, 1, columns);
    each_group<S>(threads, rows, columns, [=, w = weights.data(), b = biases.data()](int64_t row, int count) {
      Row<const S, 1> group[most_rows];
      for (int j = 0; j < count; ++j) group[j] = row_of(in, row + j, columns);
      const auto pass = [&](int j) { return first_pass(row + j); };
      const Moments moments = moments_of(count, group, pass, eps, mean + row, rstd + row);
      S* out = static_cast<S*>(norm) + row * columns;
      for (int j = 0; j < count; ++j) normalise(group[j], moments, j, w, b, out + j * columns);
    });
  };
  if (!residual) {
    with_type(x_dtype, [&]<class X>(X) {
      const X* in = static_cast<const X*>(x);
      run(in, [=](int64_t index) {
        const auto row = row_of(in, index, columns);
        FirstPass<X> pass(to_float(row.at[0][0]));
        row.template each<takes_apart<X>>(
            [&](int, int64_t, int64_t i, auto part) { pass.add(part.get(row.at[0] + i), part); });
        return pass;
      });
    });
    return;
  }
  with_types(x_dtype, residual_dtype, [&]<class X, class R>(X, R) {
    using S = typename Promoted<X, R>::type;
    S* const totals = static_cast<S*>(total);
    run(static_cast<const S*>(totals), [=](int64_t row) {
      const X* branch = static_cast<const X*>(x) + row * columns;
      const R* stream = static_cast<const R*>(residual) + row * columns;
      S* out = totals + row * columns;
      const float factor = factors(row);
      FirstPass<S> pass(to_float(stream[0]) + to_float(branch[0]) * factor);
      row_of(out, 0, columns).template each<takes_apart<S>>([&](int, int64_t, int64_t i, auto part) {
        part.put(out + i, part.get(stream + i) + part.get(branch + i) * factor);
        // Statistics are those of the sum as it is returned, rounded.
        pass.add(part.get(out + i), part);
      });
      return pass;
    });
  });
}

void layer_norm_bwd(int threads, DType x_dtype, DType residual_dtype, int64_t rows, int64_t columns,
                    int64_t rows_of_sample, const void* grad_norm, const void* grad_sum, const void* total,
                    const float* residual_scale, const float* weight, const float* mean, const float* rstd, void* d_sum,
                    void* dx, float* d_weights) {
  const RowOf<float> weights(weight, 1.0f, 1, columns);
  const float* w = weights.data();
  const Factors factors{residual_scale, rows_of_sample};
  with_types(x_dtype, residual_dtype, [&]<class X, class R>(X, R) {
    using S = typename Promoted<X, R>::type;
    const S *in = static_cast<const S*>(total), *grad = static_cast<const S*>(grad_norm);
    const S* more = static_cast<const S*>(grad_sum);
    R* const d_stream = static_cast<R*>(d_sum);
    X* const d_branch = static_cast<X*>(dx);
    sum_over_groups<S>(threads, rows, columns, d_weights, [=](int64_t row, int count, float* sums) {
      Row<const S, 1> group[most_rows];
      float factor[most_rows];
      for (int j = 0; j < count; ++j) {
        group[j] = row_of(in, row + j, columns);
        factor[j] = factors(row + j);
      }
      norm_backward(count, group, grad + row * columns, mean + row, rstd + row, w, sums, d_stream || d_branch,
                    [=, &factor](int j, int, int64_t i, auto part, auto d) {
                      const int64_t at = (row + j) * columns + i;
                      if (more) d = d + part.get(more + at);
                      if (d_stream) part.put(d_stream + at, d);
                      if (d_branch) part.put(d_branch + at, d * factor[j]);
                    });
    });
  });
}

}  // namespace ff::FF_LEVEL
