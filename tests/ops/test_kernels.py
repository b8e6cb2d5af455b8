"""The kernels alone, without torch's binding: every set of instructions, and the CUDA source as it runs on a CPU.

strips.cu and assemble.cu are compiled by g++ with SWCONV_EMULATE: the threads of a block run one after the other between two
barriers, and shared memory starts as NaN. That shows that their indices are right, not that a GPU runs them.
"""

import ctypes
import itertools
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view

CSRC = Path(__file__).parents[2] / "csrc"
FLAGS = {"portable": [], "avx2": ["-march=x86-64-v3"], "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"]}
FIELDS = ["images", "channels", "height", "width", "length_h", "breadth_h", "anchor_h", "length_v", "breadth_v", "anchor_v",
          "small", "channel_step", "pixel_step"]
SHIM = """
#include "swconv.h"
#include <algorithm>
#include <vector>
using namespace swconv;
#define KERNELS(name) strip_kernels_##name<REAL>()
#define OF(name) KERNELS(name)
extern "C" void mix(const StripSizes* s, const REAL* x, const REAL* kh, const REAL* kv, const REAL* kc,
                    const REAL* bias, REAL* y) {
  const auto k = OF(SWCONV_CPU);
  k.mix(*s, x, kh, kv, kc, bias, y, 0, strip_tasks(*s, k.lanes));
}
extern "C" void branches(const StripSizes* s, const REAL* x, const REAL* kh, const REAL* kv, const REAL* kc, REAL* h,
                         REAL* v, REAL* i) {
  const auto k = OF(SWCONV_CPU);
  k.branches(*s, x, kh, kv, kc, h, v, i, 0, strip_tasks(*s, k.lanes));
}
extern "C" void backward(const StripSizes* s, const REAL* gh, const REAL* gv, const REAL* gi, const REAL* x,
                         const REAL* kh, const REAL* kv, const REAL* kc, REAL* gx, REAL* gkh, REAL* gkv, REAL* gkc) {
  const auto k = OF(SWCONV_CPU);
  const int64_t taps = strip_taps(*s);
  std::vector<REAL> partial(strip_chunks(*s) * s->channels * taps);
  k.backward(*s, gh, gv, gi, x, kh, kv, kc, gx, partial.data(), 0, strip_tasks(*s, k.lanes));
  const int64_t of[] = {s->length_h * s->breadth_h, s->length_v * s->breadth_v, s->small * s->small};
  REAL* to[] = {gkh, gkv, gkc};
  for (int64_t r = 0; r < s->channels; ++r)
    for (int64_t part = 0, t = 0; part < 3; ++part)
      for (int64_t j = 0; j < of[part]; ++j, ++t) {
        to[part][r * of[part] + j] = 0;
        for (int64_t c = 0; c < strip_chunks(*s); ++c) to[part][r * of[part] + j] += partial[(c * s->channels + r) * taps + t];
      }
}
"""
EMULATED = """
#include "strips.cu"
#include <vector>
using namespace swconv;
extern "C" void mix(const StripSizes* s, const float* x, const float* kh, const float* kv, const float* kc,
                    const float* bias, float* y) {
  strip_mix_cuda(*s, x, kh, kv, kc, bias, y, nullptr);
}
extern "C" void branches(const StripSizes* s, const float* x, const float* kh, const float* kv, const float* kc, float* h,
                         float* v, float* i) {
  strip_branches_cuda(*s, x, kh, kv, kc, h, v, i, nullptr);
}
extern "C" void backward(const StripSizes* s, const float* gh, const float* gv, const float* gi, const float* x,
                         const float* kh, const float* kv, const float* kc, float* gx, float* gkh, float* gkv, float* gkc) {
  std::vector<float> partial(strip_chunks_cuda(*s) * s->channels * strip_taps(*s), __builtin_nanf(""));
  strip_branches_backward_cuda(*s, gh, gv, gi, x, kh, kv, kc, gx, partial.data(), gkh, gkv, gkc, nullptr);
}
"""
ASSEMBLE = """
#include "assemble.cu"
using namespace swconv;
extern "C" void forward(const AssembleSizes* s, bool gpu, const float* const* filters, const float* mixing, float* h, float* v,
                        float* c) {
  if (gpu) assemble_cuda(*s, filters, mixing, h, v, c, nullptr);
  else assemble_kernels_portable<float>().assemble(*s, filters, mixing, h, v, c, 0, s->channels);
}
extern "C" void backward(const AssembleSizes* s, bool gpu, const float* h, const float* v, const float* c, const float* mixing,
                         float* grad) {
  if (gpu) assemble_backward_cuda(*s, h, v, c, mixing, grad, nullptr);
  else assemble_kernels_portable<float>().adjoint(*s, h, v, c, mixing, grad, 0, s->channels);
}
"""
SHIFT = """
#include "swconv.h"
using namespace swconv;
extern "C" void forward(const ShiftSizes* s, const float* maps, const int32_t* pad_h, const int32_t* pad_v, const int32_t* pick,
                        float* h, float* v, float* i) {
  shift_add_cpu(*s, maps, pad_h, pad_v, pick, h, v, i, 0, s->images * s->channels);
}
extern "C" void backward(const ShiftSizes* s, const float* h, const float* v, const float* i, const int32_t* pad_h,
                         const int32_t* pad_v, const int32_t* pick, float* grad) {
  shift_add_backward_cpu(*s, h, v, i, pad_h, pad_v, pick, grad, 0, s->images * s->channels * s->taps);
}
"""
# name: (B, C, H, W), (N, L, anchor) of the horizontal and of the vertical strip, S
CASES = {
    "stage 1": ((1, 3, 56, 56), (3, 51, 25), (3, 51, 25), 3),
    "stage 2": ((2, 9, 28, 28), (3, 51, 24), (3, 51, 24), 3),
    "stage 3": ((3, 17, 14, 14), (3, 48, 23), (3, 48, 23), 3),
    "stage 4": ((20, 18, 7, 7), (3, 15, 6), (3, 15, 6), 3),
    "one more across than a quad": ((2, 5, 5, 13), (3, 15, 6), (3, 15, 6), 3),
    "small 5, not square": ((2, 5, 5, 9), (5, 15, 6), (5, 15, 6), 5),
    "one row, anchor at the end": ((1, 3, 1, 7), (3, 15, 0), (3, 15, 14), 5),
    "longer than a tile": ((1, 2, 70, 20), (7, 21, 20), (7, 21, 20), 3),
    "different strips": ((2, 4, 6, 6), (3, 3, 1), (5, 9, 2), 3),
    "different strips, small kernel as broad as one": ((1, 2, 6, 11), (7, 5, 3), (3, 9, 2), 3),
    "one pixel": ((9, 33, 1, 1), (3, 9, 4), (3, 9, 4), 3),
    "one column, single taps": ((17, 1, 40, 1), (1, 4, 2), (1, 4, 2), 1),
    "longer than a tile, strips longer than that": ((1, 2, 70, 9), (3, 99, 40), (3, 99, 60), 3),
    "wider than two tiles, small kernel broader": ((2, 1, 9, 140), (5, 21, 10), (5, 21, 10), 7),
    "broad strips": ((2, 2, 20, 13), (9, 21, 10), (9, 21, 10), 5),
    "no image": ((0, 2, 6, 6), (3, 9, 4), (3, 9, 4), 3),
}
# B, R, n, E, H, W, halo
SHIFTS = [(2, 3, 5, 4, 9, 7, 1), (1, 2, 17, 2, 3, 12, 0), (3, 1, 1, 1, 1, 1, 2), (0, 2, 3, 2, 4, 4, 1)]
# branches, R, n, N
ASSEMBLIES = [(1, 5, 17, 3), (2, 7, 16, 3), (16, 2, 5, 5), (3, 3, 8, 7), (2, 1, 1, 1), (1, 2, 40, 3), (2, 0, 5, 3)]


