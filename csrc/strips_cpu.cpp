// The strip form on the CPU. Formulas in swconv.h.
//
// One routine does every strip: `filter` runs a long kernel down the columns of a sheet, vector lanes along the rows.
// The vertical strip and the small kernel work on the map, the horizontal strip on its transpose. A sheet holds one
// channel of several images side by side, a zero margin between them, so that small maps fill the lanes. Tap rows that
// fall outside the map are skipped. Lanes never mix, so an image's result does not depend on its neighbours.
#include <algorithm>
#include <vector>

#include "swconv.h"

#define SWCONV_INLINE inline __attribute__((always_inline))
// One binary for every x86-64: the loader takes the version that the processor can run (GCC 12 knows these names).
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define SWCONV_CLONES __attribute__((flatten, target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SWCONV_CLONES __attribute__((flatten))
#endif

namespace swconv {
namespace {

constexpr int64_t kTile = 6;  // sums that a tile keeps in registers, times one vector: fits 16 registers of 32 bytes

template <class T>
struct Vector {
  typedef T type __attribute__((vector_size(64)));
  static constexpr int64_t lanes = 64 / sizeof(T);
};
template <class T>
using vector_t = typename Vector<T>::type;

template <class T>
SWCONV_INLINE void load(vector_t<T>& to, const T* from) { __builtin_memcpy(&to, from, sizeof(to)); }
template <class T>
SWCONV_INLINE void save(T* to, const vector_t<T>& from) { __builtin_memcpy(to, &from, sizeof(from)); }

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Split `count` rows in equal tiles of at most kTile.
int64_t tile_height(int64_t count) {
  const int64_t tiles = std::max<int64_t>(1, (count + kTile - 1) / kTile);
  return std::max<int64_t>(1, (count + tiles - 1) / tiles);
}

// One channel of some images in memory, image g at g * step.
template <class T>
struct Maps {
  T* data;
  int64_t step;
};

// Where the pixels of a sheet lie: (image, row, column) at row * stride + image * segment + column.
struct Grid {
  int64_t rows, columns, images, margin, segment, width, stride;

  Grid(int64_t rows, int64_t columns, int64_t images, int64_t margin, int64_t lanes)
      : rows(rows), columns(columns), images(images), margin(margin), segment(columns + margin),
        width(round_up(images * segment, lanes)), stride(width + 2 * margin) {}
};

// A grid with its memory: zero, then pixels are laid on it. Tiles may run over the last row.
template <class T>
struct Sheet {
  Grid grid;
  std::vector<T> memory;

  explicit Sheet(const Grid& grid) : grid(grid), memory(2 * grid.margin + (grid.rows + kTile) * grid.stride) {}

  SWCONV_INLINE T* origin() { return memory.data() + grid.margin; }
  SWCONV_INLINE const T* origin() const { return memory.data() + grid.margin; }

  void lay(Maps<const T> maps) {
    for (int64_t g = 0; g < grid.images; ++g)
      for (int64_t r = 0; r < grid.rows; ++r) {
        const T* __restrict from = maps.data + g * maps.step + r * grid.columns;
        T* __restrict to = origin() + r * grid.stride + g * grid.segment;
        for (int64_t q = 0; q < grid.columns; ++q) to[q] = from[q];
      }
  }

  void lay_transposed(Maps<const T> maps) {
    for (int64_t g = 0; g < grid.images; ++g)
      for (int64_t q = 0; q < grid.columns; ++q) {
        const T* __restrict from = maps.data + g * maps.step + q * grid.rows;
        T* __restrict to = origin() + g * grid.segment + q;
        for (int64_t r = 0; r < grid.rows; ++r) to[r * grid.stride] = from[r];
      }
  }

  void take(Maps<T> maps) const {
    for (int64_t g = 0; g < grid.images; ++g)
      for (int64_t r = 0; r < grid.rows; ++r) {
        const T* __restrict from = origin() + r * grid.stride + g * grid.segment;
        T* __restrict to = maps.data + g * maps.step + r * grid.columns;
        for (int64_t q = 0; q < grid.columns; ++q) to[q] = from[q];
      }
  }

  void take_transposed(Maps<T> maps) const {
    for (int64_t g = 0; g < grid.images; ++g)
      for (int64_t q = 0; q < grid.columns; ++q) {
        const T* __restrict from = origin() + g * grid.segment + q;
        T* __restrict to = maps.data + g * maps.step + q * grid.rows;
        for (int64_t r = 0; r < grid.rows; ++r) to[r] = from[r * grid.stride];
      }
  }
};

// maps = plain + turned transposed + bias
template <class T>
void take_sum(const Sheet<T>& plain, const Sheet<T>& turned, T bias, Maps<T> maps) {
  const Grid &p = plain.grid, &t = turned.grid;
  for (int64_t g = 0; g < p.images; ++g)
    for (int64_t y = 0; y < p.rows; ++y) {
      const T* __restrict along = plain.origin() + y * p.stride + g * p.segment;
      const T* __restrict across = turned.origin() + g * t.segment + y;
      T* __restrict to = maps.data + g * maps.step + y * p.columns;
      for (int64_t x = 0; x < p.columns; ++x) to[x] = along[x] + across[x * t.stride] + bias;
    }
}

// How the work of a call is cut: `group` images side by side, on the map's own sheet and on its transpose.
template <class T>
struct Layout {
  int64_t margin, group, groups;

  explicit Layout(const StripSizes& s) : margin(std::max({s.breadth_h, s.breadth_v, s.small}) / 2), group(1) {
    constexpr int64_t lanes = Vector<T>::lanes, most = 8 * lanes;
    const auto cost = [&](int64_t images) {  // vectors per image
      return double(s.height * round_up(images * (s.width + margin), lanes) +
                    s.width * round_up(images * (s.height + margin), lanes)) / double(images);
    };
    const int64_t side = std::max(s.height, s.width) + margin;
    for (int64_t images = 2; images <= s.images && images * side <= most; ++images)
      if (cost(images) < 0.99 * cost(group)) group = images;
    groups = (s.images + group - 1) / group;
  }
};

// A strip's taps as filter wants them: tap t of column a at a * length + t.
template <class T>
struct Taps {
  std::vector<T> values;
  int64_t length, breadth, anchor, left;

  // `along`, `across`: steps of t and a in `kernel`.
  void set(const T* kernel, int64_t taps, int64_t along, int64_t columns, int64_t across, int64_t centre) {
    length = taps, breadth = columns, anchor = centre, left = columns / 2;
    values.resize(length * breadth);
    for (int64_t a = 0; a < breadth; ++a)
      for (int64_t t = 0; t < length; ++t) values[a * length + t] = kernel[t * along + a * across];
  }

  // The adjoint: the same strip turned by half a turn.
  void flip() {
    std::reverse(values.begin(), values.end());
    anchor = length - 1 - anchor;
    left = breadth - 1 - left;
  }
};

// out[r][q] (+)= sum_a sum_t taps[a][t] in[r + t - anchor][q + a - left], ROWS rows of out at a time.
template <class T, int ROWS>
SWCONV_INLINE void filter_tiles(const Sheet<T>& in, const Taps<T>& k, Sheet<T>& out, bool add) {
  const Grid& s = in.grid;
  for (int64_t q = 0; q < s.width; q += Vector<T>::lanes) {
    for (int64_t top = 0; top < s.rows; top += ROWS) {
      vector_t<T> sum[ROWS] = {};
      const int64_t begin = std::max<int64_t>(0, top - k.anchor);
      const int64_t end = std::min(s.rows, top + ROWS - 1 + k.length - k.anchor);
      for (int64_t r = begin; r < end; ++r) {
        const int64_t first = r - top + k.anchor;  // tap of the tile's first row; row j has tap first - j
        const T* row = in.origin() + r * s.stride + q - k.left;
        const T* tap = k.values.data() + first;
        const bool whole = first >= ROWS - 1 && first < k.length;
        for (int64_t a = 0; a < k.breadth; ++a, ++row, tap += k.length) {
          vector_t<T> x;
          load(x, row);
          if (whole) {
#pragma GCC unroll 8
            for (int j = 0; j < ROWS; ++j) sum[j] += tap[-j] * x;
          } else {
#pragma GCC unroll 8
            for (int j = 0; j < ROWS; ++j)
              if (first - j >= 0 && first - j < k.length) sum[j] += tap[-j] * x;
          }
        }
      }
      T* to = out.origin() + top * s.stride + q;
#pragma GCC unroll 8
      for (int j = 0; j < ROWS; ++j, to += s.stride) {
        if (add) {
          vector_t<T> before;
          load(before, to);
          sum[j] += before;
        }
        save(to, sum[j]);
      }
    }
  }
}

// sums[a][t] += sum_r sum_q grad[r][q] in[r + t - anchor][q + a - left], one sum per lane, TAPS taps at a time.
template <class T, int TAPS>
SWCONV_INLINE void correlate_tiles(const Sheet<T>& in, const Sheet<T>& grad, const Taps<T>& k, T* sums) {
  const Grid& s = in.grid;
  constexpr int64_t lanes = Vector<T>::lanes;
  for (int64_t a = 0; a < k.breadth; ++a) {
    for (int64_t t = 0; t < k.length; t += TAPS, sums += TAPS * lanes) {
      vector_t<T> sum[TAPS];
#pragma GCC unroll 8
      for (int j = 0; j < TAPS; ++j) load(sum[j], sums + j * lanes);
      const int64_t begin = std::max<int64_t>(0, t - k.anchor);
      const int64_t end = std::min(s.rows, s.rows + t + TAPS - 1 - k.anchor);
      for (int64_t r = begin; r < end; ++r) {
        const int64_t first = r - t + k.anchor;  // the gradient's row for tap t; tap t + j has row first - j
        const T* row = in.origin() + r * s.stride + a - k.left;
        const T* from = grad.origin() + first * s.stride;
        if (first >= TAPS - 1 && first < s.rows) {
          for (int64_t q = 0; q < s.width; q += lanes) {
            vector_t<T> x, g;
            load(x, row + q);
#pragma GCC unroll 8
            for (int j = 0; j < TAPS; ++j) {
              load(g, from + q - j * s.stride);
              sum[j] += g * x;
            }
          }
        } else {
#pragma GCC unroll 8
          for (int j = 0; j < TAPS; ++j) {
            if (first - j < 0 || first - j >= s.rows) continue;
            for (int64_t q = 0; q < s.width; q += lanes) {
              vector_t<T> x, g;
              load(x, row + q);
              load(g, from + q - j * s.stride);
              sum[j] += g * x;
            }
          }
        }
      }
#pragma GCC unroll 8
      for (int j = 0; j < TAPS; ++j) save(sums + j * lanes, sum[j]);
    }
  }
}

template <class T>
SWCONV_INLINE void filter_any(const Sheet<T>& in, const Taps<T>& k, Sheet<T>& out, bool add) {
  switch (tile_height(in.grid.rows)) {
    case 1: return filter_tiles<T, 1>(in, k, out, add);
    case 2: return filter_tiles<T, 2>(in, k, out, add);
    case 3: return filter_tiles<T, 3>(in, k, out, add);
    case 4: return filter_tiles<T, 4>(in, k, out, add);
    case 5: return filter_tiles<T, 5>(in, k, out, add);
    default: return filter_tiles<T, 6>(in, k, out, add);
  }
}

template <class T>
SWCONV_INLINE void correlate_any(const Sheet<T>& in, const Sheet<T>& grad, const Taps<T>& k, T* sums) {
  switch (tile_height(k.length)) {
    case 1: return correlate_tiles<T, 1>(in, grad, k, sums);
    case 2: return correlate_tiles<T, 2>(in, grad, k, sums);
    case 3: return correlate_tiles<T, 3>(in, grad, k, sums);
    case 4: return correlate_tiles<T, 4>(in, grad, k, sums);
    case 5: return correlate_tiles<T, 5>(in, grad, k, sums);
    default: return correlate_tiles<T, 6>(in, grad, k, sums);
  }
}

// The two routines that take the time, compiled for several processors.
#define SWCONV_VERSIONS(T)                                                                               \
  SWCONV_CLONES void filter(const Sheet<T>& in, const Taps<T>& k, Sheet<T>& out, bool add) {             \
    filter_any(in, k, out, add);                                                                         \
  }                                                                                                      \
  SWCONV_CLONES void correlate(const Sheet<T>& in, const Sheet<T>& grad, const Taps<T>& k, T* sums) {    \
    correlate_any(in, grad, k, sums);                                                                    \
  }
SWCONV_VERSIONS(float)
SWCONV_VERSIONS(double)
#undef SWCONV_VERSIONS

// Room for correlate's sums, and the taps they add up to, in the kernel's own order.
template <class T>
struct TapSums {
  std::vector<T> sums;
  int64_t row;

  explicit TapSums(const Taps<T>& k)
      : sums(k.breadth * round_up(k.length, tile_height(k.length)) * Vector<T>::lanes),
        row(round_up(k.length, tile_height(k.length))) {}

  void store(const Taps<T>& k, T* kernel, int64_t along, int64_t across) const {
    for (int64_t a = 0; a < k.breadth; ++a)
      for (int64_t t = 0; t < k.length; ++t) {
        const T* lane = sums.data() + (a * row + t) * Vector<T>::lanes;
        T total = 0;
        for (int64_t l = 0; l < Vector<T>::lanes; ++l) total += lane[l];
        kernel[t * along + a * across] = total;
      }
  }
};

template <class T>
struct StripTaps {
  Taps<T> h, v, c;

  void set(const StripSizes& s, const T* kernel_h, const T* kernel_v, const T* kernel_c, int64_t r) {
    h.set(kernel_h + r * s.breadth_h * s.length_h, s.length_h, 1, s.breadth_h, s.length_h, s.anchor_h);
    v.set(kernel_v + r * s.breadth_v * s.length_v, s.length_v, s.breadth_v, s.breadth_v, 1, s.anchor_v);
    c.set(kernel_c + r * s.small * s.small, s.small, s.small, s.small, 1, s.small / 2);
  }
};

// The sheets of a group of images: the map's own, and turned.
template <class T>
struct Forward {
  Sheet<T> x, out, x_turned, out_turned;

  Forward(const StripSizes& s, int64_t images, int64_t margin)
      : x(Grid(s.height, s.width, images, margin, Vector<T>::lanes)), out(x),
        x_turned(Grid(s.width, s.height, images, margin, Vector<T>::lanes)), out_turned(x_turned) {}
};

template <class T>
struct Backward : Forward<T> {
  Sheet<T> grad_v, grad_i, grad_h_turned;

  Backward(const StripSizes& s, int64_t images, int64_t margin)
      : Forward<T>(s, images, margin), grad_v(this->x), grad_i(this->x), grad_h_turned(this->x_turned) {}
};

// Calls body(sheets, channel, offset of the channel's first pixel, taps) for every task.
template <class T, class Body>
void forward(const StripSizes& s, const T* x, const T* kernel_h, const T* kernel_v, const T* kernel_c,
                           int64_t begin, int64_t end, const Body& body) {
  const Layout<T> layout(s);
  const int64_t plane = s.height * s.width, step = s.channels * plane;
  Forward<T> sheets(s, layout.group, layout.margin);
  StripTaps<T> taps;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t r = task % s.channels, image = task / s.channels * layout.group;
    const int64_t images = std::min(layout.group, s.images - image), offset = image * step + r * plane;
    if (images != sheets.x.grid.images) sheets = Forward<T>(s, images, layout.margin);
    taps.set(s, kernel_h, kernel_v, kernel_c, r);
    sheets.x.lay({x + offset, step});
    sheets.x_turned.lay_transposed({x + offset, step});
    body(sheets, r, offset, taps);
  }
}

}  // namespace

template <class T>
int64_t strip_tasks(const StripSizes& s) {
  return s.channels * Layout<T>(s).groups;
}

template <class T>
void strip_branches_cpu(const StripSizes& s, const T* x, const T* kernel_h, const T* kernel_v, const T* kernel_c,
                            T* h, T* v, T* i, int64_t begin, int64_t end) {
  const int64_t step = s.channels * s.height * s.width;
  forward(s, x, kernel_h, kernel_v, kernel_c, begin, end,
          [&](Forward<T>& sheets, int64_t, int64_t offset, const StripTaps<T>& taps) {
            filter(sheets.x_turned, taps.h, sheets.out_turned, false);
            sheets.out_turned.take_transposed({h + offset, step});
            filter(sheets.x, taps.v, sheets.out, false);
            sheets.out.take({v + offset, step});
            filter(sheets.x, taps.c, sheets.out, false);
            sheets.out.take({i + offset, step});
          });
}

template <class T>
void strip_mix_cpu(const StripSizes& s, const T* x, const T* kernel_h, const T* kernel_v, const T* kernel_c,
                       const T* bias, T* y, int64_t begin, int64_t end) {
  const int64_t step = s.channels * s.height * s.width;
  forward(s, x, kernel_h, kernel_v, kernel_c, begin, end,
          [&](Forward<T>& sheets, int64_t r, int64_t offset, const StripTaps<T>& taps) {
            filter(sheets.x_turned, taps.h, sheets.out_turned, false);
            filter(sheets.x, taps.v, sheets.out, false);
            filter(sheets.x, taps.c, sheets.out, true);
            take_sum(sheets.out, sheets.out_turned, bias ? bias[r] : T(0), {y + offset, step});
          });
}

template <class T>
void strip_branches_backward_cpu(const StripSizes& s, const T* grad_h, const T* grad_v, const T* grad_i, const T* x,
                            const T* kernel_h, const T* kernel_v, const T* kernel_c, T* grad_x, T* grad_kernel_h,
                            T* grad_kernel_v, T* grad_kernel_c, int64_t begin, int64_t end) {
  const Layout<T> layout(s);
  const int64_t plane = s.height * s.width, step = s.channels * plane;
  Backward<T> sheets(s, layout.group, layout.margin);
  StripTaps<T> taps, turned;
  for (int64_t r = begin; r < end; ++r) {
    taps.set(s, kernel_h, kernel_v, kernel_c, r);
    turned = taps;
    turned.h.flip(), turned.v.flip(), turned.c.flip();
    TapSums<T> sum_h(taps.h), sum_v(taps.v), sum_c(taps.c);
    for (int64_t image = 0; image < s.images; image += layout.group) {
      const int64_t images = std::min(layout.group, s.images - image), offset = image * step + r * plane;
      if (images != sheets.x.grid.images) sheets = Backward<T>(s, images, layout.margin);
      sheets.x.lay({x + offset, step});
      sheets.x_turned.lay_transposed({x + offset, step});
      sheets.grad_h_turned.lay_transposed({grad_h + offset, step});
      sheets.grad_v.lay({grad_v + offset, step});
      sheets.grad_i.lay({grad_i + offset, step});
      correlate(sheets.x_turned, sheets.grad_h_turned, taps.h, sum_h.sums.data());
      correlate(sheets.x, sheets.grad_v, taps.v, sum_v.sums.data());
      correlate(sheets.x, sheets.grad_i, taps.c, sum_c.sums.data());
      filter(sheets.grad_h_turned, turned.h, sheets.out_turned, false);
      filter(sheets.grad_v, turned.v, sheets.out, false);
      filter(sheets.grad_i, turned.c, sheets.out, true);
      take_sum(sheets.out, sheets.out_turned, T(0), {grad_x + offset, step});
    }
    sum_h.store(taps.h, grad_kernel_h + r * s.breadth_h * s.length_h, 1, s.length_h);
    sum_v.store(taps.v, grad_kernel_v + r * s.breadth_v * s.length_v, s.breadth_v, 1);
    sum_c.store(taps.c, grad_kernel_c + r * s.small * s.small, s.small, 1);
  }
}

#define SWCONV_INSTANTIATE(T)                                                                                          \
  template int64_t strip_tasks<T>(const StripSizes&);                                                                  \
  template void strip_branches_cpu<T>(const StripSizes&, const T*, const T*, const T*, const T*, T*, T*, T*, int64_t,  \
                                      int64_t);                                                                        \
  template void strip_mix_cpu<T>(const StripSizes&, const T*, const T*, const T*, const T*, const T*, T*, int64_t,     \
                                 int64_t);                                                                             \
  template void strip_branches_backward_cpu<T>(const StripSizes&, const T*, const T*, const T*, const T*, const T*,    \
                                               const T*, const T*, T*, T*, T*, T*, int64_t, int64_t);
SWCONV_INSTANTIATE(float)
SWCONV_INSTANTIATE(double)
#undef SWCONV_INSTANTIATE

}  // namespace swconv
