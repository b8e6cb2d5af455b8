"""timm's conventions, for one network of every family."""

import copy

import pytest
import timm
import torch

from swconv.bench.timing import training_memory
from swconv.models import network
from swconv.models.network import Block, set_recompute
from swconv.ops import ShiftwiseConv2d

NAMES = ("sw_tiny", "sw_slak_tiny", "slak_tiny", "lk_convnext_tiny", "unireplknet_tiny")
SMALL = {"depths": (1, 2, 1), "dims": (8, 12, 16), "kernel_sizes": (9, 7, 7), "num_classes": 5}


@pytest.fixture(params=NAMES)
def model(request):
    torch.manual_seed(0)
    return timm.create_model(request.param, **SMALL)


def test_every_model_is_registered_with_its_evaluation():
    for name in (*NAMES, "sw_small", "sw_base", "sw_large", "slak_small", "slak_base", "lk_convnext_base", "unireplknet_small"):
        cfg = timm.get_pretrained_cfg(name)
        assert (cfg.input_size, cfg.crop_pct, cfg.interpolation) == ((3, 224, 224), 0.875, "bicubic")
        assert cfg.mean == (0.485, 0.456, 0.406)


def test_intermediates_are_the_maps_behind_the_stages(model):
    x = torch.randn(2, 3, 48, 48)
    model.eval()
    last, maps = model.forward_intermediates(x)
    assert [tuple(m.shape[1:]) for m in maps] == [(info["num_chs"], 48 // info["reduction"], 48 // info["reduction"])
                                                  for info in model.feature_info]
    assert torch.equal(last, model.forward_features(x))
    only = model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
    assert torch.equal(only[0], maps[1])


@pytest.mark.parametrize("getter", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_features_only_gives_a_pyramid(name, getter):
    more = {"feature_cls": "getter"} if getter else {}
    pyramid = timm.create_model(name, features_only=True, out_indices=(0, 2), **SMALL, **more)
    assert pyramid.feature_info.channels()[0] == pyramid(torch.zeros(1, 3, 32, 32))[0].shape[1]
    assert [f.shape[-1] for f in pyramid(torch.zeros(1, 3, 32, 32))] == [8, 2]


def test_the_classifier_can_be_replaced_and_dropped(model):
    model.reset_classifier(7)
    assert model.get_classifier().out_features == model(torch.zeros(1, 3, 32, 32)).shape[1] == 7
    model.reset_classifier(0)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, model.num_features)
    model.reset_classifier(0, "")
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, model.num_features, 2, 2)


@pytest.mark.parametrize("pooling", ["max", "rubbish", "avgmax"])
def test_another_pooling_than_the_mean_is_refused_and_changes_nothing(model, pooling):
    with pytest.raises(ValueError, match=f"global_pool must be .* got '{pooling}'"):
        timm.create_model("sw_tiny", **SMALL, global_pool=pooling)
    with pytest.raises(ValueError, match=f"global_pool must be .* got '{pooling}'"):
        model.reset_classifier(7, pooling)
    assert (model.global_pool, model.num_classes, model.get_classifier().out_features) == ("avg", 5, 5)


@pytest.mark.parametrize("name", NAMES)
def test_training_drops_pooled_features_before_the_classifier_and_evaluation_none(name):
    model = timm.create_model(name, **SMALL, drop_rate=0.5)
    x = torch.randn(32, model.num_features, 3, 3)
    whole, dropped = (model.train(training).forward_head(x, pre_logits=True) for training in (False, True))
    assert torch.equal(whole, model.norm(x.mean((2, 3))))
    kept = dropped != 0
    assert 0.3 < kept.float().mean() < 0.7
    torch.testing.assert_close(dropped[kept], 2 * whole[kept])


