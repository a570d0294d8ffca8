// florence_fast._C: the kernels of every level under Python's names, addresses passed as integers.
//
// A kernel `f(threads, ...)` becomes `f(level, threads, ...)`. Arguments were checked in Python; nothing is checked
// again here except in debug builds. The interpreter lock is free while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <bit>
#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#include "host/bind.h"
#include "kernels.h"
#include "levels.h"

namespace py = pybind11;

namespace {

// How an argument travels: pointers as addresses, enumerations as integers, structures of eight-byte members as lists
// of integers, the rest as it is.
template <class T>
auto wire_type() {
  if constexpr (std::is_pointer_v<T>) {
    return std::uintptr_t{};
  } else if constexpr (std::is_class_v<T>) {
    static_assert(std::is_trivially_copyable_v<T> && sizeof(T) % sizeof(std::int64_t) == 0);
    return std::array<std::int64_t, sizeof(T) / sizeof(std::int64_t)>{};
  } else if constexpr (std::is_enum_v<T>) {
    return int{};
  } else {
    return T{};
  }
}
template <class T>
using Wire = decltype(wire_type<T>());

template <class T>
T from_wire(Wire<T> value) {
  if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<T>(value);
  } else if constexpr (std::is_class_v<T>) {
    return std::bit_cast<T>(value);
  } else {
    return static_cast<T>(value);
  }
}

template <class... Args>
void bind(py::module_& module, const char* name, void (*ff::Kernels::*kernel)(Args...)) {
  module.def(
      name,
      [kernel](int level, Wire<Args>... args) { (ff::kernels_of(static_cast<ff::Level>(level)).*kernel)(from_wire<Args>(args)...); },
      py::call_guard<py::gil_scoped_release>());
}

std::vector<std::string> levels() {
  std::vector<std::string> names;
  for (int i = 0; i < ff::num_levels; ++i) {
    const auto level = static_cast<ff::Level>(i);
    names.emplace_back(ff::level_is_built(level) && ff::level_runs_here(level) ? ff::level_names[i] : "");
  }
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "The native kernels of florence_fast; Python reaches them through florence_fast.native.";
  module.def("levels", levels, "Names of the levels by number, empty for one that does not run here.");
#define FF_BIND(name) bind(module, #name, &ff::Kernels::name);
  FF_KERNELS(FF_BIND)
  bind_host(module);
}
