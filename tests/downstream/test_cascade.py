"""Cascade Mask R-CNN against the golden run of MMDetection, and cases that can be worked out by hand."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torchvision.ops import box_iou

from swconv.downstream.boxes import random_sample
from swconv.downstream.detection import Detector
from swconv.downstream.detection_config import CASCADE
from swconv.downstream.pyramid import Pyramid
from swconv.downstream.roi import mask_targets, paste, pool

HEADS = Path("tests/golden/heads")
CONFIG = replace(CASCADE, num_classes=5, channels=16, fc_channels=32, train_proposals=(300, 80), test_proposals=(200, 60),
                 rpn_samples=100_000, detections=40)
CLOSE = {"atol": 2e-7, "rtol": 2e-7}                                  # MMDetection takes some losses in float32
NAMES = (                                                             # MMDetection's -> ours
    ("neck.lateral_convs", "neck.inner_blocks"), ("neck.fpn_convs", "neck.layer_blocks"),
    ("rpn_head.rpn_conv", "rpn.head.conv.0.conv"), ("rpn_head.rpn_cls", "rpn.head.cls_logits"),
    ("rpn_head.rpn_reg", "rpn.head.bbox_pred"), ("roi_head.bbox_head", "roi.boxes"), ("roi_head.mask_head", "roi.masks"),
    ("shared_convs", "convs"), ("shared_fcs", "fcs"), ("fc_cls", "cls"), ("fc_reg", "reg"), ("conv_logits", "logits"),
    (".conv.weight", ".0.weight"), (".conv.bias", ".0.bias"), (".bn.", ".1."),
)
LOSSES = {"rpn_objectness": "loss_rpn_cls", "rpn_box": "loss_rpn_bbox"} | {
    f"stage{s}_{ours}": f"s{s}.loss_{theirs}"
    for s in range(3) for ours, theirs in (("class", "cls"), ("box", "bbox"), ("mask", "mask"))}


def ours(name):
    for theirs, to in NAMES:
        name = name.replace(theirs, to)
    return name


def unpacked(bits, width):
    return torch.from_numpy(np.unpackbits(bits.numpy(), axis=-1)[..., :width]).bool()


@pytest.fixture(scope="module")
def golden():
    return load_file(HEADS / "cascade_mask_rcnn.safetensors")


@pytest.fixture(scope="module")
def described():
    return json.loads((HEADS / "manifest.json").read_text())["files"]["cascade_mask_rcnn.safetensors"]["config"]


def detector(golden, config=CONFIG):
    pyramid = Pyramid("slak_tiny", depths=(1, 1, 1, 1), dims=(16, 24, 32, 40), width_factor=1.0, kernel_sizes=(5, 5, 5, 5),
                      small_kernel=3)
    model = Detector(pyramid, config)
    state = {ours(name.removeprefix("weights.")): value for name, value in golden.items() if name.startswith("weights.")}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.startswith("pyramid.") or name.endswith("num_batches_tracked") for name in missing)
    return model.double()


def targets(golden, described, empty=()):
    found = []
    for image, meta in enumerate(described["img_metas"]):
        count = 0 if image in empty else len(golden[f"gt.{image}.labels"])
        found.append({
            "size": tuple(meta["img_shape"]), "original_size": tuple(meta["ori_shape"]), "image_id": image,
            "boxes": golden[f"gt.{image}.boxes"][:count], "labels": golden[f"gt.{image}.labels"][:count],
            "masks": unpacked(golden[f"gt.{image}.masks"], meta["batch_input_shape"][1])[:count]})
    return found


def proposed(golden, dtype=torch.float64):
    return [golden[f"proposals.{image}"].to(dtype) for image in range(2)]


def inputs(golden):
    return [golden[f"input.{level}"].double() for level in range(4)]


def train(model, maps, truth, proposals, sample=random_sample):
    """Losses, with the proposals that the reference's heads were given."""
    model.rpn.propose = lambda *_: (proposals, None)
    return model.train().from_maps(maps, truth, sample)


def assert_losses(losses, golden, prefix=""):
    assert losses.keys() == LOSSES.keys()
    for name, theirs in LOSSES.items():
        torch.testing.assert_close(losses[name], golden[f"{prefix}loss.{theirs}"].double(), **CLOSE,
                                   msg=lambda text, name=name: f"{name}: {text}")


