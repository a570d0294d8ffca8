// The instruction sets that the kernels are compiled for, and the choice among them at run time.
//
// Every file in level/ is compiled once for each of them, inside a namespace of that name, and fills one table of
// functions. Nothing else in this folder may use an instruction that the plainest processor lacks.
#pragma once

namespace ff {

struct Kernels;

enum class Level : int { scalar, avx2, avx512, avx512_bf16, amx };
inline constexpr int num_levels = 5;
inline constexpr const char* level_names[num_levels] = {"scalar", "avx2", "avx512", "avx512_bf16", "amx"};

// Whether the kernels of a level were built, and whether this processor and its operating system can run them.
bool level_is_built(Level level);
bool level_runs_here(Level level);

// The best level that was built and runs here.
Level best_level();

// The functions of one level, which must be built and run here.
const Kernels& kernels_of(Level level);

}  // namespace ff
