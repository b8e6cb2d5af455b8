// The strip form on the GPU, float32, contiguous maps, without atomics: the same bits every time. Formulas in swconv.h.
//
// A strip is worked on along its long side, across its short one; the horizontal one is turned when its input is put into
// shared memory, so that all strips run along the rows and neighbouring threads take neighbouring columns. A block of
// threads takes one channel of some images and a tile of the map, which is the whole map up to kTile px.
//
// Outputs and input gradient: a thread has kRun outputs along by two across. It slides over the input along the strip and
// keeps the taps that meet its kRun outputs in registers: at every step it reads N + 1 pixels and N new taps for
// 2 * kRun * N multiplications. Pixels outside the map are skipped. Kernels' gradients: a thread has kRun taps along by N
// across, and slides over two columns of the map, of all images of its block; blocks are added in a fixed order.
//
// Compiled by a C++ compiler with SWCONV_EMULATE, the same code runs on the CPU, one thread after the other between two
// barriers: that is how it is tested where there is no GPU.
#include "swconv.h"

#include <algorithm>

#ifdef SWCONV_EMULATE
#include <vector>
#define SWCONV_DEVICE
#define SWCONV_BOTH
#define SWCONV_THREADS(count, ...) \
  for (int thread = 0; thread < count; ++thread) __VA_ARGS__
#else
#include <cuda_runtime_api.h>
#define SWCONV_DEVICE __device__ __forceinline__
#define SWCONV_BOTH __host__ __device__
#define SWCONV_THREADS(count, ...)   \
  {                                  \
    const int thread = threadIdx.x;  \
    __VA_ARGS__;                     \
    __syncthreads();                 \
  }
#endif

namespace {

constexpr int kThreads = 128, kGradThreads = 256;
constexpr int kRun = 7;       // outputs, or taps, of a thread along the strip; maps of 224 px networks are multiples of it
constexpr int kTile = 64;     // the longest side of a tile, px
constexpr int kImages = 4;    // images of a block of the kernels' gradients, at least
constexpr int kSharedMost = 48 * 1024 / sizeof(float);  // what a block may take without asking, in floats
constexpr int kTilesMost = 96 * 1024 / sizeof(float);   // more, and tiles are made smaller

SWCONV_DEVICE int least(int a, int b) { return a < b ? a : b; }
SWCONV_DEVICE int most(int a, int b) { return a > b ? a : b; }

// i / by for i < 2^32 / by.
struct Divisor {
  unsigned by, magic;
  static Divisor of(int by) { return {static_cast<unsigned>(by), static_cast<unsigned>(((1ull << 32) + by - 1) / by)}; }
  SWCONV_DEVICE int quotient(int i) const {
    return by == 1 ? i : static_cast<int>(static_cast<unsigned long long>(static_cast<unsigned>(i)) * magic >> 32);
  }
};

struct Strip {
  int length, breadth, anchor, tall;  // tall: along the rows of the map
  const float* kernel;                // tap t of column a of channel r: tap_of(t, a) of the r-th length * breadth
  SWCONV_DEVICE int tap_of(int t, int a) const { return tall ? t * breadth + a : a * length + t; }
};

struct Sizes {
  int images, channels, height, width, tile_height, tile_width, tiles_across, tiles, slots;  // slots: images of a block
};

// Part of a map in shared memory, for a strip: row `lead` is the first that is needed and on the map, those around are 0;
// pixel (along, across) of slot s at s * size + along * pitch + across. Pitches are 2 more than a multiple of 4: pairs of
// columns are read at once, and turned maps are written with few conflicts.
struct Region {
  int lead, pitch, size, margin;   // margin: columns before the tile's first
  int before, after;               // of the tile, how far along the strip reaches
  int tall;
  Divisor quick, slot;             // of the coordinate that runs with the threads, and of a slot's pixels
};

// A tile of the map for one channel and some images, and its place along and across a strip.
struct Block {
  const Sizes& s;
  int channel, image, top, left, high, wide;  // the first image; the tile, cut at the map's border

