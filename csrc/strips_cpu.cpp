// The strip form on the CPU. Formulas in swconv.h. setup.py compiles this file once for every set of vector instructions
// (SWCONV_CPU names it, the flags set the width), and strip_kernels in binding.cpp takes the best that the processor has.
// So nothing here may leave this file but strip_kernels_<name>: a function of the standard library that the linker shares
// could hold instructions that another processor lacks.
//
// Vector lanes are channels. A block of channels of one image is copied to a plane with one vector per pixel and a zero
// margin; there the horizontal and the vertical strip are one routine with the two strides exchanged, taps and pixels
// outside the map cost nothing, and an image's result does not depend on its neighbours.
#include <iterator>
#include <type_traits>
#include <utility>

#include "lanes.h"
#include "swconv.h"

namespace swconv {
namespace {

// kRows x kColumns pixels of a tile at most; kSums sums of it stay in registers.
constexpr int kSums = kBytes == 64 ? 24 : 12;
constexpr int kRows = 7, kColumns = 4;
constexpr int kTaps = 4, kAcross = 3;       // sums of a tile of the weight gradient
constexpr int kQuadTaps = 8, kOutputs = 4;  // in quads: sums of a tile, and gradients beside them
constexpr int kQuad = 4, kFactors = 6;      // neighbours that are computed at once, and what they are computed from
constexpr int kQuadsFrom = 10;              // taps that a strip needs for quads to pay

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
      step(at, x);
    }
  }
  // The same for a square's pixels, so that vectors numbered by the pixels stay in registers.
  template <class Body>
  SWCONV_INLINE void walk_square(int64_t p, const Body& body) const {
    int64_t x = p % width;
    T* at = origin + p / width * row + x * column;
#pragma GCC unroll 16
    for (int i = 0; i < Lanes<T>::count; ++i) {
      body(at, i);
      step(at, x);
    }
  }
  SWCONV_INLINE void step(T*& at, int64_t& x) const {
    const bool last = x + 1 == width;
    at += last ? row - (width - 1) * column : column;
    x = last ? 0 : x + 1;
  }
};

// Where a block of channels of one image lies in a tensor: channel c of pixel p at data[c * channel + p * pixel]. The block
// that will be needed next lies `next` behind it, and is fetched on the way.
template <class T>
struct Block {
  T* data;
  int64_t channel, pixel, channels, pixels, next = 0;

  // Of the pixels, so many from the first on lie before the block's end with a whole vector each. Where the block is
  // narrower than a vector, the lanes left over hold what comes next, and nobody uses them.
  int64_t readable() const {
    const int64_t room = (pixels - 1) * pixel + channels - Lanes<T>::count;
    return room < 0 ? 0 : least(pixels, room / most(pixel, 1) + 1);
  }
};

