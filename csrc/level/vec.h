// Vectors of floats: loads, stores and conversions. One notation for every instruction set.
//
// The vector extensions of GCC and Clang give arithmetic, comparison and `mask ? a : b` on every target; intrinsics
// stand only where they say what the extensions cannot. Numbers are float in registers whatever they are in memory.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../kernels.h"

#if !defined(FF_LEVEL)
#error "files in level/ are compiled with -DFF_LEVEL=<a name in levels.h>"
#endif

namespace ff::FF_LEVEL {

#if defined(__AVX512F__)
inline constexpr int lanes = 16;
#elif defined(__AVX2__)
inline constexpr int lanes = 8;
#else
inline constexpr int lanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * lanes)));
typedef int32_t VecInt __attribute__((vector_size(4 * lanes)));
typedef uint32_t VecBits __attribute__((vector_size(4 * lanes)));
typedef uint16_t VecHalf __attribute__((vector_size(2 * lanes)));
typedef uint16_t VecShorts __attribute__((vector_size(4 * lanes)));

// Elements in memory. `half` is IEEE's binary16, `bf16` the upper half of a float.
struct bf16 { uint16_t bits; };
struct half { uint16_t bits; };

inline Vec splat(float x) { return x - Vec{}; }
inline Vec select(VecInt mask, Vec a, Vec b) { return mask ? a : b; }
inline Vec as_float(VecBits x) { return (Vec)x; }
inline VecBits as_bits(Vec x) { return (VecBits)x; }

// `b` where either is a NaN. By intrinsics, as GCC makes a comparison and a blend of the last line.
inline Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_max_ps((__mmask16)-1, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
inline Vec min(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_min_ps((__mmask16)-1, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

inline VecInt lane_index() {
  VecInt index;
  for (int i = 0; i < lanes; ++i) index[i] = i;
  return index;
}

template <class V>
inline V load_raw(const void* address) {
  V value;
  std::memcpy(&value, address, sizeof value);
  return value;
}

// Vectors at any address, of any type: read as such, where a memcpy leaves GCC with a copy on the stack.
typedef float VecAnywhere __attribute__((vector_size(4 * lanes), aligned(1), may_alias));
typedef uint16_t VecHalfAnywhere __attribute__((vector_size(2 * lanes), aligned(1), may_alias));

// Zero extension to 32 bits and the lower halves of them. GCC 12 takes several instructions for what is one; masked
// forms of intrinsics are free, and it warns of the others' undefined lanes.
inline VecBits extend(VecHalf bits) {
#if defined(__AVX512F__)
  return (VecBits)_mm512_maskz_cvtepu16_epi32((__mmask16)-1, (__m256i)bits);
#elif defined(__AVX2__)
  return (VecBits)_mm256_cvtepu16_epi32((__m128i)bits);
#else
  return __builtin_convertvector(bits, VecBits);
#endif
}
inline VecHalf lower_halves(VecBits bits) {
#if defined(__AVX512F__)
  return (VecHalf)_mm512_maskz_cvtepi32_epi16((__mmask16)-1, (__m512i)bits);
#else
  return __builtin_convertvector(bits, VecHalf);
#endif
}

inline Vec widen(VecHalf bits, bf16) { return as_float(extend(bits) << 16); }

// The upper halves are x to the nearest bf16, ties to even; a NaN stays one.
inline VecBits rounded(Vec x) {
  const VecBits bits = as_bits(x);
  return x == x ? bits + 0x7fffu + ((bits >> 16) & 1u) : bits | 0x400000u;
}
inline VecHalf narrow(Vec x, bf16) {
#if defined(__AVX512BF16__)
  return (VecHalf)_mm512_cvtneps_pbh((__m512)x);
#else
  return lower_halves(rounded(x) >> 16);
#endif
}

inline Vec widen(VecHalf bits, half) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_cvtph_ps((__mmask16)-1, (__m256i)bits);
#elif defined(__AVX2__)
  return (Vec)_mm256_cvtph_ps((__m128i)bits);
#else
  // The exponent is moved to a float's place and put right by a product, which also makes subnormals.
  const VecBits wide = extend(bits);
  const VecBits sign = (wide & 0x8000u) << 16, magnitude = (wide & 0x7fffu) << 13;
  const Vec scaled = as_float(magnitude) * 0x1p112f;
  const VecBits special = magnitude | 0x7f800000u;
  return as_float(sign | ((wide & 0x7c00u) == 0x7c00u ? special : as_bits(scaled)));
#endif
}

inline VecHalf narrow(Vec x, half) {
#if defined(__AVX512F__)
  return (VecHalf)_mm512_maskz_cvtps_ph((__mmask16)-1, (__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__AVX2__)
  return (VecHalf)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
  // A sum with a power of two rounds to nearest even at the last bit that a half keeps, subnormals included.
  const VecBits bits = as_bits(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  const VecBits normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  const VecBits subnormal = as_bits(as_float(magnitude) + 0.5f) - as_bits(splat(0.5f));
  VecBits result = magnitude < (113u << 23) ? subnormal : normal;
  result = magnitude >= (143u << 23) ? VecBits{} + 0x7c00u : result;
  result = magnitude > (255u << 23) ? VecBits{} + 0x7e00u : result;
  return __builtin_convertvector(result | sign, VecHalf);
#endif
}

inline Vec load(const float* p) { return *reinterpret_cast<const VecAnywhere*>(p); }
template <class T>
inline Vec load(const T* p) { return widen(*reinterpret_cast<const VecHalfAnywhere*>(p), T{}); }

inline void store(float* p, Vec x) { *reinterpret_cast<VecAnywhere*>(p) = x; }
template <class T>
inline void store(T* p, Vec x) { *reinterpret_cast<VecHalfAnywhere*>(p) = narrow(x, T{}); }

// Two vectors that are neighbours in memory. Of bf16 the first has the elements at even places, the second those at odd
// ones, since halves of words are taken apart and put together sooner than they are moved. What is computed beside them
// from floats has to find these in the same order: see `store_two` of floats.
struct TwoVec { Vec first, second; };

inline TwoVec operator+(TwoVec a, TwoVec b) { return {a.first + b.first, a.second + b.second}; }
inline TwoVec operator-(TwoVec a, TwoVec b) { return {a.first - b.first, a.second - b.second}; }
inline TwoVec operator*(TwoVec a, TwoVec b) { return {a.first * b.first, a.second * b.second}; }
inline TwoVec operator-(TwoVec a, float b) { return {a.first - b, a.second - b}; }
inline TwoVec operator*(TwoVec a, float b) { return {a.first * b, a.second * b}; }

typedef uint32_t VecBitsAnywhere __attribute__((vector_size(4 * lanes), aligned(1), may_alias));

template <class T>
inline TwoVec load_two(const T* p) { return {load(p), load(p + lanes)}; }
inline TwoVec load_two(const bf16* p) {
  const VecBits words = *reinterpret_cast<const VecBitsAnywhere*>(p);
  return {as_float(words << 16), as_float(words & 0xffff0000u)};
}
template <class T>
inline void store_two(T* p, TwoVec x) {
  store(p, x.first);
  store(p + lanes, x.second);
}
inline void store_two(bf16* p, TwoVec x) {
#if defined(__AVX512BF16__)
  const VecShorts apart = (VecShorts)_mm512_cvtne2ps_pbh((__m512)x.second, (__m512)x.first);
  *reinterpret_cast<VecBitsAnywhere*>(p) =
      (VecBits)__builtin_shufflevector(apart, apart, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9,
                                       25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#else
  *reinterpret_cast<VecBitsAnywhere*>(p) = rounded(x.first) >> 16 | (rounded(x.second) & 0xffff0000u);
#endif
}

// The first `count` lanes, 0 < count < lanes; the others are read as zero and never touched.
inline Vec load_first(const float* p, int count) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), p);
#else
  Vec x{};
  std::memcpy(&x, p, count * sizeof(float));
  return x;
#endif
}
template <class T>
inline Vec load_first(const T* p, int count) {
#if defined(__AVX512F__)
  return widen((VecHalf)_mm256_maskz_loadu_epi16((__mmask16)((1u << count) - 1), p), T{});
#else
  VecHalf bits{};
  std::memcpy(&bits, p, count * sizeof(T));
  return widen(bits, T{});
#endif
}
inline void store_first(float* p, Vec x, int count) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << count) - 1), (__m512)x);
#else
  std::memcpy(p, &x, count * sizeof(float));
