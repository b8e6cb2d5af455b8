"""The four benchmarks, each as what its network is trained with: images, batches, pyramid and heads.

`benchmark(config, root)` reads a resolved row of params/downstream.yaml; `evaluation` judges what the network finds.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from swconv.downstream import nuscenes
from swconv.downstream.batches import Collate
from swconv.downstream.datasets import ADE20K, COCO, VOC, Images, Target
from swconv.downstream.detection import Detector
from swconv.downstream.detection_config import CASCADE, FASTER
from swconv.downstream.fcos3d import FCOS3D, FOREVER, FCOS3DConfig
from swconv.downstream.pyramid import Pyramid
from swconv.downstream.transforms import DetectionTest, DetectionTrain, SegmentationTest, SegmentationTrain
from swconv.downstream.upernet import UPerNet, UPerNetConfig

PUBLISHED = {"coco": CASCADE, "voc": FASTER}
DIVISOR = 32                                                          # of the sides of a batch of images for detection


def _ade20k(root: Path, data: Mapping[str, Any], training: bool, **more: Any) -> ADE20K:
    return ADE20K(root, _split(data, training), **more)


def _coco(root: Path, data: Mapping[str, Any], training: bool, **more: Any) -> COCO:
    return COCO(root, _split(data, training), training=training, **more)


def _voc(root: Path, data: Mapping[str, Any], training: bool, **more: Any) -> VOC:
    years = data["train_years" if training else "val_years"]
    return VOC(root, _split(data, training), tuple(years), training=training, **more)


def _nuscenes(root: Path, data: Mapping[str, Any], training: bool, **more: Any) -> nuscenes.NuScenesImages:
    return nuscenes.NuScenesImages(root, _split(data, training), data["version"], training=training, **more)


def _split(data: Mapping[str, Any], training: bool) -> str:
    return data["train" if training else "val"]


DATASETS = {"ade20k": _ade20k, "coco": _coco, "voc": _voc, "nuscenes": _nuscenes}


class Benchmark(ABC):
    """What the benchmarks share.

    Parameters
    ----------
    config : mapping
        Resolved row: `task`, `head`, `train`, `test`, `data`.
    root : Path
        Of the benchmark's files.
    """

    def __init__(self, config: Mapping[str, Any], root: Path) -> None:
        self.config, self.root = config, root

    def images(self, training: bool, seed: int = 0) -> Images:
        """The training or the validation images, with the recipe's transforms."""
        transform = self.training_view() if training else self.test_view()
        return DATASETS[self.config["task"]](self.root, self.config["data"], training, transform=transform, seed=seed)

    def collate(self, training: bool) -> Collate:
        """Normalises and pads."""
        return Collate(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, DIVISOR)

    def groups(self, images: Images) -> np.ndarray | None:
        """Which images may meet in a batch; None for all, the remainder of an epoch dropped."""
        return images.wide

    @abstractmethod
    def network(self, pyramid: Pyramid) -> nn.Module:
        """Pyramid and heads: (images, targets) -> losses while training."""

    @abstractmethod
    def training_view(self) -> Any:
        """The recipe's augmentation."""

    @abstractmethod
    def test_view(self) -> Any:
        """What evaluation does to an image."""


class Segmentation(Benchmark):
    """ADE20K: UPerNet."""

    def collate(self, training: bool) -> Collate:
        size = tuple(self.config["train"]["crop"]) if training else (1, 1)
        return Collate(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, 1, size)

    def groups(self, images: Images) -> None:
        return None

    def network(self, pyramid: Pyramid) -> nn.Module:
        head = self.config["head"]
        return UPerNet(pyramid, UPerNetConfig(len(ADE20K.class_names), **head | {"pool_scales": tuple(head["pool_scales"])}))

    def training_view(self) -> SegmentationTrain:
        return SegmentationTrain(**_tuples(self.config["train"]))

    def test_view(self) -> SegmentationTest:
        return SegmentationTest(tuple(self.config["test"]["scale"]), self.config["test"]["divisor"])


class Detection(Benchmark):
    """COCO 2017: Cascade Mask R-CNN; PASCAL VOC 2007: Faster R-CNN."""

    def network(self, pyramid: Pyramid) -> nn.Module:
        return Detector(pyramid, replace(PUBLISHED[self.config["task"]], **_tuples(self.config["head"])))

    def training_view(self) -> DetectionTrain:
        return DetectionTrain(**_tuples(self.config["train"]))

    def test_view(self) -> DetectionTest:
        return DetectionTest(**self.config["test"])


class Monocular(Benchmark):
    """nuScenes: FCOS3D."""

    def groups(self, images: Images) -> None:
        return None

    def network(self, pyramid: Pyramid) -> nn.Module:
        head = self.config["head"]
        return FCOS3D(pyramid, FCOS3DConfig(**head | {"reach": (*head["reach"], FOREVER)}))

    def training_view(self) -> nuscenes.Mono:
        return nuscenes.Mono(**self.config["train"])

    def test_view(self) -> nuscenes.Mono:
        return nuscenes.Mono(**self.config["test"])


BENCHMARKS = {"ade20k": Segmentation, "coco": Detection, "voc": Detection, "nuscenes": Monocular}


def benchmark(config: Mapping[str, Any], root: Path) -> Benchmark:
    """The benchmark of a resolved row, on the files below `root`."""
    return BENCHMARKS[config["task"]](config, root)


def moved(target: Target, device: torch.device) -> Target:
    """A target with its tensors on the device."""
    return {key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value for key, value in target.items()}


def _tuples(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