def test_losses_and_gradients_are_the_reference_s(golden, described):
    model, maps = detector(golden), [x.requires_grad_() for x in inputs(golden)]
    losses = train(model, maps, targets(golden, described), proposed(golden))
    assert_losses(losses, golden)
    sum(losses.values()).backward()
    for level, x in enumerate(maps):
        torch.testing.assert_close(x.grad, golden[f"grad.input.{level}"], atol=2e-7, rtol=2e-6)
    parameters = dict(model.named_parameters())
    for name, norm in zip(described["param_names"], golden["grad.param_l2"], strict=True):
        torch.testing.assert_close(parameters[ours(name)].grad.norm(), norm, atol=2e-7, rtol=2e-6)


@pytest.mark.parametrize(("variant", "empty"), [("img1_empty", (1,)), ("all_empty", (0, 1))])
def test_images_without_objects_give_the_reference_s_losses(golden, described, variant, empty):
    losses = train(detector(golden), inputs(golden), targets(golden, described, empty), proposed(golden))
    assert_losses(losses, golden, f"variant.{variant}.")


def test_every_layer_has_a_gradient_without_any_object(golden, described):
    model = detector(golden)
    sum(train(model, inputs(golden), targets(golden, described, (0, 1)), proposed(golden)).values()).backward()
    assert all(weight.grad is not None for name, weight in model.named_parameters() if not name.startswith("pyramid."))


def test_sampled_training_is_the_reference_s_given_its_draws(golden, described):
    """Each call takes the indices that the reference drew, after checking that they were to be had."""
    used, labels = golden["sampled.rpn.label_weights"].bool(), golden["sampled.rpn.labels"]
    draws = [tuple((used[i] & (labels[i] == label)).nonzero()[:, 0] for label in (0, 1)) for i in range(2)]
    draws += [tuple(golden[f"sampled.stage{s}.{kind}_inds.{i}"] for kind in ("pos", "neg")) for s in range(3) for i in range(2)]
    waiting = iter(draws)

    def drawn(positive, negative, number, share):
        chosen = next(waiting)
        own = random_sample(positive, negative, number, share)
        for some, available, drawn_here in zip(chosen, (positive, negative), own, strict=True):
            assert torch.isin(some, available).all()
            assert len(some) == len(drawn_here)
        return chosen

    config = replace(CONFIG, rpn_samples=256, roi_samples=32)
    losses = train(detector(golden, config), inputs(golden), targets(golden, described), proposed(golden), drawn)
    assert_losses(losses, golden, "sampled.")
    assert next(waiting, None) is None


def test_float32_gives_the_reference_s_float32_losses(golden, described):
    model = detector(golden).float()
    losses = train(model, [x.float() for x in inputs(golden)], targets(golden, described), proposed(golden, torch.float32))
    for name, theirs in LOSSES.items():
        torch.testing.assert_close(losses[name], golden[f"float32.loss.{theirs}"], atol=2e-6, rtol=2e-6)


