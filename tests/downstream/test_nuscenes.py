import json
import math
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from nuscenes.eval.detection.utils import category_to_detection_name
from nuscenes.utils.data_classes import Box
from nuscenes.utils.geometry_utils import BoxVisibility
from PIL import Image
from pyquaternion import Quaternion
from torch import nn

from swconv.downstream.batches import Collate
from swconv.downstream.fcos3d import FCOS3D, FCOS3DConfig, assign, project
from swconv.downstream.nuscenes import (
    ATTRIBUTES,
    CLASSES,
    Mono,
    NuScenesImages,
    attribute_name,
    evaluate,
    in_world,
    mirror,
    submission,
    write_submission,
)
from swconv.downstream.pyramid import Pyramid
from swconv.downstream.tiny_nuscenes import write_tiny_nuscenes
from swconv.training.manifest import ImageError

GOLDEN = Path(__file__).parents[1] / "golden" / "heads" / "evaluators.json"
STATISTICS = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nuscenes")
    write_tiny_nuscenes(folder)
    return folder


@pytest.fixture(scope="module")
def images(root):
    return NuScenesImages(root, "train")


@pytest.fixture
def spoiled(root, tmp_path):
    """A copy that a test may break, and how to edit one of its tables."""
    folder = tmp_path / "nuscenes"
    shutil.copytree(root, folder)

    def edit(table, change):
        path = folder / "v1.0-mini" / f"{table}.json"
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return folder, edit


def said(target):
    """What a faultless detector would say."""
    return {"boxes3d": target["boxes3d"], "labels": target["labels"], "attributes": target["attributes"],
            "scores": torch.linspace(0.9, 0.5, len(target["labels"]))}


def test_the_tiny_set_is_small_the_same_every_time_and_has_every_class_in_both_splits(root, images, tmp_path):
    write_tiny_nuscenes(tmp_path)
    files = sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file())
    assert all((tmp_path / path).read_bytes() == (root / path).read_bytes() for path in files)
    assert sum((root / path).stat().st_size for path in files) < 1e6
    assert len(list((root / "v1.0-mini").glob("*.json"))) == 13
    for split in ("train", "val"):
        dataset = NuScenesImages(root, split)
        assert len(dataset) == 8
        assert {int(label) for index in range(8) for label in dataset.target(index)["labels"]} == set(range(10))
    scenes = {images.tables.get("sample", moment)["scene_token"] for moment in images.moments}
    assert scenes == {images.tables.scene[0]["token"]}


def test_boxes_are_where_the_devkit_and_the_picture_have_them(images):
    """The two cameras look ahead and back: the devkit's corners span our 2-D boxes, and the middle shows the class's colour."""
    colours = {"car": (220, 40, 40), "truck": (40, 90, 230), "motorcycle": (30, 210, 220), "traffic_cone": (250, 250, 250)}
    for index in range(8):
        image, target = images.read(index)
        _, boxes, camera = images.tables.get_sample_data(target["image_id"], BoxVisibility.ANY)
        named = {category_to_detection_name(box.name): box for box in boxes}
        for box, row, label in zip(target["boxes"], target["boxes3d"], target["labels"], strict=True):
            theirs = named[CLASSES[label]]
            torch.testing.assert_close(row[:3].double(), torch.from_numpy(theirs.center), atol=1e-5, rtol=0)
            assert row[3:6].tolist() == pytest.approx(theirs.wlh[[1, 2, 0]])
            corners = camera @ theirs.corners()
            x, y = corners[:2] / corners[2]
            outer = [max(x.min(), 0), max(y.min(), 0), min(x.max(), 384), min(y.max(), 216)]
            inside = x.min() >= 0 and x.max() <= 384 and y.min() >= 0 and y.max() <= 216
            assert (box.numpy() >= np.array([*outer[:2], 0, 0]) - 1e-3).all()
            if inside:
                assert box.tolist() == pytest.approx(outer, abs=1e-3)
            if index < 2 and CLASSES[label] in colours:                       # CAM_BACK, then CAM_FRONT
                u, v = project(row[None], target["camera"])[0].round().long().tolist()
                ratio = image[:, v, u].float() / torch.tensor(colours[CLASSES[label]])
                assert ratio.std() < 0.15


