import copy
import io
import math
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from swconv.sparsity import SparseTraining, dynamic
from swconv.sparsity.density import snip_scores

SETTINGS = {"total_steps": 36, "seed": 5, "level": 0.4, "update_every": 2, "prune_rate": 0.3}


class LargeKernel(nn.Module):
    def __init__(self, channels, taps, branches):
        super().__init__()
        self.LoRAs = nn.ModuleList(
            nn.Conv2d(channels, channels * taps, 3, padding=1, groups=channels, bias=False) for _ in range(branches)
        )

    def forward(self, x):
        return sum(conv(x) for conv in self.LoRAs).unflatten(1, (x.shape[1], -1)).sum(2)


class Block(nn.Module):
    def __init__(self, channels, branches):
        super().__init__()
        self.large_kernel = LargeKernel(channels, 5, branches)
        self.norm = nn.BatchNorm2d(channels)
        self.pwconv1 = nn.Linear(channels, 4 * channels)
        self.pwconv2 = nn.Linear(4 * channels, channels)
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        y = self.norm(self.large_kernel(x)).permute(0, 2, 3, 1)
        return x + self.drop(self.pwconv2(self.pwconv1(y).relu())).permute(0, 3, 1, 2)


class Net(nn.Module):
    def __init__(self, branches=2):
        super().__init__()
        self.downsample_layers = nn.ModuleList([nn.Sequential(nn.Conv2d(1, 12, 4, stride=4))])
        self.stages = nn.ModuleList([nn.Sequential(Block(12, branches), Block(12, branches))])
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        return self.head(self.stages[0](self.downsample_layers[0](x)).mean((2, 3)))


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 1, 16, 16, generator=generator), torch.arange(8) % 3


