// Arrays in and out; their types, shapes and limits were checked in Python.
#include "bind.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <vector>

#include "../parallel.h"
#include "area_means.h"
#include "near_duplicates.h"
#include "text_label.h"

namespace py = pybind11;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;
using Hashes = Array<uint64_t>;

// int64 (pairs, 3): first, second, distance; None if there were too many.
py::object rows_of(const std::vector<ff::Pair>& pairs, bool complete) {
  if (!complete) return py::none();
  Array<int64_t> rows({static_cast<py::ssize_t>(pairs.size()), py::ssize_t{3}});
  int64_t* at = rows.mutable_data();
  for (const ff::Pair& pair : pairs) {
    *at++ = pair.first;
    *at++ = pair.second;
    *at++ = pair.distance;
  }
  return rows;
}

py::object near_duplicates(int threads, const Hashes& hashes, int max_distance, int64_t max_pairs) {
  std::vector<ff::Pair> pairs;
  bool complete = false;
  {
    const py::gil_scoped_release unlocked;
    pairs = ff::near_duplicates(threads, hashes.data(), hashes.size(), max_distance, max_pairs, complete);
  }
  return rows_of(pairs, complete);
}

Array<int64_t> near_duplicate_groups(int threads, const Hashes& hashes, int max_distance) {
  Array<int64_t> labels(hashes.size());
  int64_t* out = labels.mutable_data();
  const py::gil_scoped_release unlocked;
  ff::near_duplicate_groups(threads, hashes.data(), hashes.size(), max_distance, out);
  return labels;
}

py::object near_matches(int threads, const Hashes& queries, const Hashes& hashes, int max_distance,
                        int64_t max_pairs) {
  std::vector<ff::Pair> pairs;
  bool complete = false;
  {
    const py::gil_scoped_release unlocked;
    pairs = ff::near_matches(threads, queries.data(), queries.size(), hashes.data(), hashes.size(), max_distance,
                             max_pairs, complete);
  }
  return rows_of(pairs, complete);
}

// uint8 (images, rows, columns) of images (H, W) or (H, W, 3), whose sizes may differ.
Array<uint8_t> area_means(int threads, const std::vector<Array<uint8_t>>& images, int rows, int columns) {
  const auto count = static_cast<int64_t>(images.size());
  Array<uint8_t> cells({static_cast<py::ssize_t>(count), py::ssize_t{rows}, py::ssize_t{columns}});
  uint8_t* out = cells.mutable_data();
  const py::gil_scoped_release unlocked;
  ff::parallel(threads, count, [&](int64_t i) {
    const auto& image = images[i];
    ff::area_means(image.data(), image.shape(0), image.shape(1), image.ndim() == 3 ? 3 : 1, rows, columns,
                   out + i * rows * columns);
  });
  return cells;
}

// int64 labels of texts; `normalised` gives the bytes to hash of one that is not ASCII.
Array<int64_t> text_labels(int threads, const py::tuple& texts, const py::function& normalised) {
  struct Text {
    const unsigned char* bytes;
    int64_t size;
    bool ascii;
  };
  std::vector<Text> found;
  std::vector<py::bytes> kept;
  found.reserve(texts.size());
  for (const py::handle text : texts) {
    if (PyUnicode_Check(text.ptr()) && PyUnicode_IS_ASCII(text.ptr())) {
      const auto* bytes = static_cast<const unsigned char*>(PyUnicode_DATA(text.ptr()));
      found.push_back({bytes, static_cast<int64_t>(PyUnicode_GET_LENGTH(text.ptr())), true});
    } else {
      kept.emplace_back(normalised(text));
      const PyObject* bytes = kept.back().ptr();
      const auto* data = reinterpret_cast<const unsigned char*>(PyBytes_AS_STRING(bytes));
      found.push_back({data, static_cast<int64_t>(PyBytes_GET_SIZE(bytes)), false});
    }
  }
  const auto count = static_cast<int64_t>(found.size());
  Array<int64_t> labels(count);
  int64_t* out = labels.mutable_data();
  const py::gil_scoped_release unlocked;
  constexpr int64_t step = 4096;
  ff::parallel(threads, (count + step - 1) / step, [&](int64_t task) {
    std::string plain;
    for (int64_t i = task * step; i < std::min(count, task * step + step); ++i) {
      const Text& text = found[i];
      out[i] = text.ascii ? ff::label_of_ascii(text.bytes, text.size, plain)
                          : ff::label_of_bytes(text.bytes, text.size);
    }
  });
  return labels;
}

}  // namespace

void bind_host(py::module_& module) {
  module.def("near_duplicates", near_duplicates);
  module.def("near_duplicate_groups", near_duplicate_groups);
  module.def("near_matches", near_matches);
  module.def("area_means", area_means);
  module.def("text_labels", text_labels);
}