def test_yaw_velocity_and_attribute_are_the_devkits(images):
    """The car of scene 0061 drives 2 m/s, 13 degrees to the left of the axis, turned by 160 against the ray."""
    target = next(images.target(index) for index in range(8) if 0 in images.target(index)["labels"])
    row = int((target["labels"] == 0).nonzero()[0])
    heading = math.radians(13 + 160)                                          # counter-clockwise from the axis
    ahead = torch.tensor([-math.sin(heading), math.cos(heading)])             # x to the right, z ahead
    x, z = ahead.tolist()
    assert target["boxes3d"][row, 6].item() == pytest.approx(-math.atan2(z, x), abs=1e-5)
    torch.testing.assert_close(target["boxes3d"][row, 7:], 2 * ahead, atol=1e-4, rtol=0)
    assert ATTRIBUTES[target["attributes"][row]] == "vehicle.moving"
    cone = next(images.target(index) for index in range(8) if 8 in images.target(index)["labels"])
    assert cone["attributes"][(cone["labels"] == 8).nonzero()[0]].item() == 8  # none


@pytest.mark.parametrize(("place", "box"), [
    ([10, 10, 1.5], None),                                                    # 45 degrees to the left, the image ends at 32
    ([10, 10 * 192 / 304, 1.5], [0, 92.8, 15.2, 123.2]),                      # its middle on the border; 1 m is 30.4 px at 10 m
    ([10, 0, 1.5], [176.8, 92.8, 207.2, 123.2]),
    ([-10, 0, 1.5], None)], ids=["beside", "half", "whole", "behind"])
def test_a_box_counts_as_far_as_the_image_shows_it(spoiled, place, box):
    folder, edit = spoiled
    changed = {"translation": (np.array([400, 1100, 0]) + place).tolist(), "size": [1, 0.001, 1], "rotation": [1, 0, 0, 0]}
    edit("sample_annotation", lambda rows: [row | changed for row in rows])
    front = NuScenesImages(folder, "train").target(1)                         # CAM_BACK comes first
    if box is None:
        assert front["boxes"].shape == (0, 4)
    else:
        assert front["boxes"][0].tolist() == pytest.approx(box, abs=0.05)


def test_a_box_that_occurs_once_has_no_velocity(spoiled):
    folder, edit = spoiled
    edit("sample_annotation", lambda rows: [row | {"prev": "", "next": ""} for row in rows])
    dataset = NuScenesImages(folder, "train")
    assert all((dataset.target(index)["boxes3d"][:, 7:] == 0).all() for index in range(8))


def test_detections_come_back_to_the_world_where_the_annotations_are(images):
    target = images.target(0)
    world = in_world(said(target), target)
    notes = [images.tables.get("sample_annotation", token) for token in images.tables.get("sample", target["sample"])["anns"]]
    for index, name in enumerate(CLASSES[label] for label in target["labels"]):
        wanted = min(notes, key=lambda note: np.linalg.norm(np.subtract(note["translation"], world["translation"][index])))
        assert category_to_detection_name(wanted["category_name"]) == name
        assert world["translation"][index] == pytest.approx(wanted["translation"], abs=1e-4)
        assert world["size"][index] == pytest.approx(wanted["size"], abs=1e-5)
        assert world["velocity"][index] == pytest.approx(images.tables.box_velocity(wanted["token"])[:2], abs=1e-4)
        theirs = Box(wanted["translation"], wanted["size"], Quaternion(wanted["rotation"])).corners()
        ours = Box(world["translation"][index], world["size"][index], Quaternion(world["rotation"][index])).corners()
        assert np.abs(theirs - ours).max() < 1e-4


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_faultless_detector_gets_full_marks(root, split, tmp_path):
    dataset = NuScenesImages(root, split)
    found = [in_world(said(target), target) for target in map(dataset.target, range(len(dataset)))]
    write_submission(submission(found, dataset.moments), tmp_path / "results.json")
    marks = evaluate(dataset, tmp_path / "results.json")
    assert marks["mAP"] == pytest.approx(100, abs=1e-6)
    assert marks["NDS"] == pytest.approx(100, abs=0.01)
    assert max(marks[name] for name in ("mATE", "mASE", "mAOE", "mAVE", "mAAE")) < 1e-3


