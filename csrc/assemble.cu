// Filters into their slots, on the GPU, float32, without atomics: the same bits every time. Formulas in swconv.h. A block of
// threads takes one channel, whose summed filters, or whose slots' gradients, are in shared memory; threads run over results.
#include "device.h"
#include "swconv.h"

namespace {

constexpr int kThreads = 256;

struct Sizes {
  int branches, taps, small;
  SWCONV_DEVICE int area() const { return small * small; }
  SWCONV_DEVICE int count() const { return taps * area(); }  // values of a channel's filters, and of its kernel_h or kernel_v
  SWCONV_DEVICE int slots() const { return 2 * taps + 1; }

  // Of value i of a channel's kernels, kernel_h, kernel_v and kernel_c in a row: its place among the slots, in their order.
  SWCONV_DEVICE int place(int i) const {
    if (i >= count()) return i;                              // slots of kernel_v and kernel_c lie in it as they are
    const int row = i / (taps * small), column = i % (taps * small);
    return column / small * area() + row * small + column % small;
  }
};

// A channel's kernels, as one row of values.
template <class T>
struct Kernels {
  T *h, *v, *c;
  SWCONV_DEVICE T& at(const Sizes& s, int channel, int i) const {
    const int64_t begin = static_cast<int64_t>(channel) * s.count();
    return i < s.count() ? h[begin + i]
           : i < 2 * s.count() ? v[begin + i - s.count()] : c[static_cast<int64_t>(channel) * s.area() + i - 2 * s.count()];
  }
};

SWCONV_DEVICE float weighted(const float* weights, int step, const float* values, int area, int count) {
  float total = 0.f;
#pragma unroll 8
  for (int j = 0; j < count; ++j) total += weights[j * step] * values[j * area];
  return total;
}

struct Assembly {
  Sizes s;
  const float* filters[swconv::kMostBranches];
  const float* mixing;
  Kernels<float> to;
};

SWCONV_DEVICE void assemble_block(const Assembly& a, int channel, float* shared) {
  const Sizes& s = a.s;
  const int64_t begin = static_cast<int64_t>(channel) * s.count();
  SWCONV_THREADS(kThreads, for (int i = thread; i < s.count(); i += kThreads) {
    float total = 0.f;
    for (int branch = 0; branch < s.branches; ++branch) total += a.filters[branch][begin + i];
    shared[i] = total;
  });
  SWCONV_THREADS(kThreads, for (int i = thread; i < s.slots() * s.area(); i += kThreads) {
    const int place = s.place(i), slot = place / s.area(), pixel = place % s.area();
    const float* weights = a.mixing + (static_cast<int64_t>(channel) * s.slots() + slot) * s.taps;
    a.to.at(s, channel, i) = weighted(weights, 1, shared + pixel, s.area(), s.taps);
  });
}

struct Disassembly {
  Sizes s;
  Kernels<const float> grad;
  const float* mixing;
  float* grad_filters;
};

SWCONV_DEVICE void assemble_backward_block(const Disassembly& d, int channel, float* shared) {
  const Sizes& s = d.s;
  SWCONV_THREADS(kThreads, for (int i = thread; i < s.slots() * s.area(); i += kThreads)
                 shared[s.place(i)] = d.grad.at(s, channel, i));
  SWCONV_THREADS(kThreads, for (int i = thread; i < s.count(); i += kThreads) {
    const int k = i / s.area(), pixel = i % s.area();
    const float* weights = d.mixing + static_cast<int64_t>(channel) * s.slots() * s.taps + k;
    d.grad_filters[static_cast<int64_t>(channel) * s.count() + i] = weighted(weights, s.taps, shared + pixel, s.area(), s.slots());
  });
}

#ifdef SWCONV_EMULATE
#define SWCONV_KERNEL(name, Arguments) \
  void name(int channel, int, float* shared, const Arguments& arguments) { name##_block(arguments, channel, shared); }
#else
#define SWCONV_KERNEL(name, Arguments)                                                                            \
  extern "C" __global__ void __launch_bounds__(kThreads) name(const __grid_constant__ Arguments arguments) {       \
    extern __shared__ __align__(16) float shared[];                                                               \
    name##_block(arguments, blockIdx.x, shared);                                                                  \
  }
#endif
SWCONV_KERNEL(assemble, Assembly)
SWCONV_KERNEL(assemble_backward, Disassembly)

}  // namespace

namespace swconv {
namespace {

Sizes narrow(const AssembleSizes& s) {
  return {static_cast<int>(s.branches), static_cast<int>(s.taps), static_cast<int>(s.small)};
}

// No launch for no value: CUDA refuses an empty grid.
bool empty(const AssembleSizes& s) { return s.channels * s.small == 0; }

}  // namespace

const char* assemble_cuda(const AssembleSizes& s, const float* const* filters, const float* mixing, float* kernel_h,
                          float* kernel_v, float* kernel_c, void* stream) {
  if (empty(s)) return nullptr;
  Assembly a{narrow(s), {}, mixing, {kernel_h, kernel_v, kernel_c}};
  for (int64_t branch = 0; branch < s.branches; ++branch) a.filters[branch] = filters[branch];
  return launch(::assemble, a, s.channels, 1, kThreads, s.taps * s.small * s.small, stream);
}

const char* assemble_backward_cuda(const AssembleSizes& s, const float* grad_h, const float* grad_v, const float* grad_c,
                                   const float* mixing, float* grad_filters, void* stream) {
  if (empty(s)) return nullptr;
  const Disassembly d{narrow(s), {grad_h, grad_v, grad_c}, mixing, grad_filters};
  return launch(::assemble_backward, d, s.channels, 1, kThreads, (2 * s.taps + 1) * s.small * s.small, stream);
}

}  // namespace swconv
