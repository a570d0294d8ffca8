// The backward of shifted-window attention: probabilities computed again, every gradient of a window in cache.
//
// With P the probabilities and G the gradient of out: dV = P^T G, dP = G V^T, dS = P (dP - rowsum(P dP)),
// dQ = scale dS K, dK = scale dS^T Q, and the bias gets the sum of dS over windows. A token belongs to one window, so
// d_qkv is written once; what windows share is summed by runs of windows, whose number depends on sizes alone.
#include "window_tiles.h"

namespace ff::FF_LEVEL {

namespace {

// What the windows of one run add up, zero at first; null where nobody asks for it.
struct Shared {
  float *scores, *qkv_bias, *logit_scale;  // (heads, n, columns), (3, heads, d), (heads,)
};

template <class T, class Unit>
class Backward {
 public:
  Backward(const WindowGeometry& geometry, float scale, const WindowExtras& extras, const WindowMap& map,
           const ExpandedBias& bias, const T* grad_out, const T* qkv, T* d_qkv, Shared shared)
      : g_(geometry), scale_(scale), extras_(extras), map_(map), bias_(bias), grad_out_(grad_out), qkv_(qkv),
        d_qkv_(d_qkv), shared_(shared), needs_dv_(d_qkv || shared.qkv_bias),
        needs_products_(needs_dv_ || shared.logit_scale), channels_(geometry.heads * geometry.head_dim),
        s_(map.tokens(), geometry.head_dim), rows_(s_.n), regions_(s_.columns),
        pointers_(s_.n, 3 * channels_, extras.qkv_bias), grad_pointers_(s_.n, channels_, nullptr),
        q_(s_.rows_size()), q_paired_(s_.paired_size()),
        k_paired_(s_.paired_size()), k_transposed_(s_.transposed_size()), v_transposed_(s_.transposed_size()),
        grad_(query_block * s_.row_units), grad_paired_(query_block * s_.width), p_(query_block * s_.columns),
        ds_(query_block * s_.columns), p_paired_(pair_memory()), ds_units_(pair_memory()), ds_paired_(pair_memory()),
        dq_(s_.n * s_.width), dk_(s_.n * s_.width), dv_(s_.n * s_.width), q_inverse_(s_.n), k_inverse_(s_.n) {
    std::memset(regions_.data() + s_.n, 0xff, (s_.columns - s_.n) * sizeof(int32_t));
  }

  void window(int64_t index, int64_t first_head, int64_t last_head) {
    several_regions_ = map_.locate(index, rows_.data(), regions_.data());
    pointers_.point(qkv_, 3 * channels_, rows_.data());
    grad_pointers_.point(grad_out_, channels_, rows_.data());
    for (int64_t head = first_head; head < last_head; ++head) {
      load_head(head);
      for (int64_t i = 0; i < s_.n; i += query_block) {
        const int64_t count = s_.n - i < query_block ? s_.n - i : query_block;
        through_softmax(head, i, count);
        if (i == 0) {
          through_products<false>(i, count);
        } else {
          through_products<true>(i, count);
        }
      }
      store_head(head);
    }
  }

 private:
  static constexpr bool in_pairs = values_of<Unit> == 2;
  static constexpr Accuracy accuracy = sizeof(T) == sizeof(float) ? Accuracy::float32 : Accuracy::bfloat16;

  int64_t pair_memory() const { return in_pairs ? query_block * s_.columns / 2 : 0; }

  void load_head(int64_t head) {
    const int64_t q = head * g_.head_dim, k = channels_ + q, v = 2 * channels_ + q;
    gather(pointers_, q, s_, 0, s_.n, q_.data());
    gather_transposed(pointers_, v, s_, v_transposed_.data());
    if constexpr (in_pairs) {
      if (needs_products_) {
        gather_paired(pointers_, q, s_, 0, s_.n, q_paired_.data());
        gather_paired(pointers_, k, s_, 0, s_.n, k_paired_.data());
      }
    } else {
      if (needs_products_ || extras_.logit_scale) gather(pointers_, k, s_, 0, s_.n, k_paired_.data());
      if (extras_.logit_scale) {
        normalise_rows(q_.data(), s_, q_inverse_.data());
        normalise_rows(k_paired_.data(), s_, k_inverse_.data());
        transpose_rows(k_paired_.data(), s_, k_transposed_.data());
        return;
      }
    }
    gather_transposed(pointers_, k, s_, k_transposed_.data());
  }

