// The strip form on the GPU, float32, without atomics: the same bits every time. Formulas in swconv.h.
//
// Forward and input gradient: a block of threads takes one channel of some images and a tile of the map, and the strips one
// after the other. A thread has kRun outputs in a row along the strip and slides over the input, so that a pixel and a tap
// read from shared memory serve kRun multiplications. Pixels outside the map are skipped. Weight gradient: a thread has
// kRun taps in a row and slides over the map; blocks of images are added in a fixed order by a second kernel.
//
// Compiled by a C++ compiler with SWCONV_EMULATE, the same code runs on the CPU, one thread after the other between two
// barriers: that is how it is tested where there is no GPU. It has not run on a GPU yet.
#include "swconv.h"

#ifdef SWCONV_EMULATE
#include <algorithm>
#include <vector>
#define SWCONV_DEVICE
#define SWCONV_BOTH
#define SWCONV_EACH_THREAD(call)                                                \
  for (int thread = 0; thread < kThreads; ++thread) call
#else
#include <cuda_runtime_api.h>

#include <algorithm>
#define SWCONV_DEVICE __device__ __forceinline__
#define SWCONV_BOTH __host__ __device__
#define SWCONV_EACH_THREAD(call)     \
  {                                  \
    const int thread = threadIdx.x;  \
    call;                            \
    __syncthreads();                 \
  }
#endif

namespace {

constexpr int kThreads = 256;
constexpr int kRun = 7;       // outputs, or taps, of a thread; the maps of 224 px networks are multiples of it
constexpr int kTile = 32;     // the longest side of a tile, px
constexpr int kImages = 16;   // images of a block of the weight gradient
constexpr int kSharedMost = 48 * 1024 / sizeof(float);  // what a block may take without asking, in floats

struct Strip {
  int length, breadth, anchor, tall;  // tall: along the rows
  const float *kernel, *in;           // tap t of column a of channel r at kernel[r * length * breadth + ...]
  float* out;                         // null where the strips are summed
};

struct Sizes {
  int images, channels, height, width;
  long long channel_step, pixel_step;
  int tile_height, tile_width, tiles_across, tiles, slots;  // slots: images that a block has in memory at a time

  SWCONV_DEVICE long long place(int image, int channel) const {
    return static_cast<long long>(image) * channels * height * width + channel * channel_step;
  }
};

// The part of the input that a strip needs for a tile, in shared memory: (along, across) at along * step_along + across *
// step_across. Steps are odd where neighbouring threads are a step apart, so that they read from different banks.
struct Region {
  int along, across, step_along, step_across, size;

  SWCONV_BOTH Region(const Sizes& s, const Strip& k) {
    along = (k.tall ? s.tile_height : s.tile_width) + k.length - 1;
    across = (k.tall ? s.tile_width : s.tile_height) + k.breadth - 1;
    step_along = k.tall ? across : 1;
    step_across = k.tall ? 1 : along | 1;
    size = k.tall ? along * across : across * step_across;
  }
};

SWCONV_DEVICE int least(int a, int b) { return a < b ? a : b; }
SWCONV_DEVICE int most(int a, int b) { return a > b ? a : b; }

// Taps with zeros around: tap t of column a at taps[a * (length + 3 * kRun) + kRun + t].
SWCONV_DEVICE int padded(const Strip& k) { return k.length + 3 * kRun; }

SWCONV_DEVICE int tap_of(const Strip& k, int t, int a) { return k.tall ? t * k.breadth + a : a * k.length + t; }

// A tile of the map for one channel and some images.
struct Block {
  const Sizes& s;
  int channel, image, top, left, high, wide;  // the first image; the tile, cut at the map's border

  SWCONV_DEVICE Block(const Sizes& s, int tile, int channel, int image) : s(s), channel(channel), image(image) {
    top = tile / s.tiles_across * s.tile_height, left = tile % s.tiles_across * s.tile_width;
    high = least(s.tile_height, s.height - top), wide = least(s.tile_width, s.width - left);
  }

  SWCONV_DEVICE void load_taps(const Strip& k, bool adjoint, float* taps, int thread) const {
    const float* kernel = k.kernel + static_cast<long long>(channel) * k.length * k.breadth;
    for (int i = thread; i < padded(k) * k.breadth; i += kThreads) {
      const int a = i / padded(k), t = i % padded(k) - kRun;
      const bool inside = t >= 0 && t < k.length;
      taps[i] = !inside ? 0.f : kernel[adjoint ? tap_of(k, k.length - 1 - t, k.breadth - 1 - a) : tap_of(k, t, a)];
    }
  }

