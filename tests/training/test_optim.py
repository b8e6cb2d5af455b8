"""Learning rates: per step, and per layer."""

import pytest
import timm
import torch

from swconv import params
from swconv.training import loop, optim


@pytest.fixture
def config():
    return params.load().resolve("sw22", "smoke")


def test_schedule_warms_up_from_zero_and_ends_at_min_lr(config):
    config["recipe"] |= {"epochs": 10, "warmup_epochs": 2, "min_lr": 1e-4, "lr": 1e-2}
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-2)
    schedule = optim.schedule(optimizer, config["recipe"], steps=10)
    rates = []
    for step in range(101):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == 0
    assert rates[10] == pytest.approx(5e-3)
    assert rates[20] == pytest.approx(1e-2)
    assert rates[60] == pytest.approx((1e-2 + 1e-4) / 2)
    assert rates[100] == pytest.approx(1e-4)


def test_norms_and_biases_do_not_decay_but_grn_does(config):
    model = loop.build(config)
    decayed, free = optim.parameter_groups(model, 0.05)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)].rsplit(".", 2)[-2] for p in decayed["params"] if p.ndim == 1} == {"grn"}
    assert all(p.ndim == 1 for p in free["params"])
    assert len(decayed["params"]) + len(free["params"]) == len(names)


def published(name: str) -> int:
    """`get_num_layer_for_convnext` of ConvNeXt's released code, for depths 3-3-27-3 in 12 groups, on our names."""
    parts = name.split(".")
    if parts[0] == "stem":
        return 0
    if parts[0] == "stages" and parts[2] == "downsample":
        return {1: 2, 2: 3, 3: 12}[int(parts[1])]
    if parts[0] == "stages":
        stage, block = int(parts[1]), int(parts[3])
        return {0: 1, 1: 2, 2: 3 + block // 3, 3: 12}[stage]
    return 13


def test_layers_are_numbered_as_convnexts_fine_tuning_numbers_them():
    with torch.device("meta"):
        model = timm.create_model("slak_base")
    names = [name for name, _ in model.named_parameters()]
    assert {name: optim.layer_id(name, [3, 3, 27, 3]) for name in names} == {name: published(name) for name in names}
    assert {published(name) for name in names} == set(range(14))


def test_every_layer_learns_slower_than_the_next_by_the_decay(config):
    with torch.device("meta"):
        model = timm.create_model("slak_base", num_classes=5)
    groups = optim.parameter_groups(model, 0.05, layer_decay=0.7)
    names = {id(p): name for name, p in model.named_parameters()}
    scales = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    assert scales.keys() == dict(model.named_parameters()).keys()
    assert scales["head.weight"] == scales["norm.bias"] == 1
    for name, scale in scales.items():
        assert scale == pytest.approx(0.7 ** (13 - published(name)))
    plain = optim.parameter_groups(model, 0.05)
    for kind in (0.05, 0.0):
        assert ({id(p) for group in groups if group["weight_decay"] == kind for p in group["params"]}
                == {id(p) for group in plain if group["weight_decay"] == kind for p in group["params"]})


def test_the_schedule_keeps_the_layers_ratio():
    weights = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    optimizer = torch.optim.AdamW([{"params": [weights[0]], "lr_scale": 0.7}, {"params": [weights[1]]}], lr=1e-2)
    schedule = optim.schedule(optimizer, {"epochs": 4, "warmup_epochs": 1, "min_lr": 0.0}, steps=10)
    for step in (5, 10, 25):
        schedule.step_update(step)
        slow, fast = (group["lr"] for group in optimizer.param_groups)
        assert slow == pytest.approx(0.7 * fast)
        assert fast > 0
