"""The network that all large-kernel models share: a stem, stages of blocks around a token mixer, a linear head.

One image's journey: (B, 3, 224, 224) -> stem (B, C1, 56, 56) -> stages, each halving the map but the first
-> mean over the map -> LayerNorm -> linear -> (B, classes). Two skeletons differ in stem, downsampling and block tail:
"convnext" (SLaK, ConvNeXt) and "unireplknet" (SW-tiny, UniRepLKNet).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from timm.layers import DropPath, LayerNorm2d, SqueezeExcite, calculate_drop_path_rates, trunc_normal_
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # SyncBatchNorm too
from torch.nn.utils.fusion import fuse_conv_bn_eval

from swconv.ops import affine

Skeleton = Literal["convnext", "unireplknet"]
Kernels = int | Sequence[int]


class ResponseNorm(GlobalResponseNorm):
    """timm's global response normalization of (B, H, W, C), in two passes over the map instead of five."""

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        else:                                                         # vector_norm is slow there; a dead channel has no slope
            norm = x.square().sum((1, 2), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny).sqrt()
        scale = 1 + self.weight * norm / (norm.mean(-1, keepdim=True) + self.eps)        # (B, 1, 1, C)
        return torch.addcmul(self.bias.to(x.dtype), x, scale.to(x.dtype))


