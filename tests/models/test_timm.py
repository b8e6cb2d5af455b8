"""timm's conventions, for one network of every family."""

import pytest
import timm
import torch

import swconv.models  # noqa: F401

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


def test_checkpointed_blocks_give_the_same_gradients(model):
    x = torch.randn(2, 3, 32, 32)
    model.train()

    def gradients() -> list[torch.Tensor]:
        loss = model(x).square().sum()
        return list(torch.autograd.grad(loss, list(model.parameters())))

    for norm in model.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.momentum = 0.0
    expected = gradients()
    model.set_grad_checkpointing()
    for got, wanted in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(got, wanted)


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
