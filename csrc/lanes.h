// Vectors for the files that setup.py compiles once for every set of vector instructions: SWCONV_CPU names it, the flags set
// the width, and the first call takes the best that the processor has (binding.cpp). So nothing of such a file may leave it
// but functions of that name: one of the standard library that the linker shares could hold instructions that another
// processor lacks.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#define SWCONV_JOIN(a, b) a##b
#define SWCONV_NAMED(a, b) SWCONV_JOIN(a, b)
#define SWCONV_INLINED __attribute__((always_inline))
#define SWCONV_INLINE inline SWCONV_INLINED

namespace swconv {
namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

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
  size_t bytes;
  T* data;

  explicit Memory(int64_t count)
      : bytes((static_cast<size_t>(most(count, 1)) * sizeof(T) + 63) / 64 * 64),
        data(static_cast<T*>(std::aligned_alloc(64, bytes))) {
    if (data == nullptr) throw std::bad_alloc();
    clear();
  }
  void clear() { std::memset(static_cast<void*>(data), 0, bytes); }
  Memory(const Memory&) = delete;
  ~Memory() { std::free(data); }
};

}  // namespace
}  // namespace swconv