def test_without_a_drop_rate_the_head_draws_nothing_and_no_rate_has_a_weight(model):
    x, before = torch.randn(1, model.num_features, 3, 3), torch.get_rng_state()
    assert torch.equal(model.train().forward_head(x), model.eval().forward_head(x))
    assert torch.equal(torch.get_rng_state(), before)
    plain, dropping = (timm.create_model("sw_tiny", **SMALL, drop_rate=rate) for rate in (0.0, 0.5))
    assert list(plain.state_dict()) == list(dropping.state_dict())


def trained(model: torch.nn.Module, amp: bool) -> list[torch.Tensor]:
    """Loss, gradients, statistics and random state after two passes in training."""
    torch.manual_seed(1)
    x = torch.randn(4, 3, 48, 48)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            loss = torch.nn.functional.cross_entropy(model(x), torch.arange(4))
        loss.backward()
    return [loss, *(p.grad for p in model.parameters()), *model.buffers(), torch.get_rng_state()]


@pytest.mark.parametrize("ways", [("recompute",), ("checkpointing",), ("recompute", "checkpointing")])
@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_computed_anew_changes_no_bit_and_counts_no_batch_twice(name, amp, ways):
    torch.manual_seed(0)
    plain = timm.create_model(name, **SMALL, drop_path_rate=0.3, layer_scale_init=1.0).train()
    other = copy.deepcopy(plain)
    set_recompute(other, "recompute" in ways)
    other.set_grad_checkpointing("checkpointing" in ways)
    for got, wanted in zip(trained(other, amp), trained(plain, amp), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize(("expands_anew", "maps"), [(False, 6), (True, 2)])
def test_a_recomputing_block_keeps_input_expansion_and_contraction_and_no_other_map(expands_anew, maps):
    block = Block(ShiftwiseConv2d(16, 13), 16, "unireplknet", True, 1.0, 0.0, expands_anew).train()
    x = torch.randn(2, 16, 24, 24, requires_grad=True)

    def kept() -> float:                                              # maps of x's size besides x
        return training_memory(lambda: block(x).sum().backward(), x)["saved_maps"] / x.untyped_storage().nbytes()

    assert kept() > 14
    block.recompute = True
    assert kept() == maps - 1


def test_only_stages_before_the_last_two_run_their_expansion_anew(model):
    assert [[block.expands_anew for block in stage.blocks] for stage in model.stages] == [[True], [False] * 2, [False]]


def test_a_block_that_does_not_train_keeps_nothing_and_recomputes_nothing(model, monkeypatch):
    set_recompute(model)
    monkeypatch.setattr(network, "checkpoint", None)                  # calling it would fail
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        model.train()(x)
    model.eval()(x).sum().backward()


def test_layers_group_by_depth(model):
    groups = timm.models.group_parameters(model, model.group_matcher(coarse=True))
    assert groups
    names = {name for name, _ in model.named_parameters()}
    assert {name for group in groups.values() for name in group} == names


def test_models_export_and_compile_whole(model):
    x = torch.randn(1, 3, 32, 32)
    model.eval()
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x), atol=1e-5, rtol=1e-5)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-5)


def test_a_recomputing_model_exports_and_compiles_whole_with_its_gradients():
    torch.manual_seed(0)
    model = timm.create_model("sw_tiny", depths=(1,), dims=(8,), kernel_sizes=(9,), num_classes=5, layer_scale_init=1.0)
    set_recompute(model)
    x = torch.randn(4, 3, 48, 48)
    exported = torch.export.export(model.eval(), (x,)).module()
    torch.testing.assert_close(exported(x), model(x), atol=1e-5, rtol=1e-5)
    plain = copy.deepcopy(model).train()
    compiled = torch.compile(model.train(), backend="aot_eager", fullgraph=True)
    for form in (plain, compiled):
        form(x).square().sum().backward()
    for (name, got), wanted in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, wanted.grad, atol=1e-4, rtol=1e-3, msg=name)
    torch.testing.assert_close(list(model.buffers()), list(plain.buffers()))
