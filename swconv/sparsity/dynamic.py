"""Sparse training as the loop sees it: masks at the start, masks after every optimizer step."""

import logging
import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from swconv.sparsity.density import join_branches, ranked_densities, snip_scores
from swconv.sparsity.masks import OTHERS, Layer, draw, prune_and_grow, select_layers, subset_update

FINAL_PRUNE_RATE = 0.005
DENSE = 0.99  # a mask drawn at least this full is not used

_CHOICES = {
    "granularity": ("filter", "element"),
    "others": OTHERS,
    "scores": ("sum", "concat"),
    "growth": ("bernoulli", "exact"),
}
_log = logging.getLogger(__name__)


class SparseTraining:
    """Dynamic sparsity of SLaK (element-wise) and SW (per filter, over Rep branches).

    Call `initialise` once before the first step, or `load_state_dict` on resume; then `step` after every optimizer
    step (not after a step that a gradient scaler skipped).

    Parameters
    ----------
    model : nn.Module
        The bare network (no DistributedDataParallel around it); names as in `select_layers`.
    total_steps : int
        Optimizer steps of the whole run: the length of the cosine of the prune rate.
    seed : int
        Of the private generator of all mask draws.
    level : float
        Share of weights that is dead at the start, over each ranking.
    granularity : {"filter", "element"}
        Masks on the large kernels: per filter, with one SNIP ranking for the large kernels and one for the rest
        (SW); or element-wise, with one ranking for all (SLaK).
    others : {"none", "pointwise", "body", "all"}
        What else is sparse, element-wise; see `select_layers`.
    scores : {"sum", "concat"}
        SNIP scores of the Rep branches of a layer, see `join_branches`.
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
        By parameter name, on the device of the parameter. Layers that are dense from the start have none.
    steps : int
        Optimizer steps taken.

    Raises
    ------
    ValueError
        If an argument is out of range, or nothing in the model is to be sparse.

    Notes
    -----
    SLaK section 4 and appendix B; SW section 3 and Table 8. As published, SNIP gives only the density of each layer
    and the mask is random; gradients stay dense, so AdamW's moments of dead weights keep moving and are not reset;
    momentum of SGD is masked. Other than published: all branches are masked from the start (published: from the first
    step on), and the pointwise layers are updated at shared updates too (published: `rep_coarse` skips them there).
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
        scores: str = "sum",
        update_every: int = 100,
        prune_rate: float = 0.3,
        share_every: int = 1,
        subset: bool = False,
        growth: str = "bernoulli",
    ):
        given = {"granularity": granularity, "others": others, "scores": scores, "growth": growth}
        for key, value in given.items():
            if value not in _CHOICES[key]:
                raise ValueError(f"Sparse training needs {key} to be one of {', '.join(_CHOICES[key])}; got {value!r}.")
        if not (0 < level < 1 and 0 <= prune_rate < 1 and min(total_steps, update_every, share_every) >= 1):
            raise ValueError(
                "Sparse training needs 0 < level < 1, 0 <= prune_rate < 1, and total_steps, update_every and "
                f"share_every of at least 1; got {level=}, {prune_rate=}, {total_steps=}, {update_every=}, "
                f"{share_every=}. Leave the recipe's sparsity out (null) to train densely."
            )
        self.layers = select_layers(model, granularity, others)
        self.masks: dict[str, Tensor] = {}
        self.steps = 0
        self._model = model
        self._weights = {name: model.get_parameter(name) for layer in self.layers for name in layer.branches}
        self._generator = Generator().manual_seed(seed)
        self._ready = False
        self._total_steps = total_steps
        self._level = level
        self._joint = granularity == "element"
        self._scores = scores
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

    def initialise(self, images: Tensor, labels: Tensor) -> None:
        """Draw the masks from SNIP densities on one micro-batch, and mask the weights.

        Parameters
        ----------
        images : Tensor of shape (B, C, H, W)
        labels : int64 Tensor of shape (B,)
        """
        seed = int(torch.randint(2**63 - 1, (), generator=self._generator))
        scores = snip_scores(self._model, self._weights, images, labels, seed)
        rankings: dict[bool, dict[str, Tensor]] = defaultdict(dict)
        for layer in self.layers:
            parts = [layer.reduce(scores[name], "mean") for name in layer.branches]
            rankings[self._joint or layer.large_kernel][layer.name] = join_branches(parts, self._scores)
        densities: dict[str, float] = {}
        for ranking in rankings.values():
            densities |= ranked_densities(ranking, self._level)
        self.masks = {}
        for layer in self.layers:
            mask = draw(self._mask_shape(layer), densities[layer.name], self._generator)
            share = _share(mask)
            _log.info("%s: SNIP density %.3f, drawn %.3f", layer.name, densities[layer.name], share)
            if share == 0:
                _log.warning("%s starts with an empty mask, and no update will grow it", layer.name)
            if share < DENSE:
                for name in layer.branches:
                    self.masks[name] = mask.to(self._weights[name].device, copy=True)
        self._ready = True
        self._apply()

    @torch.no_grad()
    def step(self, optimizer: Optimizer) -> dict[str, Any] | None:
        """Mask the weights after an optimizer step; prune and grow when it is due.

        Returns
        -------
        dict or None
            None, or the log line of an update: step, rate, whether the branches shared it, density of each masked
            weight, weights (not filters) that went (`removed`) and came (`grown`) in all masks together (what was
            pruned and grew back counts in neither), and `overlap`, the Jaccard index of each layer's branch masks.

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
        before = self.masks
        shared = self.steps // self._update_every % self._share_every == 0
        live = [layer for layer in self.layers if layer.branches[0] in before]
        self.masks = {name: mask for layer in live for name, mask in self._updated(layer, shared).items()}
        self._apply(optimizer)
        return {
            "event": "prune",
            "step": self.steps,
            "rate": self.rate,
            "shared": shared,
            "density": {name: _share(mask) for name, mask in self.masks.items()},
            "removed": sum(self._count(name, mask & ~self.masks[name]) for name, mask in before.items()),
            "grown": sum(self._count(name, mask & ~before[name]) for name, mask in self.masks.items()),
            "overlap": {
                layer.name: _jaccard([self.masks[name] for name in layer.branches])
                for layer in live
                if len(layer.branches) > 1
            },
        }

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
        alive = sum(
            self._count(name, self.masks[name]) if name in self.masks else weight.numel()
            for name, weight in self._weights.items()
        )
        return alive / sum(weight.numel() for weight in self._weights.values())

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
        self.steps = state["steps"]
        self._generator.set_state(state["generator"].cpu())
        self._ready = True

    @torch.no_grad()
    def _apply(self, optimizer: Optimizer | None = None) -> None:
        for name, mask in self.masks.items():
            weight = self._weights[name]
            weight.mul_(mask)
            momentum = optimizer.state.get(weight, {}).get("momentum_buffer") if optimizer else None
            if momentum is not None:
                momentum.mul_(mask)

    def _updated(self, layer: Layer, shared: bool) -> dict[str, Tensor]:
        masks = {name: self.masks[name] for name in layer.branches}
        scores = {name: layer.reduce(self._weights[name].abs(), "sum") for name in layer.branches}
        change = {"rate": self.rate, "growth": self._growth, "generator": self._generator}
        if not shared:
            return {name: prune_and_grow(masks[name], scores[name], **change)[1] for name in layer.branches}
        base = masks[layer.branches[0]]
        score = torch.stack(list(scores.values())).sum(0)
        pruned, grown = prune_and_grow(base, score, **change)
        updated = {layer.branches[0]: grown}
        for name in layer.branches[1:]:
            updated[name] = (
                subset_update(masks[name], base, pruned, grown, score, self.rate, self._generator)
                if self._subset
                else grown.clone()
            )
        return updated

    def _mask_shape(self, layer: Layer) -> torch.Size:
        shape = self._weights[layer.branches[0]].shape
        return torch.Size((*shape[:2], 1, 1)) if layer.per_filter else shape

    def _count(self, name: str, mask: Tensor) -> int:
        """How many weights a mask, or a part of it, stands for."""
        return int(mask.sum()) * (self._weights[name].numel() // mask.numel())


def _share(mask: Tensor) -> float:
    return mask.sum().item() / mask.numel()


def _jaccard(masks: list[Tensor]) -> float:
    stacked = torch.stack(masks)
    union = stacked.any(0).sum().item()
    return stacked.all(0).sum().item() / union if union else 1.0
