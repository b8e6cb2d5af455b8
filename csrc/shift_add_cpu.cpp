// The two-step form on the CPU: rows of maps are added where the tables say. Formulas in swconv.h.
#include <algorithm>

#include "swconv.h"

namespace swconv {
namespace {

// A plane that is read at a displacement, and 0 outside.
template <class T>
struct Plane {
  const T* data;
  int64_t height, width;
};

// out[y][x] += plane[y + dy][x + dx]
template <class T>
void add_moved(Plane<T> plane, int64_t dy, int64_t dx, T* out, int64_t height, int64_t width) {
  const int64_t top = std::max<int64_t>(0, -dy), bottom = std::min(height, plane.height - dy);
  const int64_t left = std::max<int64_t>(0, -dx), right = std::min(width, plane.width - dx);
  for (int64_t y = top; y < bottom; ++y) {
    const T* __restrict from = plane.data + (y + dy) * plane.width + dx;
    T* __restrict to = out + y * width;
    for (int64_t x = left; x < right; ++x) to[x] += from[x];
  }
}

}  // namespace

template <class T>
void shift_add_cpu(const ShiftSizes& s, const T* maps, const int32_t* pad_h, const int32_t* pad_v, const int32_t* pick,
                   T* h, T* v, T* i, int64_t begin, int64_t end) {
  const int64_t plane = s.height * s.width, rows = s.height + 2 * s.halo, columns = s.width + 2 * s.halo;
  for (int64_t p = begin; p < end; ++p) {
    const int64_t image = p / s.channels, r = p % s.channels;
    const T* image_maps = maps + image * s.channels * s.taps * rows * columns;
    const auto map = [&](int64_t c) { return Plane<T>{image_maps + c * rows * columns, rows, columns}; };
    T *out_h = h + p * plane, *out_v = v + p * plane, *out_i = i + p * plane;
    for (T* out : {out_h, out_v, out_i}) std::fill(out, out + plane, T(0));
    for (int64_t e = 0; e < s.edges; ++e) {
      for (int64_t c = r * s.taps; c < (r + 1) * s.taps; ++c) {
        add_moved(map(c), s.halo, -int64_t{pad_h[c * s.edges + e]}, out_h, s.height, s.width);
        add_moved(map(c), -int64_t{pad_v[c * s.edges + e]}, s.halo, out_v, s.height, s.width);
      }
      add_moved(map(pick[r * s.edges + e]), s.halo, s.halo, out_i, s.height, s.width);
    }
  }
}

template <class T>
void shift_add_backward_cpu(const ShiftSizes& s, const T* grad_h, const T* grad_v, const T* grad_i,
                            const int32_t* pad_h, const int32_t* pad_v, const int32_t* pick, T* grad_maps,
                            int64_t begin, int64_t end) {
  const int64_t plane = s.height * s.width, rows = s.height + 2 * s.halo, columns = s.width + 2 * s.halo;
  for (int64_t m = begin; m < end; ++m) {
    const int64_t c = m % (s.channels * s.taps), p = m / s.taps, r = p % s.channels;
    const auto grad = [&](const T* data) { return Plane<T>{data + p * plane, s.height, s.width}; };
    T* out = grad_maps + m * rows * columns;
    std::fill(out, out + rows * columns, T(0));
    for (int64_t e = 0; e < s.edges; ++e) {
      add_moved(grad(grad_h), -s.halo, pad_h[c * s.edges + e], out, rows, columns);
      add_moved(grad(grad_v), pad_v[c * s.edges + e], -s.halo, out, rows, columns);
      if (pick[r * s.edges + e] == c) add_moved(grad(grad_i), -s.halo, -s.halo, out, rows, columns);
    }
  }
}

#define SWCONV_INSTANTIATE(T)                                                                                          \
  template void shift_add_cpu<T>(const ShiftSizes&, const T*, const int32_t*, const int32_t*, const int32_t*, T*, T*,  \
                                 T*, int64_t, int64_t);                                                                \
  template void shift_add_backward_cpu<T>(const ShiftSizes&, const T*, const T*, const T*, const int32_t*,             \
                                          const int32_t*, const int32_t*, T*, int64_t, int64_t);
SWCONV_INSTANTIATE(float)
SWCONV_INSTANTIATE(double)
#undef SWCONV_INSTANTIATE

}  // namespace swconv
