"""Token mixers of the networks that SW is compared with: depthwise convolutions beside or behind each other.

All take and give (B, C, H, W), have no bias in training, and fold for inference as `ShiftwiseConv2d` does:
`reparameterize()` merges what they hold, `absorb(scale, shift)` what follows them.
"""

from collections.abc import Iterable, Mapping
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from swconv.ops import affine, strip_branches, strip_mix


def depthwise(channels: int, kernel_size: int | tuple[int, int], dilation: int = 1, pieces: int = 1) -> nn.Conv2d:
    """Plain depthwise convolution without bias, same size; `pieces` outputs per channel. A ValueError for even sizes."""
    height, width = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
    if not (height % 2 and width % 2):
        raise ValueError(f"A depthwise convolution needs odd kernel sizes to keep the map's size, got {height} x {width}.")
    padding = (dilation * (height - 1) // 2, dilation * (width - 1) // 2)
    return nn.Conv2d(channels, channels * pieces, (height, width), padding=padding, dilation=dilation, groups=channels,
                     bias=False)


class NormSkipConv2d(nn.Module):
    """BatchNorm(depthwise convolution) + input: a small kernel with the norm and the skip that SW has (a control)."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = depthwise(channels, kernel_size)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + x if self.norm is not None else self.conv(x)

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Fold norm and skip into the convolution."""
        if self.norm is not None:
            self.conv, self.norm = fuse_conv_bn_eval(self.conv.eval(), self.norm.eval()), None
            centre = self.conv.weight.shape[-1] // 2
            self.conv.weight[:, :, centre, centre] += 1

    def absorb(self, scale: Tensor | None = None, shift: Tensor | None = None) -> None:
        """Fold an affine map per channel that follows. The channels keep their order."""
        _absorb([self.conv.weight], self.conv.bias, scale, shift)


class StripConv2d(nn.Module):
    """SLaK's large kernel: BN(vertical M x N) + BN(horizontal N x M) + BN(small N x N), each depthwise.

    Parameters
    ----------
    channels : int
    kernel_size, small_kernel : int
        M and N in pixels, odd, N < M.
    bn : bool
        Without it the three are added as they are.
    laid_out : bool
        Keep each strip as its ceil(M / N) square pieces of N x N (SW paper section 3.2, #1). The last piece may reach
        beyond the strip, where a converted strip has zeros and a trained one has weights.

    Raises
    ------
    ValueError
        When a kernel size is even, or N is not smaller than M.
    """

    def __init__(self, channels: int, kernel_size: int, small_kernel: int = 5, bn: bool = True, laid_out: bool = False) -> None:
        super().__init__()
        if not (kernel_size % 2 and small_kernel % 2 and small_kernel < kernel_size):
            raise ValueError(f"StripConv2d needs odd kernel sizes with small_kernel < kernel_size, got kernel_size = "
                             f"{kernel_size}, small_kernel = {small_kernel}.")
        self.channels, self.kernel_size, self.small_kernel, self.laid_out = channels, kernel_size, small_kernel, laid_out
        pieces = ceil(kernel_size / small_kernel) if laid_out else 1
        sizes = {"vertical": (kernel_size, small_kernel), "horizontal": (small_kernel, kernel_size)}
        self.convs = nn.ModuleDict(
            {name: depthwise(channels, small_kernel if laid_out else size, pieces=pieces) for name, size in sizes.items()}
            | {"small": depthwise(channels, small_kernel)})
        self.norms = nn.ModuleDict({name: nn.BatchNorm2d(channels) for name in self.convs} if bn else {})
        self.merged = False

    def forward(self, x: Tensor) -> Tensor:
        anchor = self.kernel_size // 2
        if self.merged:
            return strip_mix(x, self.kernel_h, self.kernel_v, self.kernel_c, self.bias, anchor, anchor)
        parts = strip_branches(x, *self.strips(), anchor, anchor)             # three of (B, C, H, W)
        if not self.norms:
            return sum(parts)
        return sum(self.norms[name](part) for name, part in zip(("horizontal", "vertical", "small"), parts, strict=True))

    def strips(self) -> tuple[Tensor, Tensor, Tensor]:
        """Horizontal (C, 1, N, L), vertical (C, 1, L, N) and small kernel (C, 1, N, N); L is M, or ceil(M / N) N laid out."""
        horizontal, vertical, small = (self.convs[name].weight for name in ("horizontal", "vertical", "small"))
        if self.laid_out:
            size = self.small_kernel
            horizontal = horizontal.view(self.channels, -1, size, size).transpose(1, 2).flatten(2).unsqueeze(1)
            vertical = vertical.view(self.channels, 1, -1, size)
        return horizontal, vertical, small

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Fold the norms into one plus-shaped kernel and a bias."""
        if self.merged:
            return
        self.eval()
        kernels = [kernel.clone() for kernel in self.strips()]
        bias = kernels[0].new_zeros(self.channels)
        if self.norms:
            scales, shifts = zip(*(affine(self.norms[name]) for name in ("horizontal", "vertical", "small")), strict=True)
            kernels, bias = [k * s[:, None, None, None] for k, s in zip(kernels, scales, strict=True)], sum(shifts)
        for name, tensor in zip(("kernel_h", "kernel_v", "kernel_c"), kernels, strict=True):
            self.register_buffer(name, tensor.contiguous())
        self.register_buffer("bias", bias)
        del self.convs, self.norms
        self.merged = True

    def absorb(self, scale: Tensor | None = None, shift: Tensor | None = None) -> None:
        """Fold an affine map per channel that follows the merged layer. The channels keep their order."""
        _absorb((self.kernel_h, self.kernel_v, self.kernel_c), self.bias, scale, shift)

    def extra_repr(self) -> str:
        return (f"channels={self.channels}, extent={self.kernel_size}, small={self.small_kernel}, laid_out={self.laid_out}"
                + (", merged into one plus-shaped kernel" if self.merged else ""))


class ParallelConv2d(nn.Module):
    """Depthwise convolutions beside each other, each with its BatchNorm: RepLKNet's and UniRepLKNet's large kernels.

    Parameters
    ----------
    channels : int
    branches : mapping of str to (int, int)
        Name -> kernel size in pixels, and dilation.
    bn : bool
    """

    def __init__(self, channels: int, branches: Mapping[str, tuple[int, int]], bn: bool = True) -> None:
        super().__init__()
        self.convs = nn.ModuleDict({name: depthwise(channels, size, dilation) for name, (size, dilation) in branches.items()})
        self.norms = nn.ModuleDict({name: nn.BatchNorm2d(channels) for name in branches} if bn else {})
        self.merged: nn.Conv2d | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.merged is not None:
            return self.merged(x)
        return sum(self.norms[name](conv(x)) if self.norms else conv(x) for name, conv in self.convs.items())

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Fold all into one kernel as large as the largest, dilated ones with zeros between their taps."""
        if self.merged is not None:
            return
        self.eval()
        convs = [fuse_conv_bn_eval(conv, self.norms[name]) if self.norms else conv for name, conv in self.convs.items()]
        kernels = [_undilated(conv) for conv in convs]
        extent = max(kernel.shape[-1] for kernel in kernels)
        channels = len(kernels[0])
        merged = nn.Conv2d(channels, channels, extent, padding=extent // 2, groups=channels).to(kernels[0])
        merged.weight.copy_(sum(_padded(kernel, extent) for kernel in kernels))
        merged.bias.copy_(sum(conv.bias for conv in convs) if self.norms else torch.zeros_like(merged.bias))
        del self.convs, self.norms
        self.merged = merged

    def absorb(self, scale: Tensor | None = None, shift: Tensor | None = None) -> None:
        """Fold an affine map per channel that follows the merged layer. The channels keep their order."""
        _absorb([self.merged.weight], self.merged.bias, scale, shift)


class ChainedConv2d(nn.Module):
    """Depthwise convolutions behind each other, each with its BatchNorm, and one small kernel beside the whole chain.

    SLaK Table 13: two strips in sequence, or a stack of 3x3. A chain does not merge exactly: every link pads with zeros.
    """

    def __init__(self, channels: int, chain: Iterable[tuple[int, int]], small_kernel: int | None, bn: bool = True) -> None:
        super().__init__()
        def normed(size: int | tuple[int, int]) -> list[nn.Module]:
            return [depthwise(channels, size), *([nn.BatchNorm2d(channels)] if bn else [])]

        self.chain = nn.Sequential(*(layer for size in chain for layer in normed(size)))
        self.small = nn.Sequential(*normed(small_kernel)) if small_kernel else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.chain(x)
        return y if self.small is None else y + self.small(x)

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Fold every BatchNorm into the convolution before it."""
        self.eval()
        self.chain = _fused(self.chain)
        self.small = self.small if self.small is None else _fused(self.small)


def _fused(layers: nn.Sequential) -> nn.Sequential:
    norms = [layer for layer in layers if isinstance(layer, nn.BatchNorm2d)]
    convs = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    return nn.Sequential(*map(fuse_conv_bn_eval, convs, norms)) if norms else layers


def _undilated(conv: nn.Conv2d) -> Tensor:
    """The kernel with zeros where a dilation leaves gaps."""
    rate, size = conv.dilation[0], conv.weight.shape[-1]
    if rate == 1:
        return conv.weight
    kernel = conv.weight.new_zeros(len(conv.weight), 1, rate * (size - 1) + 1, rate * (size - 1) + 1)
    kernel[:, :, ::rate, ::rate] = conv.weight
    return kernel


def _padded(kernel: Tensor, extent: int) -> Tensor:
    margin = (extent - kernel.shape[-1]) // 2
    return F.pad(kernel, (margin, margin, margin, margin))


@torch.no_grad()
def _absorb(kernels: Iterable[Tensor], bias: Tensor, scale: Tensor | None, shift: Tensor | None) -> None:
    """kernel <- scale kernel and bias <- scale bias + shift, in place, per channel."""
    if scale is not None:
        for kernel in kernels:
            kernel.mul_(scale[:, None, None, None])
        bias.mul_(scale).add_(shift)