def build(branches=2, optimizer="adamw", **settings):
    torch.manual_seed(0)
    net = Net(branches)
    kinds = {
        "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
        "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    }
    return net, kinds[optimizer](net.parameters()), SparseTraining(net, **{**SETTINGS, **settings})


def train(net, optimizer, sparsity, steps):
    """Take the given steps; return the log lines of the updates among them."""
    records = []
    for step in steps:
        torch.manual_seed(step)
        images, labels = batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()
        records.append(sparsity.step(optimizer))
    return [record for record in records if record]


def started(**settings):
    net, optimizer, sparsity = build(**settings)
    sparsity.initialise(*batch(99))
    return net, optimizer, sparsity


def branch_masks(sparsity, block=0):
    return [mask for name, mask in sparsity.masks.items() if name.startswith(f"stages.0.{block}.large_kernel")]


@pytest.mark.parametrize("granularity", ["filter", "element"])
@pytest.mark.parametrize("scores", ["sum", "concat"])
def test_initial_density_is_near_the_level_asked_for(granularity, scores):
    net, _, sparsity = started(granularity=granularity, scores=scores)
    assert sparsity.density() == pytest.approx(0.6, abs=0.06)
    nonzero = sum(int(net.get_parameter(name).count_nonzero()) for name in sparsity.masks)
    total = sum(net.get_parameter(name).numel() for name in sparsity.masks)
    assert sparsity.density() == pytest.approx(nonzero / total)


def test_density_of_filters_comes_from_the_mean_score_over_their_weights():
    net, _, sparsity = build(branches=1, others="none", level=0.3)
    net.stages[0][0].drop.p = net.stages[0][1].drop.p = 0.0
    names = [f"stages.0.{block}.large_kernel.LoRAs.0.weight" for block in (0, 1)]
    with torch.no_grad():
        net.get_parameter(names[0]).mul_(torch.arange(9).view(3, 3) == 4)    # 8 of 9 weights score 0
    means = torch.cat([score.mean((2, 3)) for score in snip_scores(net, names, *batch(99), seed=0).values()])
    weakest_kept = means.flatten().sort(descending=True).values[int(0.7 * 120) - 1]
    density = (means[:60] > weakest_kept).double().mean().item()
    sparsity.initialise(*batch(99))
    drawn = sparsity.masks[names[0]].double().mean().item()
    assert drawn == pytest.approx(density, abs=3 * math.sqrt(density * (1 - density) / 60))


def test_branches_start_from_one_mask_of_whole_filters():
    _, _, sparsity = started(branches=4)
    masks = branch_masks(sparsity)
    assert len(masks) == 4
    assert masks[0].shape == (60, 1, 1, 1)
    assert all(torch.equal(mask, masks[0]) for mask in masks[1:])


@pytest.mark.parametrize(("granularity", "alone"), [("filter", True), ("element", False)])
def test_filters_are_ranked_among_themselves_and_elements_with_all_others(granularity, alone):
    name = "stages.0.0.large_kernel.LoRAs.0.weight"                   # drawn first: equal density means equal mask
    masks = [started(granularity=granularity, others=others)[2].masks[name] for others in ("none", "body")]
    assert torch.equal(*masks) == alone


def test_a_layer_that_snip_keeps_whole_stays_dense():
    net, optimizer, sparsity = build(others="none", branches=1, level=0.4)
    with torch.no_grad():
        net.stages[0][1].large_kernel.LoRAs[0].weight.mul_(1e-6)      # with a large eps, scores below those of block 0
        net.stages[0][1].norm.eps = 1.0
    sparsity.initialise(*batch(99))                                   # keeps 72 of 120 filters: 60 in block 0
    assert [name.split(".")[2] for name in sparsity.masks] == ["1"]
    dense = net.stages[0][0].large_kernel.LoRAs[0].weight
    train(net, optimizer, sparsity, range(2))
    assert dense.count_nonzero() == dense.numel()
    assert sparsity.density() == pytest.approx(0.6, abs=0.06)


def test_a_layer_that_snip_empties_stays_empty_and_is_named(caplog):
    net, optimizer, sparsity = build(others="none", branches=1, level=0.6)
    with torch.no_grad():
        net.stages[0][1].large_kernel.LoRAs[0].weight.mul_(1e-6)
        net.stages[0][1].norm.eps = 1.0
    sparsity.initialise(*batch(99))                                   # keeps 48 of 120 filters, all in block 0
    train(net, optimizer, sparsity, range(4))
    assert not net.stages[0][1].large_kernel.LoRAs[0].weight.any()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "stages.0.1.large_kernel.LoRAs starts with an empty mask" in caplog.text


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_masked_weights_are_exactly_zero_after_every_step(optimizer):
    net, optimizer, sparsity = started(optimizer=optimizer)
    for step in range(8):
        train(net, optimizer, sparsity, [step])
        for name, mask in sparsity.masks.items():
            assert not (net.get_parameter(name) * ~mask).any()
            momentum = optimizer.state[net.get_parameter(name)].get("momentum_buffer")
            assert momentum is None or not (momentum * ~mask).any()


@pytest.mark.parametrize("granularity", ["filter", "element"])
def test_masked_weights_stay_exactly_zero_under_bfloat16_autocast(granularity):
    net, optimizer, sparsity = started(granularity=granularity, prune="magnitude_sum")
    start = dict(sparsity.masks)
    for step in range(6):
        optimizer.zero_grad()
        images, labels = batch(step)
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
        sparsity.step(optimizer)
        for name, mask in sparsity.masks.items():
            weight = net.get_parameter(name)
            assert weight.dtype == torch.float32
            assert (weight[(~mask).expand_as(weight)] == 0).all()
            assert (weight != 0).any()
    assert any(not torch.equal(mask, start[name]) for name, mask in sparsity.masks.items())


@pytest.mark.parametrize("fused", [False, True])                      # a fused optimizer is called even where it is to skip
def test_a_step_that_the_scaler_skips_moves_neither_weights_nor_masks(fused):
    net, _, sparsity = started(update_every=1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, fused=fused)
    scaler, taken = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=100), []
    for step in range(4):
        optimizer.zero_grad()
        images, labels = batch(step)
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(net(images), labels)
        scaler.scale(loss * (math.inf if step == 1 else 1)).backward()
        before = scaler.get_scale(), sparsity.masks, {name: p.clone() for name, p in net.named_parameters()}
        scaler.step(optimizer)
        scaler.update()
        taken.append(scaler.get_scale() >= before[0])
        if taken[-1]:
            sparsity.step(optimizer)
        else:
            assert all(torch.equal(parameter, before[2][name]) for name, parameter in net.named_parameters())
            assert sparsity.masks is before[1]
        assert all((net.get_parameter(name) * ~mask == 0).all() for name, mask in sparsity.masks.items())
    assert (taken, sparsity.steps) == ([True, False, True, True], 3)


