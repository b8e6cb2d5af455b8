"""SW networks: the official parameter counts, timm's interface, plain and interleaved kernels."""

import pytest
import timm
import torch

import swconv.models  # noqa: F401
from swconv.ops import ShiftwiseConv2d

MINI = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}


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
