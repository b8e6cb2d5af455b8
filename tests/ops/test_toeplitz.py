"""The Toeplitz form equals torch's convolution, in Triton's interpreter, and compiles for the GPUs it is made for.

Triton settles at its import whether kernels are compiled or interpreted, so this file, run as a script, does either in a
process of its own and prints what it found as JSON. The tests judge that.
"""

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from swconv.ops import toeplitz

ROOT = Path(__file__).parents[2]
TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
GRADIENTS = ("grad_x", "grad_kernel_h", "grad_kernel_v", "grad_kernel_c")
PARTS = ("h", "v", "i", "mix", *(f"mix_{name}" for name in GRADIENTS), *GRADIENTS)

# images, channels, height, width; breadth, length and anchor of the horizontal strip, of the vertical; side of the small kernel
CASES = {
    "stage 1": ((1, 1, 56, 56), (3, 51, 25), (3, 51, 25), 3),
    "stage 2": ((1, 1, 28, 28), (3, 51, 24), (3, 51, 24), 3),
    "stage 3": ((2, 1, 14, 14), (3, 48, 23), (3, 48, 23), 3),
    "stage 4, an image left over": ((3, 1, 7, 7), (3, 15, 6), (3, 15, 6), 3),
    "breadth 5, off-centre anchors": ((1, 1, 14, 20), (5, 9, 0), (5, 9, 8), 3),
    "low map": ((2, 2, 5, 9), (3, 7, 5), (3, 7, 1), 3),
    "one row": ((3, 1, 1, 7), (3, 9, 4), (3, 9, 5), 3),
    "one pixel": ((1, 1, 1, 1), (1, 1, 0), (1, 1, 0), 1),
    "longer than a tile": ((1, 1, 70, 20), (3, 51, 25), (3, 51, 25), 3),
    "wider than the reach": ((1, 1, 3, 70), (3, 5, 1), (3, 5, 2), 3),
    "small kernel broader than the strips": ((1, 1, 8, 8), (3, 7, 3), (3, 7, 2), 5),
    "small kernel past the strip's end": ((1, 1, 8, 8), (3, 7, 0), (3, 7, 3), 3),
    "unequal strips": ((1, 2, 6, 11), (7, 5, 3), (3, 9, 2), 3),
    "whole maps, two tiles": ((70, 2, 7, 7), (3, 15, 6), (3, 15, 6), 3),
    "64 pixels": ((2, 1, 8, 8), (5, 21, 20), (3, 9, 0), 7),
    "64 pixels in a row": ((2, 1, 1, 64), (3, 51, 24), (3, 51, 25), 3),
    "a column": ((2, 2, 37, 1), (3, 51, 24), (7, 99, 60), 5),
    "one more than 64 pixels": ((2, 1, 5, 13), (3, 15, 6), (3, 15, 6), 3),
    "few pixels": ((5, 2, 3, 4), (3, 3, 0), (1, 4, 3), 3),
}
# case, dtype of the maps, dtype of the kernels, layout, PROGRAMS: with 1, a program does all of a channel's work
RUNS = {
    **{case: (case, "float32", "float32", "contiguous", 1024) for case in CASES},
    "channels_last": ("low map", "float32", "float32", "channels_last", 1024),
    "neither layout": ("low map", "float32", "float32", "transposed", 1024),
    "one program per channel": ("stage 4, an image left over", "float32", "float32", "contiguous", 1),
    "wider than the reach": ("wider than the reach", "float32", "float32", "contiguous", 1),
    "one program per channel of two tiles": ("whole maps, two tiles", "float32", "float32", "contiguous", 1),
    "bfloat16, whole maps": ("whole maps, two tiles", "bfloat16", "float32", "contiguous", 1024),
    "float16, whole maps": ("64 pixels", "float16", "float16", "channels_last", 1024),
    "bfloat16, stage 1": ("stage 1", "bfloat16", "bfloat16", "contiguous", 1024),
    "bfloat16, channels_last": ("low map", "bfloat16", "float32", "channels_last", 1024),
    "float16": ("low map", "float16", "float32", "contiguous", 1024),
}
REPEATED = ("low map", "one program per channel", "whole maps, two tiles", "one more than 64 pixels")
# channels, side of the map, length, anchor
STAGES = {"stage 1": (60, 56, 51, 25), "stage 2": (122, 28, 51, 24), "stage 3": (246, 14, 48, 23), "stage 4": (492, 7, 15, 6)}

