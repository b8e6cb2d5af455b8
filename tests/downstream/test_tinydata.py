import hashlib
import json

import numpy as np
import pytest
import torch
from sklearn.ensemble import RandomForestClassifier
from torch.nn import functional as F

from swconv.__main__ import main
from swconv.downstream import tinydata
from swconv.downstream.datasets import ADE20K, COCO, VOC, VOC_CLASSES
from swconv.downstream.evaluators import MeanIoU, coco_ap, coco_results, voc_ap

SETS = ("ADEChallengeData2016", "VOCdevkit", "coco", "nuscenes")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    assert main(["tinydata", "--out", str(path)]) == 0
    return path


def files(root):
    return sorted(path for path in root.rglob("*") if path.is_file())


def test_each_set_is_smaller_than_a_megabyte(root):
    assert sorted(path.name for path in root.iterdir()) == sorted(SETS)
    for name in SETS:
        assert 50_000 < sum(path.stat().st_size for path in files(root / name)) < 1_000_000


def test_the_same_bytes_come_out_every_time_and_nothing_old_stays(root, tmp_path):
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco/old.txt").write_text("old")
    tinydata.write(tmp_path)
    digests = [{path.relative_to(place).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files(place)}
               for place in (root, tmp_path)]
    assert digests[0] == digests[1]


def test_train_and_validation_images_differ(root):
    pixels = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files(root) if path.suffix == ".jpg"]
    assert len(pixels) == len(set(pixels))


def test_ade20k_has_unlabelled_rims_and_the_ends_of_the_list_of_classes(root):
    sets = ADE20K(root / "ADEChallengeData2016", "training"), ADE20K(root / "ADEChallengeData2016", "validation")
    assert [len(each) for each in sets] == [16, 8]
    for images in sets:
        seen = torch.stack([images.read(i)[1]["segmentation"].flatten().bincount(minlength=256) for i in range(len(images))])
        assert seen.sum(0).nonzero().flatten().tolist() == [1, 12, 19, 20, 66, 119, 148, 149, 255]
        assert (seen[:, 255] > 50).all()


def test_classes_can_be_told_apart_by_what_a_small_network_sees(root):
    """A forest on colours and their means over up to 17 x 17 px, learned on training images, knows validation images."""
    def features(image):
        image = image.float()[None]
        means = [F.avg_pool2d(image, side, 1, side // 2, count_include_pad=False) for side in (5, 9, 17)]
        return torch.cat([image, *means], 1)[0].flatten(1).T.numpy()

    def samples(split):
        images = ADE20K(root / "ADEChallengeData2016", split)
        return [(features(image), target["segmentation"]) for image, target in map(images.read, range(len(images)))]

    x, y = (np.concatenate(each) for each in zip(*((x, y.flatten().numpy()) for x, y in samples("training")), strict=True))
    some = np.flatnonzero(y != 255)[::7]
    forest = RandomForestClassifier(12, max_depth=14, random_state=0).fit(x[some], y[some])
    metric = MeanIoU(150)
    for x, y in samples("validation"):
        metric.update(torch.from_numpy(forest.predict(x)).view(y.shape), y)
    assert metric.compute()["mIoU"] > 85


def test_coco_has_its_80_ids_crowds_objects_of_two_polygons_and_an_image_without_annotation(root):
    for split, count in (("train2017", 16), ("val2017", 8)):
        content = json.loads((root / f"coco/annotations/instances_{split}.json").read_text())
        ids = [each["id"] for each in content["categories"]]
        assert len(ids) == 80
        assert (ids[0], ids[11], ids[-1]) == (1, 13, 90)                              # 12, a street sign, is not there
        assert len(content["images"]) == count
        annotations = content["annotations"]
        assert {each["category_id"] for each in annotations} == {1, 3, 17, 44, 62, 90}
        assert sum(each["iscrowd"] for each in annotations) == 1
        assert all(isinstance(each["segmentation"], dict) == bool(each["iscrowd"]) for each in annotations)
        assert max(len(each["segmentation"]) for each in annotations if not each["iscrowd"]) == 2
        assert len({each["image_id"] for each in annotations}) == count - 1


def test_cocos_polygons_cover_what_is_drawn(root):
    """Areas are counted pixels of the drawing, masks come from polygons or run lengths."""
    images = COCO(root / "coco", "train2017")
    content = json.loads(images.annotation_file.read_text())
    areas = {}
    for each in content["annotations"]:
        areas.setdefault(each["image_id"], []).append((each["iscrowd"], each["area"]))
    for index in range(len(images)):
        target = images.target(index)
        for mask, box, (crowd, area) in zip(target["masks"], target["boxes"], areas.get(target["image_id"], []), strict=True):
            assert mask.sum() == area if crowd else abs(mask.sum() - area) < 0.25 * area
            rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
            edges = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
            assert (edges - box).abs().max() < 2


def test_voc_has_difficult_objects_in_2007_and_another_year(root):
    difficult = {}
    for year, split, count in ((2007, "trainval", 16), (2007, "test", 8), (2012, "trainval", 8)):
        images = VOC(root / "VOCdevkit", split, (year,))
        targets = [images[0, i][1] for i in range(len(images))]
        assert len(targets) == count
        assert {VOC_CLASSES[label] for target in targets for label in target["labels"]} == set(tinydata.VOC_NAMES)
        difficult[year, split] = sum(target["ignored"].sum().item() for target in targets)
    assert difficult == {(2007, "trainval"): 4, (2007, "test"): 2, (2012, "trainval"): 0}


def test_the_annotations_themselves_would_score_a_hundred(root):
    """Dataset, result files and evaluator agree about ids, pixels and what is ignored."""
    images, results = COCO(root / "coco", "val2017"), []
    for index in range(len(images)):
        target = images.target(index)
        kept = ~target["ignored"]
        found = {key: target[key][kept] for key in ("boxes", "labels", "masks")}
        results += coco_results(target["image_id"], found | {"scores": torch.ones(int(kept.sum()))}, images.category_ids)
    assert all(value == pytest.approx(100) for value in coco_ap(images.annotation_file, results).values())

    test = VOC(root / "VOCdevkit", "test")
    targets = [test.target(index) for index in range(len(test))]
    found = [{"boxes": each["boxes"], "labels": each["labels"], "scores": torch.ones(len(each["labels"]))} for each in targets]
    assert voc_ap(targets, found, len(VOC_CLASSES))["mAP"] == pytest.approx(100)


def test_a_place_that_cannot_be_written_ends_in_one_sentence(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["tinydata", "--out", str(tmp_path / "file")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
