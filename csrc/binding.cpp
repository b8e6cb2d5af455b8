// The operator's place in torch: schemas, argument checks, threads. The only file that includes torch, and of torch
// only the stable ABI, so that one library serves every torch from 2.11 on. Autograd and fake kernels are registered
// in swconv/ops/native.py.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdlib>
#include <cstring>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <tuple>
#include <vector>
#ifdef SWCONV_CUDA
#include <dlfcn.h>
#endif

#include "swconv.h"

namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;
using Three = std::tuple<Tensor, Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <class... Words>
void require(bool met, const Words&... words) {
  if (met) return;
  std::ostringstream sentence;
  (sentence << ... << words);
  throw std::runtime_error(sentence.str());
}

// Becomes text only where a sentence needs it: on small maps, sentences for nothing would be a third of a call.
struct shape {
  const Tensor& tensor;

  explicit shape(const Tensor& tensor) : tensor(tensor) {}
  friend std::ostream& operator<<(std::ostream& text, const shape& s) {
    text << "(";
    for (int64_t d = 0; d < s.tensor.dim(); ++d) text << (d ? ", " : "") << s.tensor.size(d);
    return text << ")";
  }
};

void require_shape(const char* op, const char* name, const Tensor& t, std::initializer_list<int64_t> wanted) {
  bool same = t.dim() == static_cast<int64_t>(wanted.size());
  int64_t d = 0;
  for (const int64_t size : wanted) same = same && t.size(d++) == size;
  if (same) return;
  std::ostringstream text;
  for (const int64_t size : wanted) text << (text.tellp() > 0 ? ", " : "") << size;
  require(false, op, " needs ", name, " of shape (", text.str(), "), got ", shape(t),
          ". Were all arguments made for the same layer?");
}

// All of the first one's dtype and device.
void require_alike(const char* op, const Tensor& first, std::initializer_list<const Tensor*> others) {
  for (const Tensor* other : others) {
    require(other->scalar_type() == first.scalar_type(), op, " needs tensors of one dtype, got ", first.scalar_type(),
            " and ", other->scalar_type(), ". Convert them to one.");
    require(other->is_cuda() == first.is_cuda() && other->get_device_index() == first.get_device_index(), op,
            " needs all tensors on one device. Move them with .to(device).");
  }
}

