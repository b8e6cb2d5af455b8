import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from shapely import affinity
from shapely.geometry import box as rectangle
from torch import nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from swconv.downstream.fcos3d import (
    FCOS3D,
    GROUP_NAMES,
    FCOS3DConfig,
    FCOS3DHead,
    Points,
    assign,
    birds_eye,
    candidates,
    decode,
    losses,
    project,
    rotated_iou,
    rotated_nms,
)
from swconv.downstream.pyramid import Pyramid

HEADS = Path(__file__).parents[1] / "golden" / "heads"
SMALL = FCOS3DConfig(fpn_channels=32, channels=32, centerness_channels=16, groups=8, deformable=False, candidates=100,
                     nms_iou=0.3)
LOSSES = {"cls": "cls", "offset": "offset", "depth": "depth", "size": "size", "yaw": "rotsin", "velocity": "velo",
          "direction": "dir", "attr": "attr", "centerness": "centerness"}           # ours -> the golden names
CLOSE = {"atol": 1e-9, "rtol": 1e-9}


@pytest.fixture(scope="module")
def golden():
    return load_file(HEADS / "fcos3d.safetensors")


@pytest.fixture(scope="module")
def head(golden):
    module = FCOS3DHead(SMALL)
    module.load_state_dict({name[8:]: tensor for name, tensor in golden.items() if name.startswith("weights.")})
    return module.double()


def features(golden, dtype=torch.float64):
    return [golden[f"input.{level}"].to(dtype).detach().clone().requires_grad_() for level in range(5)]


def targets(golden, dtype=torch.float64):
    return [
        {"boxes": golden[f"gt.{i}.bboxes_2d"].to(dtype), "labels": golden[f"gt.{i}.labels"],
         "attributes": golden[f"gt.{i}.attr_labels"], "boxes3d": golden[f"gt.{i}.bboxes_3d_gravity_center"].to(dtype),
         "camera": golden[f"cam2img.{i}"][:3, :3].to(dtype)}
        for i in range(2)
    ]


def empty(target):
    return target | {name: target[name][:0] for name in ("boxes", "labels", "attributes", "boxes3d")}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_outputs_are_mmdet3ds(golden, head, training):
    said = head.train(training)(features(golden))
    if training:
        for ours, theirs in zip(said[:4], ("cls_score", "attr", "dir_cls", "centerness"), strict=True):
            torch.testing.assert_close(ours, golden[f"train.{theirs}"].view_as(ours), **CLOSE)
    torch.testing.assert_close(said.boxes, golden["train.bbox_pred" if training else "eval.bbox_pred"], **CLOSE)


def test_centres_are_projections_and_points_lie_in_the_middle_of_their_cells(golden, head):
    for i, target in enumerate(targets(golden)):
        torch.testing.assert_close(project(target["boxes3d"], target["camera"]), golden[f"gt.{i}.centers_2d"].double(),
                                   atol=2e-5, rtol=0)
    points = head.points(features(golden))
    assert torch.equal(points.places.float(), golden["points"])
    assert points.counts == tuple(golden["num_level_points"].tolist())
    assert points.stride[[0, 640, 800, 840, 852]].tolist() == [8, 16, 32, 64, 128]


def test_targets_are_mmdet3ds(golden, head):
    points = head.points(features(golden))
    for i, target in enumerate(targets(golden)):
        assigned = assign(points, target, SMALL)
        positive = assigned.labels < 10
        assert torch.equal(assigned.labels, golden["target.labels"][i].long())
        assert torch.equal(assigned.attributes.where(positive, 9), golden["target.attr"][i].long())
        torch.testing.assert_close(assigned.boxes[positive], golden["target.bbox_targets"][i][positive], atol=5e-6, rtol=0)
        torch.testing.assert_close(assigned.centerness[positive], golden["target.centerness"][i][positive], atol=5e-6, rtol=0)
    assert int((golden["target.labels"] < 10).sum()) == 89


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_losses_are_mmdet3ds_within_1e_5(golden, head, dtype):
    maps = features(golden, dtype)
    found = head.train().to(dtype)(maps)
    found = losses(found, head.points(maps), targets(golden, dtype), SMALL)
    head.double()
    assert found.keys() == LOSSES.keys()
    for ours, theirs in LOSSES.items():
        assert found[ours].item() == pytest.approx(golden[f"loss.loss_{theirs}"].item(), abs=1e-5, rel=0)


