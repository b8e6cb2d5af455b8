"""Region proposals: which places of the feature pyramid look like an object.

B images, A anchors of all levels together.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import batched_nms

from swconv.downstream.boxes import NEGATIVE, RATIOS, UNUSED, Sampler, anchors, assign, decode, encode
from swconv.downstream.detection_config import DetectorConfig

STRIDES = (4, 8, 16, 32, 64)
SCALE = 8                                                             # an anchor's area is (8 * stride) ** 2
STD = (1.0, 1.0, 1.0, 1.0)


class RPN(nn.Module):
    """torchvision's head with MMDetection's anchors (not rounded), assignment, sampling and selection."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.config = config
        self.head = RPNHead(config.channels, len(RATIOS))

    def forward(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Per level: logits (B, a), deltas (B, a, 4), anchors (a, 4), in the order row, column, ratio."""
        logits, deltas = self.head(list(maps))
        logits = [x.permute(0, 2, 3, 1).flatten(1) for x in logits]
        deltas = [x.permute(0, 2, 3, 1).reshape(len(x), -1, 4) for x in deltas]
        return logits, deltas, anchors(maps, STRIDES[: len(maps)], SCALE)

    def losses(self, logits: Sequence[Tensor], deltas: Sequence[Tensor], places: Sequence[Tensor], boxes: Sequence[Tensor],
               limits: Tensor, sample: Sampler) -> dict[str, Tensor]:
        """`rpn_objectness` and `rpn_box`, both over the number of all samples of the batch.

        Parameters
        ----------
        logits, deltas, places
            Of `forward`.
        boxes : sequence of Tensor of shape (n, 4)
            Objects per image.
        limits : Tensor of shape (B, 4)
            Width, height, width, height per image, without padding.
        """
        logits, deltas, priors = torch.cat(list(logits), 1), torch.cat(list(deltas), 1), torch.cat(list(places))
        picked, positives, goals = [], [], []
        for image, objects in enumerate(boxes):
            found = self.targets(priors, objects, limits[image])
            positive, negative = sample((found >= 0).nonzero()[:, 0], (found == NEGATIVE).nonzero()[:, 0],
                                        self.config.rpn_samples, 0.5)
            picked += [logits[image, positive], logits[image, negative]]
            positives.append(deltas[image, positive])
            goals.append(encode(priors[positive], objects[found[positive]], STD))
        labels = torch.cat([torch.full_like(x, 1 - index % 2) for index, x in enumerate(picked)])
        # As published, an image without positive (or negative) samples counts as if it had one.
        number = sum(max(len(x), 1) for x in picked)
        objectness = F.binary_cross_entropy_with_logits(torch.cat(picked), labels, reduction="sum")
        box = F.smooth_l1_loss(torch.cat(positives), torch.cat(goals), reduction="sum", beta=self.config.rpn_beta)
        return {"rpn_objectness": objectness / number, "rpn_box": box / number}

    def targets(self, priors: Tensor, objects: Tensor, limits: Tensor) -> Tensor:
        """`boxes.assign` of the anchors that may be trained; the others are UNUSED."""
        found = priors.new_full((len(priors),), UNUSED, dtype=torch.int64)
        usable = torch.ones_like(found, dtype=torch.bool)
        if self.config.anchors_inside:
            usable = (priors[:, :2] >= 0).all(1) & (priors[:, 2:] < limits[2:]).all(1)
        found[usable] = assign(priors[usable], objects, 0.7, 0.3, every_box=0.3)
        return found

    @torch.no_grad()
    def propose(self, logits: Sequence[Tensor], deltas: Sequence[Tensor], places: Sequence[Tensor], limits: Tensor
                ) -> tuple[list[Tensor], list[Tensor]]:
        """The best places as boxes (n, 4) with scores (n,) per image, best first, clipped to the image."""
        per_level, number = self.config.train_proposals if self.training else self.config.test_proposals
        boxes, scores = [], []
        for image, limit in enumerate(limits):
            found, rated, levels = [], [], []
            for level, (logit, delta, priors) in enumerate(zip(logits, deltas, places, strict=True)):
                score, order = logit[image].sigmoid().sort(descending=True, stable=True)
                score, order = score[:per_level], order[:per_level]
                found.append(decode(priors[order], delta[image, order], STD, limit))
                rated.append(score)
                levels.append(torch.full_like(order, level))
            found, rated, levels = torch.cat(found), torch.cat(rated), torch.cat(levels)
            real = (found[:, 2:] > found[:, :2]).all(1)
            found, rated, levels = found[real], rated[real], levels[real]
            kept = batched_nms(found, rated, levels, 0.7)[:number]
            boxes.append(found[kept])
            scores.append(rated[kept])
        return boxes, scores
