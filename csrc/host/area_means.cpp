// Rows of a cell are added up pixel by pixel, in 16 bits as long as they suffice; what is left is one row a cell.
//
// Lengths are in parts of a pixel: 1 / rows of it downwards, 1 / columns across, so every border lies on a whole part
// and a cell is height x width parts large.
#include "area_means.h"

#include <algorithm>
#include <vector>

namespace ff {

namespace {

constexpr int64_t max_rows_in_16_bits = 257;

// sums[i] = parts within the cell times the values of column i, over the source rows that cell `row` of `rows` touches.
void sum_rows(const uint8_t* pixels, int64_t height, int64_t stride, int64_t rows, int64_t row, uint32_t* sums,
              uint16_t* short_sums) {
  const int64_t top = row * height, bottom = top + height;
  std::fill_n(sums, stride, 0u);
  const auto add_part = [&](int64_t y) {
    const auto part = static_cast<uint16_t>(std::min(bottom, (y + 1) * rows) - std::max(top, y * rows));
    const uint8_t* from = pixels + y * stride;
    for (int64_t i = 0; i < stride; ++i) sums[i] += static_cast<uint16_t>(part * from[i]);
  };
  int64_t y = top / rows;
  const int64_t whole_end = bottom / rows;
  if (y * rows < top) add_part(y++);
  while (y < whole_end) {
    const int64_t end = std::min(whole_end, y + max_rows_in_16_bits);
    std::fill_n(short_sums, stride, uint16_t{0});
    for (; y < end; ++y) {
      const uint8_t* from = pixels + y * stride;
      for (int64_t i = 0; i < stride; ++i) short_sums[i] += from[i];
    }
    for (int64_t i = 0; i < stride; ++i) sums[i] += static_cast<uint32_t>(rows) * short_sums[i];
  }
  if (y * rows < bottom) add_part(y);
}

}  // namespace

void area_means(const uint8_t* pixels, int64_t height, int64_t width, int channels, int rows, int columns,
                uint8_t* cells) {
  const int64_t stride = width * channels;
  std::vector<uint32_t> sums(stride);
  std::vector<uint16_t> short_sums(stride);
  std::vector<uint64_t> light(width);
  const uint64_t total = static_cast<uint64_t>(height) * width * (channels == 3 ? 1000 : 1);
  for (int64_t row = 0; row < rows; ++row) {
    sum_rows(pixels, height, stride, rows, row, sums.data(), short_sums.data());
    for (int64_t x = 0; x < width; ++x) {
      const uint32_t* at = sums.data() + x * channels;
      light[x] = channels == 3 ? 299 * uint64_t{at[0]} + 587 * uint64_t{at[1]} + 114 * uint64_t{at[2]} : at[0];
    }
    for (int64_t column = 0; column < columns; ++column) {
      const int64_t left = column * width, right = left + width;
      uint64_t sum = 0;
      for (int64_t x = left / columns; x * columns < right; ++x)
        sum += light[x] * static_cast<uint64_t>(std::min(right, (x + 1) * columns) - std::max(left, x * columns));
      cells[row * columns + column] = static_cast<uint8_t>((2 * sum + total) / (2 * total));
    }
  }
}

}  // namespace ff
