// Elementary functions of vectors. The polynomials are minimax fits of relative error, made for these intervals.
#pragma once

#include "vec.h"

namespace ff::FF_LEVEL {

// Coefficients from the constant up. Even and odd powers apart: half the steps that wait for one another.
template <int terms>
inline Vec polynomial(const float (&coefficients)[terms], Vec x) {
  const Vec square = x * x;
  Vec even = splat(coefficients[(terms - 1) / 2 * 2]), odd = splat(coefficients[terms / 2 * 2 - 1]);
  for (int i = (terms - 1) / 2 * 2 - 2; i >= 0; i -= 2) even = even * square + coefficients[i];
  for (int i = terms / 2 * 2 - 3; i >= 0; i -= 2) odd = odd * square + coefficients[i];
  return odd * x + even;
}

enum class Accuracy { float32, bfloat16 };  // relative error below 2e-7, or below 2e-4: what a type can show

// 1 / x for x of at least 2^-126; AVX-512 has an estimate to 14 bits, which one step of Newton's makes whole.
template <Accuracy accuracy = Accuracy::float32>
inline Vec reciprocal(Vec x) {
#if defined(__AVX512F__)
  const Vec estimate = (Vec)_mm512_rcp14_ps((__m512)x);
  if constexpr (accuracy == Accuracy::bfloat16) return estimate;
  return estimate + estimate * (1.0f - x * estimate);
#else
  return 1.0f / x;
#endif
}

// The whole number nearest to x, |x| < 2^22.
inline Vec nearest(Vec x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  constexpr float to_integer = 12582912.0f;  // 1.5 * 2^23: added, it leaves no digits behind the point
  return (x + to_integer) - to_integer;
#endif
}

// 2^(n + fraction) for whole n <= 0 and a fraction of at most 1/2 either way, exactly 1 for 0; 0 from where
// normal floats end, -126, or subnormal ones where a level has them.
template <Accuracy accuracy>
inline Vec exp2_below_zero(Vec n, Vec fraction) {
  Vec power;
  if constexpr (accuracy == Accuracy::float32) {
    power = polynomial({1.0f, 0.693147f, 0.24022242f, 0.05550734f, 0.009671513f, 0.0013264666f}, fraction);
  } else {
    power = polynomial({1.0f, 0.693282928f, 0.242210964f, 0.0550089313f}, fraction);
  }
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_scalef_ps((__mmask16)-1, (__m512)power, (__m512)n);
#else
  const Vec normal = max(splat(-126.0f), n);
  const Vec scaled = power * as_float((VecBits)(__builtin_convertvector(normal, VecInt) + 127) << 23);
  return select(n < -126.0f, Vec{}, scaled);
#endif
}

// e^x for x <= 0, also for -inf. A NaN stays one.
template <Accuracy accuracy = Accuracy::float32>
inline Vec exp_below_zero(Vec x) {
  constexpr float log2_e = 1.44269502f, log2_e_low = 1.92596299e-8f;
  const Vec inside = max(splat(-105.0f), x);  // e^-105 is less than half of the smallest subnormal float
  const Vec n = nearest(inside * log2_e);
  Vec fraction = inside * log2_e - n;
  if constexpr (accuracy == Accuracy::float32) fraction += inside * log2_e_low;
  return exp2_below_zero<accuracy>(n, fraction);
}

// e^x, by the same rules; +inf above 87.3.
template <Accuracy accuracy = Accuracy::float32>
inline Vec exp(Vec x) {
  // e^-|x| has no overflow, and its reciprocal is as exact.
  const Vec below = exp_below_zero<accuracy>(select(x > 0.0f, -x, x));
  return select(x > 0.0f, 1.0f / below, below);
}

inline Vec abs(Vec x) { return as_float(as_bits(x) & 0x7fffffffu); }

template <Accuracy accuracy = Accuracy::float32>
inline Vec sigmoid(Vec x) {
  // e^-|x| is in (0, 1], and so is no reason for a division to overflow.
  const Vec below = exp_below_zero<accuracy>(select(x > 0.0f, -x, x)), inverse = reciprocal<accuracy>(1.0f + below);
  return select(x > 0.0f, inverse, below * inverse);
}

}  // namespace ff::FF_LEVEL