// Squares cover the pixels where there are enough for one: the last square goes over pixels of the one before again.
template <class T>
void copy_in(const Block<const T>& from, const Pixels<T>& to) {
  constexpr int64_t n = Lanes<T>::count;
  int64_t done = 0;
  if (from.channel == 1) {
    done = from.readable();
    to.walk(0, done, [&](T* at, int64_t p) {
      __builtin_prefetch(from.data + p * from.pixel + from.next, 0, 2);
      save(at, load(from.data + p * from.pixel));
    });
  } else if (from.pixel == 1) {
    for (; from.pixels >= n && done < from.pixels; done += n) {
      const int64_t first = least(done, from.pixels - n);
      vector_t<T> square[n];
#pragma GCC unroll 16
      for (int64_t c = 0; c < n; ++c) {
        const T* pixels = from.data + least(c, from.channels - 1) * from.channel + first;
        __builtin_prefetch(pixels + from.next, 0, 2);
        square[c] = load(pixels);
      }
      transpose<T>(square);
      to.walk_square(first, [&](T* at, int i) SWCONV_INLINED { save(at, square[i]); });
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
  if (to.pixel == 1) {
    for (; to.pixels >= n && done < to.pixels; done += n) {
      const int64_t first = least(done, to.pixels - n);
      vector_t<T> square[n];
      from.walk_square(first, [&](const T* at, int i) SWCONV_INLINED { square[i] = load(at); });
      transpose<T>(square);
#pragma GCC unroll 16
      for (int64_t c = 0; c < n; ++c) {
        if (c >= to.channels) break;
        T* pixels = to.data + c * to.channel + first;
        __builtin_prefetch(pixels + to.next, 1, 2);
        save(pixels, square[c]);
      }
    }
  }
  from.walk(done, to.pixels - done, [&](const T* at, int64_t i) {
    for (int64_t c = 0; c < to.channels; ++c) to.data[c * to.channel + (done + i) * to.pixel] = at[c];
  });
}

// ---- a strip

// How a strip lies in a kernel: tap t of column a at t * along + a * across.
struct Shape {
  int64_t length, breadth, anchor, along, across;
};

// Four neighbours across a strip of three columns at once, by Winograd's F(4, 3) (Lavin and Gray 2016) at the points 0, +-a,
// +-b and infinity with a^2 = 1/2 and b^2 = 2, whose rounding errors are less than half of the usual ones': six sums over the
// taps do the work of twelve. Factors of the four inputs and their two neighbours x[-1] to x[4]; of the three columns of taps;
// and, for the adjoint in the taps, of the four gradients. A sum m is over the products of factors m of inputs and taps.
template <class T>
struct Winograd {
  using V = vector_t<T>;
  static constexpr T a = static_cast<T>(0.70710678118654752440), b = static_cast<T>(1.41421356237309504880);

  static SWCONV_INLINE void inputs(const V (&x)[kFactors], V (&f)[kFactors]) {
    const V even_a = x[4] - 2 * x[2], odd_a = a * (x[3] - 2 * x[1]), even_b = x[4] - x[2] / 2, odd_b = b * (x[3] - x[1] / 2);
    f[0] = x[0] - T(2.5) * x[2] + x[4];
    f[1] = even_a + odd_a, f[2] = even_a - odd_a;
    f[3] = even_b + odd_b, f[4] = even_b - odd_b;
    f[5] = x[1] - T(2.5) * x[3] + x[5];
  }

  static SWCONV_INLINE void taps(V left, V middle, V right, V (&f)[kFactors]) {
    const V even_a = (left + right / 2) / T(-1.5), odd_a = middle * (a / T(-1.5));
    const V even_b = (left + right * 2) / 6, odd_b = middle * (b / 6);
    f[0] = left;
    f[1] = even_a + odd_a, f[2] = even_a - odd_a;
    f[3] = even_b + odd_b, f[4] = even_b - odd_b;
    f[5] = right;
  }

  static SWCONV_INLINE void gradients(const V (&g)[kQuad], V (&f)[kFactors]) {
    const V even_a = g[0] + g[2] / 2, odd_a = a * (g[1] + g[3] / 2), even_b = g[0] + 2 * g[2], odd_b = b * (g[1] + 2 * g[3]);
    f[0] = g[0];
    f[1] = even_a + odd_a, f[2] = even_a - odd_a;
    f[3] = even_b + odd_b, f[4] = even_b - odd_b;
    f[5] = g[3];
  }

  // The gradients of the three columns from those of the taps' factors.
  static SWCONV_INLINE void columns(const V (&f)[kFactors], V& left, V& middle, V& right) {
    const V even_a = (f[1] + f[2]) / T(-1.5), even_b = (f[3] + f[4]) / 6;
    left = f[0] + even_a + even_b;
    middle = (f[1] - f[2]) * (a / T(-1.5)) + (f[3] - f[4]) * (b / 6);
    right = even_a / 2 + even_b * 2 + f[5];
  }
};

// The taps of a strip that can meet a map of `along` pixels along it, for a block of channels, one vector each.
//
// Plainly, tap t of column a is at (a * length + t) * lanes. In quads, a factor takes the place of a column.
template <class T>
struct Strip {
  static constexpr int64_t n = Lanes<T>::count;
  Shape shape;
  int64_t first, length, breadth, anchor;  // `first` of the kernel's taps
  bool quads, turned = false, laid = false;
  Memory<T> kernel, taps, plain;           // `plain`: beside quads, where they cannot be used

  Strip(const Shape& shape, int64_t along, int64_t across)
      : shape(shape), first(most(0, shape.anchor - (along - 1))), length(least(shape.length, shape.anchor + along) - first),
        breadth(shape.breadth), anchor(shape.anchor - first),
        quads(breadth == 3 && length >= kQuadsFrom && across > kQuad / 2), kernel(count() * n), taps(size_of_taps()),
        plain(quads ? breadth * length * n : 0) {}

  int64_t size_of_taps() const { return (quads ? kFactors : breadth) * length * n; }

  int64_t count() const { return shape.length * shape.breadth; }
  T* value(int64_t a, int64_t t) const { return kernel.data + ((first + t) * shape.along + a * shape.across) * n; }

  // The kernel of a block of channels, `count()` values each, one channel behind the other.
  void read(const T* from, int64_t channels) {
    copy_in<T>({from, count(), 1, channels, count()}, {kernel.data, 0, n, count()});
  }

  // Add a centred small kernel of the same breadth, so that it costs nothing; false where it does not fit.
  bool absorb(const Strip& small) {
    const int64_t before = shape.anchor - small.shape.anchor;
    if (small.breadth != breadth || before < 0 || before + small.shape.length > shape.length) return false;
    for (int64_t t = 0; t < small.shape.length; ++t)
      for (int64_t a = 0; a < breadth; ++a) {
        T* to = kernel.data + ((before + t) * shape.along + a * shape.across) * n;
        save(to, load(to) + load(small.kernel.data + (t * small.shape.along + a * small.shape.across) * n));
      }
    return true;
  }

  // Lay out the taps; `turn` the kernel by half a turn, for the adjoint.
  void lay(bool turn) {
    turned = turn, laid = false;
    if (!quads) return lay_plainly(taps.data);
    for (int64_t t = 0; t < length; ++t) {
      vector_t<T> factors[kFactors];
      Winograd<T>::taps(column(0, t), column(1, t), column(2, t), factors);
      for (int64_t m = 0; m < kFactors; ++m) save(taps.data + (m * length + t) * n, factors[m]);
    }
  }
  vector_t<T> column(int64_t a, int64_t t) const {
    return load(turned ? value(breadth - 1 - a, length - 1 - t) : value(a, t));
  }
  void lay_plainly(T* to) const {
    for (int64_t a = 0; a < breadth; ++a)
      for (int64_t t = 0; t < length; ++t, to += n) save(to, column(a, t));
  }
  const T* plain_taps() {
    if (!laid) lay_plainly(plain.data);
    laid = true;
    return plain.data;
  }

  // The kernel's gradients from those of the taps, which lie as the taps do.
  void gradient(const T* sums, T* to, int64_t step, int64_t channels) {
    const auto sum = [&](int64_t a, int64_t t) { return load(sums + (a * length + t) * n); };
    kernel.clear();
    for (int64_t t = 0; t < length; ++t) {
      if (quads) {
        vector_t<T> factors[kFactors], left, middle, right;
        for (int64_t m = 0; m < kFactors; ++m) factors[m] = sum(m, t);
        Winograd<T>::columns(factors, left, middle, right);
        save(value(0, t), left);
        save(value(1, t), middle);
        save(value(2, t), right);
      } else {
        for (int64_t a = 0; a < breadth; ++a) save(value(a, t), sum(a, t));
      }
    }
    copy_out<T>({kernel.data, 0, n, count()}, {to, step, 1, channels, count()});
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
  const T* plus;  // added, or null; it may be `out`
  int64_t plus_along, plus_across;
};

template <class T, int R, int K>
SWCONV_INLINE void finish(const Filter<T>& f, int64_t o, int64_t s, int64_t step, const vector_t<T> (&sum)[R][K]) {
  T* out = f.out + o * f.out_along + s * f.out_across;
  const T* plus = f.plus + o * f.plus_along + s * f.plus_across;
  const int64_t columns = (f.size_across - s + step - 1) / step;
#pragma GCC unroll 8
  for (int j = 0; j < R; ++j)
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) {
      if (k >= columns) break;
      vector_t<T> value = sum[j][k];
      if (f.plus) value += load(plus + j * f.plus_along + k * step * f.plus_across);
      save(out + j * f.out_along + k * step * f.out_across, value);
    }
}

template <class T, int R, int K>
SWCONV_INLINE void begin_with(const T* bias, vector_t<T> (&sum)[R][K]) {
  const vector_t<T> value = bias ? load(bias) : vector_t<T>{};
#pragma GCC unroll 8
  for (int j = 0; j < R; ++j)
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) sum[j][k] = value;
}

// Calls body(line, first, inside) for the lines of input that meet a tile of R rows at o: row j of the tile has tap
// first - j of that line, and all R of them where `inside`, a constant, is true.
template <int R, class Body>
SWCONV_INLINE void for_lines(int64_t o, int64_t anchor, int64_t length, int64_t size, const Body& body) {
  const int64_t begin = most(0, o - anchor), end = least(size, o + R - 1 + length - anchor);
  const int64_t full = most(begin, o - anchor + R - 1), partial = most(full, least(end, o - anchor + length));
  int64_t r = begin;
  for (; r < full && r < end; ++r) body(r, r - o + anchor, std::false_type());
  for (; r < partial; ++r) body(r, r - o + anchor, std::true_type());
  for (; r < end; ++r) body(r, r - o + anchor, std::false_type());
}

// How a tile is computed. `sums` lie in registers for each of its rows and columns.
struct Plain {
  static constexpr int sums = 1;
  template <class T, int R, int K>
  static void tile(const Filter<T>& f, int64_t o, int64_t s);
};
struct Small : Plain {  // for a kernel no longer than broad
  template <class T, int R, int K>
  static void tile(const Filter<T>& f, int64_t o, int64_t s);
};
struct Quads {
  static constexpr int sums = 2;
  template <class T, int R, int K>
  static void tile(const Filter<T>& f, int64_t o, int64_t s);
};

template <class T, int R, int K>
void Plain::tile(const Filter<T>& f, int64_t o, int64_t s) {
  constexpr int64_t n = Lanes<T>::count;
  vector_t<T> sum[R][K];
  begin_with<T, R, K>(f.bias, sum);
  for_lines<R>(o, f.anchor, f.length, f.size_along, [&](int64_t r, int64_t first, auto inside) SWCONV_INLINED {
    const T *x = f.in + r * f.in_along + (s - f.breadth / 2) * f.in_across, *tap = f.taps + first * n;
    for (int64_t a = 0; a < f.breadth; ++a, x += f.in_across, tap += f.length * n) {
      vector_t<T> pixel[K];
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) pixel[k] = load(x + k * f.in_across);
#pragma GCC unroll 8
      for (int j = 0; j < R; ++j) {
        if (!inside && (first < j || first - j >= f.length)) continue;
        const vector_t<T> w = load(tap - j * n);
#pragma GCC unroll 4
        for (int k = 0; k < K; ++k) sum[j][k] += w * pixel[k];
      }
    }
  });
  finish<T, R, K>(f, o, s, 1, sum);
}