// Calls body with a value of the tensor's type.
template <class Body>
auto with_type(const char* op, const Tensor& t, const Body& body) {
  const ScalarType type = t.scalar_type();
  require(type == ScalarType::Float || type == ScalarType::Double, op, " needs float32 or float64 on the CPU, got ",
          type, ". Convert with .float().");
  return type == ScalarType::Float ? body(float()) : body(double());
}

Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// The best kernels for this processor, of those compiled for sets of vector instructions. SWCONV_CPU=portable, avx2 or avx512
// asks for others, for tests and comparisons.
template <class Kernels>
Kernels best_kernels(Kernels (*portable)(), [[maybe_unused]] Kernels (*avx2)(), [[maybe_unused]] Kernels (*avx512)()) {
  const char* asked = std::getenv("SWCONV_CPU");
  const auto takes = [asked](const char* name) { return asked == nullptr || std::strcmp(asked, name) == 0; };
#ifdef __x86_64__
  __builtin_cpu_init();
  if (takes("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
    return avx512();
  if (takes("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
    return avx2();
#endif
  require(takes("portable"), "SWCONV_CPU needs to name instructions that this processor has, avx512, avx2 or portable, "
          "got ", asked, ".");
  return portable();
}
#ifdef __x86_64__
#define SWCONV_BEST(kernels, T) best_kernels(kernels##_portable<T>, kernels##_avx2<T>, kernels##_avx512<T>)
#else
#define SWCONV_BEST(kernels, T) best_kernels<decltype(kernels##_portable<T>())>(kernels##_portable<T>, nullptr, nullptr)
#endif
template <class T>
const swconv::StripKernels<T>& strip_kernels() {
  static const auto kernels = SWCONV_BEST(swconv::strip_kernels, T);
  return kernels;
}
template <class T>
const swconv::AssembleKernels<T>& assemble_kernels() {
  static const auto kernels = SWCONV_BEST(swconv::assemble_kernels, T);
  return kernels;
}

constexpr int64_t kChannels = 16;  // that one thread takes at least, where a channel is little work

// ---- two-step form -------------------------------------------------------------------------------------------------

struct Tables {
  Tensor pad_h, pad_v, pick;

  const int32_t* h() const { return pad_h.const_data_ptr<int32_t>(); }
  const int32_t* v() const { return pad_v.const_data_ptr<int32_t>(); }
  const int32_t* p() const { return pick.const_data_ptr<int32_t>(); }
};

Tables checked_tables(const char* op, const Tensor& maps, const Tensor& pad_h, const Tensor& pad_v,
                      const Tensor& pick) {
  require(pick.dim() == 2 && pad_h.dim() == 2, op, " needs pick (R, E) and pad_h (R * n, E), got ", shape(pick),
          " and ", shape(pad_h), ".");
  require(pick.size(0) > 0 && pick.size(1) == pad_h.size(1) && pad_h.size(0) % pick.size(0) == 0, op,
          " needs pad_h (R * n, E) for pick (R, E), got ", shape(pad_h), " and ", shape(pick),
          ". Were both tables drawn for the same layer?");
  require_shape(op, "pad_v", pad_v, {pad_h.size(0), pad_h.size(1)});
  for (const Tensor* table : {&pad_h, &pad_v, &pick}) {
    require(table->scalar_type() == ScalarType::Int, op, " needs int32 tables, got ", table->scalar_type(),
            ". Convert with .int().");
    require(table->is_cuda() == maps.is_cuda() && table->get_device_index() == maps.get_device_index(), op,
            " needs tables and maps on one device. Move them with .to(device).");
  }
  return {dense(pad_h), dense(pad_v), dense(pick)};
}

// A filter index from a foreign table must not read outside the maps, and the adjoint looks for it in its own channel only. On
// the GPU the caller answers for it.
void require_picks(const char* op, const Tables& tables) {
  const int64_t edges = tables.pick.size(1), taps = tables.pad_h.size(0) / tables.pick.size(0);
  for (int64_t j = 0; j < tables.pick.numel(); ++j) {
    const int64_t first = j / edges * taps;
    require(tables.p()[j] >= first && tables.p()[j] < first + taps, op, " needs pick between ", first, " and ",
            first + taps - 1, " in row ", j / edges, ", got ", tables.p()[j], ". Are its entries absolute filter indices?");
  }
}

swconv::ShiftSizes forward_sizes(const char* op, const Tensor& maps, const Tables& t, int64_t halo) {
  const int64_t channels = t.pick.size(0), taps = t.pad_h.size(0) / channels;
  require(maps.dim() == 4 && maps.size(1) == channels * taps, op, " needs R * n maps (", channels, " * ", taps, " = ",
          channels * taps, ") of shape (B, R * n, H + 2 * halo, W + 2 * halo), got ", shape(maps),
          ". Were maps and tables made for the same kernel size?");
  require(halo >= 0 && maps.size(2) >= 2 * halo && maps.size(3) >= 2 * halo, op,
          " needs maps of at least 2 * halo pixels and halo >= 0, got ", shape(maps), " and halo ", halo, ".");
  return {maps.size(0), channels, taps, t.pick.size(1), maps.size(2) - 2 * halo, maps.size(3) - 2 * halo, halo};
}

swconv::ShiftSizes backward_sizes(const char* op, const Tensor& grad, const Tables& t, int64_t halo, int64_t taps) {
  const int64_t channels = t.pick.size(0);
  require(taps * channels == t.pad_h.size(0), op, " needs pad_h with R * taps = ", channels, " * ", taps,
          " rows, got ", t.pad_h.size(0), ".");
  require(grad.dim() == 4 && grad.size(1) == channels && halo >= 0, op, " needs gradients (B, ", channels,
          ", H, W) and halo >= 0, got ", shape(grad), " and halo ", halo, ".");
  return {grad.size(0), channels, taps, t.pick.size(1), grad.size(2), grad.size(3), halo};
}

Three new_outputs(const Tensor& maps, const swconv::ShiftSizes& s) {
  const auto one = [&] { return torch::stable::new_empty(maps, {s.images, s.channels, s.height, s.width}); };
  return {one(), one(), one()};
}

Tensor new_maps(const Tensor& grad, const swconv::ShiftSizes& s) {
  return torch::stable::new_empty(
      grad, {s.images, s.channels * s.taps, s.height + 2 * s.halo, s.width + 2 * s.halo});
}

Three shift_add_cpu(const Tensor maps, const Tensor pad_h, const Tensor pad_v, const Tensor pick, int64_t halo) {
  constexpr const char* op = "swconv::shift_add";
  const Tables t = checked_tables(op, maps, pad_h, pad_v, pick);
  require_picks(op, t);
  const auto s = forward_sizes(op, maps, t, halo);
  const Tensor from = dense(maps);
  Three out = new_outputs(maps, s);
  auto& [h, v, i] = out;
  with_type(op, maps, [&, &h = h, &v = v, &i = i](auto zero) {
    using T = decltype(zero);
    T *to_h = h.mutable_data_ptr<T>(), *to_v = v.mutable_data_ptr<T>(), *to_i = i.mutable_data_ptr<T>();
    parallel_for(0, s.images * s.channels, 1, [&](int64_t begin, int64_t end) {
      swconv::shift_add_cpu(s, from.const_data_ptr<T>(), t.h(), t.v(), t.p(), to_h, to_v, to_i, begin, end);
    });
  });
  return out;
}

Tensor shift_add_backward_cpu(const Tensor grad_h, const Tensor grad_v, const Tensor grad_i, const Tensor pad_h,
                              const Tensor pad_v, const Tensor pick, int64_t halo, int64_t taps) {
  constexpr const char* op = "swconv::shift_add_backward";
  const Tables t = checked_tables(op, grad_h, pad_h, pad_v, pick);
  const auto s = backward_sizes(op, grad_h, t, halo, taps);
  require_alike(op, grad_h, {&grad_v, &grad_i});
  for (const Tensor* grad : {&grad_v, &grad_i})
    require_shape(op, "gradients", *grad, {s.images, s.channels, s.height, s.width});
  const Tensor h = dense(grad_h), v = dense(grad_v), i = dense(grad_i);
  Tensor out = new_maps(grad_h, s);
  with_type(op, grad_h, [&](auto zero) {
    using T = decltype(zero);
    T* to = out.mutable_data_ptr<T>();
    parallel_for(0, s.images * s.channels * s.taps, 1, [&](int64_t begin, int64_t end) {
      swconv::shift_add_backward_cpu(s, h.const_data_ptr<T>(), v.const_data_ptr<T>(), i.const_data_ptr<T>(), t.h(),
                                     t.v(), t.p(), to, begin, end);
    });
  });
  return out;
}

#ifdef SWCONV_CUDA
// torch's current stream. libtorch_cuda is looked up, not linked, so that the library loads on a CPU-only torch too.
void* current_stream(const Tensor& t) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const Function function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  void* stream = nullptr;
  require(function && function(t.get_device_index(), &stream) == 0,
          "swconv needs a CUDA build of torch for tensors on the GPU, and found no CUDA stream.");
  return stream;
}

void require_float(const char* op, const Tensor& t) {
  require(t.scalar_type() == ScalarType::Float, op, " needs float32 on the GPU, got ", t.scalar_type(),
          ". Convert with .float().");
}

void require_done(const char* op, const char* failure) {
  require(!failure, op, " failed on the GPU: ", failure ? failure : "", ".");
}

Three shift_add_cuda(const char* op, decltype(&swconv::shift_add_cuda) kernel, const Tensor& maps, const Tensor& pad_h,
                     const Tensor& pad_v, const Tensor& pick, int64_t halo) {
  const Tables t = checked_tables(op, maps, pad_h, pad_v, pick);
  const auto s = forward_sizes(op, maps, t, halo);
  require_float(op, maps);
  const torch::stable::accelerator::DeviceGuard guard(maps.get_device_index());
  const Tensor from = dense(maps);
  Three out = new_outputs(maps, s);
  auto& [h, v, i] = out;
  require_done(op, kernel(s, from.const_data_ptr<float>(), t.h(), t.v(), t.p(), h.mutable_data_ptr<float>(),
                          v.mutable_data_ptr<float>(), i.mutable_data_ptr<float>(), current_stream(maps)));
  return out;
}

Three shift_add_gather_cuda(const Tensor maps, const Tensor pad_h, const Tensor pad_v, const Tensor pick,
                            int64_t halo) {
  return shift_add_cuda("swconv::shift_add", swconv::shift_add_cuda, maps, pad_h, pad_v, pick, halo);
}

Three shift_add_atomic_cuda(const Tensor maps, const Tensor pad_h, const Tensor pad_v, const Tensor pick,
                            int64_t halo) {
  return shift_add_cuda("swconv::shift_add_atomic", swconv::shift_add_atomic_cuda, maps, pad_h, pad_v, pick, halo);
}

Tensor shift_add_backward_cuda(const Tensor grad_h, const Tensor grad_v, const Tensor grad_i, const Tensor pad_h,
                               const Tensor pad_v, const Tensor pick, int64_t halo, int64_t taps) {
  constexpr const char* op = "swconv::shift_add_backward";
  const Tables t = checked_tables(op, grad_h, pad_h, pad_v, pick);
  const auto s = backward_sizes(op, grad_h, t, halo, taps);
  require_float(op, grad_h);
  require_alike(op, grad_h, {&grad_v, &grad_i});
  for (const Tensor* grad : {&grad_v, &grad_i})
    require_shape(op, "gradients", *grad, {s.images, s.channels, s.height, s.width});
  const torch::stable::accelerator::DeviceGuard guard(grad_h.get_device_index());
  const Tensor h = dense(grad_h), v = dense(grad_v), i = dense(grad_i);
  Tensor out = new_maps(grad_h, s);
  require_done(op, swconv::shift_add_backward_cuda(s, h.const_data_ptr<float>(), v.const_data_ptr<float>(),
                                                   i.const_data_ptr<float>(), t.h(), t.v(), t.p(),
                                                   out.mutable_data_ptr<float>(), current_stream(grad_h)));
  return out;
}
#endif

// ---- filters into their slots --------------------------------------------------------------------------------------

swconv::AssembleSizes assemble_sizes(const char* op, const Tensor& mixing, int64_t branches, int64_t small) {
  require(mixing.dim() == 3 && mixing.size(1) == 2 * mixing.size(2) + 1, op, " needs mixing (R, 2 * n + 1, n), got ",
          shape(mixing), ".");
  return {branches, mixing.size(0), mixing.size(2), small};
}

// Dense, and checked: of branches and mixing, or of the three gradients and mixing.
struct Assembly {
  std::vector<Tensor> parts;
  Tensor mixing;
  swconv::AssembleSizes s;

  template <class T>
  std::vector<const T*> pointers() const {
    std::vector<const T*> all;
    for (const Tensor& part : parts) all.push_back(part.const_data_ptr<T>());
    return all;
  }
  template <class T>
  const T* mix() const { return mixing.const_data_ptr<T>(); }

  Three new_kernels() const {
    const auto one = [&](int64_t high, int64_t wide) { return torch::stable::new_empty(mixing, {s.channels, 1, high, wide}); };
    return {one(s.small, s.taps * s.small), one(s.taps * s.small, s.small), one(s.small, s.small)};
  }
  Tensor new_filters() const { return torch::stable::new_empty(mixing, {s.channels * s.taps, 1, s.small, s.small}); }
};

Assembly checked_filters(const char* op, const std::vector<Tensor>& filters, const Tensor& mixing) {
  require(!filters.empty(), op, " needs filters (R * n, 1, N, N), got none.");
  require(filters[0].dim() == 4, op, " needs filters (R * n, 1, N, N), got ", shape(filters[0]), ".");
  const int64_t small = filters[0].size(3);
  const auto s = assemble_sizes(op, mixing, static_cast<int64_t>(filters.size()), small);
  std::vector<Tensor> parts;
  for (const Tensor& branch : filters) {
    require_shape(op, "filters", branch, {s.channels * s.taps, 1, small, small});
    require_alike(op, mixing, {&branch});
    parts.push_back(dense(branch));
  }
  return {parts, dense(mixing), s};
}

Assembly checked_gradients(const char* op, const Tensor& grad_h, const Tensor& grad_v, const Tensor& grad_c,
                           const Tensor& mixing) {
  require(grad_c.dim() == 4, op, " needs the gradient of kernel_c (R, 1, N, N), got ", shape(grad_c), ".");
  const int64_t small = grad_c.size(3);
  const auto s = assemble_sizes(op, mixing, 1, small);
  require_shape(op, "the gradient of kernel_h", grad_h, {s.channels, 1, small, s.taps * small});
  require_shape(op, "the gradient of kernel_v", grad_v, {s.channels, 1, s.taps * small, small});
  require_shape(op, "the gradient of kernel_c", grad_c, {s.channels, 1, small, small});
  require_alike(op, mixing, {&grad_h, &grad_v, &grad_c});
  return {{dense(grad_h), dense(grad_v), dense(grad_c)}, dense(mixing), s};
}

Three assemble_cpu(const std::vector<Tensor> filters, const Tensor mixing) {
  constexpr const char* op = "swconv::assemble";
  const Assembly a = checked_filters(op, filters, mixing);
  Three out = a.new_kernels();
  auto& [h, v, c] = out;
  with_type(op, mixing, [&, &h = h, &v = v, &c = c](auto zero) {
    using T = decltype(zero);
    const auto& kernels = assemble_kernels<T>();
    const auto branches = a.pointers<T>();
    T *to_h = h.mutable_data_ptr<T>(), *to_v = v.mutable_data_ptr<T>(), *to_c = c.mutable_data_ptr<T>();
    parallel_for(0, a.s.channels, kChannels, [&](int64_t begin, int64_t end) {
      kernels.assemble(a.s, branches.data(), a.mix<T>(), to_h, to_v, to_c, begin, end);
    });
  });
  return out;
}

Tensor assemble_backward_cpu(const Tensor grad_h, const Tensor grad_v, const Tensor grad_c, const Tensor mixing) {
  constexpr const char* op = "swconv::assemble_backward";
  const Assembly a = checked_gradients(op, grad_h, grad_v, grad_c, mixing);
  Tensor out = a.new_filters();
  with_type(op, mixing, [&](auto zero) {
    using T = decltype(zero);
    const auto& kernels = assemble_kernels<T>();
    const auto grads = a.pointers<T>();
    T* to = out.mutable_data_ptr<T>();
    parallel_for(0, a.s.channels, kChannels, [&](int64_t begin, int64_t end) {
      kernels.adjoint(a.s, grads[0], grads[1], grads[2], a.mix<T>(), to, begin, end);
    });
  });
  return out;
}

#ifdef SWCONV_CUDA
Three assemble_cuda(const std::vector<Tensor> filters, const Tensor mixing) {
  constexpr const char* op = "swconv::assemble";
  const Assembly a = checked_filters(op, filters, mixing);
  require_float(op, mixing);
  require(a.s.branches <= swconv::kMostBranches, op, " needs at most ", swconv::kMostBranches,
          " Rep branches on the GPU, got ", a.s.branches, ". Add some of them up before.");
  const torch::stable::accelerator::DeviceGuard guard(mixing.get_device_index());
  Three out = a.new_kernels();
  auto& [h, v, c] = out;
  require_done(op, swconv::assemble_cuda(a.s, a.pointers<float>().data(), a.mix<float>(), h.mutable_data_ptr<float>(),
                                         v.mutable_data_ptr<float>(), c.mutable_data_ptr<float>(),
                                         current_stream(mixing)));
  return out;
}

Tensor assemble_backward_cuda(const Tensor grad_h, const Tensor grad_v, const Tensor grad_c, const Tensor mixing) {
  constexpr const char* op = "swconv::assemble_backward";
  const Assembly a = checked_gradients(op, grad_h, grad_v, grad_c, mixing);
  require_float(op, mixing);
  const torch::stable::accelerator::DeviceGuard guard(mixing.get_device_index());
  Tensor out = a.new_filters();
  const auto grads = a.pointers<float>();
  require_done(op, swconv::assemble_backward_cuda(a.s, grads[0], grads[1], grads[2], a.mix<float>(),
                                                  out.mutable_data_ptr<float>(), current_stream(mixing)));
  return out;
}
#endif

// ---- strip form ----------------------------------------------------------------------------------------------------

swconv::StripSizes strip_sizes(const char* op, const Tensor& x, const Tensor& kernel_h, const Tensor& kernel_v,
                               const Tensor& kernel_c, int64_t anchor_h, int64_t anchor_v, bool channels_last) {
  require(x.dim() == 4 && kernel_h.dim() == 4 && kernel_v.dim() == 4 && kernel_c.dim() == 4, op,
          " needs x (B, C, H, W) and kernels (C, 1, N, L), (C, 1, L, N), (C, 1, S, S), got ", shape(x), ", ",
          shape(kernel_h), ", ", shape(kernel_v), ", ", shape(kernel_c), ".");
  const swconv::StripSizes s{x.size(0),        x.size(1), x.size(2),        x.size(3),        kernel_h.size(3),
                             kernel_h.size(2), anchor_h,  kernel_v.size(2), kernel_v.size(3), anchor_v,
                             kernel_c.size(2), channels_last ? 1 : x.size(2) * x.size(3), channels_last ? x.size(1) : 1};
  require_shape(op, "kernel_h", kernel_h, {s.channels, 1, s.breadth_h, s.length_h});
  require_shape(op, "kernel_v", kernel_v, {s.channels, 1, s.length_v, s.breadth_v});
  require_shape(op, "kernel_c", kernel_c, {s.channels, 1, s.small, s.small});
  require(s.breadth_h % 2 && s.breadth_v % 2 && s.small % 2, op, " needs odd N and S, got kernels ", shape(kernel_h),
          ", ", shape(kernel_v), ", ", shape(kernel_c), ".");
  require(anchor_h >= 0 && anchor_h < s.length_h && anchor_v >= 0 && anchor_v < s.length_v, op,
          " needs anchors on strips of ", s.length_h, " and ", s.length_v, " taps, got ", anchor_h, " and ", anchor_v,
          ". The anchor is the tap that lies on the output pixel.");
  require_alike(op, x, {&kernel_h, &kernel_v, &kernel_c});
  return s;
}

void require_bias(const char* op, const Tensor& x, const std::optional<Tensor>& bias, const swconv::StripSizes& s) {
  if (!bias) return;
  require_shape(op, "bias", *bias, {s.channels});
  require_alike(op, x, {&*bias});
}

void require_grads(const char* op, const Tensor& x, std::initializer_list<const Tensor*> grads,
                   const swconv::StripSizes& s) {
  require_alike(op, x, grads);
  for (const Tensor* grad : grads) require_shape(op, "gradients", *grad, {s.images, s.channels, s.height, s.width});
}

// x laid out densely and, where it already is, as it is: channels_last, else contiguous. Results have its layout.
struct Layout {
  bool channels_last;

  explicit Layout(const Tensor& x) : channels_last(!x.is_contiguous() && is_channels_last(x)) {}

  static bool is_channels_last(const Tensor& x) {
    int64_t step = 1;
    for (const int64_t d : {1, 3, 2, 0}) {
      if (x.size(d) != 1 && x.stride(d) != step) return false;
      step *= x.size(d);
    }
    return true;
  }

  Tensor of(const Tensor& t) const {
    if (!channels_last) return dense(t);
    return is_channels_last(t) ? t : torch::stable::contiguous(t, MemoryFormat::ChannelsLast);
  }
};

// A new tensor of x's shape and strides; x is dense.
Tensor new_like(const Tensor& x) { return torch::stable::empty_like(x); }

Three strip_branches(const Tensor x, const Tensor kernel_h, const Tensor kernel_v, const Tensor kernel_c,
                     int64_t anchor_h, int64_t anchor_v) {
  constexpr const char* op = "swconv::strip_branches";
  const Layout layout(x);
  const auto s = strip_sizes(op, x, kernel_h, kernel_v, kernel_c, anchor_h, anchor_v, layout.channels_last);
  const Tensor from = layout.of(x), kh = dense(kernel_h), kv = dense(kernel_v), kc = dense(kernel_c);
  Tensor h = new_like(from), v = new_like(from), i = new_like(from);
  with_type(op, x, [&](auto zero) {
    using T = decltype(zero);
    const auto& kernels = strip_kernels<T>();
    T *to_h = h.mutable_data_ptr<T>(), *to_v = v.mutable_data_ptr<T>(), *to_i = i.mutable_data_ptr<T>();
    parallel_for(0, strip_tasks(s, kernels.lanes), 1, [&](int64_t begin, int64_t end) {
      kernels.branches(s, from.const_data_ptr<T>(), kh.const_data_ptr<T>(), kv.const_data_ptr<T>(),
                       kc.const_data_ptr<T>(), to_h, to_v, to_i, begin, end);
    });
  });
  return {h, v, i};
}

Tensor strip_mix(const Tensor x, const Tensor kernel_h, const Tensor kernel_v, const Tensor kernel_c,
                 const std::optional<Tensor> bias, int64_t anchor_h, int64_t anchor_v) {
  constexpr const char* op = "swconv::strip_mix";
  const Layout layout(x);
  const auto s = strip_sizes(op, x, kernel_h, kernel_v, kernel_c, anchor_h, anchor_v, layout.channels_last);
  require_bias(op, x, bias, s);
  const Tensor from = layout.of(x), kh = dense(kernel_h), kv = dense(kernel_v), kc = dense(kernel_c);
  const std::optional<Tensor> b = bias ? std::optional<Tensor>(dense(*bias)) : std::nullopt;
  Tensor y = new_like(from);
  with_type(op, x, [&](auto zero) {
    using T = decltype(zero);
    const auto& kernels = strip_kernels<T>();
    const T* with_bias = b ? b->const_data_ptr<T>() : nullptr;
    T* to = y.mutable_data_ptr<T>();
    parallel_for(0, strip_tasks(s, kernels.lanes), 1, [&](int64_t begin, int64_t end) {
      kernels.mix(s, from.const_data_ptr<T>(), kh.const_data_ptr<T>(), kv.const_data_ptr<T>(),
                  kc.const_data_ptr<T>(), with_bias, to, begin, end);
    });
  });
  return y;
}

// Add the chunks' gradients of the kernels, in their order.
template <class T>
void sum_partial(const swconv::StripSizes& s, const T* partial, T* to_h, T* to_v, T* to_c, int64_t begin, int64_t end) {
  const int64_t taps = strip_taps(s), of_h = s.length_h * s.breadth_h, of_v = s.length_v * s.breadth_v;
  for (int64_t r = begin; r < end; ++r)
    for (int64_t t = 0; t < taps; ++t) {
      T total = 0;
      for (int64_t chunk = 0; chunk < strip_chunks(s); ++chunk) total += partial[(chunk * s.channels + r) * taps + t];
      if (t < of_h) to_h[r * of_h + t] = total;
      else if (t < of_h + of_v) to_v[r * of_v + t - of_h] = total;
      else to_c[r * s.small * s.small + t - of_h - of_v] = total;
    }
}

Four strip_branches_backward(const Tensor grad_h, const Tensor grad_v, const Tensor grad_i, const Tensor x,
                             const Tensor kernel_h, const Tensor kernel_v, const Tensor kernel_c, int64_t anchor_h,
                             int64_t anchor_v) {
  constexpr const char* op = "swconv::strip_branches_backward";
  const Layout layout(x);
  const auto s = strip_sizes(op, x, kernel_h, kernel_v, kernel_c, anchor_h, anchor_v, layout.channels_last);
  require_grads(op, x, {&grad_h, &grad_v, &grad_i}, s);
  const Tensor from = layout.of(x), kh = dense(kernel_h), kv = dense(kernel_v), kc = dense(kernel_c);
  const Tensor gh = layout.of(grad_h), gv = layout.of(grad_v), gi = layout.of(grad_i);
  Tensor gx = new_like(from), gkh = new_like(kh), gkv = new_like(kv), gkc = new_like(kc);
  const Tensor partial = torch::stable::new_empty(x, {strip_chunks(s), s.channels, strip_taps(s)});
  with_type(op, x, [&](auto zero) {
    using T = decltype(zero);
    const auto& kernels = strip_kernels<T>();
    T *to_x = gx.mutable_data_ptr<T>(), *to_h = gkh.mutable_data_ptr<T>(), *to_v = gkv.mutable_data_ptr<T>(),
      *to_c = gkc.mutable_data_ptr<T>(), *parts = partial.mutable_data_ptr<T>();
    parallel_for(0, strip_tasks(s, kernels.lanes), 1, [&](int64_t begin, int64_t end) {
      kernels.backward(s, gh.const_data_ptr<T>(), gv.const_data_ptr<T>(), gi.const_data_ptr<T>(),
                       from.const_data_ptr<T>(), kh.const_data_ptr<T>(), kv.const_data_ptr<T>(),
                       kc.const_data_ptr<T>(), to_x, parts, begin, end);
    });
    parallel_for(0, s.channels, kChannels, [&](int64_t begin, int64_t end) {
      sum_partial(s, parts, to_h, to_v, to_c, begin, end);
    });
  });
  return {gx, gkh, gkv, gkc};
}

#ifdef SWCONV_CUDA
// On the GPU maps are contiguous, and so are the results.
Three strip_branches_cuda(const Tensor x, const Tensor kernel_h, const Tensor kernel_v, const Tensor kernel_c,
                          int64_t anchor_h, int64_t anchor_v) {
  constexpr const char* op = "swconv::strip_branches";
  const auto s = strip_sizes(op, x, kernel_h, kernel_v, kernel_c, anchor_h, anchor_v, false);
  require_float(op, x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor from = dense(x), kh = dense(kernel_h), kv = dense(kernel_v), kc = dense(kernel_c);
  Tensor h = new_like(from), v = new_like(from), i = new_like(from);
  require_done(op, swconv::strip_branches_cuda(s, from.const_data_ptr<float>(), kh.const_data_ptr<float>(),
                                               kv.const_data_ptr<float>(), kc.const_data_ptr<float>(),
                                               h.mutable_data_ptr<float>(), v.mutable_data_ptr<float>(),
                                               i.mutable_data_ptr<float>(), current_stream(x)));
  return {h, v, i};
}

Tensor strip_mix_cuda(const Tensor x, const Tensor kernel_h, const Tensor kernel_v, const Tensor kernel_c,
                      const std::optional<Tensor> bias, int64_t anchor_h, int64_t anchor_v) {
  constexpr const char* op = "swconv::strip_mix";
  const auto s = strip_sizes(op, x, kernel_h, kernel_v, kernel_c, anchor_h, anchor_v, false);
  require_bias(op, x, bias, s);
  require_float(op, x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor from = dense(x), kh = dense(kernel_h), kv = dense(kernel_v), kc = dense(kernel_c);
  const std::optional<Tensor> b = bias ? std::optional<Tensor>(dense(*bias)) : std::nullopt;
  Tensor y = new_like(from);
  require_done(op, swconv::strip_mix_cuda(s, from.const_data_ptr<float>(), kh.const_data_ptr<float>(),
                                          kv.const_data_ptr<float>(), kc.const_data_ptr<float>(),
                                          b ? b->const_data_ptr<float>() : nullptr, y.mutable_data_ptr<float>(),
                                          current_stream(x)));
  return y;
}

Tensor strip_branches_adjoint_cuda(const Tensor grad_h, const Tensor grad_v, const Tensor grad_i, const Tensor kernel_h,
                                   const Tensor kernel_v, const Tensor kernel_c, int64_t anchor_h, int64_t anchor_v) {
  constexpr const char* op = "swconv::strip_branches_adjoint";
  const auto s = strip_sizes(op, grad_h, kernel_h, kernel_v, kernel_c, anchor_h, anchor_v, false);
  require_grads(op, grad_h, {&grad_v, &grad_i}, s);
  require_float(op, grad_h);
  const torch::stable::accelerator::DeviceGuard guard(grad_h.get_device_index());
  const Tensor gh = dense(grad_h), gv = dense(grad_v), gi = dense(grad_i);
  const Tensor kh = dense(kernel_h), kv = dense(kernel_v), kc = dense(kernel_c);
  Tensor gx = new_like(gh);
  require_done(op, swconv::strip_branches_adjoint_cuda(
                       s, gh.const_data_ptr<float>(), gv.const_data_ptr<float>(), gi.const_data_ptr<float>(),
                       kh.const_data_ptr<float>(), kv.const_data_ptr<float>(), kc.const_data_ptr<float>(),
                       gx.mutable_data_ptr<float>(), current_stream(grad_h)));
  return gx;
}

Four strip_branches_backward_cuda(const Tensor grad_h, const Tensor grad_v, const Tensor grad_i, const Tensor x,
                                  const Tensor kernel_h, const Tensor kernel_v, const Tensor kernel_c,
                                  int64_t anchor_h, int64_t anchor_v) {
  constexpr const char* op = "swconv::strip_branches_backward";
  const auto s = strip_sizes(op, x, kernel_h, kernel_v, kernel_c, anchor_h, anchor_v, false);
  require_grads(op, x, {&grad_h, &grad_v, &grad_i}, s);
  require_float(op, x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor from = dense(x), kh = dense(kernel_h), kv = dense(kernel_v), kc = dense(kernel_c);
  const Tensor gh = dense(grad_h), gv = dense(grad_v), gi = dense(grad_i);
  Tensor gx = new_like(from), gkh = new_like(kh), gkv = new_like(kv), gkc = new_like(kc);
  const Tensor partial = torch::stable::new_empty(x, {swconv::strip_chunks_cuda(s), s.channels, strip_taps(s)});
  require_done(op, swconv::strip_branches_backward_cuda(
                       s, gh.const_data_ptr<float>(), gv.const_data_ptr<float>(), gi.const_data_ptr<float>(),
                       from.const_data_ptr<float>(), kh.const_data_ptr<float>(), kv.const_data_ptr<float>(),
                       kc.const_data_ptr<float>(), gx.mutable_data_ptr<float>(), partial.mutable_data_ptr<float>(),
                       gkh.mutable_data_ptr<float>(), gkv.mutable_data_ptr<float>(), gkc.mutable_data_ptr<float>(),
                       current_stream(x)));
  return {gx, gkh, gkv, gkc};
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY(swconv, m) {
  m.def("shift_add(Tensor maps, Tensor pad_h, Tensor pad_v, Tensor pick, int halo) -> (Tensor, Tensor, Tensor)");
  m.def("shift_add_atomic(Tensor maps, Tensor pad_h, Tensor pad_v, Tensor pick, int halo) "
        "-> (Tensor, Tensor, Tensor)");
  m.def("shift_add_backward(Tensor grad_h, Tensor grad_v, Tensor grad_i, Tensor pad_h, Tensor pad_v, Tensor pick, "
        "int halo, int taps) -> Tensor");
  m.def("assemble(Tensor[] filters, Tensor mixing) -> (Tensor, Tensor, Tensor)");
  m.def("assemble_backward(Tensor grad_h, Tensor grad_v, Tensor grad_c, Tensor mixing) -> Tensor");
  m.def("strip_branches(Tensor x, Tensor kernel_h, Tensor kernel_v, Tensor kernel_c, int anchor_h, int anchor_v) "
        "-> (Tensor, Tensor, Tensor)");
  m.def("strip_branches_backward(Tensor grad_h, Tensor grad_v, Tensor grad_i, Tensor x, Tensor kernel_h, "
        "Tensor kernel_v, Tensor kernel_c, int anchor_h, int anchor_v) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("strip_branches_adjoint(Tensor grad_h, Tensor grad_v, Tensor grad_i, Tensor kernel_h, Tensor kernel_v, "
        "Tensor kernel_c, int anchor_h, int anchor_v) -> Tensor");
  m.def("strip_mix(Tensor x, Tensor kernel_h, Tensor kernel_v, Tensor kernel_c, Tensor? bias, int anchor_h, "
        "int anchor_v) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(swconv, CPU, m) {
  m.impl("shift_add", TORCH_BOX(&shift_add_cpu));
  m.impl("shift_add_backward", TORCH_BOX(&shift_add_backward_cpu));
  m.impl("assemble", TORCH_BOX(&assemble_cpu));
  m.impl("assemble_backward", TORCH_BOX(&assemble_backward_cpu));
  m.impl("strip_branches", TORCH_BOX(&strip_branches));
  m.impl("strip_branches_backward", TORCH_BOX(&strip_branches_backward));
  m.impl("strip_mix", TORCH_BOX(&strip_mix));
}

#ifdef SWCONV_CUDA
STABLE_TORCH_LIBRARY_IMPL(swconv, CUDA, m) {
  m.impl("shift_add", TORCH_BOX(&shift_add_gather_cuda));
  m.impl("shift_add_atomic", TORCH_BOX(&shift_add_atomic_cuda));
  m.impl("shift_add_backward", TORCH_BOX(&shift_add_backward_cuda));
  m.impl("assemble", TORCH_BOX(&assemble_cuda));
  m.impl("assemble_backward", TORCH_BOX(&assemble_backward_cuda));
  m.impl("strip_branches", TORCH_BOX(&strip_branches_cuda));
  m.impl("strip_branches_adjoint", TORCH_BOX(&strip_branches_adjoint_cuda));
  m.impl("strip_branches_backward", TORCH_BOX(&strip_branches_backward_cuda));
  m.impl("strip_mix", TORCH_BOX(&strip_mix_cuda));
}
#endif
