"""The recipes' augmentations: geometry that moves image and target together, and four callables that draw it.

A callable is `(image, target, generator) -> (image, target)` on the samples of `datasets`; every draw comes from the
generator. Sizes are arguments: the defaults are the papers' (SLaK A.4, SW 4.2; the configurations of mmseg and mmdet 2.x).
Images are resized bilinearly without antialiasing and stay uint8, masks and segmentations take the nearest pixel.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as V

from swconv.downstream.datasets import UNLABELLED, Sample, Target

SHORT_SIDES = tuple(range(480, 801, 32))
TRIES = 10  # crops that are drawn until none of the classes dominates


def fit(size: tuple[int, int], long: int, short: int) -> tuple[int, int]:
    """The largest (height, width) of the same aspect ratio within a long and a short side, rounded half up."""
    scale = min(long / max(size), short / min(size))
    return tuple(int(side * scale + 0.5) for side in size)


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 (3, H, W) to (3, *size)."""
    if tuple(image.shape[1:]) == tuple(size):
        return image
    return V.resize(image, list(size), InterpolationMode.BILINEAR, antialias=False)


def resize(image: Tensor, target: Target, size: tuple[int, int]) -> Sample:
    """Image and target to (height, width); boxes are scaled on each axis by itself and cut at the border."""
    height, width = image.shape[1:]
    new = dict(target, size=tuple(size))
    if "boxes" in target:
        scale = torch.tensor([size[1] / width, size[0] / height] * 2)
        new["boxes"] = _cut(target["boxes"] * scale, size)
    for key in ("masks", "segmentation"):
        if key in target:
            new[key] = _nearest(target[key], size)
    return resize_image(image, size), new


def flip(image: Tensor, target: Target) -> Sample:
    """Left and right exchanged: x becomes W - x."""
    new, width = dict(target), image.shape[2]
    if "boxes" in target:
        x1, y1, x2, y2 = target["boxes"].unbind(1)
        new["boxes"] = torch.stack([width - x2, y1, width - x1, y2], dim=1)
    new |= {key: target[key].flip(-1) for key in ("masks", "segmentation") if key in target}
    return image.flip(-1), new


def crop(image: Tensor, target: Target, top: int, left: int, height: int, width: int) -> Sample:
    """A window of the image; boxes are shifted and cut, objects of which no box is left are dropped."""
    rows, columns = slice(top, top + height), slice(left, left + width)
    image = image[:, rows, columns]
    new = dict(target, size=tuple(image.shape[1:]))
    new |= {key: target[key][..., rows, columns] for key in ("masks", "segmentation") if key in target}
    if "boxes" in target:
        new["boxes"] = _cut(target["boxes"] - torch.tensor([left, top, left, top]), new["size"])
        x1, y1, x2, y2 = new["boxes"].unbind(1)
        new = select(new, (x2 > x1) & (y2 > y1))
    return image, new


def select(target: Target, keep: Tensor) -> Target:
    """The objects that `keep`, bool (n,), names."""
    return target | {key: target[key][keep] for key in ("boxes", "labels", "ignored", "masks") if key in target}


def distort(image: Tensor, generator: torch.Generator) -> Tensor:
    """Photometric distortion: brightness +-32, contrast and saturation 0.5 to 1.5, hue -36 to 34 degrees.

    Each has probability 0.5. Contrast comes before or after saturation and hue, by another coin. Values are cut to
    0..255 and rounded down to uint8 after every step. Saturation and hue are HSV's, in float32 (mmseg rounds both to a byte).
    """
    if _coin(generator):
        image = _to_byte(image + _uniform(generator, -32, 32))
    contrast_last = _coin(generator)
    if not contrast_last and _coin(generator):
        image = _to_byte(image * _uniform(generator, 0.5, 1.5))
    if _coin(generator):
        image = saturate(image, _uniform(generator, 0.5, 1.5))
    if _coin(generator):
        image = V.adjust_hue(image, _integer(generator, -18, 17) / 180)
    if contrast_last and _coin(generator):
        image = _to_byte(image * _uniform(generator, 0.5, 1.5))
    return image


def saturate(image: Tensor, factor: float) -> Tensor:
    """Multiply HSV's saturation, at most to 1, with value and hue unchanged."""
    value = image.amax(0, keepdim=True).float()
    depth = value - image                                                              # 0 in the brightest channel
    most = value / depth.amax(0, keepdim=True).clamp(min=1e-6)                         # saturation becomes 1
    return _to_byte((value - depth * most.clamp(max=factor)).round())


