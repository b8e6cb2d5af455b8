// The two-step form on the GPU, float32. Formulas in swconv.h. One block row per plane; threads run over its pixels.
#include "device.h"
#include "swconv.h"

namespace {

constexpr int kThreads = 256;

struct Sizes {
  int channels, taps, edges, height, width, halo;
  __device__ int rows() const { return height + 2 * halo; }
  __device__ int columns() const { return width + 2 * halo; }
};

__device__ __forceinline__ bool inside(int y, int x, int height, int width) {
  return static_cast<unsigned>(y) < static_cast<unsigned>(height) &&
         static_cast<unsigned>(x) < static_cast<unsigned>(width);
}

// 0 outside the plane.
__device__ __forceinline__ float at(const float* __restrict__ plane, int y, int x, int height, int width) {
  return inside(y, x, height, width) ? plane[y * width + x] : 0.f;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads)
    shift_add_gather(Sizes s, const float* __restrict__ maps, const int32_t* __restrict__ pad_h,
                     const int32_t* __restrict__ pad_v, const int32_t* __restrict__ pick, float* __restrict__ h,
                     float* __restrict__ v, float* __restrict__ i) {
  const int pixel = blockIdx.y * kThreads + threadIdx.x;
  if (pixel >= s.height * s.width) return;
  const int y = pixel / s.width, x = pixel % s.width;
  const int rows = s.rows(), columns = s.columns();
  const int64_t area = static_cast<int64_t>(rows) * columns;
  const int image = blockIdx.x / s.channels, r = blockIdx.x % s.channels;
  const float* image_maps = maps + static_cast<int64_t>(image) * s.channels * s.taps * area;
  float sum_h = 0.f, sum_v = 0.f, sum_i = 0.f;
  for (int e = 0; e < s.edges; ++e) {
    for (int c = r * s.taps; c < (r + 1) * s.taps; ++c) {
      const float* map = image_maps + c * area;
      sum_h += at(map, y + s.halo, x - pad_h[c * s.edges + e], rows, columns);
      sum_v += at(map, y - pad_v[c * s.edges + e], x + s.halo, rows, columns);
    }
    sum_i += at(image_maps + pick[r * s.edges + e] * area, y + s.halo, x + s.halo, rows, columns);
  }
  const int64_t out = static_cast<int64_t>(blockIdx.x) * s.height * s.width + pixel;
  h[out] = sum_h;
  v[out] = sum_v;
  i[out] = sum_i;
}

extern "C" __global__ void __launch_bounds__(kThreads)
    shift_add_atomic(Sizes s, const float* __restrict__ maps, const int32_t* __restrict__ pad_h,
                     const int32_t* __restrict__ pad_v, const int32_t* __restrict__ pick, float* __restrict__ h,
                     float* __restrict__ v, float* __restrict__ i) {
  const int rows = s.rows(), columns = s.columns();
  const int pixel = blockIdx.y * kThreads + threadIdx.x;
  if (pixel >= rows * columns) return;
  const int y = pixel / columns, x = pixel % columns;
  const int c = blockIdx.x % (s.channels * s.taps), plane = blockIdx.x / s.taps, r = plane % s.channels;
  const int64_t out = static_cast<int64_t>(plane) * s.height * s.width;
  const float value = maps[static_cast<int64_t>(blockIdx.x) * rows * columns + pixel];
  const auto add = [&](float* to, int to_y, int to_x) {
    if (inside(to_y, to_x, s.height, s.width)) atomicAdd(to + out + to_y * s.width + to_x, value);
  };
  for (int e = 0; e < s.edges; ++e) {
    add(h, y - s.halo, x + pad_h[c * s.edges + e]);
    add(v, y + pad_v[c * s.edges + e], x - s.halo);
    if (pick[r * s.edges + e] == c) add(i, y - s.halo, x - s.halo);
  }
}

extern "C" __global__ void __launch_bounds__(kThreads)
    shift_add_backward(Sizes s, const float* __restrict__ grad_h, const float* __restrict__ grad_v,
                       const float* __restrict__ grad_i, const int32_t* __restrict__ pad_h,
                       const int32_t* __restrict__ pad_v, const int32_t* __restrict__ pick,
                       float* __restrict__ grad_maps) {
  const int rows = s.rows(), columns = s.columns();
  const int pixel = blockIdx.y * kThreads + threadIdx.x;
  if (pixel >= rows * columns) return;
  const int y = pixel / columns, x = pixel % columns;
  const int c = blockIdx.x % (s.channels * s.taps), plane = blockIdx.x / s.taps, r = plane % s.channels;
  const int64_t from = static_cast<int64_t>(plane) * s.height * s.width;
  float sum = 0.f;
  for (int e = 0; e < s.edges; ++e) {
    sum += at(grad_h + from, y - s.halo, x + pad_h[c * s.edges + e], s.height, s.width);
    sum += at(grad_v + from, y + pad_v[c * s.edges + e], x - s.halo, s.height, s.width);
    if (pick[r * s.edges + e] == c) sum += at(grad_i + from, y - s.halo, x - s.halo, s.height, s.width);
  }
  grad_maps[static_cast<int64_t>(blockIdx.x) * rows * columns + pixel] = sum;
}

namespace swconv {
namespace {

Sizes narrow(const ShiftSizes& s) {
  return {static_cast<int>(s.channels), static_cast<int>(s.taps),  static_cast<int>(s.edges),
          static_cast<int>(s.height),   static_cast<int>(s.width), static_cast<int>(s.halo)};
}

// One block row per plane of `pixels`. No launch for an empty tensor: CUDA refuses an empty grid.
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), int64_t planes, int64_t pixels, void* stream,
                   Arguments... arguments) {
  if (planes == 0 || pixels == 0) return nullptr;
  const dim3 grid(static_cast<unsigned>(planes), static_cast<unsigned>((pixels + kThreads - 1) / kThreads));
  kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return message(cudaGetLastError());
}

int64_t map_pixels(const ShiftSizes& s) { return (s.height + 2 * s.halo) * (s.width + 2 * s.halo); }

}  // namespace

const char* shift_add_cuda(const ShiftSizes& s, const float* maps, const int32_t* pad_h, const int32_t* pad_v,
                           const int32_t* pick, float* h, float* v, float* i, void* stream) {
  return launch(shift_add_gather, s.images * s.channels, s.height * s.width, stream, narrow(s), maps, pad_h, pad_v,
                pick, h, v, i);
}

const char* shift_add_atomic_cuda(const ShiftSizes& s, const float* maps, const int32_t* pad_h, const int32_t* pad_v,
                                  const int32_t* pick, float* h, float* v, float* i, void* stream) {
  const size_t bytes = s.images * s.channels * s.height * s.width * sizeof(float);
  for (float* out : {h, v, i}) {
    if (const char* failed = message(cudaMemsetAsync(out, 0, bytes, static_cast<cudaStream_t>(stream)))) return failed;
  }
  return launch(shift_add_atomic, s.images * s.channels * s.taps, map_pixels(s), stream, narrow(s), maps, pad_h, pad_v,
                pick, h, v, i);
}

const char* shift_add_backward_cuda(const ShiftSizes& s, const float* grad_h, const float* grad_v, const float* grad_i,
                                    const int32_t* pad_h, const int32_t* pad_v, const int32_t* pick, float* grad_maps,
                                    void* stream) {
  return launch(shift_add_backward, s.images * s.channels * s.taps, map_pixels(s), stream, narrow(s), grad_h, grad_v,
                grad_i, pad_h, pad_v, pick, grad_maps);
}

}  // namespace swconv
