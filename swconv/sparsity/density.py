"""How dense each layer is at the start: SNIP scores ranked over the whole network, or ERK by shape."""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from swconv.models.sync_norm import SyncBatchNorm2d


def snip_scores(model: nn.Module, names: Iterable[str], images: Tensor, labels: Tensor, seed: int) -> dict[str, Tensor]:
    """Score every weight by what its removal would do to the loss of one micro-batch, to first order.

    The network runs in training mode, as in the published code, but as a copy: the buffers of `model` and the global
    random generators are as before. Its synchronised BatchNorms see this batch alone, so that one process may score
    while the others wait.

    Parameters
    ----------
    model : nn.Module
        The bare network (no DistributedDataParallel around it).
    names : iterable of str
        Parameters to score.
    images : Tensor of shape (B, C, H, W)
    labels : int64 Tensor of shape (B,)
        Hard labels: the loss is plain cross-entropy, without mixup and label smoothing.
    seed : int
        Of the drop-path and dropout draws of this one pass.

    Returns
    -------
    dict of str to Tensor
        abs(weight * gradient), of the shape of each weight.

    Notes
    -----
    Lee et al., SNIP (ICLR 2019), as SLaK section 4 uses it.
    """
    twin = copy.deepcopy(model).train()
    for module in twin.modules():
        if isinstance(module, (SyncBatchNorm2d, nn.SyncBatchNorm)):
            module.__class__ = nn.BatchNorm2d
    weights = {name: twin.get_parameter(name) for name in names}
    cuda = [images.device] if images.is_cuda else []
    with torch.random.fork_rng(devices=cuda), torch.enable_grad():
        torch.default_generator.manual_seed(seed)
        for device in cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        loss = nn.functional.cross_entropy(twin(images), labels)
        gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True, materialize_grads=True)
    return {
        name: (weight.detach() * gradient).abs()
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
    }


def join_branches(scores: Sequence[Tensor], how: str) -> Tensor:
    """Make the scores of one layer out of those of its Rep branches.

    Parameters
    ----------
    scores : sequence of Tensor of one shape (F, ...)
    how : {"sum", "concat"}
        Add them (SW Table 2, #11), or rank them side by side, shape (branches * F, ...): the layer's density is then
        the mean of the branches' densities (#15, the released code).
    """
    return torch.stack(list(scores)).sum(0) if how == "sum" else torch.cat(list(scores))


def ranked_densities(scores: Mapping[str, Tensor], level: float) -> dict[str, float]:
    """Give each layer the share of its scores that is among the best of all layers together.

    Parameters
    ----------
    scores : mapping of str to Tensor
        Scores of each layer, of any shape; one ranking is made over all of them.
    level : float
        Share of all scores to drop, 0 < level < 1.

    Returns
    -------
    dict of str to float
        Density of each layer: the share of its scores strictly above the int(n * (1 - level))-th best of all n.

    Raises
    ------
    ValueError
        If a score is not finite, or all are zero.
    """
    everything = torch.cat([score.flatten() for score in scores.values()])
    if not everything.isfinite().all() or not everything.any():
        found = "only zeros" if everything.isfinite().all() else "NaN or infinity"
        raise ValueError(
            f"SNIP needs finite gradients that are not all zero to rank {len(scores)} layers "
            f"({next(iter(scores))}, ...), got {found}. Check the first batch and the initial weights."
        )
    keep = max(1, int(everything.numel() * (1 - level)))
    threshold = everything.sort(descending=True).values[keep - 1]
    return {name: (score > threshold).double().mean().item() for name, score in scores.items()}


def erk_densities(shapes: Mapping[str, Sequence[int]], level: float) -> dict[str, float]:
    """Give each weight a density in proportion to sum(shape) / prod(shape): Erdos-Renyi with kernels.

    Parameters
    ----------
    shapes : mapping of str to sequence of int
        Shapes of the weights.
    level : float
        Share of all weights together to drop, 0 < level < 1.

    Returns
    -------
    dict of str to float
        Densities whose mean over all single weights is 1 - level; what would exceed 1 is dense, and the rest makes up.

    Notes
    -----
    Evci et al., RigL (ICML 2020), as SLaK offers it beside SNIP.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    raw = {name: sum(shape) / sizes[name] for name, shape in shapes.items()}
    budget, sparse = (1 - level) * sum(sizes.values()), set(shapes)
    while True:
        left = budget - sum(sizes[name] for name in shapes if name not in sparse)
        scale = left / sum(raw[name] * sizes[name] for name in shapes if name in sparse)
        top = max(raw[name] for name in sparse)
        if scale * top <= 1:
            return {name: scale * raw[name] if name in sparse else 1.0 for name in shapes}
        sparse -= {name for name in sparse if raw[name] == top}
