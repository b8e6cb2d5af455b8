// Filters into their slots, on the CPU, with the vectors of lanes.h. Formulas in swconv.h.
#include "lanes.h"
#include "swconv.h"

namespace swconv {
namespace {

constexpr int kTogether = 4;  // rows that are summed at once: one sum alone would wait for itself

// Blocks of a filter's values, one behind the other, each filled up to whole vectors: their sizes are known when compiling
// for the usual filters.
template <class T, int Small>
struct Filters {
  static constexpr int64_t n = Lanes<T>::count;
  int64_t side;

  int64_t small() const { return Small ? Small : side; }
  int64_t area() const { return small() * small(); }
  int64_t pitch() const { return (area() + n - 1) / n * n; }

  static SWCONV_INLINE void copy(const T* from, T* to, int64_t count) {
    for (int64_t j = 0; j < count; ++j) to[j] = from[j];
  }

  // Calls body(values of a block, values of the kernels, count) for every run that lies side by side in both: the slots of
  // one channel, and its kernel_h, kernel_v and kernel_c.
  template <class S, class K, class Body>
  SWCONV_INLINE void for_runs(int64_t taps, S* slots, K* kernel_h, K* kernel_v, K* kernel_c, const Body& body) const {
    for (int64_t slot = 0; slot < taps; ++slot)
      for (int64_t row = 0; row < small(); ++row)
        body(slots + slot * pitch() + row * small(), kernel_h + (row * taps + slot) * small(), small());
    for (int64_t slot = 0; slot < taps; ++slot)
      body(slots + (taps + slot) * pitch(), kernel_v + slot * area(), area());
    body(slots + 2 * taps * pitch(), kernel_c, area());
  }

  // to[a] = sum_b weights[a * step_a + b * step_b] from[b], blocks all.
  void mix(int64_t rows, int64_t columns, const T* weights, int64_t step_a, int64_t step_b, const T* from, T* to) const {
    int64_t a = 0;
    for (; a + kTogether <= rows; a += kTogether) mix_rows<kTogether>(columns, weights + a * step_a, step_a, step_b, from, to + a * pitch());
    for (; a < rows; ++a) mix_rows<1>(columns, weights + a * step_a, step_a, step_b, from, to + a * pitch());
  }
  template <int Rows>
  SWCONV_INLINE void mix_rows(int64_t columns, const T* weights, int64_t step_a, int64_t step_b, const T* from, T* to) const {
    for (int64_t j = 0; j < pitch(); j += n) {
      vector_t<T> sum[Rows] = {};
      for (int64_t b = 0; b < columns; ++b) {
        const vector_t<T> values = load(from + b * pitch() + j);
#pragma GCC unroll 8
        for (int a = 0; a < Rows; ++a) sum[a] += weights[a * step_a + b * step_b] * values;
      }
#pragma GCC unroll 8
      for (int a = 0; a < Rows; ++a) save(to + a * pitch() + j, sum[a]);
    }
  }
};

template <class T, int Small>
void assemble_of(const AssembleSizes& s, const T* const* filters, const T* mixing, T* kernel_h, T* kernel_v, T* kernel_c,
                 int64_t begin, int64_t end) {
  const Filters<T, Small> f{s.small};
  const int64_t area = f.area(), pitch = f.pitch(), count = s.taps * area, slots = 2 * s.taps + 1;
  const Memory<T> sums(s.taps * pitch), slot(slots * pitch);
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t k = 0; k < s.taps; ++k) {
      T* to = sums.data + k * pitch;
      f.copy(filters[0] + r * count + k * area, to, area);
      for (int64_t rep = 1; rep < s.branches; ++rep)
        for (int64_t j = 0; j < area; ++j) to[j] += filters[rep][r * count + k * area + j];
    }
    f.mix(slots, s.taps, mixing + r * slots * s.taps, s.taps, 1, sums.data, slot.data);
    f.for_runs(s.taps, slot.data, kernel_h + r * count, kernel_v + r * count, kernel_c + r * area,
               [&f](const T* from, T* to, int64_t values) SWCONV_INLINED { f.copy(from, to, values); });
  }
}

template <class T, int Small>
void adjoint_of(const AssembleSizes& s, const T* grad_h, const T* grad_v, const T* grad_c, const T* mixing, T* grad_filters,
                int64_t begin, int64_t end) {
  const Filters<T, Small> f{s.small};
  const int64_t area = f.area(), pitch = f.pitch(), count = s.taps * area, slots = 2 * s.taps + 1;
  const Memory<T> sums(s.taps * pitch), slot(slots * pitch);
  for (int64_t r = begin; r < end; ++r) {
    f.for_runs(s.taps, slot.data, grad_h + r * count, grad_v + r * count, grad_c + r * area,
               [&f](T* to, const T* from, int64_t values) SWCONV_INLINED { f.copy(from, to, values); });
    f.mix(s.taps, slots, mixing + r * slots * s.taps, 1, s.taps, slot.data, sums.data);
    for (int64_t k = 0; k < s.taps; ++k) f.copy(sums.data + k * pitch, grad_filters + r * count + k * area, area);
  }
}

template <class T>
void assemble(const AssembleSizes& s, const T* const* filters, const T* mixing, T* kernel_h, T* kernel_v, T* kernel_c,
              int64_t begin, int64_t end) {
  (s.small == 3 ? assemble_of<T, 3> : s.small == 5 ? assemble_of<T, 5> : assemble_of<T, 0>)(
      s, filters, mixing, kernel_h, kernel_v, kernel_c, begin, end);
}

template <class T>
void adjoint(const AssembleSizes& s, const T* grad_h, const T* grad_v, const T* grad_c, const T* mixing, T* grad_filters,
             int64_t begin, int64_t end) {
  (s.small == 3 ? adjoint_of<T, 3> : s.small == 5 ? adjoint_of<T, 5> : adjoint_of<T, 0>)(
      s, grad_h, grad_v, grad_c, mixing, grad_filters, begin, end);
}

}  // namespace

template <class T>
AssembleKernels<T> SWCONV_NAMED(assemble_kernels_, SWCONV_CPU)() {
  return {assemble<T>, adjoint<T>};
}
template AssembleKernels<float> SWCONV_NAMED(assemble_kernels_, SWCONV_CPU)<float>();
template AssembleKernels<double> SWCONV_NAMED(assemble_kernels_, SWCONV_CPU)<double>();

}  // namespace swconv