def test_the_devkits_marks_of_the_reference_submission_come_out(tmp_path):
    golden = json.loads(GOLDEN.read_text())["nuscenes"]
    folder = tmp_path / "nuscenes"
    for name in ("v1.0-mini", "maps"):
        (folder / name).mkdir(parents=True)
    for name, rows in golden["tables_v1_0_mini"].items():
        (folder / "v1.0-mini" / f"{name}.json").write_text(json.dumps(rows))
    Image.new("L", (8, 8), 255).save(folder / golden["tables_v1_0_mini"]["map"][0]["filename"])
    for row in golden["tables_v1_0_mini"]["sample_data"]:
        path = folder / row["filename"]
        path.parent.mkdir(parents=True, exist_ok=True)
        if row["height"]:
            Image.new("RGB", (row["width"], row["height"])).save(path)
    write_submission(golden["submission"], tmp_path / "results.json")
    marks, wanted = evaluate(NuScenesImages(folder, "val"), tmp_path / "results.json"), golden["metrics"]
    assert marks["mAP"] == pytest.approx(100 * wanted["mean_ap"], abs=1e-9) == pytest.approx(33.42, abs=5e-3)
    assert marks["NDS"] == pytest.approx(100 * wanted["nd_score"], abs=1e-9) == pytest.approx(45.24, abs=5e-3)
    for theirs, ours in (("trans", "mATE"), ("scale", "mASE"), ("orient", "mAOE"), ("vel", "mAVE"), ("attr", "mAAE")):
        assert marks[ours] == pytest.approx(wanted["tp_errors"][f"{theirs}_err"], abs=1e-9)
    assert [marks[f"AP_{name}"] for name in CLASSES] == pytest.approx([100 * wanted["mean_dist_aps"][name] for name in CLASSES])


def test_nothing_found_gets_what_a_hopeless_box_gets(images, tmp_path):
    write_submission(submission([], images.moments), tmp_path / "nothing.json")
    content = submission([], images.moments)
    content["results"][images.moments[0]] = [{
        "sample_token": images.moments[0], "translation": [0, 0, 0], "size": [1, 1, 1], "rotation": [1, 0, 0, 0],
        "velocity": [0, 0], "detection_name": "car", "detection_score": 0.5, "attribute_name": "vehicle.moving"}]
    write_submission(content, tmp_path / "hopeless.json")
    nothing = evaluate(images, tmp_path / "nothing.json")
    assert nothing == evaluate(images, tmp_path / "hopeless.json")
    assert (nothing["mAP"], nothing["NDS"], nothing["mATE"]) == (0, 0, 1)


def test_what_two_cameras_see_of_one_object_counts_once_and_attributes_fit_their_class(images):
    target = images.target(0)
    once, twice = said(target), said(target)
    twice["scores"] = once["scores"] - 0.1
    twice["boxes3d"] = once["boxes3d"] + torch.tensor([0.05, 0, 0.05] + [0] * 6)
    content = submission([in_world(once, target), in_world(twice, target)], images.moments)
    boxes = content["results"][target["sample"]]
    assert [box["detection_score"] for box in boxes] == pytest.approx(once["scores"].tolist())
    assert list(content["results"]) == list(images.moments)
    assert content["meta"]["use_camera"]
    assert attribute_name(ATTRIBUTES.index("pedestrian.standing"), "car") == "vehicle.parked"
    assert attribute_name(ATTRIBUTES.index("vehicle.stopped"), "bus") == "vehicle.stopped"
    assert attribute_name(8, "bus") == "vehicle.moving"
    assert attribute_name(8, "bicycle") == "cycle.without_rider"
    assert attribute_name(0, "pedestrian") == "pedestrian.moving"
    assert attribute_name(5, "barrier") == ""


def test_mirroring_twice_is_nothing_and_once_moves_image_boxes_and_camera_together(images):
    image, target = images.read(0)
    flipped, moved = mirror(image, target)
    assert torch.equal(flipped, image.flip(2))
    torch.testing.assert_close(project(moved["boxes3d"], moved["camera"])[:, 0],
                               384 - project(target["boxes3d"], target["camera"])[:, 0])
    assert torch.equal(moved["boxes"][:, 0], 384 - target["boxes"][:, 2])
    ahead, before = (torch.stack([yaw.cos(), -yaw.sin()], 1) for yaw in (moved["boxes3d"][:, 6], target["boxes3d"][:, 6]))
    torch.testing.assert_close(ahead, before * torch.tensor([-1.0, 1.0]), atol=1e-6, rtol=0)      # x turns round, z stays
    back = mirror(flipped, moved)
    assert torch.equal(back[0], image)
    torch.testing.assert_close(back[1]["boxes3d"], target["boxes3d"])
    assert torch.equal(back[1]["camera"], target["camera"])


def test_resizing_scales_pixels_and_leaves_metres(images):
    image, target = images.read(0)
    small, moved = Mono(192, 192)(image, target, torch.Generator())
    assert small.shape == (3, 108, 192)
    assert torch.equal(moved["boxes3d"], target["boxes3d"])
    torch.testing.assert_close(project(moved["boxes3d"], moved["camera"]), project(target["boxes3d"], target["camera"]) / 2)
    same, untouched = Mono(384, 216)(image, target, torch.Generator())
    assert torch.equal(same, image)
    assert torch.equal(untouched["camera"], target["camera"])


