"""FCOS3D (Wang et al. 2021, arXiv 2104.10956): a fully convolutional detector of 3-D boxes in single images.

One image's journey: (B, 3, H, W) -> pyramid, four maps -> FPN from the second one on, five maps of strides 8 to 128 -> one head
for all five, which says at every point: class, attribute, offset to the projected centre, depth, extents, yaw, velocity.

B images, P points (level by level, row by row), n boxes, K classes, A attributes. A 3-D box is (x, y, z, l, h, w, yaw, vx, vz):
centre in m in the camera's frame (x to the right, y down, z ahead), extents in m along the box's own x, y, z, yaw in rad about
y (0 looks along x, pi / 2 against z), velocity in m/s. Layers have mmdet3d's names: a checkpoint's `bbox_head.` loads strictly.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import DeformConv2d, FeaturePyramidNetwork, sigmoid_focal_loss
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

GROUPS = (2, 1, 3, 1, 2)  # offset, depth, extents, yaw, velocity
GROUP_NAMES = ("offset", "depth", "size", "yaw", "velocity")
CODE_WEIGHTS = (1.0, 1.0, 0.2, 1.0, 1.0, 1.0, 1.0, 0.05, 0.05)
BETA = 1 / 9  # of the smooth L1 losses
RADIUS = 1.5  # strides: points nearer to a projected centre may be positive
SHARPNESS = 2.5  # of the centerness
DIAGONAL = 1.414  # sic
BORDER = 0.7854  # rad: where the two directions meet
PRIOR = 0.01  # probability of a class or attribute at the start
FOREVER = 1e8
CHUNK = 64  # boxes that suppression takes at once


@dataclass(frozen=True)
class FCOS3DConfig:
    """Widths, levels, and what inference keeps. The defaults are the published setting.

    Attributes
    ----------
    num_classes, num_attributes : int
    fpn_channels, channels, centerness_channels : int
        Of the FPN, of the head's towers and branches, of the centerness branch.
    groups : int
        Of the GroupNorms; it divides both widths of the head.
    deformable : bool
        The last convolution of both towers is a modulated deformable one.
    strides : tuple of int
        In px, one per level.
    reach : tuple of float
        In px: a level takes a box if the largest distance from the point to its four sides lies between the previous level's
        value (-1 for the first) and its own.
    candidates : int
        Points per level that are decoded, the best ones.
    score_threshold, nms_iou : float
        Scores must exceed the first; a box whose rotated IoU with a better one of its class exceeds the second is dropped.
    max_boxes : int
        Per image.
    """

    num_classes: int = 10
    num_attributes: int = 9
    fpn_channels: int = 256
    channels: int = 256
    centerness_channels: int = 64
    groups: int = 32
    deformable: bool = True
    strides: tuple[int, ...] = (8, 16, 32, 64, 128)
    reach: tuple[float, ...] = (48, 96, 192, 384, FOREVER)
    candidates: int = 1000
    score_threshold: float = 0.05
    nms_iou: float = 0.8
    max_boxes: int = 200

    def __post_init__(self) -> None:
        if len(self.strides) != len(self.reach):
            raise ValueError(f"FCOS3D needs one reach per stride, got {len(self.reach)} for {len(self.strides)} strides.")
        if self.channels % self.groups or self.centerness_channels % self.groups:
            raise ValueError(f"FCOS3D needs channels and centerness_channels that groups = {self.groups} divides, got "
                             f"{self.channels} and {self.centerness_channels}; lower groups.")


class Points(NamedTuple):
    """Where the head looks: of shape (P, 2) in px (x, y); stride, lower and upper reach of shape (P,); points per level."""

    places: Tensor
    stride: Tensor
    low: Tensor
    high: Tensor
    counts: tuple[int, ...]


class Predictions(NamedTuple):
    """What the head says: logits (B, P, K), (B, P, A), (B, P, 2) and (B, P); boxes (B, P, 9) as `GROUPS` has them.

    The offset from the projected centre to the point is in strides while training, in px in evaluation.
    """

    classes: Tensor
    attributes: Tensor
    direction: Tensor
    centerness: Tensor
    boxes: Tensor


class Assigned(NamedTuple):
    """What the head should say at each point: class (P,), K for background; attribute (P,), A for background; boxes (P, 9), the
    yaw relative to the ray; centerness (P,)."""

    labels: Tensor
    attributes: Tensor
    boxes: Tensor
    centerness: Tensor


class FCOS3D(nn.Module):
    """Pyramid, FPN and head.

    Parameters
    ----------
    pyramid : nn.Module
        `swconv.downstream.pyramid.Pyramid`: (B, 3, H, W) -> four maps of strides 4, 8, 16, 32, of which the first is not used,
        and their `channels`.
    config : FCOS3DConfig
    """

    def __init__(self, pyramid: nn.Module, config: FCOS3DConfig) -> None:
        super().__init__()
        self.pyramid, self.config = pyramid, config
        width = config.fpn_channels
        self.neck = FeaturePyramidNetwork(list(pyramid.channels[1:]), width, extra_blocks=LastLevelP6P7(width, width))
        self.head = FCOS3DHead(config)

    def forward(self, images: Tensor, targets: list[dict]) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """
        Parameters
        ----------
        images : Tensor of shape (B, 3, H, W)
        targets : list of dict
            `camera`, (3, 3), the intrinsics for the image's pixels as they are now; training reads also `boxes` (n, 4), in px,
            `labels` and `attributes`, int64 (n,), and `boxes3d` (n, 9). n may be 0.

        Returns
        -------
        dict of str to Tensor
            While training: the losses, to be added.
        list of dict
            In evaluation, per image: `boxes3d` (m, 9), `scores`, `labels`, `attributes` (m,), class by class, best first.
        """
        maps = list(self.pyramid(images))[1:]                                 # strides 8, 16, 32
        features = list(self.neck({str(level): x for level, x in enumerate(maps)}).values())
        predictions, points = self.head(features), self.head.points(features)
        if self.training:
            return losses(predictions, points, targets, self.config)
        cameras = torch.stack([target["camera"] for target in targets]).to(predictions.boxes)
        return decode(predictions, points, cameras, self.config)


class FCOS3DHead(nn.Module):
    """Two towers of two convolutions, then one more convolution for each output but the velocity."""

    def __init__(self, config: FCOS3DConfig) -> None:
        super().__init__()
        width, groups = config.channels, config.groups
        self.config = config

        def tower() -> nn.Sequential:
            return nn.Sequential(ConvNorm(config.fpn_channels, width, groups),
                                 ConvNorm(width, width, groups, config.deformable))

        def branch(out: int = width) -> nn.Sequential:
            return nn.Sequential(ConvNorm(width, out, groups))

        self.cls_convs, self.reg_convs = tower(), tower()
        self.conv_cls_prev, self.conv_cls = branch(), nn.Conv2d(width, config.num_classes, 1)
        self.conv_attr_prev, self.conv_attr = branch(), nn.Conv2d(width, config.num_attributes, 1)
        self.conv_reg_prevs = nn.ModuleList(branch() if name != "velocity" else nn.Identity() for name in GROUP_NAMES)
        self.conv_regs = nn.ModuleList(nn.Conv2d(width, size, 1) for size in GROUPS)
        self.conv_dir_cls_prev, self.conv_dir_cls = branch(), nn.Conv2d(width, 2, 1)
        self.conv_centerness_prev = branch(config.centerness_channels)
        self.conv_centerness = nn.Conv2d(config.centerness_channels, 1, 1)
        self.scales = nn.ModuleList(nn.ModuleList(Scale() for _ in range(3)) for _ in config.strides)
        still = [module.conv_offset for module in self.modules() if isinstance(module, Deformable)]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.0 if any(module is each for each in still) else 0.01)
                nn.init.zeros_(module.bias)
        for last in (self.conv_cls, self.conv_attr):
            nn.init.constant_(last.bias, -math.log((1 - PRIOR) / PRIOR))

    def forward(self, features: Sequence[Tensor]) -> Predictions:
        """From the five maps of the FPN, each (B, C, H, W) of its stride."""
        levels = zip(features, self.config.strides, self.scales, strict=True)
        parts = zip(*(self._level(*level) for level in levels), strict=True)
        return Predictions(*(torch.cat(part, 1) for part in parts))

    def _level(self, x: Tensor, stride: int, scales: nn.ModuleList) -> Predictions:
        seen, measured = self.cls_convs(x), self.reg_convs(x)
        groups = [last(before(measured)) for before, last in zip(self.conv_reg_prevs, self.conv_regs, strict=True)]
        offset, depth, size, yaw, velocity = (_rows(group) for group in groups)
        scale_offset, scale_depth, scale_size = scales
        offset = scale_offset(offset) * (1 if self.training else stride)
        boxes = [offset, scale_depth(depth).exp(), scale_size(size).exp(), yaw, velocity]
        return Predictions(
            classes=_rows(self.conv_cls(self.conv_cls_prev(seen))),
            attributes=_rows(self.conv_attr(self.conv_attr_prev(seen))),
            direction=_rows(self.conv_dir_cls(self.conv_dir_cls_prev(measured))),
            centerness=_rows(self.conv_centerness(self.conv_centerness_prev(measured)))[..., 0],
            boxes=torch.cat(boxes, -1),
        )

    def points(self, features: Sequence[Tensor]) -> Points:
        """The points of the maps, for maps of any size."""
        places, stride, low, high, counts = [], [], [], [], []
        reach = (-1.0, *self.config.reach)
        for x, step, least, most in zip(features, self.config.strides, reach[:-1], reach[1:], strict=True):
            height, width = x.shape[-2:]
            row, column = (step * torch.arange(size, device=x.device) + step // 2 for size in (height, width))
            grid = torch.stack(torch.meshgrid(row, column, indexing="ij")[::-1], -1).flatten(0, 1)      # (H * W, 2): x, y
            counts.append(len(grid))
            places.append(grid)
            for values, value in ((stride, step), (low, least), (high, most)):
                values.append(torch.full((len(grid),), float(value), device=x.device))
        dtype = torch.promote_types(features[0].dtype, torch.float32)
        return Points(*(torch.cat(part).to(dtype) for part in (places, stride, low, high)), tuple(counts))


class ConvNorm(nn.Module):
    """3 x 3 convolution, GroupNorm, ReLU."""

    def __init__(self, inputs: int, outputs: int, groups: int, deformable: bool = False) -> None:
        super().__init__()
        self.conv = Deformable(inputs, outputs) if deformable else nn.Conv2d(inputs, outputs, 3, padding=1)
        self.gn = nn.GroupNorm(groups, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.gn(self.conv(x)))


class Deformable(DeformConv2d):
    """DCNv2: a 3 x 3 convolution whose taps move and fade as another convolution of the same map says."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1)
        self.conv_offset = nn.Conv2d(inputs, 27, 3, padding=1)               # y, x of nine taps, then nine weights
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        move, fade = self.conv_offset(x).split((18, 9), 1)
        kind = x.device.type if torch.amp.is_autocast_available(x.device.type) else "cpu"       # meta
        with torch.autocast(kind, enabled=False):                     # deform_conv2d knows no autocast on a CPU
            return super().forward(*(part.to(self.weight.dtype) for part in (x, move, fade.sigmoid())))