  // `anchor` of the strip, or of its adjoint.
  SWCONV_DEVICE void load_region(const Strip& k, int anchor, float* region, int thread) const {
    const Region r(s, k);
    const int up = k.tall ? anchor : k.breadth / 2, back = k.tall ? k.breadth / 2 : anchor;
    const int rows = k.tall ? r.along : r.across, columns = k.tall ? r.across : r.along;
    for (int i = thread; i < s.slots * rows * columns; i += kThreads) {
      const int slot = i / (rows * columns), row = i / columns % rows, column = i % columns;
      const int y = top + row - up, x = left + column - back;
      float value = 0.f;
      if (image + slot < s.images && y >= 0 && y < s.height && x >= 0 && x < s.width)
        value = k.in[s.place(image + slot, channel) + (static_cast<long long>(y) * s.width + x) * s.pixel_step];
      const int along = k.tall ? row : column, across = k.tall ? column : row;
      region[slot * r.size + along * r.step_along + across * r.step_across] = value;
    }
  }

  // kRun outputs in a row for every thread. `sum`: (slots, tile_height, tile_width), or null.
  SWCONV_DEVICE void filter(const Strip& k, int anchor, const float* taps, const float* region, float* sum, bool first,
                            int thread) const {
    const Region r(s, k);
    const int across = k.tall ? wide : high, along = k.tall ? high : wide, runs = (along + kRun - 1) / kRun;
    const int start = k.tall ? top : left, size = k.tall ? s.height : s.width;
    for (int item = thread; item < s.slots * runs * across; item += kThreads) {
      const int slot = item / (runs * across), run = item / across % runs * kRun, line = item % across;
      if (image + slot >= s.images) continue;
      const int out = start + run;  // of the run's first pixel, along the strip
      const int begin = most(0, out - anchor);
      // Pixel `at` of the map lies at at - (start - anchor) of the region, which ends with the tile's last output.
      const int end = least(least(size, out + kRun - 1 + k.length - anchor), start - anchor + r.along);
      const float* pixels = region + slot * r.size + line * r.step_across - (start - anchor) * r.step_along;
      float total[kRun] = {}, window[kRun];
      for (int a = 0; a < k.breadth; ++a) {
        const float* tap = taps + a * padded(k) + kRun + begin - out + anchor;  // of the run's first pixel, at `begin`
#pragma unroll
        for (int j = 1; j < kRun; ++j) window[kRun - j] = tap[-j];
        for (int at = begin; at < end; at += kRun) {
#pragma unroll
          for (int u = 0; u < kRun; ++u) {
            const float pixel = at + u < end ? pixels[(at + u) * r.step_along + a * r.step_across] : 0.f;
            window[u] = tap[at + u - begin];
#pragma unroll
            for (int j = 0; j < kRun; ++j) total[j] += window[(u - j + kRun) % kRun] * pixel;
          }
        }
      }
#pragma unroll
      for (int j = 0; j < kRun; ++j) {
        if (run + j >= along) continue;
        const int row = k.tall ? run + j : line, column = k.tall ? line : run + j;
        if (sum) {
          float* to = sum + (slot * s.tile_height + row) * s.tile_width + column;
          *to = first ? total[j] : *to + total[j];
        } else {
          k.out[s.place(image + slot, channel) +
                (static_cast<long long>(top + row) * s.width + left + column) * s.pixel_step] = total[j];
        }
      }
    }
  }

  SWCONV_DEVICE void store(const float* sum, const float* bias, float* out, int thread) const {
    const float shift = bias ? bias[channel] : 0.f;
    for (int i = thread; i < s.slots * high * wide; i += kThreads) {
      const int slot = i / (high * wide), row = i / wide % high, column = i % wide;
      if (image + slot < s.images)
        out[s.place(image + slot, channel) +
            (static_cast<long long>(top + row) * s.width + left + column) * s.pixel_step] =
            sum[(slot * s.tile_height + row) * s.tile_width + column] + shift;
    }
  }

