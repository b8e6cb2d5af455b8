// The strip form on the CPU. Formulas in swconv.h. setup.py compiles this file once for every set of vector instructions
// (SWCONV_CPU names it, the flags set the width), and strip_kernels in binding.cpp takes the best that the processor has.
// So nothing here may leave this file but strip_kernels_<name>: a function of the standard library that the linker shares
// could hold instructions that another processor lacks.
//
// Vector lanes are channels. A block of channels of one image is copied to a plane with one vector per pixel and a zero
// margin; there the horizontal and the vertical strip are one routine with the two strides exchanged, taps and pixels
// outside the map cost nothing, and an image's result does not depend on its neighbours.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "swconv.h"

#define SWCONV_JOIN(a, b) a##b
#define SWCONV_NAMED(a, b) SWCONV_JOIN(a, b)
#define SWCONV_INLINE inline __attribute__((always_inline))

namespace swconv {
namespace {

// kRows x kColumns sums of a tile stay in registers, at most kSums of them.
#if defined(__AVX512F__)
constexpr int kBytes = 64, kRows = 7, kColumns = 4, kSums = 24;
#elif defined(__AVX__)
constexpr int kBytes = 32, kRows = 6, kColumns = 3, kSums = 12;
#else
constexpr int kBytes = 16, kRows = 6, kColumns = 3, kSums = 12;
#endif
constexpr int kTaps = 4, kAcross = 3;  // sums of a tile of the weight gradient

template <class T>
struct Lanes {
  typedef T vector __attribute__((vector_size(kBytes)));
  static constexpr int count = kBytes / sizeof(T);
};
template <class T>
using vector_t = typename Lanes<T>::vector;

template <class T>
SWCONV_INLINE vector_t<T> load(const T* from) {
  vector_t<T> v;
  __builtin_memcpy(&v, from, sizeof(v));
  return v;
}
template <class T>
SWCONV_INLINE void save(T* to, const vector_t<T>& v) {
  __builtin_memcpy(to, &v, sizeof(v));
}

SWCONV_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
SWCONV_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

template <class T>
struct Memory {
  T* data;

  explicit Memory(int64_t count) {
    const size_t bytes = (static_cast<size_t>(most(count, 1)) * sizeof(T) + 63) / 64 * 64;
    data = static_cast<T*>(std::aligned_alloc(64, bytes));
    if (data == nullptr) throw std::bad_alloc();
    std::memset(static_cast<void*>(data), 0, bytes);
  }
  Memory(const Memory&) = delete;
  ~Memory() { std::free(data); }
};

// ---- between a tensor's layout and one vector per pixel

template <class T, size_t... J>
SWCONV_INLINE void interleave(vector_t<T> a, vector_t<T> b, vector_t<T>* to, std::index_sequence<J...>) {
  constexpr size_t n = sizeof...(J);
  to[0] = __builtin_shufflevector(a, b, (J / 2 + J % 2 * n)...);
  to[1] = __builtin_shufflevector(a, b, (n / 2 + J / 2 + J % 2 * n)...);
}

// Transpose a square of lanes x lanes: as many perfect shuffles of its rows as the number of lanes has bits.
template <class T>
SWCONV_INLINE void transpose(vector_t<T>* square) {
  constexpr int n = Lanes<T>::count;
  vector_t<T> other[n];
#pragma GCC unroll 4
  for (int step = 1; step < n; step *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < n / 2; ++i)
      interleave<T>(square[i], square[i + n / 2], other + 2 * i, std::make_index_sequence<n>());
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) square[i] = other[i];
  }
}

// One vector per pixel: (y, x) at origin + y * row + x * column.
template <class T>
struct Pixels {
  T* origin;
  int64_t row, column, width;

  // Calls body(pointer to the pixel) for pixels p .. p + count - 1, counted along the rows.
  template <class Body>
  SWCONV_INLINE void walk(int64_t p, int64_t count, const Body& body) const {
    int64_t x = p % width;
    T* at = origin + p / width * row + x * column;
    for (int64_t i = 0; i < count; ++i) {
      body(at, i);
      at += column;
      if (++x == width) x = 0, at += row - width * column;
    }
  }
};

