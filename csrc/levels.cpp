#include "levels.h"

#include <new>
#include <stdexcept>
#include <string>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ff {

[[noreturn]] void out_of_memory();

namespace scalar { extern const Kernels kernels; }
#if defined(FF_X86)
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
namespace avx512_bf16 { extern const Kernels kernels; }
namespace amx { extern const Kernels kernels; }
#endif

[[noreturn]] void out_of_memory() { throw std::bad_alloc(); }

namespace {

const Kernels* const tables[num_levels] = {
    &scalar::kernels,
#if defined(FF_X86)
    &avx2::kernels, &avx512::kernels, &avx512_bf16::kernels, &amx::kernels,
#endif
};

#if defined(FF_X86)

// Tiles hold 8 KB a thread, so Linux gives them to a process only when it asks (arch_prctl, ARCH_REQ_XCOMP_PERM).
bool tiles_are_granted() {
#if defined(__linux__)
  constexpr long request_permission = 0x1023;
  constexpr long tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

bool processor_has_amx_bf16() {
#if defined(FF_EMULATE_AMX)
  return true;
#endif
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;
  return (d & amx_bf16) && (d & amx_tile) && tiles_are_granted();
}

bool processor_has_avx512_bf16() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned avx512_bf16 = 1u << 5;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & avx512_bf16);
}

bool detect(Level level) {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  switch (level) {
    case Level::scalar: return true;
    case Level::avx2: return avx2;
    case Level::avx512: return avx512;
    case Level::avx512_bf16: return avx512 && processor_has_avx512_bf16();
    case Level::amx: return avx512 && processor_has_avx512_bf16() && processor_has_amx_bf16();
  }
  return false;
}

#else

bool detect(Level level) { return level == Level::scalar; }

#endif

}  // namespace

bool level_is_built(Level level) { return tables[static_cast<int>(level)] != nullptr; }

bool level_runs_here(Level level) {
  static const bool runs[num_levels] = {
      detect(Level::scalar), detect(Level::avx2), detect(Level::avx512), detect(Level::avx512_bf16), detect(Level::amx),
  };
  return runs[static_cast<int>(level)];
}

Level best_level() {
  int best = 0;
  for (int i = 0; i < num_levels; ++i) {
    const Level level = static_cast<Level>(i);
    if (level_is_built(level) && level_runs_here(level)) best = i;
  }
  return static_cast<Level>(best);
}

const Kernels& kernels_of(Level level) {
  const int index = static_cast<int>(level);
  if (index < 0 || index >= num_levels) throw std::invalid_argument("no level has the number " + std::to_string(index));
  if (!level_is_built(level) || !level_runs_here(level)) {
    throw std::runtime_error(std::string("the level ") + level_names[index] + " does not run here");
  }
  return *tables[index];
}

}  // namespace ff
