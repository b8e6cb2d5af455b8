"""The ShiftwiseConv layer (SW paper, section 3): ghost split, small filters, shift and sum, norms, skip."""

from typing import Literal

import torch
from torch import Tensor, nn

from swconv.ops.shift import responses, shift_add
from swconv.ops.strips import assemble, half_border, strip_branches, strip_mix
from swconv.ops.tables import Order, ShiftTables, ghost_split, tap_count


class ShiftwiseConv2d(nn.Module):
    """Small filters, shifted and summed, in the place of a large depthwise kernel.

    Parameters
    ----------
    channels : int
        Width C of input and output.
    kernel_size, small_kernel : int
        Large extent M and small kernel N, in pixels, both odd.
    rep_branches : int
        Parallel sets of filters that are summed (paper "Rep"; official flag `N_path`).
    edges : int
        Orders in which every filter is placed (paper "E"; official flag `N_rep`).
    ghost_ratio : float
        Share of channels that pass by unchanged.
    bn : bool
        False is `norm=None`.
    padding : "full" or "half"
        Padding N - 1 (all released models; the layer is then exactly two strips) or N // 2 (SW Table 1 #3-#8, Table 2).
    norm : "branch", "filter" or None
        BatchNorm on each of the three sums (#5 on), on every filter's response of every Rep branch before the shift
        (#2-#4, #9, #10: trains in the two-step form), or none.
    skip : bool
        Add the input to the sum (released code; the paper does not mention it).
    order : "shuffled", "reversed" or "shuffle_v"
        See `ShiftTables.arrange`.
    even_split : bool
        Rounding of the ghost split, see `ghost_split`.

    Notes
    -----
    Input and output have shape (B, C, H, W). The output holds the mixed channels first, then the ghost channels: the
    official order, although the block's residual adds it to the unpermuted input.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        small_kernel: int = 3,
        rep_branches: int = 2,
        edges: int = 4,
        ghost_ratio: float = 0.23,
        bn: bool = True,
        padding: Literal["full", "half"] = "full",
        norm: Literal["branch", "filter"] | None = "branch",
        skip: bool = True,
        order: Order = "shuffled",
        even_split: bool = True,
    ) -> None:
        super().__init__()
        _check(kernel_size, small_kernel, rep_branches, padding, norm)
        self.kernel_size, self.small_kernel, self.padding, self.skip = kernel_size, small_kernel, padding, skip
        self.norm = norm if bn else None
        taps = tap_count(kernel_size, small_kernel)

        mixed, ghost = ghost_split(channels, ghost_ratio, even_split)
        tables = ShiftTables.arrange(len(mixed), taps, edges, order)
        pad = small_kernel - 1 if padding == "full" else small_kernel // 2
        pad_h, pad_v = tables.pads(kernel_size, small_kernel, pad)
        self.halo = pad - small_kernel // 2
        for name, table in {"mixed": mixed, "ghost": ghost, "pad_h": pad_h, "pad_v": pad_v, "pick": tables.pick}.items():
            self.register_buffer(name, table, persistent=False)
        self.register_buffer("mixing", tables.mixing(), persistent=False)

        shape = (len(mixed) * taps, 1, small_kernel, small_kernel)
        self.filters = nn.ParameterList(nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.02))
                                        for _ in range(rep_branches))
        norms = {"branch": [len(mixed)] * 3, "filter": [shape[0]] * rep_branches, None: []}[self.norm]
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in norms)
        self.merged = self.in_input_order = False

    def forward(self, x: Tensor) -> Tensor:
        channels = len(self.mixed) + len(self.ghost)
        if x.dim() != 4 or x.shape[1] != channels:
            raise ValueError(f"ShiftwiseConv2d needs x of shape (B, {channels}, H, W), got {tuple(x.shape)}.")
        if self.in_input_order:
            return self._forward_absorbed(x)
        mixed, ghost = self.split(x)                                          # (B, R, H, W), (B, C - R, H, W)
        if self.merged:
            y = self._mix(mixed, *self.plus())
        elif self.norm == "filter":
            y = sum(self.shift(self.responses(mixed)))
            y = y + mixed if self.skip else y
        else:
            parts = self.branches(mixed)                                      # three of (B, R, H, W)
            y = sum(norm(part) for norm, part in zip(self.norms, parts, strict=True)) if self.norm else sum(parts)
            y = y + mixed if self.skip else y
        return torch.cat([y, ghost], dim=1)                                   # mixed first: the official order

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Channels that enter SW and channels that pass by."""
        if not len(self.ghost):
            return x, x[:, :0]
        return x.index_select(1, self.mixed), x.index_select(1, self.ghost)

    def responses(self, mixed: Tensor) -> Tensor:
        """Maps of all filters, (B, R * n, H + 2 * halo, W + 2 * halo), normalised when the norm is per filter."""
        pad = self.halo + self.small_kernel // 2
        if self.norm != "filter":
            return responses(mixed, sum(self.filters), pad)
        return sum(norm(responses(mixed, weight, pad)) for norm, weight in zip(self.norms, self.filters, strict=True))

    def shift(self, maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The two-step reference: the maps moved to their places and summed."""
        return shift_add(maps, self.pad_h, self.pad_v, self.pick, self.halo)

    def branches(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The sums h, v, i in the strip form, each (B, R, H, W)."""
        kernels = assemble(list(self.filters), self.mixing)
        anchor = self.kernel_size // 2
        h, v, i = strip_branches(mixed, *kernels, anchor, anchor)
        if self.padding == "half":
            lost_h, lost_v = self._borders(mixed, kernels[0], kernels[1])
            h, v = h - lost_h, v - lost_v
        return h, v, i

    def reparameterize(self) -> None:
        """Fold Rep branches, norms (with their running statistics) and skip into one plus-shaped kernel and a bias."""
        if self.merged:
            return
        self.eval()
        with torch.no_grad():
            scales, shifts = zip(*(affine(norm) for norm in self.norms), strict=True) if self.norm else ((), ())
            weights = [w * s[:, None, None, None] for w, s in zip(self.filters, scales, strict=True)] \
                if self.norm == "filter" else list(self.filters)
            kernels = list(assemble(weights, self.mixing))
            bias = kernels[2].new_zeros(len(self.mixed))
            if self.norm == "branch":
                kernels = [k * s[:, None, None, None] for k, s in zip(kernels, scales, strict=True)]
                bias = sum(shifts)
            if self.skip:
                kernels[2][:, :, self.small_kernel // 2, self.small_kernel // 2] += 1
        for name, tensor in zip(("kernel_h", "kernel_v", "kernel_c"), kernels, strict=True):
            self.register_buffer(name, tensor.detach().contiguous())
        self.register_buffer("bias", bias.detach())
        # A norm before the shift adds a constant to every map, but only inside its extent: a border-aware bias.
        self.register_buffer("filter_bias", sum(shifts).detach() if self.norm == "filter" else None)
        del self.filters, self.norms
        self.merged = True

    def absorb(self, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """Fold what follows into the merged layer: an affine map per channel, and the order of the channels.

        From then on the layer gives its channels in the order of its input, and whatever reads them has to be reordered.

        Parameters
        ----------
        scale, shift : Tensor of shape (C,), optional
            Of the layer's channels in the official order.

        Returns
        -------
        int64 Tensor of shape (C,)
            The official order: the input channel at every place.
        """
        if not self.merged or self.in_input_order:
            raise RuntimeError("absorb needs a layer right after reparameterize(), and can be called once.")
        count, order = len(self.mixed), torch.cat([self.mixed, self.ghost])
        scale = self.bias.new_ones(len(order)) if scale is None else scale.detach()
        shift = self.bias.new_zeros(len(order)) if shift is None else shift.detach().clone()
        for name in ("kernel_h", "kernel_v", "kernel_c"):                     # of all channels: a ghost has one tap, its scale
            kernel = getattr(self, name)
            scaled = kernel * scale[:count, None, None, None]
            setattr(self, name, kernel.new_zeros(len(order), *kernel.shape[1:]).index_copy(0, self.mixed, scaled))
        self.kernel_c[self.ghost, 0, self.small_kernel // 2, self.small_kernel // 2] = scale[count:]
        shift[:count] += self.bias * scale[:count]
        self.bias = torch.empty_like(shift).index_copy(0, order, shift)
        if self.filter_bias is not None:
            self.filter_bias.view(count, -1).mul_(scale[:count, None])
        self.in_input_order = True
        return order

    def plus(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The merged layer's kernel_h, kernel_v, kernel_c and bias, of the mixed channels."""
        kernels = self.kernel_h, self.kernel_v, self.kernel_c, self.bias
        return tuple(kernel.index_select(0, self.mixed) for kernel in kernels) if self.in_input_order else kernels

    def _forward_absorbed(self, x: Tensor) -> Tensor:
        """One pass over all channels: to pick the mixed ones out and put them back costs more than the ghosts' products."""
        if not len(self.ghost) or self.filter_bias is None:
            return self._mix(x, self.kernel_h, self.kernel_v, self.kernel_c, self.bias)
        y = self._mix(x.index_select(1, self.mixed), *self.plus())
        scale = self.kernel_c[:, :, self.small_kernel // 2, self.small_kernel // 2, None]
        return torch.addcmul(self.bias[:, None, None], x, scale).index_copy_(1, self.mixed, y)

    def _mix(self, x: Tensor, kernel_h: Tensor, kernel_v: Tensor, kernel_c: Tensor, bias: Tensor) -> Tensor:
        anchor = self.kernel_size // 2
        y = strip_mix(x, kernel_h, kernel_v, kernel_c, bias, anchor, anchor)
        if self.padding == "half":
            y = y - sum(self._borders(x, kernel_h, kernel_v))
        if self.filter_bias is not None:
            size = [length + 2 * self.halo for length in x.shape[2:]]
            y = y + sum(self.shift(self.filter_bias[None, :, None, None].expand(1, -1, *size))).to(y.dtype)
        return y

    def _borders(self, mixed: Tensor, kernel_h: Tensor, kernel_v: Tensor) -> tuple[Tensor, Tensor]:
        lost_h = half_border(mixed, kernel_h, self.kernel_size)
        lost_v = half_border(mixed.transpose(2, 3), kernel_v.transpose(2, 3), self.kernel_size).transpose(2, 3)
        return lost_h, lost_v

    def extra_repr(self) -> str:
        count = self.mixing.shape[2]
        return (f"channels={len(self.mixed) + len(self.ghost)}, mixed={len(self.mixed)}, extent={self.kernel_size}, "
                f"small={self.small_kernel}, taps={count}, padding={self.padding!r}, norm={self.norm!r}, skip={self.skip}"
                + (", merged into one plus-shaped kernel" if self.merged else ""))


def affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Scale and shift of a BatchNorm in evaluation."""
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return scale, norm.bias - norm.running_mean * scale


def _check(kernel_size: int, small_kernel: int, rep_branches: int, padding: str, norm: str | None) -> None:
    if kernel_size % 2 == 0 or small_kernel % 2 == 0 or not 1 < small_kernel <= kernel_size:
        raise ValueError(
            "ShiftwiseConv2d needs odd kernel sizes with 1 < small_kernel <= kernel_size, "
            f"got kernel_size = {kernel_size}, small_kernel = {small_kernel}."
        )
    if rep_branches < 1:
        raise ValueError(f"rep_branches must be at least 1, got {rep_branches}.")
    if padding not in ("full", "half"):
        raise ValueError(f'padding must be "full" or "half", got {padding!r}.')
    if norm not in ("branch", "filter", None):
        raise ValueError(f'norm must be "branch", "filter" or None, got {norm!r}.')
