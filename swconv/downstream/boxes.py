"""Boxes: how they are coded, compared, proposed on a grid, and paired with the objects of an image.

A box is x1, y1, x2, y2 in pixels, x2 - x1 wide. Priors are anchors or regions of interest. n, m, A numbers of boxes.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou

RATIOS = (0.5, 1.0, 2.0)                                              # height / width of the anchors of a place, in this order
STRETCH = math.log(1000 / 16)                                         # the most that a side is decoded longer or shorter
NEGATIVE, UNUSED = -1, -2
Sampler = Callable[[Tensor, Tensor, int, float], tuple[Tensor, Tensor]]


def encode(priors: Tensor, boxes: Tensor, std: Sequence[float]) -> Tensor:
    """Boxes as seen from priors: shift of the centre in sides of the prior, log of the sides' ratio; both (..., 4)."""
    (centre, side), (goal, length) = _centre_side(priors), _centre_side(boxes)
    return torch.cat([(goal - centre) / side, (length / side).log()], dim=-1) / priors.new_tensor(std)


def decode(priors: Tensor, deltas: Tensor, std: Sequence[float], limits: Tensor | None = None) -> Tensor:
    """What `encode` made of priors and boxes, back to boxes.

    Parameters
    ----------
    priors, deltas : Tensor of shape (..., 4)
        Broadcast against one another.
    std : sequence of 4 float
    limits : Tensor of shape (..., 4), optional
        Width, height, width, height of the image: boxes are clipped to it.
    """
    centre, side = _centre_side(priors)
    shift, stretch = (deltas * deltas.new_tensor(std)).split(2, dim=-1)
    centre, half = centre + shift * side, side * stretch.clamp(-STRETCH, STRETCH).exp() / 2
    boxes = torch.cat([centre - half, centre + half], dim=-1)
    return boxes if limits is None else boxes.clamp(min=0).minimum(limits)


def giou(boxes: Tensor, others: Tensor) -> Tensor:
    """Generalised IoU of pairs, (n, 4), (n, 4) -> (n,); union and enclosing area are at least 1e-6."""
    overlap = _area(torch.maximum(boxes[:, :2], others[:, :2]), torch.minimum(boxes[:, 2:], others[:, 2:]))
    hull = _area(torch.minimum(boxes[:, :2], others[:, :2]), torch.maximum(boxes[:, 2:], others[:, 2:])).clamp(min=1e-6)
    sizes = [(each[:, 2:] - each[:, :2]).prod(-1) for each in (boxes, others)]
    union = (sizes[0] + sizes[1] - overlap).clamp(min=1e-6)
    return overlap / union - (hull - union) / hull


def anchors(maps: Sequence[Tensor], strides: Sequence[int], scale: float) -> list[Tensor]:
    """Boxes around every place of every map: (h * w * 3, 4) per map, in the order row, column, ratio.

    Parameters
    ----------
    maps : sequence of Tensor of shape (B, C, h, w)
    strides : sequence of int
        In pixels; a place (x, y) lies at (x * stride, y * stride).
    scale : float
        Square root of an anchor's area, in strides.
    """
    found = []
    for x, stride in zip(maps, strides, strict=True):
        height = x.new_tensor(RATIOS, dtype=torch.float32).sqrt()     # for a width of 1 / height
        half = torch.stack([1 / height, height], dim=-1) * (scale * stride / 2)                # (3, 2)
        rows, columns = (torch.arange(side, device=x.device) * stride for side in x.shape[-2:])
        places = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)[:, :, None]  # (h, w, 1, 2)
        boxes = torch.cat([places - half, places + half], dim=-1).view(-1, 4)
        found.append(boxes.to(torch.promote_types(x.dtype, boxes.dtype)))                       # maps may be half precision
    return found


def assign(priors: Tensor, boxes: Tensor, positive: float, negative: float, every_box: float | None = None) -> Tensor:
    """Which of an image's objects each prior has to find.

    Parameters
    ----------
    priors : Tensor of shape (n, 4)
    boxes : Tensor of shape (m, 4)
    positive, negative : float
        From this IoU on a prior finds the object that it overlaps most; below that one it finds none.
    every_box : float, optional
        Then every object is also found by all priors that overlap it most, if that is at least so much; where two objects
        want a prior, the later one gets it.

    Returns
    -------
    int64 Tensor of shape (n,)
        Index of the object, NEGATIVE for none, UNUSED between the thresholds.
    """
    if not len(boxes):
        return torch.full((len(priors),), NEGATIVE, device=priors.device)
    overlaps = box_iou(boxes, priors).nan_to_num(0.0)                 # (m, n); two boxes without area overlap by 0 / 0
    best, found = overlaps.max(dim=0)
    found = torch.where(best >= positive, found, torch.where(best < negative, NEGATIVE, UNUSED))
    if every_box is not None and len(priors):
        most = overlaps.max(dim=1, keepdim=True).values
        wanted = (overlaps == most) & (most >= every_box)
        last = (wanted * torch.arange(1, len(boxes) + 1, device=priors.device)[:, None]).amax(dim=0) - 1
        found = torch.where(last >= 0, last, found)
    return found


def random_sample(positive: Tensor, negative: Tensor, number: int, share: float, generator: torch.Generator | None = None
                  ) -> tuple[Tensor, Tensor]:
    """Of the priors' indices at most `number`, positive ones at most that share of it; each in ascending order.

    Parameters
    ----------
    positive, negative : int64 Tensor of shape (n,)
    generator : torch.Generator, optional
        On the CPU; torch's own by default.
    """
    positive = _draw(positive, int(number * share), generator)
    return positive, _draw(negative, number - len(positive), generator)


def _draw(indices: Tensor, number: int, generator: torch.Generator | None) -> Tensor:
    if len(indices) <= number:
        return indices
    return indices[torch.randperm(len(indices), generator=generator)[:number].sort().values.to(indices.device)]


def _centre_side(boxes: Tensor) -> tuple[Tensor, Tensor]:
    start, end = boxes.split(2, dim=-1)
    return (start + end) / 2, end - start


def _area(start: Tensor, end: Tensor) -> Tensor:
    return (end - start).clamp(min=0).prod(-1)