class Scale(nn.Module):
    """A learned factor."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def project(boxes3d: Tensor, camera: Tensor) -> Tensor:
    """Centres in the image: (n, 2) in px, of boxes (n, 9) seen through intrinsics (3, 3)."""
    seen = boxes3d[:, :3] @ camera.T
    return seen[:, :2] / seen[:, 2:]


def assign(points: Points, target: dict, config: FCOS3DConfig) -> Assigned:
    """What every point of one image has to predict.

    A point is a box's candidate if it lies within 1.5 strides of the projected 3-D centre (along x and y) and the box's size
    fits its level. Of several boxes the one with the nearest centre wins.

    Parameters
    ----------
    target : dict
        As in `FCOS3D.forward`.
    """
    boxes, boxes3d, places = target["boxes"], target["boxes3d"], points.places
    if not len(boxes):
        nothing = places.new_zeros(len(places))
        return Assigned(torch.full_like(nothing, config.num_classes, dtype=torch.int64),
                        torch.full_like(nothing, config.num_attributes, dtype=torch.int64),
                        nothing[:, None].repeat(1, 9), nothing)
    boxes, boxes3d, camera = (tensor.to(places) for tensor in (boxes, boxes3d, target["camera"]))
    delta = places[:, None] - project(boxes3d, camera)                       # (P, n, 2)
    reach = torch.cat([places[:, None] - boxes[:, :2], boxes[:, 2:] - places[:, None]], -1).amax(-1)
    candidate = (delta.abs().amax(-1) < RADIUS * points.stride[:, None]) & (points.low[:, None] <= reach) \
        & (reach <= points.high[:, None])
    distance, best = delta.norm(dim=-1).masked_fill(~candidate, torch.inf).min(1)
    positive = distance.isfinite()
    delta = delta[torch.arange(len(places), device=places.device), best] / points.stride[:, None]
    wanted = boxes3d[best]                                                    # (P, 9)
    ray = torch.atan2(wanted[:, 0], wanted[:, 2])
    return Assigned(
        labels=target["labels"].to(best.device)[best].where(positive, config.num_classes),
        attributes=target["attributes"].to(best.device)[best].where(positive, config.num_attributes),
        boxes=torch.cat([delta, wanted[:, 2:6], (wanted[:, 6] - ray)[:, None], wanted[:, 7:]], 1),
        centerness=torch.exp(-SHARPNESS * delta.norm(dim=1) / (DIAGONAL * RADIUS)),
    )


def losses(predictions: Predictions, points: Points, targets: list[dict], config: FCOS3DConfig) -> dict[str, Tensor]:
    """The nine losses of a batch, weighted, as scalars: `cls`, the five of `GROUP_NAMES`, `direction`, `attr`, `centerness`.

    Without a positive point all but `cls` are 0.

    Raises
    ------
    ValueError
        A label or attribute outside the configured range.
    """
    for target in targets:
        _check_labels(target, config)
    assigned = Assigned(*(torch.stack(part) for part in zip(*(assign(points, t, config) for t in targets), strict=True)))
    classes, attributes, direction, centerness, boxes = (
        part.to(torch.promote_types(part.dtype, torch.float32)) for part in predictions)
    positive = assigned.labels < config.num_classes                          # (B, P)
    count = max(1, int(positive.sum()))
    one_hot = F.one_hot(assigned.labels, config.num_classes + 1)[..., :-1].to(classes)
    found = {"cls": sigmoid_focal_loss(classes, one_hot, reduction="sum") / (positive.sum() + len(targets))}
    said, wanted, weight = boxes[positive], assigned.boxes[positive], assigned.centerness[positive]
    direction_wanted = ((wanted[:, 6] - BORDER) % (2 * math.pi) / math.pi).long().clamp(0, 1)
    turned, goal = said[:, 6], wanted[:, 6]                                   # the loss sees the sine of their difference
    said = torch.cat([said[:, :6], (turned.sin() * goal.cos())[:, None], said[:, 7:]], 1)
    wanted = torch.cat([wanted[:, :6], (turned.cos() * goal.sin())[:, None], wanted[:, 7:]], 1)
    error = F.smooth_l1_loss(said, wanted, beta=BETA, reduction="none") * said.new_tensor(CODE_WEIGHTS) / count
    found |= {name: part.sum() for name, part in zip(GROUP_NAMES, error.split(GROUPS, 1), strict=True)}
    found["direction"] = F.cross_entropy(direction[positive], direction_wanted, reduction="sum") / count
    attribute = F.cross_entropy(attributes[positive], assigned.attributes[positive], reduction="none")
    found["attr"] = (attribute * weight).sum() / weight.sum().clamp_min(torch.finfo(weight.dtype).tiny)
    found["centerness"] = F.binary_cross_entropy_with_logits(centerness[positive], weight, reduction="sum") / count
    return found


@torch.no_grad()
def decode(predictions: Predictions, points: Points, cameras: Tensor, config: FCOS3DConfig) -> list[dict[str, Tensor]]:
    """Boxes from what the head says in evaluation.

    Parameters
    ----------
    cameras : Tensor of shape (B, 3, 3)
        Intrinsics.

    Returns
    -------
    list of dict
        As in `FCOS3D.forward`.
    """
    return [_decode_one(Predictions(*parts), points, camera, config)
            for *parts, camera in zip(*predictions, cameras, strict=True)]


def candidates(predictions: Predictions, points: Points, camera: Tensor, config: FCOS3DConfig) -> tuple[Tensor, Tensor, Tensor]:
    """The best points of every level of one image before suppression: boxes (m, 9), scores (m, K), attributes (m,)."""
    scores = predictions.classes.sigmoid() * predictions.centerness.sigmoid()[:, None]
    chosen, start = [], 0
    for count in points.counts:
        best = scores[start : start + count].amax(1)
        order = best.topk(config.candidates).indices if count > config.candidates else torch.arange(count, device=best.device)
        chosen.append(start + order)
        start += count
    chosen = torch.cat(chosen)
    boxes, place = predictions.boxes[chosen], points.places[chosen]
    centre, depth = place - boxes[:, :2], boxes[:, 2:3]
    located = torch.cat([centre * depth, depth], 1) @ torch.linalg.inv(camera).T
    direction = predictions.direction[chosen].argmax(1)
    yaw = (boxes[:, 6] - BORDER) % math.pi + BORDER + math.pi * direction
    yaw = yaw + torch.atan2(centre[:, 0] - camera[0, 2], camera[0, 0].expand(len(centre)))
    boxes3d = torch.cat([located, boxes[:, 3:6], yaw[:, None], boxes[:, 7:]], 1)
    return boxes3d, scores[chosen], predictions.attributes[chosen].argmax(1)


def birds_eye(boxes3d: Tensor) -> Tensor:
    """Seen from above, (n, 5): x, z, extents along the box's own x and z, angle from x towards z."""
    return torch.stack([boxes3d[:, 0], boxes3d[:, 2], boxes3d[:, 3], boxes3d[:, 5], -boxes3d[:, 6]], 1)