  SWCONV_DEVICE Block(const Sizes& s, int tile, int channel, int image) : s(s), channel(channel), image(image) {
    top = tile / s.tiles_across * s.tile_height, left = tile % s.tiles_across * s.tile_width;
    high = least(s.tile_height, s.height - top), wide = least(s.tile_width, s.width - left);
  }
  SWCONV_DEVICE int start(int tall) const { return tall ? top : left; }        // along
  SWCONV_DEVICE int along(int tall) const { return tall ? high : wide; }
  SWCONV_DEVICE int across(int tall) const { return tall ? wide : high; }
  SWCONV_DEVICE int first(const Region& r) const { return most(0, start(r.tall) - r.before); }
  SWCONV_DEVICE int last(const Region& r) const {                              // past the last that is needed
    return least(r.tall ? s.height : s.width, start(r.tall) + along(r.tall) + r.after);
  }
  SWCONV_DEVICE long long place(int slot) const {
    return (static_cast<long long>(image + slot) * s.channels + channel) * s.height * s.width;
  }

  // `only`: nothing but the tile itself across the strip, 0 beyond.
  SWCONV_DEVICE void load(const Region& r, const float* in, bool only, float* region, int threads, int thread) const {
    const int begin = first(r), end = last(r), from = (r.tall ? left : top) - r.margin;
    const int low = only ? from : 0, limit = only ? from + across(r.tall) : r.tall ? s.width : s.height;
#pragma unroll 4
    for (int i = thread; i < s.slots * r.size; i += threads) {
      const int slot = r.slot.quotient(i), rest = i - slot * r.size, slow = r.quick.quotient(rest);
      const int quick = rest - slow * static_cast<int>(r.quick.by);
      const int row = r.tall ? slow : quick, column = r.tall ? quick : slow;
      const int at = begin - r.lead + row, line = from + column;
      const bool inside = image + slot < s.images && at >= begin && at < end && line >= low && line < limit;
      const int pixel = r.tall ? at * s.width + line : line * s.width + at;
      region[slot * r.size + row * r.pitch + column] = inside ? in[place(slot) + pixel] : 0.f;
    }
  }
};

// Numbers in a row; by pairs, they start at an even place.
template <bool by_pairs, int count>
SWCONV_DEVICE void read(const float* from, float (&to)[count]) {
  struct alignas(8) Pair {
    float first, second;
  };
#pragma unroll
  for (int i = 0; i < count; i += by_pairs ? 2 : 1)
    if constexpr (by_pairs) {
      const Pair pair = *reinterpret_cast<const Pair*>(from + i);
      to[i] = pair.first, to[i + 1] = pair.second;
    } else {
      to[i] = from[i];
    }
}

// ---- outputs

enum Target { kSet, kAdd, kOut };  // of a pass: the sum in shared memory, or the result, to which the sum is added

struct Pass {
  Strip strip;
  Region region;
  const float *in, *small;     // small: a centred kernel that is added to the strip's taps, or null
  int small_side, fresh;       // fresh: the region is not there yet
  Target target;
  float *out, *sum_out;        // sum_out: what the pass before left in the sum belongs there
};

struct Filters {
  Sizes s;
  Pass passes[3];
  int count, adjoint, taps, sum_pitch, region;  // room for taps and for the regions of all slots, in floats
  int joint;                                    // the last pass adds sum and bias
  const float* bias;
  Divisor map_row, map;                         // of the tile
};

// Taps of a pass with zeros around: column a of tap t at taps[(kRun + t) * tap_pitch + a].
SWCONV_BOTH int tap_pitch_of(int breadth) { return (breadth + 3) / 4 * 4; }

SWCONV_DEVICE void load_taps(const Pass& p, int adjoint, int channel, float* taps, int thread) {
  const Strip& k = p.strip;
  const int pitch = tap_pitch_of(k.breadth);
  const float* kernel = k.kernel + static_cast<long long>(channel) * k.length * k.breadth;
  const float* small = p.small ? p.small + static_cast<long long>(channel) * p.small_side * p.small_side : nullptr;
  for (int i = thread; i < (k.length + 3 * kRun) * pitch; i += kThreads) {
    int t = i / pitch - kRun, a = i % pitch;
    float tap = 0.f;
    if (t >= 0 && t < k.length && a < k.breadth) {
      if (adjoint) t = k.length - 1 - t, a = k.breadth - 1 - a;
      tap = kernel[k.tap_of(t, a)];
      const int row = t - k.anchor + p.small_side / 2, column = a - k.breadth / 2 + p.small_side / 2;
      if (small && row >= 0 && row < p.small_side && column >= 0 && column < p.small_side)
        tap += small[row * p.small_side + column];
    }
    taps[i] = tap;
  }
}

// total += the run's outputs, from N columns of taps. `taps` and `pixels` of the first step.
template <int N>
SWCONV_DEVICE void slide(const float* taps, int tap_pitch, const float* pixels, int pitch, int steps,
                         float (&total)[2][kRun]) {
  float window[N][kRun], seen[N + 1], fresh[N > 1 ? N + 1 : 1];       // taps, too, are a multiple of 2 apart
#pragma unroll
  for (int j = 1; j < kRun; ++j)
#pragma unroll
    for (int a = 0; a < N; ++a) window[a][kRun - j] = taps[a - j * tap_pitch];
  for (int step = 0; step < steps; step += kRun) {
#pragma unroll
    for (int u = 0; u < kRun; ++u) {
      read<(N > 1)>(pixels + (step + u) * pitch, seen);
      read<(N > 1)>(taps + (step + u) * tap_pitch, fresh);
#pragma unroll
      for (int a = 0; a < N; ++a) window[a][u] = fresh[a];
#pragma unroll
      for (int a = 0; a < N; ++a)
#pragma unroll
        for (int j = 0; j < kRun; ++j)
#pragma unroll
          for (int q = 0; q < 2; ++q) total[q][j] += window[a][(u - j + kRun) % kRun] * seen[a + q];
    }
  }
}

template <int N>
SWCONV_DEVICE void filter(const Filters& f, const Pass& p, const Block& block, const float* taps, const float* region,
                          float* sum, int thread) {
  const Sizes& s = f.s;
  const Strip& k = p.strip;
  const Region& r = p.region;
  const int anchor = f.adjoint ? k.length - 1 - k.anchor : k.anchor, tap_pitch = tap_pitch_of(k.breadth);
  const int along = block.along(k.tall), across = block.across(k.tall), first = block.first(r), last = block.last(r);
  const int runs = (along + kRun - 1) / kRun, pairs = (across + 1) / 2;
  const float bias = p.target == kOut && f.bias ? f.bias[block.channel] : 0.f;
  for (int item = thread; item < s.slots * runs * pairs; item += kThreads) {
    const int slot = item / (runs * pairs), run = item / pairs % runs * kRun, column = item % pairs * 2;
    if (block.image + slot >= s.images) continue;
    const int out = block.start(k.tall) + run;                  // of the run's first pixel, along
    const int begin = most(first, out - anchor), end = least(last, out + kRun - 1 + k.length - anchor);
    const float* tap = taps + (kRun + begin - out + anchor) * tap_pitch;
    const float* pixels = region + slot * r.size + (begin - first + r.lead) * r.pitch + column;
    float total[2][kRun] = {};
    if (k.breadth == N) slide<N>(tap, tap_pitch, pixels, r.pitch, end - begin, total);
    else
      for (int a = 0; a < k.breadth; ++a) slide<1>(tap + a, tap_pitch, pixels + a, r.pitch, end - begin, total);
#pragma unroll
    for (int j = 0; j < kRun; ++j)
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        if (run + j >= along || column + q >= across) continue;
        const int y = k.tall ? run + j : column + q, x = k.tall ? column + q : run + j;
        float* to = sum + (slot * s.tile_height + y) * f.sum_pitch + x;
        if (p.target == kSet) *to = total[q][j];
        else if (p.target == kAdd) *to += total[q][j];
        else
          p.out[block.place(slot) + (block.top + y) * s.width + block.left + x] =
              f.joint ? *to + total[q][j] + bias : total[q][j];
      }
  }
}

