"""Masks: which weights have one, how it is drawn, pruned and grown.

A mask is a bool Tensor, True where the weight lives. It has the shape of its weight, or (filters, in, 1, 1) where
whole filters live and die. Random draws come from the caller's CPU generator, so they are the same on every device.
"""

import math
import re
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

# The names of the released code and those of swconv.models.
_BRANCH = re.compile(r"(?P<layer>(?:.+\.)?(?:large_kernel\.LoRAs|mixer\.filters))\.\d+(?:\.weight)?")
_SINGLE = re.compile(r"(?:.+\.)?(?:large_kernel\.LoRA\d?(?:\.\w+)?|mixer\.convs\.(?:vertical|horizontal))\.weight")
_OTHERS = {
    "none": re.compile(r"(?!)"),
    "pointwise": re.compile(r"(?:.+\.)?pwconv\d(?:\.\d+)?\.weight"),
    "body": re.compile(r"(?!downsample_layers\.|stem\.|stages\.\d+\.downsample\.)(?:.+\.)?weight"),
    "all": re.compile(r"(?:.+\.)?weight"),
}
OTHERS = tuple(_OTHERS)

SORTED = 1024  # values up to which a sort, one call, is faster than the calls that find the last of the smallest

# SW, `use_embed_mask`: the other branches aim at density 0.5 where branch 0 has 0.7.
SUBSET_PRUNE = 5 / 3
SUBSET_GROW = 5 / 7


@dataclass(frozen=True)
class Layer:
    """Weights that share one density: the Rep branches of a large kernel, or a single weight.

    Attributes
    ----------
    name : str
        What the branches have in common, or the name of the single weight.
    branches : tuple of str
        Parameter names; branch 0 first.
    large_kernel : bool
        Whether this is a filter bank or strip of a large kernel.
    per_filter : bool
        Whether whole filters live and die.
    """

    name: str
    branches: tuple[str, ...]
    large_kernel: bool
    per_filter: bool

    def reduce(self, values: Tensor, how: str) -> Tensor:
        """Bring a Tensor of the weight's shape to the mask's: 'sum', 'mean' or 'any' over each filter."""
        return getattr(values, how)((2, 3), keepdim=True) if self.per_filter else values


def select_layers(model: nn.Module, granularity: str, others: str) -> list[Layer]:
    """List what is to be sparse, in the order of the model's parameters.

    Parameters
    ----------
    model : nn.Module
        With the parameter names of the released code or of swconv.models.
    granularity : {"filter", "element"}
        Of the masks on the large kernels; all other masks are element-wise.
    others : {"none", "pointwise", "body", "all"}
        What is sparse beside the large kernels: nothing (the official flag only_L), the pointwise layers
        (rep_coarse), all but the stem and the downsampling layers (coarse), all (origin, SLaK). Norms, biases and
        scales, GRN's 4-D ones included, never are.

    Raises
    ------
    ValueError
        If nothing in the model is to be sparse.
    """
    branches: dict[str, list[str]] = {}
    large = set()
    for name, weight in model.named_parameters():
        if weight.ndim not in (2, 4):
            continue
        branch = _BRANCH.fullmatch(name)
        if branch or _SINGLE.fullmatch(name):
            key = branch["layer"] if branch else name
            branches.setdefault(key, []).append(name)
            large.add(key)
        elif _OTHERS[others].fullmatch(name):
            branches[name] = [name]
    if not branches:
        raise ValueError(
            f"Sparse training needs large-kernel parameters (large_kernel.LoRA*, mixer.filters.*) or others than "
            f'"{others}" to be sparse, got none in {type(model).__name__}. '
            "Leave the recipe's sparsity out (null) for this model."
        )
    return [
        Layer(key, tuple(names), key in large, key in large and granularity == "filter")
        for key, names in branches.items()
    ]


def draw(shape: tuple[int, ...], density: float, generator: Generator) -> Tensor:
    """Draw a mask on the CPU whose entries live independently with probability `density`."""
    return torch.rand(shape, generator=generator) < density


def lowest(values: Tensor, count: int) -> Tensor:
    """Mark the `count` smallest values; of equal ones those of lower index. Waits for no device, and sorts few values only."""
    if count == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    flat = values.flatten()
    if len(flat) <= SORTED:
        smallest = flat.sort(stable=True).indices[:count]
        return torch.zeros_like(flat, dtype=torch.bool).index_fill_(0, smallest, True).view_as(values)
    last = flat.kthvalue(count).values
    below, equal = flat < last, flat == last
    return (below | equal & (equal.cumsum(0) <= count - below.sum())).view_as(values)


def weakness(mask: Tensor, score: Tensor) -> Tensor:
    """The score, but -1 where it is zero and the entry dead: of all that score zero the dead come first."""
    return torch.where(mask | (score > 0), score, -1)


def prune(mask: Tensor, score: Tensor, rate: float, alive: int | None = None) -> Tensor:
    """Kill the k = z + ceil(rate * a) entries of lowest score; a entries of the mask are alive and z are dead.

    Where every dead entry scores 0, as with a weight's own magnitudes, exactly ceil(rate * a) die. The magnitudes
    summed over branches may score dead entries of branch 0 above 0; then more die, as in the published code.
    `alive` is a, counted where it is not given.
    """
    alive = int(mask.sum()) if alive is None else alive
    return mask > lowest(weakness(mask, score), mask.numel() - alive + math.ceil(rate * alive))   # alive, and not lowest


def grow(mask: Tensor, count: int, growth: str, generator: Generator, dead: int | None = None) -> Tensor:
    """Revive dead entries at random.

    Parameters
    ----------
    mask : bool Tensor
    count : int
        How many to revive; at most the number of dead entries.
    growth : {"bernoulli", "exact"}
        Each dead entry on its own with probability count / dead, so that `count` holds on average only (as
        published: the density walks at random); or exactly `count` of them.
    generator : Generator
        On the CPU.
    dead : int, optional
        Dead entries, counted where it is not given.
    """
    dead = int((~mask).sum()) if dead is None else dead
    if dead == 0 or count == 0:
        return mask
    if growth == "bernoulli":
        return mask | draw(mask.shape, count / dead, generator).to(mask.device)
    lots = torch.rand(mask.shape, generator=generator).to(mask.device)
    return mask | lowest(lots.masked_fill(mask, 2), count)


def subset_update(
    mask: Tensor, base: Tensor, pruned: Tensor, grown: Tensor, score: Tensor, rate: float, generator: Generator
) -> Tensor:
    """Update another branch's mask so that it is a random, sparser subset of branch 0's (SW Table 2, #22).

    In the order of the shared magnitudes, ceil(5/3 * rate * alive) entries die beyond those that were dead in
    branch 0; every entry that branch 0 grew is copied with probability 5/7.

    Parameters
    ----------
    mask : bool Tensor
        Of this branch, before the update.
    base, pruned, grown : bool Tensor
        Of branch 0: before the update, after pruning, after growth.
    score : Tensor
        Magnitudes summed over all branches.
    rate : float
        Prune rate of branch 0.

    Notes
    -----
    The published code stops with an error from the third branch on, and lets entries live that died in branch 0 when
    this branch is less than 3/5 as dense. Here any number of branches works, and what died in branch 0 is dead.
    """
    count = int((~base).sum()) + math.ceil(min(1, SUBSET_PRUNE * rate) * int(mask.sum()))
    kept = mask & ~lowest(weakness(base, score), count) & pruned
    return kept | (grown & ~pruned & draw(mask.shape, SUBSET_GROW, generator).to(mask.device))
