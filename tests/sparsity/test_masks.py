import json
import math
from pathlib import Path

import pytest
import torch
from torch import Generator, nn, tensor

from swconv.sparsity.masks import SORTED, draw, grow, lowest, prune, select_layers, subset_update

GOLDEN_KEYS = json.loads((Path(__file__).parents[1] / "golden" / "state_dict_keys.json").read_text())


def mask_of(*bits):
    return tensor(bits, dtype=torch.bool)


def prune_and_grow(mask, score, rate, growth, generator):
    """An update of one mask: the pruned one and the final one."""
    pruned = prune(mask, score, rate)
    return pruned, grow(pruned, int(mask.sum()) - int(pruned.sum()), growth, generator)


def network(shapes):
    """A module tree on the meta device that has the given weights."""
    root = nn.Module()
    for name, shape in shapes.items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(leaf, nn.Parameter(torch.empty(shape, device="meta")))
    return root


def official(model):
    return network({name: shape for name, shape in dict(GOLDEN_KEYS[model]).items() if len(shape) in (1, 2, 4)})


def weights_in(model, layers):
    return sum(model.get_parameter(name).numel() for layer in layers for name in layer.branches)


def test_official_sw_tiny_has_87510_filters_in_27_layers_of_two_branches():
    model = official("SW_v2_tiny")
    layers = select_layers(model, "filter", "none")
    assert len(layers) == 27
    assert {len(layer.branches) for layer in layers} == {2}
    assert layers[0].branches == tuple(f"stages.0.0.large_kernel.LoRAs.{i}.weight" for i in (0, 1))
    assert weights_in(model, layers) == 2 * 9 * 87_510


def test_pointwise_adds_two_element_wise_layers_per_block():
    added = [layer for layer in select_layers(official("SW_v2_tiny"), "filter", "pointwise") if not layer.large_kernel]
    assert [layer.name for layer in added[:2]] == ["stages.0.0.pwconv1.1.weight", "stages.0.0.pwconv2.0.weight"]
    assert len(added) == 54
    assert not any(layer.per_filter for layer in added)


def test_body_adds_everything_but_stem_and_downsampling():
    model = official("SW_v1_tiny_x1.3")
    names = {layer.name for layer in select_layers(model, "filter", "body")}
    every = {layer.name for layer in select_layers(model, "filter", "all")}
    assert "head.weight" in names
    assert every - names == {"downsample_layers.0.0.weight"} | {f"downsample_layers.{i}.1.weight" for i in (1, 2, 3)}


def test_all_weights_of_slak_tiny_are_the_50576524_of_the_paper():
    model = official("SLaK_tiny_x1.3")
    layers = select_layers(model, "element", "all")
    assert weights_in(model, layers) == 50_576_524
    assert sum(layer.large_kernel for layer in layers) == 2 * 18      # two strips per block, not the 5x5


def test_scales_of_grn_are_never_masked():
    names = {layer.name for layer in select_layers(official("SW_v2_tiny"), "element", "all")}
    assert not any("act" in name for name in names)


def test_layers_of_our_own_models_are_found():
    shapes = {"stem.0.weight": (4, 1, 4, 4), "stages.1.downsample.1.weight": (4, 4, 2, 2), "head.weight": (3, 4)}
    shapes |= {f"stages.1.blocks.0.mixer.filters.{i}": (12, 1, 3, 3) for i in (0, 1)}
    layers = select_layers(network(shapes), "filter", "body")
    assert {(layer.name, len(layer.branches)) for layer in layers} == {
        ("head.weight", 1),
        ("stages.1.blocks.0.mixer.filters", 2),
    }


def test_a_network_in_which_nothing_is_to_be_sparse_is_refused():
    with pytest.raises(ValueError, match="got none in Linear"):
        select_layers(nn.Linear(2, 2), "filter", "none")


def test_a_network_without_large_kernels_has_its_other_layers():
    layers = select_layers(nn.Sequential(nn.Linear(2, 2)), "filter", "all")
    assert [(layer.name, layer.large_kernel, layer.per_filter) for layer in layers] == [("0.weight", False, False)]


def test_prune_kills_the_dead_and_a_rounded_up_share_of_the_living():
    mask = mask_of(1, 0, 1, 1, 0, 1, 1, 1)                            # 6 alive: ceil(0.3 * 6) = 2 die
    score = tensor([5.0, 0, 1, 4, 0, 2, 6, 3])
    assert torch.equal(prune(mask, score, 0.3), mask_of(1, 0, 0, 1, 0, 0, 1, 1))


def test_living_entries_of_score_zero_die_after_the_dead_and_in_order():
    mask = mask_of(1, 1, 1, 0, 0)                                     # k = 2 + ceil(0.5 * 3) = 4
    assert torch.equal(prune(mask, torch.zeros(5), 0.5), mask_of(0, 0, 1, 0, 0))


def test_a_dead_entry_that_another_branch_uses_costs_a_living_one():
    mask = mask_of(1, 1, 1, 0)                                        # k = 1 + ceil(0.3 * 3) = 2
    assert torch.equal(prune(mask, tensor([1.0, 2, 3, 10]), 0.3), mask_of(0, 0, 1, 0))


