"""The SW layer against the golden module files, and its merged form against its training form."""

import json
import operator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from swconv.ops import ShiftwiseConv2d
from swconv.weights import convert_official

GOLDEN = Path("tests/golden")
MANIFEST = json.loads((GOLDEN / "manifest.json").read_text())
OFFICIAL_NAMES = {"filters.": "LoRAs.{}.weight", "norms.0": "bn_lora1", "norms.1": "bn_lora2", "norms.2": "bn_small"}


def layer(name: str, dtype: torch.dtype) -> tuple[dict, ShiftwiseConv2d]:
    data, about = load_file(GOLDEN / f"{name}.safetensors"), MANIFEST[f"{name}.safetensors"]
    module = ShiftwiseConv2d(about["C"], about["M"], about["N"], about["N_path"], about["N_rep"], about["ghost_ratio"],
                             bn=about["bn"])
    state = {key.removeprefix("state."): value for key, value in data.items() if key.startswith("state.")}
    module.load_state_dict(convert_official(state, module))
    return data, module.to(dtype)


def official(name: str) -> str:
    """Our parameter name in the official spelling."""
    if name.startswith("filters."):
        return f"LoRAs.{name.removeprefix('filters.')}.weight"
    branch, leaf = name.rsplit(".", 1)
    return f"{OFFICIAL_NAMES[branch]}.{leaf}"


def distance(ours: torch.Tensor, golden: torch.Tensor) -> float:
    """Of two tensors, relative to the norm of the golden one."""
    return ((ours.double() - golden).norm() / golden.norm()).item()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", ["module_sw_a", "module_sw_d"])
def test_golden_layer_comes_out_with_all_gradients(name, mode, dtype, tolerance):
    data, module = layer(name, dtype)
    module.train(mode == "train")
    x = data["x"].to(dtype).requires_grad_()
    y = module(x)
    assert distance(y, data[f"y_{mode}"]) < tolerance
    (y * data["g_y"].to(dtype)).sum().backward()
    grads = {f"grad_x_{mode}": x.grad} | {f"grad_{mode}.{official(n)}": p.grad for n, p in module.named_parameters()}
    assert len([key for key in data if key.startswith(f"grad_{mode}.")]) == len(grads) - 1
    far = {key: distance(grad, data[key]) for key, grad in grads.items()}
    assert max(far.values()) < tolerance, far


