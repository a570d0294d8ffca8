// What both contrastive losses know of a tile of logits: which elements are positives.
#pragma once

#include "vec.h"

namespace ff::FF_LEVEL {

// The part of a row's positives, columns [begin, end) of all, that lies in a tile, as columns of the tile.
struct Run {
  int64_t begin, end;

  Run(const int64_t* begins, const int64_t* ends, int64_t row, int64_t first_col, int64_t cols)
      : begin(begins[row] - first_col), end(ends[row] - first_col) {
    begin = begin > 0 ? begin : 0;
    end = end < cols ? end : cols;
  }

  bool meets_vector(int64_t at) const { return at < end && at + lanes > begin; }
  // Which elements of the vector at column `at` are positives.
  VecInt within_vector(int64_t at) const {
    const int32_t from = begin > at ? static_cast<int32_t>(begin - at) : 0;
    const int32_t to = end < at + lanes ? static_cast<int32_t>(end - at) : lanes;
    return (lane_index() >= from) & (lane_index() < to);
  }
};

// What lies behind the last column must change no sum.
inline Vec none_behind(Vec x, Whole) { return x; }
inline Vec none_behind(Vec x, First part) { return select(lane_index() < part.count, x, Vec{}); }

}  // namespace ff::FF_LEVEL
