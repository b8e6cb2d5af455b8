"""Images in: one loader for composed digits and for ImageNet, whose batches depend on (seed, epoch) and nothing else.

B batch, C channels, H = W = `dataset["image_size"]`. Images leave the loader as uint8; `to_input` normalises them on
the device, where timm's random erasing and Mixup follow.
"""

import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup, auto_augment, create_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose
from tqdm import tqdm

from swconv.training import manifest

MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DISTANCE = re.compile(r"_d(\d+)\.\w+$")

Batch = tuple[Tensor, Tensor]


class TrainLoader:
    """Shuffled, augmented training batches.

    The order is a permutation drawn from (seed, epoch), the augmentation of an image is drawn from (seed, epoch,
    index): neither knows of workers, of earlier epochs or of the global generators, which stay as they are.

    Parameters
    ----------
    dataset, recipe : dict
        Of a resolved row of params.
    data_dir : Path
        Where `manifest.prepare` wrote.
    seed : int
    micro_batch : int, optional
        Images that are loaded, augmented and mixed together; by default a whole batch. What workers hold in memory.
    pin_memory : bool
        For copies to a GPU.

    Attributes
    ----------
    parts : int
        Micro-batches per step.

    Raises
    ------
    ValueError
        `cache: true` with a random transform, or fewer images than one batch.
    manifest.ImageError
        While iterating (with `cache: true` at once), naming the file.
    """

    def __init__(self, dataset: dict, recipe: dict, data_dir: Path, seed: int, micro_batch: int | None = None,
                 pin_memory: bool = False):
        augmented = _is_random(recipe)
        if dataset["cache"] and augmented:
            raise ValueError(
                f"Dataset '{dataset['name']}' has cache: true, which needs a recipe that does not augment at random, "
                "got random_resized_crop, hflip or rand_augment; set cache: false in params/."
            )
        images = _Images(dataset, data_dir, "train", _train_transform(dataset, recipe), seed if augmented else None)
        self._batches = _Shuffled(len(images), recipe["batch_size"], micro_batch or recipe["batch_size"], seed)
        self.parts = self._batches.parts
        if not len(self):
            raise ValueError(
                f"Training needs at least one batch of {recipe['batch_size']} images, got {len(images)} images in "
                f"{images.root}; lower batch_size in params/ or use a larger dataset."
            )
        self._source = _source(images, self._batches, dataset, pin_memory)

    def __len__(self) -> int:
        """Steps per epoch; the remainder of an epoch is dropped."""
        return self._batches.steps

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Micro-batches of one epoch, `parts` for every step: images uint8 (B, C, H, W), labels int64 (B,)."""
        self._batches.epoch = epoch
        yield from self._source


class ValLoader:
    """Validation batches in file order, the last one as short as it comes.

    Parameters
    ----------
    dataset : dict
        Of a resolved row of params.
    data_dir : Path
        Where `manifest.prepare` wrote.
    batch_size : int
    pin_memory : bool
        For copies to a GPU.

    Attributes
    ----------
    distances : int64 Tensor of shape (n,), or None
        Cells between marker and target of each image, in the order of the batches, where the file names hold it
        (`_d<distance>`): the digit task.
    """

    def __init__(self, dataset: dict, data_dir: Path, batch_size: int, pin_memory: bool = False):
        images = _Images(dataset, data_dir, "val", _eval_transform(dataset), seed=None)
        self._batches = _InOrder(len(images), batch_size)
        self._source = _source(images, self._batches, dataset, pin_memory)
        self.distances = images.distances()

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        """Batches: images uint8 (B, C, H, W), labels int64 (B,)."""
        yield from self._source


def to_input(
    images: Tensor,
    mean: list[float],
    std: list[float],
    device: torch.device | str,
    memory_format: str,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Normalise on the device: (images / 255 - mean) / std per channel.

    Parameters
    ----------
    images : uint8 Tensor of shape (B, C, H, W)
    mean, std : list of float
        One per channel, on the scale 0 to 1.
    device : torch.device or str
    memory_format : {"contiguous", "channels_last"}
    dtype : torch.dtype
        Of the result; the arithmetic is float32.

    Raises
    ------
    ValueError
        Channels and mean or std do not match.
    """
    if not images.shape[1] == len(mean) == len(std):
        raise ValueError(
            f"Normalisation needs one mean and std per channel, got {images.shape[1]} channels, {len(mean)} means and "
            f"{len(std)} stds; correct in_chans, mean or std of the dataset in params/."
        )
    x = images.to(device, non_blocking=True).to(torch.float32, memory_format=MEMORY_FORMATS[memory_format])
    shift, scale = (255 * torch.tensor(v, device=device).view(1, -1, 1, 1) for v in (mean, std))
    return x.sub_(shift).div_(scale).to(dtype)


def erasing_for(recipe: dict, device: torch.device | str) -> RandomErasing | None:
    """timm's random erasing of a normalised batch, in place, or None.

    It draws from Python's and from the device's global generators: both belong in a checkpoint.
    """
    if not recipe["random_erasing"]:
        return None
    return RandomErasing(recipe["random_erasing"], mode="pixel", max_count=1, device=str(device))


def mixup_for(recipe: dict, num_classes: int) -> Mixup | None:
    """timm's Mixup/CutMix of a normalised micro-batch, `images, soft = mixup(images, labels)`, or None if both are 0.

    It draws from numpy's global generator, which belongs in a checkpoint; label smoothing is inside the soft labels.
    """
    if not (recipe["mixup"] or recipe["cutmix"]):
        return None
    return Mixup(
        mixup_alpha=recipe["mixup"],
        cutmix_alpha=recipe["cutmix"],
        switch_prob=recipe["mixup_switch"],
        label_smoothing=recipe["label_smoothing"],
        num_classes=num_classes,
    )