  // P and dS of `count` queries, in the forms that the products read.
  void through_softmax(int64_t head, int64_t first, int64_t count) {
    const float scale = factor(head);
    const int32_t* regions = several_regions_ ? regions_.data() : nullptr;
    product(count, s_.columns, s_.depth, Left<Unit>{q_.data() + first * s_.row_units, s_.row_units, 1},
            k_transposed_.data(), s_.columns, p_.data(), s_.columns);
    gather(grad_pointers_, head * g_.head_dim, s_, first, count, grad_.data());
    if (needs_dv_) gather_paired(grad_pointers_, head * g_.head_dim, s_, first, count, grad_paired_.data());
    product(count, s_.columns, s_.depth, Left<Unit>{grad_.data(), s_.row_units, 1}, v_transposed_.data(), s_.columns,
            ds_.data(), s_.columns);
    for (int64_t i = 0; i < count; i += lanes) {
      const int rows = static_cast<int>(count - i < lanes ? count - i : lanes);
      float *p = p_.data() + i * s_.columns, *ds = ds_.data() + i * s_.columns;
      const Vec sums = exponentials<accuracy>(rows, p, scale, bias_.row(head, first + i), s_.columns, regions,
                                              regions_.data() + first + i, p);
      const Vec inverse = 1.0f / sums;
      Vec partial[lanes] = {};
      for (int r = 0; r < rows; ++r) {
        for (int64_t j = r * s_.columns; j < (r + 1) * s_.columns; j += lanes) {
          const Vec value = load(p + j) * inverse[r];
          store(p + j, value);
          partial[r] += value * load(ds + j);
        }
      }
      float mean[lanes];
      store(mean, sums_of_rows(partial));
      float* sum = shared_.scores ? shared_.scores + (head * s_.n + first + i) * s_.columns : nullptr;
      for (int r = 0; r < rows; r += 2) {
        const int64_t row = (i + r) * s_.columns;
        if (r + 1 < rows) {
          finish_rows<2>(row, mean + r, sum ? sum + r * s_.columns : nullptr);
        } else {
          finish_rows<1>(row, mean + r, sum ? sum + r * s_.columns : nullptr);
        }
      }
    }
  }

  // dS of one row or of two, from P and dP at `offset`; added to the sum over windows, and turned into units
  // if a product reads them.
  template <int rows>
  void finish_rows(int64_t offset, const float* mean, float* sum) {
    if constexpr (in_pairs) {
      if (needs_products_) return finish_rows<rows, true>(offset, mean, sum);
    }
    finish_rows<rows, false>(offset, mean, sum);
  }
  template <int rows, bool in_units>
  void finish_rows(int64_t offset, const float* mean, float* sum) {
    for (int64_t j = 0; j < s_.columns; j += lanes) {
      Vec p[rows], ds[rows];
      for (int r = 0; r < rows; ++r) {
        const int64_t at = offset + r * s_.columns + j;
        p[r] = load(p_.data() + at);
        ds[r] = p[r] * (load(ds_.data() + at) - mean[r]);
        if (sum) store(sum + r * s_.columns + j, load(sum + r * s_.columns + j) + ds[r]);
        if constexpr (in_units) {
          store(reinterpret_cast<bf16*>(ds_units_.data()) + at, ds[r]);
        } else {
          // Also where nobody reads it: a product that is used once melts into the sum above, to other bits.
          store(ds_.data() + at, ds[r]);
        }
      }
      if constexpr (in_units) {
        store_zipped(p, p_paired_.data() + offset / 2 + j);
        store_zipped(ds, ds_paired_.data() + offset / 2 + j);
      }
    }
  }

  // Unit j holds lane j of the two rows; zero stands for a second row that is not there.
  template <int rows>
  static void store_zipped(const Vec (&values)[rows], Unit* to) {
    VecBits pair = extend(narrow(values[0], bf16{}));
    if constexpr (rows == 2) pair |= extend(narrow(values[1], bf16{})) << 16;
    std::memcpy(to, &pair, sizeof pair);
  }

