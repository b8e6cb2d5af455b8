"""Folding a block for inference: every fold by itself, all of them on whole networks, in float64."""

import operator

import pytest
import timm
import torch
from timm.layers.grn import GlobalResponseNorm
from timm.utils import reparameterize_model
from torch import nn

import swconv.models  # noqa: F401
from swconv.models.network import Block, ResponseNorm
from swconv.models.sw import NormSkipConv2d, depthwise
from swconv.ops import ShiftwiseConv2d

SMALL = {"num_classes": 7, "depths": (1, 2), "dims": (12, 20), "kernel_sizes": (13, (7, 3)), "drop_path_rate": 0.1}


def stir(module: nn.Module) -> nn.Module:
    """Everything that training moves, away from where it starts: a fold of an identity would show nothing."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.3, 1.5)
    for name, buffer in module.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            nn.init.uniform_(buffer, 0.3, 1.5)
    return module.double().eval()


def block(skeleton="unireplknet", use_se=True, layer_scale_init=0.5, mixer=None) -> Block:
    mixer = mixer or ShiftwiseConv2d(10, 13, ghost_ratio=0.3, even_split=skeleton == "unireplknet")
    return stir(Block(mixer, 10, skeleton, use_se, layer_scale_init, drop_path=0.0))


def unchanged(module: Block) -> float:
    """Largest change of the output by folding, relative to the output."""
    x = torch.randn(2, 10, 9, 11, dtype=torch.float64)
    expected = module(x)
    module.reparameterize()
    return ((module(x) - expected).abs().max() / expected.abs().max()).item()


def test_the_response_norm_is_timms_also_where_a_channel_is_dead():
    ours, timms = stir(ResponseNorm(6)), stir(GlobalResponseNorm(6))
    x = torch.randn(3, 5, 4, 6, dtype=torch.float64)
    x[..., 2] = 0
    gradient = torch.randn_like(x)
    for got, wanted in zip(*(torch.autograd.grad(norm(y), [y, *norm.parameters()], gradient)
                             for norm in (ours, timms) for y in [x.clone().requires_grad_()]), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(ours(x), timms(x), atol=1e-12, rtol=1e-12)


def test_the_mixers_branches_norms_and_skip_become_one_kernel_and_its_repr_says_so():
    module = block("convnext", use_se=False)
    assert "merged" not in repr(module.mixer)
    assert unchanged(module) < 1e-12
    assert module.mixer.merged
    assert "merged into one plus-shaped kernel" in repr(module.mixer)


def test_the_blocks_batchnorm_goes_into_the_mixer():
    module = block()
    assert isinstance(module.norm, nn.BatchNorm2d)
    assert unchanged(module) < 1e-12
    assert isinstance(module.norm, nn.Identity)


@pytest.mark.parametrize(("skeleton", "use_se"), [("unireplknet", True), ("unireplknet", False), ("convnext", False)])
def test_the_order_of_channels_goes_into_what_reads_them(skeleton, use_se):
    module = block(skeleton, use_se)
    x = torch.randn(1, 10, 6, 6, dtype=torch.float64)
    ghost = int(module.mixer.ghost[0])
    place = len(module.mixer.mixed)                                   # where the first ghost stands officially
    before = module.mixer(x)[:, place]
    assert unchanged(module) < 1e-12
    after = module.mixer(x)[:, ghost]                                 # now where it stood in the input
    assert torch.equal(before, x[:, ghost])
    torch.testing.assert_close(after, x[:, ghost] * module.mixer.kernel_c[ghost, 0, 1, 1] + module.mixer.bias[ghost])


def test_grns_shift_the_closing_norm_and_the_layer_scale_go_into_the_contraction():
    module = block(mixer=nn.Identity(), use_se=False)
    module.norm = nn.Identity()
    assert module.grn.bias.abs().min() > 0
    assert unchanged(module) < 1e-12
    assert module.grn.bias is None
    assert isinstance(module.norm_out, nn.Identity)
    assert module.gamma is None


@pytest.mark.parametrize("part", ["grn.bias", "gamma", *(f"norm_out.{name}" for name in ("weight", "bias", "running_mean",
                                                                                         "running_var"))])
def test_every_part_of_the_tail_goes_into_the_contraction_alone(part):
    torch.manual_seed(0)
    module = Block(nn.Identity(), 10, "unireplknet", use_se=False, layer_scale_init=1.0, drop_path=0.0).double().eval()
    module.norm, x = nn.Identity(), torch.randn(2, 10, 9, 11, dtype=torch.float64)
    before = module(x)
    nn.init.uniform_(operator.attrgetter(part)(module), 0.3, 0.9)
    assert (module(x) - before).abs().max() > 0.01 * before.abs().max()
    assert unchanged(module) < 1e-12


def test_the_layer_scale_goes_into_the_contraction_of_the_other_skeleton_too():
    module = block("convnext", use_se=False, mixer=nn.Identity())
    assert unchanged(module) < 1e-12
    assert module.gamma is None


def test_synchronised_norms_fold_as_plain_ones_do():
    module = block()
    x = torch.randn(2, 10, 9, 11, dtype=torch.float64)
    expected = module(x)
    module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    module.reparameterize()
    torch.testing.assert_close(module(x), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("mixer", [depthwise, NormSkipConv2d])
def test_plain_mixers_take_norm_and_skip_too(mixer):
    module = block(mixer=mixer(10, 3))
    assert unchanged(module) < 1e-12
    assert not [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]


@pytest.mark.parametrize("arguments", [
    {},
    {"use_se": False},
    {"ghost_ratio": 0.0},
    {"padding": "half"},
    {"norm": "filter", "padding": "half"},
    {"norm": None, "skip": False},
    {"depthwise_norm_skip": True},
    {"layer_scale_init": 0.0},
], ids=str)
@pytest.mark.parametrize("name", ["sw_tiny", "sw_slak_tiny"])
def test_a_whole_network_folds_exactly_and_once(name, arguments):
    model = stir(timm.create_model(name, **(SMALL | {"layer_scale_init": 0.5} | arguments)))
    x = torch.randn(2, 3, 40, 56, dtype=torch.float64)
    expected = model(x)
    folded = reparameterize_model(model)
    assert torch.equal(model(x), expected)                            # the original stays as it is
    for _ in range(2):
        torch.testing.assert_close(folded(x), expected, atol=1e-12 * expected.abs().max().item(), rtol=0)
        reparameterize_model(folded, inplace=True)                    # a second time changes nothing
    assert not [m for m in folded.stages.modules() if isinstance(m, nn.BatchNorm2d)]
