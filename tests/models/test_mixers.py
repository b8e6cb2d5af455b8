"""The mixers that SW is compared with: what they compute, what they refuse, how they fold."""

import pytest
import timm
import torch
from timm.utils import reparameterize_model
from torch import nn

import swconv.models  # noqa: F401
from swconv.models.mixers import ChainedConv2d, NormSkipConv2d, ParallelConv2d, StripConv2d
from swconv.weights import lay_out


def stirred(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.dim() == 1 and tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.3, 1.5)
    return module.double().eval()


MIXERS = {
    "strips": lambda: StripConv2d(6, 13, 5),
    "strips without norms": lambda: StripConv2d(6, 13, 3, bn=False),
    "laid out": lambda: StripConv2d(6, 13, 5, laid_out=True),
    "large and small": lambda: ParallelConv2d(6, {"large": (11, 1), "small": (5, 1)}),
    "dilated": lambda: ParallelConv2d(6, {"large": (13, 1), "dilated_5_1": (5, 1), "dilated_3_5": (3, 5)}),
    "dilated large": lambda: ParallelConv2d(6, {"large": (5, 3), "small": (5, 1)}, bn=False),
    "norm and skip": lambda: NormSkipConv2d(6, 5),
}


@pytest.mark.parametrize("name", MIXERS)
def test_folding_keeps_the_output_and_takes_in_what_follows(name):
    mixer = stirred(MIXERS[name]())
    x, scale, shift = torch.randn(2, 6, 11, 9).double(), torch.rand(6).double() + 0.5, torch.randn(6).double()
    expected = mixer(x)
    mixer.reparameterize()
    mixer.reparameterize()                                                  # idempotent
    torch.testing.assert_close(mixer(x), expected, atol=1e-12, rtol=1e-12)
    mixer.absorb(scale, shift)
    torch.testing.assert_close(mixer(x), expected * scale[:, None, None] + shift[:, None, None], atol=1e-12, rtol=1e-12)


def test_strips_are_the_three_depthwise_convolutions():
    mixer, x = stirred(StripConv2d(6, 13, 5)), torch.randn(2, 6, 11, 9).double()
    parts = [mixer.norms[name](mixer.convs[name](x)) for name in ("vertical", "horizontal", "small")]
    torch.testing.assert_close(mixer(x), sum(parts), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("extent", [51, 49, 47, 13])
@pytest.mark.parametrize("size", [5, 3])
@pytest.mark.parametrize("shape", [(56, 56), (28, 28), (14, 14), (7, 7), (9, 13), (1, 5)])
def test_laid_out_strips_are_the_strips(extent, size, shape):
    torch.manual_seed(0)
    strips, pieces = (StripConv2d(3, extent, size, bn=False, laid_out=laid_out).double() for laid_out in (False, True))
    with torch.no_grad():
        for name, conv in strips.convs.items():
            conv.weight.normal_()
            pieces.convs[name].weight.copy_(conv.weight if name == "small" else lay_out(conv.weight, size))
    x = torch.randn(2, 3, *shape).double()
    wanted = strips(x)
    assert ((pieces(x) - wanted).abs().max() / wanted.abs().max()).item() <= 1e-12


@pytest.mark.parametrize("orientation", ["vertical", "horizontal"])
def test_a_piece_shifted_to_its_place_does_its_part_of_the_strip(orientation):
    """The published sum: piece i of a grouped convolution with padding N - 1, read i N - m + p further on."""
    torch.manual_seed(0)
    mixer, x = StripConv2d(2, 13, 5, bn=False, laid_out=True).double(), torch.randn(1, 2, 9, 8).double()
    tall, conv = orientation == "vertical", mixer.convs[orientation]
    maps = nn.functional.conv2d(x, conv.weight, padding=(4, 2) if tall else (2, 4), groups=2)
    maps = (maps if tall else maps.transpose(2, 3)).unflatten(1, (2, 3))    # (1, C, n, along, across)
    along = maps.shape[3] - 4
    wanted = torch.zeros(1, 2, along, maps.shape[4], dtype=torch.float64)
    for i in range(3):
        for t in range(along):
            if 0 <= t + 5 * i - 6 + 4 < maps.shape[3]:
                wanted[:, :, t] += maps[:, :, i, t + 5 * i - 6 + 4]
    horizontal, vertical, _ = mixer.strips()
    zero = [torch.zeros_like(kernel) for kernel in mixer.strips()]
    kernels = (zero[0], vertical, zero[2]) if tall else (horizontal, zero[1], zero[2])
    got = sum(swconv.ops.strip_branches(x, *kernels, 6, 6))
    torch.testing.assert_close(got, wanted if tall else wanted.transpose(2, 3), atol=1e-12, rtol=1e-12)


def test_a_chain_has_a_norm_behind_every_link_and_a_small_kernel_beside():
    mixer, x = stirred(ChainedConv2d(4, [(7, 3), (3, 7)], 3)), torch.randn(1, 4, 9, 9).double()
    first, norm_1, second, norm_2 = mixer.chain
    expected = norm_2(second(norm_1(first(x)))) + mixer.small[1](mixer.small[0](x))
    torch.testing.assert_close(mixer(x), expected)
    mixer.reparameterize()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in mixer.modules())
    torch.testing.assert_close(mixer(x), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("arrangement", "sizes", "reach"), [
    ("single", 13, 6), ("parallel", 13, 6), ("sequential", 13, 8), ("stacked", 10, 10), ("dilated", 5, 6)])