class _Images(ImageFolder):
    """One split, read by (epoch, index); a seed makes the transform's randomness a function of both."""

    def __init__(self, dataset: dict, data_dir: Path, split: str, transform: Compose, seed: int | None):
        super().__init__(manifest.read(data_dir)["root"] / split, transform)
        self.mode = "L" if dataset["in_chans"] == 1 else "RGB"
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[np.ndarray, int]:
        epoch, index = key
        path, label = self.samples[index]
        image = manifest.read_image(path, self.mode)
        if self.seed is None:
            return self.transform(image), label
        with _randomness(self.seed, epoch, index):
            return self.transform(image), label

    def __getitems__(self, keys: list[tuple[int, int]]) -> Batch | manifest.ImageError:
        """A batch. An error is returned, as a worker process would wrap a raised one in its traceback."""
        try:
            arrays, labels = zip(*(self[key] for key in keys), strict=True)
        except manifest.ImageError as error:
            return error
        return torch.from_numpy(np.stack(arrays)), torch.tensor(labels)

    def distances(self) -> Tensor | None:
        found = [DISTANCE.search(path) for path, _ in self.samples]
        return torch.tensor([int(match[1]) for match in found]) if all(found) else None


class _Shuffled:
    """Lists of (epoch, index), a micro-batch each, in an order drawn from (seed, epoch)."""

    def __init__(self, count: int, batch_size: int, micro_batch: int, seed: int):
        self.count, self.batch_size, self.micro_batch, self.seed, self.epoch = count, batch_size, micro_batch, seed, 0
        self.steps, self.parts = count // batch_size, -(-batch_size // micro_batch)

    def __len__(self) -> int:
        return self.steps * self.parts

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.RandomState([self.seed, self.epoch]).permutation(self.count)
        for batch in order[: self.steps * self.batch_size].reshape(self.steps, self.batch_size):
            for start in range(0, self.batch_size, self.micro_batch):
                yield [(self.epoch, index) for index in batch[start : start + self.micro_batch].tolist()]


class _InOrder:
    def __init__(self, count: int, batch_size: int):
        self.count, self.batch_size = count, batch_size

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for start in range(0, self.count, self.batch_size):
            yield [(0, index) for index in range(start, min(start + self.batch_size, self.count))]


class _Decoded:
    """The whole split in memory, for transforms that are not random."""

    def __init__(self, images: _Images, batches: _Shuffled | _InOrder):
        keys = tqdm(range(len(images)), desc="decode", unit="image", disable=None)
        arrays, labels = zip(*(images[0, index] for index in keys), strict=True)
        self.images, self.labels, self.batches = torch.from_numpy(np.stack(arrays)), torch.tensor(labels), batches

    def __iter__(self) -> Iterator[Batch]:
        for keys in self.batches:
            indices = torch.tensor([index for _, index in keys])
            yield self.images.index_select(0, indices), self.labels[indices]


class _Streamed:
    """Files read as they are needed, by worker processes if the dataset asks for them."""

    def __init__(self, images: _Images, batches: _Shuffled | _InOrder, workers: int, pin_memory: bool):
        self.loader = DataLoader(
            images,
            batch_sampler=batches,
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=_same,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # else every epoch would draw from the global one
        )

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.loader:
            if isinstance(batch, manifest.ImageError):
                raise batch
            yield batch


def _source(images: _Images, batches: _Shuffled | _InOrder, dataset: dict, pin_memory: bool) -> _Decoded | _Streamed:
    if dataset["cache"]:
        return _Decoded(images, batches)
    return _Streamed(images, batches, dataset["workers"], pin_memory)


def _same(batch: Batch | manifest.ImageError) -> Batch | manifest.ImageError:
    return batch


def _is_random(recipe: dict) -> bool:
    return bool(recipe["random_resized_crop"] or recipe["hflip"] or recipe["rand_augment"])


def _eval_transform(dataset: dict) -> Compose:
    """Resize to image_size / crop_pct, centre crop, uint8 array (C, H, W)."""
    return create_transform(
        dataset["image_size"],
        crop_pct=dataset["crop_pct"],
        interpolation=dataset["interpolation"],
        use_prefetcher=True,
    )


def _train_transform(dataset: dict, recipe: dict) -> Compose:
    """timm's training transform; without random_resized_crop its crop is the one of evaluation."""
    steps = create_transform(
        dataset["image_size"],
        is_training=True,
        hflip=recipe["hflip"],
        color_jitter=None,
        auto_augment=recipe["rand_augment"],
        interpolation=dataset["interpolation"],
        mean=tuple(dataset["mean"]),
        use_prefetcher=True,
    ).transforms
    if not recipe["random_resized_crop"]:
        steps = [*_eval_transform(dataset).transforms[:-1], *steps[1:]]
    for step in steps:
        for op in getattr(step, "ops", ()):
            if op.aug_fn is auto_augment.posterize:
                op.aug_fn = _posterize
    return Compose(steps)


def _posterize(image: Image.Image, bits: int, **options) -> Image.Image:
    """timm's, and black at the 0 bits that timm may ask for and Pillow 13 refuses: as earlier Pillows made it."""
    return image.point([0] * 256 * len(image.getbands())) if bits == 0 else auto_augment.posterize(image, bits)


@contextmanager
def _randomness(*key: int) -> Iterator[None]:
    """Seed the three global generators of the CPU from a key, and put them back as they were."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = int(np.random.RandomState(key).randint(2**31))
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
