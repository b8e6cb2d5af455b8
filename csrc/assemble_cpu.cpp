// Filters into their slots, on the CPU. Formulas in swconv.h.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "swconv.h"

namespace swconv {
namespace {

constexpr int64_t kMostArea = kLargestFilter * kLargestFilter;

// Calls body(slots, kernel, count) for every run of values that lie side by side in both: the slots of one channel, and its
// kernel_h, kernel_v and kernel_c.
template <class S, class K, class Body>
void for_runs(const AssembleSizes& s, S* slots, K* kernel_h, K* kernel_v, K* kernel_c, const Body& body) {
  const int64_t area = s.small * s.small;
  for (int64_t slot = 0; slot < s.taps; ++slot)
    for (int64_t row = 0; row < s.small; ++row, slots += s.small)
      body(slots, kernel_h + (row * s.taps + slot) * s.small, s.small);
  body(slots, kernel_v, s.taps * area);
  body(slots + s.taps * area, kernel_c, area);
}

// to[a] = sum_b weights[a * step_a + b * step_b] from[b], of `area` values each; the usual areas are known when compiling.
template <int Area, class T>
void mix_rows_of(int64_t rows, int64_t columns, int64_t area, const T* weights, int64_t step_a, int64_t step_b,
                 const T* from, T* to) {
  const int64_t values = Area ? Area : area;
  for (int64_t a = 0; a < rows; ++a, to += values) {
    T sum[Area ? Area : kMostArea] = {};
    for (int64_t b = 0; b < columns; ++b)
      for (int64_t j = 0; j < values; ++j) sum[j] += weights[a * step_a + b * step_b] * from[b * values + j];
    std::copy(sum, sum + values, to);
  }
}

template <class T>
void mix_rows(int64_t rows, int64_t columns, int64_t area, const T* weights, int64_t step_a, int64_t step_b, const T* from,
              T* to) {
  const auto mix = area == 9 ? mix_rows_of<9, T> : area == 25 ? mix_rows_of<25, T> : mix_rows_of<0, T>;
  mix(rows, columns, area, weights, step_a, step_b, from, to);
}

}  // namespace

template <class T>
void assemble_cpu(const AssembleSizes& s, const T* const* filters, const T* mixing, T* kernel_h, T* kernel_v, T* kernel_c,
                  int64_t begin, int64_t end) {
  const int64_t area = s.small * s.small, count = s.taps * area, slots = 2 * s.taps + 1;
  std::vector<T> sum(count), slot(slots * area);
  for (int64_t r = begin; r < end; ++r) {
    std::fill(sum.begin(), sum.end(), T(0));
    for (int64_t rep = 0; rep < s.branches; ++rep)
      for (int64_t j = 0; j < count; ++j) sum[j] += filters[rep][r * count + j];
    const T* mix = mixing + r * slots * s.taps;
    mix_rows(slots, s.taps, area, mix, s.taps, 1, sum.data(), slot.data());
    for_runs(s, slot.data(), kernel_h + r * count, kernel_v + r * count, kernel_c + r * area,
             [](const T* from, T* to, int64_t values) { std::copy(from, from + values, to); });
  }
}

template <class T>
void assemble_backward_cpu(const AssembleSizes& s, const T* grad_h, const T* grad_v, const T* grad_c, const T* mixing,
                           T* grad_filters, int64_t begin, int64_t end) {
  const int64_t area = s.small * s.small, count = s.taps * area, slots = 2 * s.taps + 1;
  std::vector<T> slot(slots * area);
  for (int64_t r = begin; r < end; ++r) {
    for_runs(s, slot.data(), grad_h + r * count, grad_v + r * count, grad_c + r * area,
             [](T* to, const T* from, int64_t values) { std::copy(from, from + values, to); });
    T* to = grad_filters + r * count;
    const T* mix = mixing + r * slots * s.taps;
    mix_rows(s.taps, slots, area, mix, 1, s.taps, slot.data(), to);
  }
}

#define SWCONV_ASSEMBLE(T)                                                                                              \
  template void assemble_cpu<T>(const AssembleSizes&, const T* const*, const T*, T*, T*, T*, int64_t, int64_t);         \
  template void assemble_backward_cpu<T>(const AssembleSizes&, const T*, const T*, const T*, const T*, T*, int64_t, int64_t);
SWCONV_ASSEMBLE(float)
SWCONV_ASSEMBLE(double)

}  // namespace swconv
