"""All forms are one function."""

import pytest
import timm
import torch

from swconv.bench import forms
from swconv.bench.work import Stage

STAGE = Stage(1, 12, 4, 13, 1, 2)
CPU = torch.device("cpu")
NETWORK = {"depths": (1, 2), "dims": (8, 16), "kernel_sizes": (13, 7), "num_classes": 5}


def relative(got, wanted):
    return ((got - wanted).norm() / wanted.norm()).item()


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("form", ["ours", "two_step", "two_step_summed", "two_step_gather", "two_step_taps", "torch_strips"])
def test_a_form_gives_the_sums_and_the_layer_of_the_definition(form):
    layer, x = forms.make_layer(STAGE, CPU).double(), draw(2, 4, 12, 12)
    wanted = forms.reference(layer, x)
    for got, sum_ in zip(forms.sums(cuda=True)[form](layer, x), wanted, strict=True):
        assert relative(got, sum_) < 1e-12
    assert relative(forms.deployed(layer, cuda=True)[form](x), forms.mixed(layer, wanted, x)) < 1e-12
    assert relative(layer(x), forms.mixed(layer, wanted, x)) < 1e-12


def test_as_published_every_rep_branch_convolves(monkeypatch):
    layer, x, convolved, maps = forms.make_layer(STAGE, CPU).double(), draw(2, 4, 12, 12), [], forms._maps
    monkeypatch.setattr(forms, "_maps", lambda layer, x, *weight: convolved.append(weight) or maps(layer, x, *weight))
    forms.two_step(layer, x)
    assert [weight for (weight,) in convolved] == list(layer.filters)
    forms.two_step_summed(layer, x)
    assert convolved[len(layer.filters):] == [()]


@pytest.mark.parametrize("form", [forms.reference, forms.two_step, forms.two_step_taps])
def test_the_two_step_network_is_the_merged_one(form):
    model = forms.make_network(CPU, **NETWORK).double()
    image, before = draw(2, 3, 48, 48), None
    with torch.no_grad():
        before = model(image)
        merged = timm.utils.reparameterize_model(model)(image)
        two_step = forms.two_step_network(model, form)
        assert sum(isinstance(module, forms.TwoStepMixer) for module in two_step.modules()) == 3
        assert relative(two_step(image), merged) <= 1e-9
        assert relative(model(image), before) == 0                    # the network itself stays as it was


@pytest.mark.parametrize("name", ["depthwise13", "depthwise7", "slak_pair"])
def test_both_ways_of_padding_are_one_function(name):
    ways, weights = forms.peers(STAGE, CPU)[name]
    x = draw(2, 4, 12, 12).float()
    assert len(weights) == (2 if name == "slak_pair" else 1)
    assert relative(ways["padding inside"](x), ways["padding before"](x)) < 1e-5


@pytest.mark.parametrize(("name", "arguments", "form"), [
    ("slak_tiny", {"depths": (1, 1), "dims": (8, 16), "kernel_sizes": (21, 13)}, "plain"),
    ("slak_tiny", {"depths": (1, 1), "dims": (8, 16), "kernel_sizes": (21, 13)}, "square"),
    ("lk_convnext_tiny", {"depths": (1, 1), "dims": (8, 16), "kernel_sizes": (21, 15)}, "square"),
    ("sw_tiny", NETWORK | {"rep_branches": 1}, "two_step"),
])
def test_every_form_of_a_network_is_one_function(name, arguments, form):
    model, image = forms.make_network(CPU, name, **arguments).double(), draw(2, 3, 48, 48)
    with torch.no_grad():
        wanted, ways = model(image), forms.whole_network(model, form)
        for network in ways.values():
            assert relative(network(image), wanted) < 1e-10
    padded = [sum(isinstance(module, forms.PaddedConv2d) for module in way.modules()) for way in ways.values()]
    assert padded == {"two_step": [0], "square": [0, len(arguments["depths"]) - (name == "slak_tiny")], "plain": [0, 2]}[form]


def test_an_unknown_form_is_told():
    with pytest.raises(ValueError, match="form is as_is, merged, two_step, plain or square, got 'round'"):
        forms.whole_network(torch.nn.Identity(), "round")


def test_both_forms_of_the_network_are_one_function_in_training():
    torch.manual_seed(0)
    x, found = torch.randn(2, 3, 32, 32, dtype=torch.float64), []
    for form in ("ours", "two_step"):
        torch.manual_seed(1)
        model = timm.create_model("sw_tiny", depths=[1, 1], dims=[8, 16], kernel_sizes=[13, 5], layer_scale_init=1.0).double()
        logits = forms.training_form(model, form).train()(x)
        logits.square().sum().backward()
        found.append((logits, model.stages[0].blocks[0].mixer.filters[0].grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)


def test_as_published_the_sums_stay_in_float32_under_autocast():
    model = forms.training_form(timm.create_model("sw_tiny", **NETWORK), "two_step")
    layer = model.stages[0].blocks[0].mixer
    x = draw(2, len(layer.mixed), 12, 12)
    with torch.autocast("cpu", torch.bfloat16):
        parts = layer.branches(x.bfloat16())
    assert {part.dtype for part in parts} == {torch.float32}
    assert relative(parts[0].double(), forms.reference(layer, x.float())[0].double()) < 1e-2
