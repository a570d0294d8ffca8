// Memory for the length of a call, and sums of partial results in a fixed order.
#pragma once

#include <cstdlib>

#include "../parallel.h"
#include "vec.h"

namespace ff {

[[noreturn]] void out_of_memory();  // std::bad_alloc, thrown where no vector instruction is compiled in

}  // namespace ff

namespace ff::FF_LEVEL {

// Memory for one call, aligned to a cache line and not initialised.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : data_(count > 0 ? allocate(count * static_cast<int64_t>(sizeof(T))) : nullptr) {}
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* data() { return static_cast<T*>(data_); }
  const T* get() const { return static_cast<const T*>(data_); }

 private:
  static void* allocate(int64_t bytes) {
    void* memory = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!memory) out_of_memory();
    return memory;
  }
  void* data_;
};

// total[i] = partial[0][i] + partial[1][i] + ..., always in this order.
inline void add_partials(int threads, int64_t parts, int64_t count, const float* partial, float* total) {
  constexpr int64_t step = 4096;
  parallel(threads, (count + step - 1) / step, [&](int64_t task) {
    const int64_t begin = task * step, length = count - begin < step ? count - begin : step;
    each_vector(length, [&](int64_t i, auto part) {
      Vec sum{};
      for (int64_t p = 0; p < parts; ++p) sum += part.get(partial + p * count + begin + i);
      part.put(total + begin + i, sum);
    });
  });
}

}  // namespace ff::FF_LEVEL
