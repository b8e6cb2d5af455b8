"""Every network of the golden data: as the released code computes it, in evaluation, in training and merged."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.utils import reparameterize_model

import swconv.models  # noqa: F401
from swconv.weights import convert_official, lay_out_state, official_names, to_official

GOLDEN = Path("tests/golden")
STORED = {"atol": 1e-10, "rtol": 2**-24}                                    # gradients and statistics lie there in float32
MINI = {"num_classes": 10, "depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}


@dataclass(frozen=True)
class Case:
    file: str
    name: str
    arguments: dict[str, Any] = field(default_factory=dict)


CASES = [
    Case("sw_v2_mini", "sw_tiny"),
    Case("slak_decom_mini", "slak_tiny"),
    Case("replk_style_mini", "slak_tiny", {"kernel_sizes": (31, 29, 27, 13), "decomposed": False, "width_factor": 1.0}),
    Case("replk_style_mini", "lk_convnext_tiny", {"kernel_sizes": (31, 29, 27, 13), "small_kernel": 5}),
    Case("unireplknet_mini", "unireplknet_tiny"),
]
FULL = [
    ("SLaK_tiny_x1.3", "slak_tiny", {}), ("SLaK_small_x1.3", "slak_small", {}), ("SLaK_base_x1.3", "slak_base", {}),
    ("SLaK_reg_tiny_x1.3", "slak_tiny", {"laid_out": True}), ("SW_v2_tiny", "sw_tiny", {}), ("SW_v2_small", "sw_small", {}),
    ("SW_v1_tiny_x1.3", "sw_slak_tiny", {}), ("unireplknet_t", "unireplknet_tiny", {}),
    ("unireplknet_s", "unireplknet_small", {}), ("convnext_tiny", "convnext_tiny", {}),
    ("SW_v2_tiny_merged", "sw_tiny", {"rep_branches": 1}), ("unireplknet_t_deploy", "unireplknet_tiny", {}),
]


def part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(f"{prefix}."): tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}.")}


@pytest.fixture(params=CASES, ids=lambda case: f"{case.file}-{case.name}")
def loaded(request):
    golden = load_file(GOLDEN / f"{request.param.file}.safetensors")
    model = timm.create_model(request.param.name, **MINI, **request.param.arguments)
    model.load_state_dict(convert_official(part(golden, "state"), model))
    return golden, model.double().eval()


def test_evaluation_comes_out_stage_by_stage(loaded, request):
    golden, model = loaded
    name = request.node.name
    x = model.stem(golden["input"].double())
    torch.testing.assert_close(x, golden["feat.down0"], atol=1e-10, rtol=1e-10)
    if "unireplknet" not in name:                                           # there the file holds the mixer's input
        torch.testing.assert_close(model.stages[0].blocks[0].mixer(x), golden["feat.lk00"], atol=1e-10, rtol=1e-10)
    for index, stage in enumerate(model.stages):
        if index:
            torch.testing.assert_close(stage.downsample(x), golden[f"feat.down{index}"], atol=1e-10, rtol=1e-10)
        x = stage(x)
        torch.testing.assert_close(x, golden[f"feat.stage{index}"], atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(model.forward_head(x), golden["logits_eval_f64"], atol=1e-10, rtol=1e-10)


def test_training_comes_out_with_loss_gradients_and_statistics(loaded):
    golden, model = loaded
    names = official_names(model)
    model.train()
    logits = model(golden["input"].double())
    torch.testing.assert_close(logits, golden["logits_train_f64"], atol=1e-10, rtol=1e-10)
    loss = torch.nn.functional.cross_entropy(logits, golden["labels"])
    torch.testing.assert_close(loss[None], golden["loss_train_f64"], atol=1e-10, rtol=1e-10)
    loss.backward()
    gradients = part(golden, "grad_train")
    for ours, parameter in model.named_parameters():
        if names[ours] in gradients:
            wanted = gradients.pop(names[ours]).double().view_as(parameter)
            torch.testing.assert_close(parameter.grad, wanted, **STORED)
    assert not gradients
    after = part(golden, "after_train")
    for ours, buffer in model.named_buffers():
        if names.get(ours) in after:
            torch.testing.assert_close(buffer.double(), after.pop(names[ours]).double(), **STORED)
    assert not after


def test_float32_stays_within_1e_5(loaded):
    golden, model = loaded
    torch.testing.assert_close(model.float()(golden["input"]).double(), golden["logits_eval_f64"], atol=1e-5, rtol=0)


def test_timms_reparameterize_gives_the_logits_of_the_published_merge(loaded):
    golden, model = loaded
    merged = reparameterize_model(model)
    logits = merged(golden["input"].double())
    torch.testing.assert_close(logits, golden.get("logits_merged_f64", golden["logits_eval_f64"]), atol=1e-10, rtol=0)
    torch.testing.assert_close(logits, golden["logits_eval_f64"], atol=1e-10, rtol=0)


def test_weights_go_back_under_the_official_names(loaded):
    golden, model = loaded
    state, back = part(golden, "state"), to_official(model.float())
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(back[name], tensor, atol=0, rtol=0)


def test_a_deployed_unireplknet_loads_into_the_merged_network():
    golden = load_file(GOLDEN / "unireplknet_mini.safetensors")
    model = reparameterize_model(timm.create_model("unireplknet_tiny", **MINI))
    model.load_state_dict(convert_official(part(golden, "merged"), model))
    torch.testing.assert_close(model.double()(golden["input"].double()), golden["logits_merged_f64"], atol=1e-5, rtol=0)


def test_a_merged_sw_loads_into_the_network_with_one_rep_branch():
    golden = load_file(GOLDEN / "sw_v2_mini.safetensors")
    model = timm.create_model("sw_tiny", **MINI, rep_branches=1)
    model.load_state_dict(convert_official(part(golden, "merged"), model))
    torch.testing.assert_close(model.double().eval()(golden["input"].double()), golden["logits_merged_f64"], atol=1e-5, rtol=0)


def test_laid_out_weights_are_the_published_ones_and_give_the_same_logits():
    golden = load_file(GOLDEN / "slak_laidout_mini.safetensors")
    strips, pieces = (timm.create_model("slak_tiny", **MINI, laid_out=laid_out) for laid_out in (False, True))
    state = lay_out_state(convert_official(part(golden, "strip"), strips))
    published = convert_official(part(golden, "laidout"), pieces)
    assert state.keys() == published.keys()
    assert all(torch.equal(state[name], published[name]) for name in state)
    pieces.load_state_dict(state)
    logits = pieces.double().eval()(golden["input"].double())
    torch.testing.assert_close(logits, golden["logits_laidout_f64"], atol=1e-10, rtol=0)
    torch.testing.assert_close(logits, golden["logits_eval_f64"], atol=1e-10, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["slak_tiny", "slak_small", "slak_base"])
def test_whole_networks_laid_out_give_the_same_logits(name):
    torch.manual_seed(0)
    strips, pieces = (timm.create_model(name, laid_out=laid_out, layer_scale_init=0.1).double().eval()
                      for laid_out in (False, True))
    pieces.load_state_dict(lay_out_state(strips.state_dict()))
    x = torch.randn(1, 3, 224, 224, dtype=torch.float64)
    with torch.no_grad():
        wanted, got = strips(x), pieces(x)
    assert ((got - wanted).abs().max() / wanted.abs().max()).item() <= 1e-12


@pytest.mark.parametrize(("official", "name", "arguments"), FULL)
def test_full_size_official_checkpoints_fit_key_by_key_and_back(official, name, arguments):
    shapes = dict(json.loads((GOLDEN / "state_dict_keys.json").read_text())[official])
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    with torch.device("meta"):
        model = timm.create_model(name, **arguments)
        model = reparameterize_model(model) if official.endswith("deploy") else model
    assert convert_official(state, model).keys() == model.state_dict().keys()
    if not name.startswith("convnext") and not official.endswith("merged"):
        assert {key: list(value.shape) for key, value in to_official(model).items()} == shapes