@dataclass(frozen=True)
class SegmentationTrain:
    """ADE20K: resize by a random ratio, crop where no class dominates, flip, distort. `Collate(size=crop)` pads the rest.

    Parameters
    ----------
    scale : (int, int)
        Long and short side, px, at ratio 1.
    ratio : (float, float)
    crop : (int, int)
        Height and width, px.
    cat_max_ratio : float
        Share of the labelled pixels that one class may have in a crop; ten crops are tried, the eleventh is taken.
    flip : float
        Probability.
    distort : bool
        Photometric distortion.
    """

    scale: tuple[int, int] = (2048, 512)
    ratio: tuple[float, float] = (0.5, 2.0)
    crop: tuple[int, int] = (512, 512)
    cat_max_ratio: float = 0.75
    flip: float = 0.5
    distort: bool = True

    def __call__(self, image: Tensor, target: Target, generator: torch.Generator) -> Sample:
        ratio = _uniform(generator, *self.ratio)
        image, target = resize(image, target, fit(image.shape[1:], *(int(side * ratio) for side in self.scale)))
        for _ in range(TRIES + 1):
            cropped = crop(image, target, *_window(image, self.crop, generator))
            if self.cat_max_ratio >= 1 or self._is_mixed(cropped[1]["segmentation"]):
                break
        image, target = cropped
        if _coin(generator, self.flip):
            image, target = flip(image, target)
        return distort(image, generator) if self.distort else image, target

    def _is_mixed(self, segmentation: Tensor) -> bool:
        counts = torch.bincount(segmentation.flatten(), minlength=UNLABELLED + 1)[:UNLABELLED]
        return bool((counts > 0).sum() > 1 and counts.max() < self.cat_max_ratio * counts.sum())


@dataclass(frozen=True)
class SegmentationTest:
    """ADE20K: the image resized within a long and a short side, its annotation left as it is on disk.

    Parameters
    ----------
    scale : (int, int)
        Long and short side, px.
    divisor : int
        Sides are then stretched up to multiples of it: 32 for whole images in UniRepLKNet's configurations, else 1.
    """

    scale: tuple[int, int] = (2048, 512)
    divisor: int = 1

    def __call__(self, image: Tensor, target: Target, generator: torch.Generator) -> Sample:
        size = tuple(-(-side // self.divisor) * self.divisor for side in fit(image.shape[1:], *self.scale))
        return resize_image(image, size), target | {"size": size}


@dataclass(frozen=True)
class DetectionTrain:
    """COCO and VOC: ignored objects out, flip, then one of two: a random scale, or a scale, a crop and a random scale.

    Parameters
    ----------
    short_sides : tuple of int
        Of which one is drawn, px.
    long_side : int
        Most, px.
    crop_short_sides : tuple of int
        Before a crop, px. Empty: never crop (VOC).
    crop_range : (int, int)
        Least and most height and width of a crop, px, both drawn. A crop may hold no object.
    flip : float
        Probability.
    """

    short_sides: tuple[int, ...] = SHORT_SIDES
    long_side: int = 1333
    crop_short_sides: tuple[int, ...] = (400, 500, 600)
    crop_range: tuple[int, int] = (384, 600)
    flip: float = 0.5

    def __call__(self, image: Tensor, target: Target, generator: torch.Generator) -> Sample:
        target = select(target, ~target["ignored"])
        if _coin(generator, self.flip):
            image, target = flip(image, target)
        if self.crop_short_sides and _coin(generator):
            image, target = self._resize(image, target, self.crop_short_sides, generator)
            low, high = self.crop_range
            size = [_integer(generator, min(side, low), min(side, high)) for side in image.shape[1:]]
            image, target = crop(image, target, *_window(image, size, generator))
        return self._resize(image, target, self.short_sides, generator)

    def _resize(self, image: Tensor, target: Target, short_sides: tuple[int, ...], generator: torch.Generator) -> Sample:
        short = short_sides[_integer(generator, 0, len(short_sides) - 1)]
        return resize(image, target, fit(image.shape[1:], self.long_side, short))


@dataclass(frozen=True)
class DetectionTest:
    """COCO and VOC: image and target resized within a long and a short side, px."""

    long_side: int = 1333
    short_side: int = 800

    def __call__(self, image: Tensor, target: Target, generator: torch.Generator) -> Sample:
        return resize(image, target, fit(image.shape[1:], self.long_side, self.short_side))


def _cut(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    return torch.minimum(boxes.clamp(min=0), torch.tensor([size[1], size[0]] * 2))


def _nearest(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(..., H, W) of bytes or bits to (..., *size)."""
    if not maps.numel():
        return maps.new_zeros(*maps.shape[:-2], *size)
    resized = F.interpolate(maps.reshape(1, -1, *maps.shape[-2:]).byte(), tuple(size), mode="nearest")
    return resized.reshape(*maps.shape[:-2], *size).to(maps.dtype)


def _window(image: Tensor, size: tuple[int, int], generator: torch.Generator) -> tuple[int, int, int, int]:
    """top, left, height, width of a random window of at most `size`."""
    height, width = (min(side, most) for side, most in zip(image.shape[1:], size, strict=True))
    return (_integer(generator, 0, image.shape[1] - height), _integer(generator, 0, image.shape[2] - width), height, width)


def _to_byte(image: Tensor) -> Tensor:
    return image.clamp(0, 255).to(torch.uint8)


def _coin(generator: torch.Generator, probability: float = 0.5) -> bool:
    return torch.rand((), generator=generator).item() < probability


def _uniform(generator: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * torch.rand((), generator=generator).item()


def _integer(generator: torch.Generator, low: int, high: int) -> int:
    """From low to high, both included."""
    return int(torch.randint(low, high + 1, (), generator=generator))
