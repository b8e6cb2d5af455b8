"""ShiftwiseConv networks: `sw_tiny|small|base|large` (UniRepLKNet skeleton) and `sw_slak_tiny` (SLaK skeleton)."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from swconv.models.network import Kernels, LargeKernelNet, Skeleton
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

default_cfgs = generate_default_cfgs({
    name: {"num_classes": 1000, "input_size": (3, 224, 224), "pool_size": (7, 7), "crop_pct": 0.875,
           "interpolation": "bicubic", "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD,
           "first_conv": "stem.0", "classifier": "head"}
    for name in VARIANTS
})


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

    @torch.no_grad()
    def absorb(self, scale: Tensor | None = None, shift: Tensor | None = None) -> None:
        """Fold an affine map per channel that follows. The channels keep their order."""
        if scale is not None:
            self.conv.weight.mul_(scale[:, None, None, None])
            self.conv.bias.mul_(scale).add_(shift)


def depthwise(channels: int, kernel_size: int) -> nn.Conv2d:
    """Plain depthwise convolution without bias, same size."""
    return nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, bias=False)


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


def _create(variant: str, pretrained: bool, **overrides: Any) -> nn.Module:
    stages = len(overrides.get("depths", VARIANTS[variant]["depths"]))
    return build_model_with_cfg(
        shiftwise_net, variant, pretrained,
        feature_cfg={"out_indices": tuple(range(stages)), "flatten_sequential": True},
        **{**VARIANTS[variant], **overrides},
    )


@register_model
def sw_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SW-tiny: 31 M parameters merged, 82.27 / 83.39 % top-1 in the paper (120 / 300 epochs)."""
    return _create("sw_tiny", pretrained, **kwargs)


@register_model
def sw_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SW-small: 56 M parameters merged, 83.9 % top-1 in the paper."""
    return _create("sw_small", pretrained, **kwargs)


@register_model
def sw_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SW-base: registered in the released code, no result in the paper."""
    return _create("sw_base", pretrained, **kwargs)


@register_model
def sw_large(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SW-large: registered in the released code, no result in the paper."""
    return _create("sw_large", pretrained, **kwargs)


@register_model
def sw_slak_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SW in the SLaK-T skeleton, width x1.3: ablations #2-#18."""
    return _create("sw_slak_tiny", pretrained, **kwargs)
