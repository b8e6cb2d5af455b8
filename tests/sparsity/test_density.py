import random

import numpy as np
import pytest
import torch
from torch import nn

from swconv.sparsity.density import erk_densities, join_branches, ranked_densities, snip_scores


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        return self.head(self.drop(self.bn(self.conv(x)).relu().mean((2, 3))))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 1, 8, 8, generator=generator), torch.arange(6) % 3


def test_density_is_the_share_strictly_above_the_last_kept_score():
    scores = {"a": torch.tensor([5.0, 4, 3, 2]), "b": torch.tensor([[6.0, 1], [0.5, 0.1]])}
    assert ranked_densities(scores, 0.5) == {"a": 0.5, "b": 0.25}    # the 4th best, 3, is not above itself


def test_summed_scores_starve_the_weak_layer_and_concatenated_ones_do_not():
    strong = torch.tensor([4.0, 1.5]), torch.tensor([1.0, 4.0])
    weak = torch.tensor([3.0, 3.2]), torch.tensor([0.1, 0.0])
    density = {
        how: ranked_densities({"strong": join_branches(strong, how), "weak": join_branches(weak, how)}, 0.25)
        for how in ("sum", "concat")
    }
    assert density["sum"] == {"strong": 1.0, "weak": 0.0}            # 5, 5.5 | 3.1, 3.2: above 3.2
    assert density["concat"] == {"strong": 0.75, "weak": 0.5}        # 4, 1.5, 1, 4 | 3, 3.2, 0.1, 0: above 1


@pytest.mark.parametrize(("scores", "found"), [([0.0, 0.0], "only zeros"), ([1.0, float("nan")], "NaN")])
def test_scores_that_rank_nothing_are_refused(scores, found):
    with pytest.raises(ValueError, match=found):
        ranked_densities({"a": torch.tensor(scores)}, 0.4)


def test_score_is_weight_times_gradient_in_training_mode(net, batch):
    net.drop.p = 0.0
    scores = snip_scores(net.eval(), ["conv.weight", "head.weight"], *batch, seed=0)
    net.train()
    nn.functional.cross_entropy(net(batch[0]), batch[1]).backward()
    for name, score in scores.items():
        weight = net.get_parameter(name)
        torch.testing.assert_close(score, (weight * weight.grad).abs().detach())


def test_a_weight_outside_the_graph_scores_zero(net, batch):
    assert not snip_scores(net, ["unused.weight"], *batch, seed=0)["unused.weight"].any()


def test_snip_leaves_model_and_global_generators_alone(net, batch):
    net.eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    snip_scores(net, ["conv.weight"], *batch, seed=0)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (np.random.get_state()[1].tolist(), random.getstate())
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert not net.training
    assert all(parameter.grad is None for parameter in net.parameters())


def test_dropout_of_the_snip_pass_depends_on_its_seed_only(net, batch):
    first = snip_scores(net, ["head.weight"], *batch, seed=3)["head.weight"]
    torch.manual_seed(99)
    assert torch.equal(first, snip_scores(net, ["head.weight"], *batch, seed=3)["head.weight"])
    assert not torch.equal(first, snip_scores(net, ["head.weight"], *batch, seed=4)["head.weight"])


def test_erk_is_in_proportion_to_the_sides_over_the_size_and_keeps_the_budget():
    density = erk_densities({"thin": (2, 2), "wide": (100, 100), "kernel": (10, 10, 3, 3)}, 0.5)
    assert density["thin"] == 1                                       # 4 / 4 is out of proportion
    assert density["wide"] / density["kernel"] == pytest.approx((200 / 10_000) / (26 / 900))
    assert 4 + 10_000 * density["wide"] + 900 * density["kernel"] == pytest.approx(0.5 * 10_904)


def test_erk_fills_layer_after_layer_when_little_is_dropped():
    density = erk_densities({"a": (2, 2), "b": (4, 4), "c": (50, 50)}, 0.01)
    assert (density["a"], density["b"]) == (1, 1)
    assert density["c"] == pytest.approx((0.99 * 2520 - 20) / 2500)
