"""The backbone as a pyramid: its maps, its zeros, its learning rates."""

import copy
import json
import re
import warnings
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from swconv.downstream.fcos3d import FCOS3DConfig, FCOS3DHead
from swconv.downstream.pyramid import Pyramid, layer_id, parameter_groups
from swconv.weights import official_names

TINY = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
SMALL = {"sw_tiny": {"kernel_sizes": (7, 7, 7, 7)}, "slak_tiny": {"kernel_sizes": (7, 7, 7, 7), "width_factor": 1.0},
         "unireplknet_tiny": {}, "convnext_tiny": {}}
CASES = json.loads(Path("tests/golden/heads/layer_decay.json").read_text())["cases"]


@pytest.mark.parametrize("name", SMALL)
def test_four_normalised_maps_come_out(name):
    torch.manual_seed(0)
    pyramid = Pyramid(name, **TINY, **SMALL[name])
    maps = pyramid(torch.randn(2, 3, 64, 96))
    assert [tuple(x.shape) for x in maps] == [(2, 8, 16, 24), (2, 16, 8, 12), (2, 24, 4, 6), (2, 32, 2, 3)]
    assert pyramid.channels == (8, 16, 24, 32)
    for x in maps:
        torch.testing.assert_close(x.mean(1), torch.zeros_like(x[:, 0]), atol=1e-5, rtol=0)
    sum((x * torch.randn_like(x)).sum() for x in maps).backward()
    assert all(weight.grad is not None for weight in pyramid.parameters())          # no classifier is left over


@pytest.mark.parametrize(("name", "scale"), [("sw_tiny", "gamma"), ("convnext_tiny", "gamma")])
def test_layer_scale_begins_at_one_and_drop_path_rises_to_its_rate(name, scale):
    pyramid = Pyramid(name, drop_path_rate=0.4, depths=(2, 2, 2, 2), dims=(8, 8, 8, 8), **SMALL[name])
    assert all((getattr(block, scale) == 1).all() for stage in pyramid.net.stages for block in stage.blocks)
    assert pyramid.net.stages[3].blocks[1].drop_path.drop_prob == pytest.approx(0.4)


@pytest.mark.parametrize("name", SMALL)
def test_a_classifier_s_weights_give_its_maps(name):
    classifier = timm.create_model(name, num_classes=5, **TINY, **SMALL[name]).eval()
    pyramid = Pyramid(name, **TINY, **SMALL[name]).eval()
    pyramid.load_pretrained(classifier.state_dict())
    x = torch.randn(1, 3, 64, 64)
    last = classifier.forward_features(x)
    torch.testing.assert_close(pyramid(x)[3], pyramid.norm3(last))


def test_foreign_weights_are_told():
    pyramid = Pyramid("slak_tiny", **TINY, **SMALL["slak_tiny"])
    other = timm.create_model("unireplknet_tiny", **TINY)
    with pytest.raises(ValueError, match="needs the weights of its own backbone, got others: Missing key"):
        pyramid.load_pretrained(other.state_dict())
    with pytest.raises(ValueError, match="four stages, got slak_tiny with 2"):
        Pyramid("slak_tiny", depths=(1, 1), dims=(8, 8), kernel_sizes=(7, 7))


def test_a_misspelt_network_is_told_with_the_nearest_known_name():
    with pytest.raises(ValueError, match=r"unknown network sw_tiy; the nearest known name is sw_tiny\."):
        Pyramid("sw_tiy")
    with pytest.raises(ValueError, match=r"unknown network convnet_tiny.fb_in1k; the nearest known name is convnext_tiny\."):
        Pyramid("convnet_tiny.fb_in1k")


def test_a_network_of_another_family_is_told_which_are_taken():
    with pytest.raises(ValueError, match=r"one of our networks or a ConvNeXt of timm, got resnet18\. Take one of "
                                         r"lk_convnext_base, .*sw_tiny, .*, or of timm's convnext_\* and convnextv2_\*\."):
        Pyramid("resnet18")
    assert Pyramid("convnext_tiny.fb_in1k", **TINY).channels == TINY["dims"]           # with timm's tag it is a ConvNeXt


