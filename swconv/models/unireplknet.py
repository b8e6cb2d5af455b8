"""UniRepLKNet, whose skeleton SW-tiny and SW-small share: `unireplknet_tiny|small`."""

from collections.abc import Sequence
from typing import Any

from timm.models import register_model
from torch import nn

from swconv.models.mixers import ParallelConv2d, depthwise
from swconv.models.network import Kernels, LargeKernelNet, create, pretrained_cfgs

VARIANTS: dict[str, dict[str, Any]] = {
    "unireplknet_tiny": {"depths": (3, 3, 18, 3), "dims": (80, 160, 320, 640), "kernel_sizes": (3, 13, (13, 3), 13)},
    "unireplknet_small": {"depths": (3, 3, 27, 3), "dims": (96, 192, 384, 768), "kernel_sizes": (3, 13, (13, 3, 3), 13)},
}
# Kernel size -> (size, dilation) of the convolutions beside the large one: the Dilated Reparam Block.
DILATED = {
    7: ((5, 1), (3, 2), (3, 3)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
}
default_cfgs = pretrained_cfgs(VARIANTS)


def unireplknet_net(
    depths: Sequence[int], dims: Sequence[int], kernel_sizes: Sequence[Kernels], **network: Any
) -> LargeKernelNet:
    """UniRepLKNet in training form; `timm.utils.reparameterize_model` makes the deployed one.

    Parameters
    ----------
    kernel_sizes : sequence of int or of sequences of int
        Per stage, in pixels; a sequence is repeated over the blocks of its stage. 3 and 5 are plain depthwise convolutions,
        the others have dilated ones beside them.
    **network
        Arguments of `LargeKernelNet`.

    Raises
    ------
    ValueError
        For a kernel size without a row in DILATED.
    """

    def mixer(channels: int, kernel_size: int) -> nn.Module:
        if kernel_size in (3, 5):
            return depthwise(channels, kernel_size)
        if kernel_size not in DILATED:
            raise ValueError(f"UniRepLKNet needs kernel sizes of 3, 5, {', '.join(map(str, DILATED))}, got {kernel_size}.")
        dilated = {f"dilated_{size}_{rate}": (size, rate) for size, rate in DILATED[kernel_size]}
        return ParallelConv2d(channels, {"large": (kernel_size, 1)} | dilated)

    return LargeKernelNet(mixer, kernel_sizes, "unireplknet", depths, dims, **{"use_se": True, **network})


@register_model
def unireplknet_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """UniRepLKNet-T: 31.0 M parameters deployed."""
    return create(unireplknet_net, "unireplknet_tiny", VARIANTS, pretrained, **kwargs)


@register_model
def unireplknet_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """UniRepLKNet-S: 55.6 M parameters deployed."""
    return create(unireplknet_net, "unireplknet_small", VARIANTS, pretrained, **kwargs)