// Where a block of channels of one image lies in a tensor: channel c of pixel p at data[c * channel + p * pixel].
template <class T>
struct Block {
  T* data;
  int64_t channel, pixel, channels, pixels;

  bool whole() const { return channels == Lanes<T>::count; }
};

template <class T>
void copy_in(const Block<const T>& from, const Pixels<T>& to) {
  constexpr int64_t n = Lanes<T>::count;
  int64_t done = 0;
  if (from.whole() && from.channel == 1) {
    to.walk(0, from.pixels, [&](T* at, int64_t p) { save(at, load(from.data + p * from.pixel)); });
    done = from.pixels;
  } else if (from.whole() && from.pixel == 1) {
    for (; done + n <= from.pixels; done += n) {
      vector_t<T> square[n];
      for (int64_t c = 0; c < n; ++c) square[c] = load(from.data + c * from.channel + done);
      transpose<T>(square);
      to.walk(done, n, [&](T* at, int64_t i) { save(at, square[i]); });
    }
  }
  to.walk(done, from.pixels - done, [&](T* at, int64_t i) {
    for (int64_t c = 0; c < from.channels; ++c) at[c] = from.data[c * from.channel + (done + i) * from.pixel];
  });
}

template <class T>
void copy_out(const Pixels<T>& from, const Block<T>& to) {
  constexpr int64_t n = Lanes<T>::count;
  int64_t done = 0;
  if (to.whole() && to.pixel == 1) {
    for (; done + n <= to.pixels; done += n) {
      vector_t<T> square[n];
      from.walk(done, n, [&](const T* at, int64_t i) { square[i] = load(at); });
      transpose<T>(square);
      for (int64_t c = 0; c < n; ++c) save(to.data + c * to.channel + done, square[c]);
    }
  }
  from.walk(done, to.pixels - done, [&](const T* at, int64_t i) {
    for (int64_t c = 0; c < to.channels; ++c) to.data[c * to.channel + (done + i) * to.pixel] = at[c];
  });
}

// ---- a strip

// The taps of a strip for a block of channels, one vector each: tap t of column a at (a * length + t) * lanes.
template <class T>
struct Strip {
  int64_t length, breadth, anchor, along, across;  // steps of t and of a in the kernel
  Memory<T> kernel, taps, turned;                  // `turned`: by half a turn, for the adjoint

  Strip(int64_t length, int64_t breadth, int64_t anchor, int64_t along, int64_t across)
      : length(length), breadth(breadth), anchor(anchor), along(along), across(across), kernel(vectors()),
        taps(vectors()), turned(vectors()) {}

  int64_t count() const { return length * breadth; }
  int64_t vectors() const { return count() * Lanes<T>::count; }

  // channels: those of the block, `count()` values each, one channel behind the other.
  void set(const T* from, int64_t channels) {
    constexpr int64_t n = Lanes<T>::count;
    copy_in<T>({from, count(), 1, channels, count()}, {kernel.data, 0, n, count()});
    for (int64_t a = 0; a < breadth; ++a)
      for (int64_t t = 0; t < length; ++t) {
        const vector_t<T> tap = load(kernel.data + (t * along + a * across) * n);
        const int64_t place = a * length + t;
        save(taps.data + place * n, tap);
        save(turned.data + (count() - 1 - place) * n, tap);
      }
  }

  // Add the centred small kernel of the same breadth, so that it costs nothing; false where it does not fit.
  bool absorb(const Strip& small) {
    constexpr int64_t n = Lanes<T>::count;
    const int64_t first = anchor - small.anchor;
    if (small.breadth != breadth || first < 0 || first + small.length > length) return false;
    for (int64_t a = 0; a < breadth; ++a)
      for (int64_t t = 0; t < small.length; ++t) {
        T* tap = taps.data + (a * length + first + t) * n;
        save(tap, load(tap) + load(small.taps.data + (a * small.length + t) * n));
      }
    return true;
  }
};

