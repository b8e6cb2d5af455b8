"""UPerNet with an FCN auxiliary head, its losses, and the ways to look at an image: whole, in windows, at several scales.

B batch, K classes, H and W of the image; maps of strides 4, 8, 16, 32 come from a `Pyramid`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm
from torchvision.ops import Conv2dNormActivation

from swconv.downstream.datasets import UNLABELLED
from swconv.downstream.pyramid import Pyramid
from swconv.models.sync_norm import SyncBatchNorm2d

Infer = Callable[[Tensor], Tensor]                                    # (B, 3, H, W) -> logits (B, K, H, W)


@dataclass(frozen=True)
class UPerNetConfig:
    """Widths of the heads; the defaults are the papers' (SLaK A.2, SW C.2).

    Attributes
    ----------
    num_classes : int
    channels, aux_channels : int
        Of the decode head and of the auxiliary head, which reads the third map.
    pool_scales : tuple of int
        Sides of the pooled maps.
    dropout : float
        Of whole channels, in front of both classifiers.
    aux_weight : float
        Of the auxiliary loss.
    """

    num_classes: int = 150
    channels: int = 512
    aux_channels: int = 256
    pool_scales: tuple[int, ...] = (1, 2, 3, 6)
    dropout: float = 0.1
    aux_weight: float = 0.4


class UPerNet(nn.Module):
    """Pyramid, decode head and auxiliary head.

    Parameters
    ----------
    pyramid : Pyramid
    config : UPerNetConfig
    """

    def __init__(self, pyramid: Pyramid, config: UPerNetConfig) -> None:
        super().__init__()
        self.pyramid, self.config = pyramid, config
        self.decode_head = UPerHead(pyramid.channels, config)
        self.auxiliary_head = FCNHead(pyramid.channels[2], config)

    def forward(self, images: Tensor, targets: Sequence[dict] | None = None) -> dict[str, Tensor] | Tensor:
        """
        Parameters
        ----------
        images : Tensor of shape (B, 3, H, W)
        targets : list of dict
            While training; `segmentation`, (H, W), classes and 255 where nothing is labelled.

        Returns
        -------
        dict of str to Tensor
            While training: the losses `decode` and `auxiliary`, to be added.
        Tensor of shape (B, K, H, W)
            In evaluation: logits.

        Raises
        ------
        ValueError
            While training: no targets, a class out of range, or a single image for norms that see no other process.
        """
        if not self.training:
            return _resize(self.decode_head(self.pyramid(images)), images.shape[-2:])
        if targets is None:
            raise ValueError("UPerNet needs targets to train, got none. Give them, or call eval().")
        if len(images) < 2 and not any(isinstance(m, SyncBatchNorm | SyncBatchNorm2d) for m in self.decode_head.modules()):
            raise ValueError("UPerNet needs at least 2 images per step to train, because it normalises maps pooled to one "
                             "pixel, got 1. Raise the batch size, or share statistics between processes (sync_batch_norms).")
        labels = torch.stack([target["segmentation"] for target in targets]).long()
        return self.losses(self.pyramid(images), labels)

    def losses(self, maps: Sequence[Tensor], labels: Tensor) -> dict[str, Tensor]:
        """Of the four maps and (B, H, W) labels."""
        aux = self.config.aux_weight * segmentation_loss(self.auxiliary_head(maps[2]), labels)
        return {"decode": segmentation_loss(self.decode_head(maps), labels), "auxiliary": aux}


class UPerHead(nn.Module):
    """Pooling at several scales on the last map, a feature pyramid, and a classifier on all its levels."""

    def __init__(self, in_channels: Sequence[int], config: UPerNetConfig) -> None:
        super().__init__()
        *lower, top = in_channels
        width = config.channels
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), Conv2dNormActivation(top, width, 1)) for scale in config.pool_scales)
        self.bottleneck = Conv2dNormActivation(top + len(config.pool_scales) * width, width, 3)
        self.lateral_convs = nn.ModuleList(Conv2dNormActivation(channels, width, 1) for channels in lower)
        self.fpn_convs = nn.ModuleList(Conv2dNormActivation(width, width, 3) for _ in lower)
        self.fpn_bottleneck = Conv2dNormActivation(len(in_channels) * width, width, 3)
        self.dropout = nn.Dropout2d(config.dropout)
        self.conv_seg = nn.Conv2d(width, config.num_classes, 1)
        _init(self)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Four maps -> logits (B, K, H / 4, W / 4)."""
        *lower, top = maps
        pooled = [_resize(pool(top), top.shape[-2:]) for pool in self.psp_modules]
        x = self.bottleneck(torch.cat([top, *pooled], dim=1))         # (B, C, H / 32, W / 32)
        levels = [x]
        for level in reversed(range(len(lower))):
            lateral = self.lateral_convs[level](lower[level])
            x = lateral + _resize(x, lateral.shape[-2:])
            levels.insert(0, self.fpn_convs[level](x))
        levels = [_resize(level, levels[0].shape[-2:]) for level in levels]
        return self.conv_seg(self.dropout(self.fpn_bottleneck(torch.cat(levels, dim=1))))


