// The samples of a deformable convolution and their gradients, on maps whose channels lie side by side.
//
// A sample is one tap of one place: four pixels of one group of channels, weighed by how near they are. Samples are
// numbered (B, P, K, G) for batch, places, taps and groups of offsets.
#include "../parallel.h"
#include "math.h"
#include "scratch.h"

namespace ff::FF_LEVEL {

namespace {

// As in Python's _geometry.
struct Geometry {
  int64_t batch, height, width, channels, groups, kernel[2], stride[2], padding[2], dilation[2], out[2];

  explicit Geometry(const int64_t* values) { std::memcpy(this, values, sizeof *this); }
  int64_t taps() const { return kernel[0] * kernel[1]; }
  int64_t places() const { return out[0] * out[1]; }
};

// Corners are ordered upper left, upper right, lower left, lower right; -1 where one is off the map.
struct Corners {
  int64_t pixel[4];
  float fy, fx;

  void near(float (&weight)[4], float modulation) const {
    const float top = (1.0f - fy) * modulation, bottom = fy * modulation;
    weight[0] = top * (1.0f - fx), weight[1] = top * fx, weight[2] = bottom * (1.0f - fx), weight[3] = bottom * fx;
  }
};

// Splits a coordinate into the whole pixel before it and the rest. NaN has no whole part; it stays in the rest.
inline int64_t split(float position, int64_t size, float& rest) {
  const float far = static_cast<float>(size);
  position = position < -2.0f ? -2.0f : position > far ? far : position;
  const float whole = position == position ? __builtin_floorf(position) : -2.0f;
  rest = position - whole;
  return static_cast<int64_t>(whole);
}

inline Corners locate(const Geometry& g, const float* offset, int64_t image, int64_t place, int64_t tap,
                      int64_t group) {
  const int64_t places = g.places();
  const float* moved = offset + ((image * g.groups + group) * g.taps() + tap) * 2 * places + place;
  const int64_t row = place / g.out[1] * g.stride[0] - g.padding[0] + tap / g.kernel[1] * g.dilation[0];
  const int64_t column = place % g.out[1] * g.stride[1] - g.padding[1] + tap % g.kernel[1] * g.dilation[1];
  Corners corners;
  const int64_t y = split(moved[0] + static_cast<float>(row), g.height, corners.fy);
  const int64_t x = split(moved[places] + static_cast<float>(column), g.width, corners.fx);
  const bool rows[2] = {y >= 0 && y < g.height, y >= -1 && y + 1 < g.height};
  const bool columns[2] = {x >= 0 && x < g.width, x >= -1 && x + 1 < g.width};
  for (int i = 0; i < 4; ++i) {
    corners.pixel[i] = rows[i / 2] && columns[i % 2] ? (y + i / 2) * g.width + x + i % 2 : -1;
  }
  return corners;
}

inline int64_t mask_at(const Geometry& g, int64_t image, int64_t place, int64_t tap, int64_t group) {
  return ((image * g.groups + group) * g.taps() + tap) * g.places() + place;
}

// Call body(image, place, tap, group, sample) for every sample, a few places of an image to a task.
template <class Body>
void each_sample(int threads, const Geometry& g, const Body& body) {
  constexpr int64_t step = 32;
  const int64_t places = g.places(), taps = g.taps(), blocks = (places + step - 1) / step;
  parallel(threads, g.batch * blocks, [&](int64_t task) {
    const int64_t image = task / blocks, first = task % blocks * step;
    const int64_t last = first + step < places ? first + step : places;
    for (int64_t place = first; place < last; ++place) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t sample = ((image * places + place) * taps + tap) * g.groups;
        for (int64_t group = 0; group < g.groups; ++group) body(image, place, tap, group, sample + group);
      }
    }
  });
}

// Where the four pixels of a sample begin; off the map all are zero.
template <class T>
struct Pixels {
  const T* at[4];

  Pixels(const Geometry& g, const Corners& corners, const void* input, int64_t image, int64_t group, const T* zeros) {
    const int64_t depth = g.channels / g.groups;
    const T* map = static_cast<const T*>(input) + image * g.height * g.width * g.channels + group * depth;
    for (int i = 0; i < 4; ++i) at[i] = corners.pixel[i] < 0 ? zeros : map + corners.pixel[i] * g.channels;
  }
};

template <class T>
inline Vec weighed(const Pixels<T>& pixels, const float (&weight)[4], int64_t i, auto part) {
  // One product after the other into the sum: forward and backward then round alike.
  Vec sum{};
  for (int k = 0; k < 4; ++k) sum += part.get(pixels.at[k] + i) * weight[k];
  return sum;
}

typedef float Four __attribute__((vector_size(16)));

inline Four add_quarters(Vec x) {
  Four parts[lanes / 4];
  std::memcpy(parts, &x, sizeof x);
  for (int width = lanes / 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) parts[i] += parts[i + width];
  }
  return parts[0];
}

// The sum of each of four vectors.
inline Four sum_each(const Vec (&x)[4]) {
  const Four a = add_quarters(x[0]), b = add_quarters(x[1]), c = add_quarters(x[2]), d = add_quarters(x[3]);
  const Four ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Four cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
  return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}

// Which pixels' gradients a sample's is a part of, and by how much.
struct Contribution {
  int32_t pixel[4];
  float weight[4];
};

}  // namespace

