"""The compiled operators of csrc/: loading, and what torch must know of them beyond C++ (fake kernels, gradients).

`torch.ops.swconv.*` exist once `available()` has returned True. Formulas and shapes: csrc/swconv.h. Set
SWCONV_NATIVE=0 to leave the library unloaded; plain torch then does the work.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import threading
from pathlib import Path

import torch
from torch import Tensor

LIBRARY = Path(__file__).resolve().parents[1] / "_C.abi3.so"

_loading = threading.Lock()


@torch.compiler.assume_constant_result
def available() -> bool:
    """Load the compiled library, once, and say whether its operators can be called."""
    with _loading:
        return _load()


def handles(x: Tensor, op: str = "strip_branches") -> bool:
    """Whether a compiled operator takes this tensor: float32 or float64 on the CPU; on the GPU float32, two-step form."""
    if x.device.type == "cpu":
        return x.dtype in (torch.float32, torch.float64) and available()
    return x.device.type == "cuda" and x.dtype == torch.float32 and _on_gpu(op)


def library_sha256() -> str | None:
    """SHA-256 of the library that `available` loads; None where there is none."""
    return hashlib.sha256(LIBRARY.read_bytes()).hexdigest() if available() else None


@torch.compiler.assume_constant_result
def _on_gpu(op: str) -> bool:
    return available() and torch._C._dispatch_has_kernel_for_dispatch_key(f"swconv::{op}", "CUDA")


@functools.cache
def _load() -> bool:
    if os.environ.get("SWCONV_NATIVE") == "0" or not LIBRARY.is_file():
        return False
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        logging.getLogger(__name__).warning(
            "The compiled operators need a library made for this machine and torch %s, and %s does not load (%s). "
            "Plain torch does the work; run `python -m swconv build` to build it anew.",
            torch.__version__, LIBRARY, error,
        )
        return False
    _register()
    return True


def _register() -> None:
    for op in ("shift_add", "shift_add_atomic"):
        torch.library.register_fake(f"swconv::{op}", _fake_shift_add)
        torch.library.register_autograd(f"swconv::{op}", _shift_add_backward, setup_context=_save_shift_add)
    torch.library.register_fake("swconv::shift_add_backward", _fake_shift_add_backward)
    torch.library.register_fake("swconv::strip_branches", _fake_strip_branches)
    torch.library.register_fake("swconv::strip_mix", _fake_strip_mix)
    torch.library.register_fake("swconv::strip_branches_backward", _fake_strip_branches_backward)
    torch.library.register_autograd(
        "swconv::strip_branches", _strip_branches_backward, setup_context=_save_strip_branches
    )
    torch.library.register_autograd("swconv::strip_mix", _strip_mix_backward, setup_context=_save_strip_mix)


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
    grad_maps = torch.ops.swconv.shift_add_backward(grad_h, grad_v, grad_i, *ctx.saved_tensors, ctx.halo, ctx.taps)
    return grad_maps, None, None, None, None


# ---- strip form


def _empty_in_format_of(x):
    """What the operators return for x: channels_last where x is laid out so and not also contiguous."""
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.empty_like(x, memory_format=torch.channels_last)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_strip_branches(x, kernel_h, kernel_v, kernel_c, anchor_h, anchor_v):
    return _empty_in_format_of(x), _empty_in_format_of(x), _empty_in_format_of(x)


def _fake_strip_mix(x, kernel_h, kernel_v, kernel_c, bias, anchor_h, anchor_v):
    return _empty_in_format_of(x)


def _fake_strip_branches_backward(grad_h, grad_v, grad_i, x, kernel_h, kernel_v, kernel_c, anchor_h, anchor_v):
    kernels = (torch.empty_like(k, memory_format=torch.contiguous_format) for k in (kernel_h, kernel_v, kernel_c))
    return _empty_in_format_of(x), *kernels


def _save_strip_branches(ctx, inputs, output):
    *tensors, ctx.anchor_h, ctx.anchor_v = inputs
    ctx.save_for_backward(*tensors)


def _strip_branches_backward(ctx, grad_h, grad_v, grad_i):
    grads = torch.ops.swconv.strip_branches_backward(
        grad_h, grad_v, grad_i, *ctx.saved_tensors, ctx.anchor_h, ctx.anchor_v
    )
    return *grads, None, None


def _save_strip_mix(ctx, inputs, output):
    *tensors, bias, ctx.anchor_h, ctx.anchor_v = inputs
    ctx.with_bias = bias is not None
    ctx.save_for_backward(*tensors)


def _strip_mix_backward(ctx, grad):
    grads = torch.ops.swconv.strip_branches_backward(grad, grad, grad, *ctx.saved_tensors, ctx.anchor_h, ctx.anchor_v)
    return *grads, grad.sum((0, 2, 3)) if ctx.with_bias else None, None, None