def test_the_average_follows_the_formula_of_slak():
    """(0.9 a + 0.1 w) M, and w itself where M = 1 and a = 0: written out from SLaK's code for one weight after an update."""
    net, optimizer, sparsity = started()
    average = copy.deepcopy(net)
    name = next(iter(sparsity.masks))
    for step in range(6):
        train(net, optimizer, sparsity, [step])
        weight, mask, old = net.get_parameter(name), sparsity.masks[name], average.get_parameter(name).clone()
        plain = 0.9 * average.head.bias + 0.1 * net.head.bias

        def update():
            with torch.no_grad():
                for own, new in zip(average.parameters(), net.parameters(), strict=True):
                    own.lerp_(new, 0.1)

        sparsity.average(average, update)
        wanted = (0.9 * old + 0.1 * weight) * mask + 0.9 * weight * (mask & (old == 0))
        torch.testing.assert_close(average.get_parameter(name), wanted)
        torch.testing.assert_close(average.head.bias, plain)


def test_moments_of_dead_weights_keep_moving_in_adamw():
    net, optimizer, sparsity = started()
    train(net, optimizer, sparsity, range(1))
    name, mask = next(iter(sparsity.masks.items()))
    assert (optimizer.state[net.get_parameter(name)]["exp_avg"] * ~mask).any()


@pytest.mark.parametrize(("gap", "shared"), [(1, 18), (3, 6), (5, 3), (131, 0)])
def test_eighteen_updates_share_masks_as_often_as_the_gap_says(gap, shared):
    net, optimizer, sparsity = started(share_every=gap)
    records = train(net, optimizer, sparsity, range(36))
    assert [record["step"] for record in records] == list(range(2, 37, 2))
    assert [record["shared"] for record in records] == [j % gap == 0 for j in range(1, 19)]
    assert sum(record["shared"] for record in records) == shared
    assert all(overlap == 1 for record in records if record["shared"] for overlap in record["overlap"].values())
    assert gap == 1 or max(records[0]["overlap"].values()) < 1


def test_prune_rate_is_a_cosine_to_five_thousandths():
    _, _, sparsity = build(prune_rate=0.5)
    rates = []
    for sparsity.steps in (0, 18, 36):
        rates.append(sparsity.rate)
    assert rates == pytest.approx([0.5, 0.2525, 0.005])


def test_by_magnitude_every_branch_is_pruned_by_its_own_weights():
    settings = {"granularity": "element", "others": "none", "prune": "magnitude", "growth": "exact", "total_steps": 10**9}
    net, optimizer, sparsity = started(**settings)
    train(net, optimizer, sparsity, range(1))
    first, second = (conv.weight for conv in net.stages[0][0].large_kernel.LoRAs)
    alive = branch_masks(sparsity)[0].flatten().nonzero().flatten()
    ramp = torch.linspace(0.1, 5, len(alive))
    with torch.no_grad():
        first.flatten()[alive], second.flatten()[alive] = ramp, ramp.flip(0)      # their sum is the same everywhere
    sparsity.steps = 1
    optimizer.zero_grad()
    record = sparsity.step(optimizer)
    died = math.ceil(0.3 * len(alive))
    assert not record["shared"]
    assert branch_masks(sparsity)[0].flatten()[alive[died:]].all()
    assert branch_masks(sparsity)[1].flatten()[alive[:-died]].all()
    assert not torch.equal(*branch_masks(sparsity))


def test_uniform_and_erk_need_no_batch_and_divide_one_level():
    _, _, uniform = build(density="uniform", granularity="element")
    uniform.initialise()
    for name, mask in uniform.masks.items():
        assert mask.double().mean().item() == pytest.approx(0.6, abs=4 * math.sqrt(0.24 / mask.numel())), name
    net, _, erk = build(density="erk", granularity="element", others="all")
    erk.initialise()
    shares = {name: mask.double().mean().item() for name, mask in erk.masks.items()}
    assert erk.density() == pytest.approx(0.6, abs=0.03)
    assert net.head.weight.count_nonzero() == net.head.weight.numel()             # 15 / 36 beside 60 / 576: dense
    assert shares["stages.0.0.large_kernel.LoRAs.0.weight"] > shares["stages.0.0.pwconv1.weight"]