def sparse_weights(name):
    torch.manual_seed(1)
    classifier = timm.create_model(name, **TINY, **SMALL[name])
    state = classifier.state_dict()
    zeros = {}
    for key, weight in classifier.named_parameters():
        if weight.dim() in (2, 4) and not key.startswith("head."):
            zeros[key] = torch.rand_like(weight) < 0.4
            state[key] = weight.detach().masked_fill(zeros[key], 0.0)
    return state, zeros


@pytest.mark.parametrize("name", ["sw_tiny", "slak_tiny"])
@pytest.mark.parametrize("training", [True, False])
def test_zeros_stay_zero_and_the_others_learn(name, training):
    state, zeros = sparse_weights(name)
    pyramid = Pyramid(name, sparse=True, **TINY, **SMALL[name]).train(training)
    pyramid.load_pretrained(state)
    optimizer = torch.optim.AdamW(pyramid.parameters(), lr=0.1)
    x = torch.randn(2, 3, 64, 64)
    sum(y.square().sum() for y in pyramid(x)).backward()
    optimizer.step()
    weights = dict(pyramid.net.named_parameters())
    assert any((weights[key][zero] != 0).any() for key, zero in zeros.items())      # the step alone moves them
    pyramid(x)
    for key, zero in zeros.items():
        assert (weights[key][zero] == 0).all()
        assert (weights[key][~zero] != state[key][~zero]).float().mean() > 0.9


def test_what_is_saved_behind_a_step_is_masked_and_found_again():
    state, zeros = sparse_weights("sw_tiny")
    pyramid = Pyramid("sw_tiny", sparse=True, **TINY, **SMALL["sw_tiny"])
    pyramid.load_pretrained(state)
    with torch.no_grad():
        for weight in pyramid.parameters():
            weight.add_(1.0)
    holder = nn.ModuleDict({"pyramid": pyramid})
    saved = copy.deepcopy(holder.state_dict())
    again = nn.ModuleDict({"pyramid": Pyramid("sw_tiny", sparse=True, **TINY, **SMALL["sw_tiny"])})
    again.load_state_dict(saved)
    assert again["pyramid"].masks.keys() == zeros.keys()
    for key, zero in zeros.items():
        assert torch.equal(again["pyramid"].masks[key], ~zero)


def test_a_dense_pyramid_lets_zeros_go():
    state, zeros = sparse_weights("sw_tiny")
    pyramid = Pyramid("sw_tiny", **TINY, **SMALL["sw_tiny"])
    pyramid.load_pretrained(state)
    assert not pyramid.masks


def test_a_copy_keeps_its_own_masks():
    state, zeros = sparse_weights("slak_tiny")
    pyramid = Pyramid("slak_tiny", sparse=True, **TINY, **SMALL["slak_tiny"])
    twin = copy.deepcopy(pyramid)
    twin.load_pretrained(state)
    assert twin.masks
    assert not pyramid.masks


def golden_name(name):
    """backbone.stages.2.7.pwconv1.weight -> net.stages.2.blocks.7.pwconv1.weight, ..."""
    name = name.removeprefix("backbone.").replace("downsample_layers.0.", "net.stem.")
    name = re.sub(r"^downsample_layers\.(\d)\.", r"net.stages.\1.downsample.", name)
    return re.sub(r"^stages\.(\d)\.(\d+)\.", r"net.stages.\1.blocks.\2.", name)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['depths'][2]}-{case['decay_type']}-{case['num_layers']}")
