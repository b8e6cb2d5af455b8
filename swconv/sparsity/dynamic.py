"""Sparse training as the loop sees it: masks at the start, masks after every optimizer step."""

import logging
import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from swconv.sparsity.density import erk_densities, join_branches, ranked_densities, snip_scores
from swconv.sparsity.masks import OTHERS, Layer, draw, grow, prune, select_layers, subset_update

FINAL_PRUNE_RATE = 0.005
DENSE = 0.99  # a mask drawn at least this full is not used

_CHOICES = {
    "granularity": ("filter", "element"),
    "others": OTHERS,
    "density": ("snip", "erk", "uniform", "nonzero"),
    "scores": ("sum", "concat"),
    "prune": ("magnitude", "magnitude_sum"),
    "growth": ("bernoulli", "exact"),
}
_log = logging.getLogger(__name__)


class SparseTraining:
    """Dynamic sparsity of SLaK (element-wise) and SW (per filter, over Rep branches).

    Call `initialise` once before the first step, or `load_state_dict` on resume; then `step` after every optimizer
    step that moved the weights.

    With mixed precision the masks act on the float32 weights that the optimizer moves: nothing else is to be done
    under autocast. A step that a gradient scaler skipped counts as none, so call `step` only if the scaler's scale did
    not fall: `before = scaler.get_scale(); scaler.step(optimizer); scaler.update(); scaler.get_scale() >= before`.

    With several processes (a default process group is initialised) give every process the bare network of the same
    weights and the same arguments, and call every method in all of them at the same point. Rank 0 scores its own
    micro-batch, draws all masks and decides every update; the masks are broadcast at the start and at updates, at no
    other step, and all processes mask alike and return the same log line. The generator moves in rank 0 alone: save
    rank 0's `state_dict`, and load it in every process. Masks depend on rank 0's first micro-batch, hence on its size.

    Parameters
    ----------
    model : nn.Module
        The bare network (no DistributedDataParallel around it); names as in `select_layers`.
    total_steps : int
        Optimizer steps of the whole run: the length of the cosine of the prune rate.
    seed : int
        Of the private generator of all mask draws.
    level : float
        Share of weights (filters) that is dead at the start, over each ranking.
    granularity : {"filter", "element"}
        Masks on the large kernels: per filter, with one SNIP ranking for the large kernels and one for the rest
        (SW); or element-wise, with one ranking for all (SLaK).
    others : {"none", "pointwise", "body", "all"}
        What else is sparse, element-wise; see `select_layers`.
    density : {"snip", "erk", "uniform", "nonzero"}
        How the level is divided among the layers of a ranking: by SNIP, by shape (`erk_densities`), or evenly. Or not at
        all: the masks are where the weights are not zero, to fine-tune sparse weights (official `sparse_init resume`).
    scores : {"sum", "concat"}
        SNIP scores of the Rep branches of a layer, see `join_branches`.
    prune : {"magnitude", "magnitude_sum"}
        By what entries are pruned: each weight's own magnitude at every update, so that the masks of Rep branches part
        (official `sparse_type origin`, SLaK); or magnitudes summed over the filter, where masks are per filter, and at
        shared updates over the branches (all its other values). The same for an element-wise layer of one branch.
    update_every : int
        Optimizer steps between updates of the masks ("u", "f").
    prune_rate : float
        Share of living entries that an update prunes, at the start; it follows a cosine down to 0.005.
    share_every : int
        Every so many updates the Rep branches get one mask from their summed magnitudes ("gap"); at other updates
        each branch goes its own way.
    subset : bool
        At shared updates, the other branches get random subsets of branch 0's mask (#22).
    growth : {"bernoulli", "exact"}
        See `grow`.

    Attributes
    ----------
    masks : dict of str to bool Tensor
        By parameter name, on the device of the parameter. Layers drawn 0.99 full or more are dense for good, without one.
    steps : int
        Optimizer steps taken.

    Raises
    ------
    ValueError
        If an argument is out of range, or nothing in the model is to be sparse.

    Notes
    -----
    SLaK section 4 and appendix B; SW section 3 and Table 8. As published:

    - SNIP gives only the density of each layer; the mask is random, and every branch starts from the same one.
    - The optimizer knows no masks. Gradients stay dense and dead weights take part in every step, after which they are
      set to zero; AdamW's moments of dead weights keep moving and are never reset, so that a weight that grows starts at
      zero with warm moments. Momentum of SGD is masked.
    - A moving average (`average`) is masked as the model is, and a weight that grew enters it at its full value.

    Other than published: all branches are masked from the start (published: from the first step on), the pointwise
    layers are updated at shared updates too (published: `rep_coarse` skips them there), masks are broadcast at updates
    (published: at every step) from scores of rank 0 (published: every rank scores its own batch, and they may disagree
    on which layers stay dense), and mixed precision trains sparsely (published: with `use_amp` no mask is ever applied).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        total_steps: int,
        seed: int,
        level: float = 0.4,
        granularity: str = "filter",
        others: str = "pointwise",
        density: str = "snip",
        scores: str = "sum",
        prune: str = "magnitude_sum",
        update_every: int = 100,
        prune_rate: float = 0.3,
        share_every: int = 1,
        subset: bool = False,
        growth: str = "bernoulli",
    ):
        given = {"granularity": granularity, "others": others, "density": density, "scores": scores, "prune": prune,
                 "growth": growth}
        for key, value in given.items():
            if value not in _CHOICES[key]:
                raise ValueError(f"Sparse training needs {key} to be one of {', '.join(_CHOICES[key])}; got {value!r}.")
        if not (0 < level < 1 and 0 <= prune_rate < 1 and min(total_steps, update_every, share_every) >= 1):
            raise ValueError(
                "Sparse training needs 0 < level < 1, 0 <= prune_rate < 1, and total_steps, update_every and "
                f"share_every of at least 1; got {level=}, {prune_rate=}, {total_steps=}, {update_every=}, "
                f"{share_every=}. Leave the recipe's sparsity out (null) to train densely."
            )
        if prune == "magnitude" and (granularity == "filter" or share_every != 1 or subset):
            raise ValueError(
                "Sparse training with prune magnitude needs granularity element, share_every 1 and subset False, because it "
                f"sums over no filter and no branch; got {granularity=}, {share_every=}, {subset=}. Set prune: magnitude_sum."
            )
        self.layers = select_layers(model, granularity, others)
        self.masks: dict[str, Tensor] = {}
        self.steps = 0
        self._model = model
        self._weights = {name: model.get_parameter(name) for layer in self.layers for name in layer.branches}
        self._generator = Generator().manual_seed(seed)
        self._alive: dict[str, int] = {}                              # entries of each mask: read once, at updates
        self._ready = False
        self._total_steps = total_steps
        self._level = level
        self._joint = granularity == "element"
        self._density = density
        self._scores = scores
        self._prune = prune
        self._update_every = update_every
        self._prune_rate = prune_rate
        self._share_every = share_every
        self._subset = subset
        self._growth = growth

    @property
    def rate(self) -> float:
        """Prune rate after the steps taken so far."""
        final = min(FINAL_PRUNE_RATE, self._prune_rate)
        return final + (self._prune_rate - final) * (1 + math.cos(math.pi * self.steps / self._total_steps)) / 2

    def initialise(self, images: Tensor | None = None, labels: Tensor | None = None) -> None:
        """Draw the masks, by SNIP from one micro-batch, and mask the weights.

        Parameters
        ----------
        images : Tensor of shape (B, C, H, W), optional
            Needed for SNIP; of several processes only rank 0 looks at it.
        labels : int64 Tensor of shape (B,), optional

        Raises
        ------
        ValueError
            If SNIP finds nothing to rank, or density is "nonzero" and no weight is zero.
        """
        drawn = self._drawn(images, labels)
        masks = dict(zip(drawn, _agreed(list(drawn.values())), strict=True))
        alive = dict(zip(drawn, _read([mask.sum() for mask in masks.values()]), strict=True))
        self.masks, self._alive = {}, {}
        for layer in self.layers:
            share = sum(alive[name] / masks[name].numel() for name in layer.branches) / len(layer.branches)
            if _leads():
                _log.info("%s: density %.3f", layer.name, share)
            if share == 0 and _leads():
                _log.warning("%s starts with an empty mask, and no update will grow it", layer.name)
            if share < DENSE:
                self.masks |= {name: masks[name] for name in layer.branches}
                self._alive |= {name: alive[name] for name in layer.branches}
        if self._density == "nonzero" and not self.masks:
            raise ValueError("Sparse training with density nonzero needs sparse weights to start from, got none that are zero. "
                             "Start from sparse weights, or set density: snip.")
        self._ready = True
        self._apply()

    @torch.no_grad()
    def step(self, optimizer: Optimizer) -> dict[str, Any] | None:
        """Mask the weights after an optimizer step; prune and grow when it is due.

        Returns
        -------
        dict or None
            None, or the log line of an update: step, rate, whether the branches shared it; by the name of each masked
            weight its `density`, and how many single weights (not filters) went (`removed`) and came (`grown`; what was
            pruned and grew back counts in neither); and `overlap`, the Jaccard index of each layer's branch masks.

        Raises
        ------
        RuntimeError
            If there are no masks yet.
        """
        if not self._ready:
            raise RuntimeError("Sparse training has no masks yet: call initialise or load_state_dict before step.")
        self._apply(optimizer)
        self.steps += 1
        if self.steps % self._update_every:
            return None
        shared = self._prune == "magnitude_sum" and self.steps // self._update_every % self._share_every == 0
        before, live = self.masks, [layer for layer in self.layers if layer.branches[0] in self.masks]
        after = self._updated(live, shared) if _leads() else before
        self.masks = dict(zip(before, _agreed([after[name] for name in before]), strict=True))
        self._apply(optimizer)
        return {"event": "prune", "step": self.steps, "rate": self.rate, "shared": shared} | self._change(before, live)

    @torch.no_grad()
    def average(self, average: nn.Module, update: Callable[[], None]) -> None:
        """Update a moving average of the model so that it is as sparse as the model (SLaK's EMA).

        Parameters
        ----------
        average : nn.Module
            Of the same shape as the model.
        update : callable
            Moves the average towards the model. Weights that grew enter it at their full value, dead ones leave it.
        """
        for name, mask in self.masks.items():
            own = average.get_parameter(name)
            own.copy_(torch.where(mask & (own == 0), self._weights[name], own))
        update()
        for name, mask in self.masks.items():
            average.get_parameter(name).mul_(mask)

    def density(self) -> float:
        """Share of the weights in the sparse layers that live; layers that stayed dense count as alive."""
        sizes = {name: weight.numel() for name, weight in self._weights.items()}
        alive = sum(self._per_entry(name) * self._alive[name] if name in self.masks else sizes[name] for name in sizes)
        return alive / sum(sizes.values())

    def state_dict(self) -> dict[str, Any]:
        """Masks (bool, CPU), steps and generator state; nothing but tensors, int, str and dict."""
        return {
            "masks": {name: mask.cpu() for name, mask in self.masks.items()},
            "steps": self.steps,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises
        ------
        ValueError
            If the masks are not of this model and these settings.
        """
        shapes = {name: self._mask_shape(layer) for layer in self.layers for name in layer.branches}
        for name, mask in state["masks"].items():
            if shapes.get(name) != mask.shape:
                wanted = tuple(shapes[name]) if name in shapes else "no mask there"
                raise ValueError(
                    f"The checkpoint's mask of {name} has shape {tuple(mask.shape)}, this run needs {wanted}. "
                    "Resume with the model and the sparsity settings that the checkpoint was made with."
                )
        self.masks = {name: mask.to(self._weights[name].device, copy=True) for name, mask in state["masks"].items()}
        self._alive = dict(zip(self.masks, _read([mask.sum() for mask in self.masks.values()]), strict=True))
        self.steps = state["steps"]
        self._generator.set_state(state["generator"].cpu())
        self._ready = True

    @torch.no_grad()
    def _apply(self, optimizer: Optimizer | None = None) -> None:
        if not self.masks:
            return
        masked = [(self._weights[name], mask) for name, mask in self.masks.items()]
        if optimizer:
            states = [(optimizer.state.get(weight, {}).get("momentum_buffer"), mask) for weight, mask in masked]
            masked += [(momentum, mask) for momentum, mask in states if momentum is not None]
        torch._foreach_mul_(*map(list, zip(*masked, strict=True)))

    def _drawn(self, images: Tensor | None, labels: Tensor | None) -> dict[str, Tensor]:
        """A first mask of every weight, one for all branches; on other ranks than 0 what only has its shape."""
        weights = {name: (layer, self._weights[name]) for layer in self.layers for name in layer.branches}
        if self._density == "nonzero" or not _leads():
            return {name: layer.reduce(weight.detach() != 0, "any") for name, (layer, weight) in weights.items()}
        densities = self._densities(images, labels)
        drawn = {layer.name: draw(self._mask_shape(layer), densities[layer.name], self._generator) for layer in self.layers}
        return {name: drawn[layer.name].to(weight.device) for name, (layer, weight) in weights.items()}

    def _densities(self, images: Tensor | None, labels: Tensor | None) -> dict[str, float]:
        """Of each layer; the large kernels and the rest each meet the level, or all together (`_joint`)."""
        if self._density == "uniform":
            return {layer.name: 1 - self._level for layer in self.layers}
        rankings: dict[bool, list[Layer]] = defaultdict(list)
        for layer in self.layers:
            rankings[self._joint or layer.large_kernel].append(layer)
        densities: dict[str, float] = {}
        if self._density == "erk":
            for layers in rankings.values():
                shapes = {name: self._weights[name].shape for layer in layers for name in layer.branches}
                found = erk_densities(shapes, self._level)
                densities |= {layer.name: found[layer.branches[0]] for layer in layers}
            return densities
        seed = int(torch.randint(2**63 - 1, (), generator=self._generator))
        scores = snip_scores(self._model, self._weights, images, labels, seed)
        for layers in rankings.values():
            parts = {layer.name: [layer.reduce(scores[name], "mean") for name in layer.branches] for layer in layers}
            joined = {name: join_branches(part, self._scores) for name, part in parts.items()}
            densities |= ranked_densities(joined, self._level)
        return densities

    def _updated(self, live: list[Layer], shared: bool) -> dict[str, Tensor]:
        """Prune all layers, then grow them: between the two the device is waited for once, to read what died."""
        pruned: dict[str, Tensor] = {}                                # of branch 0 alone where all share its mask
        joint: dict[str, Tensor] = {}                                 # scores that the subsets of branch 0 need
        names = [name for layer in live for name in layer.branches]
        sizes = dict(zip(names, torch._foreach_abs([self._weights[name] for name in names]), strict=True)) if names else {}
        for layer in live:
            scores = [layer.reduce(sizes[name], "sum") for name in layer.branches]
            if shared:
                scores = [torch.stack(scores).sum(0)]
                joint |= {layer.branches[0]: scores[0]} if self._subset else {}
            for name, score in zip(layer.branches, scores, strict=False):
                pruned[name] = prune(self.masks[name], score, self.rate, self._alive[name])
        left = dict(zip(pruned, _read([mask.sum() for mask in pruned.values()]), strict=True))
        after: dict[str, Tensor] = {}
        for layer in live:
            for name in layer.branches:
                first = layer.branches[0]
                if name in pruned:
                    dead = pruned[name].numel() - left[name]
                    after[name] = grow(pruned[name], self._alive[name] - left[name], self._growth, self._generator, dead)
                elif self._subset:
                    after[name] = subset_update(self.masks[name], self.masks[first], pruned[first], after[first],
                                                joint[first], self.rate, self._generator)
                else:
                    after[name] = after[first]
        return after

    def _change(self, before: dict[str, Tensor], live: list[Layer]) -> dict[str, dict[str, float]]:
        """What an update did, by weight and by layer. Waits for the device once."""
        several = [layer for layer in live if len(layer.branches) > 1]
        stacks = [torch.stack([self.masks[name] for name in layer.branches]) for layer in several]
        counts = _read([mask.sum() for mask in self.masks.values()]
                       + [(mask > self.masks[name]).sum() for name, mask in before.items()]         # alive before, not now
                       + [part.sum() for stack in stacks for part in (stack.all(0), stack.any(0))])
        alive, lost, overlaps = counts[: len(before)], counts[len(before) : 2 * len(before)], counts[2 * len(before) :]
        old, self._alive = self._alive, dict(zip(before, alive, strict=True))
        lost = dict(zip(before, lost, strict=True))
        return {
            "density": {name: self._alive[name] / mask.numel() for name, mask in self.masks.items()},
            "removed": {name: self._per_entry(name) * lost[name] for name in before},
            "grown": {name: self._per_entry(name) * (self._alive[name] - old[name] + lost[name]) for name in before},
            "overlap": {layer.name: both / one if one else 1.0
                        for layer, both, one in zip(several, overlaps[::2], overlaps[1::2], strict=True)},
        }

    def _mask_shape(self, layer: Layer) -> torch.Size:
        shape = self._weights[layer.branches[0]].shape
        return torch.Size((*shape[:2], 1, 1)) if layer.per_filter else shape

    def _per_entry(self, name: str) -> int:
        """How many weights an entry of a mask stands for."""
        return self._weights[name].numel() // self.masks[name].numel()


def _leads() -> bool:
    """Whether this process decides: the only one, or rank 0."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def _agreed(masks: list[Tensor]) -> list[Tensor]:
    """Rank 0's masks, in all processes: one broadcast."""
    if not masks or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return masks
    flat = torch.cat([mask.flatten() for mask in masks]).to(torch.uint8)
    dist.broadcast(flat, src=0)
    return [part.view_as(mask) for part, mask in zip(flat.bool().split([mask.numel() for mask in masks]), masks, strict=True)]


def _read(counts: list[Tensor]) -> list[int]:
    """Numbers from the device, all at once."""
    return torch.stack(counts).tolist() if counts else []
