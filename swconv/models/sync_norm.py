"""BatchNorm over the batches of all processes, on CPU as on CUDA."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

MAP = (0, 2, 3)                                                       # what a channel's statistics run over


class SyncBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d of the concatenated batch of all processes; `torch.nn.SyncBatchNorm` refuses CPU tensors.

    In evaluation, without a process group and with a single process it is `nn.BatchNorm2d`. Every process of the group
    has to train at the same time; their batch sizes may differ, a process without images included.

    Parameters
    ----------
    *args, **kwargs
        Of `nn.BatchNorm2d`.
    process_group : ProcessGroup, optional
        Processes that share statistics; None is the default group, looked up at every call.

    Raises
    ------
    ValueError
        When all processes together hold fewer than two values per channel.

    Notes
    -----
    Input and output have shape (B, C, H, W). Gradients of weight and bias are those of the process's own batch, which
    DistributedDataParallel averages; the gradient of the input is that of the sum of all processes' losses.
    """

    def __init__(self, *args, process_group: dist.ProcessGroup | None = None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.process_group = process_group

    def forward(self, x: Tensor) -> Tensor:
        shared = self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size(self.process_group) > 1
        if not shared:
            return super().forward(x)
        self._check_input_dim(x)
        count, mean, var = _moments(x, self.process_group)            # int, (C,), (C,)
        if self.track_running_stats:
            self._track(count, mean, var)
        return _Normalise.apply(x, self.weight, self.bias, count, mean, var, self.eps, self.process_group)

    @torch.no_grad()
    def _track(self, count: int, mean: Tensor, var: Tensor) -> None:
        self.num_batches_tracked += 1
        share = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        for running, new in ((self.running_mean, mean), (self.running_var, var * count / (count - 1))):
            running.lerp_(new.to(running.dtype), share)


def sync_batch_norms(model: nn.Module) -> nn.Module:
    """Let every BatchNorm2d of a model see the batches of all processes.

    Parameters
    ----------
    model : nn.Module
        Changed in place, on the device it trains on: a norm becomes `SyncBatchNorm2d` on the CPU, `nn.SyncBatchNorm` on
        CUDA. Parameters, buffers, their names, mode and hooks stay.

    Returns
    -------
    nn.Module
        The model.

    Raises
    ------
    TypeError
        For a subclass of `nn.BatchNorm2d`, whose forward could do more than normalise.
    """
    norms = {name: norm for name, norm in model.named_modules()
             if isinstance(norm, nn.BatchNorm2d) and not isinstance(norm, SyncBatchNorm2d)}
    for name, norm in norms.items():
        if type(norm) is not nn.BatchNorm2d:
            raise TypeError(
                f"sync_batch_norms needs plain nn.BatchNorm2d, got {type(norm).__name__} at {name!r}. "
                "Convert it by hand, or build the model with nn.BatchNorm2d."
            )
    for norm in norms.values():
        # Same state, another forward: with the class alone changed, every reference to the norm stays good.
        norm.__class__ = nn.SyncBatchNorm if _on_cuda(norm) else SyncBatchNorm2d
        norm.process_group = None
    return model


def _on_cuda(module: nn.Module) -> bool:
    return any(tensor.is_cuda for tensor in (*module.parameters(), *module.buffers()))


@torch.no_grad()
def _moments(x: Tensor, group: dist.ProcessGroup | None) -> tuple[int, Tensor, Tensor]:
    """Values per channel, mean and biased variance over the group, float64, bit for bit the same on every process.

    Every process sends its count n, mean and sum of squared deviations m2. They are combined as Chan et al. (1979) do:
    var = sum(m2 + n (mean_p - mean)^2) / sum(n), which never subtracts large numbers.
    """
    wide = x.double()
    n = x.numel() // x.shape[1]
    mean = wide.sum(MAP) / max(n, 1)
    m2 = (wide - mean[:, None, None]).square().sum(MAP)
    own = torch.cat([mean.new_tensor([n]), mean, m2])                 # (1 + 2 C,)

    # A process writes its own row only: the sum over processes is the table of all rows, exactly.
    table = own.new_zeros(dist.get_world_size(group), len(own))       # (P, 1 + 2 C)
    table[dist.get_rank(group)] = own
    dist.all_reduce(table, group=group)

    counts, means, m2s = table.split([1, x.shape[1], x.shape[1]], dim=1)
    count = int(counts.sum())
    if count < 2:
        raise ValueError(
            f"SyncBatchNorm2d needs at least 2 values per channel over all processes to train, got {count}. "
            "Give it a larger batch, or call eval()."
        )
    mean = (counts * means).sum(0) / count
    return count, mean, (m2s + counts * (means - mean).square()).sum(0) / count


class _Normalise(torch.autograd.Function):
    """weight * (x - mean) / sqrt(var + eps) + bias, whose backward knows that mean and var came from all processes."""

    @staticmethod
    def forward(ctx, x, weight, bias, count, mean, var, eps, group):
        ctx.save_for_backward(x, weight, mean, var)
        ctx.count, ctx.eps, ctx.group = count, eps, group
        dtype = _work_dtype(x)
        return F.batch_norm(x, mean.to(dtype), var.to(dtype), weight, bias, eps=eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight, mean, var = ctx.saved_tensors
        dtype = _work_dtype(x)
        scale = (var + ctx.eps).rsqrt()                               # (C,)
        normal = (x.to(dtype) - _per_channel(mean, dtype)) * _per_channel(scale, dtype)
        grad = grad.to(dtype)
        sums = torch.stack([(grad * normal).sum(MAP, dtype=torch.float64), grad.sum(MAP, dtype=torch.float64)])
        grad_weight, grad_bias = (None, None) if weight is None else sums.to(weight.dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            sums = sums.clone()
            dist.all_reduce(sums, group=ctx.group)
            tilt, shift = sums / ctx.count                            # (C,), (C,)
            scale = scale if weight is None else scale * weight
            grad_x = grad - _per_channel(shift, dtype) - normal * _per_channel(tilt, dtype)
            grad_x = (grad_x * _per_channel(scale, dtype)).to(x.dtype)
        return grad_x, grad_weight, grad_bias, None, None, None, None, None


def _work_dtype(x: Tensor) -> torch.dtype:
    """What the map is computed in: float32 for half precision, else its own."""
    return torch.promote_types(x.dtype, torch.float32)


def _per_channel(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.to(dtype)[:, None, None]                            # (C,) -> (C, 1, 1)