@pytest.mark.parametrize("rate", [0.0, 0.9])
@pytest.mark.parametrize("growth", ["bernoulli", "exact"])
def test_an_empty_mask_stays_empty(rate, growth):
    empty = torch.zeros(4, dtype=torch.bool)
    assert not prune_and_grow(empty, torch.zeros(4), rate, growth, Generator())[1].any()


@pytest.mark.parametrize("growth", ["bernoulli", "exact"])
def test_growth_keeps_the_living_and_fills_all_places_when_all_are_asked_for(growth):
    mask = mask_of(1, 0, 0, 1)
    assert grow(mask, 2, growth, Generator()).all()
    assert grow(torch.ones(4, dtype=torch.bool), 0, growth, Generator()).all()


def test_bernoulli_density_is_a_martingale_with_the_predicted_deviation():
    generator = Generator().manual_seed(0)
    start = torch.arange(200).view(200, 1, 1, 1) < 140                # 42 die, then each of 102 lives with p = 42/102
    score = torch.rand(start.shape, generator=generator) * start
    alive = torch.stack([
        prune_and_grow(start, score, 0.3, "bernoulli", generator)[1].sum().double() for _ in range(1500)
    ])
    deviation = math.sqrt(42 * (1 - 42 / 102))
    assert abs(alive.mean() - 140) < 4 * deviation / math.sqrt(1500)
    assert abs(alive.std() / deviation - 1) < 4 / math.sqrt(2 * 1500)


def drift(filters, steps, every, growth, networks=100):
    """Standard deviation of a layer's density at the end of a training in which only its mask moves, from 30 % dead."""
    generator = Generator().manual_seed(0)
    rates = [0.005 + 0.295 * (1 + math.cos(math.pi * step / steps)) / 2 for step in range(every, steps + 1, every)]
    ends = []
    for _ in range(networks):
        mask = torch.arange(filters) >= 0.3 * filters
        for rate in rates:
            mask = prune_and_grow(mask, torch.rand(filters, generator=generator) * mask, rate, growth, generator)[1]
        ends.append(mask.double().mean())
    return torch.stack(ends).std().item()


# Our own prediction by counts; the released networks of 300 epochs spread as wide (SW Figure 5 (a): 0.10 in stage 3).
@pytest.mark.parametrize(("filters", "predicted"), [(1020, 0.04), (2074, 0.03), (3936, 0.02), (2460, 0.02)])
def test_bernoulli_growth_drifts_little_in_18_updates(filters, predicted):
    assert drift(filters, 37440, 2000, "bernoulli") == pytest.approx(predicted, abs=0.005 + 0.2 * predicted)


@pytest.mark.parametrize(("steps", "predicted"), [(37440, 0.15), (93600, 0.23)])
def test_bernoulli_growth_drifts_far_in_an_update_every_hundred_steps(steps, predicted):
    found = drift(1020, steps, 100, "bernoulli", networks=40)
    assert found == pytest.approx(predicted, abs=0.005 + 3 * predicted / math.sqrt(2 * 40))
    assert found > 2.5 * 0.04


def test_exact_growth_does_not_drift_though_its_masks_move():
    assert drift(1020, 37440, 100, "exact", networks=2) == 0
    mask = torch.arange(200) < 140
    pruned, grown = prune_and_grow(mask, torch.rand(200) * mask, 0.3, "exact", Generator().manual_seed(0))
    assert grown.sum() == 140
    assert not torch.equal(grown, mask)
    assert (grown & ~pruned).sum() == 42


@pytest.mark.parametrize("count", [0, 1, 57, 99, 100])
@pytest.mark.parametrize("times", [1, SORTED // 25])                  # on both sides of SORTED
def test_the_lowest_are_the_first_of_a_stable_order(count, times):
    values = torch.randint(0, 9, (100 * times,), generator=Generator().manual_seed(0)).float()
    wanted = torch.zeros(100 * times, dtype=torch.bool)
    wanted[values.argsort(stable=True)[: count * times]] = True
    assert torch.equal(lowest(values, count * times), wanted)


def test_a_drawn_mask_has_its_density():
    assert draw((200, 50), 0.3, Generator().manual_seed(0)).double().mean().item() == pytest.approx(0.3, abs=0.02)


def test_subset_prunes_five_thirds_in_the_shared_order_and_copies_five_sevenths_of_the_growth():
    base = torch.arange(1010) >= 10                                   # 10 dead, 1000 alive
    score = torch.arange(1010.0) * base
    pruned = prune(base, score, 0.3)                                  # 310 and up live on
    grown = pruned | (torch.arange(1010) < 300)
    after = subset_update(base, base, pruned, grown, score, 0.3, Generator().manual_seed(0))
    assert torch.equal(after[300:], torch.arange(300, 1010) >= 510)   # 10 dead + ceil(5/3 * 0.3 * 1000)
    assert after[:300].double().mean().item() == pytest.approx(5 / 7, abs=0.1)


def test_subset_drops_what_branch_zero_dropped_even_when_it_has_little_to_prune():
    base = torch.ones(10, dtype=torch.bool)
    mask = torch.arange(10) < 3
    score = torch.arange(10.0)
    pruned = prune(base, score, 0.5)                                  # 0 to 4 die; this branch alone would drop 3 * 5/6
    assert not subset_update(mask, base, pruned, pruned, score, 0.5, Generator()).any()
