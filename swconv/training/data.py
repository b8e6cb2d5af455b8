"""Images in: one loader for composed digits and for ImageNet, whose batches depend on (seed, epoch) and nothing else.

A batch of the recipe is global: of P processes, process r takes its images r, r + P, r + 2 P, ...

B batch, C channels, H = W = `dataset["image_size"]`. Images leave the loader as uint8; `to_input` normalises them on
the device, where timm's random erasing and Mixup follow.
"""

import logging
import os
import random
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup, auto_augment, create_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose
from tqdm import tqdm

from swconv.training import manifest
from swconv.training.reduced import Reduced, cores, mode

STAND_INS = 16  # unreadable files in a row after which another one stops the training
SAMPLED = 16  # images that are decoded before the first batch
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DISTANCE = re.compile(r"_d(\d+)\.\w+$")

Batch = tuple[Tensor, Tensor]
_log = logging.getLogger(__name__)


class TrainLoader:
    """Shuffled, augmented training batches.

    The order is a permutation drawn from (seed, epoch), the augmentation of an image is drawn from (seed, epoch,
    index): neither knows of workers, processes, earlier epochs or of the global generators, which stay as they are.

    With `bad_files: skip` the next readable image stands in for one that cannot be read: the same one in every run.

    Parameters
    ----------
    dataset, recipe : dict
        Of a resolved row of params.
    data_dir : Path
        Where `manifest.prepare` wrote.
    seed : int
    micro_batch : int, optional
        Images that are loaded, augmented and mixed together in a process; by default all of its share of a batch. What
        workers hold in memory.
    pin_memory : bool
        For copies to a GPU.
    rank, world : int
        This process, and how many there are.

    Attributes
    ----------
    parts : int
        Micro-batches per step.
    bad_files : set of str
        Paths of unreadable files that this process has met and replaced so far.

    Raises
    ------
    ValueError
        `cache: true` with a random transform, fewer images than one batch, a batch that the processes cannot share
        evenly, classes that are not `num_classes`, or unreadable images among a sample.
    manifest.ImageError
        While iterating (with `cache: true` at once), naming the file.
    """

    def __init__(self, dataset: dict, recipe: dict, data_dir: Path, seed: int, micro_batch: int | None = None,
                 pin_memory: bool = False, rank: int = 0, world: int = 1):
        if recipe["batch_size"] % world:
            raise ValueError(
                f"A batch is shared by all processes, so batch_size needs to be a multiple of their number, got "
                f"{recipe['batch_size']} images for {world} processes; change batch_size or machine.processes in params/."
            )
        augmented = _is_random(recipe)
        if dataset["cache"] and augmented:
            raise ValueError(
                f"Dataset '{dataset['name']}' has cache: true, which needs a recipe that does not augment at random, "
                "got random_resized_crop, hflip or rand_augment; set cache: false in params/."
            )
        images = _Images(dataset, data_dir, "train", train_transform(dataset, recipe), seed if augmented else None)
        if rank == 0:
            images.check()
            if not dataset["cache"] and dataset["workers"] > (most := _most_workers(world)):
                _log.warning("Dataset '%s' asks for %d worker processes for each of %d training processes, and there are %d "
                             "cores: %d each do the work; set workers: %d in params/.", dataset["name"], dataset["workers"],
                             world, cores(), most, most)
        self._batches = _Shuffled(len(images), recipe["batch_size"], micro_batch, seed, rank, world)
        self.parts = self._batches.parts
        if not len(self):
            raise ValueError(
                f"Training needs at least one batch of {recipe['batch_size']} images, got {len(images)} images in "
                f"{images.root}; lower batch_size in params/ or use a larger dataset."
            )
        self._source = _source(images, self._batches, dataset, pin_memory, world)
        self.bad_files = self._source.bad_files

    def __len__(self) -> int:
        """Steps per epoch; the remainder of an epoch is dropped."""
        return self._batches.steps

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Micro-batches of one epoch, `parts` for every step: images uint8 (B, C, H, W), labels int64 (B,).

        `start` steps are left out at the beginning, and their images are not read: a training goes on there.
        """
        self._batches.epoch, self._batches.start = epoch, start
        yield from self._source


class ValLoader:
    """Validation batches in file order, the last one as short as it comes. An unreadable image always stops it.

    Parameters
    ----------
    dataset : dict
        Of a resolved row of params.
    data_dir : Path
        Where `manifest.prepare` wrote.
    batch_size : int
    pin_memory : bool
        For copies to a GPU.
    rank, world : int
        This process, and how many there are: it takes images rank, rank + world, ...

    Attributes
    ----------
    distances : int64 Tensor of shape (n,), or None
        Cells between marker and target of each image, in the order of the batches, where the file names hold it
        (`_d<distance>`): the digit task.
    """

    def __init__(self, dataset: dict, data_dir: Path, batch_size: int, pin_memory: bool = False, rank: int = 0,
                 world: int = 1):
        images = _Images(dataset | {"bad_files": "stop"}, data_dir, "val", eval_transform(dataset), seed=None)
        self._batches = _InOrder(range(rank, len(images), world), batch_size)
        self._source = _source(images, self._batches, dataset, pin_memory, world)
        self.distances = images.distances(self._batches.indices)

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
    return x.sub_(_per_channel(*mean, device=device)).div_(_per_channel(*std, device=device)).to(dtype)


@cache
def _per_channel(*values: float, device: torch.device | str) -> Tensor:
    """On the scale 0 to 255, (1, C, 1, 1). Not made anew at every step: a copy to the device each time."""
    return 255 * torch.tensor(values, device=device).view(1, -1, 1, 1)


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


Loaded = tuple[Tensor, Tensor, list[str]]                             # a batch, and the files that others stand in for


class _Images(Dataset):
    """One split, read by (epoch, index); a seed makes the transform's randomness a function of both."""

    def __init__(self, dataset: dict, data_dir: Path, split: str, transform: Compose, seed: int | None):
        self.root, self.mode, self.seed, self.transform = manifest.read(data_dir)["root"], mode(dataset), seed, transform
        paths, classes = manifest.samples(data_dir, split)
        if len(classes) != dataset["num_classes"]:
            raise ValueError(
                f"Dataset '{dataset['name']}' needs {dataset['num_classes']} classes in {self.root / split}, "
                f"got {len(classes)} in {data_dir}/manifest.csv; run the data rule again, or correct num_classes in params/."
            )
        label = {name: number for number, name in enumerate(classes)}
        self.labels = np.array([label[path.split("/")[1]] for path in paths])
        self.paths = np.array([os.fsencode(path) for path in paths])  # one block: worker processes do not copy it
        self.skip = dataset["bad_files"] == "skip"
        self.reduced = Reduced(dataset, data_dir, split) if dataset.get("cache_px") else None

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> Path:
        return self.root / os.fsdecode(self.paths[index])

    def check(self) -> None:
        """Decode a sample, where images are read at all."""
        if self.reduced is None:
            manifest.check_sample([self.path(index) for index in manifest.evenly(range(len(self)), SAMPLED)], self.skip)

    def load(self, epoch: int, index: int) -> tuple[np.ndarray, int, list[str]]:
        """Image uint8 (C, H, W), label, and the files that were passed over."""
        image, place, bad = self._readable(index)
        if self.seed is None:
            return self.transform(image), self.labels[place], bad
        with _randomness(self.seed, epoch, index):
            return self.transform(image), self.labels[place], bad

    def __getitems__(self, keys: list[tuple[int, int]]) -> Loaded | manifest.ImageError:
        """A batch. An error is returned, as a worker process would wrap a raised one in its traceback."""
        try:
            arrays, labels, bad = zip(*(self.load(*key) for key in keys), strict=True)
        except manifest.ImageError as error:
            return error
        return torch.from_numpy(np.stack(arrays)), torch.tensor(labels), sum(bad, [])

    def distances(self, indices: range) -> Tensor | None:
        found = [DISTANCE.search(self.path(index).name) for index in indices]
        return torch.tensor([int(match[1]) for match in found]) if all(found) else None

    def _readable(self, index: int) -> tuple[Image.Image, int, list[str]]:
        """The image at a place, or with `skip` the next one that can be read; its place; the files passed over."""
        bad: list[str] = []
        for place in range(index, index + STAND_INS):
            try:
                return self._image(place % len(self)), place % len(self), bad
            except manifest.ImageError:
                if not self.skip:
                    raise
                bad.append(str(self.path(place % len(self))))
        raise manifest.ImageError(f"Training with bad_files: skip needs a readable image among {STAND_INS} in a row, got none "
                                  f"from {bad[0]} to {bad[-1]}; restore the files and run the data rule again.")

    def _image(self, index: int) -> Image.Image:
        if self.reduced is None:
            return manifest.read_image(self.path(index), self.mode)
        if (image := self.reduced[index]) is None:
            raise manifest.ImageError(f"{self.path(index)} needs to be a readable image, got none when it was reduced; "
                                      f"restore the file, delete {self.reduced.folder} and run the data rule again.")
        return image


