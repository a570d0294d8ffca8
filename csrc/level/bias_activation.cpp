// The activation between the two products of an MLP, with the bias of the first, in one pass over memory.
//
// GELU: x Phi(x) (arXiv 1606.08415), its tanh form, and QuickGELU x sigmoid(1.702 x). Derivatives by hand.
#include "../parallel.h"
#include "normal_tail.h"
#include "scratch.h"

namespace ff::FF_LEVEL {

namespace {

// f(x), and f'(x) beside it.
template <Activation activation, Accuracy accuracy>
struct Function;

template <Accuracy accuracy>
struct Function<Activation::gelu, accuracy> {
  // x Phi(x) is x - x Phi(-x): on both sides max(x, 0) less the tail.
  Vec value(Vec x) const {
    const Vec a = bounded(x);
    return max(Vec{}, x) - a * tail.value(a);
  }
  Vec value(Vec x, Vec& slope) const {
    const Vec a = bounded(x);
    Vec below;
    const Vec value = max(Vec{}, x) - a * tail.value_and_slope(a, below);
    slope = select(x < 0.0f, below, 1.0f - below);
    return value;
  }
  // Infinity times a tail of 0 is no number; a NaN stays one.
  static Vec bounded(Vec x) { return min(splat(largest_tail), abs(x)); }

  NormalTail<accuracy> tail;
};

// The two others are x sigmoid(u(x)).
template <Accuracy accuracy, class Inner>
struct Gated {
  Vec value(Vec x) const { return x * sigmoid<accuracy>(Inner::value(x)); }
  Vec value(Vec x, Vec& slope) const {
    const Vec gate = sigmoid<accuracy>(Inner::value(x)), value = x * gate;
    // The gate is shut or open long before u' is infinite; where it is, their product is no number.
    slope = select(abs(x) > 1e4f, gate, gate + value * (1.0f - gate) * Inner::slope(x));
    return value;
  }
};

struct TanhInner {  // (1 + tanh(y)) / 2 = sigmoid(2 y)
  static constexpr float a = 1.59576912f, b = 0.044715f;  // 2 sqrt(2 / pi)
  static Vec value(Vec x) { return a * x * (1.0f + b * x * x); }
  static Vec slope(Vec x) { return a * (1.0f + 3.0f * b * x * x); }
};
template <Accuracy accuracy>
struct Function<Activation::gelu_tanh, accuracy> : Gated<accuracy, TanhInner> {};

struct QuickInner {
  static constexpr float quick = 1.702f;
  static Vec value(Vec x) { return quick * x; }
  static Vec slope(Vec) { return splat(quick); }
};
template <Accuracy accuracy>
struct Function<Activation::quick_gelu, accuracy> : Gated<accuracy, QuickInner> {};

template <class T>
constexpr Accuracy accuracy_of = Accuracy::float32;
template <>
constexpr Accuracy accuracy_of<bf16> = Accuracy::bfloat16;

template <class Body>
void with_activation(Activation activation, const Body& body) {
  switch (activation) {
    case Activation::gelu: return body.template operator()<Activation::gelu>();
    case Activation::gelu_tanh: return body.template operator()<Activation::gelu_tanh>();
    case Activation::quick_gelu: return body.template operator()<Activation::quick_gelu>();
  }
}

template <class T>
void widen_bias(const T* bias, int64_t columns, float* floats) {
  each_vector(columns, [&](int64_t i, auto part) { part.put(floats + i, bias ? part.get(bias + i) : Vec{}); });
}

// The same in the order of TwoVec.
template <class T>
void widen_bias_by_twos(const T* bias, int64_t columns, float* floats) {
  int64_t i = 0;
  for (; i + 2 * lanes <= columns; i += 2 * lanes) store_two(floats + i, bias ? load_two(bias + i) : TwoVec{});
  widen_bias(bias ? bias + i : nullptr, columns - i, floats + i);
}

// Rows that one task takes: enough to be worth its start, the same for any number of threads.
int64_t rows_of_task(int64_t columns) { return 1 + (int64_t{1} << 15) / columns; }

constexpr int64_t max_partials = 64;  // sums over rows are kept for this many runs of rows, then added in order

}  // namespace

void bias_activation_fwd(int threads, DType dtype, Activation activation, int64_t rows, int64_t columns,
                         const void* hidden, const void* bias, void* out) {
  Scratch<float> bias_floats(columns);
  with_type(dtype, [&]<class T>(T) {
    widen_bias_by_twos(static_cast<const T*>(bias), columns, bias_floats.data());
    with_activation(activation, [&]<Activation f>() {
      const int64_t step = rows_of_task(columns);
      parallel(threads, (rows + step - 1) / step, [&](int64_t task) {
        const Function<f, accuracy_of<T>> function;
        const int64_t end = task * step + step < rows ? task * step + step : rows;
        for (int64_t row = task * step; row < end; ++row) {
          const T* in_row = static_cast<const T*>(hidden) + row * columns;
          T* out_row = static_cast<T*>(out) + row * columns;
          int64_t i = 0;
          for (; i + 2 * lanes <= columns; i += 2 * lanes) {
            const TwoVec x = load_two(in_row + i), b = load_two(bias_floats.get() + i);
            store_two(out_row + i, TwoVec{function.value(x.first + b.first), function.value(x.second + b.second)});
          }
          each_vector(columns - i, [&](int64_t rest, auto part) {
            const Vec x = part.get(in_row + i + rest) + part.get(bias_floats.get() + i + rest);
            part.put(out_row + i + rest, function.value(x));
          });
        }
      });
    });
  });
}

void bias_activation_bwd(int threads, DType dtype, Activation activation, int64_t rows, int64_t columns,
                         const void* grad_out, const void* hidden, const void* bias, void* d_hidden, void* out,
                         float* d_bias) {
  const int64_t parts = rows < max_partials ? rows : max_partials;
  Scratch<float> bias_floats(columns), partial(d_bias ? parts * columns : 0);
  with_type(dtype, [&]<class T>(T) {
    widen_bias(static_cast<const T*>(bias), columns, bias_floats.data());
    with_activation(activation, [&]<Activation f>() {
      parallel(threads, parts, [&](int64_t part_index) {
        const Function<f, accuracy_of<T>> function;
        float* sums = d_bias ? partial.data() + part_index * columns : nullptr;
        if (sums) std::memset(sums, 0, columns * sizeof(float));
        const int64_t end = part_begin(rows, parts, part_index + 1);
        for (int64_t row = part_begin(rows, parts, part_index); row < end; ++row) {
          const int64_t at = row * columns;
          each_vector(columns, [&](int64_t i, auto part) {
            const Vec x = part.get(static_cast<const T*>(hidden) + at + i) + part.get(bias_floats.data() + i);
            Vec slope;
            const Vec value = function.value(x, slope);
            const Vec dx = slope * part.get(static_cast<const T*>(grad_out) + at + i);
            part.put(static_cast<T*>(d_hidden) + at + i, dx);
            if (out) part.put(static_cast<T*>(out) + at + i, value);
            if (sums) part.put(sums + i, part.get(sums + i) + dx);
          });
        }
      });
    });
  });
  if (d_bias) add_partials(threads, parts, columns, partial.data(), d_bias);
}

}  // namespace ff::FF_LEVEL