def test_anchors_targets_and_proposals_are_the_reference_s(golden, described):
    model, truth = detector(golden).train(), targets(golden, described)
    levels = model.features(inputs(golden))
    for level, x in enumerate(levels):
        expected = golden[f"fpn.{level}"]
        torch.testing.assert_close(x[:, : expected.shape[1]], expected, atol=1e-9, rtol=1e-9)
    logits, deltas, places = model.rpn(levels)
    priors = torch.cat(places)
    assert [len(place) for place in places] == golden["rpn.num_level_anchors"].tolist()
    torch.testing.assert_close(priors.float(), golden["rpn.anchors"], atol=0, rtol=0)
    torch.testing.assert_close(torch.cat(logits, 1), golden["rpn.cls_logits"], atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(torch.cat(deltas, 1).float(), golden["rpn.reg_deltas"], atol=1e-7, rtol=1e-6)
    limits = priors.new_tensor([[each["size"][1], each["size"][0]] * 2 for each in truth])
    for image, each in enumerate(truth):
        found = model.rpn.targets(priors, each["boxes"].double(), limits[image])
        assert ((found != -2) == golden["rpn.label_weights"][image].bool()).all()
        assert ((found >= 0) == ((golden["rpn.labels"][image] == 0) & (found != -2))).all()
    proposals, scores = model.rpn.propose(logits, deltas, places, limits)
    for image in range(2):
        torch.testing.assert_close(proposals[image], golden[f"rpn.train_proposals.{image}"], atol=1e-6, rtol=1e-7)
        torch.testing.assert_close(scores[image], golden[f"rpn.train_scores.{image}"], atol=1e-9, rtol=1e-9)


def test_every_stage_sees_the_reference_s_regions_and_masks(golden, described):
    """Regions of stage s are what stage s - 1 made of its own, so that they agree only if the refinement does."""
    model, truth = detector(golden).train(), targets(golden, described)
    seen, select = [], model.roi.select

    def watched(stage, proposals, target, sample):
        seen.append(select(stage, proposals, target, sample))
        return seen[-1]

    model.roi.select = watched
    train(model, inputs(golden), truth, proposed(golden))
    levels = model.features(inputs(golden))[:4]
    for stage in range(3):
        regions = seen[2 * stage : 2 * stage + 2]
        rois = torch.cat([F.pad(each.boxes, (1, 0), value=float(image)) for image, each in enumerate(regions)])
        torch.testing.assert_close(rois, golden[f"stage{stage}.rois"], atol=1e-6, rtol=1e-7)
        assert torch.cat([each.labels for each in regions]).tolist() == golden[f"stage{stage}.labels"].tolist()
        for image, each in enumerate(regions):
            assert each.objects.tolist() == golden[f"stage{stage}.pos_assigned_gt.{image}"].tolist()
            assert (each.given[: len(each.objects)] == golden[f"stage{stage}.pos_is_gt.{image}"].bool()).all()
        masks = torch.cat([mask_targets(target["masks"], each) for target, each in zip(truth, regions, strict=True)])
        assert torch.equal(masks, unpacked(golden[f"stage{stage}.mask_targets"], 784).view(-1, 28, 28))
        pooled = pool(levels, rois, 7)
        torch.testing.assert_close(pooled[:4], golden[f"stage{stage}.roi_feats_first4"], atol=1e-7, rtol=1e-6)
        torch.testing.assert_close(pooled.mean((1, 2, 3)), golden[f"stage{stage}.roi_feats_mean_per_roi"], atol=1e-7, rtol=1e-6)


def test_detections_and_masks_are_the_reference_s(golden, described):
    model, truth = detector(golden).eval(), targets(golden, described)
    with torch.no_grad():
        detections = model.from_maps(inputs(golden), truth, random_sample)
    for image, found in enumerate(detections):
        prefix, (height, width) = f"test.det.{image}.", truth[image]["original_size"]
        torch.testing.assert_close(found["boxes"], golden[f"{prefix}boxes_original_scale"], atol=1e-5, rtol=1e-7)
        torch.testing.assert_close(found["scores"], golden[f"{prefix}scores"], atol=1e-7, rtol=1e-7)
        assert found["labels"].tolist() == golden[f"{prefix}labels"].tolist()
        assert found["masks"].shape == (40, height, width)
        assert torch.equal(found["masks"], unpacked(golden[f"{prefix}mask_pasted_packed"], width))


def test_proposals_in_evaluation_are_the_reference_s(golden, described):
    model, truth = detector(golden).eval(), targets(golden, described)
    limits = torch.tensor([[each["size"][1], each["size"][0]] * 2 for each in truth]).double()
    proposals, scores = model.rpn.propose(*model.rpn(model.features(inputs(golden))), limits)
    for image in range(2):
        torch.testing.assert_close(proposals[image], golden[f"test.proposals.{image}"], atol=1e-6, rtol=1e-7)
        torch.testing.assert_close(scores[image], golden[f"test.proposal_scores.{image}"], atol=1e-9, rtol=1e-9)


def test_a_full_mask_fills_its_box():
    mask = paste(torch.ones(1, 28, 28), torch.tensor([[2.0, 1.0, 6.0, 4.0]]), (6, 8))[0]
    expected = torch.zeros(6, 8, dtype=torch.bool)
    expected[1:4, 2:6] = True
    assert torch.equal(mask, expected)


def test_a_mask_beyond_the_image_is_cut():
    masks = paste(torch.ones(2, 28, 28), torch.tensor([[-3.0, -3.0, 2.0, 2.0], [9.0, 9.0, 12.0, 12.0]]), (6, 8))
    assert masks.sum((1, 2)).tolist() == [4, 0]


def test_images_go_in_and_losses_or_detections_come_out():
    torch.manual_seed(0)
    pyramid = Pyramid("sw_tiny", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), kernel_sizes=(7, 7, 7, 7))
    model = Detector(pyramid, replace(CONFIG, num_classes=2, channels=8, test_proposals=(20, 10), min_score=0.0))
    images = torch.randn(2, 3, 64, 96)
    masks = torch.zeros(1, 64, 96, dtype=torch.bool)
    masks[:, 8:40, 8:40] = True
    truth = [{"size": (64, 96), "original_size": (128, 192), "boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]),
              "labels": torch.tensor([1]), "masks": masks}]
    truth.append(truth[0] | {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "masks": masks[:0]})
    losses = model(images, truth)
    assert losses.keys() == LOSSES.keys()
    sum(losses.values()).backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())
    with torch.no_grad():
        for found in model.eval()(images, truth):
            assert len(found["boxes"]) > 0
            assert (found["boxes"][:, 2:] <= torch.tensor([192, 128])).all()
            assert found["masks"].shape == (len(found["boxes"]), 128, 192)


