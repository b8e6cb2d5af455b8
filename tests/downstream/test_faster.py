"""Faster R-CNN: what its row changes, each part computed anew from its definition."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from swconv.downstream.boxes import decode, random_sample
from swconv.downstream.detection import Detector
from swconv.downstream.detection_config import FASTER
from swconv.downstream.pyramid import Pyramid
from swconv.downstream.roi import pool

CONFIG = replace(FASTER, num_classes=3, channels=8, fc_channels=16, train_proposals=(200, 50), test_proposals=(200, 50))
TRUTH = {"boxes": torch.tensor([[4.0, 6.0, 40.0, 60.0], [50.0, 10.0, 90.0, 44.0]]).double(), "labels": torch.tensor([2, 0]),
         "size": (64, 96), "original_size": (128, 144)}
EMPTY = TRUTH | {"boxes": torch.zeros(0, 4).double(), "labels": torch.zeros(0, dtype=torch.int64)}


@pytest.fixture
def model():
    torch.manual_seed(0)
    pyramid = Pyramid("slak_tiny", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), width_factor=1.0, kernel_sizes=(5, 5, 5, 5),
                      small_kernel=3)
    model = Detector(pyramid, CONFIG).double()
    for layer in (model.rpn.head.bbox_pred, model.rpn.head.cls_logits, model.roi.boxes[0].reg, model.roi.boxes[0].cls):
        torch.nn.init.normal_(layer.weight, std=0.3)
    return model


@pytest.fixture
def maps():
    torch.manual_seed(1)
    return [torch.randn(2, 8, 64 // stride, 96 // stride).double() for stride in (4, 8, 16, 32)]


def test_two_linear_layers_and_no_masks(model):
    assert [tuple(fc.weight.shape) for fc in model.roi.boxes[0].fcs] == [(16, 8 * 49), (16, 16)]
    assert len(model.roi.boxes) == 1
    assert not len(model.roi.masks)


def test_anchors_beyond_the_image_are_trained(model, maps):
    levels = model.features(maps)
    priors, limits = torch.cat(model.rpn(levels)[2]), torch.tensor([96.0, 64.0] * 2).double()
    outside = ((priors < 0) | (priors > limits)).any(1)
    found = model.rpn.targets(priors, TRUTH["boxes"], limits)
    assert (found[outside] != -2).any()
    model.rpn.config = replace(CONFIG, anchors_inside=True)
    assert (model.rpn.targets(priors, TRUTH["boxes"], limits)[outside] == -2).all()


def test_both_box_losses_are_l1_over_all_samples(model, maps):
    """Recomputed one sample at a time from the definition of the code: shifts in sides, log of the ratio, over std."""
    chosen = []

    def watched(positive, negative, number, share):
        chosen.append(random_sample(positive, negative, number, share))
        return chosen[-1]

    model.train()
    levels = model.features(maps)
    logits, deltas, places = model.rpn(levels)
    limits = torch.tensor([[96.0, 64.0] * 2] * 2).double()
    losses = model.rpn.losses(logits, deltas, places, [TRUTH["boxes"], EMPTY["boxes"]], limits, watched)
    priors, (positive, negative) = torch.cat(places), chosen[0]
    found = model.rpn.targets(priors, TRUTH["boxes"], limits[0])
    total = 0.0
    for index in positive.tolist():
        total += l1(priors[index], TRUTH["boxes"][found[index]], torch.cat(deltas, 1)[0, index], (1.0,) * 4)
    assert len(positive) > 0
    samples = len(positive) + len(negative) + 256 + 1                              # no positive one counts as one
    torch.testing.assert_close(losses["rpn_box"], total / samples)

    chosen.clear()
    proposals = [boxes + torch.tensor([3.0, -2.0, 1.0, 2.0]) for boxes in (TRUTH["boxes"], TRUTH["boxes"])]
    losses = model.roi.losses(levels[:4], proposals, [TRUTH, EMPTY], limits, watched)
    regions = [model.roi.select(CONFIG.stages[0], *pair, random_sample) for pair in zip(proposals, (TRUTH, EMPTY), strict=True)]
    assert regions[0].labels.tolist() == [2, 0, 2, 0]
    assert regions[1].labels.tolist() == [3, 3]
    rois = torch.cat([F.pad(each.boxes, (1, 0), value=float(image)) for image, each in enumerate(regions)])
    scores, moves = model.roi.boxes[0](pool(levels[:4], rois, 7))
    total = sum(l1(rois[row, 1:], TRUTH["boxes"][row % 2], moves[row, label], CONFIG.stages[0].std)
                for row, label in enumerate([2, 0, 2, 0]))
    torch.testing.assert_close(losses["stage0_box"], total / 6)
    torch.testing.assert_close(losses["stage0_class"], F.cross_entropy(scores, torch.tensor([2, 0, 2, 0, 3, 3])))


def l1(prior, box, predicted, std):
    sides, goal = prior[2:] - prior[:2], box[2:] - box[:2]
    shift = ((box[:2] + goal / 2) - (prior[:2] + sides / 2)) / sides
    expected = torch.cat([shift, (goal / sides).log()]) / torch.tensor(std).double()
    return (predicted - expected).abs().sum()


def test_detections_have_the_file_s_pixels_and_are_few_and_apart(model, maps):
    model.eval()
    with torch.no_grad():
        found = model.from_maps(maps, [TRUTH, TRUTH | {"original_size": (64, 96)}], random_sample)
    for each, (height, width) in zip(found, ((128, 144), (64, 96)), strict=True):
        assert 0 < len(each["boxes"]) <= 100
        assert "masks" not in each
        assert (each["scores"] > 0.05).all()
        assert (each["scores"].diff() <= 0).all()
        assert (each["boxes"] >= 0).all()
        assert (each["boxes"] <= torch.tensor([width, height] * 2)).all()
        assert (each["boxes"][:, 2:].amax(0) > torch.tensor([width, height]) * 0.8).all()


def test_scales_of_the_sides_may_differ(model, maps):
    """The same image read from a file of other proportions: the same boxes, each side in the file's pixels."""
    model.eval()
    with torch.no_grad():
        one, two = (model.from_maps(maps, [TRUTH | {"original_size": size}] * 2, random_sample)[0]
                    for size in ((64, 96), (128, 144)))
    torch.testing.assert_close(one["boxes"] * torch.tensor([1.5, 2.0, 1.5, 2.0]).double(), two["boxes"])
    assert torch.equal(one["labels"], two["labels"])


def test_without_deltas_the_best_anchors_are_the_proposals(model, maps):
    model.train()
    logits, deltas, places = model.rpn(model.features(maps))
    deltas = [torch.zeros_like(x) for x in deltas]
    limits = torch.tensor([[96.0, 64.0] * 2] * 2).double()
    proposals, scores = model.rpn.propose(logits, deltas, places, limits)
    best = torch.cat(logits, 1)[0].argmax()
    expected = decode(torch.cat(places)[best], torch.zeros(4).double(), (1.0,) * 4, limits[0])
    torch.testing.assert_close(proposals[0][0], expected)
    torch.testing.assert_close(scores[0][0], torch.cat(logits, 1)[0].max().sigmoid())
    assert len(proposals[0]) <= 50
