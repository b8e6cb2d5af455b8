"""The two-step form: convolve with every small filter, then shift the maps and add. The oracle of all other forms."""

import torch
import torch.nn.functional as F
from torch import Tensor

from swconv.ops import native


def responses(x: Tensor, filters: Tensor, padding: int) -> Tensor:
    """Convolve with every small filter: the first of the two steps.

    One depthwise convolution per tap: one convolution with several outputs per group leaves oneDNN's fast path.

    Parameters
    ----------
    x : Tensor of shape (B, R, H, W)
    filters : Tensor of shape (R * n, 1, N, N)
    padding : int
        Zeros on all sides, in pixels.

    Returns
    -------
    Tensor of shape (B, R * n, H + 2 * padding - N + 1, W + 2 * padding - N + 1)
        Channel r * n + k is the response of channel r to its filter k.
    """
    taps = filters.unflatten(0, (x.shape[1], -1)).unbind(1)                # n of (R, 1, N, N)
    return torch.stack([F.conv2d(x, tap, padding=padding, groups=x.shape[1]) for tap in taps], dim=2).flatten(1, 2)


def shift_add(
    maps: Tensor, pad_h: Tensor, pad_v: Tensor, pick: Tensor, halo: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Move every filter's response to its place in the large kernel, and add.

    Parameters
    ----------
    maps : Tensor of shape (B, R * n, H + 2 * halo, W + 2 * halo)
        Responses of the small filters; channel r * n + k is filter k of channel r. Zero outside. Half precision is added up in
        float32.
    pad_h, pad_v : int32 Tensor of shape (R * n, E)
        Displacement of each map on each edge, in pixels (`ShiftTables.pads`).
    pick : int Tensor of shape (R, E)
        The map of each channel and edge that stays in place: its index among all, r * n to r * n + n - 1.
    halo : int
        Border of the maps around the output, in pixels: padding - N // 2.

    Returns
    -------
    h, v, i : Tensor of shape (B, R, H, W)
        Sums of the maps shifted along W, of those shifted along H, and of those in place. Of maps that are shapes only
        (device meta) the shapes, whatever the tables hold and wherever they are.

    Raises
    ------
    ValueError
        When the number of maps is not R * n, the maps are smaller than their halo or not floating point, a pick is of another
        channel, or tables and maps are on different devices.
    """
    _check(maps, pad_h, pad_v, pick, halo)
    if maps.dtype in (torch.bfloat16, torch.float16):
        h, v, i = (part.to(maps.dtype) for part in shift_add(maps.float(), pad_h, pad_v, pick, halo))
        return h, v, i
    if maps.is_meta:
        inner = maps[..., halo : maps.shape[2] - halo, halo : maps.shape[3] - halo].unflatten(1, (pick.shape[0], -1))
        h, v, i = (inner.sum(2) for _ in range(3))
        return h, v, i
    if native.handles(maps, "shift_add"):
        return torch.ops.swconv.shift_add(maps, pad_h.int(), pad_v.int(), pick.int(), halo)
    return shift_add_ref(maps, pad_h, pad_v, pick, halo)


def shift_add_ref(
    maps: Tensor, pad_h: Tensor, pad_v: Tensor, pick: Tensor, halo: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`shift_add` in plain torch, differentiable, one slice per edge and displacement."""
    channels = pick.shape[0]
    rows = maps[:, :, halo : maps.shape[2] - halo]                        # (B, R * n, H, W + 2 * halo)
    columns = maps[..., halo : maps.shape[3] - halo].transpose(2, 3)      # (B, R * n, W, H + 2 * halo)
    h = _slide(rows, pad_h, channels, halo)
    v = _slide(columns, pad_v, channels, halo).transpose(2, 3)
    inner = rows[..., halo : maps.shape[3] - halo]
    i = sum(inner[:, edge] for edge in pick.long().t())
    return h, v, i


def _slide(maps: Tensor, pad: Tensor, channels: int, halo: int) -> Tensor:
    """Sum over edges of maps moved along the last axis by `pad`, cut to its inner part. (B, R * n, A, L) -> (B, R, A, L')."""
    length = maps.shape[3] - 2 * halo
    taps = maps.shape[1] // channels
    nothing = pad.new_empty(0)                                            # so that it has a gradient, all zero, if all leave
    out = maps.new_zeros(maps.shape[0], channels, maps.shape[2], length).index_add(1, nothing, maps[:, :0, :, :length])
    for edge in pad.t():
        for move in edge.unique().tolist():
            low, high = max(0, move), min(length, length + 2 * halo + move)
            if low >= high:
                continue
            index = (edge == move).nonzero()[:, 0]
            part = F.pad(maps[:, index, :, low - move : high - move], (low, length - high))
            out = out.index_add(1, index // taps, part)
    return out


def _check(maps: Tensor, pad_h: Tensor, pad_v: Tensor, pick: Tensor, halo: int) -> None:
    tables = pad_h, pad_v, pick
    fits = all(table.dim() == 2 and table.numel() for table in tables) and pad_h.shape == pad_v.shape
    count, channels = (pad_h.shape[0], pick.shape[0]) if fits else (0, 1)
    if not fits or count % channels or pad_h.shape[1] != pick.shape[1] or maps.dim() != 4 or maps.shape[1] != count:
        raise ValueError(
            f"shift_add needs maps (B, R * n, H, W), pad_h and pad_v (R * n, E) and pick (R, E), got maps {tuple(maps.shape)}, "
            f"pad_h {tuple(pad_h.shape)}, pad_v {tuple(pad_v.shape)} and pick {tuple(pick.shape)}. "
            "Were maps and tables made for the same kernel size?"
        )
    if not maps.is_floating_point() or any(table.is_floating_point() or table.is_complex() for table in tables):
        kinds = ", ".join(str(tensor.dtype) for tensor in (maps, *tables))
        raise ValueError(f"shift_add needs floating-point maps and tables of whole numbers, got {kinds}.")
    if halo < 0 or min(maps.shape[2:]) <= 2 * halo:
        raise ValueError(f"shift_add needs maps larger than two halos of {halo} >= 0, got {tuple(maps.shape[2:])}.")
    if maps.is_meta:
        return
    if any(table.device != maps.device for table in tables):
        places = ", ".join(str(tensor.device) for tensor in (maps, *tables))
        raise ValueError(f"shift_add needs maps and tables on one device, got {places}. Move them with .to(maps.device).")
    # Looking at a GPU's tables would make the CPU wait for it, and a graph cannot look at all.
    if pick.device.type != "cpu" or torch.compiler.is_compiling():
        return
    taps = count // channels
    strange = (pick.div(taps, rounding_mode="floor") != torch.arange(channels)[:, None]).nonzero()
    if len(strange):
        row, edge = strange[0].tolist()
        raise ValueError(
            f"shift_add needs pick between {row * taps} and {row * taps + taps - 1} in row {row}, the filters of that channel, "
            f"got {int(pick[row, edge])}. Are its entries absolute filter indices?"
        )
    far = max(int(pad.abs().max()) if pad.dtype == torch.int64 else 0 for pad in (pad_h, pad_v))
    if far >= 2**31:
        raise ValueError(f"shift_add needs displacements of less than 2**31 pixels, got {far}.")
