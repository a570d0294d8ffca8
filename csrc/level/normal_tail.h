// The tail of the normal distribution, Phi(-a) for a >= 0, and what GELU's derivative needs of it, Phi(-a) - a Phi'(a).
#pragma once

#include <cmath>

#include "math.h"

namespace ff::FF_LEVEL {

// From here on both are 0, or e^-128.
inline constexpr float largest_tail = 16.0f;

template <Accuracy>
class NormalTail;

// The density of the normal distribution.
inline Vec density(Vec a) { return exp_below_zero(a * a * -0.5f) * 0.398942280f; }

#if defined(__AVX512F__)

// A function of a >= 0: polynomials around 0, 1/4, ..., 7 1/2, whose coefficients are looked up in registers, and 0
// from 7 5/8 on, where the tail is 1e-14. Four terms are off by 1e-3 of the tail up to 5 and by 1e-2 further on at most;
// seven terms by 1e-7 and 4e-6.
template <int terms>
class TailTable {
 public:
  template <class F>
  explicit TailTable(const F& function) {
    for (int cell = 0; cell < cells - 1; ++cell) interpolate(function, cell);
  }

  class InRegisters {
   public:
    explicit InRegisters(const TailTable& table) {
      for (int power = 0; power < terms; ++power) {
        lower_[power] = load(table.coefficients_[power]);
        upper_[power] = load(table.coefficients_[power] + lanes);
      }
    }
    Vec operator()(Vec a) const {
      // A float of this size has steps of 1/4: the sum's last five bits are the cell, what it lost the place in it.
      constexpr float round_to_cell = 3145728.0f;
      const Vec inside = min(splat(last), a), cell = inside + round_to_cell, at = inside - (cell - round_to_cell);
      Vec value = look_up(terms - 1, cell);
      for (int power = terms - 2; power >= 0; --power) value = value * at + look_up(power, cell);
      return value;
    }

   private:
    Vec look_up(int power, Vec cell) const {
      return (Vec)_mm512_permutex2var_ps((__m512)lower_[power], (__m512i)cell, (__m512)upper_[power]);
    }
    Vec lower_[terms], upper_[terms];
  };

 private:
  static constexpr int cells = 2 * lanes;
  static constexpr float width = 0.25f, last = width * (cells - 1);

  // Newton's polynomial through the Chebyshev nodes of a cell, then its coefficients.
  template <class F>
  void interpolate(const F& function, int cell) {
    double node[terms], difference[terms];
    for (int i = 0; i < terms; ++i) {
      node[i] = std::cos((i + 0.5) * 3.14159265358979324 / terms) * width / 2;
      difference[i] = function(cell * width + node[i]);
      for (int j = i - 1; j >= 0; --j) difference[j] = (difference[j + 1] - difference[j]) / (node[i] - node[j]);
    }
    double coefficient[terms] = {};
    for (int i = 0; i < terms; ++i) {
      for (int power = i; power > 0; --power) coefficient[power] = coefficient[power - 1] - node[i] * coefficient[power];
      coefficient[0] = difference[i] - node[i] * coefficient[0];
    }
    for (int power = 0; power < terms; ++power) coefficients_[power][cell] = static_cast<float>(coefficient[power]);
  }

  float coefficients_[terms][cells] = {};
};

inline double phi(double a) { return std::erfc(a * 0.70710678118654752) / 2; }

// Both tables of seven terms would not fit into the registers.
template <>
class NormalTail<Accuracy::float32> {
 public:
  NormalTail() : value_(table()) {}
  Vec value(Vec a) const { return value_(a); }
  Vec value_and_slope(Vec a, Vec& slope) const {
    const Vec tail = value_(a);
    slope = tail - a * density(a);
    return tail;
  }

 private:
  static const TailTable<7>& table() {
    static const TailTable<7> table(phi);
    return table;
  }
  TailTable<7>::InRegisters value_;
};

template <>
class NormalTail<Accuracy::bfloat16> {
 public:
  NormalTail() : value_(values()), slope_(slopes()) {}
  Vec value(Vec a) const { return value_(a); }
  Vec value_and_slope(Vec a, Vec& slope) const {
    slope = slope_(a);
    return value_(a);
  }

 private:
  static const TailTable<4>& values() {
    static const TailTable<4> table(phi);
    return table;
  }
  static const TailTable<4>& slopes() {
    static const TailTable<4> table([](double a) { return phi(a) - a * std::exp(-a * a / 2) * 0.39894228040143268; });
    return table;
  }
  TailTable<4>::InRegisters value_, slope_;
};

#else

// With z = a / sqrt(2), 2 Phi(-a) = erfc(z) = e^(-z^2) P(t), t = 1 / (1 + 0.4 z): the tail keeps its digits.
template <Accuracy>
class NormalTail {
 public:
  Vec value(Vec a) const { return value(a, density(a)); }
  Vec value_and_slope(Vec a, Vec& slope) const {
    const Vec falling = density(a), tail = value(a, falling);
    slope = tail - a * falling;
    return tail;
  }

 private:
  static Vec value(Vec a, Vec density) {
    constexpr float sqrt_half = 0.707106781f;
    const Vec t = reciprocal(a * (0.4f * sqrt_half) + 1.0f);
    return polynomial({0.28278065f, 0.2839705f, 0.2518645f, 0.24685594f, 0.0896228f, 0.12499329f, 0.09254544f,
                       -0.16978626f, 0.050467376f}, t) * t * density;
  }
};

#endif

}  // namespace ff::FF_LEVEL
