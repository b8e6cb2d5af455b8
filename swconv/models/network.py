"""The network that all large-kernel models share: a stem, stages of blocks around a token mixer, a linear head.

One image's journey: (B, 3, 224, 224) -> stem (B, C1, 56, 56) -> stages, each halving the map but the first
-> mean over the map -> LayerNorm -> linear -> (B, classes). Two skeletons differ in stem, downsampling and block tail:
"convnext" (SLaK, ConvNeXt) and "unireplknet" (SW-tiny, UniRepLKNet).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, LayerNorm2d, SqueezeExcite, calculate_drop_path_rates, trunc_normal_
from timm.layers.grn import GlobalResponseNorm
from timm.models import build_model_with_cfg, generate_default_cfgs
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # SyncBatchNorm too
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint

from swconv.ops import affine

Skeleton = Literal["convnext", "unireplknet"]
Kernels = int | Sequence[int]


class ResponseNorm(GlobalResponseNorm):
    """timm's global response normalization of (B, H, W, C), in two passes over the map instead of five.

    Its bias is None once it is folded into what follows.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        else:                                                         # vector_norm is slow there; a dead channel has no slope
            norm = x.square().sum((1, 2), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny).sqrt()
        scale = 1 + self.weight * norm / (norm.mean(-1, keepdim=True) + self.eps)        # (B, 1, 1, C)
        scale = scale.to(x.dtype)
        return x * scale if self.bias is None else torch.addcmul(self.bias.to(x.dtype), x, scale)


