"""On a GPU a fine-tune begins with the CPU's losses, trains in float32 and bfloat16, and finds what the CPU finds.

Needs torch, torchvision, timm, numpy, safetensors, scipy, yaml and tqdm alone: images are drawn. Only
`test_tiny_sets_are_trained_on_and_assessed` needs what its benchmark is read and evaluated with.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from swconv.downstream import benchmarks, sources
from swconv.downstream.benchmarks import moved
from swconv.downstream.datasets import ADE_CLASSES, UNLABELLED, VOC_CLASSES, Images
from swconv.downstream.evaluation import JUDGES, draw_pictures, evaluate, load_finished
from swconv.downstream.finetuning import FineTuning, fine_tune
from swconv.downstream.nuscenes import CLASSES
from swconv.training import record

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GPU = "cuda"
TASKS = ("ade20k", "coco", "voc", "nuscenes")
NEEDS = {"ade20k": (), "coco": ("faster_coco_eval",), "voc": (), "nuscenes": ("nuscenes", "shapely", "pyquaternion", "cv2")}
NAMES = {"ade20k": ADE_CLASSES, "coco": VOC_CLASSES * 4, "voc": VOC_CLASSES, "nuscenes": CLASSES}
MEASURES = {"ade20k": "mIoU", "coco": "AP_box", "voc": "mAP", "nuscenes": "NDS"}
NETWORK = {"name": "sw_tiny", "args": {"depths": [1, 1, 1, 1], "dims": [24, 32, 48, 64], "kernel_sizes": [7, 7, 7, 7]}}
FILES = ("downstream.yaml", "profiles/mini.yaml")
HEIGHT, WIDTH = 120, 160                                              # px


class Drawn(Images):
    """Twelve images with bright rectangles, and all that a task reads of them."""

    def __init__(self, task, transform, seed):
        super().__init__(transform, seed)
        self.task, self.class_names, self.wide = task, NAMES[task], np.ones(len(self), bool)
        self.category_ids = tuple(range(1, 1 + len(self.class_names)))

    def __len__(self):
        return 12

    def read(self, index):
        random = torch.Generator().manual_seed(index)
        image = torch.randint(0, 90, (3, HEIGHT, WIDTH), generator=random).byte()
        count = 1 + index % 3
        corner, side = 60 * torch.rand(count, 2, generator=random), 24 + 30 * torch.rand(count, 2, generator=random)
        boxes, labels = torch.cat([corner, corner + side], 1).round(), torch.arange(count) + index % 4
        masks = torch.zeros(count, HEIGHT, WIDTH, dtype=torch.bool)
        for mask, (x1, y1, x2, y2), label in zip(masks, boxes.int().tolist(), labels.tolist(), strict=True):
            mask[y1:y2, x1:x2] = True
            image[label % 3][mask] = 250
        target = {"image_id": index, "original_size": (HEIGHT, WIDTH), "size": (HEIGHT, WIDTH)}
        if self.task == "ade20k":
            segmentation = torch.full((HEIGHT, WIDTH), 7, dtype=torch.uint8)
            segmentation[:, :8] = UNLABELLED
            for mask, label in zip(masks, labels.tolist(), strict=True):
                segmentation[mask] = label
            return image, target | {"segmentation": segmentation}
        target |= {"boxes": boxes, "labels": labels}
        if self.task == "nuscenes":
            camera = torch.tensor([[WIDTH, 0, WIDTH / 2], [0, WIDTH, HEIGHT / 2], [0, 0, 1]])
            depth = 8 + 20 * torch.rand(count, 1, generator=random)
            centre = torch.cat([boxes[:, :2] + boxes[:, 2:], torch.full((count, 1), 2.0)], 1) / 2
            boxes3d = torch.cat([depth * centre @ torch.linalg.inv(camera).T, 1 + torch.rand(count, 6, generator=random)], 1)
            return image, target | {"attributes": labels % 9, "boxes3d": boxes3d, "camera": camera}
        target["ignored"] = torch.arange(count) == 2
        return image, target | ({"masks": masks} if self.task == "coco" else {})


def merged(below, above):
    """Mappings laid over mappings, as params/ does it."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return below | {key: merged(below.get(key), value) for key, value in above.items()}


