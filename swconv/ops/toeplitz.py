"""The strip form as products with banded Toeplitz matrices, on tensor cores, in Triton.

A strip is about as long as the map (SW paper section 3). Each of its N lines is then, as a matrix with the tap at
input - output + anchor for its entries, applied to all rows or columns of the map at once. Per channel, with X its map and
T the lines' matrices (the strips themselves: csrc/swconv.h):

    h = sum_dy X[y + dy, :] T_h[dy]      v = sum_dx T_v[dx] X[:, x + dx]      i as h, the small kernel being a short strip

and the gradient of the taps of one line is the sums along the diagonals of X[y + dy, :]^T grad_h. Of maps of at most 64 pixels
each is one row, and a kernel is one matrix from all pixels to all: h = X T_h, and its gradient is sums over X^T grad_h. Sums
are in float32, each in one order, so a call repeats bit for bit. Zeros of the matrices are multiplied, too: an infinity or NaN
in x spreads over its map beyond the reach of the taps, and over the maps that share its tile.
"""

from __future__ import annotations

import functools
import math
import operator
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:                      # torch without CUDA comes without Triton; `takes` is then False
    triton = None

# Compiled once for all sizes, not anew for those that are 1 or a multiple of 16.
jit = functools.partial(triton.jit, do_not_specialize=(
    "images", "height", "width", "length_h", "length_v", "anchor_h", "anchor_v", "share", "before_h", "before_v", "before_c",
    "shifts_h", "shifts_v", "shifts_c", "chunks_h", "chunks_v", "chunks_c",
)) if triton else lambda kernel: kernel

PROGRAMS = 1024                          # what a launch is cut into, about: some for each of 100 to 150 multiprocessors
SPLIT = 32                               # longest side of maps, px, whose kernels' gradients are taken from csrc/ in float32
WHOLE = 64                               # pixels of a map that is one row: 64 x 64 is what a product on tensor cores likes
ROOM = 99 * 1024                         # bytes of shared memory that a program may have where there is no GPU to ask


def takes(dtype: torch.dtype) -> bool:
    """Whether these functions take the dtype on a GPU: half precision, or float32 where torch may use TF32."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return (tf32 or dtype in (torch.bfloat16, torch.float16)) and triton is not None


def strip_branches(
    x: Tensor, kernel_h: Tensor, kernel_v: Tensor, kernel_c: Tensor, anchor_h: int, anchor_v: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Depthwise convolution with a horizontal strip, a vertical strip and a small centred kernel.

    Parameters
    ----------
    x : Tensor of shape (B, C, H, W)
        bfloat16, float16, or float32 (multiplied as TF32). Copied if it is not contiguous.
    kernel_h, kernel_v, kernel_c : Tensor of shape (C, 1, N, L), (C, 1, L, N) and (C, 1, S, S)
        N and S are odd. Of any dtype; rounded to x's where they become matrices, sums of taps once.
    anchor_h, anchor_v : int
        Index of the tap along the long axis that lies on the output pixel.

    Returns
    -------
    h, v, i : Tensor of shape (B, C, H, W)
        In x's dtype, contiguous.
    """
    x = x.contiguous()
    h, v, i = (torch.empty_like(x) for _ in range(3))
    _convolve((x,), (kernel_h, kernel_v, kernel_c), (anchor_h, anchor_v), (h, v, i))
    return h, v, i


def strip_mix(
    x: Tensor, kernel_h: Tensor, kernel_v: Tensor, kernel_c: Tensor, bias: Tensor | None, anchor_h: int, anchor_v: int
) -> Tensor:
    """Sum of the three parts of `strip_branches`, plus a bias of shape (C,), rounded once."""
    x = x.contiguous()
    y = torch.empty_like(x)
    _convolve((x,), (kernel_h, kernel_v, kernel_c), (anchor_h, anchor_v), (y,), bias)
    return y


