"""Cascade Mask R-CNN and Faster R-CNN: pyramid, FPN, region proposals, heads.

One image's journey: (B, 3, H, W) -> pyramid, four maps -> FPN, five maps of strides 4 to 64 -> RPN, boxes that may hold an
object -> box heads, one after another, and mask heads -> losses, or detections in pixels of the file.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from swconv.downstream.boxes import Sampler, random_sample
from swconv.downstream.detection_config import DetectorConfig
from swconv.downstream.pyramid import Pyramid
from swconv.downstream.roi import RoIHeads
from swconv.downstream.rpn import RPN


class Detector(nn.Module):
    """`Detector(Pyramid("sw_tiny"), CASCADE)`, `Detector(Pyramid("slak_tiny"), FASTER)`.

    Parameters
    ----------
    pyramid : Pyramid
    config : DetectorConfig
        A row of `detection_config`, or `dataclasses.replace` of one.

    Notes
    -----
    Where MMDetection computes otherwise than torchvision, this is MMDetection's, which the papers used: anchors, assignment
    and sampling, RoIAlign with half a pixel less, losses over all samples. FPN, the RPN's layers, RoIAlign and NMS are
    torchvision's.
    """

    def __init__(self, pyramid: Pyramid, config: DetectorConfig) -> None:
        super().__init__()
        self.pyramid, self.config = pyramid, config
        self.neck = FeaturePyramidNetwork(list(pyramid.channels), config.channels, extra_blocks=LastLevelMaxPool())
        self.rpn = RPN(config)
        self.roi = RoIHeads(config)

    def forward(self, images: Tensor, targets: Sequence[dict], sample: Sampler = random_sample
                ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """
        Parameters
        ----------
        images : Tensor of shape (B, 3, H, W)
            Padded at the right and at the bottom.
        targets : list of dict
            `size`, height and width of the image without padding. Training reads also `boxes` (n, 4), `labels`, int64 (n,),
            from 0, and for masks `masks`, (n, H, W); n may be 0. Evaluation reads `original_size`, (H, W) of the file.
        sample : callable
            `boxes.random_sample`, or that with a generator.

        Returns
        -------
        dict of str to Tensor
            While training: the losses, to be added.
        list of dict
            In evaluation, per image: `boxes` (n, 4), in pixels of the file, `scores` and `labels` (n,), best first, and for
            masks bool `masks` (n, H, W) of the file's size.

        Raises
        ------
        ValueError
            For a class out of range, or targets that do not fit the images.
        """
        if len(images) != len(targets):
            raise ValueError(f"a detector needs one target per image, got {len(targets)} for {len(images)} images.")
        return self.from_maps(self.pyramid(images), targets, sample)

    def from_maps(self, maps: Sequence[Tensor], targets: Sequence[dict], sample: Sampler
                   ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """`forward` behind the pyramid: from four maps, strides 4 to 32."""
        if self.training:
            self._check(targets)
        levels = self.features(maps)
        limits = maps[0].new_tensor([[width, height] * 2 for height, width in (target["size"] for target in targets)],
                                    dtype=torch.promote_types(maps[0].dtype, torch.float32))
        logits, deltas, places = self.rpn(levels)
        proposals, _ = self.rpn.propose(logits, deltas, places, limits)
        if not self.training:
            return self.roi.detect(levels[:4], proposals, limits, [target["original_size"] for target in targets])
        boxes = [target["boxes"].to(limits) for target in targets]
        return (self.rpn.losses(logits, deltas, places, boxes, limits, sample)
                | self.roi.losses(levels[:4], proposals, targets, limits, sample))

    def features(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Four maps -> five (B, C, h, w), strides 4 to 64."""
        return list(self.neck({str(level): x for level, x in enumerate(maps)}).values())

    def _check(self, targets: Sequence[dict]) -> None:
        for target in targets:
            labels, boxes = target["labels"], target["boxes"]
            if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.config.num_classes:
                raise ValueError(f"labels need to be classes 0 to {self.config.num_classes - 1}, got {int(labels.min())} to "
                                 f"{int(labels.max())} in image {target.get('image_id')}. Is num_classes that of the dataset?")
            if self.config.masks and len(target.get("masks", ())) != len(boxes):
                raise ValueError(f"masks are needed for all {len(boxes)} boxes of image {target.get('image_id')}, got "
                                 f"{len(target.get('masks', ()))}.")