def test_arrangements_reach_as_far_as_they_say(arrangement, sizes, reach):
    model = timm.create_model("lk_convnext_tiny", depths=(1,), dims=(4,), kernel_sizes=(sizes,), small_kernel=5,
                              arrangement=arrangement, bn=False, num_classes=2).double().eval()
    mixer, x = model.stages[0].blocks[0].mixer, torch.zeros(1, 4, 41, 41).double()
    nn.init.ones_(x[..., 20, 20])
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.fill_(1.0)
    touched = mixer(x)[0, 0].nonzero()
    assert (touched[:, 0].max() - 20).item() == reach


@pytest.mark.parametrize("name", ["slak_tiny", "lk_convnext_tiny", "unireplknet_tiny", "sw_tiny"])
def test_whole_networks_fold_exactly(name):
    torch.manual_seed(0)
    model = timm.create_model(name, depths=(1, 2), dims=(8, 12), kernel_sizes=(7, 9), num_classes=3, layer_scale_init=0.5)
    model, x = stirred(model), torch.randn(2, 3, 48, 40).double()
    expected = model(x)
    torch.testing.assert_close(reparameterize_model(model)(x), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("build", "sentence"), [
    (lambda: StripConv2d(4, 5, 5), "small_kernel < kernel_size"),
    (lambda: timm.create_model("lk_convnext_tiny", kernel_sizes=(12, 12, 12, 12)), "needs odd kernel sizes.*got 12 x 12"),
    (lambda: timm.create_model("lk_convnext_tiny", arrangement="sequential", small_kernel=4), "needs odd.*got 51 x 4"),
    (lambda: timm.create_model("sw_tiny", kernel_sizes=(51, 49, 2, 13)), "needs odd kernel sizes.*got 2 x 2"),
    (lambda: timm.create_model("slak_tiny", decomposed=False, laid_out=True), "needs decomposed=True"),
    (lambda: timm.create_model("lk_convnext_tiny", arrangement="cross"), "single, parallel, sequential, stacked or dilated"),
    (lambda: timm.create_model("unireplknet_tiny", kernel_sizes=(3, 21, 13, 13)), "got 21"),
])
def test_what_cannot_be_built_says_why(build, sentence):
    with pytest.raises(ValueError, match=sentence):
        build()
