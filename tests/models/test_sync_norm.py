"""BatchNorm over processes: two gloo processes with a part of the batch each are one process with the whole batch."""

import warnings
from contextlib import contextmanager
from datetime import timedelta

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import multiprocessing, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel

import swconv.models  # noqa: F401
from swconv.models.sync_norm import SyncBatchNorm2d, sync_batch_norms

CHANNELS = 3
# What one norm is asked: images per process, height and width, arguments.
CASES = {
    "half and half": ((4, 4), 5, {}),
    "3 + 5": ((3, 5), 5, {}),
    "a process without images": ((0, 4), 5, {}),
    "one value each": ((1, 1), 1, {}),
    "cumulative average": ((2, 3), 5, {"momentum": None}),
    "no running statistics": ((2, 3), 5, {"track_running_stats": False}),
    "no weight and bias": ((2, 3), 5, {"affine": False}),
}


def _norm(kind, **options):
    norm = kind(CHANNELS, dtype=torch.float64, **options)
    if norm.affine:
        with torch.no_grad():
            norm.weight.copy_(torch.tensor([0.5, -1.0, 2.0]))
            norm.bias.copy_(torch.tensor([1.0, 0.0, -3.0]))
    return norm


def _steps(norm, split, size, rank=None):
    """Two batches, the whole or one process's part: output and input gradient of the second, and the norm's state."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        x, probe = 3 + 2 * torch.randn(2, sum(split), CHANNELS, size, size, dtype=torch.float64, generator=generator)
        if rank is not None:
            x, probe = x.split(split)[rank], probe.split(split)[rank]
        x.requires_grad_()
        norm.zero_grad()
        y = norm(x)
        (y * probe).sum().backward()
    grads = {name: parameter.grad for name, parameter in norm.named_parameters()}
    return {"maps": torch.stack([y.detach(), x.grad]), "grads": grads, "buffers": dict(norm.named_buffers())}


def _network():
    torch.manual_seed(0)
    return timm.create_model("sw_tiny", depths=(1, 1), dims=(8, 16), kernel_sizes=(13, 5), num_classes=4,
                             layer_scale_init=1.0).double()


def _network_step(model, part=slice(None)):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(8, 3, 32, 32, dtype=torch.float64, generator=generator)
    F.cross_entropy(model(images[part]), (torch.arange(8) % 4)[part]).backward()


def _far_from_zero(split):
    return (1e4 + torch.randn(sum(split), CHANNELS, 5, 5, generator=torch.Generator().manual_seed(2))).split(split)


@contextmanager
def _gloo(rank, processes, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=processes,
                            timeout=timedelta(seconds=60))
    try:
        yield
    finally:
        dist.destroy_process_group()


def _process(rank, folder):
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    with _gloo(rank, 2, folder):
        result = {name: _steps(_norm(SyncBatchNorm2d, **options), split, size, rank)
                  for name, (split, size, options) in CASES.items()}

        exact = SyncBatchNorm2d(CHANNELS, momentum=1.0, affine=False, dtype=torch.float64)
        result["float32"] = exact(_far_from_zero((3, 5))[rank]).dtype, dict(exact.named_buffers())

        with pytest.raises(ValueError, match=r"at least 2 values per channel over all processes to train, got 1\."):
            exact(torch.ones(1 - rank, CHANNELS, 1, 1))

        if rank == 0:                                                 # a collective would wait for the other in vain
            evaluated = _norm(SyncBatchNorm2d).eval()
            result["eval"] = evaluated(_far_from_zero((3, 5))[0].double()).detach()

        model = DistributedDataParallel(sync_batch_norms(_network()))
        _network_step(model, slice(4 * rank, 4 * rank + 4))
        result["network"] = {"grads": {name: p.grad for name, p in model.module.named_parameters()},
                             "buffers": dict(model.module.named_buffers())}
        torch.save(result, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What each of two processes got."""
    folder = tmp_path_factory.mktemp("gloo")
    multiprocessing.spawn(_process, args=(folder,), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def _close(got, expected, tolerance=1e-12):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", CASES)
def test_parts_of_a_batch_give_what_the_whole_gives(processes, case):
    split, size, options = CASES[case]
    whole = _steps(_norm(nn.BatchNorm2d, **options), split, size)
    parts = [result[case] for result in processes]
    _close(torch.cat([part["maps"] for part in parts], dim=1), whole["maps"])
    _close({name: sum(part["grads"][name] for part in parts) for name in parts[0]["grads"]}, whole["grads"])
    for part in parts:
        _close(part["buffers"], whole["buffers"])


def test_float32_is_summed_in_float64(processes):
    whole = nn.BatchNorm2d(CHANNELS, momentum=1.0, affine=False, dtype=torch.float64)
    whole(torch.cat(_far_from_zero((3, 5))).double())
    for result in processes:
        dtype, buffers = result["float32"]
        assert dtype == torch.float32
        _close(buffers, dict(whole.named_buffers()))


def test_eval_is_batch_norm_of_the_own_part(processes):
    expected = _norm(nn.BatchNorm2d).eval()(_far_from_zero((3, 5))[0].double())
    assert torch.equal(processes[0]["eval"], expected)


def test_sw_network_under_ddp_has_the_gradients_of_one_process(processes):
    model = _network()
    _network_step(model)
    for result in processes:
        _close(result["network"]["grads"], {name: p.grad for name, p in model.named_parameters()}, 1e-10)
        _close(result["network"]["buffers"], dict(model.named_buffers()))


def _assert_is_batch_norm():
    plain, synced = (_steps(_norm(kind), (3, 5), 5) for kind in (nn.BatchNorm2d, SyncBatchNorm2d))
    torch.testing.assert_close(synced, plain, rtol=0, atol=0)


def test_without_a_process_group_it_is_batch_norm():
    _assert_is_batch_norm()


def test_one_process_is_batch_norm(tmp_path):
    with _gloo(0, 1, tmp_path):
        _assert_is_batch_norm()


def test_conversion_keeps_keys_tensors_and_mode():
    model = _network()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    model.get_submodule(names[0]).eval()
    before, modes = model.state_dict(keep_vars=True), [module.training for module in model.modules()]
    assert sync_batch_norms(model) is model
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[key] is before[key] for key in before)
    assert [module.training for module in model.modules()] == modes
    assert len(names) == 2 * 3 + 2 + 2                                # branch norms, norm, norm_out of two blocks
    assert {type(model.get_submodule(name)) for name in names} == {SyncBatchNorm2d}


def test_a_norm_used_twice_stays_one_norm():
    norm = nn.BatchNorm2d(CHANNELS)
    model = sync_batch_norms(nn.Sequential(norm, nn.ReLU(), norm))
    assert model[0] is model[2]
    assert type(model[0]) is SyncBatchNorm2d


def test_on_cuda_the_norm_is_that_of_torch():
    with FakeTensorMode():
        model = sync_batch_norms(nn.Sequential(nn.BatchNorm2d(CHANNELS, device="cuda")))
    assert type(model[0]) is nn.SyncBatchNorm
    assert model[0].process_group is None


def test_a_subclass_is_named_and_nothing_is_changed():
    model = nn.Sequential(nn.BatchNorm2d(CHANNELS), timm.layers.BatchNormAct2d(CHANNELS))
    with pytest.raises(TypeError, match=r"got BatchNormAct2d at '1'\. Convert it by hand"):
        sync_batch_norms(model)
    assert type(model[0]) is nn.BatchNorm2d