def recomputed(part: Callable[[Tensor], Tensor], x: Tensor, owner: nn.Module, draws: bool = False) -> Tensor:
    """part(x), of which x alone is kept: the backward pass computes the rest anew, as far as it needs it.

    The owner's BatchNorms count the batch once, so that no bit changes. Where no gradient is asked for, and under
    torch.compile, which decides itself what it keeps, it is part(x).

    Parameters
    ----------
    part : callable
        Function of one Tensor, made of the owner's layers.
    draws : bool
        Whether it draws random numbers: they are then drawn again as before.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return part(x)
    return checkpoint(part, x, use_reentrant=False, preserve_rng_state=draws,
                      context_fn=lambda: (nullcontext(), _counted(owner)))


@contextmanager
def _counted(owner: nn.Module) -> Iterator[None]:
    """Have BatchNorms count into copies that are dropped: they have counted this batch."""
    norms = [module for module in owner.modules() if isinstance(module, _BatchNorm)]
    buffers = [dict(norm.named_buffers()) for norm in norms]
    for norm, own in zip(norms, buffers, strict=True):
        norm._buffers.update({name: buffer.clone() for name, buffer in own.items()})
    try:
        yield
    finally:
        for norm, own in zip(norms, buffers, strict=True):
            norm._buffers.update(own)


class Block(nn.Module):
    """Token mixer, norm, pointwise expansion and contraction, layer scale, stochastic depth, residual.

    With `recompute` set it keeps for the backward pass its input, the expansion before the activation (unless
    `expands_anew`) and the contraction; all else is cheap and computed anew.
    """

    def __init__(
        self, mixer: nn.Module, channels: int, skeleton: Skeleton, use_se: bool, layer_scale_init: float, drop_path: float,
        expands_anew: bool = False,
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
        self.folded = self.recompute = False
        self.expands_anew = expands_anew

    def forward(self, x: Tensor) -> Tensor:
        run = partial(recomputed, owner=self) if self.recompute and self.training else _run
        if self.expands_anew:
            y = run(lambda x: self._contract(self._expand(x)), x)
        else:
            y = run(self._contract, run(self._expand, x))
        return x + self.drop_path(run(self._close, y))

    def _expand(self, x: Tensor) -> Tensor:
        y = self.se(self.norm(self.mixer(x)))                         # (B, C, H, W)
        return self.pwconv1(y.permute(0, 2, 3, 1))                    # (B, H, W, 4 C)

    def _contract(self, y: Tensor) -> Tensor:
        return self.pwconv2(self.grn(self.act(y)))                    # (B, H, W, C)

    def _close(self, y: Tensor) -> Tensor:
        y = self.norm_out(y.permute(0, 3, 1, 2))                      # (B, C, H, W)
        return y if self.gamma is None else y * self.gamma[:, None, None]

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
            self.grn.bias = None
        if isinstance(self.norm_out, _BatchNorm):
            scale, shift = affine(self.norm_out)
            weight, bias = scale[:, None] * weight, scale * bias + shift
        if self.gamma is not None:
            weight, bias = self.gamma[:, None] * weight, self.gamma * bias
        self.pwconv2.weight, self.pwconv2.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
        self.norm_out, self.gamma = nn.Identity(), None


def _run(part: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return part(x)


class Stage(nn.Module):
    """Downsampling (none in the first stage), then blocks."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        if not (self.grad_checkpointing and self.training):
            return self.blocks(x)
        for block in self.blocks:
            x = recomputed(block, x, block, draws=True)
        return x


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
    global_pool : "avg" or ""
        Mean over the map and norm before the classifier, or neither.
    drop_rate : float
        Share of the pooled features that training drops before the classifier.

    Raises
    ------
    ValueError
        When depths, dims and kernel_sizes name different numbers of stages, or for another pooling.
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
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if not len(depths) == len(dims) == len(kernel_sizes):
            raise ValueError(
                "depths, dims and kernel_sizes need one entry per stage, "
                f"got {len(depths)}, {len(dims)} and {len(kernel_sizes)} entries."
            )
        widths = [int(dim * width_factor) for dim in dims]
        self.num_classes, self.num_features, self.head_hidden_size = num_classes, widths[-1], widths[-1]
        self.skeleton, self.global_pool = skeleton, _pooling(global_pool)
        self.stem = _stem(skeleton, in_chans, widths[0])
        drops = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        stages = []
        for s, (depth, width, kernels) in enumerate(zip(depths, widths, kernel_sizes, strict=True)):
            cycle = [kernels] if isinstance(kernels, int) else list(kernels)
            blocks = [
                Block(mixer(width, cycle[b % len(cycle)]), width, skeleton, use_se, layer_scale_init, drops[s][b],
                      expands_anew=s < len(depths) - 2)               # wide maps, few channels: products cost less than memory
                for b in range(depth)
            ]
            stages.append(Stage(_downsample(skeleton, widths[s - 1], width) if s else nn.Identity(), blocks))
        self.stages = nn.Sequential(*stages)
        self.feature_info = [{"num_chs": width, "reduction": 4 * 2**s, "module": f"stages.{s}"}
                             for s, width in enumerate(widths)]
        self.norm = nn.LayerNorm(widths[-1], eps=1e-6)
        self.head_drop = nn.Dropout(drop_rate) if drop_rate else nn.Identity()
        self.head = nn.Linear(widths[-1], num_classes) if num_classes else nn.Identity()
        self.apply(_init_weights)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.stages(self.stem(x))                              # (B, C, H / 32, W / 32) with four stages

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps behind the stages, as timm's models give them.

        Parameters
        ----------
        indices : int or sequence of int, optional
            The last so many stages, or these; all by default.
        norm : bool
            Not used: no norm stands between the last stage and the pooling.
        stop_early : bool
            Leave out the stages behind the last that is asked for.

        Returns
        -------
        The last map and the list of maps, or only the list; each (B, C, H, W).
        """
        if output_fmt != "NCHW":
            raise ValueError(f"forward_intermediates gives NCHW only, got output_fmt={output_fmt!r}.")
        take, last = feature_take_indices(len(self.stages), indices)
        x, maps = self.stem(x), []
        for number, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if number in take:
                maps.append(x)
        return maps if intermediates_only else (x, maps)

    def prune_intermediate_layers(self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
                                  ) -> list[int]:
        """Remove what stands behind the last stage that is asked for; says which stages are taken."""
        take, last = feature_take_indices(len(self.stages), indices)
        self.stages = self.stages[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute the blocks anew in the backward pass, and keep only their inputs."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers by depth, for timm's layer-wise learning rates."""
        blocks = r"^stages\.(\d+)" if coarse else [
            (r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^stem", "blocks": blocks}

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self.global_pool:
            x = self.norm(x.mean((2, 3)))                             # (B, C)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.global_pool = self.global_pool if global_pool is None else _pooling(global_pool)
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.head.apply(_init_weights)


def set_recompute(model: nn.Module, enable: bool = True) -> None:
    """Have all blocks in a model trade time for memory (`Block`), without a change of any bit.

    timm's `set_grad_checkpointing` goes further: it runs whole blocks anew, products included.
    """
    for module in model.modules():
        if isinstance(module, Block):
            module.recompute = enable


def pretrained_cfgs(names: Iterable[str]) -> Any:
    """timm's `default_cfgs` of a module with these models: evaluation as both papers do it, and no weights to download."""
    return generate_default_cfgs({
        name: {"num_classes": 1000, "input_size": (3, 224, 224), "pool_size": (7, 7), "crop_pct": 0.875,
               "interpolation": "bicubic", "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD,
               "first_conv": "stem.0", "classifier": "head"}
        for name in names
    })


def create(
    builder: Callable[..., LargeKernelNet], variant: str, rows: Mapping[str, Mapping[str, Any]], pretrained: bool,
    **overrides: Any,
) -> nn.Module:
    """What timm's `create_model` calls: the variant's row with what the user says otherwise."""
    stages = len(overrides.get("depths", rows[variant]["depths"]))
    return build_model_with_cfg(builder, variant, pretrained, **{**rows[variant], **overrides},
                                feature_cfg={"out_indices": tuple(range(stages)), "flatten_sequential": True})


def _pooling(name: str) -> str:
    if name not in ("avg", ""):
        raise ValueError(f'global_pool must be "avg" or "" (none), got {name!r}. Pool what forward_features gives otherwise.')
    return name


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