def test_nonzero_takes_the_masks_of_trained_weights_branch_by_branch():
    net, optimizer, sparsity = started(share_every=3)
    train(net, optimizer, sparsity, range(4))
    assert not torch.equal(*branch_masks(sparsity))
    fine = SparseTraining(net, **SETTINGS | {"density": "nonzero", "prune_rate": 0.0})
    with torch.no_grad():
        for name, mask in sparsity.masks.items():
            net.get_parameter(name).add_((mask & (net.get_parameter(name) == 0)).float())    # else what just grew is lost
    fine.initialise()
    assert fine.masks.keys() == sparsity.masks.keys()
    assert all(torch.equal(mask, fine.masks[name]) for name, mask in sparsity.masks.items())


def test_nonzero_without_sparse_weights_is_refused():
    _, _, sparsity = build(density="nonzero")
    with pytest.raises(ValueError, match="needs sparse weights to start from, got none that are zero"):
        sparsity.initialise()


def test_shared_update_keeps_the_filters_that_are_strong_over_all_branches():
    net, optimizer, sparsity = started(others="none", growth="exact", total_steps=10**9)
    first, second = (conv.weight for conv in net.stages[0][0].large_kernel.LoRAs)
    train(net, optimizer, sparsity, range(1))
    alive = branch_masks(sparsity)[0].flatten().nonzero().flatten()
    with torch.no_grad():
        first[alive] = 1.0
        second[alive] = torch.linspace(5, 0.1, len(alive)).view(-1, 1, 1, 1)
    sparsity.steps = 1
    optimizer.zero_grad()
    record = sparsity.step(optimizer)
    died = math.ceil(0.3 * len(alive))
    assert all(mask.flatten()[alive[:-died]].all() for mask in branch_masks(sparsity))
    assert record["shared"]
    assert sum(record["removed"].values()) == sum(record["grown"].values()) > 0


@pytest.mark.parametrize("gap", [1, 3])
def test_subset_masks_lie_inside_branch_zero_after_shared_updates(gap):
    net, optimizer, sparsity = started(branches=4, subset=True, share_every=gap)
    shared = 0
    for step in range(36):
        for record in train(net, optimizer, sparsity, [step]):
            if not record["shared"]:
                continue
            shared += 1
            for block in (0, 1):
                base, *others = branch_masks(sparsity, block)
                assert not any((mask & ~base).any() for mask in others)
                assert all(mask.sum() < base.sum() for mask in others)
    assert shared == 18 // gap
    assert not torch.equal(*branch_masks(sparsity)[1:3])


def test_every_layers_removed_and_grown_add_up_to_its_change_of_density():
    net, optimizer, sparsity = started(share_every=3)
    for step in range(12):
        before = dict(sparsity.masks)
        for record in train(net, optimizer, sparsity, [step]):
            for name, mask in sparsity.masks.items():
                weights = net.get_parameter(name).numel()
                assert record["density"][name] == pytest.approx(mask.double().mean().item())
                assert record["removed"][name] == int((before[name] & ~mask).sum()) * weights // mask.numel()
                assert record["grown"][name] == int((mask & ~before[name]).sum()) * weights // mask.numel() > 0
            total = sum(net.get_parameter(name).numel() for name in sparsity.masks)
            assert sparsity.density() == pytest.approx(
                sum(net.get_parameter(name).numel() * share for name, share in record["density"].items()) / total)


