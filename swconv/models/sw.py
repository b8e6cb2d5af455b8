"""ShiftwiseConv networks: `sw_tiny|small|base|large` (UniRepLKNet skeleton) and `sw_slak_tiny` (SLaK skeleton)."""

from collections.abc import Sequence
from typing import Any, Literal

from timm.models import register_model
from torch import nn

from swconv.models.mixers import NormSkipConv2d, depthwise
from swconv.models.network import Kernels, LargeKernelNet, Skeleton, create, pretrained_cfgs
from swconv.ops import ShiftwiseConv2d
from swconv.ops.tables import Order

# A variant is a row: skeleton, depths, dims (SW paper Table 8; base and large as registered in the released code).
VARIANTS: dict[str, dict[str, Any]] = {
    "sw_tiny": {"skeleton": "unireplknet", "depths": (3, 3, 18, 3), "dims": (80, 160, 320, 640)},
    "sw_small": {"skeleton": "unireplknet", "depths": (3, 3, 27, 3), "dims": (96, 192, 384, 768)},
    "sw_base": {"skeleton": "unireplknet", "depths": (3, 3, 27, 3), "dims": (128, 256, 512, 1024)},
    "sw_large": {"skeleton": "unireplknet", "depths": (3, 3, 27, 3), "dims": (192, 384, 768, 1536)},
    "sw_slak_tiny": {
        "skeleton": "convnext", "depths": (3, 3, 9, 3), "dims": (96, 192, 384, 768), "width_factor": 1.3, "use_se": False,
    },
}

default_cfgs = pretrained_cfgs(VARIANTS)


def shiftwise_net(
    skeleton: Skeleton,
    depths: Sequence[int],
    dims: Sequence[int],
    kernel_sizes: Sequence[Kernels] = (51, 49, 47, 13),
    small_kernel: int = 3,
    rep_branches: int = 2,
    edges: int = 4,
    ghost_ratio: float = 0.23,
    use_se: bool = True,
    width_factor: float = 1.0,
    padding: Literal["full", "half"] = "full",
    norm: Literal["branch", "filter"] | None = "branch",
    skip: bool = True,
    order: Order = "shuffled",
    depthwise_norm_skip: bool = False,
    **network: Any,
) -> LargeKernelNet:
    """A network whose mixers are `ShiftwiseConv2d`; extents up to `small_kernel` are plain depthwise convolutions.

    Parameters
    ----------
    depthwise_norm_skip : bool
        Give the plain depthwise convolutions SW's norm and skip, for a fair control.
    **network
        Arguments of `LargeKernelNet`; the others are those of `ShiftwiseConv2d`.
    """

    def mixer(channels: int, kernel_size: int) -> nn.Module:
        if kernel_size <= small_kernel:
            return (NormSkipConv2d if depthwise_norm_skip else depthwise)(channels, kernel_size)
        return ShiftwiseConv2d(
            channels, kernel_size, small_kernel, rep_branches, edges, ghost_ratio, padding=padding, norm=norm, skip=skip,
            order=order, even_split=skeleton == "unireplknet",
        )

    return LargeKernelNet(mixer, kernel_sizes, skeleton, depths, dims, width_factor=width_factor, use_se=use_se, **network)


@register_model
def sw_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SW-tiny: 31 M parameters merged, 82.27 / 83.39 % top-1 in the paper (120 / 300 epochs)."""
    return create(shiftwise_net, "sw_tiny", VARIANTS, pretrained, **kwargs)


@register_model
def sw_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SW-small: 56 M parameters merged, 83.9 % top-1 in the paper."""
    return create(shiftwise_net, "sw_small", VARIANTS, pretrained, **kwargs)


@register_model
def sw_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SW-base: registered in the released code, no result in the paper."""
    return create(shiftwise_net, "sw_base", VARIANTS, pretrained, **kwargs)


@register_model
def sw_large(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SW-large: registered in the released code, no result in the paper."""
    return create(shiftwise_net, "sw_large", VARIANTS, pretrained, **kwargs)


@register_model
def sw_slak_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SW in the SLaK-T skeleton, width x1.3: ablations #2-#18."""
    return create(shiftwise_net, "sw_slak_tiny", VARIANTS, pretrained, **kwargs)