  // dq of these queries, and what they add to dk and dv.
  template <bool accumulate>
  void through_products(int64_t first, int64_t count) {
    if (!needs_products_) return;
    const Unit *p, *ds, *ds_down, *q_right;
    if constexpr (in_pairs) {
      p = p_paired_.data(), ds = ds_units_.data(), ds_down = ds_paired_.data(), q_right = q_paired_.data();
    } else {
      p = p_.data(), ds = ds_down = ds_.data(), q_right = q_.data();
    }
    const int64_t depth = units<Unit>(count), stride = s_.columns / values_of<Unit>;
    if (needs_dv_) {
      product<accumulate>(s_.n, s_.width, depth, Left<Unit>{p, 1, s_.columns}, grad_paired_.data(), s_.width,
                          dv_.data(), s_.width);
    }
    product(count, s_.width, s_.pairs, Left<Unit>{ds, stride, 1}, k_paired_.data(), s_.width,
            dq_.data() + first * s_.width, s_.width);
    product<accumulate>(s_.n, s_.width, depth, Left<Unit>{ds_down, 1, s_.columns},
                        q_right + first / values_of<Unit> * s_.width, s_.width, dk_.data(), s_.width);
  }

  void store_head(int64_t head) {
    if (!needs_products_) return;
    const float scale = factor(head);
    float along = 0.0f;
    for (int64_t i = 0; i < s_.n; ++i) {
      float *dq = dq_.data() + i * s_.width, *dk = dk_.data() + i * s_.width;
      if constexpr (!in_pairs) {
        if (extras_.logit_scale) {
          along += scale * through_length(dq, q_.data() + i * s_.width, q_inverse_.data()[i]);
          through_length(dk, k_paired_.data() + i * s_.width, k_inverse_.data()[i]);
        }
      }
      put(0, head, i, dq, scale);
      put(1, head, i, dk, scale);
      put(2, head, i, dv_.data() + i * s_.width, 1.0f);
    }
    if (shared_.logit_scale) shared_.logit_scale[head] += along;
  }

  // The gradient of a row from that of the row over its length, in place; returns its part along the row.
  float through_length(float* d_row, const float* row, float inverse) const {
    Vec products{};
    for (int64_t c = 0; c < s_.width; c += lanes) products += load(d_row + c) * load(row + c);
    const float along = sum(products);
    for (int64_t c = 0; c < s_.width; c += lanes) store(d_row + c, (load(d_row + c) - load(row + c) * along) * inverse);
    return along;
  }

  // A row of the gradient of q, k or v (part 0, 1, 2): to its token, or to the bias that a pad is made of.
  void put(int64_t part, int64_t head, int64_t i, const float* from, float scale) {
    const int64_t row = rows_.data()[i], column = part * channels_ + head * g_.head_dim;
    if (row >= 0) {
      if (!d_qkv_) return;
      T* to = d_qkv_ + row * 3 * channels_ + column;
      each_vector(s_.d, [&](int64_t c, auto some) { some.put(to + c, load(from + c) * scale); });
    } else if (shared_.qkv_bias) {
      float* to = shared_.qkv_bias + column;
      each_vector(s_.d, [&](int64_t c, auto some) { some.put(to + c, some.get(to + c) + load(from + c) * scale); });
    }
  }

  float factor(int64_t head) const { return extras_.logit_scale ? extras_.logit_scale[head] : scale_; }