#endif
}
template <class T>
inline void store_first(T* p, Vec x, int count) {
  const VecHalf bits = narrow(x, T{});
#if defined(__AVX512F__)
  _mm256_mask_storeu_epi16(p, (__mmask16)((1u << count) - 1), (__m256i)bits);
#else
  std::memcpy(p, &bits, count * sizeof(T));
#endif
}

// Call body(offset, load, store) over [0, count): whole vectors, then what is left of one.
struct Whole {
  template <class T> Vec get(const T* p) const { return load(p); }
  template <class T> void put(T* p, Vec x) const { store(p, x); }
};
struct First {
  int count;
  template <class T> Vec get(const T* p) const { return load_first(p, count); }
  template <class T> void put(T* p, Vec x) const { store_first(p, x, count); }
};
template <class Body>
inline void each_vector(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) body(i, Whole{});
  if (i < count) body(i, First{static_cast<int>(count - i)});
}

// Reductions. Of 16 lanes the upper 8 are folded onto the lower by hand: GCC makes scalar code of the loop below.
#if defined(__AVX512F__)
typedef float VecLower __attribute__((vector_size(32)));
inline constexpr int lower_lanes = 8;
inline VecLower lower(Vec x) { return __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7); }
inline VecLower upper(Vec x) { return __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15); }
#else
typedef Vec VecLower;
inline constexpr int lower_lanes = lanes;
#endif

inline float sum(Vec x) {
#if defined(__AVX512F__)
  VecLower y = lower(x) + upper(x);
#else
  VecLower y = x;
#endif
  for (int width = lower_lanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) y[i] += y[i + width];
  }
  return y[0];
}
inline float largest(Vec x) {
#if defined(__AVX512F__)
  VecLower y = lower(x) > upper(x) ? lower(x) : upper(x);
#else
  VecLower y = x;
#endif
  for (int width = lower_lanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) y[i] = y[i] > y[i + width] ? y[i] : y[i + width];
  }
  return y[0];
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline float to_float(half x) {
#if defined(__AVX2__)
  return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(x.bits)));
#else
  return load_first(&x, 1)[0];
#endif
}

// Call body(T{}) with the element type of a dtype.
template <class Body>
inline void with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::float32: return body(float{});
    case DType::bfloat16: return body(bf16{});
    case DType::float16: return body(half{});
  }
}

}  // namespace ff::FF_LEVEL