KERNELS = ("whole_kernel", "held_kernel", "convolve_kernel", "whole_correlate_kernel", "correlate_kernel", "collect_kernel")
LAUNCHES = ("branches", "mix", "grad_x", "parts of the kernels' gradients", "their sums",
            "grad_x of mix", "parts of the kernels' gradients of mix", "their sums of mix")
SPLIT = "parts of the kernels' gradients"                     # of small maps in float32, too, by three products of TF32
SPILLED = {f"stage 4, {SPLIT}, float32, A100"}                # its tiles are those that were fastest on an H100
# architecture, bytes of shared memory that a program may have, warps for a tile of 64 rows
GPUS = {"A100": (80, 163 * 1024, 8), "L40S": (89, 99 * 1024, 8), "H100": (90, 227 * 1024, 4)}


def in_process_of_its_own(task, interpret, tmp_path):
    switches = {"TRITON_INTERPRET": str(int(interpret)), "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment = os.environ | switches | {"PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, __file__, task], env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    return in_process_of_its_own("interpret", True, tmp_path_factory.mktemp("triton"))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("run", RUNS)
def test_equals_the_convolution(interpreted, run, part):
    assert interpreted[run]["errors"][part] < TOLERANCE[RUNS[run][1]]


@pytest.mark.parametrize("run", RUNS)
def test_results_are_contiguous_and_have_the_dtypes_of_their_arguments(interpreted, run):
    _, dtype, kernel_dtype, _, _ = RUNS[run]
    assert interpreted[run]["dtypes"] == [dtype] * 4 + ([dtype] + [kernel_dtype] * 3) * 2
    assert interpreted[run]["contiguous"]


@pytest.mark.parametrize("run", REPEATED)
def test_repeats_bit_for_bit(interpreted, run):
    assert interpreted[run]["repeats"]


def test_no_image_gives_no_output_and_zero_gradients():
    x = torch.empty(0, 2, 5, 9)
    kernels = torch.randn(2, 1, 3, 7), torch.randn(2, 1, 7, 3), torch.randn(2, 1, 3, 3)
    assert [part.shape for part in toeplitz.strip_branches(x, *kernels, 3, 3)] == [x.shape] * 3
    assert toeplitz.strip_mix(x, *kernels, None, 3, 3).shape == x.shape
    grad_x, *grads = toeplitz.strip_branches_backward(x, x, x, x, *kernels, 3, 3)
    assert grad_x.shape == x.shape
    for grad, kernel in zip(grads, kernels, strict=True):
        torch.testing.assert_close(grad, torch.zeros_like(kernel), atol=0, rtol=0)


@pytest.fixture
def tf32():
    """Set whether torch may multiply in TF32, and set it back."""
    before = torch.backends.cuda.matmul.allow_tf32
    yield lambda allowed: setattr(torch.backends.cuda.matmul, "allow_tf32", allowed)
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("allowed", [False, True])
def test_takes_float32_only_where_torch_may_round_it(tf32, allowed):
    tf32(allowed)
    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    assert [toeplitz.takes(dtype) for dtype in dtypes] == [True, True, allowed, False]


