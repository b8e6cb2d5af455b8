"""Copies of maps between the contiguous and the channels_last layout, tile by tile, in Triton.

torch's own copy goes element by element, which in one of the two layouts lie far apart: on an H100, 54 copies took 3.9 of the
21.5 ms of SW-tiny (merged, bfloat16, batch 128).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:                      # torch without CUDA comes without Triton
    triton = None

jit = triton.jit if triton else lambda kernel: kernel

SIDE = 64                                # of a tile


def relayout(x: Tensor, last: bool) -> Tensor:
    """Copy maps to the other layout.

    Parameters
    ----------
    x : Tensor of shape (B, C, H, W)
        Contiguous if `last`, else channels_last; any dtype.
    last : bool
        Whether the copy is channels_last; else it is contiguous.

    Returns
    -------
    Tensor of shape (B, C, H, W)
    """
    images, channels, pixels = *x.shape[:2], x.shape[2] * x.shape[3]
    y = torch.empty_like(x, memory_format=torch.channels_last if last else torch.contiguous_format)
    rows, cols = (channels, pixels) if last else (pixels, channels)
    align = [math.gcd(size, 16 // x.element_size()) for size in (rows, cols)]
    if x.numel():
        with torch.cuda.device_of(x):
            transpose_kernel[images, triton.cdiv(rows, SIDE), triton.cdiv(cols, SIDE)](x, y, rows, cols, *align, SIDE)
    return y


@jit
def transpose_kernel(x, y, rows, cols, ALIGN_ROWS: tl.constexpr, ALIGN_COLS: tl.constexpr, SIDE: tl.constexpr):
    """One tile of one image: x (images, rows, cols) to y (images, cols, rows)."""
    rows, cols = rows // ALIGN_ROWS * ALIGN_ROWS, cols // ALIGN_COLS * ALIGN_COLS              # tells the compiler
    begin = tl.program_id(0).to(tl.int64) * rows * cols
    row = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    col = tl.program_id(2) * SIDE + tl.arange(0, SIDE)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    tile = tl.load(x + begin + row[:, None] * cols + col[None, :], mask=inside)
    tl.store(y + begin + col[:, None] * rows + row[None, :], tl.trans(tile), mask=tl.trans(inside))