class Sizes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in FIELDS]


def runs_here(name: str) -> bool:
    flags, name = Path("/proc/cpuinfo").read_text(), name.removesuffix("-double")
    if name in ("portable", "cuda", "assemble", "shift"):
        return True
    return platform.machine() == "x86_64" and f" {name}{'f' * (name == 'avx512')} " in flags


def compiled(folder: Path, name: str, *options: str) -> Path:
    """A shared library: `mix`, `branches` and `backward` of one implementation, both of `assemble`, or those of `shift_add`."""
    shim, library = folder / f"{name}.cpp", folder / f"{name}.so"
    cpu, _, real = name.partition("-")
    text, source, own = {
        "cuda": (EMULATED, [], ["-DSWCONV_EMULATE"]),
        "assemble": (ASSEMBLE, [CSRC / "assemble_cpu.cpp"], ["-DSWCONV_EMULATE", "-DSWCONV_CPU=portable"]),
        "shift": (SHIFT, [CSRC / "shift_add_cpu.cpp"], []),
    }.get(name) or (SHIM, [CSRC / "strips_cpu.cpp"], [f"-DSWCONV_CPU={cpu}", f"-DREAL={real or 'float'}", *FLAGS[cpu]])
    shim.write_text(text)
    sources = [shim, *source]
    command = ["g++", "-std=c++17", "-O1", "-g", "-shared", "-fPIC", "-w", f"-I{CSRC}", *own, *options, *sources, "-o", library]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return library


