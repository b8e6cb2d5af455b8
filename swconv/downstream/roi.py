"""From regions to detections: box heads and mask heads, one pair per stage, each refining what the one before it found.

R regions of all images together, K classes, C channels of the feature pyramid, S side of a pooled region.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation, batched_nms, roi_align

from swconv.downstream.boxes import NEGATIVE, Sampler, assign, decode, encode, giou
from swconv.downstream.detection_config import DetectorConfig, Stage

STRIDES = (4, 8, 16, 32)
FINEST = 56                                                           # px: regions up to twice this side are read at stride 4
BOX_SIDE, MASK_SIDE = 7, 14                                           # of pooled regions; masks come out twice as large
PASTED = 16                                                           # masks at a time


class BoxHead(nn.Module):
    """Convolutions, fully connected layers, a score per class and a box per class."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.convs = nn.Sequential(*(Conv2dNormActivation(config.channels, config.channels, 3) for _ in range(config.convs)))
        widths = [config.channels * BOX_SIDE**2, *[config.fc_channels] * config.fcs]
        self.fcs = nn.ModuleList(nn.Linear(wide, narrow) for wide, narrow in pairwise(widths))
        self.cls = nn.Linear(widths[-1], config.num_classes + 1)
        self.reg = nn.Linear(widths[-1], 4 * config.num_classes)
        for conv in self.convs.modules():
            if isinstance(conv, nn.Conv2d):
                nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        for fc in self.fcs:
            nn.init.xavier_uniform_(fc.weight)
        nn.init.normal_(self.cls.weight, std=0.01)
        nn.init.normal_(self.reg.weight, std=0.001)
        for fc in (*self.fcs, self.cls, self.reg):
            nn.init.zeros_(fc.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(R, C, 7, 7) -> logits (R, K + 1), the last one of the background, and deltas (R, K, 4)."""
        x = self.convs(x).flatten(1)
        for fc in self.fcs:
            x = fc(x).relu()
        return self.cls(x), self.reg(x).view(len(x), -1, 4)


class MaskHead(nn.Module):
    """Four convolutions, a transposed one that doubles the side, and a mask per class."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        width = config.channels
        self.convs = nn.Sequential(*(Conv2dNormActivation(width, width, 3, norm_layer=None) for _ in range(4)))
        self.upsample = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.logits = nn.Conv2d(width, config.num_classes, 1)
        for conv in self.modules():
            if isinstance(conv, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(R, C, 14, 14) -> logits (R, K, 28, 28)."""
        return self.logits(self.upsample(self.convs(x)).relu())


@dataclass(frozen=True)
class Regions:
    """What one stage is trained on in one image: first the regions of objects, then the others, each by index.

    Attributes
    ----------
    boxes : Tensor of shape (n, 4)
    labels : int64 Tensor of shape (n,)
        Class, K for background.
    objects : int64 Tensor of shape (p,)
        Which object the first p regions have to find.
    given : bool Tensor of shape (n,)
        The region is the object's own box, added to the proposals.
    """

    boxes: Tensor
    labels: Tensor
    objects: Tensor
    given: Tensor


class RoIHeads(nn.Module):
    """All stages.

    Parameters
    ----------
    config : DetectorConfig
    """

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.config = config
        self.boxes = nn.ModuleList(BoxHead(config) for _ in config.stages)
        self.masks = nn.ModuleList(MaskHead(config) for _ in config.stages if config.masks)

    def losses(self, maps: Sequence[Tensor], proposals: Sequence[Tensor], targets: Sequence[dict], limits: Tensor,
               sample: Sampler) -> dict[str, Tensor]:
        """Train every stage on what the one before it found.

        Parameters
        ----------
        maps : sequence of Tensor of shape (B, C, h, w)
            Strides 4 to 32.
        proposals : sequence of Tensor of shape (n, 4)
            Per image.
        targets : sequence of dict
            `boxes` (m, 4), `labels` (m,) and, for masks, `masks` (m, H, W) of the padded size.
        limits : Tensor of shape (B, 4)
            Width, height, width, height of the images without padding.

        Returns
        -------
        dict of str to Tensor
            `stage0_class`, `stage0_box`, `stage0_mask`, ...
        """
        losses = {}
        for number, stage in enumerate(self.config.stages):
            regions = [self.select(stage, boxes, target, sample) for boxes, target in zip(proposals, targets, strict=True)]
            rois = _joined([each.boxes for each in regions])
            logits, deltas = self.boxes[number](pool(maps, rois, BOX_SIDE))
            labels = torch.cat([each.labels for each in regions])
            classes = F.cross_entropy(logits, labels, reduction="sum") / max(len(labels), 1)
            losses[f"stage{number}_class"] = stage.weight * classes
            losses[f"stage{number}_box"] = stage.weight * self._box_loss(stage, rois[:, 1:], deltas, labels, regions, targets)
            if self.config.masks:
                losses[f"stage{number}_mask"] = stage.weight * self._mask_loss(number, maps, regions, targets)
            refined = self._refine(stage, rois, deltas, torch.where(labels < self.config.num_classes, labels, _best(logits)),
                                   limits)
            proposals = [boxes[~each.given] for boxes, each in zip(_apart(refined, regions), regions, strict=True)]
        return losses

    @torch.no_grad()
    def select(self, stage: Stage, proposals: Tensor, target: dict, sample: Sampler) -> Regions:
        """The regions of one image that a stage is trained on: objects' own boxes and proposals, sampled."""
        objects = target["boxes"].to(proposals)
        boxes = torch.cat([objects, proposals])
        found = assign(boxes, objects, stage.iou, stage.iou)
        found[: len(objects)] = torch.arange(len(objects), device=found.device)                 # each is its own
        positive, negative = sample((found >= 0).nonzero()[:, 0], (found == NEGATIVE).nonzero()[:, 0],
                                    self.config.roi_samples, 0.25)
        picked, own = torch.cat([positive, negative]), found[positive]
        labels = torch.full_like(picked, self.config.num_classes)
        labels[: len(own)] = target["labels"].to(labels)[own]
        return Regions(boxes[picked], labels, own, picked < len(objects))

    def _box_loss(self, stage: Stage, rois: Tensor, deltas: Tensor, labels: Tensor, regions: Sequence[Regions],
                  targets: Sequence[dict]) -> Tensor:
        """Over the positive regions, divided by the number of all."""
        positive = labels < self.config.num_classes
        goals = torch.cat([target["boxes"].to(rois)[each.objects] for each, target in zip(regions, targets, strict=True)])
        rois, deltas = rois[positive], deltas[positive, labels[positive]]
        if self.config.giou is None:
            loss = (deltas - encode(rois, goals, stage.std)).abs().sum()
        else:
            loss = self.config.giou * (1 - giou(decode(rois, deltas, stage.std), goals)).sum()
        return loss / max(len(labels), 1)

    def _mask_loss(self, number: int, maps: Sequence[Tensor], regions: Sequence[Regions], targets: Sequence[dict]) -> Tensor:
        """Of the positive regions: the mask of the object's class against the object's bitmap in the region."""
        rois = _joined([each.boxes[: len(each.objects)] for each in regions])
        labels = torch.cat([each.labels[: len(each.objects)] for each in regions])
        logits = self.masks[number](pool(maps, rois, MASK_SIDE))
        logits = logits[torch.arange(len(labels), device=labels.device), labels]                # (P, 28, 28)
        goals = torch.cat([mask_targets(target["masks"], each) for each, target in zip(regions, targets, strict=True)])
        loss = F.binary_cross_entropy_with_logits(logits, goals.to(logits), reduction="sum")
        return loss / max(logits.numel(), 1)

    @torch.no_grad()
    def _refine(self, stage: Stage, rois: Tensor, deltas: Tensor, labels: Tensor, limits: Tensor) -> Tensor:
        """(R, 4): every region moved to where the box of its class is."""
        own = deltas[torch.arange(len(labels), device=labels.device), labels]
        return decode(rois[:, 1:], own, stage.std, limits[rois[:, 0].long()])

    def detect(self, maps: Sequence[Tensor], proposals: Sequence[Tensor], limits: Tensor,
               originals: Sequence[tuple[int, int]]) -> list[dict[str, Tensor]]:
        """What is in the images.

        Parameters
        ----------
        maps, proposals, limits
            As in `losses`.
        originals : sequence of (int, int)
            Height and width of the files.

        Returns
        -------
        list of dict
            `boxes` (n, 4) in pixels of the file, `scores` and `labels` (n,), best first, and bool `masks` (n, H, W).
        """
        rois, total = _joined(proposals), 0
        for number, stage in enumerate(self.config.stages):
            logits, deltas = self.boxes[number](pool(maps, rois, BOX_SIDE))
            total = total + logits
            if number + 1 < len(self.config.stages):
                rois = torch.cat([rois[:, :1], self._refine(stage, rois, deltas, _best(logits), limits)], dim=1)
        scores = (total / len(self.config.stages)).softmax(1)[:, :-1]                          # mean of logits
        boxes = decode(rois[:, None, 1:], deltas, stage.std, limits[rois[:, 0].long(), None])  # (R, K, 4)
        scales = limits / limits.new_tensor([[width, height] * 2 for height, width in originals])
        found = [self._keep(boxes[rois[:, 0] == image], scores[rois[:, 0] == image]) for image in range(len(scales))]
        chances = self._mask_chances(maps, found) if self.config.masks else [None] * len(found)
        for each, chance, scale, size in zip(found, chances, scales, originals, strict=True):
            each["boxes"] = each["boxes"] / scale
            if chance is not None:
                each["masks"] = paste(chance, each["boxes"], size)
        return found

    def _keep(self, boxes: Tensor, scores: Tensor) -> dict[str, Tensor]:
        region, label = (scores > self.config.min_score).nonzero(as_tuple=True)
        boxes, scores = boxes[region, label], scores[region, label]
        kept = batched_nms(boxes, scores, label, self.config.nms_iou)[: self.config.detections]
        return {"boxes": boxes[kept], "scores": scores[kept], "labels": label[kept]}

    def _mask_chances(self, maps: Sequence[Tensor], found: Sequence[dict[str, Tensor]]) -> Sequence[Tensor]:
        """Per image (n, 28, 28): the mean of the stages' probabilities for the label of each box."""
        rois, labels = _joined([each["boxes"] for each in found]), torch.cat([each["labels"] for each in found])
        pooled, index = pool(maps, rois, MASK_SIDE), torch.arange(len(labels), device=labels.device)
        chances = sum(head(pooled)[index, labels].sigmoid() for head in self.masks) / len(self.masks)
        return chances.split([len(each["boxes"]) for each in found])


def pool(maps: Sequence[Tensor], rois: Tensor, side: int) -> Tensor:
    """RoIAlign from the level whose stride fits the region, (R, 5) -> (R, C, side, side); rois are image, x1, y1, x2, y2."""
    scale = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).sqrt()
    level = (scale / FINEST + 1e-6).log2().floor().clamp(0, len(STRIDES) - 1).long()
    places = [(level == number).nonzero()[:, 0] for number in range(len(STRIDES))]
    parts = [roi_align(x.to(rois.dtype), rois[place], side, 1 / stride, sampling_ratio=0, aligned=True)
             for x, stride, place in zip(maps, STRIDES, places, strict=True)]
    return torch.cat(parts)[torch.cat(places).argsort()]


@torch.no_grad()
def mask_targets(masks: Tensor, regions: Regions) -> Tensor:
    """Bitmaps (m, H, W) of objects in the regions that have to find them: bool (p, 28, 28)."""
    boxes = regions.boxes[: len(regions.objects)]
    rois = torch.cat([regions.objects[:, None].to(boxes), boxes], dim=1)
    return roi_align(masks[:, None].to(boxes), rois, 2 * MASK_SIDE, 1.0, sampling_ratio=0, aligned=True)[:, 0] >= 0.5


def paste(chances: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks in their boxes, in an image of that height and width.

    Parameters
    ----------
    chances : Tensor of shape (n, 28, 28)
        Probabilities, read between by bilinear interpolation; outside they are 0.
    boxes : Tensor of shape (n, 4)
        In pixels of the image, whose centres are at + 0.5.
    size : (int, int)

    Returns
    -------
    bool Tensor of shape (n, H, W)
        At least 0.5.
    """
    pasted = torch.zeros(len(boxes), *size, dtype=torch.bool, device=boxes.device)
    if not len(boxes):
        return pasted
    for some in torch.arange(len(boxes), device=boxes.device).split(PASTED):
        x1, y1, x2, y2 = boxes[some].unbind(1)
        # No pixel outside all boxes reaches 0.5: beyond its box a mask fades from at most a half.
        left, top = int(x1.min().floor().clamp(0, size[1])), int(y1.min().floor().clamp(0, size[0]))
        right, bottom = int(x2.max().ceil().clamp(left, size[1])), int(y2.max().ceil().clamp(top, size[0]))
        column = torch.arange(left, right, device=boxes.device).to(boxes) + 0.5
        row = torch.arange(top, bottom, device=boxes.device).to(boxes) + 0.5
        width, height = (x2 - x1).clamp(min=1e-2), (y2 - y1).clamp(min=1e-2)                    # a box may be a line
        across = (column - x1[:, None]) / width[:, None] * 2 - 1                                # (n, w)
        down = (row - y1[:, None]) / height[:, None] * 2 - 1                                    # (n, h)
        grid = torch.stack([across[:, None].expand(-1, len(row), -1), down[..., None].expand(-1, -1, len(column))], dim=-1)
        values = F.grid_sample(chances[some, None].to(grid), grid, align_corners=False)[:, 0]
        pasted[some, top:bottom, left:right] = values >= 0.5
    return pasted


def _joined(boxes: Sequence[Tensor]) -> Tensor:
    """Boxes per image as regions (R, 5) that begin with their image."""
    return torch.cat([torch.cat([each.new_full((len(each), 1), image), each], dim=1) for image, each in enumerate(boxes)])


def _apart(boxes: Tensor, regions: Sequence[Regions]) -> Sequence[Tensor]:
    return boxes.split([len(each.boxes) for each in regions])


def _best(logits: Tensor) -> Tensor:
    """The foreground class with the largest logit."""
    return logits[:, :-1].argmax(1)