  SWCONV_DEVICE void load_grad(const float* grad, float* tile, int thread) const {
    for (int i = thread; i < s.tile_height * s.tile_width; i += kThreads) {
      const int row = i / s.tile_width, column = i % s.tile_width;
      tile[i] = row < high && column < wide
                    ? grad[s.place(image, channel) +
                           (static_cast<long long>(top + row) * s.width + left + column) * s.pixel_step]
                    : 0.f;
    }
  }

  // kRun taps in a row for every thread and slice: sums[(group * slices + slice) * kRun + j].
  SWCONV_DEVICE void correlate(const Strip& k, const float* region, const float* grad, int slices, float* sums,
                               int thread) const {
    const Region r(s, k);
    const int across = k.tall ? s.tile_width : s.tile_height, along = k.tall ? s.tile_height : s.tile_width;
    const int step_along = k.tall ? s.tile_width : 1, step_across = k.tall ? 1 : s.tile_width;
    const int runs = (k.length + kRun - 1) / kRun;
    for (int item = thread; item < runs * k.breadth * slices; item += kThreads) {
      const int slice = item % slices, t = item / slices % runs * kRun, a = item / slices / runs;
      float total[kRun], window[kRun];
#pragma unroll
      for (int j = 0; j < kRun; ++j) total[j] = sums[item * kRun + j];
      for (int line = slice; line < across; line += slices) {
        const float *pixels = region + (line + a) * r.step_across + t * r.step_along, *g = grad + line * step_across;
        const int last = r.along - 1 - t;  // the region ends there: taps past the strip's end read 0
#pragma unroll
        for (int j = 0; j < kRun - 1; ++j) window[j] = j <= last ? pixels[j * r.step_along] : 0.f;
        for (int at = 0; at < along; at += kRun) {
#pragma unroll
          for (int u = 0; u < kRun; ++u) {
            const int next = at + u + kRun - 1;
            window[(u + kRun - 1) % kRun] = next <= last ? pixels[next * r.step_along] : 0.f;
            const float value = at + u < along ? g[(at + u) * step_along] : 0.f;
#pragma unroll
            for (int j = 0; j < kRun; ++j) total[j] += value * window[(u + j) % kRun];
          }
        }
      }
#pragma unroll
      for (int j = 0; j < kRun; ++j) sums[item * kRun + j] = total[j];
    }
  }

  SWCONV_DEVICE static void clear(float* sums, int count, int thread) {
    for (int i = thread; i < count; i += kThreads) sums[i] = 0.f;
  }

