// What the .cu files share: one source for the GPU and, compiled by a C++ compiler with SWCONV_EMULATE, for the CPU, where the
// threads of a block run one after the other between two barriers. That is how kernels are tested where there is no GPU.
#pragma once

#include <cstdint>

#ifdef SWCONV_EMULATE
#include <algorithm>
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

namespace swconv {

// A grid of across x down blocks with this many floats of shared memory each; more than may be had without asking are asked
// for. Returns nullptr, or CUDA's error message.
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
#else
inline const char* message(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

template <class Kernel, class Arguments>
const char* launch(Kernel kernel, const Arguments& arguments, int64_t across, int64_t down, int threads, int64_t floats,
                   void* stream) {
  constexpr int kUnasked = 48 * 1024;
  const int bytes = static_cast<int>(floats * sizeof(float));
  if (bytes > kUnasked)
    if (const char* failed = message(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)))
      return failed;
  const dim3 grid(static_cast<unsigned>(across), static_cast<unsigned>(down));
  kernel<<<grid, threads, bytes, static_cast<cudaStream_t>(stream)>>>(arguments);
  return message(cudaGetLastError());
}
#endif

}  // namespace swconv