@pytest.mark.parametrize("variant", ["img1_empty", "all_empty"])
def test_images_without_boxes_count_as_background(golden, head, variant):
    some = targets(golden)
    some = [some[0] if variant == "img1_empty" else empty(some[0]), empty(some[1])]
    maps = features(golden)
    head.zero_grad()
    found = losses(head.train()(maps), head.points(maps), some, SMALL)
    for ours, theirs in LOSSES.items():
        assert found[ours].item() == pytest.approx(golden[f"variant.{variant}.loss.loss_{theirs}"].item(), abs=1e-5, rel=1e-6)
    sum(found.values()).backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in head.parameters())


def test_gradients_are_mmdet3ds(golden, head):
    with safe_open(HEADS / "fcos3d.safetensors", "pt") as file:
        names = json.loads(file.metadata()["meta"])["param_names"]
    maps = features(golden)
    head.zero_grad()
    sum(losses(head.train()(maps), head.points(maps), targets(golden), SMALL).values()).backward()
    for level, x in enumerate(maps):
        torch.testing.assert_close(x.grad, golden[f"grad.input.{level}"], atol=1e-5, rtol=1e-5)
    weights = dict(head.named_parameters())
    assert list(weights.keys() - set(names)) == []
    norms = torch.stack([weights[name].grad.norm() for name in names])
    torch.testing.assert_close(norms, golden["grad.param_l2"], atol=1e-5, rtol=1e-5)


def test_detections_are_mmdet3ds(golden, head):
    maps = features(golden)
    said, points = head.eval()(maps), head.points(maps)
    for i, target in enumerate(targets(golden)):
        boxes, scores, attributes = candidates(type(said)(*(part[i] for part in said)), points, target["camera"], SMALL)
        torch.testing.assert_close(boxes, golden[f"test.{i}.boxes_before_nms"], atol=5e-6, rtol=1e-6)
        torch.testing.assert_close(scores, golden[f"test.{i}.nms_scores"][:, :-1], **CLOSE)
        assert torch.equal(attributes, golden[f"test.{i}.attr_before_nms"].long())
        corners = birds_eye(boxes)
        there = golden[f"test.{i}.bev_xyxyr"].double()
        torch.testing.assert_close((there[:, :2] + there[:, 2:4]) / 2, corners[:, :2], atol=2e-5, rtol=1e-6)
        torch.testing.assert_close(there[:, 4], corners[:, 4], atol=5e-6, rtol=1e-6)
    cameras = torch.stack([target["camera"] for target in targets(golden)])
    for i, found in enumerate(decode(said, points, cameras, SMALL)):
        assert torch.equal(found["labels"], golden[f"test.{i}.det.labels"].long())
        assert torch.equal(found["attributes"], golden[f"test.{i}.det.attr"].long())
        torch.testing.assert_close(found["scores"], golden[f"test.{i}.det.scores"], atol=1e-7, rtol=0)
        torch.testing.assert_close(found["boxes3d"][:, :3], golden[f"test.{i}.det.gravity_center"].double(), atol=2e-5, rtol=0)
        torch.testing.assert_close(found["boxes3d"][:, 3:], golden[f"test.{i}.det.boxes_3d_bottom_center"][:, 3:].double(),
                                   atol=2e-5, rtol=0)


def test_the_fpn_is_mmdets_with_two_more_convolutions_on_its_output():
    golden = load_file(HEADS / "fcos3d_fpn.safetensors")
    neck = FeaturePyramidNetwork([24, 32, 40], 16, extra_blocks=LastLevelP6P7(16, 16))
    ours = {**{f"inner_blocks.{i}.0": f"lateral_convs.{i}.conv" for i in range(3)},
            **{f"layer_blocks.{i}.0": f"fpn_convs.{i}.conv" for i in range(3)},
            "extra_blocks.p6": "fpn_convs.3.conv", "extra_blocks.p7": "fpn_convs.4.conv"}
    neck.load_state_dict({f"{a}.{part}": golden[f"weights.neck.{b}.{part}"] for a, b in ours.items()
                          for part in ("weight", "bias")})
    maps = [golden[f"input.{level}"].double().requires_grad_() for level in (1, 2, 3)]
    out = list(neck.double()({str(level): x for level, x in enumerate(maps)}).values())
    for level, x in enumerate(out):
        torch.testing.assert_close(x, golden[f"out.{level}"], **CLOSE)
    sum((x * golden[f"cotangent.{level}"]).sum() for level, x in enumerate(out)).backward()
    for level, x in zip((1, 2, 3), maps, strict=True):
        torch.testing.assert_close(x.grad, golden[f"grad.input.{level}"], **CLOSE)