SWCONV_DEVICE void store_sum(const Filters& f, const Block& block, const float* sum, float* out, int thread) {
  const Sizes& s = f.s;
  for (int i = thread; i < s.slots * static_cast<int>(f.map.by); i += kThreads) {
    const int slot = f.map.quotient(i), rest = i - slot * static_cast<int>(f.map.by), y = f.map_row.quotient(rest);
    const int x = rest - y * s.tile_width;
    if (block.image + slot < s.images && y < block.high && x < block.wide)
      out[block.place(slot) + (block.top + y) * s.width + block.left + x] =
          sum[(slot * s.tile_height + y) * f.sum_pitch + x];
  }
}

template <int N>
SWCONV_DEVICE void filters_block(const Filters& f, int block_x, int block_y, float* shared) {
  const Block block(f.s, block_x % f.s.tiles, block_x / f.s.tiles, block_y * f.s.slots);
  float *taps = shared, *region = taps + f.taps, *sum = region + f.region;
  for (int pass = 0; pass < f.count; ++pass) {
    const Pass& p = f.passes[pass];
    SWCONV_THREADS(kThreads, {
      load_taps(p, f.adjoint, block.channel, taps, thread);
      if (p.fresh) block.load(p.region, p.in, false, region, kThreads, thread);
      if (p.sum_out) store_sum(f, block, sum, p.sum_out, thread);
    });
    SWCONV_THREADS(kThreads, filter<N>(f, p, block, taps, region, sum, thread));
  }
}