// The margin holds zeros on all four sides.
template <class T, int R, int K>
void Small::tile(const Filter<T>& f, int64_t o, int64_t s) {
  constexpr int64_t n = Lanes<T>::count;
  vector_t<T> sum[R][K];
  begin_with<T, R, K>(f.bias, sum);
  for (int64_t t = 0; t < f.length; ++t) {
    const T* x = f.in + (o + t - f.anchor) * f.in_along + (s - f.breadth / 2) * f.in_across;
    for (int64_t a = 0; a < f.breadth; ++a, x += f.in_across) {
      const vector_t<T> w = load(f.taps + (a * f.length + t) * n);
#pragma GCC unroll 8
      for (int j = 0; j < R; ++j)
#pragma GCC unroll 4
        for (int k = 0; k < K; ++k) sum[j][k] += w * load(x + j * f.in_along + k * f.in_across);
    }
  }
  finish<T, R, K>(f, o, s, 1, sum);
}

// `in` holds the factors of K quads from s on, see Factors.
template <class T, int R, int K>
void Quads::tile(const Filter<T>& f, int64_t o, int64_t s) {
  constexpr int64_t n = Lanes<T>::count;
  constexpr T a = Winograd<T>::a, b = Winograd<T>::b;
  vector_t<T> even[R][K], odd[R][K], inner[2][R][K];  // the last does not stay in registers
  const auto add = [&](int m, int64_t r, int64_t first, auto inside, vector_t<T>(&sum)[R][K]) SWCONV_INLINED {
    const T *x = f.in + m * f.in_across + r * n, *tap = f.taps + (m * f.length + first) * n;
    vector_t<T> factor[K];
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) factor[k] = load(x + k * f.in_along);
#pragma GCC unroll 8
    for (int j = 0; j < R; ++j) {
      if (!inside && (first < j || first - j >= f.length)) continue;
      const vector_t<T> w = load(tap - j * n);
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) sum[j][k] += w * factor[k];
    }
  };
  const auto add_both = [&](int m_even, int m_odd) SWCONV_INLINED {
    for_lines<R>(o, f.anchor, f.length, f.size_along, [&](int64_t r, int64_t first, auto inside) SWCONV_INLINED {
      add(m_even, r, first, inside, even);
      add(m_odd, r, first, inside, odd);
    });
  };
  const auto each = [&](const auto& body) SWCONV_INLINED {
#pragma GCC unroll 8
    for (int j = 0; j < R; ++j)
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) body(j, k);
  };
  begin_with<T, R, K>(nullptr, even);
  begin_with<T, R, K>(nullptr, odd);
  add_both(1, 2);
  each([&](int j, int k) SWCONV_INLINED {
    inner[0][j][k] = even[j][k] + odd[j][k];
    inner[1][j][k] = even[j][k] - odd[j][k];
    even[j][k] = odd[j][k] = vector_t<T>{};
  });
  add_both(3, 4);
  const vector_t<T> bias = f.bias ? load(f.bias) : vector_t<T>{};
  each([&](int j, int k) SWCONV_INLINED {
    const vector_t<T> even_a = inner[0][j][k], odd_a = a * inner[1][j][k];
    const vector_t<T> even_b = even[j][k] + odd[j][k], odd_b = b * (even[j][k] - odd[j][k]);
    even[j][k] = bias + even_a + even_b;
    odd[j][k] = bias + odd_a / 2 + odd_b * 2;
    inner[0][j][k] = bias + odd_a + odd_b;
    inner[1][j][k] = bias + even_a / 2 + even_b * 2;
  });
  finish<T, R, K>(f, o, s + 1, kQuad, inner[0]);
  finish<T, R, K>(f, o, s + 2, kQuad, inner[1]);
  add_both(0, 5);
  finish<T, R, K>(f, o, s, kQuad, even);
  finish<T, R, K>(f, o, s + 3, kQuad, odd);
}

