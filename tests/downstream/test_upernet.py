"""UPerNet against the golden run of MMSegmentation, and inference worked out by hand."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from swconv.downstream.pyramid import Pyramid
from swconv.downstream.upernet import (
    UPerNet,
    UPerNetConfig,
    multi_scale_flip,
    segmentation_loss,
    slide_inference,
    whole_inference,
)

CLOSE = {"atol": 1e-9, "rtol": 1e-9}
CONFIG = UPerNetConfig(num_classes=7, channels=32, aux_channels=16, dropout=0.0)


def ours(name):
    return name.replace(".conv.", ".0.").replace(".bn.", ".1.")


@pytest.fixture(scope="module")
def golden():
    return load_file(Path("tests/golden/heads/upernet.safetensors"))


@pytest.fixture
def model(golden):
    pyramid = Pyramid("slak_tiny", depths=(1, 1, 1, 1), dims=(16, 32, 64, 128), width_factor=1.0, kernel_sizes=(5, 5, 5, 5),
                      small_kernel=3)
    model = UPerNet(pyramid, CONFIG)
    state = {ours(name.removeprefix("weights.")): value for name, value in golden.items() if name.startswith("weights.")}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.startswith("pyramid.") or name.endswith("num_batches_tracked") for name in missing)
    return model.double()


def inputs(golden):
    return [golden[f"input.{level}"].double().requires_grad_() for level in range(4)]


def test_logits_in_evaluation_are_the_reference_s(golden, model):
    maps = inputs(golden)
    model.eval()
    torch.testing.assert_close(model.decode_head(maps), golden["eval.decode.logits"], **CLOSE)
    torch.testing.assert_close(model.auxiliary_head(maps[2]), golden["eval.aux.logits"], **CLOSE)


def test_losses_gradients_and_statistics_are_the_reference_s(golden, model):
    maps = inputs(golden)
    losses = model.train().losses(maps, golden["label"].long())
    torch.testing.assert_close(losses["decode"], golden["train.decode.loss_ce"], **CLOSE)
    torch.testing.assert_close(losses["auxiliary"], golden["train.aux.loss_ce"], **CLOSE)
    sum(losses.values()).backward()
    for level, x in enumerate(maps):
        torch.testing.assert_close(x.grad, golden[f"grad.input.{level}"], **CLOSE)
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    compared = [name for name in golden if name.startswith("grad.param.")]
    for name in compared:
        torch.testing.assert_close(parameters[ours(name.removeprefix("grad.param."))].grad, golden[name], **CLOSE)
    statistics = [name for name in golden if name.startswith("bn_after_one_step.")]
    for name in statistics:
        torch.testing.assert_close(buffers[ours(name.removeprefix("bn_after_one_step."))], golden[name], **CLOSE)
    assert (len(compared), len(statistics)) == (6, 6)


def test_float32_gives_the_reference_s_losses(golden, model):
    losses = model.float().train().losses([x.float() for x in inputs(golden)], golden["label"].long())
    torch.testing.assert_close(losses["decode"], golden["float32.train.decode.loss_ce"], atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(losses["auxiliary"], golden["float32.train.aux.loss_ce"], atol=2e-6, rtol=2e-6)


def test_pixels_without_a_label_add_nothing_but_are_counted():
    labels = torch.tensor([[[0, 255], [255, 255]]])
    loss = segmentation_loss(torch.zeros(1, 3, 2, 2), labels)
    torch.testing.assert_close(loss, torch.tensor(3.0).log() / 4)


def test_a_label_out_of_range_is_told():
    with pytest.raises(ValueError, match="classes 0 to 2, or 255 for none, got 3"):
        segmentation_loss(torch.zeros(1, 3, 2, 2), torch.tensor([[[0, 3], [255, 1]]]))


def test_images_go_in_and_losses_or_logits_come_out():
    torch.manual_seed(0)
    model = UPerNet(Pyramid("sw_tiny", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), kernel_sizes=(7, 7, 7, 7)), CONFIG)
    images, targets = torch.randn(2, 3, 64, 96), [{"segmentation": torch.randint(0, 7, (64, 96), dtype=torch.uint8)}] * 2
    losses = model(images, targets)
    sum(losses.values()).backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())
    assert model.eval()(images).shape == (2, 7, 64, 96)
    model.train()
    with pytest.raises(ValueError, match="needs at least 2 images per step"):
        model(images[:1], targets[:1])
    with pytest.raises(ValueError, match="needs targets to train"):
        model(images)


def positions(images):
    """Logits that say where their window lies: its first pixel, in every place."""
    return images[:, :1, :1, :1].expand(-1, 1, *images.shape[-2:])


def test_windows_end_with_the_image_and_are_averaged_where_they_overlap():
    images = torch.arange(7.0).expand(1, 3, 1, 7)
    logits = slide_inference(positions, images, crop=(1, 4), stride=(1, 2))        # windows start at 0, 2, 3
    torch.testing.assert_close(logits[0, 0, 0], torch.tensor([0.0, 0.0, 1.0, 5 / 3, 2.5, 2.5, 3.0]))


def test_an_image_smaller_than_the_window_is_its_own_window():
    images = torch.randn(2, 3, 5, 3)
    torch.testing.assert_close(slide_inference(lambda x: x, images, (8, 8), (4, 4)), images)


def test_windows_of_a_tall_image_cover_every_pixel_once_each_or_more():
    images = torch.randn(1, 3, 40, 23)
    torch.testing.assert_close(slide_inference(lambda x: x, images, (16, 16), (11, 11)), images)


def test_whole_inference_has_the_size_of_the_file():
    assert whole_inference(lambda x: x, torch.zeros(1, 3, 8, 8), (13, 5)).shape == (1, 3, 13, 5)


def test_views_have_the_recipe_s_sizes_and_mirrored_ones_are_mirrored_back():
    seen = []

    def infer(x):
        seen.append(tuple(x.shape[-2:]))
        return x

    image = torch.randint(0, 256, (3, 30, 40), dtype=torch.uint8)
    chances = multi_scale_flip(infer, image, lambda x: x / 100, (30, 40), ratios=(1.0,), scale=None)
    torch.testing.assert_close(chances, (image / 100).softmax(0))
    multi_scale_flip(infer, image, lambda x: x, (30, 40), (0.5, 1.75), flip=False, scale=(80, 50))   # factor min(2, 5 / 3)
    multi_scale_flip(infer, image, lambda x: x, (30, 40), (0.5,), flip=False, scale=(80, 50), divisor=32)
    assert seen == [(30, 40), (30, 40), (25, 33), (88, 117), (32, 64)]


def test_probabilities_are_averaged_not_logits():
    """Logits 0 and 4 of the two views: the mean of the sigmoids is not the sigmoid of 2."""
    values = iter([0.0, 4.0])

    def infer(x):
        return torch.stack([torch.full(x.shape[-2:], next(values)), torch.zeros(x.shape[-2:])])[None]

    chances = multi_scale_flip(infer, torch.zeros(3, 4, 4, dtype=torch.uint8), lambda x: x, (4, 4), (1.0,), scale=None)
    expected = torch.tensor([0.0, 4.0]).sigmoid().mean()
    torch.testing.assert_close(chances[0], expected.expand(4, 4))
    torch.testing.assert_close(chances.sum(0), torch.ones(4, 4))