void deform_conv2d_fwd(int threads, DType dtype, const int64_t* geometry, const void* input, const float* offset,
                       const float* mask, void* columns) {
  const Geometry g(geometry);
  const int64_t depth = g.channels / g.groups;
  with_type(dtype, [&]<class T>(T) {
    Scratch<T> zeros(depth);
    std::memset(zeros.data(), 0, depth * sizeof(T));
    each_sample(threads, g, [&](int64_t image, int64_t place, int64_t tap, int64_t group, int64_t sample) {
      const Corners corners = locate(g, offset, image, place, tap, group);
      const Pixels<T> pixels(g, corners, input, image, group, zeros.data());
      float weight[4];
      corners.near(weight, mask ? mask[mask_at(g, image, place, tap, group)] : 1.0f);
      T* out = static_cast<T*>(columns) + sample * depth;
      each_vector(depth, [&](int64_t i, auto part) { part.put(out + i, weighed(pixels, weight, i, part)); });
    });
  });
}

void deform_conv2d_bwd(int threads, DType dtype, const int64_t* geometry, const void* d_columns, const void* input,
                       const float* offset, const float* mask, float* d_offset, float* d_mask, void* columns) {
  const Geometry g(geometry);
  const int64_t depth = g.channels / g.groups, places = g.places();
  with_type(dtype, [&]<class T>(T) {
    Scratch<T> zeros(depth);
    std::memset(zeros.data(), 0, depth * sizeof(T));
    each_sample(threads, g, [&](int64_t image, int64_t place, int64_t tap, int64_t group, int64_t sample) {
      const Corners corners = locate(g, offset, image, place, tap, group);
      const Pixels<T> pixels(g, corners, input, image, group, zeros.data());
      const int64_t at = mask_at(g, image, place, tap, group);
      const float modulation = mask ? mask[at] : 1.0f;
      const T* grad = static_cast<const T*>(d_columns) + sample * depth;
      float weight[4];
      if (columns) {
        corners.near(weight, modulation);
        T* out = static_cast<T*>(columns) + sample * depth;
        each_vector(depth, [&](int64_t i, auto part) { part.put(out + i, weighed(pixels, weight, i, part)); });
      }
      // What the gradient of the sample says about each of its pixels.
      Vec sums[4] = {};
      each_vector(depth, [&](int64_t i, auto part) {
        const Vec d = part.get(grad + i);
        for (int k = 0; k < 4; ++k) sums[k] += d * part.get(pixels.at[k] + i);
      });
      const Four dots = sum_each(sums);
      const float d00 = dots[0], d01 = dots[1], d10 = dots[2], d11 = dots[3];
      const float left = d10 - d00, right = d11 - d01, above = d01 - d00, below = d11 - d10;
      float* moved = d_offset + (at - place) * 2 + place;
      moved[0] = (left + corners.fx * (right - left)) * modulation;
      moved[places] = (above + corners.fy * (below - above)) * modulation;
      if (d_mask) {
        corners.near(weight, 1.0f);
        d_mask[at] = d00 * weight[0] + d01 * weight[1] + d10 * weight[2] + d11 * weight[3];
      }
    });
  });
}

void deform_conv2d_input_bwd(int threads, DType dtype, const int64_t* geometry, const void* d_columns,
                             const float* offset, const float* mask, float* d_input) {
  const Geometry g(geometry);
  const int64_t depth = g.channels / g.groups, samples = g.places() * g.taps() * g.groups;
  Scratch<Contribution> where(g.batch * samples);
  each_sample(threads, g, [&](int64_t image, int64_t place, int64_t tap, int64_t group, int64_t sample) {
    const Corners corners = locate(g, offset, image, place, tap, group);
    Contribution& to = where.data()[sample];
    corners.near(to.weight, mask ? mask[mask_at(g, image, place, tap, group)] : 1.0f);
    for (int i = 0; i < 4; ++i) to.pixel[i] = static_cast<int32_t>(corners.pixel[i]);
  });
  // A task owns some channels of a group of an image: nobody else writes them.
  constexpr int64_t step = 32;
  const int64_t slices = (depth + step - 1) / step, tasks_of_image = g.groups * slices;
  with_type(dtype, [&]<class T>(T) {
    parallel(threads, g.batch * tasks_of_image, [&](int64_t task) {
      const int64_t image = task / tasks_of_image, group = task % tasks_of_image / slices;
      const int64_t first = task % slices * step, length = depth - first < step ? depth - first : step;
      float* map = d_input + image * g.height * g.width * g.channels + group * depth + first;
      for (int64_t pixel = 0; pixel < g.height * g.width; ++pixel) {
        std::memset(map + pixel * g.channels, 0, length * sizeof(float));
      }
      for (int64_t sample = image * samples + group; sample < (image + 1) * samples; sample += g.groups) {
        const Contribution& to = where.data()[sample];
        const T* grad = static_cast<const T*>(d_columns) + sample * depth + first;
        for (int k = 0; k < 4; ++k) {
          if (to.pixel[k] < 0) continue;
          float* pixel = map + to.pixel[k] * g.channels;
          each_vector(length, [&](int64_t i, auto part) {
            part.put(pixel + i, part.get(pixel + i) + part.get(grad + i) * to.weight[k]);
          });
        }
      }
    });
  });
}

}  // namespace ff::FF_LEVEL