  TileScope tiles_;
  const WindowGeometry& g_;
  const float scale_;
  const WindowExtras& extras_;
  const WindowMap& map_;
  const ExpandedBias& bias_;
  const T *grad_out_, *qkv_;
  T* d_qkv_;
  const Shared shared_;
  const bool needs_dv_, needs_products_;
  const int64_t channels_;
  const TileSizes<Unit> s_;
  Scratch<int64_t> rows_;
  Scratch<int32_t> regions_;
  RowPointers<T> pointers_, grad_pointers_;
  Scratch<Unit> q_, q_paired_, k_paired_, k_transposed_, v_transposed_, grad_, grad_paired_;
  Scratch<float> p_, ds_;
  Scratch<Unit> p_paired_, ds_units_, ds_paired_;
  Scratch<float> dq_, dk_, dv_, q_inverse_, k_inverse_;
  bool several_regions_ = false;
};

// How many runs of windows are summed apart: enough for many cores, as long as their sums stay small beside the work.
int64_t number_of_runs(int64_t windows, int64_t sum_length) {
  constexpr int64_t most = 32, windows_of_a_run = 16, floats = int64_t{1} << 23;
  int64_t runs = windows / windows_of_a_run;
  runs = runs < most ? runs : most;
  if (sum_length && runs > floats / sum_length) runs = floats / sum_length;
  return runs < 1 ? 1 : runs;
}

// The gradient of the table, or of the whole bias, from that of the expanded one.
void fold(int threads, const WindowMap& map, int64_t heads, const float* d_expanded, int64_t columns,
          WindowExtrasGradients gradients) {
  const int64_t n = map.tokens(), full = map.full_tokens(), offsets = map.offsets();
  Scratch<float> turned(gradients.table ? heads * offsets : 0);
  Scratch<int64_t> codes(n);
  for (int64_t i = 0; i < n; ++i) codes.data()[i] = gradients.table ? map.code(i) : map.corner(i);
  const int64_t* code = codes.data();
  parallel(threads, heads, [&](int64_t head) {
    float* line = gradients.table ? turned.data() + head * offsets : nullptr;
    for (int64_t k = 0; line && k < offsets; ++k) line[k] = 0.0f;
    for (int64_t i = 0; i < n; ++i) {
      const float* row = d_expanded + (head * n + i) * columns;
      float* neighbours = line ? line + map.same() - code[i] : gradients.bias + (head * full + code[i]) * full;
      map.each_line([&](int64_t j, int64_t length) {
        float* to = neighbours + code[j];
        each_vector(length, [&](int64_t x, auto part) { part.put(to + x, part.get(to + x) + part.get(row + j + x)); });
      });
    }
    for (int64_t k = 0; line && k < offsets; ++k) gradients.table[(offsets - 1 - k) * heads + head] = line[k];
  });
}

}  // namespace

void window_attention_bwd(int threads, DType dtype, WindowGeometry geometry, float scale, const void* grad_out,
                          const void* qkv, WindowExtras extras, void* d_qkv, WindowExtrasGradients gradients) {
  const WindowMap map(geometry);
  ExpandedBias bias(threads, map, geometry, extras);
  const int64_t heads = geometry.heads, windows = map.windows(), columns = round_up(map.tokens(), lanes);
  const bool sums_scores = gradients.table || gradients.bias;
  const int64_t scores_length = sums_scores ? heads * map.tokens() * columns : 0;
  const int64_t fill_length = gradients.qkv_bias ? 3 * heads * geometry.head_dim : 0;
  const int64_t logit_length = gradients.logit_scale ? heads : 0;
  const int64_t length = scores_length + fill_length + logit_length;
  const int64_t runs = number_of_runs(windows, length);
  // Heads write to places of their own, so their division may follow the number of threads.
  const int64_t wanted = 4 * threads;
  const int64_t groups = runs >= wanted ? 1 : heads < wanted / runs ? heads : wanted / runs;
  Scratch<float> sums(runs * length);
  if (length) std::memset(sums.data(), 0, runs * length * sizeof(float));

  with_type(dtype, [&]<class T>(T) {
    const auto run = [&]<class Unit>(Unit) {
      parallel(threads, runs * groups, [&](int64_t task) {
        const int64_t group = task % groups, part = task / groups;
        float* slot = sums.data() + part * length;
        const Shared shared = {sums_scores ? slot : nullptr, gradients.qkv_bias ? slot + scores_length : nullptr,
                               gradients.logit_scale ? slot + scores_length + fill_length : nullptr};
        Backward<T, Unit> backward(geometry, scale, extras, map, bias, static_cast<const T*>(grad_out),
                                   static_cast<const T*>(qkv), static_cast<T*>(d_qkv), shared);
        for (int64_t w = part_begin(windows, runs, part); w < part_begin(windows, runs, part + 1); ++w) {
          backward.window(w, part_begin(heads, groups, group), part_begin(heads, groups, group + 1));
        }
      });
    };
    with_unit<T>(extras, run);
  });

  if (!length) return;
  Scratch<float> total(length);
  add_partials(threads, runs, length, sums.data(), total.data());
  if (sums_scores) fold(threads, map, heads, total.data(), columns, gradients);
  if (gradients.qkv_bias) std::memcpy(gradients.qkv_bias, total.data() + scores_length, fill_length * sizeof(float));
  if (gradients.logit_scale) {
    std::memcpy(gradients.logit_scale, total.data() + scores_length + fill_length, logit_length * sizeof(float));
  }
}

}  // namespace ff::FF_LEVEL
