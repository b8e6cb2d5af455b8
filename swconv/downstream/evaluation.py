"""What a finished fine-tune finds: the benchmark's measures, its submission files, and pictures (SW Figure 7)."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from swconv.atomic import write_json
from swconv.downstream import nuscenes, sources
from swconv.downstream.batches import InOrder, Loader
from swconv.downstream.benchmarks import Benchmark, benchmark, moved
from swconv.downstream.datasets import Images, Target
from swconv.downstream.evaluators import MeanIoU, coco_ap, coco_results, voc_ap, write_ade, write_coco, write_voc
from swconv.downstream.fcos3d import project
from swconv.downstream.finetuning import build_pyramid
from swconv.downstream.pictures import draw
from swconv.downstream.upernet import multi_scale_flip, slide_inference, whole_inference
from swconv.training.data import MEMORY_FORMATS
from swconv.training.finished import diverged_at, first_line, published_sha256
from swconv.training.loop import prepare_machine
from swconv.training.record import values

Metrics = dict[str, tuple[float, str]]                                # name -> value, unit
NEAR = 0.1                                                            # m: corners of a box behind the camera are drawn there


def evaluate(config: Mapping[str, Any], data_dir: Path, weights: Path, out: Path, record: dict[str, Any]) -> None:
    """Measure finished weights on the validation images; publish metrics.json, run.json and detections/.

    Of a run that diverged metrics.json only says so, and at which step.

    Parameters
    ----------
    config : mapping
        Resolved row of params/downstream.yaml.
    data_dir : Path
        Of `sources.prepare`.
    weights : Path
        As `finetuning.fine_tune` published them.

    Raises
    ------
    FileNotFoundError, ValueError
        When weights or data are not there, damaged, or another run's.
    """
    began, digest, folder = time.monotonic(), published_sha256(weights), out / "detections"
    folder.mkdir(parents=True, exist_ok=True)
    if (step := diverged_at(weights)) is not None:
        metrics = {"diverged": (step, "step")}
    else:
        judge, images = _judge(config, data_dir, weights)
        metrics = judge.assess(folder) | {"images": (images, "images")}
    write_json(out / "run.json", record | {"weights_sha256": digest, "seconds": round(time.monotonic() - began, 1)})
    write_json(out / "metrics.json", values(**{name: each for name, each in metrics.items() if math.isfinite(each[0])}))


def draw_pictures(config: Mapping[str, Any], data_dir: Path, weights: Path, out: Path) -> None:
    """Draw what finished weights find in some validation images, as <image>.png below `out`; none of a run that diverged."""
    published_sha256(weights)
    out.mkdir(parents=True, exist_ok=True)
    if diverged_at(weights) is None:
        _judge(config, data_dir, weights)[0].pictures(config["pictures"], out)


def load_finished(config: Mapping[str, Any], used: Benchmark, weights: Path) -> nn.Module:
    """The network of a row with its finished weights, ready to be evaluated.

    Raises
    ------
    ValueError
        When they are another network's.
    """
    model = used.network(build_pyramid(config))
    try:
        model.load_state_dict(load_file(weights))
    except RuntimeError as error:
        raise ValueError(f"{weights} needs to hold the weights of this row's network, got '{first_line(error)}'. Take the row "
                         "of params/downstream.yaml that they were trained with.") from error
    return model.eval()


class Judge(ABC):
    """What a network finds in the validation images, and how good that is.

    Parameters
    ----------
    used : Benchmark
    model : nn.Module
        In evaluation, on `device`.
    """

    def __init__(self, used: Benchmark, model: nn.Module, device: torch.device) -> None:
        self.used, self.model, self.device = used, model, device
        self.images: Images = used.images(training=False)

    @abstractmethod
    def assess(self, folder: Path) -> Metrics:
        """The benchmark's measures; detections in its submission format below `folder`."""

    def find(self, image: Tensor, target: Target) -> Any:
        """What is found in a batch of one, (1, 3, h, w) on the device; comes back to the CPU."""
        found = self.model(image, [moved(target, self.device)])[0]
        return {name: tensor.cpu() for name, tensor in found.items()}

    def shown(self, found: Any, target: Target) -> dict | Tensor:
        """What `pictures.draw` takes of it; `target` is that of the image file."""
        return found

    def findings(self) -> Iterator[tuple[Any, Target]]:
        """Image after image: what is found, and the target."""
        loader = Loader(self.images, InOrder(len(self.images)), self.used.collate(training=False),
                        self.used.config["data"]["workers"], self.device.type == "cuda")
        for image, (target,) in loader:
            with torch.inference_mode():                              # not around the yield: what reads would leave the mode
                found = self.find(image.to(self.device), target)
            yield found, target

    @torch.inference_mode()
    def pictures(self, count: int, folder: Path) -> None:
        """Draw what is found in `count` images, spread evenly over them."""
        for index in np.linspace(0, len(self.images) - 1, min(count, len(self.images))).round().astype(int).tolist():
            image, (target,) = self.used.collate(training=False)([self.images[0, index]])
            file, annotation = self.images.read(index)
            found = self.shown(self.find(image.to(self.device), target), annotation)
            draw(file, found, self.images.class_names).save(folder / f"{target['image_id']}.png")


