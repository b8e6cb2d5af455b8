"""The strip form: sum the small filters into three depthwise kernels, then convolve. Exact, and 17 times less memory.

Shifts and convolutions commute and a filter moves only within its own channel, so conv + shift + sum over edges and Rep
branches is, per channel, one horizontal strip, one vertical strip and one small kernel. `assemble` sums in weight space.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from swconv.ops import native

MOST_BRANCHES = 16                       # that the compiled `assemble` adds up itself on a GPU: kMostBranches of csrc/swconv.h


def assemble(filters: Tensor | Sequence[Tensor], mixing: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum the filters of all edges into their slots. Differentiable in the filters.

    Parameters
    ----------
    filters : Tensor of shape (R * n, 1, N, N), or a sequence of them
        Small filters; of several Rep branches the sum is taken.
    mixing : Tensor of shape (R, 2 * n + 1, n)
        `ShiftTables.mixing()`, in the filters' dtype.

    Returns
    -------
    kernel_h, kernel_v, kernel_c : Tensor of shape (R, 1, N, n * N), (R, 1, n * N, N) and (R, 1, N, N)

    Raises
    ------
    ValueError
        When filters and mixing do not fit each other, in shape, dtype or device.
    """
    branches = [filters] if isinstance(filters, Tensor) else list(filters)
    channels, rows, taps = mixing.shape if mixing.dim() == 3 else (0, 0, 0)
    small = branches[0].shape[-1] if branches and branches[0].dim() else 0
    if rows != 2 * taps + 1 or not small % 2 or any(b.shape != (channels * taps, 1, small, small) for b in branches):
        raise ValueError(
            "assemble needs filters (R * n, 1, N, N) with odd N, and mixing (R, 2 * n + 1, n), got filters "
            f"{', '.join(str(tuple(b.shape)) for b in branches) or 'none'} and mixing {tuple(mixing.shape)}. "
            "Were both made for the same layer?"
        )
    here = mixing.device, torch.device("meta")                          # filters that are shapes only are let pass
    if not mixing.is_floating_point() or any(b.dtype != mixing.dtype or b.device not in here for b in branches):
        kinds = ", ".join(f"{tensor.dtype} on {tensor.device}" for tensor in (*branches, mixing))
        raise ValueError(f"assemble needs filters and mixing of one floating-point dtype on one device, got {kinds}.")
    if len(branches) > MOST_BRANCHES:
        branches = [sum(branches)]
    if native.handles(branches[0], "assemble"):
        return native.call("assemble", branches, mixing)
    return assemble_ref(sum(branches), mixing)