class Block(nn.Module):
    """Token mixer, norm, pointwise expansion and contraction, layer scale, stochastic depth, residual."""

    def __init__(
        self, mixer: nn.Module, channels: int, skeleton: Skeleton, use_se: bool, layer_scale_init: float, drop_path: float
    ) -> None:
        super().__init__()
        grown = skeleton == "unireplknet"
        self.mixer = mixer
        self.norm = nn.BatchNorm2d(channels) if grown and use_se else LayerNorm2d(channels, eps=1e-6)
        self.se = (SqueezeExcite(channels, rd_channels=channels // 4) if use_se else nn.Identity())
        self.pwconv1 = nn.Linear(channels, 4 * channels)
        self.act = nn.GELU()
        self.grn = ResponseNorm(4 * channels) if grown else nn.Identity()
        self.pwconv2 = nn.Linear(4 * channels, channels, bias=not grown)
        self.norm_out = nn.BatchNorm2d(channels) if grown else nn.Identity()
        self.gamma = nn.Parameter(layer_scale_init * torch.ones(channels)) if layer_scale_init > 0 else None
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.folded = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.se(self.norm(self.mixer(x)))                         # (B, C, H, W)
        y = y.permute(0, 2, 3, 1)                                     # (B, H, W, C)
        y = self.pwconv2(self.grn(self.act(self.pwconv1(y))))
        y = self.norm_out(y.permute(0, 3, 1, 2))                      # (B, C, H, W)
        if self.gamma is not None:
            y = y * self.gamma[:, None, None]
        return x + self.drop_path(y)

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Fold for inference, in place and once: `timm.utils.reparameterize_model` calls it on every block.

        Into the mixer: what it merges itself, and the BatchNorm behind it. Into what reads the mixer: the order of its
        channels. Into the contraction: GRN's shift, the closing BatchNorm and the layer scale.
        """
        if self.folded:
            return
        self.eval()
        self._fold_mixer()
        self._fold_tail()
        self.folded = True

    def _fold_mixer(self) -> None:
        if hasattr(self.mixer, "reparameterize"):
            self.mixer.reparameterize()
        scale, shift = affine(self.norm) if isinstance(self.norm, _BatchNorm) else (None, None)
        if hasattr(self.mixer, "absorb"):
            order = self.mixer.absorb(scale, shift)
        elif scale is not None and isinstance(self.mixer, nn.Conv2d):
            self.mixer, order = fuse_conv_bn_eval(self.mixer, self.norm), None
        else:
            return
        if scale is not None:
            self.norm = nn.Identity()
        if order is not None:
            self._reorder(order.argsort())

    def _reorder(self, place: Tensor) -> None:
        """Take the mixer's channels in another order: channel c from where channel place[c] was."""
        if isinstance(self.norm, nn.LayerNorm):
            self.norm.weight.copy_(self.norm.weight[place])
            self.norm.bias.copy_(self.norm.bias[place])
        if isinstance(self.se, SqueezeExcite):
            self.se.fc1.weight.copy_(self.se.fc1.weight[:, place])
            self.se.fc2.weight.copy_(self.se.fc2.weight[place])
            self.se.fc2.bias.copy_(self.se.fc2.bias[place])
        self.pwconv1.weight.copy_(self.pwconv1.weight[:, place])

    def _fold_tail(self) -> None:
        weight, bias = self.pwconv2.weight, self.pwconv2.bias
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        if isinstance(self.grn, ResponseNorm):
            bias = bias + weight @ self.grn.bias
            self.grn.bias.zero_()
        if isinstance(self.norm_out, _BatchNorm):
            scale, shift = affine(self.norm_out)
            weight, bias = scale[:, None] * weight, scale * bias + shift
        if self.gamma is not None:
            weight, bias = self.gamma[:, None] * weight, self.gamma * bias
        self.pwconv2.weight, self.pwconv2.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
        self.norm_out, self.gamma = nn.Identity(), None


class Stage(nn.Module):
    """Downsampling (none in the first stage), then blocks."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


class LargeKernelNet(nn.Module):
    """Hierarchical network around a token mixer, with timm's model interface.

    Parameters
    ----------
    mixer : callable (channels, kernel_size) -> nn.Module
        Makes the token mixer of one block, (B, C, H, W) -> (B, C, H, W).
    kernel_sizes : sequence of int or of sequences of int
        Large extent per stage; a sequence is repeated over the blocks of its stage (interleaving).
    skeleton : "convnext" or "unireplknet"
        Stem, downsampling and block tail.
    depths, dims : sequence of int
        Blocks and channels per stage, any number of stages; channels are int(dim * width_factor).
    use_se : bool
        Squeeze-and-excitation after the mixer's norm (which is then a BatchNorm in the "unireplknet" skeleton).
    layer_scale_init : float
        Initial layer scale; 0 leaves the scale out.

    Raises
    ------
    ValueError
        When depths, dims and kernel_sizes name different numbers of stages.
    """

    def __init__(
        self,
        mixer: Callable[[int, int], nn.Module],
        kernel_sizes: Sequence[Kernels],
        skeleton: Skeleton,
        depths: Sequence[int],
        dims: Sequence[int],
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        layer_scale_init: float = 1e-6,
        width_factor: float = 1.0,
        use_se: bool = False,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        if not len(depths) == len(dims) == len(kernel_sizes):
            raise ValueError(
                "depths, dims and kernel_sizes need one entry per stage, "
                f"got {len(depths)}, {len(dims)} and {len(kernel_sizes)} entries."
            )
        widths = [int(dim * width_factor) for dim in dims]
        self.num_classes, self.num_features, self.head_hidden_size = num_classes, widths[-1], widths[-1]
        self.global_pool = global_pool
        self.stem = _stem(skeleton, in_chans, widths[0])
        drops = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        stages = []
        for s, (depth, width, kernels) in enumerate(zip(depths, widths, kernel_sizes, strict=True)):
            cycle = [kernels] if isinstance(kernels, int) else list(kernels)
            blocks = [
                Block(mixer(width, cycle[b % len(cycle)]), width, skeleton, use_se, layer_scale_init, drops[s][b])
                for b in range(depth)
            ]
            stages.append(Stage(_downsample(skeleton, widths[s - 1], width) if s else nn.Identity(), blocks))
        self.stages = nn.Sequential(*stages)
        self.feature_info = [{"num_chs": width, "reduction": 4 * 2**s, "module": f"stages.{s}"}
                             for s, width in enumerate(widths)]
        self.norm = nn.LayerNorm(widths[-1], eps=1e-6)
        self.head = nn.Linear(widths[-1], num_classes) if num_classes else nn.Identity()
        self.apply(_init_weights)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.stages(self.stem(x))                              # (B, C, H / 32, W / 32) with four stages

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self.global_pool:
            x = self.norm(x.mean((2, 3)))                             # (B, C)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        self.global_pool = self.global_pool if global_pool is None else global_pool
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.head.apply(_init_weights)


def _stem(skeleton: Skeleton, in_chans: int, width: int) -> nn.Module:
    """Four-fold reduction: one patch convolution, or two 3x3 convolutions of stride 2."""
    norm = partial(LayerNorm2d, eps=1e-6)
    if skeleton == "convnext":
        return nn.Sequential(nn.Conv2d(in_chans, width, 4, stride=4), norm(width))
    return nn.Sequential(
        nn.Conv2d(in_chans, width // 2, 3, stride=2, padding=1), norm(width // 2), nn.GELU(),
        nn.Conv2d(width // 2, width, 3, stride=2, padding=1), norm(width),
    )


def _downsample(skeleton: Skeleton, before: int, width: int) -> nn.Module:
    if skeleton == "convnext":
        return nn.Sequential(LayerNorm2d(before, eps=1e-6), nn.Conv2d(before, width, 2, stride=2))
    return nn.Sequential(nn.Conv2d(before, width, 3, stride=2, padding=1), LayerNorm2d(width, eps=1e-6))


def _init_weights(module: nn.Module) -> None:
    """Truncated normal (0.02, cut at +-2) for convolutions and linear layers, zero biases (all three code bases)."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