// ---- gradients of the kernels

struct Correlation {
  Strip strip;
  Region region, grad_region;
  const float* grad;
  int offset, runs, pairs;  // offset: of its taps among all, in `partial`
};

struct Correlations {
  Sizes s;
  Correlation parts[3];
  const float* x;
  int count, region, all_taps, chunk;  // room for the regions of x; images of a block
  int folded;                          // the small kernel's gradient is a part of the vertical strip's
  int small, small_offset;
  float* partial;
};

template <int N>
struct Taps {
  float total[N][kRun];
};

template <int N>
SWCONV_DEVICE void correlate(const Correlations& c, const Correlation& p, const Block& block, const float* region,
                             const float* grad, int column, int item, Taps<N>& taps) {
  const Strip& k = p.strip;
  const Region &r = p.region, &g = p.grad_region;
  const int slot = item / (p.runs * p.pairs), t = item / p.pairs % p.runs * kRun, pair = item % p.pairs * 2;
  if (slot >= c.s.slots || block.image + slot >= c.s.images || pair >= block.across(k.tall)) return;
  const int first = block.first(r), shift = block.start(k.tall) + t - k.anchor;  // output p meets input p + shift with tap t
  const int begin = most(0, first - shift - (kRun - 1)), end = least(block.along(k.tall), block.last(r) - shift);
  if (begin >= end) return;
  const float* pixels = region + slot * r.size + (begin + shift - first + r.lead) * r.pitch + pair + column;
  const float* upstream = grad + slot * g.size + begin * g.pitch + pair;
  float window[N + 1][kRun], seen[N + 1], wanted[2];
#pragma unroll
  for (int j = 0; j < kRun - 1; ++j) {
    read<(N > 1)>(pixels + j * r.pitch, seen);
#pragma unroll
    for (int a = 0; a <= N; ++a) window[a][j] = seen[a];
  }
  for (int step = 0; step < end - begin; step += kRun) {
#pragma unroll
    for (int u = 0; u < kRun; ++u) {
      read<(N > 1)>(pixels + (step + u + kRun - 1) * r.pitch, seen);
      read<true>(upstream + (step + u) * g.pitch, wanted);
#pragma unroll
      for (int a = 0; a <= N; ++a) window[a][(u + kRun - 1) % kRun] = seen[a];
#pragma unroll
      for (int a = 0; a < N; ++a)
#pragma unroll
        for (int j = 0; j < kRun; ++j)
#pragma unroll
          for (int q = 0; q < 2; ++q) taps.total[a][j] += wanted[q] * window[a + q][(u + j) % kRun];
    }
  }
}

// Add what the threads have of tap t, column a, in their order. Thread i's of a round: sums[i * N * kRun + a * kRun + j].
template <int N>
SWCONV_DEVICE float collected(const Correlations& c, const Correlation& p, const float* sums, int t) {
  float total = 0.f;
  for (int slot = 0; slot < c.s.slots; ++slot)
    for (int pair = 0; pair < p.pairs; ++pair)
      total += sums[((slot * p.runs + t / kRun) * p.pairs + pair) * N * kRun + t % kRun];
  return total;
}