def assemble_ref(filters: Tensor, mixing: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`assemble` of one Tensor of filters by torch's matrix product."""
    channels, rows, taps = mixing.shape
    small = filters.shape[-1]
    with torch.autocast("cuda" if filters.is_cuda else "cpu", enabled=False):  # sums of weights keep their precision
        slots = torch.bmm(mixing, filters.reshape(channels, taps, small * small)).view(channels, rows, small, small)
    across, down, centre = slots.split((taps, taps, 1), dim=1)
    kernel_h = across.transpose(1, 2).reshape(channels, 1, small, taps * small)
    return kernel_h, down.reshape(channels, 1, taps * small, small), centre


def strip_branches(
    x: Tensor, kernel_h: Tensor, kernel_v: Tensor, kernel_c: Tensor, anchor_h: int | None = None, anchor_v: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Depthwise convolution with a horizontal strip, a vertical strip and a small centred kernel.

    Under autocast on a GPU it computes in autocast's dtype; elsewhere in that of x. The kernels are rounded to it; their
    gradients are in their own dtype. On a GPU the engines work on contiguous maps: channels_last is converted on the way in
    and out.

    Parameters
    ----------
    x : Tensor of shape (B, C, H, W)
        Floating point. Any H and W, any batch, contiguous or channels_last; results have its layout.
    kernel_h, kernel_v, kernel_c : Tensor of shape (C, 1, N, L), (C, 1, L, N) and (C, 1, K, K)
        N and K are odd.
    anchor_h, anchor_v : int, optional
        Index of the tap along the long axis that lies on the output pixel; the middle, L // 2, by default. A strip that
        is cut off-centre (SW with M not a multiple of N) has its anchor at M // 2.

    Returns
    -------
    h, v, i : Tensor of shape (B, C, H, W)

    Raises
    ------
    ValueError
        When the kernels do not fit x or each other, or lie on another device, or x is not floating point.
    """
    anchors = _check(x, kernel_h, kernel_v, kernel_c, anchor_h, anchor_v)
    layout = native.layout(x)
    engine, x, *kernels = _operands(x, kernel_h, kernel_v, kernel_c)
    match engine:
        case "compiled":
            parts = native.call("strip_branches", x, *kernels, *anchors)
        case "toeplitz":
            parts = native.call("toeplitz_branches", x, *kernels, *anchors)
        case _:
            parts = strip_branches_ref(x, *kernels, *anchors)
    h, v, i = (native.relaid(part, layout) for part in parts)
    return h, v, i


def strip_mix(
    x: Tensor,
    kernel_h: Tensor,
    kernel_v: Tensor,
    kernel_c: Tensor,
    bias: Tensor | None = None,
    anchor_h: int | None = None,
    anchor_v: int | None = None,
) -> Tensor:
    """Sum of the three parts of `strip_branches`, plus a bias of shape (C,): one plus-shaped depthwise convolution."""
    anchors = _check(x, kernel_h, kernel_v, kernel_c, anchor_h, anchor_v, bias)
    layout = native.layout(x)
    engine, x, *kernels, bias = _operands(x, kernel_h, kernel_v, kernel_c, bias)
    match engine:
        case "compiled":
            y = native.call("strip_mix", x, *kernels, bias, *anchors)
        case "toeplitz":
            y = native.call("toeplitz_mix", x, *kernels, bias, *anchors)
        case _:
            y = sum(strip_branches_ref(x, *kernels, *anchors))
            y = y if bias is None else y + bias[:, None, None]
    return native.relaid(y, layout)


def strip_branches_ref(
    x: Tensor, kernel_h: Tensor, kernel_v: Tensor, kernel_c: Tensor, anchor_h: int, anchor_v: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`strip_branches` by torch's depthwise convolution. The padding is explicit: inside the convolution it is slow."""
    long_h, long_v = kernel_h.shape[3], kernel_v.shape[2]
    half_h, half_v, half_c = kernel_h.shape[2] // 2, kernel_v.shape[3] // 2, kernel_c.shape[2] // 2
    h = F.conv2d(F.pad(x, (anchor_h, long_h - 1 - anchor_h, half_h, half_h)), kernel_h, groups=x.shape[1])
    v = F.conv2d(F.pad(x, (half_v, half_v, anchor_v, long_v - 1 - anchor_v)), kernel_v, groups=x.shape[1])
    i = F.conv2d(x, kernel_c, padding=half_c, groups=x.shape[1])
    return h, v, i


def half_border(x: Tensor, kernel_h: Tensor, extent: int) -> Tensor:
    """What the strip h has and the two-step form with padding N // 2 loses: responses centred outside the map.

    Parameters
    ----------
    x : Tensor of shape (B, C, H, W)
    kernel_h : Tensor of shape (C, 1, N, n * N)
        Assembled horizontal strip. For the vertical one pass x and the kernel transposed, and transpose the result.
    extent : int
        M, the large kernel size.

    Returns
    -------
    Tensor of shape (B, C, H, W)
        Subtract it from h.
    """
    channels, _, small, length = kernel_h.shape
    half, width, taps = small // 2, x.shape[3], length // small
    filters = kernel_h.to(x.dtype).view(channels, small, taps, small).transpose(1, 2).reshape(channels * taps, 1, small, small)
    left = F.pad(x[..., :half], (2 * half, max(0, half - width), half, half))
    right = F.pad(x[..., -half:], (max(0, half - width), 2 * half, half, half))
    sides = [F.conv2d(side, filters, groups=channels) for side in (left, right)]          # (B, C * n, H, half) each
    lost = torch.cat(sides, dim=3).unflatten(1, (channels, taps)).transpose(2, 3).flatten(3)   # (B, C, H, n * 2 * half)
    columns = torch.cat([torch.arange(-half, 0), torch.arange(width, width + half)])
    target = columns - (torch.arange(taps)[:, None] * small + half - extent // 2)         # (n, 2 * half): output column
    place = (target.reshape(-1, 1) == torch.arange(width)).to(x)                          # (n * 2 * half, W)
    return lost @ place


def _operands(x: Tensor, *weights: Tensor | None) -> tuple[str | Tensor | None, ...]:
    """The engine; x in the dtype to compute in, on a GPU contiguous; kernels and bias in it, too.

    The Toeplitz engine rounds weights itself where it reads them: it gets them as they are, and gives such gradients.
    """
    if x.is_cuda:
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
        x = native.relaid(x if x.dtype == dtype else x.to(dtype), torch.contiguous_format)
    engine = native.strip_engine(x)
    if engine != "toeplitz":
        weights = tuple(w if w is None or w.dtype == x.dtype else w.to(x.dtype) for w in weights)
    return engine, x, *weights


def _check(
    x: Tensor, kernel_h: Tensor, kernel_v: Tensor, kernel_c: Tensor, anchor_h: int | None, anchor_v: int | None,
    bias: Tensor | None = None,
) -> tuple[int, int]:
    shapes = tuple(kernel_h.shape), tuple(kernel_v.shape), tuple(kernel_c.shape)
    channels = x.shape[1] if x.dim() == 4 else None
    fits = channels is not None and all(len(shape) == 4 and shape[:2] == (channels, 1) for shape in shapes)
    if not fits or not (shapes[0][2] % 2 and shapes[1][3] % 2 and shapes[2][2] % 2 and shapes[2][2] == shapes[2][3]):
        raise ValueError(
            f"strips need x (B, C, H, W) and kernels (C, 1, N, L), (C, 1, L, N), (C, 1, K, K) with odd N and K, "
            f"got x {tuple(x.shape)} and kernels {shapes[0]}, {shapes[1]}, {shapes[2]}."
        )
    if bias is not None and tuple(bias.shape) != (channels,):
        raise ValueError(f"strip_mix needs a bias of shape ({channels},), one per channel of x, got {tuple(bias.shape)}.")
    tensors = [x, kernel_h, kernel_v, kernel_c, *([] if bias is None else [bias])]
    if not all(tensor.is_floating_point() for tensor in tensors):
        kinds = ", ".join(str(tensor.dtype) for tensor in tensors)
        raise ValueError(f"strips need floating-point tensors, got {kinds}. Convert them with .float().")
    if any(tensor.device != x.device for tensor in tensors):
        places = ", ".join(str(tensor.device) for tensor in tensors)
        raise ValueError(f"strips need x and kernels on one device, got {places}. Move them with .to(x.device).")
    anchor_h = shapes[0][3] // 2 if anchor_h is None else anchor_h
    anchor_v = shapes[1][2] // 2 if anchor_v is None else anchor_v
    if not (0 <= anchor_h < shapes[0][3] and 0 <= anchor_v < shapes[1][2]):
        raise ValueError(
            f"anchors must lie on the strips of {shapes[0][3]} and {shapes[1][2]} taps, got {anchor_h} and {anchor_v}."
        )
    return anchor_h, anchor_v
