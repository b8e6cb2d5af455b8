"""Samples in, batches out: which images meet, in what order, how they are padded, and who reads them.

B batch, H = W the largest sides in it, rounded up.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from swconv.downstream.datasets import UNLABELLED, Images, Sample, Target


class Collate:
    """Normalise, pad at the right and at the bottom, and stack.

    Parameters
    ----------
    mean, std : tuple of float
        Per channel, on the scale 0 to 1.
    divisor : int
        Height and width of a batch are multiples of it.
    size : (int, int), optional
        Least height and width.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], divisor: int = 32, size: tuple[int, int] = (1, 1)):
        self.mean, self.std, self.divisor, self.size = mean, std, divisor, size

    def __call__(self, samples: list[Sample]) -> tuple[Tensor, list[Target]]:
        """
        Returns
        -------
        images : float32 Tensor of shape (B, 3, H, W)
            0, the mean colour, where there is padding.
        targets : list of dict
            `masks` are padded as the images are; so is a `segmentation` of its image's size, by 255.
        """
        needed = np.max([self.size, *(image.shape[1:] for image, _ in samples)], axis=0)
        height, width = (-(-int(side) // self.divisor) * self.divisor for side in needed)
        mean, std = (255 * torch.tensor(each).view(3, 1, 1) for each in (self.mean, self.std))
        images, targets = torch.zeros(len(samples), 3, height, width), []
        for canvas, (image, target) in zip(images, samples, strict=True):
            h, w = image.shape[1:]
            canvas[:, :h, :w] = (image - mean) / std
            margin = (0, width - w, 0, height - h)
            fills = {"masks": False, "segmentation": UNLABELLED}
            padded = {key: F.pad(target[key], margin, value=value) for key, value in fills.items()
                      if key in target and target[key].shape[-2:] == (h, w)}
            targets.append(target | padded)
        return images, targets


class Batches:
    """Micro-batches of (epoch, index), drawn from (seed, epoch) and nothing else: those of one process.

    Parameters
    ----------
    count : int
        Images.
    batch_size : int
        Images of a step, over all processes.
    seed : int
    micro_batch : int, optional
        Images that are loaded and padded together; by default a process's part of a batch.
    groups : ndarray of shape (count,), optional
        Images of different groups never meet in a micro-batch; a group is filled up with repeated images to whole
        micro-batches, and the last step with repeated micro-batches. Without groups the remainder of an epoch is dropped.
    rank, world_size : int
        Which process of how many.

    Attributes
    ----------
    steps, parts : int
        Steps of an epoch, and micro-batches of a step in this process.
    epoch, first : int
        Which epoch comes next, and from which of its steps on: what a resumed run has to set.

    Raises
    ------
    ValueError
        Fewer images than a batch without groups; batch_size no multiple of world_size times micro_batch.
    """

    def __init__(self, count: int, batch_size: int, seed: int, micro_batch: int | None = None,
                 groups: np.ndarray | None = None, rank: int = 0, world_size: int = 1):
        micro = micro_batch or max(1, batch_size // world_size)
        if batch_size % (micro * world_size):
            raise ValueError(f"batch_size needs to be a multiple of {world_size} processes x {micro} images of a micro-batch, "
                             f"got {batch_size}.")
        if groups is None and count < batch_size:
            raise ValueError(f"Training needs at least one batch of {batch_size} images, got {count}; lower batch_size.")
        self.groups, self.fill = np.zeros(count, bool) if groups is None else groups, groups is not None
        self.seed, self.micro, self.rank, self.parts = seed, micro, rank, batch_size // (micro * world_size)
        self.per_step = batch_size // micro
        self.epoch = self.first = 0
        sizes = np.unique(self.groups, return_counts=True)[1]
        self.steps = -(-int((-(-sizes // micro)).sum()) // self.per_step) if self.fill else count // batch_size

    def __len__(self) -> int:
        """Micro-batches that an iteration from here on yields."""
        return (self.steps - self.first) * self.parts

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        random = np.random.default_rng([self.seed, self.epoch])
        chunks = []
        for group in np.unique(self.groups):
            order = random.permutation(np.flatnonzero(self.groups == group))
            if self.fill:
                order = np.concatenate([order, random.choice(order, -len(order) % self.micro)])
            chunks.append(order[: len(order) // self.micro * self.micro].reshape(-1, self.micro))
        chunks = random.permutation(np.concatenate(chunks))
        if self.fill:
            chunks = np.concatenate([chunks, random.choice(chunks, -len(chunks) % self.per_step)])
        for step in range(self.first, self.steps):
            start = step * self.per_step + self.rank * self.parts
            yield from ([(self.epoch, index) for index in chunk] for chunk in chunks[start : start + self.parts].tolist())


class InOrder:
    """Lists of (0, index) in the order of the dataset, for evaluation; every `world_size`-th from `rank` on."""

    def __init__(self, count: int, batch_size: int = 1, rank: int = 0, world_size: int = 1):
        self.indices, self.batch_size = range(rank, count, world_size), batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield [(0, index) for index in self.indices[start : start + self.batch_size]]


class Loader:
    """Batches of a dataset, read in this process or by workers.

    Parameters
    ----------
    images : Images
    batches : Batches or InOrder
    collate : Collate
    workers : int
        Processes; 0 reads here.
    pin_memory : bool
        For copies to a GPU.

    Raises
    ------
    ValueError
        While iterating: what was wrong with a file, as its dataset says it.
    """

    def __init__(self, images: Images, batches: Batches | InOrder, collate: Collate, workers: int = 0,
                 pin_memory: bool = False):
        self.batches = batches
        self._source = DataLoader(
            images,
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=_Passing(collate),
            pin_memory=pin_memory,
            generator=torch.Generator(),  # else every epoch would draw from the global one
        )

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, list[Target]]]:
        for batch in self._source:
            if isinstance(batch, ValueError):
                raise batch
            yield batch


class _Passing:
    """Collates samples, and hands an error on."""

    def __init__(self, collate: Collate):
        self.collate = collate

    def __call__(self, samples: list[Sample] | ValueError) -> tuple[Tensor, list[Target]] | ValueError:
        return samples if isinstance(samples, ValueError) else self.collate(samples)