class NoReads(TorchDispatchMode):
    """Refuses what makes a GPU wait: reading a number, and shapes that depend on one."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("growth", ["bernoulli", "exact"])
@pytest.mark.parametrize("gap", [1, 10])
def test_an_update_reads_the_device_twice_whatever_the_number_of_layers_and_other_steps_never(monkeypatch, growth, gap):
    _, optimizer, sparsity = started(growth=growth, share_every=gap)
    reads, read = [], dynamic._read
    monkeypatch.setattr(dynamic, "_read", lambda counts: reads.append(len(counts)) or read(counts))
    with NoReads():
        assert sparsity.step(optimizer) is None
        assert not reads
        assert sparsity.step(optimizer)["shared"] == (gap == 1)
        sparsity.density()
    assert len(reads) == 2


def test_pointwise_masks_move_at_shared_updates_too():
    net, optimizer, sparsity = started(share_every=1)
    name = "stages.0.0.pwconv1.weight"
    before = sparsity.masks[name]
    train(net, optimizer, sparsity, range(2))
    assert not torch.equal(before, sparsity.masks[name])


@pytest.mark.parametrize("growth", ["bernoulli", "exact"])
def test_resume_ends_bitwise_where_the_undisturbed_run_ends(growth):
    settings = {"growth": growth, "share_every": 3, "subset": True, "branches": 3}
    net, optimizer, sparsity = started(**settings)
    train(net, optimizer, sparsity, range(3))
    state = io.BytesIO()
    torch.save([copy.deepcopy(part.state_dict()) for part in (net, optimizer, sparsity)], state)
    records = train(net, optimizer, sparsity, range(3, 14))

    state.seek(0)
    resumed = build(**settings)
    for part, loaded in zip(resumed, torch.load(state, weights_only=True), strict=True):
        part.load_state_dict(loaded)
    assert train(*resumed, range(3, 14)) == records
    for name, weight in net.state_dict().items():
        assert torch.equal(weight, resumed[0].state_dict()[name])
    assert resumed[2].masks.keys() == sparsity.masks.keys()
    assert all(torch.equal(mask, resumed[2].masks[name]) for name, mask in sparsity.masks.items())


def test_seed_alone_decides_the_masks():
    masks = []
    for ambient, seed in [(1, 5), (2, 5), (1, 6)]:
        _, _, sparsity = build(seed=seed)
        torch.manual_seed(ambient)
        sparsity.initialise(*batch(99))
        masks.append(torch.cat([mask.flatten() for mask in sparsity.masks.values()]))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("growth", ["bernoulli", "exact"])
def test_no_global_generator_is_used_and_no_buffer_moves(growth):
    net, optimizer, sparsity = build(growth=growth, subset=True)
    buffers = {name: tensor.clone() for name, tensor in net.named_buffers()}
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    sparsity.initialise(*batch(99))
    assert all(torch.equal(buffers[name], tensor) for name, tensor in net.named_buffers())
    for _ in range(4):
        sparsity.step(optimizer)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (np.random.get_state()[1].tolist(), random.getstate())


def test_step_without_masks_is_refused():
    _, optimizer, sparsity = build()
    with pytest.raises(RuntimeError, match="initialise or load_state_dict"):
        sparsity.step(optimizer)


def test_masks_of_another_network_are_refused():
    _, _, sparsity = started(granularity="element")
    _, _, other = build()
    with pytest.raises(ValueError, match=r"LoRAs.0.weight has shape \(60, 1, 3, 3\), this run needs \(60, 1, 1, 1\)"):
        other.load_state_dict(sparsity.state_dict())
    _, _, narrower = build(others="none", granularity="element")
    with pytest.raises(ValueError, match=r"pwconv1.weight has shape \(48, 12\), this run needs no mask there"):
        narrower.load_state_dict(sparsity.state_dict())


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"growth": "exakt"}, "growth to be one of bernoulli, exact; got 'exakt'"),
        ({"others": "head"}, "others to be one of none, pointwise, body, all"),
        ({"level": 1.0}, "level=1.0"),
        ({"prune_rate": 1.0}, "prune_rate=1.0"),
        ({"share_every": 0}, "share_every=0"),
        ({"density": "snipe"}, "density to be one of snip, erk, uniform, nonzero"),
        ({"prune": "magnitude"}, "needs granularity element, share_every 1 and subset False"),
        ({"prune": "magnitude", "granularity": "element", "share_every": 3}, "share_every=3"),
    ],
)
def test_settings_out_of_range_are_named(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        build(**wrong)