@pytest.mark.parametrize(("deformable", "count"), [(False, 6_651_950), (True, 6_776_420)])
def test_the_published_head_has_as_many_parameters(deformable, count):
    with torch.device("meta"):
        head = FCOS3DHead(FCOS3DConfig(deformable=deformable))
    assert sum(weight.numel() for weight in head.parameters()) == count


@pytest.mark.parametrize(("deformable", "millions"), [(False, 37.77), (True, 37.89)])
def test_the_whole_model_on_convnext_has_as_many_parameters(deformable, millions):
    with torch.device("meta"):
        model = FCOS3D(Pyramid("convnext_tiny"), FCOS3DConfig(deformable=deformable))
    assert round(sum(weight.numel() for weight in model.parameters()) / 1e6, 2) == millions


def test_a_fresh_deformable_head_is_a_plain_one_at_half_strength_and_learns_to_move():
    torch.manual_seed(0)
    config = replace(SMALL, deformable=True)
    head = FCOS3DHead(config)
    x = torch.randn(1, 32, 8, 8)
    last = head.cls_convs[1].conv
    plain = nn.functional.conv2d(x, last.weight, padding=1) / 2               # all nine weights begin at sigmoid(0)
    torch.testing.assert_close(last(x), plain)
    maps = [torch.randn(1, 32, 2 ** (4 - level), 2 ** (4 - level)) for level in range(5)]
    head(maps).boxes.square().sum().backward()
    assert head.reg_convs[1].conv.conv_offset.weight.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_deformable_head_trains_in_mixed_precision(dtype):
    torch.manual_seed(0)
    head, x = FCOS3DHead(replace(SMALL, deformable=True)), [torch.randn(1, 32, side, side) for side in (16, 8, 4, 2, 1)]
    exact = head(x)
    with torch.autocast("cpu", dtype):
        rough = head(x)
    sum(part.float().square().sum() for part in rough).backward()
    for got, wanted in zip(rough, exact, strict=True):
        assert (got - wanted).norm() < 0.05 * wanted.norm() + 0.01
    assert head.cls_convs[1].conv.weight.grad.abs().sum() > 0


def test_rotated_iou_is_shapelys_for_any_pair():
    random = torch.Generator().manual_seed(0)
    boxes = torch.rand(400, 5, generator=random, dtype=torch.float64) * torch.tensor([6.0, 6, 5, 5, 7]) + 0.1
    boxes[::5, 4] = torch.arange(80) * math.pi / 4                            # edges in parallel, corners on edges
    boxes[::10, :4] = boxes[::10, :4].round() + 1
    shapes = [affinity.translate(affinity.rotate(rectangle(-w / 2, -h / 2, w / 2, h / 2), angle, use_radians=True), x, y)
              for x, y, w, h, angle in boxes.tolist()]
    other = list(range(1, 400)) + [0]
    found = rotated_iou(boxes, boxes[other])
    wanted = [a.intersection(shapes[j]).area / a.union(shapes[j]).area for a, j in zip(shapes, other, strict=True)]
    assert 100 < sum(value > 0 for value in wanted) < 400
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), atol=1e-9, rtol=0)
    turned = boxes.clone()
    turned[:, 4] += math.pi
    for same in (boxes, turned):
        torch.testing.assert_close(rotated_iou(boxes, same), torch.ones(400, dtype=torch.float64), atol=1e-9, rtol=0)