def rotated_nms(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """Greedy suppression of rotated rectangles within each class.

    Parameters
    ----------
    boxes : Tensor of shape (n, 5)
        Centre x, y; extents; angle in rad, counter-clockwise.
    scores, labels : Tensor of shape (n,)
    threshold : float
        IoU that a box may have with a better one.

    Returns
    -------
    int64 Tensor
        Indices of what stays, best first.
    """
    order = scores.argsort(descending=True, stable=True)
    rects, groups = boxes[order].double().cpu(), labels[order].cpu()
    alive, kept = torch.ones(len(rects), dtype=torch.bool), []
    for start in range(0, len(rects), CHUNK):
        rows = start + alive[start : start + CHUNK].nonzero()[:, 0]
        columns = start + alive[start:].nonzero()[:, 0]                       # begins with the rows
        beaten = _beaten(rects, groups, rows, columns, threshold)             # (rows, columns)
        stays = torch.ones(len(rows), dtype=torch.bool)
        for row in range(len(rows)):
            if stays[row]:
                stays &= ~beaten[row, : len(rows)]
        kept.append(rows[stays])
        alive[columns] = ~beaten[stays].any(0)
    return order[torch.cat(kept).to(order.device)] if kept else order


def rotated_iou(a: Tensor, b: Tensor) -> Tensor:
    """Exact intersection over union, pair by pair, of rectangles (n, 5) and (n, 5) as in `rotated_nms`."""
    common = _intersection(a, b)
    return common / (a[:, 2] * a[:, 3] + b[:, 2] * b[:, 3] - common)


def _intersection(a: Tensor, b: Tensor) -> Tensor:
    """Area that two rectangles share, (n,).

    In b's frame b is |x| <= p, |y| <= q, and the field (clamp(x, -p, p) where |y| <= q, else 0, 0) has divergence 1 in b and 0
    elsewhere. The area is its flux through a's border: four edges, on which the field is linear between at most four places.
    """
    half, turn = b[:, None, 2:4] / 2, a[:, 4] - b[:, 4]
    corner = a.new_tensor([[1, 1], [-1, 1], [-1, -1], [1, -1]]) * a[:, None, 2:4] / 2     # (n, 4, 2), counter-clockwise
    start = _turn(corner, turn) + _turn((a[:, :2] - b[:, :2])[:, None], -b[:, 4])
    way = start.roll(-1, 1) - start
    safe = way.where(way != 0, 1)
    cuts = torch.stack([(-half - start) / safe, (half - start) / safe], -1).sort(-1).values   # (n, 4, xy, 2): shares of the way
    first, last = cuts[:, :, 1].clamp(0, 1).unbind(-1)                        # where y is inside b
    bends = cuts[:, :, 0].clamp(first[..., None], last[..., None])
    at = torch.cat([first[..., None], bends, last[..., None]], -1)            # (n, 4, 4), ascending
    x = (start[..., :1] + at * way[..., :1]).clamp(-half[..., :1], half[..., :1])
    return ((x[..., 1:] + x[..., :-1]) / 2 * at.diff(dim=-1) * way[..., 1:]).sum((1, 2))


def _turn(vectors: Tensor, angle: Tensor) -> Tensor:
    """(n, m, 2), turned counter-clockwise by (n,)."""
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    x, y = vectors.unbind(-1)
    return torch.stack([cos * x - sin * y, sin * x + cos * y], -1)


def _beaten(rects: Tensor, groups: Tensor, rows: Tensor, columns: Tensor, threshold: float) -> Tensor:
    """Which columns come after a row, share its class and overlap it by more than the threshold; (rows, columns)."""
    radius, area = rects[:, 2:4].norm(dim=1) / 2, rects[:, 2] * rects[:, 3]
    gap = (rects[rows, None, :2] - rects[columns, :2]).square().sum(-1)
    pair = (columns > rows[:, None]) & (groups[columns] == groups[rows, None]) \
        & (gap < (radius[columns] + radius[rows, None]).square()) \
        & (torch.minimum(area[columns], area[rows, None]) > threshold * torch.maximum(area[columns], area[rows, None]))
    row, column = pair.nonzero().unbind(1)
    pair[row, column] = rotated_iou(rects[rows[row]], rects[columns[column]]) > threshold
    return pair


def _decode_one(predictions: Predictions, points: Points, camera: Tensor, config: FCOS3DConfig) -> dict[str, Tensor]:
    boxes3d, scores, attributes = candidates(predictions, points, camera, config)
    which, labels = (scores > config.score_threshold).nonzero().unbind(1)
    scores = scores[which, labels]
    kept = rotated_nms(birds_eye(boxes3d)[which], scores, labels, config.nms_iou)
    kept = kept[: config.max_boxes] if len(kept) > config.max_boxes else kept[labels[kept].argsort(stable=True)]
    return {"boxes3d": boxes3d[which[kept]], "scores": scores[kept], "labels": labels[kept],
            "attributes": attributes[which[kept]]}


def _rows(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H * W, C)."""
    return x.flatten(2).transpose(1, 2)


def _check_labels(target: dict, config: FCOS3DConfig) -> None:
    for name, limit in (("labels", config.num_classes), ("attributes", config.num_attributes)):
        values = target[name]
        if len(values) and not 0 <= int(values.min()) <= int(values.max()) < limit:
            raise ValueError(f"FCOS3D needs {name} from 0 to {limit - 1}, got {int(values.min())} to {int(values.max())}; "
                             "correct the dataset, or the configured number.")
