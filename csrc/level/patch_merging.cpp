// Swin's patch merging (arXiv 2103.14030, section 3.1) up to its product: four neighbours side by side, normalised.
//
// The 4C tensor is written once, normalised; its raw form never. Letters: B batch · H W map · C channels.
#include "norm.h"

namespace ff::FF_LEVEL {

namespace {

// Where the four neighbours of merged tokens lie in a map (B, H, W, C): first the two of the left column, then the
// others (Microsoft's order); beyond the end, a row of zeros.
template <class T>
struct Map {
  T* data;
  int64_t height, width, channels;
  T* beyond;

  Row<T, 4> row(int64_t merged) const {
    const int64_t columns = (width + 1) / 2, lines = (height + 1) / 2;
    const int64_t x = merged % columns * 2, y = merged / columns % lines * 2, image = merged / columns / lines;
    Row<T, 4> row;
    row.length = channels;
    for (int p = 0; p < 4; ++p) {
      const int64_t to_y = y + p % 2, to_x = x + p / 2;
      const bool inside = to_y < height && to_x < width;
      row.at[p] = inside ? data + ((image * height + to_y) * width + to_x) * channels : beyond;
    }
    return row;
  }
};

}  // namespace

void patch_merging_norm_fwd(int threads, DType dtype, int64_t first, int64_t rows, int64_t height, int64_t width,
                            int64_t channels, const void* x, const float* weight, const float* bias, float eps,
                            void* norm, float* mean, float* rstd) {
  with_type(dtype, [&]<class T>(T) {
    Scratch<T> zeros(channels);
    std::memset(zeros.data(), 0, channels * sizeof(T));
    const Map<const T> map{static_cast<const T*>(x), height, width, channels, zeros.data()};
    const RowOf<T> weights(weight, 1.0f, 4, channels), biases(bias, 0.0f, 4, channels);
    each_group<T>(threads, rows, 4 * channels, [=, w = weights.data(), b = biases.data()](int64_t row, int count) {
      Row<const T, 4> group[most_rows];
      for (int j = 0; j < count; ++j) group[j] = map.row(first + row + j);
      const auto pass_over = [&](int j) {
        const auto pieces = group[j];
        FirstPass<T> pass(to_float(pieces.at[0][0]));
        pieces.template each<takes_apart<T>>(
            [&](int p, int64_t i, int64_t, auto part) { pass.add(part.get(pieces.at[p] + i), part); });
        return pass;
      };
      const Moments moments = moments_of(count, group, pass_over, eps, mean + row, rstd + row);
      if (!norm) return;
      for (int j = 0; j < count; ++j) {
        normalise(group[j], moments, j, w, b, static_cast<T*>(norm) + (row + j) * 4 * channels);
      }
    });
  });
}

void patch_merging_norm_bwd(int threads, DType dtype, int64_t first, int64_t rows, int64_t height, int64_t width,
                            int64_t channels, const void* grad, const void* x, const float* weight, const float* mean,
                            const float* rstd, void* dx, float* d_weights) {
  with_type(dtype, [&]<class T>(T) {
    Scratch<T> zeros(channels);
    std::memset(zeros.data(), 0, channels * sizeof(T));
    const Map<const T> map{static_cast<const T*>(x), height, width, channels, zeros.data()};
    const Map<T> d_map{static_cast<T*>(dx), height, width, channels, nullptr};
    sum_over_groups<T>(threads, rows, 4 * channels, d_weights, [=](int64_t row, int count, float* sums) {
      Row<const T, 4> group[most_rows];
      Row<T, 4> d_group[most_rows] = {};
      for (int j = 0; j < count; ++j) {
        group[j] = map.row(first + row + j);
        if (dx) d_group[j] = d_map.row(first + row + j);
      }
      const T* grads = static_cast<const T*>(grad) + row * 4 * channels;
      norm_backward(count, group, grads, mean + row, rstd + row, weight, sums, dx != nullptr,
                    [&d_group](int j, int p, int64_t i, auto part, auto d) {
                      if (d_group[j].at[p]) part.put(d_group[j].at[p] + i, d);
                    });
    });
  });
}

}  // namespace ff::FF_LEVEL
