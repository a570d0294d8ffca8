// Windows on a map as index arithmetic: where each token of a window lies, and which tokens see each other.
#pragma once

#include "scratch.h"
#include "vec.h"

namespace ff::FF_LEVEL {

// What a map is cut into. Axes are (T, H, W); a map in 2-D has T = 1.
class WindowMap {
 public:
  explicit WindowMap(const WindowGeometry& geometry) : g_(geometry) {
    for (int a = 0; a < 3; ++a) grid_[a] = (g_.size[a] + g_.window[a] - 1) / g_.window[a];
  }

  int64_t tokens() const { return g_.window[0] * g_.window[1] * g_.window[2]; }
  int64_t windows() const { return g_.batch * grid_[0] * grid_[1] * grid_[2]; }

  // For each token of a window the row of the map that it is, or -1 for a pad, and its region: tokens see each other
  // when their regions are equal. Returns whether there is more than one region.
  bool locate(int64_t window, int64_t* rows, int32_t* regions) const {
    int64_t place[3];
    int64_t rest = window;
    for (int a = 2; a >= 0; --a) {
      place[a] = rest % grid_[a];
      rest /= grid_[a];
    }
    bool mixed = false;
    int64_t n = 0;
    for (int64_t t = 0; t < g_.window[0]; ++t) {
      const Token along_t = token(0, place[0], t);
      for (int64_t y = 0; y < g_.window[1]; ++y) {
        const Token along_y = token(1, place[1], y);
        for (int64_t x = 0; x < g_.window[2]; ++x, ++n) {
          const Token along_x = token(2, place[2], x);
          const bool pad = along_t.pad || along_y.pad || along_x.pad;
          rows[n] = pad ? -1 : ((rest * g_.size[0] + along_t.source) * g_.size[1] + along_y.source) * g_.size[2] + along_x.source;
          regions[n] = (along_t.region * 4 + along_y.region) * 4 + along_x.region;
          mixed |= regions[n] != regions[0];
        }
      }
    }
    return mixed;
  }

  // Call body(first, length) for each line of a window along its last axis: tokens `first` and the following ones.
  template <class Body>
  void each_line(const Body& body) const {
    for (int64_t n = 0; n < tokens(); n += g_.window[2]) body(n, g_.window[2]);
  }

  // Rows of a table: one for each offset between two tokens of the window that was asked for. Counted from the end, so
  // that it rises along a line of j, pair (i, j) reads row same() - code(i) + code(j).
  int64_t offsets() const { return side(0) * side(1) * side(2); }
  int64_t same() const {
    return offsets() - 1 - (((g_.full_window[0] - 1) * side(1) + g_.full_window[1] - 1) * side(2) + g_.full_window[2] - 1);
  }
  int64_t code(int64_t n) const {
    const int64_t x = n % g_.window[2], y = n / g_.window[2] % g_.window[1], t = n / g_.window[2] / g_.window[1];
    return (t * side(1) + y) * side(2) + x;
  }

  // The number of token n in the leading corner of the whole window that was asked for, and the tokens of that.
  int64_t corner(int64_t n) const {
    const int64_t x = n % g_.window[2], y = n / g_.window[2] % g_.window[1], t = n / g_.window[2] / g_.window[1];
    return (t * g_.full_window[1] + y) * g_.full_window[2] + x;
  }
  int64_t full_tokens() const { return g_.full_window[0] * g_.full_window[1] * g_.full_window[2]; }

 private:
  struct Token {
    int64_t source;
    int32_t region;
    bool pad;
  };

  int64_t side(int axis) const { return 2 * g_.full_window[axis] - 1; }

  Token token(int axis, int64_t window, int64_t n) const {
    const int64_t padded = grid_[axis] * g_.window[axis], place = window * g_.window[axis] + n;
    int64_t source = place + g_.shift[axis];
    source -= source >= padded ? padded : 0;
    const bool pad = source >= g_.size[axis];
    const bool beyond_seam = !g_.cyclic[axis] && place >= padded - g_.shift[axis];
    return {source, (beyond_seam ? 1 : 0) + (pad && g_.mask_pads ? 2 : 0), pad};
  }

  WindowGeometry g_;
  int64_t grid_[3];
};

}  // namespace ff::FF_LEVEL