template <int N>
SWCONV_DEVICE void correlations_part(const Correlations& c, const Correlation& p, int block_x, int block_y, int column,
                                     float* shared) {
  const Sizes& s = c.s;
  float *region = shared, *grad = region + c.region;
  float* to = c.partial + (static_cast<long long>(block_y) * s.channels + block_x) * c.all_taps;
  const int per_slot = p.runs * p.pairs, items = s.slots * per_slot;
#ifdef SWCONV_EMULATE
  std::vector<Taps<N>> own(kGradThreads);
#define SWCONV_OWN own[thread]
#else
  Taps<N> own = {};
#define SWCONV_OWN own
#endif
  for (int image = block_y * c.chunk; image < least(s.images, (block_y + 1) * c.chunk); image += s.slots)
    for (int tile = 0; tile < s.tiles; ++tile) {
      const Block block(s, tile, block_x, image);
      SWCONV_THREADS(kGradThreads, {
        block.load(p.region, c.x, false, region, kGradThreads, thread);
        block.load(p.grad_region, p.grad, true, grad, kGradThreads, thread);
      });
      SWCONV_THREADS(kGradThreads, if (thread < items)
                     correlate<N>(c, p, block, region, grad, column, thread, SWCONV_OWN));
    }
  float* sums = shared;
  SWCONV_THREADS(kGradThreads, for (int a = 0; a < N; ++a) for (int j = 0; j < kRun; ++j)
                 sums[(thread * N + a) * kRun + j] = SWCONV_OWN.total[a][j]);
  const Strip& k = p.strip;
  SWCONV_THREADS(kGradThreads, for (int i = thread; i < k.length * N; i += kGradThreads) {
    const int t = i / N, a = i % N;
    const float total = collected<N>(c, p, sums + a * kRun, t);
    to[p.offset + k.tap_of(t, column + a)] = total;
    const int row = t - k.anchor + c.small / 2, from_left = column + a - k.breadth / 2 + c.small / 2;
    if (c.folded && k.tall && row >= 0 && row < c.small && from_left >= 0 && from_left < c.small)
      to[c.small_offset + row * c.small + from_left] = total;
  });
}

template <int N>
SWCONV_DEVICE void correlations_block(const Correlations& c, int block_x, int block_y, float* shared) {
  for (int part = 0; part < c.count; ++part) {
    const Correlation& p = c.parts[part];
    if (p.strip.breadth == N) correlations_part<N>(c, p, block_x, block_y, 0, shared);
    else
      for (int a = 0; a < p.strip.breadth; ++a) correlations_part<1>(c, p, block_x, block_y, a, shared);
  }
}

// partial (chunks, channels, taps): add the chunks, in their order.
struct PartialSum {
  int chunks, channels, of_h, of_v, of_c;
  const float* partial;
  float *to_h, *to_v, *to_c;

  SWCONV_DEVICE void add(long long i) const {
    const int taps = of_h + of_v + of_c, r = static_cast<int>(i / taps), t = static_cast<int>(i % taps);
    float total = 0.f;
    for (int chunk = 0; chunk < chunks; ++chunk)
      total += partial[(static_cast<long long>(chunk) * channels + r) * taps + t];
    float* to = t < of_h ? to_h + static_cast<long long>(r) * of_h + t
                : t < of_h + of_v ? to_v + static_cast<long long>(r) * of_v + t - of_h
                                  : to_c + static_cast<long long>(r) * of_c + t - of_h - of_v;
    *to = total;
  }
};

// ---- kernels: one for each breadth N that is made for; other strips go column by column

#ifdef SWCONV_EMULATE
#define SWCONV_KERNELS(N)                                                                          \
  void strip_filters_##N(int x, int y, float* shared, const Filters& f) { filters_block<N>(f, x, y, shared); } \
  void strip_correlations_##N(int x, int y, float* shared, const Correlations& c) { correlations_block<N>(c, x, y, shared); }
#else
#define SWCONV_KERNELS(N)                                                                                            \
  extern "C" __global__ void __launch_bounds__(kThreads, N < 5 ? 6 : 4) strip_filters_##N(const __grid_constant__ Filters f) {   \
    extern __shared__ __align__(16) float shared[];                                                                  \
    filters_block<N>(f, blockIdx.x, blockIdx.y, shared);                                                             \
  }                                                                                                                  \
  extern "C" __global__ void __launch_bounds__(kGradThreads, 1) strip_correlations_##N(                              \
      const __grid_constant__ Correlations c) {                                                                      \
    extern __shared__ __align__(16) float shared[];                                                                  \
    correlations_block<N>(c, blockIdx.x, blockIdx.y, shared);                                                        \
  }
