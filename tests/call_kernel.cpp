// Calls a kernel of the scalar level on memory that comes through standard input and goes back through standard output:
// how kernels are run that were compiled for another processor.
//
// In: the kernel's place in FF_KERNELS, threads, the number of words and of blocks; (kind, value) of each word; (bytes,
// bytes beyond a cache line) of each block; then the blocks. Out: the blocks. All numbers are int64.
#include <array>
#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <tuple>
#include <type_traits>
#include <vector>

#include "kernels.h"
#include "levels.h"

namespace {

enum Kind : int64_t { integer, number, block };  // number: the bits of a double; block: which one

struct Word { int64_t kind, value; };
struct Block { int64_t bytes, beyond; };

template <class T>
std::vector<T> read(int64_t count) {
  std::vector<T> values(count);
  if (std::fread(values.data(), sizeof(T), count, stdin) != static_cast<size_t>(count)) std::abort();
  return values;
}

// The next argument: a structure takes a word for each of its members.
template <class T>
T take(const Word*& word) {
  if constexpr (std::is_class_v<T>) {
    std::array<int64_t, sizeof(T) / sizeof(int64_t)> members;
    for (int64_t& member : members) member = (word++)->value;
    return std::bit_cast<T>(members);
  } else if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<T>((word++)->value);
  } else if constexpr (std::is_floating_point_v<T>) {
    const Word given = *word++;
    return static_cast<T>(given.kind == number ? std::bit_cast<double>(given.value) : static_cast<double>(given.value));
  } else {
    return static_cast<T>((word++)->value);
  }
}

template <class... Args>
void call(void (*kernel)(int, Args...), int threads, const Word* word) {
  const std::tuple<Args...> args{take<Args>(word)...};  // braces: from the first to the last
  std::apply([&](Args... arg) { kernel(threads, arg...); }, args);
}

}  // namespace

int main() {
  const auto header = read<int64_t>(4);
  auto words = read<Word>(header[2]);
  const auto blocks = read<Block>(header[3]);
  std::vector<char*> memory;
  for (const Block& block : blocks) {
    const size_t size = (block.bytes + block.beyond + 63) / 64 * 64 + 64;
    memory.push_back(static_cast<char*>(std::aligned_alloc(64, size)) + block.beyond);
    if (std::fread(memory.back(), 1, block.bytes, stdin) != static_cast<size_t>(block.bytes)) std::abort();
  }
  for (Word& word : words) {
    if (word.kind == block) word.value = reinterpret_cast<int64_t>(memory[word.value]);
  }
  const ff::Kernels& kernels = ff::kernels_of(ff::best_level());
  int64_t place = 0;
#define FF_CALL(name) if (place++ == header[0]) call(kernels.name, static_cast<int>(header[1]), words.data());
  FF_KERNELS(FF_CALL)
  for (size_t i = 0; i < blocks.size(); ++i) std::fwrite(memory[i], 1, blocks[i].bytes, stdout);
}
