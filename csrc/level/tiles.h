// AMX: tiles of 16 rows by 64 bytes, and the product of a tile of pairs with another. Only where a level has them.
//
// A processor with AMX is rare where tests run; built with FF_EMULATE_AMX the same code computes with the stand-in
// below, slowly, on any processor with AVX-512 and bf16.
#pragma once

#include "vec.h"

#if defined(FF_EMULATE_AMX) && defined(FF_LEVEL_IS_AMX)
#define FF_EMULATE_TILES 1
#endif

#if defined(__AMX_BF16__) || defined(FF_EMULATE_TILES)
#define FF_HAS_TILES 1

namespace ff::FF_LEVEL {

inline constexpr int tile_rows = 16, tile_units = 16;

#if defined(FF_EMULATE_TILES)

struct Tile { uint32_t units[tile_rows][tile_units]; };
inline thread_local Tile tiles[8];

template <int t>
inline void tile_zero() { std::memset(&tiles[t], 0, sizeof(Tile)); }
template <int t>
inline void tile_load(const void* from, int64_t stride) {
  for (int r = 0; r < tile_rows; ++r) std::memcpy(tiles[t].units[r], static_cast<const uint32_t*>(from) + r * stride, 64);
}
template <int t>
inline void tile_store(void* to, int64_t stride) {
  for (int r = 0; r < tile_rows; ++r) std::memcpy(static_cast<uint32_t*>(to) + r * stride, tiles[t].units[r], 64);
}
template <int c, int a, int b>
inline void tile_multiply() {
  for (int m = 0; m < tile_rows; ++m) {
    Vec sum = load_raw<Vec>(tiles[c].units[m]);
    for (int k = 0; k < tile_units; ++k) {
      const VecBits left = VecBits{} + tiles[a].units[m][k], right = load_raw<VecBits>(tiles[b].units[k]);
      sum += as_float(left << 16) * as_float(right << 16);
      sum += as_float(left & 0xffff0000u) * as_float(right & 0xffff0000u);
    }
    std::memcpy(tiles[c].units[m], &sum, sizeof sum);
  }
}
struct TileScope {};

#else

// In assembly because GCC's intrinsics paste their argument into the name of the register, where a constant must be.
template <int t>
inline void tile_zero() { asm volatile("tilezero %%tmm%c0" : : "i"(t)); }
template <int t>
inline void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(t), "r"(from), "r"(stride * 4) : "memory");
}
template <int t>
inline void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(t), "r"(to), "r"(stride * 4) : "memory");
}
template <int c, int a, int b>
inline void tile_multiply() { asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b)); }

// While it lives, this thread has eight whole tiles.
struct TileScope {
  TileScope() {
    struct alignas(64) { uint8_t palette = 1, start = 0, reserved[14] = {}; uint16_t bytes[16] = {}; uint8_t rows[16] = {}; } config;
    for (int t = 0; t < 8; ++t) config.bytes[t] = 64, config.rows[t] = tile_rows;
    _tile_loadconfig(&config);
  }
  ~TileScope() { _tile_release(); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

#endif

}  // namespace ff::FF_LEVEL

#else

namespace ff::FF_LEVEL {
struct TileScope {};
}  // namespace ff::FF_LEVEL

#endif