def strip_branches_backward(
    grad_h: Tensor,
    grad_v: Tensor,
    grad_i: Tensor,
    x: Tensor,
    kernel_h: Tensor,
    kernel_v: Tensor,
    kernel_c: Tensor,
    anchor_h: int,
    anchor_v: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `strip_branches`; with one tensor for grad_h, grad_v and grad_i, which is faster, of `strip_mix`.

    Parameters
    ----------
    grad_h, grad_v, grad_i : Tensor of shape (B, C, H, W)
        In x's dtype. Copied where they are not contiguous.
    x, kernel_h, kernel_v, kernel_c, anchor_h, anchor_v
        As for `strip_branches`.

    Returns
    -------
    grad_x : Tensor of shape (B, C, H, W)
        In x's dtype, contiguous.
    grad_kernel_h, grad_kernel_v, grad_kernel_c : Tensor of shape (C, 1, N, L), (C, 1, L, N) and (C, 1, S, S)
        In the kernels' dtypes.
    """
    grad_h, grad_v, grad_i, x = (maps.contiguous() for maps in (grad_h, grad_v, grad_i, x))
    grad_x = torch.empty_like(x)
    grads = (grad_h,) if grad_h is grad_v is grad_i else (grad_h, grad_v, grad_i)
    _convolve(grads, (kernel_h, kernel_v, kernel_c), (anchor_h, anchor_v), (grad_x,), sign=-1)
    return grad_x, *kernel_gradients(grad_h, grad_v, grad_i, x, kernel_h, kernel_v, kernel_c, anchor_h, anchor_v)


def kernel_gradients(
    grad_h: Tensor,
    grad_v: Tensor,
    grad_i: Tensor,
    x: Tensor,
    kernel_h: Tensor,
    kernel_v: Tensor,
    kernel_c: Tensor,
    anchor_h: int,
    anchor_v: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Those of `strip_branches_backward`. In float32 that torch may not round to TF32, three products of it make one, which is
    exact to about float32's last bit; it is faster than CUDA C++ on maps of at most SPLIT px a side (on an H100)."""
    grads = tuple(maps.contiguous() for maps in (grad_h, grad_v, grad_i))
    return _correlate(x.contiguous(), grads, (kernel_h, kernel_v, kernel_c), (anchor_h, anchor_v))


# ---- launches


def _convolve(
    inputs: tuple[Tensor, ...],
    kernels: tuple[Tensor, Tensor, Tensor],
    anchors: tuple[int, int],
    outputs: tuple[Tensor, ...],
    bias: Tensor | None = None,
    sign: int = 1,
) -> None:
    """Convolve three inputs, or one, into three outputs, or all into one. With sign -1: the adjoint, from x's side."""
    x = inputs[0]
    if x.numel() == 0:
        return
    kernel_h, kernel_v, kernel_c = (kernel.contiguous() for kernel in kernels)
    sizes = (*kernel_h.shape[2:], *kernel_v.shape[2:], kernel_c.shape[2])
    joint = len(outputs) == 1
    form, grid, numbers, constants = _convolution(
        *x.shape, x.element_size(), *_gpu(x.get_device()), *sizes, *anchors, len(inputs), len(outputs), PROGRAMS
    )
    x_h, x_v, x_c = inputs if len(inputs) == 3 else (x, None, None)
    y_h, y_v, y_c = (None, None, *outputs) if joint else outputs
    kernel = {"whole": whole_kernel, "held": held_kernel, "cut": convolve_kernel}[form]
    with torch.cuda.device_of(x):
        kernel[grid](x_h, x_v, x_c, y_h, y_v, y_c, kernel_h, kernel_v, kernel_c, bias, *numbers, SIGN=sign,
                     JOINT=joint, **constants)


@functools.lru_cache(maxsize=1024)
def _convolution(
    images: int, channels: int, height: int, width: int, itemsize: int, room: int, warps: int, breadth_h: int, length_h: int,
    length_v: int, breadth_v: int, small: int, anchor_h: int, anchor_v: int, inputs: int, outputs: int, programs: int,
) -> tuple[str, tuple[int, int, int], tuple[int, ...], dict[str, Any]]:
    """The kernel: "whole" maps, matrices "held", or maps "cut"; then its grid, numbers and constants."""
    single = inputs == outputs == 1
    if height * width <= WHOLE:
        constants = _whole(height, width, itemsize, *((32, 4) if inputs == 3 else (64, 8)))
        groups = triton.cdiv(images, constants["ROWS"])
        share = min(max(channels * groups // programs, 1), 32)
        return "whole", (channels, 1, triton.cdiv(groups, share)), (
            images, height, width, length_h, length_v, anchor_h, anchor_v, share
        ), {"BREADTH_H": breadth_h, "BREADTH_V": breadth_v, "SMALL": small, "FOLD": single, **constants}
    fold = single and small <= breadth_h and small // 2 <= anchor_h < length_h - small // 2
    rows, cols = max(_side(height, 64), 32), _side(width, 64)
    most = max(breadth_h, breadth_v, small) + 1               # tiles at a time
    need = itemsize * ((breadth_h + (0 if fold else small)) * cols**2 + breadth_v * rows**2 + most * rows * cols)
    hold = height <= rows and width <= cols and need <= room
    moves = (itemsize < 4 or cols < 64) and need + itemsize * (breadth_v - 1) * cols**2 <= room
    if not hold:
        rows, cols = _side(height, 32), _side(width, 32)
    pitch = _pitch(height, rows)
    tiles = triton.cdiv(height, rows) * triton.cdiv(width, cols)
    groups = triton.cdiv(images, rows // pitch)
    share = min(max(channels * tiles * groups // (max(programs // 2, 1) if hold and cols > 16 else programs), 1), 32)
    grid = channels, tiles, triton.cdiv(groups, share)
    numbers = images, height, width, length_h, length_v, anchor_h, anchor_v, share
    return "held" if hold else "cut", grid, numbers, {
        "BREADTH_H": breadth_h, "BREADTH_V": breadth_v, "SMALL": small, "FOLD": fold, "ROWS": rows, "COLS": cols,
        "PITCH": pitch, "ALIGN": _align(width, itemsize), **({"MOVE": moves} if hold else {}),
        "num_warps": 4 if not hold else warps if rows == 64 else 2, "num_stages": 1,
    }


def _correlate(
    x: Tensor, grads: tuple[Tensor, Tensor, Tensor], kernels: tuple[Tensor, Tensor, Tensor], anchors: tuple[int, int]
) -> tuple[Tensor, ...]:
    """Gradients of the three kernels: one launch for the chunks' parts of all, one for their sums."""
    if x.numel() == 0:
        return tuple(kernel.new_zeros(kernel.shape) for kernel in kernels)
    sizes = [side for kernel in kernels for side in kernel.shape[2:]][:5]
    precision, programs = ("tf32", max(PROGRAMS // 2, 1)) if takes(x.dtype) else ("tf32x3", PROGRAMS)
    grid, room, numbers, parts, constants, own = _correlation(
        *x.shape, x.element_size(), precision, *sizes, *anchors, programs
    )
    partials = torch.empty(sum(room), dtype=torch.float32, device=x.device).split(room)
    results = tuple(torch.empty_like(kernel, memory_format=torch.contiguous_format) for kernel in kernels)
    taps = triton.next_power_of_2(max(kernel[0].numel() for kernel in kernels))
    with torch.cuda.device_of(x):
        if x.shape[2] * x.shape[3] <= WHOLE:
            whole_correlate_kernel[grid](x, *grads, *partials, *numbers, **constants, **own)
        else:
            correlate_kernel[grid](x, *grads, *partials, *numbers, *parts, **constants, **own)
        collect_kernel[grid[0], 3](*partials, *results, sizes[1], sizes[2], *anchors, *parts, **constants, TAPS=taps,
                                   num_warps=min(max(taps // 32, 1), 16))
    return results


@functools.lru_cache(maxsize=1024)
def _correlation(
    images: int, channels: int, height: int, width: int, itemsize: int, precision: str, breadth_h: int, length_h: int,
    length_v: int, breadth_v: int, small: int, anchor_h: int, anchor_v: int, programs: int,
) -> tuple[tuple[int, ...], list[int], tuple[int, ...], tuple[int, ...], dict[str, int], dict[str, int]]:
    """Of the horizontal strip, the vertical and the small kernel, which is one more horizontal strip: the grid; numbers of
    partial; the kernel's own numbers; blocks before, shifts and chunks of the three; constants, and the kernel's own."""
    if height * width <= WHOLE:
        side_h, side_v = triton.next_power_of_2(width), triton.next_power_of_2(height)
        own = _whole(height, width, itemsize, 64, 4) if precision == "tf32x3" else _whole(height, width, itemsize, 128, 8)
        groups = triton.cdiv(images, own["ROWS"])
        share = max(channels * groups // programs, 1)         # and three programs for each share
        befores, shifts, chunks = [0] * 3, [1] * 3, [triton.cdiv(groups, share)] * 3
        items, grid = chunks, (channels, chunks[0], 3)
    else:
        side_h, side_v = _side(width, 64), _side(height, 64)
        rows_h, rows_v = max(1024 // side_h, 32), max(1024 // side_v, 32)
        pitch_h, pitch_v = _pitch(height, rows_h), _pitch(width, rows_v)

        def part(along: int, across: int, side: int, rows: int, pitch: int, length: int, anchor: int) -> tuple[int, int, int]:
            """Blocks before, shifts, tiles of the gradient."""
            blocks = triton.cdiv(along, side)
            before, after = (min(triton.cdiv(reach, side), blocks - 1) for reach in (anchor, length - 1 - anchor))
            return before, before + 1 + after, triton.cdiv(images, rows // pitch) * triton.cdiv(across, rows) * blocks

        befores, shifts, works = zip(
            part(width, height, side_h, rows_h, pitch_h, length_h, anchor_h),
            part(height, width, side_v, rows_v, pitch_v, length_v, anchor_v),
            part(width, height, side_h, rows_h, pitch_h, small, small // 2), strict=True,
        )
        share = max(channels * sum(map(operator.mul, shifts, works)) // (3 * programs), 1)
        chunks = [triton.cdiv(work, share) for work in works]
        items = [*map(operator.mul, shifts, chunks)]
        grid = channels, sum(items)
        own = {"ROWS_H": rows_h, "ROWS_V": rows_v, "PITCH_H": pitch_h, "PITCH_V": pitch_v, "ALIGN": _align(width, itemsize),
               "num_warps": max(side_h, side_v) // 16, "num_stages": 1}
    lines = breadth_h * side_h, breadth_v * side_v, small * side_h
    room = [channels * count * 2 * line for count, line in zip(items, lines, strict=True)]
    constants = {"BREADTH_H": breadth_h, "BREADTH_V": breadth_v, "SMALL": small, "SIDE_H": side_h, "SIDE_V": side_v}
    return grid, room, (images, height, width, share), (*befores, *shifts, *chunks), constants, own | {"PRECISION": precision}


def _whole(height: int, width: int, itemsize: int, images: int, warps: int) -> dict[str, int]:
    """Constants of the kernels for small maps, tiles of so many images."""
    return {"ROWS": images, "PIXELS": _side(height * width, WHOLE), "ALIGN": _align(height * width, itemsize),
            "num_warps": warps, "num_stages": 1}


@functools.cache
def _gpu(device: int) -> tuple[int, int]:
    """Bytes of shared memory that a program may have, and warps for a tile of 64 rows: from Hopper on, four do one product."""
    if device < 0:
        return ROOM, 4
    properties = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin, 4 if properties.major >= 9 else 8


def _side(extent: int, most: int) -> int:
    """Side of a tile, a power of two. The products want 16 at least; an axis longer than the most is cut."""
    return min(max(triton.next_power_of_2(extent), 16), most)


def _pitch(extent: int, rows: int) -> int:
    """Rows of a tile that belong to one image. A tile with more of them holds several images."""
    return min(triton.next_power_of_2(extent), rows)


def _align(width: int, itemsize: int) -> int:
    """What the width is a multiple of, at most a load of 16 bytes."""
    return math.gcd(width, 16 // itemsize)


# ---- kernels. A tile is rows x columns of one channel, PITCH rows of each of ROWS // PITCH images.


@jit
def _plane(group, channel, images, height, width, ROWS: tl.constexpr, PITCH: tl.constexpr, UPRIGHT: tl.constexpr):
    """A tile's channel in its group of images: where it begins, by row the way to its image and if there is one; then the
    map's height, width, and steps from row to row and column to column. UPRIGHT: all seen transposed."""
    slot = tl.arange(0, ROWS) // PITCH
    first = group * (ROWS // PITCH)
    step = tl.num_programs(0) * height * width
    begin = first.to(tl.int64) * step + channel * height * width
    if UPRIGHT:
        return begin, slot * step, slot < images - first, width, height, 1, width
    return begin, slot * step, slot < images - first, height, width, width, 1


@jit
def _place(plane, rows, cols):
    """Offsets of a tile's pixels, and which of them are on the map."""
    begin, way, exists, height, width, row_step, pixel_step = plane
    exists = exists & (rows >= 0) & (rows < height)
    inside = exists[:, None] & ((cols >= 0) & (cols < width))[None, :]
    return begin + ((way + rows * row_step)[:, None] + (cols * pixel_step)[None, :]), inside


@jit
def _load(maps, plane, rows, cols):
    offsets, inside = _place(plane, rows, cols)
    return tl.load(maps + offsets, mask=inside, other=0.0)


@jit
def _store(maps, plane, rows, cols, values):
    offsets, inside = _place(plane, rows, cols)
    tl.store(maps + offsets, values.to(maps.dtype.element_ty), mask=inside)


@jit
def _taps(kernel, line_step, tap_step, length, anchor, across, along, BREADTH: tl.constexpr, SIGN: tl.constexpr):
    """Taps at a displacement of the input from the output, across and along the strip, in float32. 0 off its ends."""
    line = BREADTH // 2 + SIGN * across
    tap = anchor + SIGN * along
    inside = (tap >= 0) & (tap < length) & (line >= 0) & (line < BREADTH)
    return tl.load(kernel + line * line_step + tap * tap_step, mask=inside, other=0.0).to(tl.float32)


@jit
def _band(strip, across, along, BREADTH: tl.constexpr, SMALL: tl.constexpr, SIGN: tl.constexpr, DTYPE: tl.constexpr):
    """Matrix of one line of a strip, plus that of a small kernel of side SMALL, if any."""
    kernel, line_step, tap_step, length, anchor, small = strip
    band = _taps(kernel, line_step, tap_step, length, anchor, across, along, BREADTH, SIGN)
    if SMALL:
        band += _taps(small, SMALL, 1, SMALL, SMALL // 2, across, along, SMALL, SIGN)
    return band.to(DTYPE)


@jit
def _bands(strip, along, BREADTH: tl.constexpr, SMALL: tl.constexpr, SIGN: tl.constexpr, DTYPE: tl.constexpr):
    """Matrices of all lines of a strip."""
    bands = ()
    for line in tl.static_range(BREADTH):
        bands = bands + (_band(strip, line - BREADTH // 2, along, BREADTH, SMALL, SIGN, DTYPE),)
    return bands


@jit
def _upright(rows, inputs, length, ROWS: tl.constexpr, PITCH: tl.constexpr):
    """Displacements of inputs from rows; off the strip, by its length, where they are of different images."""
    slot = tl.arange(0, ROWS) // PITCH
    return tl.where(slot[:, None] == slot[None, :], inputs[None, :] - rows[:, None], length)


@jit
def _strips(
    kernel_h, kernel_v, kernel_c, channel, length_h, length_v, anchor_h, anchor_v,
    BREADTH_H: tl.constexpr, BREADTH_V: tl.constexpr, SMALL: tl.constexpr,
):
    """A channel's three kernels, each as `_band` takes it."""
    kernel_h += channel * BREADTH_H * length_h
    kernel_v += channel * BREADTH_V * length_v
    kernel_c += channel * SMALL * SMALL
    strip_h = (kernel_h, length_h, 1, length_h, anchor_h, kernel_c)
    strip_v = (kernel_v, 1, BREADTH_V, length_v, anchor_v, kernel_c)
    return strip_h, strip_v, (kernel_c, SMALL, 1, SMALL, SMALL // 2, kernel_c)


@jit
def _lines(x, plane, rows, cols, LINES: tl.constexpr):
    """A tile and those above and below it."""
    tiles = ()
    for line in tl.static_range(LINES):
        tiles = tiles + (_load(x, plane, rows + line - LINES // 2, cols),)
    return tiles


@jit
def held_kernel(
    x_h, x_v, x_c, y_h, y_v, y_c, kernel_h, kernel_v, kernel_c, bias,
    images, height, width, length_h, length_v, anchor_h, anchor_v, share,
    BREADTH_H: tl.constexpr, BREADTH_V: tl.constexpr, SMALL: tl.constexpr, SIGN: tl.constexpr,
    JOINT: tl.constexpr, FOLD: tl.constexpr, MOVE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, PITCH: tl.constexpr, ALIGN: tl.constexpr,
):
    """One channel, a share of the groups of images. The tile is the whole map: its matrices are built once, for all images.

    JOINT: h + v + i + bias to y_c. x_h stands for x_v and x_c, too, where those are None. FOLD: x_h is x_c, so the small
    kernel's matrices are added to the horizontal strip's. MOVE: X[:, x + dx] is X times a matrix of ones on a diagonal, which
    is exact and faster than loads off the bounds of words; and loads go before the products, with FOLD those of the next
    group too. It takes registers, which float32 tiles of 64 columns do not leave.
    """
    if x_v is None:
        x_v, x_c = x_h, x_h
    channel = tl.program_id(0)
    width = width // ALIGN * ALIGN                            # tells the compiler
    rows, cols = tl.arange(0, ROWS) % PITCH, tl.arange(0, COLS)
    FOLDED: tl.constexpr = SMALL if FOLD else 0
    DTYPE: tl.constexpr = x_h.dtype.element_ty

    strip_h, strip_v, strip_c = _strips(
        kernel_h, kernel_v, kernel_c, channel, length_h, length_v, anchor_h, anchor_v, BREADTH_H, BREADTH_V, SMALL
    )
    along = cols[:, None] - cols[None, :]
    held_h = _bands(strip_h, along, BREADTH_H, FOLDED, SIGN, DTYPE)
    held_v = _bands(strip_v, _upright(rows, rows, length_v, ROWS, PITCH), BREADTH_V, 0, SIGN, DTYPE)
    held_c = _bands(strip_c, along, 0 if FOLD else SMALL, 0, SIGN, DTYPE)
    moves = ()
    for line in tl.static_range(BREADTH_V):
        moves = moves + (tl.where(along == line - BREADTH_V // 2, 1.0, 0.0).to(DTYPE),)

    first = tl.program_id(2) * share
    if FOLD and MOVE:
        plane = _plane(first, channel, images, height, width, ROWS, PITCH, False)
        ahead = _lines(x_h, plane, rows, cols, BREADTH_H)
    for group in range(first, tl.minimum(first + share, tl.cdiv(images, ROWS // PITCH))):
        plane = _plane(group, channel, images, height, width, ROWS, PITCH, False)
        none = tl.zeros((ROWS, COLS), tl.float32)
        if FOLD and MOVE:
            seen = ahead
            following = _plane(group + 1, channel, images, height, width, ROWS, PITCH, False)
            ahead = _lines(x_h, following, rows, cols, BREADTH_H)
        elif MOVE:
            seen = _lines(x_h, plane, rows, cols, BREADTH_H)
        total = none
        for line in tl.static_range(BREADTH_H):
            tile = seen[line] if MOVE else _load(x_h, plane, rows + line - BREADTH_H // 2, cols)
            total = tl.dot(tile, held_h[line], total, input_precision="tf32")
        if not JOINT:
            _store(y_h, plane, rows, cols, total)
            total = none
        if MOVE:
            centre = seen[BREADTH_H // 2] if FOLD else _load(x_v, plane, rows, cols)
        for line in tl.static_range(BREADTH_V):
            if not MOVE:
                tile = _load(x_v, plane, rows, cols + line - BREADTH_V // 2)
            elif line == BREADTH_V // 2:
                tile = centre
            else:
                tile = tl.dot(centre, moves[line], input_precision="tf32").to(DTYPE)
            total = tl.dot(held_v[line], tile, total, input_precision="tf32")
        if not JOINT:
            _store(y_v, plane, rows, cols, total)
            total = none
        if MOVE and not FOLD:
            seen = _lines(x_c, plane, rows, cols, SMALL)
        for line in tl.static_range(0 if FOLD else SMALL):
            tile = seen[line] if MOVE else _load(x_c, plane, rows + line - SMALL // 2, cols)
            total = tl.dot(tile, held_c[line], total, input_precision="tf32")
        if bias is not None:
            total += tl.load(bias + channel).to(tl.float32)
        _store(y_c, plane, rows, cols, total)


@jit
def _maps(group, channel, images, height, width, ROWS: tl.constexpr, ALIGN: tl.constexpr):
    """`_plane` of a tile whose rows are whole maps, one of each of ROWS images."""
    pixels = height * width // ALIGN * ALIGN                  # tells the compiler
    return _plane(group, channel, images, 1, pixels, ROWS, 1, False)


@jit
def _whole_matrix(taps, height, width, PIXELS: tl.constexpr, DTYPE: tl.constexpr):
    """Matrix from all pixels to all of taps by displacement, (256,), as `whole_kernel` numbers them."""
    pixels = tl.arange(0, PIXELS)
    numbers = pixels // width * (2 * width - 1) + pixels % width
    displaced = numbers[:, None] - numbers[None, :] + (height - 1) * (2 * width - 1) + width - 1
    found = tl.gather(taps, tl.reshape(displaced, (PIXELS * PIXELS,)) & 255, 0)      # any tap where a pixel is off the map
    return tl.reshape(found, (PIXELS, PIXELS)).to(DTYPE)


@jit
def whole_kernel(
    x_h, x_v, x_c, y_h, y_v, y_c, kernel_h, kernel_v, kernel_c, bias,
    images, height, width, length_h, length_v, anchor_h, anchor_v, share,
    BREADTH_H: tl.constexpr, BREADTH_V: tl.constexpr, SMALL: tl.constexpr, SIGN: tl.constexpr,
    JOINT: tl.constexpr, FOLD: tl.constexpr, ROWS: tl.constexpr, PIXELS: tl.constexpr, ALIGN: tl.constexpr,
):
    """`held_kernel` of maps of at most 64 pixels: a tile is ROWS maps, each a row. FOLD: one matrix is the sum of the three.

    A channel's taps are read once, by displacement of the input from the output: 15 * 15 are the most, of 8 x 8 pixels.
    """
    channel = tl.program_id(0)
    rows, cols = tl.zeros((ROWS,), tl.int32), tl.arange(0, PIXELS)
    DTYPE: tl.constexpr = x_h.dtype.element_ty
    first = tl.program_id(2) * share

    strip_h, strip_v, strip_c = _strips(
        kernel_h, kernel_v, kernel_c, channel, length_h, length_v, anchor_h, anchor_v, BREADTH_H, BREADTH_V, SMALL
    )
    number = tl.arange(0, 256)
    down, right = number // (2 * width - 1) - (height - 1), number % (2 * width - 1) - (width - 1)
    taps_h = _band(strip_h, down, right, BREADTH_H, 0, SIGN, tl.float32)
    taps_v = _band(strip_v, right, down, BREADTH_V, 0, SIGN, tl.float32)
    taps_c = _band(strip_c, down, right, SMALL, 0, SIGN, tl.float32)
    if FOLD:
        held_h = _whole_matrix(taps_h + taps_v + taps_c, height, width, PIXELS, DTYPE)
    else:
        held_h = _whole_matrix(taps_h, height, width, PIXELS, DTYPE)
        held_v = _whole_matrix(taps_v, height, width, PIXELS, DTYPE)
        held_c = _whole_matrix(taps_c, height, width, PIXELS, DTYPE)

    for group in range(first, tl.minimum(first + share, tl.cdiv(images, ROWS))):
        plane = _maps(group, channel, images, height, width, ROWS, ALIGN)
        none = tl.zeros((ROWS, PIXELS), tl.float32)
        seen = _load(x_h, plane, rows, cols)
        total = tl.dot(seen, held_h, none, input_precision="tf32")
        if not FOLD:
            if not JOINT:
                _store(y_h, plane, rows, cols, total)
                total = none
            if x_v is not None:
                seen = _load(x_v, plane, rows, cols)
            total = tl.dot(seen, held_v, total, input_precision="tf32")
            if not JOINT:
                _store(y_v, plane, rows, cols, total)
                total = none
            if x_v is not None:
                seen = _load(x_c, plane, rows, cols)
            total = tl.dot(seen, held_c, total, input_precision="tf32")
        if bias is not None:
            total += tl.load(bias + channel).to(tl.float32)
        _store(y_c, plane, rows, cols, total)


@jit
def _reach(strip, start, extent, SIDE: tl.constexpr, SIGN: tl.constexpr):
    """Blocks of inputs, first and past the last, that the taps reach from the block of outputs at start."""
    kernel, line_step, tap_step, length, anchor, small = strip
    before = anchor if SIGN > 0 else length - 1 - anchor
    end = tl.minimum(start + SIDE + length - 1 - before, extent)
    return tl.maximum(start - before, 0) // SIDE, tl.cdiv(end, SIDE)


@jit
def _horizontal(
    total, x, plane, rows, left, width, strip,
    BREADTH: tl.constexpr, SMALL: tl.constexpr, SIGN: tl.constexpr, COLS: tl.constexpr,
):
    """total + sum over dy of X[rows + dy, inputs] T[dy]."""
    cols = tl.arange(0, COLS)
    first, last = _reach(strip, left, width, COLS, SIGN)
    for block in range(first, last):
        inputs = block * COLS + cols
        along = inputs[:, None] - (left + cols)[None, :]
        for line in tl.static_range(BREADTH):
            seen = _load(x, plane, rows + line - BREADTH // 2, inputs)
            band = _band(strip, line - BREADTH // 2, along, BREADTH, SMALL, SIGN, seen.dtype)
            total = tl.dot(seen, band, total, input_precision="tf32")
    return total


@jit
def _vertical(
    total, x, plane, top, cols, height, strip,
    BREADTH: tl.constexpr, SIGN: tl.constexpr, ROWS: tl.constexpr, PITCH: tl.constexpr,
):
    """total + sum over dx of T[dx] X[inputs, cols + dx]."""
    rows = tl.arange(0, ROWS) % PITCH
    first, last = _reach(strip, top, height, ROWS, SIGN)
    for block in range(first, last):
        inputs = block * ROWS + rows
        along = _upright(top + rows, inputs, strip[3], ROWS, PITCH)
        for line in tl.static_range(BREADTH):
            seen = _load(x, plane, inputs, cols + line - BREADTH // 2)
            band = _band(strip, line - BREADTH // 2, along, BREADTH, 0, SIGN, seen.dtype)
            total = tl.dot(band, seen, total, input_precision="tf32")
    return total


@jit
def convolve_kernel(
    x_h, x_v, x_c, y_h, y_v, y_c, kernel_h, kernel_v, kernel_c, bias,
    images, height, width, length_h, length_v, anchor_h, anchor_v, share,
    BREADTH_H: tl.constexpr, BREADTH_V: tl.constexpr, SMALL: tl.constexpr, SIGN: tl.constexpr,
    JOINT: tl.constexpr, FOLD: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, PITCH: tl.constexpr, ALIGN: tl.constexpr,
):
    """`held_kernel` of one tile of a larger map, or with matrices too many to hold: each is built where it is used."""
    if x_v is None:
        x_v, x_c = x_h, x_h
    channel = tl.program_id(0)
    width = width // ALIGN * ALIGN                            # tells the compiler
    top = tl.program_id(1) // tl.cdiv(width, COLS) * ROWS
    left = tl.program_id(1) % tl.cdiv(width, COLS) * COLS
    rows = top + tl.arange(0, ROWS) % PITCH
    cols = left + tl.arange(0, COLS)
    FOLDED: tl.constexpr = SMALL if FOLD else 0
    strip_h, strip_v, strip_c = _strips(
        kernel_h, kernel_v, kernel_c, channel, length_h, length_v, anchor_h, anchor_v, BREADTH_H, BREADTH_V, SMALL
    )

    groups = tl.cdiv(images, ROWS // PITCH)
    for group in range(tl.program_id(2) * share, tl.minimum((tl.program_id(2) + 1) * share, groups)):
        plane = _plane(group, channel, images, height, width, ROWS, PITCH, False)
        none = tl.zeros((ROWS, COLS), tl.float32)
        total = _horizontal(none, x_h, plane, rows, left, width, strip_h, BREADTH_H, FOLDED, SIGN, COLS)
        if not JOINT:
            _store(y_h, plane, rows, cols, total)
            total = none
        total = _vertical(total, x_v, plane, top, cols, height, strip_v, BREADTH_V, SIGN, ROWS, PITCH)
        if not JOINT:
            _store(y_v, plane, rows, cols, total)
            total = none
        if not FOLD:
            total = _horizontal(total, x_c, plane, rows, left, width, strip_c, SMALL, 0, SIGN, COLS)
        if bias is not None:
            total += tl.load(bias + channel).to(tl.float32)
        _store(y_c, plane, rows, cols, total)


@jit
def _correlate_strip(
    x, grad, partial, item, images, height, width, before, shifts, share,
    BREADTH: tl.constexpr, UPRIGHT: tl.constexpr, SIDE: tl.constexpr, ROWS: tl.constexpr, PITCH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One channel, one displacement of the inputs from the outputs in blocks of SIDE, a share of the work.

    The work is all tiles of grad: images, rows, blocks of columns. partial (chunks, shifts, C, BREADTH, 2 * SIDE): sums along
    the diagonals, by input - output from -SIDE on, all of which are written. UPRIGHT: maps are seen transposed.
    """
    channel, chunk = tl.program_id(0), item // shifts
    across, along = (width, height) if UPRIGHT else (height, width)
    tiles, blocks = tl.cdiv(across, ROWS), tl.cdiv(along, SIDE)
    work = tl.cdiv(images, ROWS // PITCH) * tiles * blocks
    shift = (item % shifts - before) * SIDE
    cols = tl.arange(0, SIDE)
    lines = tl.arange(0, ROWS) % PITCH

    grams = ()                                                # X[y + dy, inputs]^T grad[y, outputs], one per dy
    for _ in tl.static_range(BREADTH):
        grams = grams + (tl.zeros((SIDE, SIDE), tl.float32),)
    for tile in range(chunk * share, tl.minimum((chunk + 1) * share, work)):
        outputs = tile % blocks * SIDE + cols
        rows = tile // blocks % tiles * ROWS + lines
        plane = _plane(tile // blocks // tiles, channel, images, height, width, ROWS, PITCH, UPRIGHT)
        wanted = _load(grad, plane, rows, outputs)
        sums = ()
        for line in tl.static_range(BREADTH):
            seen = _load(x, plane, rows + line - BREADTH // 2, outputs + shift)
            sums = sums + (tl.dot(tl.trans(seen), wanted, grams[line], input_precision=PRECISION),)
        grams = sums

    turn = cols[:, None] + cols[None, :]
    for line in tl.static_range(BREADTH):
        turned = tl.gather(grams[line], turn % SIDE, 0)       # row j, column output: input (j + output) % SIDE
        right = tl.sum(tl.where(turn < SIDE, turned, 0.0), 1)                 # diagonal input - output = j
        left = tl.sum(tl.where(turn < SIDE, 0.0, turned), 1)                  # diagonal input - output = j - SIDE
        target = partial + ((item * tl.num_programs(0) + channel) * BREADTH + line) * 2 * SIDE + cols
        tl.store(target, left)
        tl.store(target + SIDE, right)


@jit
def correlate_kernel(
    x, grad_h, grad_v, grad_c, partial_h, partial_v, partial_c, images, height, width, share,
    before_h, before_v, before_c, shifts_h, shifts_v, shifts_c, chunks_h, chunks_v, chunks_c,
    BREADTH_H: tl.constexpr, BREADTH_V: tl.constexpr, SMALL: tl.constexpr, SIDE_H: tl.constexpr, SIDE_V: tl.constexpr,
    ROWS_H: tl.constexpr, ROWS_V: tl.constexpr, PITCH_H: tl.constexpr, PITCH_V: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`_correlate_strip` of the horizontal strip, then of the vertical, then of the small kernel."""
    width = width // ALIGN * ALIGN                            # tells the compiler
    item = tl.program_id(1)
    items_h, items_v = shifts_h * chunks_h, shifts_v * chunks_v
    if item < items_h:
        _correlate_strip(x, grad_h, partial_h, item, images, height, width, before_h, shifts_h, share,
                         BREADTH_H, False, SIDE_H, ROWS_H, PITCH_H, PRECISION)
    elif item < items_h + items_v:
        _correlate_strip(x, grad_v, partial_v, item - items_h, images, height, width, before_v, shifts_v, share,
                         BREADTH_V, True, SIDE_V, ROWS_V, PITCH_V, PRECISION)
    else:
        _correlate_strip(x, grad_c, partial_c, item - items_h - items_v, images, height, width, before_c, shifts_c, share,
                         SMALL, False, SIDE_H, ROWS_H, PITCH_H, PRECISION)


@jit
def _correlate_whole(
    x, grad, partial, images, height, width, share, BREADTH: tl.constexpr, UPRIGHT: tl.constexpr, SIDE: tl.constexpr,
    ROWS: tl.constexpr, PIXELS: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):
    """One channel, a share of the groups of images: sums over the pixels of grad of what x has at each displacement from them.

    partial as of `_correlate_strip`, of one shift.
    """
    channel, chunk = tl.program_id(0), tl.program_id(1)
    rows, cols = tl.zeros((ROWS,), tl.int32), tl.arange(0, PIXELS)
    gram = tl.zeros((PIXELS, PIXELS), tl.float32)             # X[:, inputs]^T grad[:, outputs]
    for group in range(chunk * share, tl.minimum((chunk + 1) * share, tl.cdiv(images, ROWS))):
        plane = _maps(group, channel, images, height, width, ROWS, ALIGN)
        gram = tl.dot(tl.trans(_load(x, plane, rows, cols)), _load(grad, plane, rows, cols), gram, input_precision=PRECISION)

    outputs, along = cols[None, :], tl.arange(0, 2 * SIDE)
    for line in range(BREADTH):
        across = tl.full((2 * SIDE,), line - BREADTH // 2, tl.int32)
        down, right = (along - SIDE, across) if UPRIGHT else (across, along - SIDE)
        row, col = outputs // width + down[:, None], outputs % width + right[:, None]
        inside = (row >= 0) & (row < height) & (col >= 0) & (col < width) & (outputs < height * width)
        found = tl.gather(gram, tl.where(inside, row * width + col, 0), 0)
        target = partial + ((chunk * tl.num_programs(0) + channel) * BREADTH + line) * 2 * SIDE
        tl.store(target + along, tl.sum(tl.where(inside, found, 0.0), 1))


@jit
def whole_correlate_kernel(
    x, grad_h, grad_v, grad_c, partial_h, partial_v, partial_c, images, height, width, share,
    BREADTH_H: tl.constexpr, BREADTH_V: tl.constexpr, SMALL: tl.constexpr, SIDE_H: tl.constexpr, SIDE_V: tl.constexpr,
    ROWS: tl.constexpr, PIXELS: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):
    """`correlate_kernel` of maps of at most 64 pixels, tiles as in `whole_kernel`."""
    part = tl.program_id(2)
    if part == 0:
        _correlate_whole(x, grad_h, partial_h, images, height, width, share, BREADTH_H, False, SIDE_H, ROWS, PIXELS, ALIGN,
                         PRECISION)
    elif part == 1:
        _correlate_whole(x, grad_v, partial_v, images, height, width, share, BREADTH_V, True, SIDE_V, ROWS, PIXELS, ALIGN,
                         PRECISION)
    else:
        _correlate_whole(x, grad_c, partial_c, images, height, width, share, SMALL, False, SIDE_H, ROWS, PIXELS, ALIGN,
                         PRECISION)


@jit
def _collect(
    partial, grad, length, anchor, before, shifts, chunks,
    BREADTH: tl.constexpr, UPRIGHT: tl.constexpr, SIDE: tl.constexpr, TAPS: tl.constexpr,
):
    """A channel's taps: each lies on a diagonal of one shift and of the next. The chunks are added in their order."""
    CHUNKS: tl.constexpr = 8                                  # read at a time
    channel = tl.program_id(0)
    place = tl.arange(0, TAPS)
    tap, line = (place // BREADTH, place % BREADTH) if UPRIGHT else (place % length, place // length)
    exists = place < BREADTH * length
    diagonal = tap - anchor + (before + 1) * SIDE             # from the first of shift 0
    shift = diagonal // SIDE - 1
    step = shifts * tl.num_programs(0) * BREADTH * 2 * SIDE
    total = tl.zeros((TAPS,), tl.float32)
    for first in range(0, chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        for turn in tl.static_range(2):
            begin = ((shift + turn) * tl.num_programs(0) + channel) * BREADTH + line
            offset = begin * 2 * SIDE + diagonal - (shift + turn) * SIDE
            inside = exists & (diagonal >= 0) & (shift + turn >= 0) & (shift + turn < shifts)
            seen = tl.load(partial + chunk[:, None] * step + offset[None, :],
                           mask=(chunk < chunks)[:, None] & inside[None, :], other=0.0)
            total += tl.sum(seen, 0)
    tl.store(grad + channel * BREADTH * length + place, total.to(grad.dtype.element_ty), mask=exists)


@jit
def collect_kernel(
    partial_h, partial_v, partial_c, grad_h, grad_v, grad_c, length_h, length_v, anchor_h, anchor_v,
    before_h, before_v, before_c, shifts_h, shifts_v, shifts_c, chunks_h, chunks_v, chunks_c,
    BREADTH_H: tl.constexpr, BREADTH_V: tl.constexpr, SMALL: tl.constexpr, SIDE_H: tl.constexpr, SIDE_V: tl.constexpr,
    TAPS: tl.constexpr,
):
    """The kernels' gradients from their parts; TAPS is enough for the largest."""
    part = tl.program_id(1)
    if part == 0:
        _collect(partial_h, grad_h, length_h, anchor_h, before_h, shifts_h, chunks_h, BREADTH_H, False, SIDE_H, TAPS)
    elif part == 1:
        _collect(partial_v, grad_v, length_v, anchor_v, before_v, shifts_v, chunks_v, BREADTH_V, True, SIDE_V, TAPS)
    else:
        _collect(partial_c, grad_c, SMALL, SMALL // 2, before_c, shifts_c, chunks_c, SMALL, False, SIDE_H, TAPS)
