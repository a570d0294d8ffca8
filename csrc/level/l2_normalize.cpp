// Rows divided by their Euclidean length, which is kept for the backward, in float.
#include "norm.h"

namespace ff::FF_LEVEL {

void l2_normalize_fwd(int threads, DType dtype, int64_t rows, int64_t columns, const void* x, float eps, void* out,
                      float* length) {
  with_type(dtype, [&]<class T>(T) {
    each_group<T>(threads, rows, columns, [=](int64_t first, int count) {
      for (int64_t row = first; row < first + count; ++row) {
        const T* in = static_cast<const T*>(x) + row * columns;
        T* to = static_cast<T*>(out) + row * columns;
        Sums squares;
        const Row<const T, 1> pieces{{in}, columns};
        pieces.each([&](int, int64_t i, int64_t, auto part) {
          const auto value = part.get(in + i);
          squares.add(value * value);
        });
        const float norm = length[row] = __builtin_sqrtf(squares.total());
        const float factor = 1.0f / (norm < eps ? eps : norm);  // a NaN stays one
        pieces.each([&](int, int64_t i, int64_t, auto part) { part.put(to + i, part.get(in + i) * factor); });
      }
    });
  });
}

void l2_normalize_bwd(int threads, DType dtype, int64_t rows, int64_t columns, const void* grad_out, const void* x,
                      const float* length, float eps, void* dx) {
  with_type(dtype, [&]<class T>(T) {
    each_group<T>(threads, rows, columns, [=](int64_t first, int count) {
      for (int64_t row = first; row < first + count; ++row) {
        const T* in = static_cast<const T*>(x) + row * columns;
        const T* grad = static_cast<const T*>(grad_out) + row * columns;
        T* to = static_cast<T*>(dx) + row * columns;
        const float factor = 1.0f / (length[row] < eps ? eps : length[row]);
        Sums products;
        const Row<const T, 1> pieces{{in}, columns};
        pieces.each([&](int, int64_t i, int64_t, auto part) {
          products.add(part.get(grad + i) * (part.get(in + i) * factor));
        });
        // A row shorter than eps is divided by a constant.
        const float along = length[row] < eps ? 0.0f : products.total();
        pieces.each([&](int, int64_t i, int64_t, auto part) {
          part.put(to + i, (part.get(grad + i) - part.get(in + i) * factor * along) * factor);
        });
      }
    });
  });
}

}  // namespace ff::FF_LEVEL
