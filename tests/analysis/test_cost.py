"""Parameters and MACs: the counts of the released code, sums of parts, masks."""

import pytest
import timm
import torch
from timm.utils import reparameterize_model

from swconv.analysis.cost import cost
from swconv.ops import ShiftwiseConv2d

LARGE = {"kernel_sizes": (51, 49, 47, 13)}

# Parameters and GMACs of the released code at 224 px, counted with its own modules.
TRAINING = [
    ("convnext_tiny", {}, 28_589_128, 4.456),
    ("slak_tiny", {"width_factor": 1.0}, 30_816_232, 5.419),
    ("slak_tiny", {}, 50_703_838, 8.705),
    ("slak_tiny", {"small_kernel": 3}, 49_343_878, 8.134),
    ("slak_tiny", {"small_kernel": 7}, 52_132_630, 9.297),
    ("slak_tiny", {"width_factor": 2.5}, 179_889_640, 29.804),
    ("slak_small", {}, 91_131_820, 16.604),
    ("slak_base", {}, 157_950_792, 28.509),
    ("lk_convnext_tiny", {"kernel_sizes": (7, 7, 7, 7)}, 28_595_752, 4.456),
    ("lk_convnext_tiny", {"kernel_sizes": (7, 7, 7, 7), "bn": False}, 28_582_504, 4.456),
    ("lk_convnext_tiny", LARGE, 38_426_920, 9.299),
    ("lk_convnext_tiny", LARGE | {"small_kernel": 5}, 38_605_768, 9.353),
    ("lk_convnext_tiny", LARGE | {"small_kernel": 5, "arrangement": "parallel"}, 30_816_232, 5.419),
    ("sw_tiny", {}, 31_790_260, 5.336),
    ("sw_tiny", {"use_se": False}, 30_195_760, 5.334),
    ("sw_small", {}, 57_312_892, 9.805),
    ("sw_slak_tiny", {}, 48_891_124, 8.048),
    ("sw_slak_tiny", {"small_kernel": 5}, 49_946_140, 8.789),
    ("unireplknet_tiny", {}, 31_693_420, 5.004),
    ("unireplknet_small", {}, 56_456_704, 9.219),
]
MERGED = [
    ("sw_tiny", {}, 31_002_670, 5.024),
    ("sw_tiny", {"ghost_ratio": 0.0}, 31_252_780, 5.121),
    ("sw_small", {}, 55_990_108, 9.334),
    ("sw_slak_tiny", {}, 48_156_157, 7.684),
    ("unireplknet_tiny", {}, 31_037_980, 4.899),
    ("unireplknet_small", {}, 55_645_984, 9.094),
]


@pytest.mark.parametrize(("name", "arguments", "params", "gmacs"), TRAINING)
def test_training_form_costs_what_the_released_code_costs(name, arguments, params, gmacs):
    found = cost(name, **arguments)
    assert found.params == params
    assert round(found.macs / 1e9, 3) == pytest.approx(gmacs, abs=1e-9)


@pytest.mark.parametrize(("name", "arguments", "params", "gmacs"), MERGED)
def test_merged_form_costs_what_the_papers_print(name, arguments, params, gmacs):
    found = cost(name, form="merged", **arguments)
    assert found.params == params
    assert round(found.macs / 1e9, 3) == pytest.approx(gmacs, abs=1e-9)


@pytest.mark.parametrize(("name", "form", "macs"), [("slak_tiny", "training", 8_738_130_546), ("sw_tiny", "merged", 5.064e9),
                                                   ("sw_small", "merged", 9.394e9)])
def test_thops_count_comes_out(name, form, macs):
    assert cost(name, form=form, counting="thop").macs == pytest.approx(macs, rel=1e-9 if name == "slak_tiny" else 1e-4)


@pytest.mark.parametrize(("name", "params"), [("slak_tiny", 30.5e6), ("slak_small", 54.8e6), ("slak_base", 94.9e6)])
def test_masks_take_their_share_of_weights_and_macs(name, params):
    dense, sparse = cost(name), cost(name, sparsity=0.4)
    assert sparse.params == pytest.approx(params, abs=5e4)
    assert sparse.macs == pytest.approx(0.6 * dense.macs, rel=1e-6)


def test_zeros_of_a_trained_model_count_as_masked():
    model = timm.create_model("sw_tiny", depths=(1, 1), dims=(8, 16), kernel_sizes=(13, 7))
    before = cost(model, 64)
    with torch.no_grad():
        model.stages[0].blocks[0].mixer.filters[0][:4] = 0
    after = cost(model, 64)
    assert before.params - after.params == 4 * 9
    assert before.macs - after.macs == 4 * 9 * 18 * 18                     # 16 px and a halo of one on each side


@pytest.mark.parametrize("padding", ["full", "half"])
@pytest.mark.parametrize("name", ["sw_tiny", "sw_slak_tiny"])
def test_norms_per_filter_cost_two_numbers_a_filter_and_merged_a_bias_a_filter(name, padding):
    with torch.device("meta"):
        layers = [layer for layer in timm.create_model(name).modules() if isinstance(layer, ShiftwiseConv2d)]
    channels, filters = sum(len(layer.mixed) for layer in layers), sum(len(layer.pad_h) for layer in layers)
    branch, norms = ([cost(name, form=form, padding=padding, norm=norm) for form in ("training", "plus")]
                     for norm in ("branch", "filter"))
    assert norms[0].params - branch[0].params == 2 * 2 * filters - 2 * 3 * channels      # two Rep branches, three sums
    assert norms[1].params - branch[1].params == filters
    assert [found.macs for found in norms] == [found.macs for found in branch]
    assert cost(name, form="merged", padding=padding, norm="filter") == norms[0]          # each Rep branch keeps its norms


@pytest.mark.parametrize(("name", "arguments"), [
    ("sw_tiny", {}), ("sw_tiny", {"norm": "filter"}), ("sw_slak_tiny", {"norm": None}), ("slak_tiny", {}),
    ("lk_convnext_tiny", {})])
def test_a_folded_model_costs_its_plus_shaped_form_in_every_form(name, arguments):
    model = timm.create_model(name, depths=(1, 1), dims=(8, 16), kernel_sizes=(13, 7), **arguments)
    wanted, folded = cost(model, 64, "plus"), reparameterize_model(model)
    for form in ("training", "merged", "plus"):
        assert cost(folded, 64, form) == wanted


def test_parts_add_up_and_the_mixers_share_shrinks_in_the_plus_shaped_form():
    training, plus = cost("sw_tiny"), cost("sw_tiny", form="plus")
    assert sum(macs for _, macs in training.parts.values()) == training.macs
    assert sum(params for params, _ in training.parts.values()) == training.params
    assert {place for place, _ in training.parts} == {"stem", "stage 1", "stage 2", "stage 3", "stage 4", "head"}
    channels, height = 60, 56
    assert plus.parts["stage 1", "large kernel"][1] == 3 * channels * 2 * 17 * 9 * height**2
    assert plus.macs < training.macs


def test_another_image_size_changes_macs_only():
    small, large = cost("sw_tiny", 224), cost("sw_tiny", (384, 384))
    assert small.params == large.params
    assert large.macs > 2.8 * small.macs


def test_unknown_forms_are_refused_in_a_sentence():
    with pytest.raises(ValueError, match="form training, merged or plus"):
        cost("sw_tiny", form="deployed")
