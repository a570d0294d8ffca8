// The table of this level: its functions, declared from the members that point to them.
#include <type_traits>

#include "../kernels.h"

namespace ff::FF_LEVEL {

#define FF_DECLARE(name) std::remove_pointer_t<decltype(Kernels::name)> name;
FF_KERNELS(FF_DECLARE)

#define FF_ENTER(name) .name = name,
extern const Kernels kernels;
const Kernels kernels = {FF_KERNELS(FF_ENTER)};

}  // namespace ff::FF_LEVEL
