// Elementary functions of vectors. The polynomials are minimax fits of relative error, made for these intervals.
#pragma once

#include "vec.h"

namespace ff::FF_LEVEL {

// Coefficients from the constant up.
template <int terms>
inline Vec polynomial(const float (&coefficients)[terms], Vec x) {
  Vec value = splat(coefficients[terms - 1]);
  for (int i = terms - 2; i >= 0; --i) value = value * x + coefficients[i];
  return value;
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

// p 2^n for whole n, [-126, 0]; AVX-512 also goes below, to 0.
inline Vec scale_down(Vec p, Vec n) {
#if defined(__AVX512F__)
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  return p * as_float((VecBits)(__builtin_convertvector(n, VecInt) + 127) << 23);
#endif
}

// e^x for x <= 0, also for -inf; 0 from where normal floats end, -87.3, or subnormal ones where a level has them. A NaN
// stays one.
template <Accuracy accuracy = Accuracy::float32>
inline Vec exp_below_zero(Vec x) {
  constexpr float log2_e = 1.44269504f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
#if defined(__AVX512F__)
  constexpr float lowest = -104.0f;  // e^-104 is less than half of the smallest subnormal float
#else
  constexpr float lowest = -87.3365448f;
#endif
  const Vec inside = lowest > x ? splat(lowest) : x;
  const Vec scaled = inside * log2_e, n = nearest(scaled);
  Vec power;
  if constexpr (accuracy == Accuracy::float32) {
    const Vec r = inside - n * ln2_high - n * ln2_low;
    power = polynomial({0.499992311f, 0.166671142f, 0.0418901592f, 0.00831252057f}, r) * r * r + r + 1.0f;
  } else {
    power = polynomial({1.0f, 0.693282928f, 0.242210964f, 0.0550089313f}, scaled - n);
  }
  power = scale_down(power, n);
#if defined(__AVX512F__)
  return power;
#else
  return select(x < lowest, Vec{}, power);
#endif
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

// Phi(-|x|) of the normal distribution, from |x| and e^(-x^2 / 2). With z = |x| / sqrt(2), 2 Phi(-|x|) =
// erfc(z) = e^(-z^2) P(t), t = 1 / (1 + p z): the tail keeps its digits.
template <Accuracy accuracy>
inline Vec normal_tail(Vec magnitude, Vec gauss) {
  constexpr float sqrt_half = 0.707106781f;
  if constexpr (accuracy == Accuracy::float32) {
    const Vec t = reciprocal<accuracy>(magnitude * (0.4f * sqrt_half) + 1.0f);
    return polynomial({0.112813152f, 0.113287836f, 0.100479394f, 0.0984812751f, 0.0357543267f, 0.0498651080f,
                       0.0369202904f, -0.0677349195f, 0.0201335698f}, t) * t * gauss;
  } else {
    const Vec t = reciprocal<accuracy>(magnitude * (0.5f * sqrt_half) + 1.0f);
    return polynomial({0.139963820f, 0.155354217f, 0.0547911264f, 0.234984949f, -0.0850541666f}, t) * t * gauss;
  }
}

// e^(-x^2 / 2)
template <Accuracy accuracy>
inline Vec gauss(Vec x) { return exp_below_zero<accuracy>(x * x * -0.5f); }

}  // namespace ff::FF_LEVEL