@pytest.fixture
def row():
    """A task as profile mini has it, in three iterations, without draws that depend on the device."""

    def resolved(task, device, amp=None):
        content, profile = (yaml.safe_load(Path("params", name).read_text()) for name in FILES)
        setting = merged(content["tasks"][task], content["profiles"]["mini"]["tasks"][task])
        setting["recipe"] |= {"epochs": None, "iterations": 3, "warmup_iterations": 0, "decay": "poly", "milestones": []}
        setting["head"] |= {"ade20k": {"dropout": 0.0}, "nuscenes": {"score_threshold": 0.0}}.get(task, {"min_score": 0.0})
        if task == "voc":
            setting["data"] |= {"train_years": [2007]}
        return setting | {"task": task, "network": NETWORK, "grown": 0, "pictures": 1,
                          "machine": profile["machine"] | {"device": device, "amp": amp}}

    return resolved


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Folder of the data rule of a task whose images are `Drawn`."""

    def prepared(task):
        monkeypatch.setitem(benchmarks.DATASETS, task, lambda *_, transform, seed: Drawn(task, transform, seed))
        (tmp_path / "data.json").write_text(json.dumps({"task": task, "root": ".", "manifest_sha256": ""}))
        (tmp_path / "manifest.csv").write_text("path,size,sha256\n")
        return tmp_path

    return prepared


@pytest.fixture
def told():
    return record.circumstances(key="k", run="row", profile="mini", seed=0, code="c", config={}, data_sha256="d")


@pytest.mark.parametrize("task", TASKS)
def test_the_first_losses_and_gradients_are_the_cpus(task, row, drawn):
    data, found = drawn(task), {}
    for device in ("cpu", GPU):
        training = FineTuning(row(task, device), data, seed=0)
        training.model.train()
        images, targets = next(iter(training.loader.epoch(1)))
        losses = training.model(images.to(training.device), [moved(target, training.device) for target in targets])
        sum(losses.values()).backward()
        found[device] = ({name: loss.item() for name, loss in losses.items()},
                         {name: weight.grad.double().norm().item() for name, weight in training.model.named_parameters()
                          if weight.grad is not None})
    (losses, gradients), (ours, moves) = found["cpu"], found[GPU]
    assert sum(losses.values()) > 0
    assert ours == pytest.approx(losses, rel=1e-3)
    assert moves == pytest.approx(gradients, rel=1e-2, abs=1e-5 * max(gradients.values()))


@pytest.mark.parametrize("amp", [None, "bfloat16", "float16"])
@pytest.mark.parametrize("task", TASKS)
def test_three_iterations_train_and_what_they_find_is_what_a_cpu_finds(task, amp, row, drawn, told, tmp_path):
    data, config = drawn(task), row(task, GPU, amp)
    fine_tune(config, data, tmp_path / "out", tmp_path / "checkpoints", told)
    lines = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert all(math.isfinite(line["train_loss"]) for line in lines)
    found = {}
    for device in ("cpu", GPU):
        used = benchmarks.benchmark(row(task, device), data)
        model = load_finished(config, used, tmp_path / "out/weights.safetensors").to(device)
        judge = JUDGES[task](used, model, torch.device(device))
        found[device] = [each for each, _ in judge.findings()]
    assert len(found[GPU]) == 12
    for here, there in zip(found["cpu"], found[GPU], strict=True):
        if task == "ade20k":
            assert here.shape == there.shape == (HEIGHT, WIDTH)
            assert (here == there).double().mean() > 0.99
            continue
        assert all(tensor.device.type == "cpu" for tensor in there.values())
        assert abs(len(here["scores"]) - len(there["scores"])) <= 2
        best = min(5, len(here["scores"]))
        scores = [each["scores"].sort(descending=True).values[:best] for each in (here, there)]
        torch.testing.assert_close(*scores, rtol=1e-3, atol=1e-4)
    assert task == "ade20k" or sum(len(each["scores"]) for each in found[GPU]) > 12


@pytest.mark.parametrize("task", TASKS)
def test_tiny_sets_are_trained_on_and_assessed(task, row, told, tmp_path):
    for package in NEEDS[task]:
        pytest.importorskip(package)
    config, data, weights = row(task, GPU), tmp_path / "data", tmp_path / "out/weights.safetensors"
    sources.prepare(task, config["data"], data)
    fine_tune(config, data, tmp_path / "out", tmp_path / "checkpoints", told)
    evaluate(config, data, weights, tmp_path / "assessed", told)
    metrics = json.loads((tmp_path / "assessed/metrics.json").read_text())
    assert 0 <= metrics[MEASURES[task]]["value"] <= 100
    assert metrics["images"]["value"] > 0
    assert any((tmp_path / "assessed/detections").iterdir())
    draw_pictures(config, data, weights, tmp_path / "pictures")
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 1
