// The operator's kernels, free of torch: raw pointers, sizes, ranges of work. binding.cpp gives them to torch.
//
// Letters: B images, R channels, n filters per channel, E edges, H x W pixels; L and N the long and the short side of a
// strip (the two strips may differ), S the side of the small kernel. All tensors are contiguous, in the order of their
// letters. Anything that is read outside a map is 0.
#pragma once

#include <cstdint>

namespace swconv {

// Two-step form. maps (B, R*n, H+2*halo, W+2*halo); pad_h, pad_v (R*n, E); pick (R, E), absolute filter indices;
// h, v, i (B, R, H, W):
//   h[b,r,y,x] = sum_e sum_k maps[b, r*n+k, y + halo,               x - pad_h[r*n+k, e]]
//   v[b,r,y,x] = sum_e sum_k maps[b, r*n+k, y - pad_v[r*n+k, e],    x + halo]
//   i[b,r,y,x] = sum_e       maps[b, pick[r,e], y + halo,           x + halo]
// and its adjoint, with c = r*n + k:
//   grad_maps[b,c,y,x] = sum_e ( grad_h[b,r, y - halo,           x + pad_h[c,e]]
//                              + grad_v[b,r, y + pad_v[c,e],     x - halo]
//                              + [pick[r,e] == c] grad_i[b,r, y - halo, x - halo] )
struct ShiftSizes {
  int64_t images, channels, taps, edges, height, width, halo;
};

// Output planes begin <= b*R + r < end.
template <class T>
void shift_add_cpu(const ShiftSizes& s, const T* maps, const int32_t* pad_h, const int32_t* pad_v, const int32_t* pick,
                   T* h, T* v, T* i, int64_t begin, int64_t end);

// Maps begin <= b*R*n + c < end.
template <class T>
void shift_add_backward_cpu(const ShiftSizes& s, const T* grad_h, const T* grad_v, const T* grad_i,
                            const int32_t* pad_h, const int32_t* pad_v, const int32_t* pick, T* grad_maps,
                            int64_t begin, int64_t end);

// The same on the GPU, all at once, float32. `stream` is a cudaStream_t. Each returns nullptr, or CUDA's error message.
// The atomic form scatters every map's pixels with atomicAdd, as published: not reproducible, kept as the baseline.
const char* shift_add_cuda(const ShiftSizes& s, const float* maps, const int32_t* pad_h, const int32_t* pad_v,
                           const int32_t* pick, float* h, float* v, float* i, void* stream);
const char* shift_add_atomic_cuda(const ShiftSizes& s, const float* maps, const int32_t* pad_h, const int32_t* pad_v,
                                  const int32_t* pick, float* h, float* v, float* i, void* stream);
const char* shift_add_backward_cuda(const ShiftSizes& s, const float* grad_h, const float* grad_v, const float* grad_i,
                                    const int32_t* pad_h, const int32_t* pad_v, const int32_t* pick, float* grad_maps,
                                    void* stream);

// Filters into their slots: weight space, so of no image. filters: `branches` tensors (R*n, 1, N, N), which are summed;
// mixing (R, 2n+1, n), mostly zeros. slots[r,s] = sum_k mixing[r,s,k] filters[r*n+k] (N, N); the first n lie side by side
// in kernel_h (R, 1, N, n*N), the next n one below the other in kernel_v (R, 1, n*N, N), the last is kernel_c (R, 1, N, N).
struct AssembleSizes {
  int64_t branches, channels, taps, small;
};

// On the CPU, with one set of vector instructions: channels begin <= r < end; and the adjoint, the gradient of each branch's
// filters alike.
template <class T>
struct AssembleKernels {
  void (*assemble)(const AssembleSizes& s, const T* const* filters, const T* mixing, T* kernel_h, T* kernel_v, T* kernel_c,
                   int64_t begin, int64_t end);
  void (*adjoint)(const AssembleSizes& s, const T* grad_h, const T* grad_v, const T* grad_c, const T* mixing,
                  T* grad_filters, int64_t begin, int64_t end);
};

template <class T>
AssembleKernels<T> assemble_kernels_portable();
template <class T>
AssembleKernels<T> assemble_kernels_avx2();
template <class T>
AssembleKernels<T> assemble_kernels_avx512();

// The same on the GPU, all channels at once, float32, in one launch each, of kMostBranches branches at most. `stream` is a
// cudaStream_t. Each returns nullptr, or CUDA's error message.
constexpr int64_t kMostBranches = 16;
const char* assemble_cuda(const AssembleSizes& s, const float* const* filters, const float* mixing, float* kernel_h,
                          float* kernel_v, float* kernel_c, void* stream);
const char* assemble_backward_cuda(const AssembleSizes& s, const float* grad_h, const float* grad_v, const float* grad_c,
                                   const float* mixing, float* grad_filters, void* stream);

// Strip form. x (B, R, H, W); kernel_h (R, 1, N, L); kernel_v (R, 1, L, N); kernel_c (R, 1, S, S), S odd. An anchor is
// the tap along the long side that lies on the output pixel:
//   h[b,r,y,x] = sum_a sum_t kernel_h[r,0,a,t] x[b,r, y + a - N/2,        x + t - anchor_h]
//   v[b,r,y,x] = sum_t sum_a kernel_v[r,0,t,a] x[b,r, y + t - anchor_v,   x + a - N/2]
//   i[b,r,y,x] = sum_t sum_a kernel_c[r,0,t,a] x[b,r, y + t - S/2,        x + a - S/2]
// All maps of a call have one layout: channel r of pixel p = y * W + x of an image at r * channel_step + p * pixel_step.
// Every sum has one order, whatever the batch or the number of threads.
struct StripSizes {
  int64_t images, channels, height, width;
  int64_t length_h, breadth_h, anchor_h, length_v, breadth_v, anchor_v, small;
  int64_t channel_step, pixel_step;
};

// On the CPU the work is cut into tasks: a block of channels, as many as a vector has lanes, of kStripImages images.
constexpr int64_t kStripImages = 8;

inline int64_t strip_blocks(const StripSizes& s, int64_t lanes) { return (s.channels + lanes - 1) / lanes; }
inline int64_t strip_chunks(const StripSizes& s) { return (s.images + kStripImages - 1) / kStripImages; }
inline int64_t strip_tasks(const StripSizes& s, int64_t lanes) { return strip_blocks(s, lanes) * strip_chunks(s); }
inline int64_t strip_taps(const StripSizes& s) {
  return s.length_h * s.breadth_h + s.length_v * s.breadth_v + s.small * s.small;
}

// The kernels of one set of vector instructions; they do the tasks begin <= task < end.
template <class T>
struct StripKernels {
  int64_t lanes;
  void (*branches)(const StripSizes& s, const T* x, const T* kernel_h, const T* kernel_v, const T* kernel_c, T* h, T* v,
                   T* i, int64_t begin, int64_t end);
  // y = h + v + i + bias; bias may be null.
  void (*mix)(const StripSizes& s, const T* x, const T* kernel_h, const T* kernel_v, const T* kernel_c, const T* bias,
              T* y, int64_t begin, int64_t end);
  // partial (chunks, R, taps): the kernels' gradients of each chunk of images, h, v and c in a row; the caller adds.
  void (*backward)(const StripSizes& s, const T* grad_h, const T* grad_v, const T* grad_i, const T* x,
                   const T* kernel_h, const T* kernel_v, const T* kernel_c, T* grad_x, T* partial, int64_t begin,
                   int64_t end);
};

// The same on the GPU, all at once, float32, without atomics. `stream` is a cudaStream_t. Each returns nullptr, or CUDA's
// error message. `partial` (strip_chunks_cuda, R, taps) is room to work in.
const char* strip_branches_cuda(const StripSizes& s, const float* x, const float* kernel_h, const float* kernel_v,
                                const float* kernel_c, float* h, float* v, float* i, void* stream);
const char* strip_mix_cuda(const StripSizes& s, const float* x, const float* kernel_h, const float* kernel_v,
                           const float* kernel_c, const float* bias, float* y, void* stream);
const char* strip_branches_adjoint_cuda(const StripSizes& s, const float* grad_h, const float* grad_v,
                                        const float* grad_i, const float* kernel_h, const float* kernel_v,
                                        const float* kernel_c, float* grad_x, void* stream);
int64_t strip_chunks_cuda(const StripSizes& s);
const char* strip_branches_backward_cuda(const StripSizes& s, const float* grad_h, const float* grad_v,
                                         const float* grad_i, const float* x, const float* kernel_h,
                                         const float* kernel_v, const float* kernel_c, float* grad_x, float* partial,
                                         float* grad_kernel_h, float* grad_kernel_v, float* grad_kernel_c,
                                         void* stream);

template <class T>
StripKernels<T> strip_kernels_portable();
template <class T>
StripKernels<T> strip_kernels_avx2();
template <class T>
StripKernels<T> strip_kernels_avx512();

}  // namespace swconv