class _Shuffled:
    """Lists of (epoch, index), a micro-batch each: a process's share of batches drawn from (seed, epoch)."""

    def __init__(self, count: int, batch_size: int, micro_batch: int | None, seed: int, rank: int, world: int):
        self.count, self.batch_size, self.seed, self.rank, self.world = count, batch_size, seed, rank, world
        self.epoch = self.start = 0
        self.share = batch_size // world
        self.micro_batch = micro_batch or self.share
        self.steps, self.parts = count // batch_size, -(-self.share // self.micro_batch)

    def __len__(self) -> int:
        return (self.steps - self.start) * self.parts

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.RandomState([self.seed, self.epoch]).permutation(self.count)
        batches = order[: self.steps * self.batch_size].reshape(self.steps, self.batch_size)
        for batch in batches[self.start :, self.rank :: self.world]:
            for first in range(0, self.share, self.micro_batch):
                yield [(self.epoch, index) for index in batch[first : first + self.micro_batch].tolist()]


class _InOrder:
    def __init__(self, indices: range, batch_size: int):
        self.indices, self.batch_size = indices, batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield [(0, index) for index in self.indices[start : start + self.batch_size]]


class _Decoded:
    """The whole split in memory, for transforms that are not random."""

    def __init__(self, images: _Images, batches: _Shuffled | _InOrder):
        keys = tqdm(range(len(images)), desc="decode", unit="image", disable=None)
        arrays, labels, bad = zip(*(images.load(0, index) for index in keys), strict=True)
        self.images, self.labels, self.batches = torch.from_numpy(np.stack(arrays)), torch.tensor(labels), batches
        self.bad_files: set[str] = set()
        tell(self.bad_files, sum(bad, []))

    def __iter__(self) -> Iterator[Batch]:
        for keys in self.batches:
            indices = torch.tensor([index for _, index in keys])
            yield self.images.index_select(0, indices), self.labels[indices]


