"""The engines behind the operators: which one takes a tensor, and what torch must know of them (fake kernels, gradients).

- "compiled": csrc/ in C++ on the CPU (float32, float64) and in CUDA C++ (float32); formulas and shapes in csrc/swconv.h.
- "toeplitz": Triton on the GPU, for the strips in bfloat16, float16 and TF32; in float32 for kernels' gradients, of small maps.
- "torch": plain torch, for whatever is left, where nothing is built, under torch.func and forward-mode differentiation, and for
  gradients that are to be differentiated themselves (create_graph). SWCONV_NATIVE=0 asks for it everywhere.

On GPUs these have run on an H100 (sm_90); for sm_80 and sm_89 they are compiled, and have not run.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

LIBRARY = Path(__file__).resolve().parents[1] / "_C.abi3.so"
OPERATORS = ("shift_add", "shift_add_atomic", "shift_add_backward", "assemble", "assemble_backward", "strip_branches",
             "strip_mix", "strip_branches_backward", "strip_branches_adjoint")

_loading = threading.Lock()
_gradients: dict[str, Callable] = {}     # an operator by an autograd Function
_log = logging.getLogger(__name__)


@torch.compiler.assume_constant_result
def available() -> bool:
    """Load the compiled library, once, and say whether its operators can be called."""
    with _loading:
        return _load()


def handles(x: Tensor, op: str = "strip_branches") -> bool:
    """Whether a compiled operator takes this tensor: float32 or float64 on the CPU, float32 on the GPU."""
    if transformed():
        return False
    if x.device.type == "cpu":
        return x.dtype in (torch.float32, torch.float64) and available()
    return x.device.type == "cuda" and x.dtype == torch.float32 and _on_gpu(op)


def strip_engine(x: Tensor) -> str:
    """"compiled", "toeplitz" or "torch": the best engine that takes this tensor through the strips. Says so once."""
    if transformed():
        return "torch"
    half = x.is_cuda and _toeplitz_takes(x.dtype)
    name = "toeplitz" if half else "compiled" if handles(x) else "torch"
    if not x.is_meta:
        _say(name, x.device.type, str(x.dtype))
    return name


def transformed() -> bool:
    """Whether torch.func or forward-mode differentiation follows the call: only torch's own operators carry that on."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def call(op: str, *arguments: Any) -> Any:
    """`torch.ops.swconv.<op>`; where no compiler traces the call, straight to its kernel or its autograd Function.

    torch.library's way to a gradient, through Python for every call and pytrees for lists, takes half of a call on small maps.
    """
    function = getattr(torch.ops.swconv, op).default
    if torch.compiler.is_compiling():
        return function(*arguments)
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
        return _gradients[op](*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return function(*arguments)


def layout(x: Tensor) -> torch.memory_format:
    """channels_last where x is laid out so and not also contiguous."""
    last = not x.is_contiguous() and not transformed() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def relaid(x: Tensor, wanted: torch.memory_format) -> Tensor:
    """x contiguous or channels_last, copied if need be. A compiler gets torch's copy, which it can fuse with its neighbours."""
    last = wanted == torch.channels_last
    other = x.is_contiguous() if last else layout(x) == torch.channels_last
    if x.is_cuda and other and not torch.compiler.is_compiling() and _relayouts():
        return torch.ops.swconv.relayout.default(x, last)
    return x.contiguous(memory_format=wanted)


def library_sha256() -> str | None:
    """SHA-256 of the library that `available` loads; None where there is none."""
    return hashlib.sha256(LIBRARY.read_bytes()).hexdigest() if available() else None


@torch.compiler.assume_constant_result
def _say(engine: str, device: str, dtype: str) -> None:
    _say_once(engine, device, dtype)


@functools.cache
def _say_once(engine: str, device: str, dtype: str) -> None:
    _log.info("The SW operator runs on %s in %s: %s", device, dtype.removeprefix("torch."), {
        "compiled": "compiled csrc/", "toeplitz": "Triton, Toeplitz form", "torch": "plain torch, no faster engine takes it",
    }[engine])


@torch.compiler.assume_constant_result
def _toeplitz_takes(dtype: torch.dtype) -> bool:
    """Whether the Triton engine is there for the strips in this dtype."""
    return dtype.is_floating_point and _toeplitz() is not None and _toeplitz().takes(dtype)


@torch.compiler.assume_constant_result
def _toeplitz_split() -> int:
    """`toeplitz.SPLIT`; 0 without that engine."""
    return 0 if _toeplitz() is None else _toeplitz().SPLIT


@functools.cache
def _toeplitz() -> ModuleType | None:
    """The Triton engine, its operators registered, if it is there."""
    if os.environ.get("SWCONV_NATIVE") == "0":
        return None
    from swconv.ops import toeplitz  # triton takes a second to import, and only the GPU needs it

    if toeplitz.triton is None:
        return None
    with _loading:
        _register_toeplitz()
    return toeplitz


@functools.cache
def _register_toeplitz() -> None:
    from swconv.ops import toeplitz

    strips = "Tensor kernel_h, Tensor kernel_v, Tensor kernel_c"
    for name, function, fake, arguments, results in (
        ("branches", toeplitz.strip_branches, _fake_strip_branches,
         f"Tensor x, {strips}, int anchor_h, int anchor_v", "(Tensor, Tensor, Tensor)"),
        ("mix", toeplitz.strip_mix, _fake_strip_mix, f"Tensor x, {strips}, Tensor? bias, int anchor_h, int anchor_v", "Tensor"),
        ("branches_backward", toeplitz.strip_branches_backward, _fake_strip_branches_backward,
         f"Tensor grad_h, Tensor grad_v, Tensor grad_i, Tensor x, {strips}, int anchor_h, int anchor_v",
         "(Tensor, Tensor, Tensor, Tensor)"),
        ("kernel_gradients", toeplitz.kernel_gradients, _fake_kernel_gradients,
         f"Tensor grad_h, Tensor grad_v, Tensor grad_i, Tensor x, {strips}, int anchor_h, int anchor_v",
         "(Tensor, Tensor, Tensor)"),
    ):
        op = f"swconv::toeplitz_{name}"
        torch.library.define(op, f"({arguments}) -> {results}", tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(op, "cuda", function)
        torch.library.register_fake(op, fake)
    _register_strip_gradients("toeplitz", torch.ops.swconv.toeplitz_branches_backward)


@functools.cache
def _relayouts() -> bool:
    """Whether the copies between layouts can be made by Triton; its operator is registered by the first call."""
    from swconv.ops import layouts

    if os.environ.get("SWCONV_NATIVE") == "0" or layouts.triton is None:
        return False
    torch.library.define("swconv::relayout", "(Tensor x, bool last) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl("swconv::relayout", "cuda", layouts.relayout)
    torch.library.register_fake("swconv::relayout", _fake_relayout)
    torch.library.register_autograd("swconv::relayout", lambda ctx, grad: (grad, None))
    return True


def _fake_relayout(x, last):
    return torch.empty_like(x, memory_format=torch.channels_last if last else torch.contiguous_format)


@torch.compiler.assume_constant_result
def _on_gpu(op: str) -> bool:
    return available() and _has_gpu_kernel(op)


@functools.cache
def _has_gpu_kernel(op: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"swconv::{op}", "CUDA")


@functools.cache
def _load() -> bool:
    if os.environ.get("SWCONV_NATIVE") == "0" or not LIBRARY.is_file():
        return False
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        _log.warning(
            "The compiled operators need a library made for this machine and torch %s, and %s does not load (%s). "
            "Plain torch does the work; run `python -m swconv build` to build it anew.",
            torch.__version__, LIBRARY, error,
        )
        return False
    missing = [op for op in OPERATORS if not hasattr(torch.ops.swconv, op)]
    if missing:
        _log.warning(
            "The compiled operators need a library made of this csrc/, and %s lacks %s. Plain torch does the work; run "
            "`python -m swconv build` to build it anew.", LIBRARY, ", ".join(missing),
        )
        return False
    _register()
    return True


def _as_is(*values: Any) -> tuple[Any, ...]:
    return values


def _register() -> None:
    for op in ("shift_add", "shift_add_atomic"):
        torch.library.register_fake(f"swconv::{op}", _fake_shift_add)
        torch.library.register_autograd(f"swconv::{op}", _shift_add_backward, setup_context=_save_shift_add)
    torch.library.register_fake("swconv::shift_add_backward", _fake_shift_add_backward)
    torch.library.register_fake("swconv::assemble", _fake_assemble)
    torch.library.register_fake("swconv::assemble_backward", _fake_assemble_backward)
    _differentiable("assemble", _assemble_backward, _save_assemble, lambda filters, mixing: (mixing, *filters),
                    lambda mixing, *filters: (list(filters), mixing))
    torch.library.register_fake("swconv::strip_branches", _fake_strip_branches)
    torch.library.register_fake("swconv::strip_mix", _fake_strip_mix)
    torch.library.register_fake("swconv::strip_branches_backward", _fake_strip_branches_backward)
    torch.library.register_fake("swconv::strip_branches_adjoint", _fake_strip_branches_adjoint)
    _register_strip_gradients("strip", _strip_branches_backward)


def _differentiable(op: str, backward: Callable, save: Callable, flat: Callable = _as_is, nested: Callable = _as_is) -> None:
    """Register an operator's gradient with torch.library, and as a Function for `call`.

    A Function sees the gradients of Tensors only: `flat` takes them out of the operator's lists, `nested` puts them back.
    """
    torch.library.register_autograd(f"swconv::{op}", backward, setup_context=save)
    function = getattr(torch.ops.swconv, op).default

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            inputs = nested(*inputs)
            with torch._C._AutoDispatchBelowAutograd():
                output = function(*inputs)
            save(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx, *grads):
            return flat(*backward(ctx, *grads))

    _gradients[op] = lambda *arguments: Differentiable.apply(*flat(*arguments))


def _again(outputs, inputs, grads):
    """The gradients of plain torch, which can be differentiated again; None where an input needs none."""
    asked = [tensor for tensor in inputs if tensor.requires_grad]
    found = iter(torch.autograd.grad(outputs, asked, grads, create_graph=True))
    return tuple(next(found) if tensor.requires_grad else None for tensor in inputs)


# ---- two-step form


def _fake_shift_add(maps, pad_h, pad_v, pick, halo):
    size = (maps.shape[0], pick.shape[0], maps.shape[2] - 2 * halo, maps.shape[3] - 2 * halo)
    return maps.new_empty(size), maps.new_empty(size), maps.new_empty(size)


def _fake_shift_add_backward(grad_h, grad_v, grad_i, pad_h, pad_v, pick, halo, taps):
    images, channels, height, width = grad_h.shape
    return grad_h.new_empty(images, channels * taps, height + 2 * halo, width + 2 * halo)


def _save_shift_add(ctx, inputs, output):
    maps, pad_h, pad_v, pick, ctx.halo = inputs
    ctx.taps = maps.shape[1] // pick.shape[0]
    ctx.save_for_backward(pad_h, pad_v, pick)


def _shift_add_backward(ctx, grad_h, grad_v, grad_i):
    if torch.is_grad_enabled():
        from swconv.ops.shift import shift_add_ref

        images, channels, height, width = grad_h.shape
        maps = grad_h.new_zeros(images, channels * ctx.taps, height + 2 * ctx.halo, width + 2 * ctx.halo, requires_grad=True)
        outputs = shift_add_ref(maps, *ctx.saved_tensors, ctx.halo)
        return *_again(outputs, [maps], (grad_h, grad_v, grad_i)), None, None, None, None
    grad_maps = torch.ops.swconv.shift_add_backward(grad_h, grad_v, grad_i, *ctx.saved_tensors, ctx.halo, ctx.taps)
    return grad_maps, None, None, None, None


# ---- filters into their slots


def _fake_assemble(filters, mixing):
    channels, _, taps = mixing.shape
    small = filters[0].shape[3]
    sizes = ((small, taps * small), (taps * small, small), (small, small))
    return tuple(mixing.new_empty(channels, 1, *size) for size in sizes)


def _fake_assemble_backward(grad_h, grad_v, grad_c, mixing):
    return mixing.new_empty(mixing.shape[0] * mixing.shape[2], 1, *grad_c.shape[2:])


def _save_assemble(ctx, inputs, output):
    filters, mixing = inputs
    ctx.branches = len(filters)
    ctx.save_for_backward(mixing)


def _assemble_backward(ctx, grad_h, grad_v, grad_c):
    if torch.is_grad_enabled():
        from swconv.ops.strips import assemble_ref

        (mixing,) = ctx.saved_tensors
        channels, _, taps = mixing.shape
        filters = mixing.new_zeros(channels * taps, 1, *grad_c.shape[2:], requires_grad=True)
        return list(_again(assemble_ref(filters, mixing), [filters], (grad_h, grad_v, grad_c))) * ctx.branches, None
    grad = torch.ops.swconv.assemble_backward(grad_h, grad_v, grad_c, *ctx.saved_tensors)
    return [grad] * ctx.branches, None


# ---- strip form


def _empty_like(x):
    """What the operators return for x: on the CPU in its layout, else contiguous."""
    return torch.empty_like(x, memory_format=layout(x) if x.device.type == "cpu" else torch.contiguous_format)


def _fake_strip_branches(x, kernel_h, kernel_v, kernel_c, anchor_h, anchor_v):
    return _empty_like(x), _empty_like(x), _empty_like(x)


def _fake_strip_mix(x, kernel_h, kernel_v, kernel_c, bias, anchor_h, anchor_v):
    return _empty_like(x)


def _fake_strip_branches_backward(grad_h, grad_v, grad_i, x, kernel_h, kernel_v, kernel_c, anchor_h, anchor_v):
    return _empty_like(x), *_fake_kernel_gradients(None, None, None, None, kernel_h, kernel_v, kernel_c, None, None)


def _fake_strip_branches_adjoint(grad_h, grad_v, grad_i, kernel_h, kernel_v, kernel_c, anchor_h, anchor_v):
    return _empty_like(grad_h)


def _fake_kernel_gradients(grad_h, grad_v, grad_i, x, kernel_h, kernel_v, kernel_c, anchor_h, anchor_v):
    return tuple(torch.empty_like(k, memory_format=torch.contiguous_format) for k in (kernel_h, kernel_v, kernel_c))


def _strip_branches_backward(grad_h, grad_v, grad_i, x, kernel_h, kernel_v, kernel_c, anchor_h, anchor_v):
    """By csrc/; of small maps on a GPU, the kernels' gradients by the Toeplitz engine."""
    grads, rest, ops = (grad_h, grad_v, grad_i), (kernel_h, kernel_v, kernel_c, anchor_h, anchor_v), torch.ops.swconv
    if x.is_cuda and max(x.shape[2], x.shape[3]) <= _toeplitz_split():
        return ops.strip_branches_adjoint(*grads, *rest), *ops.toeplitz_kernel_gradients(*grads, x, *rest)
    return ops.strip_branches_backward(*grads, x, *rest)


def _strip_adjoint_ref(grad_h, grad_v, grad_i, x, kernel_h, kernel_v, kernel_c, anchor_h, anchor_v):
    from swconv.ops.strips import strip_branches_ref

    kernels = kernel_h, kernel_v, kernel_c
    outputs = strip_branches_ref(x, *(kernel.to(x.dtype) for kernel in kernels), anchor_h, anchor_v)
    return _again(outputs, [x, *kernels], (grad_h, grad_v, grad_i))


def _save_strip_branches(ctx, inputs, output):
    *tensors, ctx.anchor_h, ctx.anchor_v = inputs
    ctx.save_for_backward(*tensors)


def _register_strip_gradients(engine: str, kernel: Callable) -> None:
    """Of `<engine>_branches` and `<engine>_mix`, both by `kernel`, whose arguments are those of strip_branches_backward."""
    def as_read(grad):
        return relaid(grad, torch.contiguous_format) if grad.is_cuda else grad

    def adjoint(*arguments):
        return (_strip_adjoint_ref if torch.is_grad_enabled() else kernel)(*arguments)

    def branches_backward(ctx, *grads):
        return *adjoint(*map(as_read, grads), *ctx.saved_tensors, ctx.anchor_h, ctx.anchor_v), None, None

    def mix_backward(ctx, grad):
        grad = as_read(grad)
        grads = adjoint(grad, grad, grad, *ctx.saved_tensors, ctx.anchor_h, ctx.anchor_v)
        grad_bias = None if ctx.bias_dtype is None else grad.sum((0, 2, 3), dtype=ctx.bias_dtype)
        return *grads, grad_bias, None, None

    _differentiable(f"{engine}_branches", branches_backward, _save_strip_branches)
    _differentiable(f"{engine}_mix", mix_backward, _save_strip_mix)


def _save_strip_mix(ctx, inputs, output):
    *tensors, bias, ctx.anchor_h, ctx.anchor_v = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(*tensors)

