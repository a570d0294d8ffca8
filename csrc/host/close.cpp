// A block is compared without a branch, so that the compiler may use vectors; a block with a hit is looked through.
#include "close.h"

namespace ff {

namespace {

// Bits set in x, without an instruction for it: pairs, nibbles and bytes added side by side.
struct Portable {
  static int count(uint64_t x) {
    x -= x >> 1 & 0x5555555555555555;
    x = (x & 0x3333333333333333) + (x >> 2 & 0x3333333333333333);
    x = (x + (x >> 4)) & 0x0f0f0f0f0f0f0f0f;
    return static_cast<int>(x * 0x0101010101010101 >> 56);
  }
};
struct BuiltIn {
  static inline __attribute__((always_inline)) int count(uint64_t x) { return __builtin_popcountll(x); }
};

template <class Bits>
inline __attribute__((always_inline)) int64_t search(const uint64_t* values, int64_t begin, int64_t end,
                                                     uint64_t value, int max_distance) {
  constexpr int64_t block = 32;
  int64_t i = begin;
  for (; i + block <= end; i += block) {
    int close = 0;
    for (int64_t j = 0; j < block; ++j) close |= Bits::count(values[i + j] ^ value) <= max_distance;
    if (close) break;
  }
  while (i < end && Bits::count(values[i] ^ value) > max_distance) ++i;
  return i;
}

int64_t portable(const uint64_t* values, int64_t begin, int64_t end, uint64_t value, int max_distance) {
  return search<Portable>(values, begin, end, value, max_distance);
}

#if defined(FF_X86)
__attribute__((target("popcnt"))) int64_t popcnt(const uint64_t* values, int64_t begin, int64_t end, uint64_t value,
                                                 int max_distance) {
  return search<BuiltIn>(values, begin, end, value, max_distance);
}

// Whole vectors, which Clang asks for by another name.
#if defined(__clang__)
__attribute__((target("avx512f,avx512vl,avx512vpopcntdq"), min_vector_width(512)))
#else
__attribute__((target("avx512f,avx512vl,avx512vpopcntdq,prefer-vector-width=512")))
#endif
int64_t vpopcnt(const uint64_t* values, int64_t begin, int64_t end, uint64_t value, int max_distance) {
  return search<BuiltIn>(values, begin, end, value, max_distance);
}
#endif

}  // namespace

NextClose next_close() {
#if defined(FF_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vpopcntdq")) return vpopcnt;
  if (__builtin_cpu_supports("popcnt")) return popcnt;
#endif
  return portable;
}

}  // namespace ff