class _Streamed:
    """Files read as they are needed, by worker processes if the dataset asks for them."""

    def __init__(self, images: _Images, batches: _Shuffled | _InOrder, workers: int, pin_memory: bool):
        self.bad_files: set[str] = set()
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
            images, labels, bad = batch
            tell(self.bad_files, bad)
            yield images, labels


def tell(known: set[str], bad: Iterable[str]) -> None:
    """Log every unreadable file once, with the count so far, and add it to those known."""
    for path in bad:
        if path not in known:
            known.add(path)
            _log.warning("%s cannot be read, the next image stands in for it (bad_files: skip); %d so far", path, len(known))


def _source(images: _Images, batches: _Shuffled | _InOrder, dataset: dict, pin_memory: bool,
            world: int) -> _Decoded | _Streamed:
    if dataset["cache"]:
        return _Decoded(images, batches)
    return _Streamed(images, batches, min(dataset["workers"], _most_workers(world)), pin_memory)


def _most_workers(world: int) -> int:
    """Worker processes that each of the training processes has a core for."""
    return max(1, cores() // world)


def _same(batch: Loaded | manifest.ImageError) -> Loaded | manifest.ImageError:
    return batch


def _is_random(recipe: dict) -> bool:
    return bool(recipe["random_resized_crop"] or recipe["hflip"] or recipe["rand_augment"])


def eval_transform(dataset: dict) -> Compose:
    """Resize to image_size / crop_pct, centre crop (or squash), uint8 array (C, H, W)."""
    return create_transform(
        dataset["image_size"],
        crop_pct=dataset["crop_pct"],
        crop_mode=dataset.get("crop_mode"),
        interpolation=dataset["interpolation"],
        use_prefetcher=True,
    )


def train_transform(dataset: dict, recipe: dict) -> Compose:
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
        steps = [*eval_transform(dataset).transforms[:-1], *steps[1:]]
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
