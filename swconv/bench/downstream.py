"""One training step of Cascade Mask R-CNN beside torchvision's Mask R-CNN, and the seconds that COCO's evaluation takes."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from swconv import atomic
from swconv.bench.circumstances import circumstances, device_name
from swconv.bench.timing import Contender, Pace, Progress, compare
from swconv.downstream.detection import Detector
from swconv.downstream.detection_config import CASCADE
from swconv.downstream.evaluators import coco_ap
from swconv.downstream.pyramid import Pyramid

CLASSES = 80
CANVAS = (480, 640)                                                   # px, height and width of the images that are evaluated
AIM = 30.0                                                            # s, for the evaluation

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes
    ----------
    model, arguments : str, mapping
        timm's name of the backbone of both detectors, and what differs from its defaults.
    batch : int
        Images of a step.
    size : (int, int)
        Height and width in px.
    objects : int
        Per image.
    channels, fc_channels : int
        Of both detectors' FPN and heads.
    rois : int
        Sampled per image for every box head.
    rounds : int
        Steps of each, in turn.
    images, found : int
        That are evaluated, and detections in each.
    """

    model: str
    arguments: Mapping[str, Any]
    batch: int
    size: tuple[int, int]
    objects: int
    channels: int
    fc_channels: int
    rois: int
    rounds: int
    images: int
    found: int


CPU = Plan("sw_tiny", {}, 2, (320, 480), 8, 256, 1024, 128, 3, 5000, 100)
CUDA = replace(CPU, size=(800, 1280), rois=512, rounds=20)
_LITTLE = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16), "kernel_sizes": (7, 7, 7, 7)}
QUICK = Plan("sw_tiny", _LITTLE, 2, (64, 96), 2, 16, 32, 16, 1, 20, 10)


def run(out: Path, device: str = "cpu", quick: bool = False) -> tuple[Path, Path]:
    """Measure, and write downstream-<device>.json and .md into a folder, with -quick behind a quick run's name.

    Raises
    ------
    RuntimeError
        When a GPU is asked for and torch sees none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("bench downstream --device cuda needs a GPU that torch sees, found none. Leave --device out to "
                           "measure the CPU.")
    found = measure(QUICK if quick else CUDA if device == "cuda" else CPU, torch.device(device)) | {"quick": quick}
    paths = tuple(out / f"downstream-{device_name(found)}.{kind}" for kind in ("json", "md"))
    atomic.write_json(paths[0], found)
    atomic.write_atomic(paths[1], render(found).encode())
    log.info("wrote %s and %s", *paths)
    return paths


def measure(plan: Plan, device: torch.device) -> dict[str, Any]:
    """All that the page tells: circumstances, `steps` in ms, `evaluation` in s; ImportError without faster-coco-eval."""
    import faster_coco_eval  # noqa: F401  before minutes of timing that nothing would keep

    start, bar = time.perf_counter(), Progress(2)
    told = circumstances("downstream", device, "swconv.bench.downstream", plan=asdict(plan))
    bar.step("training steps")
    contenders = [Contender({"detector": name}, {"step": step}) for name, step in training_steps(plan, device).items()]
    told["steps"] = compare(contenders, [torch.get_num_threads()], Pace(0, plan.rounds, 0, probes=1), device.type == "cuda")
    bar.step("evaluation")
    truth, results = synthetic(plan.images, plan.found)
    began = time.perf_counter()
    metrics = coco_ap(truth, results)
    told["evaluation"] = {"images": plan.images, "detections": len(results), "seconds": time.perf_counter() - began,
                          "metrics": metrics}
    bar.close()
    return told | {"seconds": time.perf_counter() - start}


def training_steps(plan: Plan, device: torch.device) -> dict[str, Any]:
    """Forward and backward of both detectors on the same images and objects, with equal numbers of proposals and samples."""
    torch.manual_seed(0)
    height, width = plan.size
    images = torch.randn(plan.batch, 3, height, width, device=device)
    targets = [_objects(plan.objects, plan.size, device) for _ in range(plan.batch)]
    cascade = Detector(Pyramid(plan.model, **plan.arguments), replace(
        CASCADE, channels=plan.channels, fc_channels=plan.fc_channels, roi_samples=plan.rois)).to(device).train()
    mask_rcnn = MaskRCNN(
        _Features(Pyramid(plan.model, **plan.arguments), plan.channels), CLASSES + 1, min_size=height, max_size=width,
        image_mean=[0.0] * 3, image_std=[1.0] * 3, box_batch_size_per_image=plan.rois, rpn_pre_nms_top_n_train=2000,
        rpn_anchor_generator=AnchorGenerator(((32,), (64,), (128,), (256,), (512,)), ((0.5, 1.0, 2.0),) * 5),
        rpn_post_nms_top_n_train=2000).to(device).train()

    def step(model: nn.Module, *inputs: Any) -> None:
        model.zero_grad(set_to_none=True)
        sum(model(*inputs).values()).backward()

    theirs = [{key: target[key] + (key == "labels") for key in ("boxes", "labels")} | {"masks": target["masks"].byte()}
              for target in targets]                                  # torchvision's class 0 is the background
    return {"Cascade Mask R-CNN, ours": lambda: step(cascade, images, targets),
            "Mask R-CNN, torchvision": lambda: step(mask_rcnn, list(images), theirs)}


class _Features(nn.Module):
    """A pyramid with an FPN, as torchvision's detectors take it."""

    def __init__(self, pyramid: Pyramid, channels: int) -> None:
        super().__init__()
        self.pyramid, self.out_channels = pyramid, channels
        self.neck = FeaturePyramidNetwork(list(pyramid.channels), channels, extra_blocks=LastLevelMaxPool())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.neck({str(level): x for level, x in enumerate(self.pyramid(x))})