// Pixels seen along a strip.
template <class T>
struct View {
  T* origin;
  int64_t along, across;
};

// The factors of some quads: factor m of quad k on line r at origin + m * factor + k * column + r * lanes, with zeros before
// and behind every column.
template <class T>
struct Factors {
  static constexpr int64_t n = Lanes<T>::count, margin = kQuadTaps;
  int64_t column, factor;
  Memory<T> memory;
  T* origin;

  Factors(int64_t along, int64_t quads)
      : column((along + 2 * margin) * n), factor(quads * column), memory(kFactors * factor), origin(memory.data + margin * n) {}

  // Of the inputs at s and `quads` quads from there on. False where one of the first `channels` lanes holds a value that is
  // not finite: the factors would carry it to outputs that it does not reach.
  template <class U>
  bool inputs(const View<U>& in, int64_t s, int64_t quads, int64_t along, int64_t across, int64_t channels) {
    vector_t<T> nothing{};
    each<kFactors>(in, s - 1, quads, along, across, [&](const vector_t<T>(&x)[kFactors], vector_t<T>(&f)[kFactors]) SWCONV_INLINED {
      Winograd<T>::inputs(x, f);
      nothing += (f[0] + f[5]) * 0;
    });
    T sum = 0;
    for (int64_t c = 0; c < channels; ++c) sum += nothing[c];
    return sum == 0;
  }

