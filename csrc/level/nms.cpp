// Greedy suppression of sorted boxes: a block of the best that are left is settled, then all of it drops others.
//
// Overlaps have the bits of the definition: this file is compiled without contraction of products and sums.
#include "../parallel.h"
#include "scratch.h"
#include "vec.h"

namespace ff::FF_LEVEL {

namespace {

constexpr int64_t block = 128;   // boxes that are settled one after the other
constexpr int64_t slice = 512;   // boxes that one task compares with a block

// Boxes that are left, best first within a class, side by side for vectors.
struct Left {
  Scratch<float> x1, y1, x2, y2, area, dead;
  Scratch<int64_t> number;  // among all sorted boxes

  explicit Left(int64_t count)
      : x1(count), y1(count), x2(count), y2(count), area(count), dead(count), number(count) {}

  void move(int64_t to, int64_t from) {
    x1.data()[to] = x1.data()[from], y1.data()[to] = y1.data()[from];
    x2.data()[to] = x2.data()[from], y2.data()[to] = y2.data()[from];
    area.data()[to] = area.data()[from], dead.data()[to] = 0.0f;
    number.data()[to] = number.data()[from];
  }

  // Marks those of [begin, end) that overlap box `row` by more than the threshold. No pair with a NaN does.
  void suppress(int64_t row, int64_t begin, int64_t end, float threshold) {
    const float left = x1.data()[row], top = y1.data()[row], right = x2.data()[row], bottom = y2.data()[row];
    const float own_area = area.data()[row];
    if (begin >= end) return;
    each_vector(end - begin, [&](int64_t i, auto part) {
      const int64_t at = begin + i;
      const Vec width = min(part.get(x2.data() + at), splat(right)) - max(part.get(x1.data() + at), splat(left));
      const Vec height = min(part.get(y2.data() + at), splat(bottom)) - max(part.get(y1.data() + at), splat(top));
      const Vec both = max(width, Vec{}) * max(height, Vec{});
      const Vec overlap = both / (own_area + part.get(area.data() + at) - both);
      part.put(dead.data() + at, select(overlap > threshold, splat(1.0f), part.get(dead.data() + at)));
    });
  }
};

}  // namespace

void nms(int threads, int64_t count, const float* boxes, const int64_t* end, float threshold, bool* kept) {
  Left left(count);
  for (int64_t i = 0; i < count; ++i) {
    const float* box = boxes + 4 * i;
    left.x1.data()[i] = box[0], left.y1.data()[i] = box[1], left.x2.data()[i] = box[2], left.y2.data()[i] = box[3];
    left.area.data()[i] = (box[2] - box[0]) * (box[3] - box[1]);
    left.dead.data()[i] = 0.0f;
    left.number.data()[i] = i;
    kept[i] = false;
  }
  const int64_t* number = left.number.data();
  const float* dead = left.dead.data();
  int64_t rows[block], limits[block];
  while (count > 0) {
    const int64_t settled = count < block ? count : block;
    int64_t num_rows = 0, limit = 0;
    for (int64_t row = 0; row < settled; ++row) {
      if (dead[row] != 0.0f) continue;
      kept[number[row]] = true;
      while (limit < count && number[limit] < end[number[row]]) ++limit;  // ends of classes never fall
      left.suppress(row, row + 1, limit < settled ? limit : settled, threshold);
      rows[num_rows] = row;
      limits[num_rows++] = limit;
    }
    parallel(threads, (count - settled + slice - 1) / slice, [&](int64_t task) {
      const int64_t first = settled + task * slice, last = first + slice;
      for (int64_t k = 0; k < num_rows; ++k) {
        left.suppress(rows[k], first, limits[k] < last ? limits[k] : last, threshold);
      }
    });
    int64_t alive = 0;
    for (int64_t i = settled; i < count; ++i) {
      if (dead[i] == 0.0f) left.move(alive++, i);
    }
    count = alive;
  }
}

}  // namespace ff::FF_LEVEL
