#include "text_label.h"

#include <bit>
#include <cstring>

namespace ff {

namespace {

constexpr uint64_t initial[8] = {0x6a09e667f3bcc908, 0xbb67ae8584caa73b, 0x3c6ef372fe94f82b, 0xa54ff53a5f1d36f1,
                                 0x510e527fade682d1, 0x9b05688c2b3e6c1f, 0x1f83d9abfb41bd6b, 0x5be0cd19137e2179};

// Which words of the block a round mixes in, in which order; rounds 10 and 11 are 0 and 1 again.
constexpr uint8_t order[10][16] = {
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
    {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4}, {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
    {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13}, {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
    {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11}, {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
    {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5}, {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0}};

constexpr int64_t block_size = 128;

inline void mix(uint64_t& a, uint64_t& b, uint64_t& c, uint64_t& d, uint64_t x, uint64_t y) {
  a += b + x;
  d = std::rotr(d ^ a, 32);
  c += d;
  b = std::rotr(b ^ c, 24);
  a += b + y;
  d = std::rotr(d ^ a, 16);
  c += d;
  b = std::rotr(b ^ c, 63);
}

uint64_t swapped(uint64_t x) { return __builtin_bswap64(x); }

uint64_t little_endian(uint64_t x) { return std::endian::native == std::endian::little ? x : swapped(x); }

// Take in one block, after which `taken` bytes are in.
void compress(uint64_t (&state)[8], const unsigned char* block, uint64_t taken, bool last) {
  uint64_t m[16], v[16];
  std::memcpy(m, block, block_size);
  for (uint64_t& word : m) word = little_endian(word);
  for (int i = 0; i < 8; ++i) {
    v[i] = state[i];
    v[i + 8] = initial[i];
  }
  v[12] ^= taken;
  if (last) v[14] = ~v[14];
  for (int round = 0; round < 12; ++round) {
    const uint8_t* s = order[round % 10];
    mix(v[0], v[4], v[8], v[12], m[s[0]], m[s[1]]);
    mix(v[1], v[5], v[9], v[13], m[s[2]], m[s[3]]);
    mix(v[2], v[6], v[10], v[14], m[s[4]], m[s[5]]);
    mix(v[3], v[7], v[11], v[15], m[s[6]], m[s[7]]);
    mix(v[0], v[5], v[10], v[15], m[s[8]], m[s[9]]);
    mix(v[1], v[6], v[11], v[12], m[s[10]], m[s[11]]);
    mix(v[2], v[7], v[8], v[13], m[s[12]], m[s[13]]);
    mix(v[3], v[4], v[9], v[14], m[s[14]], m[s[15]]);
  }
  for (int i = 0; i < 8; ++i) state[i] ^= v[i] ^ v[i + 8];
}

bool is_blank(unsigned char c) { return c == ' ' || (c >= 9 && c <= 13) || (c >= 28 && c <= 31); }

}  // namespace

int64_t label_of_bytes(const unsigned char* bytes, int64_t size) {
  uint64_t state[8];
  std::memcpy(state, initial, sizeof state);
  state[0] ^= 0x01010000 ^ 8;  // no key, a digest of 8 bytes
  int64_t taken = 0;
  for (; size - taken > block_size; taken += block_size) compress(state, bytes + taken, taken + block_size, false);
  unsigned char last[block_size] = {};
  if (size > taken) std::memcpy(last, bytes + taken, size - taken);
  compress(state, last, size, true);
  return static_cast<int64_t>(swapped(state[0]));  // the digest's bytes, read from the highest on
}

int64_t label_of_ascii(const unsigned char* text, int64_t size, std::string& plain) {
  plain.clear();
  for (int64_t i = 0; i < size; ++i) {
    const unsigned char c = text[i];
    if (!is_blank(c)) {
      plain.push_back(static_cast<char>(c >= 'A' && c <= 'Z' ? c + 32 : c));
    } else if (!plain.empty() && plain.back() != ' ') {
      plain.push_back(' ');
    }
  }
  if (!plain.empty() && plain.back() == ' ') plain.pop_back();
  return label_of_bytes(reinterpret_cast<const unsigned char*>(plain.data()), static_cast<int64_t>(plain.size()));
}

}  // namespace ff