def test_rotated_nms_keeps_what_one_box_at_a_time_would_keep():
    random = torch.Generator().manual_seed(1)
    boxes = torch.rand(300, 5, generator=random, dtype=torch.float64) * torch.tensor([9.0, 9, 4, 2, 7]) + 0.2
    scores, labels = torch.rand(300, generator=random), torch.randint(3, (300,), generator=random)
    kept = []
    for index in scores.argsort(descending=True).tolist():
        rivals = [each for each in kept if labels[each] == labels[index]]
        if not rivals or rotated_iou(boxes[rivals], boxes[index].expand(len(rivals), 5)).max() <= 0.2:
            kept.append(index)
    assert 30 < len(kept) < 200
    assert rotated_nms(boxes, scores, labels, 0.2).tolist() == kept
    assert rotated_nms(boxes[:0], scores[:0], labels[:0], 0.2).tolist() == []


def test_a_point_goes_to_the_nearest_centre_and_its_level_to_the_size():
    points = Points(torch.tensor([[20.0, 20.0], [20.0, 20.0], [28.0, 20.0]]), torch.tensor([8.0, 16.0, 8.0]),
                    torch.tensor([-1.0, 48.0, -1.0]), torch.tensor([48.0, 96.0, 48.0]), (3,))
    camera = torch.tensor([[10.0, 0, 20], [0, 10, 20], [0, 0, 1]])
    boxes3d = torch.tensor([[0.0, 0, 10, 4, 2, 2, 0, 0, 0], [6.0, 0, 10, 1, 1, 1, math.pi / 2, 0, 0]])      # at 20 and 26 px
    target = {"camera": camera, "labels": torch.tensor([3, 5]), "attributes": torch.tensor([0, 8]),
              "boxes": torch.tensor([[5.0, 5, 40, 40], [5.0, 5, 40, 40]]), "boxes3d": boxes3d}
    found = assign(points, target, FCOS3DConfig())
    assert found.labels.tolist() == [3, 10, 5]                                # 20 px are nothing for the second level
    assert found.boxes[2, :3].tolist() == pytest.approx([0.25, 0, 10])        # 2 px to the right, in strides
    assert found.boxes[2, 6].item() == pytest.approx(math.pi / 2 - math.atan2(6, 10))
    assert found.centerness[0].item() == 1.0


def test_the_model_gives_losses_while_training_and_boxes_in_evaluation():
    torch.manual_seed(0)
    pyramid = Pyramid("sw_tiny", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), kernel_sizes=(7, 7, 5, 5))
    model = FCOS3D(pyramid, replace(SMALL, score_threshold=0.0, max_boxes=7))
    target = {"boxes": torch.tensor([[10.0, 10, 60, 50]]), "labels": torch.tensor([1]), "attributes": torch.tensor([5]),
              "boxes3d": torch.tensor([[0.0, 0, 10, 4, 2, 2, 0, 1, 0]]),
              "camera": torch.tensor([[60.0, 0, 40], [0, 60, 30], [0, 0, 1]])}
    images = torch.randn(2, 3, 96, 128)
    found = model(images, [target, empty(target)])
    sum(found.values()).backward()
    assert set(found) == {"cls", "direction", "attr", "centerness", *GROUP_NAMES}
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == [
        "pyramid.norm0.weight", "pyramid.norm0.bias"]                         # the FPN begins at the second map
    with torch.no_grad():
        boxes = model.eval()(images, [{"camera": target["camera"]}] * 2)
    assert [each["boxes3d"].shape for each in boxes] == [(7, 9)] * 2
    assert all((each["scores"].diff() <= 0).all() for each in boxes)


@pytest.mark.parametrize(("name", "value", "sentence"), [
    ("labels", 10, "labels from 0 to 9, got 10"), ("attributes", -1, "attributes from 0 to 8, got -1")])
def test_a_class_out_of_range_is_a_sentence(golden, head, name, value, sentence):
    maps, some = features(golden), targets(golden)
    some[0] = some[0] | {name: torch.full_like(some[0][name], value)}
    with pytest.raises(ValueError, match=sentence):
        losses(head.train()(maps), head.points(maps), some, SMALL)


def test_widths_that_do_not_fit_are_a_sentence():
    with pytest.raises(ValueError, match="that groups = 32 divides, got 48 and 64; lower groups"):
        FCOS3DConfig(channels=48)
    with pytest.raises(ValueError, match="one reach per stride, got 5 for 4 strides"):
        FCOS3DConfig(strides=(8, 16, 32, 64))
