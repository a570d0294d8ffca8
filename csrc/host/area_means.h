// The brightness of the cells of a grid laid over an image: what perceptual hashes see of it.
#pragma once

#include <cstdint>

namespace ff {

// cells (rows, columns) of pixels (height, width, channels), channels 1 or 3 (red, green, blue): the mean of
// 0.299 R + 0.587 G + 0.114 B over each cell, pixels on its border by the part that lies within, rounded half up.
// All in integers. rows at most 256, height at most 2^24, height * width at most 2^34.
void area_means(const uint8_t* pixels, int64_t height, int64_t width, int channels, int rows, int columns,
                uint8_t* cells);

}  // namespace ff