@pytest.mark.parametrize("name", ["module_sw_a", "module_sw_d"])
def test_strips_and_two_step_form_of_the_layer_agree(name):
    data, module = layer(name, torch.float64)
    mixed, _ = module.split(data["x"].double())
    for a, b in zip(module.branches(mixed), module.shift(module.responses(mixed)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("arguments", [
    {},
    {"padding": "half"},
    {"norm": "filter"},
    {"norm": "filter", "padding": "half", "skip": False, "edges": 1, "order": "reversed", "ghost_ratio": 0.0},
    {"norm": "filter", "padding": "half", "edges": 1, "order": "shuffle_v", "rep_branches": 3},
    {"norm": None, "skip": False},
    {"small_kernel": 5, "rep_branches": 8, "even_split": False},
], ids=str)
def test_merged_layer_is_the_evaluated_layer(arguments):
    torch.manual_seed(0)
    module = ShiftwiseConv2d(9, 13, **{"rep_branches": 2, "edges": 2, **arguments}).double()
    for norm in module.norms:
        torch.nn.init.uniform_(norm.weight, 0.5, 2)
        torch.nn.init.normal_(norm.bias)
    x = torch.randn(3, 9, 10, 7, dtype=torch.float64)
    module(x)                                                         # moves the running statistics
    expected = module.eval()(x)
    module.reparameterize()
    torch.testing.assert_close(module(x), expected, atol=1e-12, rtol=1e-12)
    assert not list(module.parameters())
    module.reparameterize()                                           # a second call changes nothing
    torch.testing.assert_close(module(x), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("part", ["branch", "skip", *(f"norms.{k}.{name}" for k in range(3)
                                                      for name in ("weight", "bias", "running_mean", "running_var"))])
def test_every_part_of_the_layer_goes_into_the_kernel_alone(part):
    torch.manual_seed(0)
    module = ShiftwiseConv2d(9, 13, rep_branches=1, skip=False).double().eval()
    x = torch.randn(3, 9, 10, 7, dtype=torch.float64)
    before = module(x)
    if part == "branch":
        module.filters.append(torch.nn.Parameter(torch.randn_like(module.filters[0])))
    elif part == "skip":
        module.skip = True
    else:
        torch.nn.init.uniform_(operator.attrgetter(part)(module), 0.3, 0.9)
    expected = module(x)
    assert (expected - before).abs().max() > 0.01 * before.abs().max()
    module.reparameterize()
    torch.testing.assert_close(module(x), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("arguments", [{}, {"padding": "half"}, {"norm": "filter"}], ids=str)     # the last: the mixed alone
@pytest.mark.parametrize("scaled", [True, False])
def test_what_follows_and_the_ghosts_go_into_kernels_of_all_channels(arguments, scaled):
    torch.manual_seed(0)
    module = ShiftwiseConv2d(9, 13, **arguments).double()
    for norm in module.norms:
        torch.nn.init.normal_(norm.bias)
    module.eval()
    x, scale, shift = (torch.randn(*shape, dtype=torch.float64) for shape in ((3, 9, 10, 7), (9,), (9,)))
    expected = module(x) * scale[:, None, None] + shift[:, None, None] if scaled else module(x)
    module.reparameterize()
    order = module.absorb(*([scale, shift] if scaled else []))
    expected = torch.empty_like(expected).index_copy(1, order, expected)
    torch.testing.assert_close(module(x), expected, atol=1e-12, rtol=1e-12)                # the mixed channels, then the ghosts


def test_a_norm_before_the_shift_is_not_a_norm_after_it():
    torch.manual_seed(0)
    x = torch.randn(2, 6, 8, 8)
    outputs = []
    for norm in ("branch", "filter"):
        torch.manual_seed(1)
        outputs.append(ShiftwiseConv2d(6, 13, norm=norm)(x))
    assert (outputs[0] - outputs[1]).abs().max() > 0.1


def test_mixed_channels_come_first_and_ghosts_pass_unchanged():
    module = ShiftwiseConv2d(10, 13, ghost_ratio=0.23)
    x = torch.randn(1, 10, 6, 6)
    y = module(x)
    assert torch.equal(y[:, len(module.mixed):], x[:, module.ghost])


def test_bn_false_is_norm_none():
    assert ShiftwiseConv2d(6, 13, bn=False).norm is None
    assert not list(ShiftwiseConv2d(6, 13, bn=False).norms)


def test_tables_are_not_part_of_the_state_dict():
    assert all(key.startswith(("filters.", "norms.")) for key in ShiftwiseConv2d(6, 13).state_dict())


@pytest.mark.parametrize(("arguments", "sentence"), [
    ({"kernel_size": 12}, "odd kernel sizes"),
    ({"kernel_size": 13, "small_kernel": 15}, "odd kernel sizes"),
    ({"kernel_size": 13, "rep_branches": 0}, "rep_branches must be at least 1"),
    ({"kernel_size": 13, "padding": "same"}, 'padding must be "full" or "half"'),
    ({"kernel_size": 13, "norm": "layer"}, "norm must be"),
    ({"kernel_size": 13, "order": "reversed", "edges": 2}, "one edge"),
])
def test_wrong_arguments_are_told_in_a_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        ShiftwiseConv2d(6, **arguments)


@pytest.mark.parametrize("padding", ["full", "half"])
@pytest.mark.parametrize("norm", ["branch", "filter", None])
def test_a_layer_of_shapes_only_gives_the_shape_in_every_form(norm, padding):
    with torch.device("meta"):
        module, x = ShiftwiseConv2d(6, 13, ghost_ratio=0.3, norm=norm, padding=padding).eval(), torch.empty(2, 6, 9, 7)
    outputs = [module(x)]
    module.reparameterize()
    outputs.append(module(x))
    module.absorb()
    outputs.append(module(x))
    assert all(y.is_meta and y.shape == x.shape for y in outputs)