def test_takes_nothing_where_triton_is_missing():
    script = (
        "import sys, torch; sys.modules['triton'] = None; from swconv.ops import toeplitz; "
        "sys.exit(toeplitz.takes(torch.bfloat16))"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


@pytest.mark.slow
def test_kernels_fit_their_gpus_and_do_not_spill(tmp_path):
    with ThreadPoolExecutor(2) as pool:
        parts = pool.map(lambda gpu: in_process_of_its_own(f"compile {gpu}", False, tmp_path), GPUS)
        compiled = {name: use for part in parts for name, use in part.items()}
    small = [side for _, side, *_ in STAGES.values() if side <= toeplitz.SPLIT]
    assert len(compiled) == len(GPUS) * (len(LAUNCHES) * len(STAGES) + len(small))
    assert {name: use for name, use in compiled.items() if use["shared"] > use["room"]} == {}
    assert {name for name, use in compiled.items() if use["stack"]} == SPILLED


# ---- in the process of its own


def convolution(x, kernel, anchor_y, anchor_x):
    """By torch: the tap at the anchor lies on the output pixel."""
    height, width = kernel.shape[2:]
    return F.conv2d(F.pad(x, (anchor_x, width - 1 - anchor_x, anchor_y, height - 1 - anchor_y)), kernel, groups=x.shape[1])


def relative(got, wanted):
    return ((got.double() - wanted).norm() / wanted.norm()).item()


def interpret(run):
    case, dtype, kernel_dtype, layout, programs = RUNS[run]
    size, (breadth_h, length_h, anchor_h), (breadth_v, length_v, anchor_v), small = CASES[case]
    toeplitz.PROGRAMS = programs
    generator, channels = torch.Generator().manual_seed(0), size[1]
    x, *grads = (torch.randn(size, generator=generator).to(getattr(torch, dtype)) for _ in range(4))
    shapes = (channels, 1, breadth_h, length_h), (channels, 1, length_v, breadth_v), (channels, 1, small, small)
    kernels = [torch.randn(shape, generator=generator).to(getattr(torch, kernel_dtype)) for shape in shapes]
    bias = torch.randn(channels, generator=generator) if channels > 1 else None
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "transposed":
        x = x.mT.contiguous().mT

    def outcome():
        parts = toeplitz.strip_branches(x, *kernels, anchor_h, anchor_v)
        mix = toeplitz.strip_mix(x, *kernels, bias, anchor_h, anchor_v)
        mix_backward = toeplitz.strip_branches_backward(*grads[:1] * 3, x, *kernels, anchor_h, anchor_v)
        backward = toeplitz.strip_branches_backward(*grads, x, *kernels, anchor_h, anchor_v)
        return *parts, mix, *mix_backward, *backward

    inputs = [tensor.double().requires_grad_() for tensor in (x, *kernels)]
    anchors = (breadth_h // 2, anchor_h), (anchor_v, breadth_v // 2), (small // 2, small // 2)
    parts = [convolution(inputs[0], kernel, *anchor) for kernel, anchor in zip(inputs[1:], anchors, strict=True)]
    mix = sum(parts) if bias is None else sum(parts) + bias[:, None, None]
    mix_backward = torch.autograd.grad(mix, inputs, grads[0].double(), retain_graph=True)
    backward = torch.autograd.grad(parts, inputs, [grad.double() for grad in grads])
    wanted = *parts, mix, *mix_backward, *backward
    got = outcome()
    return {
        "errors": {part: relative(a, b.detach()) for part, a, b in zip(PARTS, got, wanted, strict=True)},
        "dtypes": [str(tensor.dtype).removeprefix("torch.") for tensor in got],
        "contiguous": all(tensor.is_contiguous() for tensor in got),
        "repeats": run in REPEATED and all(torch.equal(a, b) for a, b in zip(got, outcome(), strict=True)),
    }


def interpret_all():
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    patch_tensor, dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot

    def patch_tensor_for_numpy_2_4(tensor, scope):
        """Scalars are arrays of shape (1,), which numpy 2.4 turns into no int."""
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def dot_of_values(self, a, b, *rest):
        """bfloat16 is held as uint16, and the interpreter multiplies the bit patterns as if they were numbers."""
        return dot(self, *(widened(factor) for factor in (a, b)), *rest)

    def widened(factor):
        if factor.get_element_ty() != tl.bfloat16:
            return factor
        return interpreter.TensorHandle((factor.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    interpreter._patch_lang_tensor = patch_tensor_for_numpy_2_4
    interpreter.InterpreterBuilder.create_dot = dot_of_values
    torch.empty_like = functools.partial(torch.full_like, fill_value=float("nan"))          # a value not written is seen
    torch.empty = lambda *size, **kind: torch.full(size, float("nan"), **kind)
    return {run: interpret(run) for run in RUNS}


class Recorder:
    """In the place of a kernel: keeps what it would be launched with."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launches.append((self.kernel, arguments, options))


def launches(channels, side, length, anchor, *gpu, dtype="bfloat16"):
    """The launches for 128 images and kernels in float32, by name, on a GPU as `toeplitz._gpu` describes it."""
    recorded = []
    toeplitz._gpu = lambda device: gpu
    kernels = {name: getattr(toeplitz, name) for name in KERNELS}
    for name, kernel in kernels.items():
        setattr(toeplitz, name, Recorder(kernel, recorded))
    x, *grads = (torch.empty(128, channels, side, side, dtype=getattr(torch, dtype)) for _ in range(4))
    shapes = (channels, 1, 3, length), (channels, 1, length, 3), (channels, 1, 3, 3)
    strips = [torch.empty(shape) for shape in shapes]
    toeplitz.strip_branches(x, *strips, anchor, anchor)
    toeplitz.strip_mix(x, *strips, torch.empty(channels), anchor, anchor)
    toeplitz.strip_branches_backward(*grads, x, *strips, anchor, anchor)
    toeplitz.strip_branches_backward(*grads[:1] * 3, x, *strips, anchor, anchor)
    for name, kernel in kernels.items():
        setattr(toeplitz, name, kernel)
    return dict(zip(LAUNCHES, recorded, strict=True))


def compile_launch(kernel, arguments, options, architecture):
    """Compile as Triton would for the launch: None is a constant, pointers are multiples of 16, sizes any."""
    import triton
    from triton.backends.compiler import GPUTarget

    names = kernel.arg_names
    constants = {name: value for name, value in options.items() if name in names}
    signature, divisible = {}, {}
    for place, (name, value) in enumerate(zip(names, arguments, strict=False)):
        if isinstance(value, torch.Tensor):
            signature[name] = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[value.dtype]
            divisible[place,] = [["tt.divisibility", 16]]
        elif value is None:
            constants[name] = value
        else:
            assert kernel.params[place].do_not_specialize, name
            signature[name] = "i32"
    signature = {name: signature.get(name, "constexpr") for name in names}
    asked = {name: value for name, value in options.items() if name not in names}
    return triton.compile(
        triton.compiler.ASTSource(kernel, signature, constants, divisible), GPUTarget("cuda", architecture, 32), asked
    )


def resources(compiled, folder):
    """Registers and bytes of stack per thread, as the binary says; bytes of shared memory per program, as Triton says."""
    from triton import knobs

    binary = Path(folder) / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    told = subprocess.run([knobs.nvidia.cuobjdump.path, "-res-usage", binary], capture_output=True, text=True, check=True)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", told.stdout).groups()
    return {"registers": int(registers), "stack": int(stack), "shared": compiled.metadata.shared}


def compile_all(gpu):
    folder, found = tempfile.mkdtemp(dir=os.environ["TRITON_CACHE_DIR"]), {}
    architecture, room, warps = GPUS[gpu]
    for stage, sizes in STAGES.items():
        wanted = {f"{stage}, {name}, {gpu}": launch for name, launch in launches(*sizes, room, warps).items()}
        if sizes[1] <= toeplitz.SPLIT:
            wanted[f"{stage}, {SPLIT}, float32, {gpu}"] = launches(*sizes, room, warps, dtype="float32")[SPLIT]
        for name, launch in wanted.items():
            found[name] = {"room": room} | resources(compile_launch(*launch, architecture), folder)
    return found


if __name__ == "__main__":
    task, *which = sys.argv[1].split()
    print(json.dumps({"interpret": interpret_all, "compile": compile_all}[task](*which)))