class SegmentationJudge(Judge):
    """ADE20K: `mIoU`, `mAcc`, `aAcc`, and `mIoU_multi_scale` where the test has scales, in %."""

    def assess(self, folder: Path) -> Metrics:
        scales = self.used.config["test"]["scales"]
        single, several = (MeanIoU(len(self.images.class_names)) for _ in range(2))
        for index, (found, target) in enumerate(self.findings()):
            single.update(found, target["segmentation"])
            write_ade(target["image_id"], found, folder)
            if scales:
                several.update(self._at_scales(index), target["segmentation"])
        metrics = {name: (single.compute()[name], "%") for name in ("mIoU", "mAcc", "aAcc")}
        return metrics | ({"mIoU_multi_scale": (several.compute()["mIoU"], "%")} if scales else {})

    def find(self, image: Tensor, target: Target) -> Tensor:
        """Classes, int64 (H, W) of the file."""
        test = self.used.config["test"]
        slide = partial(slide_inference, self.model, crop=(test["window"],) * 2, stride=(test["stride"],) * 2)
        infer = slide if test["mode"] == "slide" else self.model
        return whole_inference(infer, image, target["original_size"])[0].argmax(0).cpu()

    @torch.inference_mode()
    def _at_scales(self, index: int) -> Tensor:
        test, collate = self.used.config["test"], self.used.collate(training=False)
        image = self.images.read(index)[0].to(self.device)
        mean, std = (255 * torch.tensor(each, device=self.device).view(3, 1, 1) for each in (collate.mean, collate.std))
        return multi_scale_flip(self.model, image, lambda x: (x - mean) / std, tuple(image.shape[1:]),
                                scale=tuple(test["scale"]), **test["scales"]).argmax(0).cpu()


class CocoJudge(Judge):
    """COCO 2017: `AP_box`, `AP50_box`, `AP75_box`, `AP_mask`, `AP50_mask`, `AP75_mask`, in %."""

    def assess(self, folder: Path) -> Metrics:
        results = []
        for found, target in self.findings():
            results += coco_results(target["image_id"], found, self.images.category_ids)
        write_coco(results, folder / "results")
        return {name: (value, "%") for name, value in coco_ap(self.images.annotation_file, results).items()}


class VocJudge(Judge):
    """PASCAL VOC 2007: `mAP` over 11 points, in %."""

    def assess(self, folder: Path) -> Metrics:
        found = [each for each, _ in self.findings()]
        targets = [self.images.target(index) for index in range(len(self.images))]
        write_voc([target["image_id"] for target in targets], found, self.images.class_names, folder)
        return {"mAP": (voc_ap(targets, found, len(self.images.class_names))["mAP"], "%")}


class NuScenesJudge(Judge):
    """nuScenes: `mAP`, `NDS` and `AP_<class>` in %; `mATE` (m), `mASE`, `mAOE` (rad), `mAVE` (m/s), `mAAE`."""

    def assess(self, folder: Path) -> Metrics:
        found = [nuscenes.in_world(each, target) for each, target in self.findings()]
        path = folder / "results_nusc.json"
        nuscenes.write_submission(nuscenes.submission(found, self.images.moments), path)
        units = {"mATE": "m", "mASE": "", "mAOE": "rad", "mAVE": "m/s", "mAAE": ""}
        return {name: (value, units.get(name, "%")) for name, value in nuscenes.evaluate(self.images, path).items()}

    def shown(self, found: dict[str, Tensor], target: Target) -> dict[str, Tensor]:
        """Rectangles around the projected boxes, cut at the border."""
        corners = project(corners_of(found["boxes3d"]).flatten(0, 1), target["camera"]).view(-1, 8, 2)
        sides, (height, width) = torch.cat([corners.amin(1), corners.amax(1)], dim=1).clamp(min=0), target["size"]
        sides = sides.minimum(torch.tensor([width - 1, height - 1] * 2))
        seen = (sides[:, 2:] > sides[:, :2]).all(1)
        return {"boxes": sides[seen], **{key: found[key][seen] for key in ("labels", "scores")}}


JUDGES = {"ade20k": SegmentationJudge, "coco": CocoJudge, "voc": VocJudge, "nuscenes": NuScenesJudge}


def corners_of(boxes3d: Tensor) -> Tensor:
    """Corners (n, 8, 3) of boxes (n, 9) in the camera's frame, in m, none nearer than `NEAR`."""
    signs = torch.tensor([[x, y, z] for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (-0.5, 0.5)])
    x, y, z = (signs * boxes3d[:, None, 3:6]).unbind(-1)              # along length, height, width
    cos, sin = boxes3d[:, 6:7].cos(), boxes3d[:, 6:7].sin()
    turned = torch.stack([x * cos + z * sin, y, z * cos - x * sin], dim=-1) + boxes3d[:, None, :3]
    return torch.cat([turned[..., :2], turned[..., 2:].clamp(min=NEAR)], dim=-1)


def _judge(config: Mapping[str, Any], data_dir: Path, weights: Path) -> tuple[Judge, int]:
    device = prepare_machine(config["machine"])
    sources.verify(data_dir, config["task"])
    used = benchmark(config, sources.root_of(data_dir, config["task"]))
    model = load_finished(config, used, weights).to(device, memory_format=MEMORY_FORMATS[config["machine"]["memory_format"]])
    judge = JUDGES[config["task"]](used, model, device)
    return judge, len(judge.images)