def test_a_flip_depends_on_seed_epoch_and_index_alone_and_the_dataset_survives_a_trip(root):
    dataset = NuScenesImages(root, "train", transform=Mono(384, 216, flip=0.5), seed=3)
    flips = [[float(dataset[epoch, index][1]["boxes3d"][0, 0]) for index in range(8)] for epoch in range(2)]
    again = pickle.loads(pickle.dumps(dataset))
    assert [[float(again[epoch, index][1]["boxes3d"][0, 0]) for index in range(8)] for epoch in range(2)] == flips
    assert flips[0] != flips[1]


def test_batches_are_padded_to_multiples_of_32_and_points_find_every_object(images):
    batch, targets = Collate(*STATISTICS)([images.read(index) for index in range(8)])
    assert batch.shape == (8, 3, 224, 384)
    config = FCOS3DConfig(fpn_channels=8, channels=8, centerness_channels=8, groups=8)
    head = FCOS3D(Pyramid("sw_tiny", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), kernel_sizes=(7, 7, 5, 5)), config).head
    points = head.points([torch.zeros(1, 8, 224 // stride or 1, 384 // stride or 1) for stride in config.strides])
    for target in targets:
        assert set(assign(points, target, config).labels.tolist()) - {10} == set(target["labels"].tolist())


def test_an_image_without_annotation_trains_as_background_and_is_left_out_on_demand(spoiled):
    folder, edit = spoiled
    first = NuScenesImages(folder, "train").target(0)
    edit("sample_annotation", lambda rows: [row | {"prev": "", "next": ""} for row in rows
                                            if row["sample_token"] != first["sample"]])
    dataset = NuScenesImages(folder, "train")
    image, target = dataset.read(0)
    assert (len(dataset), target["boxes"].shape, target["boxes3d"].shape) == (8, (0, 4), (0, 9))
    config = FCOS3DConfig(fpn_channels=8, channels=8, centerness_channels=8, groups=8, deformable=False)
    model = FCOS3D(Pyramid("sw_tiny", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), kernel_sizes=(7, 7, 5, 5)), config)
    found = model(*Collate(*STATISTICS)([(image, target), dataset.read(1)]))
    assert found["cls"] > 0
    assert sum(value.item() for name, value in found.items() if name != "cls") == 0
    assert len(NuScenesImages(folder, "train", training=True)) == 6


def test_images_without_a_box_of_the_ten_classes_cannot_be_trained_on(spoiled):
    folder, edit = spoiled
    edit("category", lambda rows: [row | {"name": "animal"} for row in rows])
    assert len(NuScenesImages(folder, "train")) == 8
    with pytest.raises(ValueError, match="needs boxes of the 10 classes in images of mini_train to train, got none in"):
        NuScenesImages(folder, "train", training=True)


def one_line(error):
    return " ".join(str(error.value).split())


def test_a_wrong_root_is_told_with_what_is_expected_where(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        NuScenesImages(tmp_path, "train")
    assert one_line(error) == (
        f"nuScenes needs a folder with v1.0-mini/ (the 13 tables), samples/ and maps/, got {tmp_path} without "
        f"{tmp_path}/v1.0-mini and {tmp_path}/samples and {tmp_path}/maps; put the dataset there, or set its root in params/ "
        "to where it is.")


def test_missing_tables_are_named(spoiled):
    folder, _ = spoiled
    for name in ("ego_pose", "visibility"):
        (folder / "v1.0-mini" / f"{name}.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"needs 13 tables in .*, got no ego_pose.json and no visibility.json"):
        NuScenesImages(folder, "train")


def test_a_broken_table_is_named(spoiled):
    folder, _ = spoiled
    (folder / "v1.0-mini" / "sample.json").write_text('[{"token": ')
    with pytest.raises(ValueError, match=r"sample.json needs to be JSON, got 'Expecting value.*'; unpack the metadata again"):
        NuScenesImages(folder, "train")


def test_a_missing_calibration_is_named(spoiled):
    folder, edit = spoiled
    edit("calibrated_sensor", lambda rows: rows[1:])
    with pytest.raises(ValueError, match=r"sample_data.json needs every calibrated_sensor_token in calibrated_sensor.json, "):
        NuScenesImages(folder, "train")


@pytest.mark.parametrize("camera", [[], [["f", 0, 0]] * 3, [[0, 0, 0]] * 3], ids=["none", "text", "zeros"])
def test_a_camera_without_intrinsics_is_named(spoiled, camera):
    folder, edit = spoiled
    edit("calibrated_sensor", lambda rows: [row | {"camera_intrinsic": camera} for row in rows])
    with pytest.raises(ValueError, match="needs a 3 x 3 camera_intrinsic for every camera, and an inverse of it, got another"):
        NuScenesImages(folder, "train")


def test_a_moment_without_lidar_is_named_because_evaluation_needs_its_pose(spoiled):
    folder, edit = spoiled
    edit("sample_data", lambda rows: [row for row in rows if "LIDAR_TOP" not in row["filename"]])
    with pytest.raises(ValueError, match="needs a LIDAR_TOP key frame in sample_data.json at every moment, got none"):
        NuScenesImages(folder, "train")


def test_missing_and_unreadable_and_resized_images_are_named(spoiled):
    folder, _ = spoiled
    dataset = NuScenesImages(folder, "train")
    path = Path(dataset.tables.get_sample_data_path(dataset.target(0)["image_id"]))
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(ImageError, match=path.name):
        dataset.read(0)
    Image.new("RGB", (10, 12)).save(path)
    with pytest.raises(ValueError, match=r"needs 384 x 216 pixels, as sample_data.json says, got 10 x 12; restore the file"):
        dataset.read(0)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"needs 8 images for mini_train, got none for 1: .*{path.name}"):
        NuScenesImages(folder, "train")


def test_maps_versions_splits_and_scenes_that_are_not_there_are_named(spoiled):
    folder, edit = spoiled
    with pytest.raises(ValueError, match="versions v1.0-mini, v1.0-trainval and the split train or val, got 'v1.0' and"):
        NuScenesImages(folder, "train", "v1.0")
    with pytest.raises(ValueError, match="got 'v1.0-mini' and 'test'"):
        NuScenesImages(folder, "test")
    edit("scene", lambda rows: [row | {"name": "scene-9999"} for row in rows])
    with pytest.raises(ValueError, match="needs camera images of the scenes of mini_val in .*, got none of 2 scenes"):
        NuScenesImages(folder, "val")
    (folder / "maps" / "tiny.png").unlink()
    with pytest.raises(FileNotFoundError, match="needs the maps that map.json names, got no .*tiny.png"):
        NuScenesImages(folder, "val")


def test_a_submission_that_is_none_or_of_another_split_is_told(root, images, tmp_path):
    (tmp_path / "none.json").write_text("[]")
    with pytest.raises(ValueError, match="none.json needs to be a nuScenes submission with meta and results, got"):
        evaluate(images, tmp_path / "none.json")
    other = NuScenesImages(root, "val")
    write_submission(submission([], other.moments), tmp_path / "other.json")
    with pytest.raises(ValueError, match="an entry for each of the 4 moments of mini_train, got 4, of which 0 are among them"):
        evaluate(images, tmp_path / "other.json")


def test_without_the_devkit_one_sentence_says_how_to_install_it(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "nuscenes", None)
    with pytest.raises(ModuleNotFoundError) as error:
        NuScenesImages(root, "train")
    assert "run `make setup`, or `pip install --no-deps nuscenes-devkit==1.2.0` (its metadata ask for numpy 1, it runs with 2" \
        in one_line(error)


@pytest.mark.slow
def test_a_small_fcos3d_learns_the_tiny_set_by_heart(root, tmp_path):
    torch.manual_seed(0)
    dataset = NuScenesImages(root, "train", transform=Mono(384, 216), training=True)
    images, targets = Collate(*STATISTICS)([dataset[0, index] for index in range(len(dataset))])
    config = FCOS3DConfig(fpn_channels=48, channels=48, centerness_channels=16, groups=8, deformable=False, candidates=100,
                          nms_iou=0.3)
    model = FCOS3D(Pyramid("sw_tiny", depths=(1, 1, 1, 1), dims=(16, 32, 64, 96), kernel_sizes=(13, 13, 13, 13)), config)
    steps = 150
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        sum(model(images, targets).values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 35)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        found = model.eval()(images, targets)
    detections = [in_world(each, target) for each, target in zip(found, targets, strict=True)]
    write_submission(submission(detections, dataset.moments), tmp_path / "results.json")
    marks = evaluate(dataset, tmp_path / "results.json")
    assert marks["mAP"] >= 50
    assert marks["NDS"] >= 50
