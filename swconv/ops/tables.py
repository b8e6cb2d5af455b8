"""Which filter goes where: the shift orders of the SW operator and its ghost split.

Letters: M large extent, N small kernel, n = ceil(M / N) filters ("taps") per channel, R channels, E edges.
Slot j of a strip covers the input offsets j * N - M // 2 ... j * N - M // 2 + N - 1 along its long axis.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Order = Literal["shuffled", "reversed", "shuffle_v"]
OFFICIAL_SEED = 123


def tap_count(extent: int, small: int) -> int:
    """Filters per channel, ceil(M / N)."""
    return -(-extent // small)


@dataclass(frozen=True)
class ShiftTables:
    """The filter in every slot, per edge and channel.

    Attributes
    ----------
    slot_h, slot_v : int64 Tensor of shape (E, R, n)
        Filter (0 .. n - 1) that fills slot j of the horizontal and of the vertical strip.
    pick : int64 Tensor of shape (R, E)
        Absolute index (r * n .. r * n + n - 1) of the filter that stays in place.
    """

    slot_h: Tensor
    slot_v: Tensor
    pick: Tensor

    @classmethod
    def draw(cls, channels: int, taps: int, edges: int, seed: int = OFFICIAL_SEED) -> "ShiftTables":
        """Draw the orders exactly as the released models did (order "shuffled").

        The official code calls torch's randperm and randint after seeding the global generator with 123. Both consume
        raw words of MT19937, which numpy's frozen RandomState yields too, so the tables depend on no library version
        and touch no global generator.
        """
        _check_positive(channels=channels, taps=taps, edges=edges)
        words = _Words(seed)
        slot_h = words.permutations(edges * channels, taps).reshape(edges, channels, taps)
        slot_v = words.permutations(edges * channels, taps).reshape(edges, channels, taps)
        return cls(_tensor(slot_h), _tensor(slot_v), words.picks(channels, taps, edges))

    @classmethod
    def arrange(
        cls, channels: int, taps: int, edges: int, order: Order, seed: int = OFFICIAL_SEED
    ) -> "ShiftTables":
        """Tables of any order: "shuffled" (`draw`), or one edge with H in order and V "reversed" or "shuffle_v".

        The last two are SW Table 1 #2-#8 and Table 2 #9. Their in-place filter is one random filter per channel.

        Raises
        ------
        ValueError
            For an unknown order, or for an ordered table with more than one edge.
        """
        if order == "shuffled":
            return cls.draw(channels, taps, edges, seed)
        if order not in ("reversed", "shuffle_v"):
            raise ValueError(f'order must be "shuffled", "reversed" or "shuffle_v", got {order!r}.')
        if edges != 1:
            raise ValueError(f'order {order!r} is defined for one edge, got edges = {edges}. Use order = "shuffled".')
        _check_positive(channels=channels, taps=taps)
        words = _Words(seed)
        straight = np.tile(np.arange(taps), (1, channels, 1))
        shuffled = order == "shuffle_v"
        slot_v = words.permutations(channels, taps).reshape(1, channels, taps) if shuffled else straight[..., ::-1]
        return cls(_tensor(straight), _tensor(slot_v), words.picks(channels, taps, edges))

    def pads(self, extent: int, small: int, padding: int) -> tuple[Tensor, Tensor]:
        """Displacement of every map on every edge, in pixels: what `shift_add` takes.

        Slot j is displaced by M // 2 - j * N - padding (facts of the official operator: `real_pad`).

        Returns
        -------
        pad_h, pad_v : int32 Tensor of shape (R * n, E)
        """
        taps = self.slot_h.shape[2]
        if tap_count(extent, small) != taps:
            raise ValueError(
                f"extent {extent} with small kernel {small} needs {tap_count(extent, small)} taps, got tables of {taps}."
            )
        offsets = extent // 2 - torch.arange(taps) * small - padding
        return tuple(
            offsets[slots.argsort(dim=2)].flatten(1).t().contiguous().to(torch.int32) for slots in (self.slot_h, self.slot_v)
        )

    def mixing(self) -> Tensor:
        """How often filter k lies in slot j, as one matrix per channel: n rows of H slots, n of V slots, one in place.

        Returns
        -------
        float32 Tensor of shape (R, 2 * n + 1, n)
            Small whole numbers; a product with the filters (R, n, N * N) sums all edges at once.
        """
        taps = self.slot_h.shape[2]
        rows = [torch.nn.functional.one_hot(slots, taps).sum(0) for slots in (self.slot_h, self.slot_v)]   # (R, n, n)
        place = torch.nn.functional.one_hot(self.pick % taps, taps).sum(1, keepdim=True)                   # (R, 1, n)
        return torch.cat([*rows, place], dim=1).float()


def ghost_split(channels: int, ghost_ratio: float, even: bool = True) -> tuple[Tensor, Tensor]:
    """Choose the channels that enter SW and those that pass by ("ghost"), as the released models did.

    Parameters
    ----------
    channels : int
        Width C of the block.
    ghost_ratio : float
        Share of channels that pass by, 0 <= ratio < 1.
    even : bool
        True: R = int(C * (1 - ratio)) rounded down to even (UniRepLKNet skeleton). False: C - int(C * ratio) (SLaK skeleton).

    Returns
    -------
    mixed, ghost : int64 Tensor of shape (R,) and (C - R,)
        Channel numbers, ascending.
    """
    if not 0 <= ghost_ratio < 1:
        raise ValueError(f"ghost_ratio must lie in [0, 1), got {ghost_ratio}.")
    count = int(channels * (1 - ghost_ratio)) // 2 * 2 if even else channels - int(channels * ghost_ratio)
    if count < 1:
        raise ValueError(f"ghost_ratio {ghost_ratio} leaves none of {channels} channels for SW.")
    order = np.random.RandomState(OFFICIAL_SEED).permutation(channels)
    ghost = np.sort(order[: channels - count])
    mixed = np.setdiff1d(np.arange(channels), ghost)
    return _tensor(mixed), _tensor(ghost)


class _Words:
    """Raw 32-bit words of MT19937, consumed as torch's randperm and randint consume them."""

    def __init__(self, seed: int) -> None:
        self.stream = np.random.RandomState(seed)

    def take(self, *shape: int) -> np.ndarray:
        return self.stream.randint(0, 2**32, size=shape, dtype=np.uint32).astype(np.int64)

    def permutations(self, count: int, taps: int) -> np.ndarray:
        words = self.take(count, taps - 1)
        perm, rows = np.tile(np.arange(taps), (count, 1)), np.arange(count)
        for i in range(taps - 1):
            j = i + words[:, i] % (taps - i)
            perm[rows, i], perm[rows, j] = perm[rows, j], perm[rows, i].copy()
        return perm

    def picks(self, channels: int, taps: int, edges: int) -> Tensor:
        local = self.take(edges, channels).T % taps
        return _tensor(local + np.arange(channels)[:, None] * taps)


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))


def _check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}.")