def test_every_published_scale_is_exact(case):
    layers, rate = case["num_layers"], case["decay_rate"]
    for name, (scale, number, _) in case["params"].items():
        found = layer_id(golden_name(name), case["decay_type"], layers)
        assert (rate ** (layers + 1 - found), found) == (scale, number), name


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['depths'][2]}-{case['decay_type']}-{case['num_layers']}")
def test_groups_of_a_model_are_the_published_ones(case):
    """Of a real model with the case's depths, all parameters that go by the same name in the reference."""
    model = nn.ModuleDict({"backbone": Pyramid("slak_tiny", depths=case["depths"], dims=(4, 4, 4, 4), kernel_sizes=(5, 5, 5, 5),
                                               small_kernel=3, width_factor=1.0), "neck": nn.Linear(2, 2)})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        groups = parameter_groups(model, case["base_lr"], case["base_weight_decay"], case["decay_type"], case["decay_rate"],
                                  case["num_layers"])
    assert bool(caught) == bool(case["scales_above_one"])
    official = {f"backbone.net.{ours}": f"backbone.{theirs}" for ours, theirs in official_names(model["backbone"].net).items()}
    compared = 0
    for group in groups:
        for name in group["names"]:
            expected = case["params"].get(official.get(name, name))
            if expected:
                assert [group["lr_scale"], group["layer_id"], group["weight_decay"]] == expected, name
                assert group["lr"] == case["base_lr"] * expected[0]
                compared += 1
    others = ("large_kernel", "grn", "lateral", "conv_seg", "fc_cls")                # other names, or not in this model
    assert compared == len([name for name in case["params"] if not any(word in name for word in others)])
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_ids_past_the_last_stage_are_told():
    pyramid = Pyramid("slak_tiny", depths=(1, 1, 18, 1), dims=(4, 4, 4, 4), kernel_sizes=(5, 5, 5, 5), small_kernel=3)
    with pytest.warns(UserWarning, match="num_layers=6 is too small.* get id 8.* Raise num_layers to 8"):
        groups = parameter_groups(pyramid, 1.0, 0.05, "layer_wise", 0.7, 6)
    assert max(group["lr"] for group in groups) == pytest.approx(1 / 0.7)


def test_grn_decays_and_vectors_do_not():
    pyramid = Pyramid("sw_tiny", **TINY, **SMALL["sw_tiny"])
    decay = {name: group["weight_decay"] for group in parameter_groups(pyramid, 1.0, 0.05) for name in group["names"]}
    block = "net.stages.0.blocks.0."
    assert (decay[f"{block}grn.weight"], decay[f"{block}grn.bias"], decay[f"{block}pwconv1.weight"]) == (0.05,) * 3
    assert (decay[f"{block}gamma"], decay[f"{block}pwconv1.bias"], decay["norm0.weight"]) == (0.0,) * 3


def test_the_scales_of_fcos3d_are_no_vectors_and_decay():
    head = FCOS3DHead(FCOS3DConfig(fpn_channels=16, channels=16, centerness_channels=8, groups=4, deformable=False))
    model = nn.ModuleDict({"pyramid": Pyramid("slak_tiny", **TINY, **SMALL["slak_tiny"]), "head": head})
    decay = {name: group["weight_decay"] for group in parameter_groups(model, 1.0, 0.05) for name in group["names"]}
    scales = {name: decay[name] for name, weight in head.named_parameters(prefix="head") if weight.ndim == 0}
    assert len(scales) == 15
    assert set(scales.values()) == {0.05}
    assert {value for name, value in decay.items() if name.endswith(".bias")} == {0.0}


def test_with_norms_only_norms_are_free_of_decay_and_all_learn_alike():
    pyramid = Pyramid("slak_tiny", **TINY, **SMALL["slak_tiny"])
    groups = parameter_groups(pyramid, 2e-4, 0.05, "norms", 0.9)
    assert {group["lr"] for group in groups} == {2e-4}
    free = {name for group in groups if not group["weight_decay"] for name in group["names"]}
    assert {"net.stem.1.weight", "norm3.bias", "net.stages.0.blocks.0.norm.weight"} <= free
    assert not {"net.stem.0.bias", "net.stages.0.blocks.0.gamma", "net.stages.0.blocks.0.pwconv1.bias"} & free


def test_unknown_rules_and_models_without_a_pyramid_are_told():
    with pytest.raises(ValueError, match="layer_wise, stage_wise or norms, got 'block_wise'"):
        parameter_groups(nn.Linear(2, 2), 1.0, 0.0, "block_wise")
    with pytest.raises(ValueError, match="needs a model with a Pyramid in it, got Linear"):
        parameter_groups(nn.Linear(2, 2), 1.0, 0.0)
