"""The least work that an operator needs per image: multiplications that hit the map, and bytes in and out.

A kernel is a set of displacements (dy, dx) of the input from the output.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from swconv.ops import tap_count

Kernel = frozenset[tuple[int, int]]
FLOAT = 4                                # bytes


@dataclass(frozen=True)
class Stage:
    """The operator in one stage of a network.

    Attributes
    ----------
    side : int
        Of the map, px.
    channels : int
        That enter SW.
    extent, small : int
        M and N, px.
    blocks : int
        Of the stage in the network.
    batch : int
        Images per call.
    """

    number: int
    side: int
    channels: int
    extent: int
    blocks: int
    batch: int
    small: int = 3

    @property
    def taps(self) -> int:
        return tap_count(self.extent, self.small)


def rectangle(rows: range, columns: range) -> Kernel:
    """All displacements of a rectangle."""
    return frozenset((dy, dx) for dy in rows for dx in columns)


def centred(height: int, width: int) -> Kernel:
    """A rectangle of odd sides around the output."""
    return rectangle(range(-(height // 2), height // 2 + 1), range(-(width // 2), width // 2 + 1))


def shiftwise(stage: Stage) -> tuple[Kernel, Kernel, Kernel]:
    """SW's horizontal strip, vertical strip and small kernel."""
    along = range(-(stage.extent // 2), stage.taps * stage.small - stage.extent // 2)
    across = range(-(stage.small // 2), stage.small // 2 + 1)
    return rectangle(across, along), rectangle(along, across), centred(stage.small, stage.small)


def peers(stage: Stage) -> dict[str, Kernel]:
    """Large kernels of other networks: squares, and SLaK's pair of strips, which is one plus as long as nothing parts them."""
    pair = centred(5, stage.extent) | centred(stage.extent, 5)
    return {"depthwise13": centred(13, 13), "depthwise7": centred(7, 7), "slak_pair": pair}


def in_bounds_macs(kernel: Iterable[tuple[int, int]], height: int, width: int) -> int:
    """Multiplications of one map (height, width) with a kernel where the input lies inside the map."""
    return sum(max(0, height - abs(dy)) * max(0, width - abs(dx)) for dy, dx in kernel)


def forward(stage: Stage, kernel: Kernel, size: int = FLOAT) -> dict[str, int]:
    """Of one depthwise convolution: every pixel, of so many bytes, is read once and written once."""
    return _least(stage, [kernel], 1, 2, size)


def training(stage: Stage, *kernels: Kernel, size: int = FLOAT) -> dict[str, int]:
    """Of forward, input gradient and kernel gradient of convolutions of one x, each with an output of its own.

    x is read twice and its gradient written; each output is written, and its gradient read.
    """
    return _least(stage, kernels, 3, 3 + 2 * len(kernels), size)


def _least(stage: Stage, kernels: Iterable[Kernel], passes: int, maps: int, size: int) -> dict[str, int]:
    macs = sum(in_bounds_macs(kernel, stage.side, stage.side) for kernel in kernels)
    return {"macs": passes * macs * stage.channels, "bytes": maps * size * stage.channels * stage.side**2}