class FCNHead(nn.Module):
    """One convolution and a classifier."""

    def __init__(self, in_channels: int, config: UPerNetConfig) -> None:
        super().__init__()
        self.convs = nn.Sequential(Conv2dNormActivation(in_channels, config.aux_channels, 3))
        self.dropout = nn.Dropout2d(config.dropout)
        self.conv_seg = nn.Conv2d(config.aux_channels, config.num_classes, 1)
        _init(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_seg(self.dropout(self.convs(x)))


def segmentation_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits (B, K, h, w) resized to labels (B, H, W), summed, over the number of all pixels.

    Pixels without a label (255) add nothing, but are counted, as published.

    Raises
    ------
    ValueError
        For a label that is no class and not 255.
    """
    classes = logits.shape[1]
    if (wrong := (labels != UNLABELLED) & (labels >= classes)).any() or (labels < 0).any():
        raise ValueError(f"labels need to be classes 0 to {classes - 1}, or {UNLABELLED} for none, got "
                         f"{int(labels[wrong].max()) if wrong.any() else int(labels.min())}. "
                         "Is num_classes that of the dataset?")
    logits = _resize(logits, labels.shape[-2:])
    return F.cross_entropy(logits, labels, ignore_index=UNLABELLED, reduction="sum") / labels.numel()


def whole_inference(infer: Infer, images: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits (B, K, *size) of whole images: predicted at once, resized to `size`, that of the files."""
    return _resize(infer(images), size)


def slide_inference(infer: Infer, images: Tensor, crop: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """Logits of overlapping windows, averaged where they overlap.

    Parameters
    ----------
    infer : callable
        (B, 3, h, w) -> logits (B, K, h, w), like `UPerNet` in evaluation.
    images : Tensor of shape (B, 3, H, W)
    crop, stride : (int, int)
        Height and width of the windows and their distances, in pixels; a smaller image is its own window. The last window
        of a row or column moves back until it ends with the image.

    Returns
    -------
    Tensor of shape (B, K, H, W)
    """
    starts = [_starts(side, window, step) for side, window, step in zip(images.shape[-2:], crop, stride, strict=True)]
    logits, hits = None, images.new_zeros(images.shape[-2:])
    for y, x in product(*starts):
        place = (..., slice(y, y + crop[0]), slice(x, x + crop[1]))
        part = infer(images[place])
        if logits is None:
            logits = part.new_zeros(*part.shape[:2], *images.shape[-2:])
        logits[place] += part
        hits[place] += 1
    return logits / hits


def multi_scale_flip(
    infer: Infer, image: Tensor, normalise: Callable[[Tensor], Tensor], size: tuple[int, int],
    ratios: Sequence[float] = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75), flip: bool = True,
    scale: tuple[int, int] | None = (2048, 512), divisor: int = 1,
) -> Tensor:
    """Mean probabilities of one image seen at several sizes, and mirrored.

    Parameters
    ----------
    infer : callable
        Whole or slide inference: (1, 3, h, w) -> logits (1, K, h, w).
    image : uint8 Tensor of shape (3, H, W)
        As it lies in the file.
    normalise : callable
        (3, h, w) on the scale 0 to 255 -> what the network takes.
    size : (int, int)
        Of the result, in pixels; that of the labels.
    ratios : sequence of float
        Of the sizes; the defaults are the papers'.
    scale : (int, int), optional
        At ratio 1 the image fits in these long and short sides; None leaves it as large as it is.
    divisor : int
        Sides are rounded up to multiples of it.

    Returns
    -------
    Tensor of shape (K, *size)
    """
    height, width = image.shape[-2:]
    base = min(max(scale) / max(height, width), min(scale) / min(height, width)) if scale else 1.0
    total = 0
    for ratio in ratios:
        sides = [int(side * base * ratio + 0.5) for side in (height, width)]
        sides = [-(-side // divisor) * divisor for side in sides]
        view = normalise(_resize(image[None].float(), sides)[0].round())[None]
        for mirrored in (False, True)[: 1 + flip]:
            logits = infer(view.flip(-1)).flip(-1) if mirrored else infer(view)
            total = total + _resize(logits, size).softmax(1)[0]
    return total / (len(ratios) * (1 + flip))


def _starts(side: int, window: int, step: int) -> list[int]:
    count = max(side - window + step - 1, 0) // step + 1
    return [max(min(index * step, side - window), 0) for index in range(count)]


def _resize(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def _init(head: nn.Module) -> None:
    for layer in head.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    nn.init.normal_(head.conv_seg.weight, std=0.01)
    nn.init.zeros_(head.conv_seg.bias)