def _objects(count: int, size: tuple[int, int], device: torch.device) -> dict[str, Any]:
    """Rectangles with their masks, somewhere in an image."""
    height, width = size
    corner = torch.rand(count, 2) * torch.tensor([width, height]) * 0.6
    boxes = torch.cat([corner, corner + (0.1 + 0.3 * torch.rand(count, 2)) * torch.tensor([width, height])], dim=1)
    masks = torch.zeros(count, height, width, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = True
    return {"size": size, "boxes": boxes.to(device), "labels": torch.randint(CLASSES, (count,)).to(device),
            "masks": masks.to(device)}


def synthetic(images: int, found: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ground truth in COCO's format, ellipses, and as many detections per image, of boxes and masks, many of them right."""
    from faster_coco_eval.core import mask

    random, (height, width) = np.random.RandomState(0), CANVAS
    turn = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    circle = np.stack([np.cos(turn), np.sin(turn)], axis=-1)                                   # (24, 2)
    truth = {"images": [{"id": i, "height": height, "width": width} for i in range(images)],
             "categories": [{"id": i, "name": str(i)} for i in range(CLASSES)], "annotations": []}
    results: list[dict[str, Any]] = []
    for image in range(images):
        count = random.randint(1, 15)                                 # 7 on average, as in val2017
        middle, radius = random.uniform(60, 420, (count, 2)), random.uniform(8, 60, (count, 2))
        kinds = random.randint(CLASSES, size=count)
        for number in range(count):
            outline = middle[number] + radius[number] * circle
            truth["annotations"].append({
                "id": len(truth["annotations"]) + 1, "image_id": image, "category_id": int(kinds[number]), "iscrowd": 0,
                "area": float(np.pi * radius[number].prod()), "segmentation": [outline.flatten().tolist()],
                "bbox": [*(middle[number] - radius[number]).tolist(), *(2 * radius[number]).tolist()]})
        chosen = random.randint(count, size=found)
        seen, size = middle[chosen] + random.normal(0, 4, (found, 2)), radius[chosen] * random.uniform(0.8, 1.25, (found, 2))
        codes = mask.frPyObjects([(a + b * circle).flatten().tolist() for a, b in zip(seen, size, strict=True)], height, width)
        labels = np.where(random.rand(found) < 0.5, kinds[chosen], random.randint(CLASSES, size=found))
        for label, a, b, score, code in zip(labels.tolist(), seen, size, random.rand(found).tolist(), codes, strict=True):
            results.append({"image_id": image, "category_id": label, "score": score, "segmentation": code,
                            "bbox": [*(a - b).tolist(), *(2 * b).tolist()]})
    return truth, results


def render(record: Mapping[str, Any]) -> str:
    """The page of `measure`'s record."""
    plan, hardware, done = record["plan"], record["hardware"], record["evaluation"]
    trial = "**A trial on a tiny network, to see that it runs; its numbers say nothing.**\n\n" if record["quick"] else ""
    changed = ", with changes that are not committed" if record["git_dirty"] else ""
    last = record["steps"][-1]["median_ms"]
    steps = [[row["detector"], f"{row['median_ms']:.0f} ({row['q1_ms']:.0f}-{row['q3_ms']:.0f})",
              f"{row['median_ms'] / last:.2f}"] for row in record["steps"]]
    name = hardware["gpu"] if record["device"] == "cuda" else f"{hardware['cores']} cores of {hardware['cpu']}"
    height, width = plan["size"]
    return f"""# Detection on {name}

{trial}Made by `python -m swconv bench downstream` at {record['started']} in {record['seconds']:.0f} s; commit \
{record['git_commit'] or 'unknown'}{changed}. Load before: {record['load_before']}. Threads: {record['flags']['threads']}. \
Versions: {', '.join(f'{name} {version}' for name, version in record['versions'].items() if version is not None)}.

## A training step

Forward and backward of {plan['batch']} images of {height}x{width} px with {plan['objects']} objects each; backbone \
`{plan['model']}`, {plan['rois']} regions per image and box head, FPN of {plan['channels']} channels. The cascade has three \
box heads of four convolutions and three mask heads; torchvision's has one of each, its box head without convolutions. Medians \
and quartiles over {plan['rounds']} steps, in turn.

{_table(['detector', 'ms per step', 'of Mask R-CNN'], steps)}

## COCO's evaluation

Boxes and masks of {done['images']} synthetic images with {done['detections']} detections: {done['seconds']:.1f} s \
(wanted for 5000 images: at most {AIM:.0f} s). AP of boxes {done['metrics']['AP_box']:.1f} %, of masks \
{done['metrics']['AP_mask']:.1f} %.
"""


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