def test_a_class_out_of_range_and_a_missing_mask_are_told(golden, described):
    model, truth = detector(golden).train(), targets(golden, described)
    wrong = truth[0] | {"labels": truth[0]["labels"] + 5}
    with pytest.raises(ValueError, match="classes 0 to 4, got .* in image 0"):
        train(model, inputs(golden), [wrong, truth[1]], proposed(golden))
    with pytest.raises(ValueError, match="masks are needed for all 5 boxes of image 0, got 3"):
        train(model, inputs(golden), [truth[0] | {"masks": truth[0]["masks"][:3]}, truth[1]], proposed(golden))
    with pytest.raises(ValueError, match="one target per image, got 1 for 2"):
        model(torch.zeros(2, 3, 32, 32), truth[:1])


def test_half_precision_maps_keep_boxes_in_full_precision(golden, described):
    """A coordinate of 150 px has steps of 1 px in bfloat16."""
    model, maps = detector(golden).float(), [x.float() for x in inputs(golden)]
    expected = train(model, maps, targets(golden, described), proposed(golden, torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        found = train(model, maps, targets(golden, described), proposed(golden, torch.float32))
        assert model.rpn(model.features(maps))[2][0].dtype == torch.float32
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), rel=0.05, abs=0.02), name


def rectangle_and_ellipse(seed):
    """An image with one of each, side by side, and what there is to find."""
    generator = torch.Generator().manual_seed(seed)
    image, masks = 0.1 * torch.randn(3, 64, 96, generator=generator), []
    row, column = torch.meshgrid(torch.arange(64) + 0.5, torch.arange(96) + 0.5, indexing="ij")
    boxes = []
    for left, label in ((0, 0), (48, 1)):
        width, height = torch.randint(24, 44, (2,), generator=generator).tolist()
        x, y = left + 2, int(torch.randint(0, 64 - height, (), generator=generator))
        across, down = (column - x - width / 2) / (width / 2), (row - y - height / 2) / (height / 2)
        inside = (across.square() + down.square() < 1) if label else (across.abs() < 1) & (down.abs() < 1)
        image[label][inside] += 2
        boxes.append([x, y, x + width, y + height])
        masks.append(inside)
    return image, {"boxes": torch.tensor(boxes).float(), "labels": torch.tensor([0, 1]), "masks": torch.stack(masks),
                   "size": (64, 96), "original_size": (64, 96)}


@pytest.mark.slow
def test_what_is_trained_is_what_is_found():
    """Targets, losses and decoding belong together: a small network learns two images by heart."""
    torch.manual_seed(0)
    pyramid = Pyramid("sw_tiny", depths=(1, 1, 1, 1), dims=(16, 16, 32, 32), kernel_sizes=(7, 7, 7, 7))
    model = Detector(pyramid, replace(CONFIG, num_classes=2, fc_channels=64, train_proposals=(100, 40), roi_samples=32,
                                      test_proposals=(50, 20)))
    images, truth = zip(*map(rectangle_and_ellipse, range(2)), strict=True)
    images, optimizer = torch.stack(images), torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(200):
        optimizer.zero_grad()
        sum(model(images, truth).values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10)
        optimizer.step()
    with torch.no_grad():
        for found, wanted in zip(model.eval()(images, truth), truth, strict=True):
            for label in (0, 1):
                best = (found["labels"] == label).nonzero()[0, 0]
                assert box_iou(found["boxes"][best, None], wanted["boxes"][label, None]).item() > 0.7
                mask, goal = found["masks"][best], wanted["masks"][label]
                assert (mask & goal).sum() / (mask | goal).sum() > 0.7
                assert found["scores"][best] > 0.5