  // Of the gradients, for the correlation.
  template <class U>
  void gradients(const View<U>& in, int64_t s, int64_t quads, int64_t along, int64_t across) {
    each<kQuad>(in, s, quads, along, across, [](const vector_t<T>(&x)[kQuad], vector_t<T>(&f)[kFactors]) SWCONV_INLINED {
      Winograd<T>::gradients(x, f);
    });
  }

  // Calls body(N pixels across, their factors to fill) for every line of every quad.
  template <int N, class U, class Body>
  SWCONV_INLINE void each(const View<U>& in, int64_t s, int64_t quads, int64_t along, int64_t across, const Body& body) {
    for (int64_t k = 0; k < quads; ++k, s += kQuad) {
      const T* x[N];
      for (int i = 0; i < N; ++i) x[i] = in.origin + least(s + i, across) * in.across;  // zeros at `across`, for all beyond
      T* to = origin + k * column;
      for (int64_t r = 0; r < along; ++r, to += n) {
        vector_t<T> pixels[N], factors[kFactors];
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) pixels[i] = load(x[i] + r * in.along);
        body(pixels, factors);
#pragma GCC unroll 8
        for (int m = 0; m < kFactors; ++m) save(to + m * factor, factors[m]);
      }
    }
  }
};

template <class T, class Kind>
struct Tiles {
  void (*of[kRows][kColumns])(const Filter<T>&, int64_t, int64_t);  // by rows and columns, from 1 on

  constexpr Tiles() : of() { fill(std::make_index_sequence<kRows * kColumns>()); }
  template <size_t... I>
  constexpr void fill(std::index_sequence<I...>) {
    ((of[I / kColumns][I % kColumns] = one<I / kColumns + 1, I % kColumns + 1>()), ...);
  }
  template <int R, int K>
  static constexpr auto one() -> void (*)(const Filter<T>&, int64_t, int64_t) {
    if constexpr (R * K * Kind::sums <= kSums)
      return Kind::template tile<T, R, K>;
    else
      return nullptr;
  }
};

struct TileSize {
  int64_t rows, columns;
};

// The tile that covers a map of along x across pixels (or quads) at the least cost. A line of input costs it the greater
// number of multiplications and of loads (taps are nearer than pixels), or waiting for the last sum; the tile, its stores.
TileSize best_tile(int64_t along, int64_t across, int64_t length, int64_t sums) {
  const auto cost = [&](int64_t rows, int64_t columns) {
    const int64_t sum = sums * rows * columns, loads = sums * (rows + 3 * columns);
    return rows && columns ? least(length, along) * most(most(sum, loads), 8) + 2 * sum + 16 : 0;
  };
  TileSize best{1, 1};
  int64_t least_cost = -1;
  for (int64_t r = 1; r <= kRows; ++r)
    for (int64_t k = 1; k <= kColumns && r * k * sums <= kSums; ++k) {
      const int64_t tall = along / r, wide = across / k, low = along % r, slim = across % k;
      const int64_t whole = tall * (wide * cost(r, k) + cost(r, slim)) + wide * cost(low, k) + cost(low, slim);
      if (least_cost < 0 || whole < least_cost) best = {r, k}, least_cost = whole;
    }
  return best;
}

