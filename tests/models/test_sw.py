"""SW networks: the official parameter counts and keys, the golden network, timm's interface, merging."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

import swconv.models  # noqa: F401
from swconv.ops import ShiftwiseConv2d
from swconv.weights import convert_official

GOLDEN = Path("tests/golden")
MINI = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "sw_v2_mini.safetensors")


@pytest.fixture
def network(golden):
    model = timm.create_model("sw_tiny", num_classes=10, **MINI)
    model.load_state_dict(convert_official({k[6:]: v for k, v in golden.items() if k.startswith("state.")}, model))
    return model.double().eval()


@pytest.mark.parametrize(("name", "arguments", "count"), [
    ("sw_tiny", {}, 31_790_260),
    ("sw_tiny", {"use_se": False}, 30_195_760),
    ("sw_tiny", {"ghost_ratio": 0.0}, 32_278_780),
    ("sw_small", {}, 57_312_892),
    ("sw_slak_tiny", {}, 48_891_124),
    ("sw_slak_tiny", {"small_kernel": 5, "ghost_ratio": 0.0}, 50_705_698),
    ("sw_slak_tiny", {"width_factor": 1.0, "small_kernel": 5, "ghost_ratio": 0.0, "rep_branches": 1}, 29_557_672),
])
def test_parameter_counts_are_those_of_the_released_code(name, arguments, count):
    with torch.device("meta"):
        model = swconv.models.shiftwise_net(**{**swconv.models.sw.VARIANTS[name], **arguments})
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize(("official", "name"), [("SW_v2_tiny", "sw_tiny"), ("SW_v2_small", "sw_small"),
                                                ("SW_v1_tiny_x1.3", "sw_slak_tiny")])
def test_full_size_official_checkpoints_fit_key_by_key(official, name):
    shapes = json.loads((GOLDEN / "state_dict_keys.json").read_text())[official]
    shapes = shapes if isinstance(shapes, dict) else dict(shapes)
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    with torch.device("meta"):
        model = swconv.models.shiftwise_net(**swconv.models.sw.VARIANTS[name])
    assert convert_official(state, model).keys() == model.state_dict().keys()


def test_golden_network_comes_out_in_evaluation_and_stage_by_stage(golden, network):
    x = network.stem(golden["input"].double())
    torch.testing.assert_close(x, golden["feat.down0"], atol=1e-10, rtol=1e-10)
    for index, stage in enumerate(network.stages):
        x = stage(x)
        torch.testing.assert_close(x, golden[f"feat.stage{index}"], atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(network.forward_head(x), golden["logits_eval_f64"], atol=1e-10, rtol=1e-10)


def test_golden_network_comes_out_in_training(golden, network):
    network.train()
    logits = network(golden["input"].double())
    torch.testing.assert_close(logits, golden["logits_train_f64"], atol=1e-10, rtol=1e-10)
    loss = torch.nn.functional.cross_entropy(logits, golden["labels"])
    torch.testing.assert_close(loss[None], golden["loss_train_f64"], atol=1e-10, rtol=1e-10)


def test_float32_logits_stay_within_1e_5(golden, network):
    logits = network.float()(golden["input"])
    torch.testing.assert_close(logits.double(), golden["logits_eval_f64"], atol=1e-5, rtol=0)


def test_timms_reparameterize_keeps_the_logits(golden, network):
    merged = timm.utils.reparameterize_model(network)
    torch.testing.assert_close(merged(golden["input"].double()), golden["logits_eval_f64"], atol=1e-10, rtol=0)
    layers = [module for module in merged.modules() if isinstance(module, ShiftwiseConv2d)]
    assert layers
    assert all(layer.merged for layer in layers)


def test_timm_interface_gives_features_head_and_classifier():
    model = timm.create_model("sw_tiny", features_only=True, out_indices=(1, 3), **MINI)
    assert model.feature_info.channels() == [16, 32]
    assert model.feature_info.reduction() == [8, 32]
    assert [tuple(f.shape) for f in model(torch.zeros(1, 3, 64, 64))] == [(1, 16, 8, 8), (1, 32, 2, 2)]
    model = timm.create_model("sw_slak_tiny", num_classes=5, in_chans=1, depths=(1, 1), dims=(8, 16), kernel_sizes=(7, 7))
    features = model.forward_features(torch.zeros(2, 1, 48, 48))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    assert model.get_classifier().out_features == 5
    model.reset_classifier(3)
    assert model(torch.zeros(2, 1, 48, 48)).shape == (2, 3)


def kernels(model) -> list[list[int]]:
    """Large extent of every block, 3 for a plain one."""
    return [[getattr(block.mixer, "kernel_size", 0) if isinstance(block.mixer, ShiftwiseConv2d) else 3
             for block in stage.blocks] for stage in model.stages]


def test_kernel_sizes_interleave_within_a_stage_and_leave_stages_plain():
    model = timm.create_model("sw_tiny", depths=(1, 4, 1, 1), dims=(8, 8, 8, 8), kernel_sizes=(3, (13, 3), 13, 5))
    assert kernels(model) == [[3], [13, 3, 13, 3], [13], [5]]
    plain = model.stages[0].blocks[0].mixer
    assert plain.bias is None
    assert plain.groups == 8


def test_control_gets_sws_norm_and_skip():
    model = timm.create_model("sw_slak_tiny", depths=(1,), dims=(8,), kernel_sizes=(3,), depthwise_norm_skip=True).eval()
    mixer, x = model.stages[0].blocks[0].mixer, torch.randn(1, int(8 * 1.3), 6, 6)
    torch.testing.assert_close(mixer(x) - x, mixer.norm(mixer.conv(x)))


def test_stages_must_be_described_completely():
    with pytest.raises(ValueError, match="got 2, 2 and 4 entries"):
        timm.create_model("sw_tiny", depths=(1, 1), dims=(8, 8))


def test_foreign_weights_are_refused_in_a_sentence(golden):
    model = timm.create_model("sw_tiny", num_classes=10, **MINI)
    state = {k[6:]: v for k, v in golden.items() if k.startswith("state.")}
    state["extra.weight"] = state.pop("head.weight")
    with pytest.raises(ValueError, match=r"1 missing \['head.weight'\], 1 unexpected \['extra.weight'\]"):
        convert_official(state, model)