  // Add the slices, in their order.
  SWCONV_DEVICE static void collect(const Strip& k, const float* sums, int slices, float* to, int thread) {
    const int runs = (k.length + kRun - 1) / kRun;
    for (int i = thread; i < k.length * k.breadth; i += kThreads) {
      const int t = i % k.length, a = i / k.length;
      float total = 0.f;
      for (int slice = 0; slice < slices; ++slice)
        total += sums[((a * runs + t / kRun) * slices + slice) * kRun + t % kRun];
      to[tap_of(k, t, a)] = total;
    }
  }
};

struct Filters {
  Sizes s;
  Strip strips[3];
  int adjoint, taps, region;  // room for the taps and for the region of one image, in floats
  const float* bias;
  float* out;  // the sum's; null where every strip has its own
};

SWCONV_DEVICE int anchor_of(const Strip& k, int adjoint) { return adjoint ? k.length - 1 - k.anchor : k.anchor; }

struct Correlations {
  Sizes s;
  Strip strips[3];
  const float* grads[3];
  int slices[3], region, sums, all_taps;
  float* partial;
};

#ifdef SWCONV_EMULATE
void strip_filters(int block_x, int block_y, float* shared, const Filters f) {
#else
extern "C" __global__ void __launch_bounds__(kThreads) strip_filters(const Filters f) {
  extern __shared__ float shared[];
  const int block_x = blockIdx.x, block_y = blockIdx.y;
#endif
  const Sizes& s = f.s;
  const Block block(s, block_x % s.tiles, block_x / s.tiles, block_y * s.slots);
  float *taps = shared, *region = taps + f.taps, *sum = f.out ? region + f.region * s.slots : nullptr;
  for (int part = 0; part < 3; ++part) {
    const Strip& k = f.strips[part];
    const int anchor = anchor_of(k, f.adjoint);
    SWCONV_EACH_THREAD((block.load_taps(k, f.adjoint, taps, thread), block.load_region(k, anchor, region, thread)));
    SWCONV_EACH_THREAD(block.filter(k, anchor, taps, region, sum, part == 0, thread));
  }
  if (sum) SWCONV_EACH_THREAD(block.store(sum, f.bias, f.out, thread));
}

#ifdef SWCONV_EMULATE
void strip_correlations(int block_x, int block_y, float* shared, const Correlations c) {
#else
extern "C" __global__ void __launch_bounds__(kThreads) strip_correlations(const Correlations c) {
  extern __shared__ float shared[];
  const int block_x = blockIdx.x, block_y = blockIdx.y;
#endif
  const Sizes& s = c.s;
  float *region = shared, *grad = region + c.region, *sums = grad + s.tile_height * s.tile_width;
  float* to = c.partial + (static_cast<long long>(block_y) * s.channels + block_x) * c.all_taps;
  for (int part = 0; part < 3; ++part) {
    const Strip& k = c.strips[part];
    SWCONV_EACH_THREAD(Block::clear(sums, c.sums, thread));
    for (int image = block_y * kImages; image < least(s.images, (block_y + 1) * kImages); ++image) {
      for (int tile = 0; tile < s.tiles; ++tile) {
        const Block block(s, tile, block_x, image);
        SWCONV_EACH_THREAD((block.load_region(k, k.anchor, region, thread), block.load_grad(c.grads[part], grad, thread)));
        SWCONV_EACH_THREAD(block.correlate(k, region, grad, c.slices[part], sums, thread));
      }
    }
    SWCONV_EACH_THREAD(Block::collect(k, sums, c.slices[part], to, thread));
    to += k.length * k.breadth;
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

#ifndef SWCONV_EMULATE
extern "C" __global__ void __launch_bounds__(kThreads) strip_partial_sum(const PartialSum p, long long count) {
  const long long i = static_cast<long long>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) p.add(i);
}
#endif

}  // namespace

namespace swconv {
namespace {

#ifdef SWCONV_EMULATE
template <class Kernel, class Arguments>
const char* launch(Kernel kernel, const Arguments& arguments, int64_t across, int64_t down, int64_t floats, void*) {
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
const char* launch(Kernel kernel, const Arguments& arguments, int64_t across, int64_t down, int64_t floats,
                   void* stream) {
  const int bytes = static_cast<int>(floats * sizeof(float));
  if (floats > kSharedMost)
    if (const char* failed = message(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)))
      return failed;
  const dim3 grid(static_cast<unsigned>(across), static_cast<unsigned>(down));
  kernel<<<grid, kThreads, bytes, static_cast<cudaStream_t>(stream)>>>(arguments);
  return message(cudaGetLastError());
}
const char* add_partial(const PartialSum& p, int64_t count, void* stream) {
  strip_partial_sum<<<static_cast<unsigned>((count + kThreads - 1) / kThreads), kThreads, 0,
                      static_cast<cudaStream_t>(stream)>>>(p, count);
  return message(cudaGetLastError());
}
#endif

int region_size(const Sizes& s, const Strip& k) { return Region(s, k).size; }

Sizes sizes_of(const StripSizes& s) {
  const auto tile = [](int64_t side) {
    const int64_t count = (side + kTile - 1) / kTile;
    return static_cast<int>((side + count - 1) / count);
  };
  Sizes out{static_cast<int>(s.images), static_cast<int>(s.channels), static_cast<int>(s.height),
            static_cast<int>(s.width), s.channel_step, s.pixel_step, tile(s.height), tile(s.width), 0, 0, 1};
  out.tiles_across = (out.width + out.tile_width - 1) / out.tile_width;
  out.tiles = out.tiles_across * ((out.height + out.tile_height - 1) / out.tile_height);
  return out;
}

struct Three {
  Strip strips[3];
};

Three strips_of(const StripSizes& s, const float* kernel_h, const float* kernel_v, const float* kernel_c,
                const float* in_h, const float* in_v, const float* in_c) {
  const auto narrow = [](int64_t value) { return static_cast<int>(value); };
  return {{{narrow(s.length_h), narrow(s.breadth_h), narrow(s.anchor_h), 0, kernel_h, in_h, nullptr},
           {narrow(s.length_v), narrow(s.breadth_v), narrow(s.anchor_v), 1, kernel_v, in_v, nullptr},
           {narrow(s.small), narrow(s.small), narrow(s.small / 2), 1, kernel_c, in_c, nullptr}}};
}

const char* filters(const StripSizes& sizes, Three strips, bool adjoint, const float* bias, float* out, void* stream) {
  Filters f{sizes_of(sizes), {}, adjoint, 0, 0, bias, out};
  Sizes& s = f.s;
  if (s.images == 0 || s.channels == 0 || s.height == 0 || s.width == 0) return nullptr;
  int items = 0;
  for (int part = 0; part < 3; ++part) {
    const Strip& k = f.strips[part] = strips.strips[part];
    f.taps = std::max(f.taps, (k.length + 3 * kRun) * k.breadth);
    f.region = std::max(f.region, region_size(s, k));
    const int along = k.tall ? s.tile_height : s.tile_width, across = k.tall ? s.tile_width : s.tile_height;
    items = std::max(items, (along + kRun - 1) / kRun * across);
  }
  // As many images as keep the threads busy and fit.
  const int sum = out ? s.tile_height * s.tile_width : 0;
  const int fit = (kSharedMost - f.taps) / (f.region + sum), busy = (kThreads + items - 1) / items;
  s.slots = std::max(1, std::min({fit, busy, s.images}));
  return launch(strip_filters, f, static_cast<int64_t>(s.tiles) * s.channels, (s.images + s.slots - 1) / s.slots,
                f.taps + static_cast<int64_t>(s.slots) * (f.region + sum), stream);
}

}  // namespace

const char* strip_branches_cuda(const StripSizes& s, const float* x, const float* kernel_h, const float* kernel_v,
                                const float* kernel_c, float* h, float* v, float* i, void* stream) {
  Three strips = strips_of(s, kernel_h, kernel_v, kernel_c, x, x, x);
  strips.strips[0].out = h, strips.strips[1].out = v, strips.strips[2].out = i;
  return filters(s, strips, false, nullptr, nullptr, stream);
}

const char* strip_mix_cuda(const StripSizes& s, const float* x, const float* kernel_h, const float* kernel_v,
                           const float* kernel_c, const float* bias, float* y, void* stream) {
  return filters(s, strips_of(s, kernel_h, kernel_v, kernel_c, x, x, x), false, bias, y, stream);
}

int64_t strip_chunks_cuda(const StripSizes& s) { return (s.images + kImages - 1) / kImages; }

const char* strip_branches_backward_cuda(const StripSizes& s, const float* grad_h, const float* grad_v,
                                         const float* grad_i, const float* x, const float* kernel_h,
                                         const float* kernel_v, const float* kernel_c, float* grad_x, float* partial,
                                         float* grad_kernel_h, float* grad_kernel_v, float* grad_kernel_c,
                                         void* stream) {
  if (const char* failed = filters(s, strips_of(s, kernel_h, kernel_v, kernel_c, grad_h, grad_v, grad_i), true, nullptr,
                                   grad_x, stream))
    return failed;
  Correlations c{sizes_of(s), {}, {grad_h, grad_v, grad_i}, {}, 0, 0, static_cast<int>(strip_taps(s)), partial};
  const Three strips = strips_of(s, kernel_h, kernel_v, kernel_c, x, x, x);
  for (int part = 0; part < 3; ++part) {
    const Strip& k = c.strips[part] = strips.strips[part];
    const int groups = (k.length + kRun - 1) / kRun * k.breadth;
    c.slices[part] = std::max(1, std::min(kThreads / groups, k.tall ? c.s.tile_width : c.s.tile_height));
    c.region = std::max(c.region, region_size(c.s, k));
    c.sums = std::max(c.sums, groups * c.slices[part] * kRun);
  }
  const int64_t chunks = strip_chunks_cuda(s), count = s.channels * strip_taps(s);
  if (chunks > 0 && s.height > 0 && s.width > 0 && s.channels > 0)
    if (const char* failed = launch(strip_correlations, c, s.channels, chunks,
                                    c.region + static_cast<int64_t>(c.s.tile_height) * c.s.tile_width + c.sums, stream))
      return failed;
  if (count == 0) return nullptr;
  return add_partial({s.height > 0 && s.width > 0 ? static_cast<int>(chunks) : 0, static_cast<int>(s.channels),
                      static_cast<int>(s.length_h * s.breadth_h), static_cast<int>(s.length_v * s.breadth_v),
                      static_cast<int>(s.small * s.small), partial, grad_kernel_h, grad_kernel_v, grad_kernel_c},
                     count, stream);
}

}  // namespace swconv
