// Shifted-window attention: one window and head at a time, scores and probabilities never leaving the cache.
//
// Read once: qkv; written once: out. Shift, windows, pads and mask are indices. The letters are in window_tiles.h.
#include <type_traits>

#include "window_tiles.h"

namespace ff::FF_LEVEL {

namespace {

template <class T, class Unit>
class Forward {
 public:
  Forward(const WindowGeometry& geometry, float scale, const WindowExtras& extras, const WindowMap& map,
          const ExpandedBias& bias, const T* qkv, T* out)
      : g_(geometry), scale_(scale), extras_(extras), map_(map), bias_(bias), qkv_(qkv), out_(out),
        channels_(geometry.heads * geometry.head_dim), s_(map.tokens(), geometry.head_dim), rows_(s_.n),
        regions_(s_.columns), pointers_(s_.n, 3 * channels_, extras.qkv_bias), q_(s_.rows_size()),
        k_(extras.logit_scale ? s_.rows_size() : 0), k_transposed_(s_.transposed_size()), v_(s_.paired_size()),
        scores_(query_block * s_.columns), probabilities_(query_block * s_.columns / values_of<Unit>),
        inverses_(s_.columns + query_block), mixed_(query_block * s_.width) {
    std::memset(regions_.data() + s_.n, 0xff, (s_.columns - s_.n) * sizeof(int32_t));
  }

  void window(int64_t index, int64_t first_head, int64_t last_head) {
    const bool several_regions = map_.locate(index, rows_.data(), regions_.data());
    pointers_.point(qkv_, 3 * channels_, rows_.data());
    for (int64_t head = first_head; head < last_head; ++head) {
      load_head(head);
      for (int64_t i = 0; i < s_.n; i += query_block) {
        const int64_t count = s_.n - i < query_block ? s_.n - i : query_block;
        queries(head, i, count, several_regions);
      }
    }
  }

 private:
  void load_head(int64_t head) {
    const int64_t column = head * g_.head_dim;
    gather(pointers_, column, s_, 0, s_.n, q_.data());
    gather_paired(pointers_, 2 * channels_ + column, s_, 0, s_.n, v_.data());
    if constexpr (values_of<Unit> == 1) {
      if (extras_.logit_scale) {
        float* lengths = inverses_.data();  // of no use here
        normalise_rows(q_.data(), s_, lengths);
        gather(pointers_, channels_ + column, s_, 0, s_.n, k_.data());
        normalise_rows(k_.data(), s_, lengths);
        transpose_rows(k_.data(), s_, k_transposed_.data());
        return;
      }
    }
    gather_transposed(pointers_, channels_ + column, s_, k_transposed_.data());
  }

  void queries(int64_t head, int64_t first, int64_t count, bool several_regions) {
    using Probability = std::conditional_t<values_of<Unit> == 2, bf16, float>;
    constexpr Accuracy accuracy = sizeof(T) == sizeof(float) ? Accuracy::float32 : Accuracy::bfloat16;
    const float scale = extras_.logit_scale ? extras_.logit_scale[head] : scale_;
    float* scores = scores_.data();
    product(count, s_.columns, s_.depth, Left<Unit>{q_.data() + first * s_.row_units, s_.row_units, 1},
            k_transposed_.data(), s_.columns, scores, s_.columns);
    const int32_t* regions = several_regions ? regions_.data() : nullptr;
    Probability* probabilities = reinterpret_cast<Probability*>(probabilities_.data());
    for (int64_t i = 0; i < count; i += lanes) {
      const int rows = static_cast<int>(count - i < lanes ? count - i : lanes);
      const Vec sums = exponentials<accuracy>(rows, scores + i * s_.columns, scale, bias_.row(head, first + i), s_.columns,
                                              regions, regions_.data() + first + i, probabilities + i * s_.columns);
      store(inverses_.data() + i, 1.0f / sums);
    }
    product(count, s_.width, s_.pairs, Left<Unit>{probabilities_.data(), s_.columns / values_of<Unit>, 1}, v_.data(),
            s_.width, mixed_.data(), s_.width);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = rows_.data()[first + i];
      if (row < 0) continue;
      const float inverse = inverses_.data()[i];
      T* to = out_ + (row * g_.heads + head) * g_.head_dim;
      const float* from = mixed_.data() + i * s_.width;
      each_vector(s_.d, [&](int64_t c, auto part) { part.put(to + c, load(from + c) * inverse); });
    }
  }

  TileScope tiles_;
  const WindowGeometry& g_;
  const float scale_;
  const WindowExtras& extras_;
  const WindowMap& map_;
  const ExpandedBias& bias_;
  const T* qkv_;
  T* out_;
  const int64_t channels_;
  const TileSizes<Unit> s_;
  Scratch<int64_t> rows_;
  Scratch<int32_t> regions_;
  RowPointers<T> pointers_;
  Scratch<Unit> q_, k_, k_transposed_, v_;
  Scratch<float> scores_;
  Scratch<Unit> probabilities_;
  Scratch<float> inverses_, mixed_;
};

}  // namespace

void window_attention_fwd(int threads, DType dtype, WindowGeometry geometry, float scale, const void* qkv,
                          WindowExtras extras, void* out) {
  const WindowMap map(geometry);
  ExpandedBias bias(threads, map, geometry, extras);
  // A task takes a run of windows with all their heads, which read the same rows; few windows are split by head too.
  const int64_t windows = map.windows(), wanted = 8 * threads;
  const int64_t runs = windows < wanted ? windows : wanted;
  const int64_t groups = runs * 2 > wanted ? 1 : geometry.heads < wanted / runs ? geometry.heads : wanted / runs;
  with_type(dtype, [&]<class T>(T) {
    const auto run = [&]<class Unit>(Unit) {
      parallel(threads, runs * groups, [&](int64_t task) {
        const int64_t group = task % groups, part = task / groups;
        Forward<T, Unit> forward(geometry, scale, extras, map, bias, static_cast<const T*>(qkv), static_cast<T*>(out));
        for (int64_t w = part_begin(windows, runs, part); w < part_begin(windows, runs, part + 1); ++w) {
          forward.window(w, part_begin(geometry.heads, groups, group), part_begin(geometry.heads, groups, group + 1));
        }
      });
    };
    with_unit<T>(extras, run);
  });
}

}  // namespace ff::FF_LEVEL