// Rows of tiles one below the other, `columns` wide from s on.
template <class Kind, class T>
void column_of(const Filter<T>& f, int64_t rows, int64_t columns, int64_t s) {
  static constexpr Tiles<T, Kind> tiles{};
  for (int64_t o = 0; o < f.size_along; o += rows) tiles.of[least(rows, f.size_along - o) - 1][columns - 1](f, o, s);
}
template <class Kind, class T>
void cover(const Filter<T>& f, TileSize tile, int64_t begin, int64_t end) {
  for (int64_t s = begin; s < end; s += tile.columns) column_of<Kind>(f, tile.rows, least(tile.columns, end - s), s);
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

// The same in quads: sums[m][t] += the sum over factor m of inputs and gradients.
template <class T>
struct QuadCorrelation {
  int64_t length, anchor, size_along, quads;
  const T *in, *grad;  // one layout, that of Factors
  int64_t column, factor;
  T* sums;
};

template <class T, int R>
void quad_correlation_tile(const QuadCorrelation<T>& c, int64_t m, int64_t t) {
  constexpr int64_t n = Lanes<T>::count;
  const int64_t begin = most(0, c.anchor - t - (R - 1)), end = least(c.size_along, c.size_along + c.anchor - t);
  vector_t<T> sum[R] = {};
  for (int64_t k = 0; k < c.quads; ++k) {
    const T *x = c.in + m * c.factor + k * c.column + (t - c.anchor) * n, *g = c.grad + m * c.factor + k * c.column;
    const auto add = [&](int64_t o, auto outputs) SWCONV_INLINED {
      constexpr int O = decltype(outputs)::value;
      vector_t<T> grad[O];
#pragma GCC unroll 4
      for (int q = 0; q < O; ++q) grad[q] = load(g + (o + q) * n);
#pragma GCC unroll 16
      for (int j = 0; j < R + O - 1; ++j) {
        const vector_t<T> pixel = load(x + (o + j) * n);
#pragma GCC unroll 4
        for (int q = 0; q < O; ++q)
          if (j >= q && j - q < R) sum[j - q] += grad[q] * pixel;
      }
    };
    int64_t o = begin;
    for (; o + kOutputs <= end; o += kOutputs) add(o, std::integral_constant<int, kOutputs>());
    for (; o < end; ++o) add(o, std::integral_constant<int, 1>());
  }
  T* to = c.sums + (m * c.length + t) * n;
#pragma GCC unroll 8
  for (int j = 0; j < R; ++j) save(to + j * n, load(to + j * n) + sum[j]);
}

template <class T>
struct QuadCorrelationTiles {
  void (*of[kQuadTaps])(const QuadCorrelation<T>&, int64_t, int64_t);

  constexpr QuadCorrelationTiles() : of() { fill(std::make_index_sequence<kQuadTaps>()); }
  template <size_t... I>
  constexpr void fill(std::index_sequence<I...>) {
    ((of[I] = quad_correlation_tile<T, I + 1>), ...);
  }
};

template <class T>
void correlate(const QuadCorrelation<T>& c) {
  static constexpr QuadCorrelationTiles<T> tiles{};
  const int64_t rows = (c.length - 1) / ((c.length - 1) / kQuadTaps + 1) + 1;  // tiles of about one size
  for (int64_t m = 0; m < kFactors; ++m)
    for (int64_t t = 0; t < c.length; t += rows) tiles.of[least(rows, c.length - t) - 1](c, m, t);
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

// A strip of a layer, horizontal or tall, with room for the factors of a column of quads.
template <class T>
struct Part {
  int64_t size_along, size_across;
  bool tall, small;
  Strip<T> strip;
  TileSize tile;
  Factors<T> factors;

  Part(const StripSizes& s, bool tall, const Shape& shape)
      : size_along(tall ? s.height : s.width), size_across(tall ? s.width : s.height), tall(tall),
        small(shape.length <= shape.breadth && shape.anchor == shape.length / 2), strip(shape, size_along, size_across),
        tile(strip.quads ? best_tile(size_along, quads(), strip.length, Quads::sums)
                         : best_tile(size_along, size_across, strip.length, Plain::sums)),
        factors(room()) {}

  int64_t quads() const { return (size_across + kQuad - 1) / kQuad; }
  Factors<T> room() const { return strip.quads ? Factors<T>(size_along, tile.columns) : Factors<T>(0, 0); }

  template <class U>
  View<U> view(const Pixels<U>& p) const {
    return tall ? View<U>{p.origin, p.row, p.column} : View<U>{p.origin, p.column, p.row};
  }

  // Calls body(first output, quads) for every column of quads: its factors stay in the nearest cache.
  template <class Body>
  void for_quads(const Body& body) const {
    for (int64_t q = 0; q < quads(); q += tile.columns) body(q * kQuad, least(tile.columns, quads() - q));
  }

  // out = the strip of `in` + bias + plus; either may be null. Of the lanes, the first `channels` count.
  void filter(const Pixels<T>& in, const Pixels<T>& out, int64_t anchor, const T* bias, const Pixels<T>* plus,
              int64_t channels) {
    const View<T> from = view(in), to = view(out), more = plus ? view(*plus) : View<T>{nullptr, 0, 0};
    Filter<T> f{strip.length, strip.breadth, anchor, size_along, size_across, strip.taps.data, from.origin, from.along,
                from.across, to.origin, to.along, to.across, bias, more.origin, more.along, more.across};
    if (!strip.quads) return small ? cover<Small>(f, tile, 0, size_across) : cover<Plain>(f, tile, 0, size_across);
    for_quads([&](int64_t s, int64_t quads) {
      Filter<T> g = f;
      if (factors.inputs(from, s, quads, size_along, size_across, channels)) {
        g.in = factors.origin, g.in_along = factors.column, g.in_across = factors.factor;
        column_of<Quads>(g, tile.rows, quads, s);
      } else {
        g.taps = strip.plain_taps();
        cover<Plain>(g, {kRows, 1}, s, least(s + quads * kQuad, size_across));
      }
    });
  }
  void forward(const Pixels<T>& in, const Pixels<T>& out, int64_t channels, const T* bias = nullptr,
               const Pixels<T>* plus = nullptr) {
    filter(in, out, strip.anchor, bias, plus, channels);
  }

  // The adjoint: out = the turned strip of grad (+ plus), and what the taps' gradients gain; `other` is room as well.
  void backward(const Pixels<T>& in, const Pixels<T>& grad, const Pixels<T>& out, int64_t channels, const Pixels<T>* plus,
                Factors<T>& other, T* sums) {
    filter(grad, out, strip.length - 1 - strip.anchor, nullptr, plus, channels);
    const View<T> x = view(in), g = view(grad);
    if (!strip.quads)
      return correlate<T>(Correlation<T>{strip.length, strip.breadth, strip.anchor, size_along, size_across, x.origin,
                                         g.origin, g.along, g.across, sums});
    for_quads([&](int64_t s, int64_t quads) {
      factors.inputs(x, s, quads, size_along, size_across, channels);
      other.gradients(g, s, quads, size_along, size_across);
      correlate<T>(QuadCorrelation<T>{strip.length, strip.anchor, size_along, quads, factors.origin, other.origin,
                                      factors.column, factors.factor, sums});
    });
  }
};

// What one thread needs for its tasks, task after task.
template <class T>
struct Worker {
  static constexpr int64_t n = Lanes<T>::count;
  const StripSizes& s;
  Part<T> h, v, c;
  Plane<T> in, spare;
  int64_t channel = 0, channels = 0, begin = 0, end = 0;  // of the task; images begin <= b < end

  explicit Worker(const StripSizes& s)
      : s(s), h(s, false, {s.length_h, s.breadth_h, s.anchor_h, 1, s.length_h}),
        v(s, true, {s.length_v, s.breadth_v, s.anchor_v, s.breadth_v, 1}), c(s, true, {s.small, s.small, s.small / 2, s.small, 1}),
        in(s, margin()), spare(s, 0) {}

  int64_t margin() const { return most(most(s.breadth_h, s.breadth_v), s.small) / 2; }

  void start(int64_t task, const T* kernel_h, const T* kernel_v, const T* kernel_c) {
    const int64_t blocks = strip_blocks(s, n);
    channel = task % blocks * n;
    channels = least(n, s.channels - channel);
    begin = task / blocks * kStripImages;
    end = least(begin + kStripImages, s.images);
    h.strip.read(kernel_h + channel * h.strip.count(), channels);
    v.strip.read(kernel_v + channel * v.strip.count(), channels);
    c.strip.read(kernel_c + channel * c.strip.count(), channels);
  }

  template <class U>
  Block<U> block(U* tensor, int64_t image) const {
    const int64_t pixels = s.height * s.width, map = s.channels * pixels;
    const int64_t next = image + 1 < end ? map : (begin - image) * map + n * s.channel_step;
    return {tensor + image * map + channel * s.channel_step, s.channel_step, s.pixel_step, channels, pixels, next};
  }

  // Calls body(pixels to write) and sees to it that what it writes is in the tensor.
  template <class Body>
  void write(T* tensor, int64_t image, const Body& body) const {
    const Block<T> to = block(tensor, image);
    if (to.channels == n && to.channel == 1) return body(Pixels<T>{to.data, s.width * to.pixel, to.pixel, s.width});
    body(spare.pixels);
    copy_out(spare.pixels, to);
  }
};

template <class T>
void branches(const StripSizes& s, const T* x, const T* kernel_h, const T* kernel_v, const T* kernel_c, T* h, T* v,
              T* i, int64_t begin, int64_t end) {
  Worker<T> w(s);
  for (int64_t task = begin; task < end; ++task) {
    w.start(task, kernel_h, kernel_v, kernel_c);
    for (Part<T>* part : {&w.h, &w.v, &w.c}) part->strip.lay(false);
    for (int64_t image = w.begin; image < w.end; ++image) {
      copy_in<T>(w.block(x, image), w.in.pixels);
      w.write(h, image, [&](const Pixels<T>& out) { w.h.forward(w.in.pixels, out, w.channels); });
      w.write(v, image, [&](const Pixels<T>& out) { w.v.forward(w.in.pixels, out, w.channels); });
      w.write(i, image, [&](const Pixels<T>& out) { w.c.forward(w.in.pixels, out, w.channels); });
    }
  }
}

template <class T>
void mix(const StripSizes& s, const T* x, const T* kernel_h, const T* kernel_v, const T* kernel_c, const T* bias, T* y,
         int64_t begin, int64_t end) {
  Worker<T> w(s);
  const Memory<T> shift(Lanes<T>::count);
  const Pixels<T>&in = w.in.pixels, &sum = w.spare.pixels;
  for (int64_t task = begin; task < end; ++task) {
    w.start(task, kernel_h, kernel_v, kernel_c);
    const bool absorbed = w.v.strip.absorb(w.c.strip);
    for (Part<T>* part : {&w.h, &w.v, &w.c}) part->strip.lay(false);
    for (int64_t c = 0; bias && c < w.channels; ++c) shift.data[c] = bias[w.channel + c];
    for (int64_t image = w.begin; image < w.end; ++image) {
      copy_in<T>(w.block(x, image), in);
      w.v.forward(in, sum, w.channels, shift.data);
      if (!absorbed) w.c.forward(in, sum, w.channels, nullptr, &sum);
      w.write(y, image, [&](const Pixels<T>& out) { w.h.forward(in, out, w.channels, nullptr, &sum); });
    }
  }
}

template <class T>
void backward(const StripSizes& s, const T* grad_h, const T* grad_v, const T* grad_i, const T* x, const T* kernel_h,
              const T* kernel_v, const T* kernel_c, T* grad_x, T* partial, int64_t begin, int64_t end) {
  Worker<T> w(s);
  const Plane<T> grad(s, w.margin());
  const Pixels<T>&in = w.in.pixels, &sum = w.spare.pixels;
  struct {
    const T* grad;
    Part<T>& part;
    Factors<T> room;
    Memory<T> sums;
  } parts[] = {{grad_h, w.h, w.h.room(), Memory<T>(w.h.strip.size_of_taps())},
               {grad_v, w.v, w.v.room(), Memory<T>(w.v.strip.size_of_taps())},
               {grad_i, w.c, w.c.room(), Memory<T>(w.c.strip.size_of_taps())}};
  for (int64_t task = begin; task < end; ++task) {
    w.start(task, kernel_h, kernel_v, kernel_c);
    for (auto& part : parts) {
      part.part.strip.lay(true);
      part.sums.clear();
    }
    for (int64_t image = w.begin; image < w.end; ++image) {
      const T* there = nullptr;
      copy_in<T>(w.block(x, image), in);
      for (auto& part : parts) {
        if (part.grad != there) copy_in<T>(w.block(part.grad, image), grad.pixels);
        there = part.grad;
        const auto back = [&](const Pixels<T>& out) {
          part.part.backward(in, grad.pixels, out, w.channels, &part == parts ? nullptr : &sum, part.room, part.sums.data);
        };
        if (&part == std::end(parts) - 1)
          w.write(grad_x, image, back);
        else
          back(sum);
      }
    }
    const int64_t taps = strip_taps(s);
    T* to = partial + (w.begin / kStripImages * s.channels + w.channel) * taps;
    for (auto& part : parts) {
      part.part.strip.gradient(part.sums.data, to, taps, w.channels);
      to += part.part.strip.count();
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