def draw(case: str, channels_last: bool, dtype: type = np.float32):
    shape, horizontal, vertical, small = CASES[case]
    rng = np.random.RandomState(0)

    def tensor(*size):
        return rng.standard_normal(size).astype(dtype)

    maps = [tensor(*shape) for _ in range(4)]                                   # x and three gradients
    if channels_last:
        maps = [np.ascontiguousarray(m.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2) for m in maps]
    (n, length, anchor), (n_v, length_v, anchor_v) = horizontal, vertical
    kernels = [tensor(shape[1], 1, n, length), tensor(shape[1], 1, length_v, n_v), tensor(shape[1], 1, small, small)]
    pixels = shape[2] * shape[3]
    steps = (1, shape[1]) if channels_last else (pixels, 1)
    sizes = Sizes(*shape, length, n, anchor, length_v, n_v, anchor_v, small, *steps)
    return sizes, maps, kernels, tensor(shape[1])


def expected(sizes: Sizes, maps: list, kernels: list):
    """All results in float64, from windows: nothing here knows of strips, tiles or blocks."""
    x, *grads = (m.astype(np.float64) for m in maps)
    height, width = x.shape[2:]
    anchors = [(sizes.breadth_h // 2, sizes.anchor_h), (sizes.anchor_v, sizes.breadth_v // 2), (sizes.small // 2,) * 2]
    outputs, grad_x, grad_kernels = [], np.zeros_like(x), []
    for kernel, grad, (up, left) in zip(kernels, grads, anchors, strict=True):
        kernel = kernel[:, 0].astype(np.float64)
        rows, columns = kernel.shape[1:]
        padded = np.pad(x, ((0, 0), (0, 0), (up, rows - 1 - up), (left, columns - 1 - left)))
        windows = sliding_window_view(padded, (rows, columns), axis=(2, 3))     # (B, C, H, W, rows, columns)
        outputs.append(np.einsum("bchwrs,crs->bchw", windows, kernel))
        grad_kernels.append(np.einsum("bchwrs,bchw->crs", windows, grad)[:, None])
        back = np.zeros_like(padded)
        for r in range(rows):
            for s in range(columns):
                back[:, :, r : r + height, s : s + width] += grad * kernel[:, r, s][:, None, None]
        grad_x += back[:, :, up : up + height, left : left + width]
    return outputs, grad_x, grad_kernels


def results(library: Path, sizes: Sizes, maps: list, kernels: list, bias: np.ndarray):
    lib = ctypes.CDLL(str(library))

    def call(name, *arrays):
        getattr(lib, name)(ctypes.byref(sizes), *(ctypes.c_void_p(a.ctypes.data) for a in arrays))

    def fresh(like):
        return np.full_like(like, np.nan)                                       # keeps the layout

    outputs, mixed, grad_x = [fresh(maps[0]) for _ in range(3)], fresh(maps[0]), fresh(maps[0])
    grad_kernels = [fresh(k) for k in kernels]
    call("branches", maps[0], *kernels, *outputs)
    call("mix", maps[0], *kernels, bias, mixed)
    call("backward", *maps[1:], maps[0], *kernels, grad_x, *grad_kernels)
    return outputs, mixed, grad_x, grad_kernels


def check(library: Path, case: str, channels_last: bool):
    double = library.stem.endswith("double")
    sizes, maps, kernels, bias = draw(case, channels_last, np.float64 if double else np.float32)
    outputs, mixed, grad_x, grad_kernels = results(library, sizes, maps, kernels, bias)
    wanted, wanted_x, wanted_kernels = expected(sizes, maps, kernels)
    pairs = [*zip(outputs, wanted, strict=True), (mixed, sum(wanted) + bias.astype(np.float64)[:, None, None]),
             (grad_x, wanted_x), *zip(grad_kernels, wanted_kernels, strict=True)]
    for ours, truth in pairs:
        assert np.isfinite(ours).all()                                          # all of it was written
        if truth.size:
            assert np.abs(ours - truth).max() <= (1e-14 if double else 2e-6) * max(1, np.abs(truth).max())


@pytest.fixture(scope="module", params=["portable", "avx2", "avx512", "cuda", "avx2-double", "avx512-double"])
def library(request, tmp_path_factory):
    if not runs_here(request.param):
        pytest.skip(f"this processor has no {request.param}")
    return compiled(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_kernels_agree_with_float64(library, case, channels_last):
    if channels_last and library.stem == "cuda":
        pytest.skip("the GPU's kernels take contiguous maps")
    check(library, case, channels_last)


def test_two_runs_of_the_kernels_give_the_same_bits(library):
    dtype = np.float64 if library.stem.endswith("double") else np.float32
    first, second = (results(library, *draw("stage 4", False, dtype)) for _ in range(2))
    assert all(map(np.array_equal, [*first[0], *first[1:3], *first[3]], [*second[0], *second[1:3], *second[3]]))


def check_assembly(library: Path, branches: int, channels: int, taps: int, small: int):
    """The GPU's source against the CPU's, which test_strips.py holds against the matrix product."""
    lib, sizes = ctypes.CDLL(str(library)), (ctypes.c_int64 * 4)(branches, channels, taps, small)
    rng, count = np.random.RandomState(0), taps * small
    filters = [rng.standard_normal((channels * taps, small, small)).astype(np.float32) for _ in range(branches)]
    mixing = rng.randint(0, 3, (channels, 2 * taps + 1, taps)).astype(np.float32)
    shapes = (channels, small, count), (channels, count, small), (channels, small, small)
    grads = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]

    def pointer(array):
        return ctypes.c_void_p(array.ctypes.data)

    def outcome(gpu):
        kernels, grad = [np.full(shape, np.nan, np.float32) for shape in shapes], np.full_like(filters[0], np.nan)
        lib.forward(sizes, gpu, (ctypes.c_void_p * branches)(*map(pointer, filters)), pointer(mixing), *map(pointer, kernels))
        lib.backward(sizes, gpu, *map(pointer, grads), pointer(mixing), pointer(grad))
        return *kernels, grad

    for ours, wanted in zip(outcome(True), outcome(False), strict=True):
        assert np.isfinite(ours).all()                                          # all of it was written
        np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-5)


def check_shift(library: Path, *sizes: int):
    """Against the definition, map by map; some maps are moved out altogether, by as much as a table can hold."""
    images, channels, taps, edges, height, width, halo = sizes
    lib, rng, count = ctypes.CDLL(str(library)), np.random.RandomState(0), channels * taps
    pads = [rng.randint(-6, 7, (count, edges)).astype(np.int32) for _ in range(2)]
    pads[0][0, 0], pads[1][-1, -1] = -(2**31), 2**31 - 1
    pick = (rng.randint(0, taps, (channels, edges)) + taps * np.arange(channels)[:, None]).astype(np.int32)
    maps = rng.standard_normal((images, count, height + 2 * halo, width + 2 * halo)).astype(np.float32)
    grads = [rng.standard_normal((images, channels, height, width)).astype(np.float32) for _ in range(3)]
    outputs, grad = [np.full_like(g, np.nan) for g in grads], np.full_like(maps, np.nan)

    def call(function, *arrays):
        function((ctypes.c_int64 * 7)(*sizes), *(ctypes.c_void_p(array.ctypes.data) for array in arrays))

    call(lib.forward, maps, *pads, pick, *outputs)
    call(lib.backward, *grads, *pads, pick, grad)
    wanted, back = [np.zeros_like(g, np.float64) for g in grads], np.zeros_like(maps, np.float64)
    for c, e in itertools.product(range(count), range(edges)):
        r = c // taps
        moves = [(halo, -int(pads[0][c, e])), (-int(pads[1][c, e]), halo), *([(halo, halo)] if pick[r, e] == c else [])]
        for part, (down, right) in enumerate(moves):
            y, x = np.arange(height) + down, np.arange(width) + right
            rows, columns = (y >= 0) & (y < maps.shape[2]), (x >= 0) & (x < maps.shape[3])
            to, at = np.ix_(rows, columns), np.ix_(y[rows], x[columns])
            wanted[part][:, r][(slice(None), *to)] += maps[:, c][(slice(None), *at)]
            back[:, c][(slice(None), *at)] += grads[part][:, r][(slice(None), *to)]
    for ours, truth in zip((*outputs, grad), (*wanted, back), strict=True):
        assert np.isfinite(ours).all()                                          # all of it was written
        np.testing.assert_allclose(ours, truth, rtol=1e-5, atol=1e-5)


def check_all(name: str, library: Path):
    if name == "shift":
        for sizes in SHIFTS:
            check_shift(library, *sizes)
        return
    if name == "assemble":
        for sizes in ASSEMBLIES:
            check_assembly(library, *sizes)
        return
    for case, channels_last in itertools.product(CASES, [False] if name == "cuda" else [False, True]):
        check(library, case, channels_last)


@pytest.fixture(scope="module")
def assembly(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("assemble"), "assemble")


@pytest.mark.parametrize("sizes", ASSEMBLIES, ids=str)
def test_filters_are_assembled_on_the_gpu_as_on_the_cpu(assembly, sizes):
    check_assembly(assembly, *sizes)


@pytest.mark.parametrize("sizes", SHIFTS, ids=str)
def test_maps_are_shifted_and_added_as_defined(tmp_path_factory, sizes):
    check_shift(compiled(tmp_path_factory.mktemp("shift"), "shift"), *sizes)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["portable", "avx2", "avx512", "portable-double", "avx2-double", "avx512-double", "cuda",
                                  "assemble", "shift"])
def test_the_address_sanitizer_finds_nothing(name, tmp_path):
    if not runs_here(name):
        pytest.skip(f"this processor has no {name}")
    library = compiled(tmp_path, name, "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    preload = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout.strip()
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_kernels
test_kernels.check_all({name!r}, Path({str(library)!r}))
"""
    environment = os.environ | {"LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
