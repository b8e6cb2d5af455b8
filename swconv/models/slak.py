"""SLaK: `slak_tiny|small|base`; and ConvNeXt as the SLaK paper enlarges it: `lk_convnext_tiny|small|base`."""

from collections.abc import Sequence
from typing import Any, Literal

from timm.models import register_model
from torch import nn

from swconv.models.mixers import ChainedConv2d, ParallelConv2d, StripConv2d
from swconv.models.network import Kernels, LargeKernelNet, create, pretrained_cfgs

Arrangement = Literal["single", "parallel", "sequential", "stacked", "dilated"]

# A variant is a row (SLaK sections 4 and 5, ConvNeXt's Table of variants).
SLAK: dict[str, dict[str, Any]] = {
    "slak_tiny": {"depths": (3, 3, 9, 3), "dims": (96, 192, 384, 768)},
    "slak_small": {"depths": (3, 3, 27, 3), "dims": (96, 192, 384, 768)},
    "slak_base": {"depths": (3, 3, 27, 3), "dims": (128, 256, 512, 1024)},
}
ENLARGED: dict[str, dict[str, Any]] = {f"lk_convnext_{name.removeprefix('slak_')}": row for name, row in SLAK.items()}
default_cfgs = pretrained_cfgs([*SLAK, *ENLARGED])


def slak_net(
    depths: Sequence[int],
    dims: Sequence[int],
    kernel_sizes: Sequence[Kernels] = (51, 49, 47, 13),
    small_kernel: int = 5,
    width_factor: float = 1.3,
    decomposed: bool = True,
    bn: bool = True,
    laid_out: bool = False,
    **network: Any,
) -> LargeKernelNet:
    """ConvNeXt's skeleton with SLaK's large kernels.

    Parameters
    ----------
    kernel_sizes : sequence of int
        M per stage, in pixels.
    small_kernel : int
        N: breadth of the strips and size of the small kernel, in pixels. Not decomposed, a small kernel that is not smaller
        than M is left out, as in the published code.
    decomposed : bool
        M x N and N x M strips; else one M x M kernel.
    bn : bool
        A BatchNorm behind every convolution.
    laid_out : bool
        Strips in square pieces (SW paper #1); only decomposed.
    **network
        Arguments of `LargeKernelNet`.

    Raises
    ------
    ValueError
        When laid_out is asked for without decomposed.
    """
    if laid_out and not decomposed:
        raise ValueError("laid_out cuts strips into pieces and needs decomposed=True, got decomposed=False.")

    def mixer(channels: int, kernel_size: int) -> nn.Module:
        if decomposed:
            return StripConv2d(channels, kernel_size, small_kernel, bn, laid_out)
        return _with_small(channels, (kernel_size, 1), small_kernel, bn)

    return LargeKernelNet(mixer, kernel_sizes, "convnext", depths, dims, width_factor=width_factor, **network)


def lk_convnext_net(
    depths: Sequence[int],
    dims: Sequence[int],
    kernel_sizes: Sequence[Kernels] = (51, 49, 47, 13),
    small_kernel: int | None = None,
    bn: bool = True,
    arrangement: Arrangement = "single",
    **network: Any,
) -> LargeKernelNet:
    """ConvNeXt with larger depthwise kernels (SLaK Tables 1, 2, 13 and 14).

    Parameters
    ----------
    kernel_sizes : sequence of int
        Per stage, in pixels: M. Stacked, the number of 3 x 3 convolutions; dilated, the size of the kernel with dilation 3.
    small_kernel : int, optional
        A kernel of that size beside the large one, as in RepLKNet; where M is larger.
    arrangement : str
        "single": M x M. "parallel": M x 5 beside 5 x M. "sequential": M x 5, then 5 x M. "stacked": 3 x 3 behind 3 x 3.
        "dilated": M x M with dilation 3. The strips are as broad as small_kernel, 5 by default.

    Raises
    ------
    ValueError
        For another arrangement.
    """
    breadth = small_kernel or 5

    def mixer(channels: int, kernel_size: int) -> nn.Module:
        match arrangement:
            case "single":
                return _with_small(channels, (kernel_size, 1), small_kernel, bn)
            case "dilated":
                return _with_small(channels, (kernel_size, 3), small_kernel, bn)
            case "parallel":
                return StripConv2d(channels, kernel_size, breadth, bn)
            case "sequential":
                return ChainedConv2d(channels, [(kernel_size, breadth), (breadth, kernel_size)], small_kernel, bn)
            case "stacked":
                return ChainedConv2d(channels, [(3, 3)] * kernel_size, small_kernel, bn)
        raise ValueError(f"arrangement must be single, parallel, sequential, stacked or dilated, got {arrangement!r}.")

    return LargeKernelNet(mixer, kernel_sizes, "convnext", depths, dims, **network)


def _with_small(channels: int, large: tuple[int, int], small_kernel: int | None, bn: bool) -> ParallelConv2d:
    """One large kernel (size, dilation), and a small one beside it where it is smaller."""
    small = {"small": (small_kernel, 1)} if small_kernel and small_kernel < large[0] * large[1] else {}
    return ParallelConv2d(channels, {"large": large} | small, bn)


@register_model
def slak_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SLaK-T: 50.7 M parameters dense, 30 M sparse."""
    return create(slak_net, "slak_tiny", SLAK, pretrained, **kwargs)


@register_model
def slak_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SLaK-S: 91.1 M parameters dense, 55 M sparse."""
    return create(slak_net, "slak_small", SLAK, pretrained, **kwargs)


@register_model
def slak_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SLaK-B: 158 M parameters dense, 95 M sparse."""
    return create(slak_net, "slak_base", SLAK, pretrained, **kwargs)


@register_model
def lk_convnext_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ConvNeXt-T with large kernels: the naive and RepLKNet rows of SLaK Table 1, Tables 2, 13 and 14."""
    return create(lk_convnext_net, "lk_convnext_tiny", ENLARGED, pretrained, **kwargs)


@register_model
def lk_convnext_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ConvNeXt-S with large kernels."""
    return create(lk_convnext_net, "lk_convnext_small", ENLARGED, pretrained, **kwargs)


@register_model
def lk_convnext_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ConvNeXt-B with large kernels."""
    return create(lk_convnext_net, "lk_convnext_base", ENLARGED, pretrained, **kwargs)