extern "C" __global__ void __launch_bounds__(kThreads) strip_partial_sum(const PartialSum p, long long count) {
  const long long i = static_cast<long long>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) p.add(i);
}
#endif
SWCONV_KERNELS(1)
SWCONV_KERNELS(3)
SWCONV_KERNELS(5)
SWCONV_KERNELS(7)

}  // namespace

namespace swconv {
namespace {

#ifdef SWCONV_EMULATE
template <class Kernel, class Arguments>
const char* launch(Kernel kernel, const Arguments& arguments, int64_t across, int64_t down, int, int64_t floats, void*) {
  std::vector<float> shared(floats);
  for (int64_t y = 0; y < down; ++y)
    for (int64_t x = 0; x < across; ++x) {
      std::fill(shared.begin(), shared.end(), __builtin_nanf(""));  // what is not written must not be read
      kernel(static_cast<int>(x), static_cast<int>(y), shared.data(), arguments);
    }
  return nullptr;
}
const char* add_partial(const PartialSum& p, int64_t count, void*) {
  for (int64_t i = 0; i < count; ++i) p.add(i);
  return nullptr;
}
#else
const char* message(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

template <class Kernel, class Arguments>
const char* launch(Kernel kernel, const Arguments& arguments, int64_t across, int64_t down, int threads, int64_t floats,
                   void* stream) {
  const int bytes = static_cast<int>(floats * sizeof(float));
  if (floats > kSharedMost)
    if (const char* failed = message(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)))
      return failed;
  const dim3 grid(static_cast<unsigned>(across), static_cast<unsigned>(down));
  kernel<<<grid, threads, bytes, static_cast<cudaStream_t>(stream)>>>(arguments);
  return message(cudaGetLastError());
}
const char* add_partial(const PartialSum& p, int64_t count, void* stream) {
  strip_partial_sum<<<static_cast<unsigned>((count + kThreads - 1) / kThreads), kThreads, 0,
                      static_cast<cudaStream_t>(stream)>>>(p, count);
  return message(cudaGetLastError());
}
#endif

#define SWCONV_LAUNCH(kind, breadth, ...)                                  \
  ((breadth) == 3   ? launch(strip_##kind##_3, __VA_ARGS__)                \
   : (breadth) == 5 ? launch(strip_##kind##_5, __VA_ARGS__)                \
   : (breadth) == 7 ? launch(strip_##kind##_7, __VA_ARGS__)                \
                    : launch(strip_##kind##_1, __VA_ARGS__))

int even(int n) { return n + n % 2; }
int up(int64_t n, int64_t by) { return static_cast<int>((n + by - 1) / by); }

Sizes sizes_of(const StripSizes& s, int longest) {
  const auto tile = [&](int64_t side) { return up(side, up(side, longest)); };
  Sizes out{static_cast<int>(s.images), static_cast<int>(s.channels), static_cast<int>(s.height),
            static_cast<int>(s.width), tile(s.height), tile(s.width), 0, 0, 1};
  out.tiles_across = up(out.width, out.tile_width);
  out.tiles = out.tiles_across * up(out.height, out.tile_height);
  return out;
}

int runs_of(const Sizes& s, const Strip& k) { return up(k.tall ? s.tile_height : s.tile_width, kRun); }
int pairs_of(const Sizes& s, const Strip& k) { return up(k.tall ? s.tile_width : s.tile_height, 2); }

// What a strip of this length and breadth sees of the map, with rows of zeros around.
Region region_of(const Sizes& s, const Strip& k, int length, int breadth, int anchor, int lead, int trail) {
  const int along = k.tall ? s.tile_height : s.tile_width, map = k.tall ? s.height : s.width;
  const int across = even(k.tall ? s.tile_width : s.tile_height) + even(breadth - 1);
  const int rows = std::min(map, along + length - 1) + lead + trail, pitch = across % 4 == 2 ? across : across + 2;
  return {lead, pitch, rows * pitch, breadth / 2, anchor, length - 1 - anchor, k.tall,
          Divisor::of(k.tall ? pitch : rows), Divisor::of(rows * pitch)};
}

struct Three {
  Strip h, v, c;
};

Three strips_of(const StripSizes& s, const float* kernel_h, const float* kernel_v, const float* kernel_c) {
  const auto narrow = [](int64_t value) { return static_cast<int>(value); };
  return {{narrow(s.length_h), narrow(s.breadth_h), narrow(s.anchor_h), 0, kernel_h},
          {narrow(s.length_v), narrow(s.breadth_v), narrow(s.anchor_v), 1, kernel_v},
          {narrow(s.small), narrow(s.small), narrow(s.small / 2), 1, kernel_c}};
}

// Whether the small kernel lies on the vertical strip.
bool lies_on(const Strip& c, const Strip& v) {
  return c.breadth <= v.breadth && c.anchor <= v.anchor && c.anchor <= v.length - 1 - v.anchor;
}

bool empty(const StripSizes& s) { return s.images == 0 || s.channels == 0 || s.height == 0 || s.width == 0; }

// Three results, or, with out_h and out_i null, their sum in out_v.
const char* filters(const StripSizes& sizes, const Three& strips, const float* in_h, const float* in_v, const float* in_c,
                    bool adjoint, const float* bias, float* out_h, float* out_v, float* out_i, void* stream) {
  if (empty(sizes)) return nullptr;
  const bool joint = out_h == nullptr, same = in_v == in_c && lies_on(strips.c, strips.v);
  const auto anchor = [&](const Strip& k) { return adjoint ? k.length - 1 - k.anchor : k.anchor; };
  Filters f{};
  int floats_of_a_slot = 0, items = 0;
  for (int longest = kTile;; longest /= 2) {
    f = Filters{sizes_of(sizes, longest), {}, 0, adjoint, 0, 0, 0, joint, bias, {}, {}};
    const auto pass = [&](const Strip& k, const float* in, Target target, float* out) -> Pass& {
      f.passes[f.count] = {k, region_of(f.s, k, k.length, k.breadth, anchor(k), 0, kRun - 1), in, nullptr, 0, true, target,
                           out, nullptr};
      return f.passes[f.count++];
    };
    pass(strips.h, in_h, kSet, nullptr);
    if (joint && !same) pass(strips.c, in_c, kAdd, nullptr);
    Pass& v = pass(strips.v, in_v, kOut, out_v);
    v.sum_out = out_h;
    if (joint && same) v.small = strips.c.kernel, v.small_side = strips.c.length;
    if (!joint) {
      Pass& c = pass(strips.c, in_c, kOut, out_i);
      if (same && strips.c.breadth == strips.v.breadth) c.region = v.region, c.fresh = false;
    }
    f.sum_pitch = f.s.tile_width | 1, f.region = f.taps = items = 0;
    for (int i = 0; i < f.count; ++i) {
      const Pass& p = f.passes[i];
      f.taps = std::max(f.taps, (p.strip.length + 3 * kRun) * tap_pitch_of(p.strip.breadth));
      f.region = std::max(f.region, p.region.size);
      items = std::max(items, runs_of(f.s, p.strip) * pairs_of(f.s, p.strip));
    }
    floats_of_a_slot = f.region + f.s.tile_height * f.sum_pitch;
    if (f.taps + floats_of_a_slot <= kTilesMost || longest == 8) break;
  }
  // As many images as keep the threads busy and fit.
  f.s.slots = std::max(1, std::min({(kSharedMost - f.taps) / floats_of_a_slot, up(kThreads, items), f.s.images}));
  f.region *= f.s.slots;
  f.map_row = Divisor::of(f.s.tile_width), f.map = Divisor::of(f.s.tile_height * f.s.tile_width);
  return SWCONV_LAUNCH(filters, strips.v.breadth == strips.h.breadth ? strips.v.breadth : 1, f,
                       static_cast<int64_t>(f.s.tiles) * f.s.channels, up(f.s.images, f.s.slots), kThreads,
                       f.taps + static_cast<int64_t>(f.s.slots) * floats_of_a_slot, stream);
}

// Everything but pointers. `floats`: what a block takes of shared memory. No slots: the strips are too long.
Correlations correlations_of(const StripSizes& sizes, const Three& strips, bool folded, int64_t* floats) {
  Correlations c{};
  for (int longest = kTile;; longest /= 2) {
    c = Correlations{sizes_of(sizes, longest), {}, nullptr, 0, 0, static_cast<int>(strip_taps(sizes)), 0, folded,
                     strips.c.length, strips.h.length * strips.h.breadth + strips.v.length * strips.v.breadth, nullptr};
    int offset = 0, grad = 0, most_breadth = 1, most_items = 1;
    for (const Strip& k : {strips.h, strips.v, strips.c}) {
      Correlation& p = c.parts[c.count++];
      p = {k, region_of(c.s, k, k.length, k.breadth, k.anchor, kRun - 1, 2 * (kRun - 1)),
           region_of(c.s, k, 1, 1, 0, 0, kRun - 1), nullptr, offset, up(k.length, kRun), pairs_of(c.s, k)};
      offset += k.length * k.breadth;
      c.region = std::max(c.region, p.region.size), grad = std::max(grad, p.grad_region.size);
      most_breadth = std::max(most_breadth, k.breadth <= 7 ? k.breadth : 1);
      most_items = std::max(most_items, p.runs * p.pairs);
    }
    if (folded) --c.count;
    const int sums = kGradThreads * most_breadth * kRun;
    const auto room = [&](int slots) { return std::max<int64_t>(static_cast<int64_t>(slots) * (c.region + grad), sums); };
    if ((room(1) <= kTilesMost && most_items <= kGradThreads) || longest == 8) {
      const int fit = std::max(kSharedMost / (c.region + grad), 1), busy = kGradThreads / most_items;
      c.s.slots = std::min({fit, busy, std::max(c.s.images, 1)});
      c.chunk = up(kImages, std::max(c.s.slots, 1)) * c.s.slots;
      *floats = room(c.s.slots);
      c.region *= c.s.slots;
      return c;
    }
  }
}

}  // namespace

const char* strip_branches_cuda(const StripSizes& s, const float* x, const float* kernel_h, const float* kernel_v,
                                const float* kernel_c, float* h, float* v, float* i, void* stream) {
  return filters(s, strips_of(s, kernel_h, kernel_v, kernel_c), x, x, x, false, nullptr, h, v, i, stream);
}

const char* strip_mix_cuda(const StripSizes& s, const float* x, const float* kernel_h, const float* kernel_v,
                           const float* kernel_c, const float* bias, float* y, void* stream) {
  return filters(s, strips_of(s, kernel_h, kernel_v, kernel_c), x, x, x, false, bias, nullptr, y, nullptr, stream);
}

int64_t strip_chunks_cuda(const StripSizes& s) {
  int64_t floats;
  if (empty(s)) return 0;
  return up(s.images, std::max(correlations_of(s, strips_of(s, nullptr, nullptr, nullptr), false, &floats).chunk, 1));
}

const char* strip_branches_backward_cuda(const StripSizes& s, const float* grad_h, const float* grad_v,
                                         const float* grad_i, const float* x, const float* kernel_h,
                                         const float* kernel_v, const float* kernel_c, float* grad_x, float* partial,
                                         float* grad_kernel_h, float* grad_kernel_v, float* grad_kernel_c,
                                         void* stream) {
  const Three strips = strips_of(s, kernel_h, kernel_v, kernel_c);
  if (const char* failed = filters(s, strips, grad_h, grad_v, grad_i, true, nullptr, nullptr, grad_x, nullptr, stream))
    return failed;
  const int64_t chunks = strip_chunks_cuda(s), count = s.channels * strip_taps(s);
  if (chunks > 0) {
    int64_t floats;
    Correlations c = correlations_of(s, strips, grad_v == grad_i && lies_on(strips.c, strips.v), &floats);
    if (c.s.slots == 0) return "the gradient of strips this long is not made for; SWCONV_NATIVE=0 takes plain torch";
    c.x = x, c.partial = partial;
    c.parts[0].grad = grad_h, c.parts[1].grad = grad_v, c.parts[2].grad = grad_i;
    if (const char* failed =
            SWCONV_LAUNCH(correlations, strips.v.breadth == strips.h.breadth ? strips.v.breadth : 1, c, s.channels, chunks,
                          kGradThreads, floats, stream))
      return failed;
  }
  if (count == 0) return nullptr;
  return add_partial({static_cast<int>(chunks), static_cast<int>(s.channels), static_cast<int>(s.length_h * s.breadth_h),
                      static_cast<int>(s.length_v * s.breadth_v), static_cast<int>(s.small * s.small), partial,
                      grad_kernel_h, grad_kernel_v, grad_kernel_c},
                     count, stream);
}

}  // namespace swconv