// out[o, s] = sum_a sum_t taps[a][t] in[o + t - anchor, s + a - breadth / 2], o along the strip, s across it.
template <class T>
struct Filter {
  int64_t length, breadth, anchor, size_along, size_across;
  const T *taps, *in;
  int64_t in_along, in_across;
  T* out;
  int64_t out_along, out_across;
  const T* bias;  // one vector, or null
  bool add;       // to what is there
};

template <class T, int R, int K>
void filter_tile(const Filter<T>& f, int64_t o, int64_t s) {
  constexpr int64_t n = Lanes<T>::count;
  T* out = f.out + o * f.out_along + s * f.out_across;
  vector_t<T> sum[R][K] = {};
  if (f.bias) {
    const vector_t<T> bias = load(f.bias);
#pragma GCC unroll 8
    for (int j = 0; j < R; ++j)
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) sum[j][k] = bias;
  }
  const int64_t begin = most(0, o - f.anchor), end = least(f.size_along, o + R - 1 + f.length - f.anchor);
  const T* line = f.in + begin * f.in_along + (s - f.breadth / 2) * f.in_across;
  for (int64_t r = begin; r < end; ++r, line += f.in_along) {
    const int64_t first = r - o + f.anchor;  // tap of the tile's first row; row j has tap first - j
    const T *x = line, *tap = f.taps + first * n;
    if (first >= R - 1 && first < f.length) {
      for (int64_t a = 0; a < f.breadth; ++a, x += f.in_across, tap += f.length * n) {
        vector_t<T> pixel[K];
#pragma GCC unroll 4
        for (int k = 0; k < K; ++k) pixel[k] = load(x + k * f.in_across);
#pragma GCC unroll 8
        for (int j = 0; j < R; ++j) {
          const vector_t<T> w = load(tap - j * n);
#pragma GCC unroll 4
          for (int k = 0; k < K; ++k) sum[j][k] += w * pixel[k];
        }
      }
    } else {
      for (int64_t a = 0; a < f.breadth; ++a, x += f.in_across, tap += f.length * n) {
        vector_t<T> pixel[K];
#pragma GCC unroll 4
        for (int k = 0; k < K; ++k) pixel[k] = load(x + k * f.in_across);
#pragma GCC unroll 8
        for (int j = 0; j < R; ++j) {
          if (first < j || first - j >= f.length) continue;
          const vector_t<T> w = load(tap - j * n);
#pragma GCC unroll 4
          for (int k = 0; k < K; ++k) sum[j][k] += w * pixel[k];
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < R; ++j)
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) {
      T* to = out + j * f.out_along + k * f.out_across;
      save(to, f.add ? load(to) + sum[j][k] : sum[j][k]);
    }
}

template <class T>
using FilterTile = void (*)(const Filter<T>&, int64_t, int64_t);

template <class T, int R, int K>
constexpr FilterTile<T> filter_tile_or_null() {
  if constexpr (R * K <= kSums)
    return filter_tile<T, R, K>;
  else
    return nullptr;
}

// Tiles by rows and columns, from 1 on.
template <class T>
struct FilterTiles {
  FilterTile<T> of[kRows][kColumns];

  constexpr FilterTiles() : of() { fill(std::make_index_sequence<kRows * kColumns>()); }
  template <size_t... I>
  constexpr void fill(std::index_sequence<I...>) {
    ((of[I / kColumns][I % kColumns] = filter_tile_or_null<T, I / kColumns + 1, I % kColumns + 1>()), ...);
  }
};

// Cycles that one line of input costs a tile: multiplications, loads, or waiting for the last sum.
constexpr double line_cost(int64_t rows, int64_t columns) {
  const double most_of_two = rows * columns > rows + columns ? rows * columns / 2.0 : (rows + columns) / 2.0;
  return rows == 0 || columns == 0 ? 0 : most_of_two > 4 ? most_of_two : 4;
}

struct TileSize {
  int64_t rows, columns;
};

// The tile that covers a map of along x across pixels at the least cost.
TileSize best_tile(int64_t along, int64_t across) {
  TileSize best{1, 1};
  double least_cost = -1;
  for (int64_t r = 1; r <= kRows; ++r)
    for (int64_t k = 1; k <= kColumns && r * k <= kSums; ++k) {
      const int64_t tall = along / r, wide = across / k, low = along % r, slim = across % k;
      const double cost = tall * (wide * line_cost(r, k) + line_cost(r, slim)) +
                          (wide * line_cost(low, k) + line_cost(low, slim));
      if (least_cost < 0 || cost < least_cost) best = {r, k}, least_cost = cost;
    }
  return best;
}

template <class T>
void filter(const Filter<T>& f) {
  static constexpr FilterTiles<T> tiles{};
  const TileSize tile = best_tile(f.size_along, f.size_across);
  for (int64_t s = 0; s < f.size_across; s += tile.columns)
    for (int64_t o = 0; o < f.size_along; o += tile.rows)
      tiles.of[least(tile.rows, f.size_along - o) - 1][least(tile.columns, f.size_across - s) - 1](f, o, s);
}

// sums[a][t] += sum_o sum_s grad[o, s] in[o + t - anchor, s + a - breadth / 2]: the adjoint of Filter in its taps.
template <class T>
struct Correlation {
  int64_t length, breadth, anchor, size_along, size_across;
  const T *in, *grad;  // one layout
  int64_t along, across;
  T* sums;
};

template <class T, int R, int A>
void correlation_tile(const Correlation<T>& c, int64_t t, int64_t a) {
  constexpr int64_t n = Lanes<T>::count;
  vector_t<T> sum[R][A] = {};
  const int64_t begin = most(0, c.anchor - t - (R - 1)), end = least(c.size_along, c.size_along + c.anchor - t);
  for (int64_t o = begin; o < end; ++o) {
    const int64_t first = o + t - c.anchor;  // the line of input for tap t; tap t + j has line first + j
    const T *x = c.in + first * c.along + (a - c.breadth / 2) * c.across, *g = c.grad + o * c.along;
    if (first >= 0 && first + R <= c.size_along) {
      for (int64_t s = 0; s < c.size_across; ++s, x += c.across, g += c.across) {
        const vector_t<T> grad = load(g);
#pragma GCC unroll 8
        for (int j = 0; j < R; ++j)
#pragma GCC unroll 4
          for (int b = 0; b < A; ++b) sum[j][b] += grad * load(x + j * c.along + b * c.across);
      }
    } else {
      for (int64_t s = 0; s < c.size_across; ++s, x += c.across, g += c.across) {
        const vector_t<T> grad = load(g);
#pragma GCC unroll 8
        for (int j = 0; j < R; ++j) {
          if (first + j < 0 || first + j >= c.size_along) continue;
#pragma GCC unroll 4
          for (int b = 0; b < A; ++b) sum[j][b] += grad * load(x + j * c.along + b * c.across);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < R; ++j)
#pragma GCC unroll 4
    for (int b = 0; b < A; ++b) {
      T* to = c.sums + ((a + b) * c.length + t + j) * n;
      save(to, load(to) + sum[j][b]);
    }
}

template <class T>
struct CorrelationTiles {
  void (*of[kTaps][kAcross])(const Correlation<T>&, int64_t, int64_t);

  constexpr CorrelationTiles() : of() { fill(std::make_index_sequence<kTaps * kAcross>()); }
  template <size_t... I>
  constexpr void fill(std::index_sequence<I...>) {
    ((of[I / kAcross][I % kAcross] = correlation_tile<T, I / kAcross + 1, I % kAcross + 1>), ...);
  }
};

template <class T>
void correlate(const Correlation<T>& c) {
  static constexpr CorrelationTiles<T> tiles{};
  for (int64_t a = 0; a < c.breadth; a += kAcross)
    for (int64_t t = 0; t < c.length; t += kTaps)
      tiles.of[least(kTaps, c.length - t) - 1][least(kAcross, c.breadth - a) - 1](c, t, a);
}

// ---- a task: a block of channels of some images

// The pixels of one image with a margin of zeros.
template <class T>
struct Plane {
  Memory<T> memory;
  Pixels<T> pixels;

  Plane(const StripSizes& s, int64_t margin)
      : memory((s.height + 2 * margin) * (s.width + 2 * margin) * Lanes<T>::count), pixels{nullptr, 0, 0, s.width} {
    pixels.column = Lanes<T>::count;
    pixels.row = (s.width + 2 * margin) * pixels.column;
    pixels.origin = memory.data + margin * (pixels.row + pixels.column);
  }
};

template <class T>
struct Task {
  const StripSizes& s;
  int64_t channel, channels, begin, end;  // images begin <= b < end
  Strip<T> h, v, c;

  Task(const StripSizes& s, int64_t task, const T* kernel_h, const T* kernel_v, const T* kernel_c)
      : s(s), channel(task % strip_blocks(s, Lanes<T>::count) * Lanes<T>::count),
        channels(least(Lanes<T>::count, s.channels - channel)),
        begin(task / strip_blocks(s, Lanes<T>::count) * kStripImages), end(least(begin + kStripImages, s.images)),
        h(s.length_h, s.breadth_h, s.anchor_h, 1, s.length_h), v(s.length_v, s.breadth_v, s.anchor_v, s.breadth_v, 1),
        c(s.small, s.small, s.small / 2, s.small, 1) {
    h.set(kernel_h + channel * h.count(), channels);
    v.set(kernel_v + channel * v.count(), channels);
    c.set(kernel_c + channel * c.count(), channels);
  }

  int64_t margin() const { return most(most(s.breadth_h, s.breadth_v), s.small) / 2; }

  template <class U>
  Block<U> block(U* tensor, int64_t image) const {
    const int64_t pixels = s.height * s.width;
    return {tensor + image * s.channels * pixels + channel * s.channel_step, s.channel_step, s.pixel_step, channels,
            pixels};
  }

  // Calls body(pixels to write) and sees to it that what it writes is in the tensor.
  template <class Body>
  void write(T* tensor, int64_t image, const Plane<T>& spare, const Body& body) const {
    const Block<T> to = block(tensor, image);
    if (to.whole() && to.channel == 1) return body(Pixels<T>{to.data, s.width * to.pixel, to.pixel, s.width});
    body(spare.pixels);
    copy_out(spare.pixels, to);
  }

  // The horizontal strip (or, `tall`, the vertical one) of `in`.
  Filter<T> filter_of(const Strip<T>& strip, bool tall, bool adjoint, const Pixels<T>& in, const Pixels<T>& out,
                      bool add, const T* bias = nullptr) const {
    const int64_t anchor = adjoint ? strip.length - 1 - strip.anchor : strip.anchor;
    const T* taps = adjoint ? strip.turned.data : strip.taps.data;
    if (tall)
      return {strip.length, strip.breadth, anchor, s.height, s.width, taps, in.origin, in.row, in.column,
              out.origin, out.row, out.column, bias, add};
    return {strip.length, strip.breadth, anchor, s.width, s.height, taps, in.origin, in.column, in.row,
            out.origin, out.column, out.row, bias, add};
  }

  Correlation<T> correlation_of(const Strip<T>& strip, bool tall, const Pixels<T>& in, const Pixels<T>& grad,
                                T* sums) const {
    if (tall)
      return {strip.length, strip.breadth, strip.anchor, s.height, s.width, in.origin, grad.origin, in.row, in.column,
              sums};
    return {strip.length, strip.breadth, strip.anchor, s.width, s.height, in.origin, grad.origin, in.column, in.row,
            sums};
  }
};

template <class T>
void branches(const StripSizes& s, const T* x, const T* kernel_h, const T* kernel_v, const T* kernel_c, T* h, T* v,
              T* i, int64_t begin, int64_t end) {
  for (int64_t number = begin; number < end; ++number) {
    const Task<T> task(s, number, kernel_h, kernel_v, kernel_c);
    const Plane<T> in(s, task.margin()), spare(s, 0);
    for (int64_t image = task.begin; image < task.end; ++image) {
      copy_in<T>(task.block(x, image), in.pixels);
      const auto write = [&](const Strip<T>& strip, bool tall, T* tensor) {
        task.write(tensor, image, spare, [&](const Pixels<T>& out) {
          filter(task.filter_of(strip, tall, false, in.pixels, out, false));
        });
      };
      write(task.h, false, h);
      write(task.v, true, v);
      write(task.c, true, i);
    }
  }
}

template <class T>
void mix(const StripSizes& s, const T* x, const T* kernel_h, const T* kernel_v, const T* kernel_c, const T* bias, T* y,
         int64_t begin, int64_t end) {
  for (int64_t number = begin; number < end; ++number) {
    Task<T> task(s, number, kernel_h, kernel_v, kernel_c);
    const bool absorbed = task.v.absorb(task.c);
    const Memory<T> shift(Lanes<T>::count);
    for (int64_t c = 0; bias && c < task.channels; ++c) shift.data[c] = bias[task.channel + c];
    const Plane<T> in(s, task.margin()), spare(s, 0);
    for (int64_t image = task.begin; image < task.end; ++image) {
      copy_in<T>(task.block(x, image), in.pixels);
      task.write(y, image, spare, [&](const Pixels<T>& out) {
        filter(task.filter_of(task.v, true, false, in.pixels, out, false, shift.data));
        filter(task.filter_of(task.h, false, false, in.pixels, out, true));
        if (!absorbed) filter(task.filter_of(task.c, true, false, in.pixels, out, true));
      });
    }
  }
}

template <class T>
void backward(const StripSizes& s, const T* grad_h, const T* grad_v, const T* grad_i, const T* x, const T* kernel_h,
              const T* kernel_v, const T* kernel_c, T* grad_x, T* partial, int64_t begin, int64_t end) {
  constexpr int64_t n = Lanes<T>::count;
  for (int64_t number = begin; number < end; ++number) {
    const Task<T> task(s, number, kernel_h, kernel_v, kernel_c);
    const Plane<T> in(s, task.margin()), grad(s, task.margin()), spare(s, 0);
    const struct {
      const T* grad;
      const Strip<T>& strip;
      bool tall;
      Memory<T> sums;
    } parts[] = {{grad_h, task.h, false, Memory<T>(task.h.vectors())},
                 {grad_v, task.v, true, Memory<T>(task.v.vectors())},
                 {grad_i, task.c, true, Memory<T>(task.c.vectors())}};
    for (int64_t image = task.begin; image < task.end; ++image) {
      copy_in<T>(task.block(x, image), in.pixels);
      task.write(grad_x, image, spare, [&](const Pixels<T>& out) {
        const T* there = nullptr;
        for (const auto& part : parts) {
          if (part.grad != there) copy_in<T>(task.block(part.grad, image), grad.pixels);
          there = part.grad;
          correlate(task.correlation_of(part.strip, part.tall, in.pixels, grad.pixels, part.sums.data));
          filter(task.filter_of(part.strip, part.tall, true, grad.pixels, out, &part != parts));
        }
      });
    }
    const int64_t taps = strip_taps(s);
    T* to = partial + (task.begin / kStripImages * s.channels + task.channel) * taps;
    for (const auto& part : parts) {
      const Strip<T>& k = part.strip;
      for (int64_t c = 0; c < task.channels; ++c)
        for (int64_t a = 0; a < k.breadth; ++a)
          for (int64_t t = 0; t < k.length; ++t)
            to[c * taps + t * k.along + a * k.across] = part.sums.data[(a * k.length + t) * n + c];
      to += k.count();
    }
  }
}

}  // namespace

template <class T>
StripKernels<T> SWCONV_NAMED(strip_kernels_, SWCONV_CPU)() {
  return {Lanes<T>::count, branches<T>, mix<T>, backward<T>};
}
template StripKernels<float> SWCONV_NAMED(strip_kernels_, SWCONV_CPU)<float>();
template StripKernels<double> SWCONV_NAMED(strip_kernels_, SWCONV_CPU)<double>();

}  // namespace swconv
