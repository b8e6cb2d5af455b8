"""Sparse training in two gloo processes: rank 0 decides, the masks are equal, and nothing waits for ever."""

import io
import warnings
from datetime import timedelta

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import multiprocessing
from torch.nn.parallel import DistributedDataParallel

import swconv.models  # noqa: F401
from swconv.models.sync_norm import sync_batch_norms
from swconv.sparsity import SparseTraining

SETTINGS = {"total_steps": 8, "seed": 5, "level": 0.4, "update_every": 2, "prune_rate": 0.3, "share_every": 2}


def _network():
    torch.manual_seed(0)
    return timm.create_model("sw_tiny", depths=(1, 1), dims=(8, 16), kernel_sizes=(13, 5), num_classes=4, layer_scale_init=1.0)


def _batch(rank, step):
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(4, 3, 32, 32, generator=generator), torch.arange(4)


def _train(model, rank, sparsity, steps):
    """Train on the process's own batches; return the log lines."""
    optimizer, events = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for step in steps:
        optimizer.zero_grad()
        images, labels = _batch(rank, step)
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        events.append(sparsity.step(optimizer))
    return events


def _process(rank, folder):
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2,
                            timeout=timedelta(seconds=60))
    sent, broadcast = [], dist.broadcast

    def counted(tensor, *args, **kwargs):
        sent.append(tensor.numel())
        return broadcast(tensor, *args, **kwargs)

    result = {}
    try:
        # Without DistributedDataParallel each process trains on its own gradients: the weights part, the masks must not.
        alone = _network()
        sparsity = SparseTraining(alone, **SETTINGS)
        dist.broadcast = counted
        sparsity.initialise(*_batch(rank, 99))
        result["sent"] = [len(sent)]
        events = []
        for step in range(8):
            events += _train(alone, rank, sparsity, [step])
            result["sent"].append(len(sent))
        dist.broadcast = broadcast
        result |= {"events": events, "masks": sparsity.masks, "weights": alone.state_dict()}

        model = sync_batch_norms(_network())
        sparsity = SparseTraining(model, **SETTINGS)
        wrapped = DistributedDataParallel(model)
        sparsity.initialise(*_batch(rank, 99))                        # rank 1 has synchronised norms, too, and must not wait
        _train(wrapped, rank, sparsity, range(4))
        state = io.BytesIO()
        torch.save([model.state_dict(), sparsity.state_dict()], state)
        state = [state.getvalue()]
        dist.broadcast_object_list(state)                             # as a checkpoint of rank 0 reaches every process
        straight = _train(wrapped, rank, sparsity, range(4, 8)), sparsity.masks, model.state_dict()
        model = sync_batch_norms(_network())
        wrapped, sparsity = DistributedDataParallel(model), SparseTraining(model, **SETTINGS)
        for part, loaded in zip((model, sparsity), torch.load(io.BytesIO(state[0]), weights_only=True), strict=True):
            part.load_state_dict(loaded)
        resumed = _train(wrapped, rank, sparsity, range(4, 8)), sparsity.masks
        result |= {"straight": straight, "resumed": resumed}
    finally:
        dist.destroy_process_group()
    torch.save(result, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gloo")
    multiprocessing.spawn(_process, args=(folder,), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def _equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_masks_are_bitwise_equal_though_gradients_and_weights_are_not(processes):
    first, second = processes
    assert not _equal(first["weights"], second["weights"])
    assert len(first["masks"]) == 8
    assert _equal(first["masks"], second["masks"])
    assert first["events"] == second["events"]
    assert all((result["weights"][name] * ~mask == 0).all() for result in processes for name, mask in result["masks"].items())


def test_masks_travel_once_at_the_start_and_once_at_every_update(processes):
    for result in processes:
        assert result["sent"] == [1, 1, 2, 2, 3, 3, 4, 4, 5]


def test_rank_0_scores_alone_and_all_weights_stay_equal_under_data_parallel_training(processes):
    first, second = processes
    assert _equal(first["straight"][1], second["straight"][1])
    assert _equal(first["straight"][2], second["straight"][2])


def test_rank_0s_state_resumes_every_process_where_it_was(processes):
    for result in processes:
        assert result["resumed"][0] == result["straight"][0]
        assert _equal(result["resumed"][1], result["straight"][1])
    assert processes[0]["straight"][0][1]["grown"]


def test_a_process_group_of_one_changes_nothing(tmp_path):
    masks = []
    for group in (False, True):
        if group:
            dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
        try:
            model = _network()
            sparsity = SparseTraining(model, **SETTINGS)
            sparsity.initialise(*_batch(0, 99))
            _train(model, 0, sparsity, range(4))
            masks.append(sparsity.masks)
        finally:
            if group:
                dist.destroy_process_group()
    assert _equal(*masks)
