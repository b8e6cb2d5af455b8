import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from swconv.downstream import tinydata
from swconv.downstream.batches import Batches, Collate, InOrder, Loader
from swconv.downstream.datasets import ADE20K, COCO, VOC, VOC_CLASSES
from swconv.downstream.transforms import DetectionTrain, SegmentationTrain
from swconv.training.manifest import ImageError

COLLATE = Collate((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SMALL = DetectionTrain(short_sides=(64, 96), long_side=160, crop_short_sides=(100,), crop_range=(60, 90))


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    for name, writer in (("ade", tinydata.write_ade20k), ("coco", tinydata.write_coco), ("voc", tinydata.write_voc)):
        (root / name).mkdir()
        writer(root / name)
    return root


@pytest.fixture
def root(written, tmp_path):
    """A copy to damage."""
    shutil.copytree(written, tmp_path / "data")
    return tmp_path / "data"


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def instances(root, *annotations, **image):
    """COCO with one image of 6 x 8 pixels and three categories with gaps."""
    image = {"id": 42, "file_name": "000000000042.jpg", "height": 6, "width": 8} | image
    (root / "annotations").mkdir(parents=True)
    (root / "val2017").mkdir()
    Image.new("RGB", (8, 6)).save(root / "val2017/000000000042.jpg")
    content = {"images": [image], "categories": [{"id": i, "name": f"n{i}"} for i in (90, 1, 13)], "annotations": [
        {"id": 100 + i, "image_id": 42, "iscrowd": 0, "area": 4.0, "category_id": 13, "bbox": [1, 2, 3, 2],
         "segmentation": [[1, 2, 4, 2, 4, 4, 1, 4]]} | each for i, each in enumerate(annotations)]}
    (root / "annotations/instances_val2017.json").write_text(json.dumps(content))
    return COCO(root, "val2017")


# ADE20K

def test_ade20k_maps_0_to_unlabelled_and_1_to_150_to_0_to_149(tmp_path):
    for folder in ("images", "annotations"):
        (tmp_path / folder / "validation").mkdir(parents=True)
    Image.new("RGB", (4, 1), (10, 20, 30)).save(tmp_path / "images/validation/ADE_val_00000001.jpg")
    Image.fromarray(np.array([[0, 1, 2, 150]], np.uint8)).save(tmp_path / "annotations/validation/ADE_val_00000001.png")
    images = ADE20K(tmp_path, "validation")
    image, target = images[0, 0]
    assert target["segmentation"].tolist() == [[255, 0, 1, 149]]
    assert target["segmentation"].dtype == image.dtype == torch.uint8
    assert (len(images), target["image_id"], target["original_size"]) == (1, "ADE_val_00000001", (1, 4))
    assert image.shape == (3, 1, 4)
    assert len(images.class_names) == 150
    assert images.class_names[149] == "flag"


def test_ade20k_without_its_folders_says_what_is_expected_where(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"images/\{training,validation\}/\*.jpg and annotations.* got .* without "
                                                rf"{tmp_path}/images/training and {tmp_path}/annotations/training; put"):
        ADE20K(tmp_path, "training")
    for folder in ("images", "annotations"):
        (tmp_path / folder / "training").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"\*.jpg in .*images/training, got none"):
        ADE20K(tmp_path, "training")


def test_ade20k_names_images_without_annotation(root):
    for number in range(1, 5):
        (root / f"ade/annotations/training/ADE_train_0000000{number}.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"each of 16 images in .*, got none for 4: ADE_train_00000001.png, "
                                                r"ADE_train_00000002.png, ADE_train_00000003.png, ...; copy"):
        ADE20K(root / "ade", "training")


@pytest.mark.parametrize(("pixels", "message"), [
    (np.full((120, 160), 151, np.uint8), "needs class ids from 0 to 150, got 151"),
    (np.zeros((90, 160), np.uint8), "needs to fit its image, got 160 x 90 pixels for an image of 160 x 120"),
    (np.zeros((120, 160, 3), np.uint8), "needs one byte per pixel, the class id, got a PNG of mode RGB"),
])
def test_ade20k_names_annotations_that_are_wrong(root, pixels, message):
    Image.fromarray(pixels).save(root / "ade/annotations/training/ADE_train_00000001.png")
    with pytest.raises(ValueError, match=rf"ADE_train_00000001.png {message}"):
        ADE20K(root / "ade", "training")[0, 0]


# COCO

def test_coco_numbers_its_categories_in_order_of_their_ids(tmp_path):
    images = instances(tmp_path, {"category_id": 90}, {"category_id": 1}, {})
    assert images.target(0)["labels"].tolist() == [2, 0, 1]
    assert images.category_ids == (1, 13, 90)
    assert images.class_names == ("n1", "n13", "n90")


def test_coco_reads_polygons_run_lengths_and_compressed_run_lengths_alike(tmp_path):
    from faster_coco_eval.core import mask

    wanted = torch.zeros(6, 8, dtype=torch.bool)
    wanted[2:4, 1:4] = True
    wanted[0, 6:8] = True
    counts = [8, 2, 4, 2, 4, 2, 14, 1, 5, 1, 5]                                       # by columns, zeros first
    squeezed = mask.encode(np.asfortranarray(wanted.numpy(), np.uint8))["counts"]
    squeezed = squeezed.decode() if isinstance(squeezed, bytes) else squeezed
    forms = ([[1, 2, 4, 2, 4, 4, 1, 4], [6, 0, 8, 0, 8, 1, 6, 1]], {"size": [6, 8], "counts": counts},
             {"size": [6, 8], "counts": squeezed})
    images = instances(tmp_path, *({"segmentation": form, "iscrowd": int(i == 1)} for i, form in enumerate(forms)))
    target = images.target(0)
    for each in target["masks"]:
        assert torch.equal(each, wanted)
    assert target["ignored"].tolist() == [False, True, False]
    assert target["boxes"].tolist() == [[1, 2, 4, 4]] * 3


@pytest.mark.parametrize("segmentation", [[], {"size": [6, 8], "counts": [1, 2]}, {"size": [5, 8], "counts": [40]},
                                          {"size": [6, 8]}, None])
def test_coco_names_an_annotation_whose_mask_is_none(tmp_path, segmentation):
    images = instances(tmp_path, {}, {"segmentation": segmentation})
    with pytest.raises(ValueError, match=r"instances_val2017.json needs polygons or run lengths of 8 x 6 pixels, got others in "
                                         r"annotation 101 \([^\n]*\); restore"):
        images.target(0)


def test_coco_leaves_out_objects_without_extent_and_outside_the_image(tmp_path):
    images = instances(tmp_path, {"area": 0}, {"bbox": [1, 2, 0.9, 2]}, {"bbox": [1, 2, 3, 0.5]}, {"bbox": [8, 0, 3, 2]},
                       {"bbox": [-3, 0, 3, 2]}, {"category_id": 1})
    assert images.target(0)["labels"].tolist() == [0]


def test_coco_images_without_annotation_are_evaluated_and_not_trained_on(written):
    images, trained = (COCO(written / "coco", "train2017", training=training) for training in (False, True))
    assert set(images.ids) - set(trained.ids) == {2}
    image, target = images[0, 1]
    assert target["image_id"] == 2
    assert target["boxes"].shape == (0, 4)
    assert target["masks"].shape == (0, *image.shape[1:])
    assert target["labels"].dtype == torch.int64


def test_an_image_of_a_crowd_alone_trains_with_empty_targets(tmp_path):
    instances(tmp_path, {"iscrowd": 1})
    edit(tmp_path / "annotations/instances_val2017.json", lambda content: content["images"][0].update(height=40, width=40))
    Image.new("RGB", (40, 40)).save(tmp_path / "val2017/000000000042.jpg")
    images = COCO(tmp_path, "val2017", transform=SMALL, training=True)
    _, target = images[0, 0]
    assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"]) == 0


def test_coco_images_with_a_side_below_32_pixels_are_not_trained_on(tmp_path):
    instances(tmp_path, {})
    with pytest.raises(ValueError, match="got none that can be used"):
        COCO(tmp_path, "val2017", training=True)


def test_coco_without_its_files_says_what_is_expected_where(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"COCO needs a folder with annotations/instances_\{train,val\}2017.json and "
                                                rf".*without {tmp_path}/val2017 and {tmp_path}/annotations/instances_val2017"):
        COCO(tmp_path, "val2017")


@pytest.mark.parametrize(("change", "message"), [
    (lambda c: c["annotations"][3].update(category_id=12), r"its own list \(80 ids\), got category_id 12 in annotation 4"),
    (lambda c: c["annotations"][3].update(image_id=77), "images of its own list, got image_id 77 in annotation 4"),
    (lambda c: c["annotations"][3].pop("bbox"), "needs bbox .* got None and .* in annotation 4; correct or restore"),
    (lambda c: c["annotations"][3].update(bbox=[1, 2, 3]), r"needs bbox .* got \[1, 2, 3\] and"),
    (lambda c: c["annotations"][3].update(bbox=[1, 2, 3, "4"]), "needs bbox .* in annotation 4"),
    (lambda c: c["images"][2].update(height="x"), "height and width in px for every image, got 'x' and 120 in image 3; "),
    (lambda c: c["images"][2].update(width=0), "height and width in px for every image, got 160 and 0 in image 3"),
    (lambda c: c["images"][2].update(width=float("inf")), "height and width in px for every image, got 160 and inf in image 3"),
    (lambda c: c["images"][2].update(id="3"), "COCO's instances with images, .* got TypeError"),
    (lambda c: c["annotations"][3].pop("area"), "and area for every object, got .* and None in annotation 4"),
    (lambda c: c.pop("images"), r"COCO's instances with images, categories and annotations, got KeyError\('images'\)"),
    (lambda c: c["images"].clear() or c["annotations"].clear(), "got none that can be used"),
    (lambda c: c["categories"].clear() or c["annotations"].clear(), "got none that can be used"),
])
def test_coco_names_what_is_wrong_in_its_json(root, change, message):
    path = root / "coco/annotations/instances_train2017.json"
    edit(path, change)
    with pytest.raises(ValueError, match=message):
        COCO(root / "coco", "train2017")


def test_images_that_are_listed_and_not_there_are_named_before_any_training(root):
    (root / "coco/train2017/000000000002.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="COCO needs 16 images in .*/train2017, got none for 1: 0+2.jpg; copy"):
        COCO(root / "coco", "train2017")
    (root / "voc/VOC2007/JPEGImages/000003.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="VOC needs 16 images in .*/JPEGImages, got none for 1: 000003.jpg; copy"):
        VOC(root / "voc", "trainval")


def test_coco_names_a_cut_off_json(root):
    path = root / "coco/annotations/instances_train2017.json"
    path.write_text(path.read_text()[:-30])
    with pytest.raises(ValueError, match=r"instances_train2017.json needs to be COCO's instances .* got JSONDecodeError"):
        COCO(root / "coco", "train2017")


def test_coco_names_an_image_of_another_size_than_its_json(tmp_path):
    images = instances(tmp_path, {}, height=7)
    with pytest.raises(ValueError, match="val2017.json needs to fit its image, got 8 x 7 pixels for an image of 8 x 6"):
        images[0, 0]


# VOC

def test_voc_boxes_count_from_0_and_difficult_objects_are_marked(tmp_path):
    place = tmp_path / "VOC2007"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (place / folder).mkdir(parents=True)
    (place / "ImageSets/Main/test.txt").write_text("000001\n")
    Image.new("RGB", (353, 500)).save(place / "JPEGImages/000001.jpg")
    (place / "Annotations/000001.xml").write_text(                                    # of the real one's form
        "<annotation><size><width>353</width><height>500</height><depth>3</depth></size>"
        "<object><name>dog</name><difficult>0</difficult><bndbox><xmin>48</xmin><ymin>240</ymin><xmax>195</xmax><ymax>371</ymax>"
        "</bndbox></object><object><name>person</name><difficult>1</difficult><part><name>head</name><bndbox><xmin>1</xmin>"
        "<ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></part><bndbox><xmin>8</xmin><ymin>12</ymin><xmax>352.5</xmax>"
        "<ymax>498</ymax></bndbox></object></annotation>")
    target = VOC(tmp_path, "test")[0, 0][1]
    assert target["boxes"].tolist() == [[47, 239, 194, 370], [7, 11, 351, 497]]
    assert [VOC_CLASSES[label] for label in target["labels"]] == ["dog", "person"]
    assert target["ignored"].tolist() == [False, True]
    assert target["image_id"] == "000001"


def test_voc_07_and_12_are_read_together(written):
    both = VOC(written / "voc", "trainval", (2007, 2012))
    assert len(both) == len(VOC(written / "voc", "trainval")) + 8 == 24
    assert both.target(0)["image_id"] == "000001"
    assert both.target(16)["image_id"].startswith("2012_")


def test_voc_images_without_objects_are_evaluated_and_not_trained_on(root):
    path = root / "voc/VOC2007/Annotations/000003.xml"
    text = path.read_text()
    path.write_text(text[: text.index("<object>")] + "</annotation>")
    assert VOC(root / "voc", "trainval").target(2)["boxes"].shape == (0, 4)
    trained = VOC(root / "voc", "trainval", training=True)
    assert len(trained) == len(trained.wide) == 15
    assert "000003" not in [trained.target(i)["image_id"] for i in range(15)]


def test_voc_without_its_folders_says_what_is_expected_where(root):
    with pytest.raises(FileNotFoundError, match=r"/\{JPEGImages,Annotations\} and VOC<year>/ImageSets/Main/<split>.txt "
                                                r"\(this is VOCdevkit\), got .* without .*VOC2012/ImageSets/Main/test.txt;"):
        VOC(root / "voc", "test", (2007, 2012))
    (root / "voc/VOC2007/Annotations/000002.xml").unlink()
    with pytest.raises(FileNotFoundError, match=r"each of 16 images .* got none for 1: 000002.xml; copy"):
        VOC(root / "voc", "trainval")


@pytest.mark.parametrize(("old", "new", "message"), [
    ("<name>aeroplane</name>", "<name>zebra</name>", "000001.xml needs objects of the 20 classes of PASCAL VOC, got zebra"),
    ("<xmin>", "<left>", "000001.xml needs size and for each object name and bndbox, got ParseError"),
    ("<xmin>", "<xmin>1e999", "000001.xml needs size and for each object name and bndbox, got OverflowError"),
    ("<xmin>", "<xmin>99", "000001.xml needs boxes with xmin < xmax and ymin < ymax, got 99"),
    ("<width>160</width>", "<width>150</width>", "fit its image, got 150 x 120 pixels for an image of 160 x 120"),
])
def test_voc_names_what_is_wrong_in_an_annotation(root, old, new, message):
    path = root / "voc/VOC2007/Annotations/000001.xml"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        VOC(root / "voc", "trainval")[0, 0]


# All three

def every(root, transforms=(None, None), training=False):
    segmentation, detection = transforms
    return (ADE20K(root / "ade", "training", segmentation), COCO(root / "coco", "train2017", detection, training=training),
            VOC(root / "voc", "trainval", transform=detection, training=training))


def test_a_corrupt_jpeg_is_named_and_what_to_do(root):
    for images, path in zip(every(root), ("ade/images/training/ADE_train_00000001.jpg", "coco/train2017/000000000001.jpg",
                                          "voc/VOC2007/JPEGImages/000001.jpg"), strict=True):
        (root / path).write_bytes((root / path).read_bytes()[:500])
        with pytest.raises(ImageError, match=rf"{path} needs to be a readable image, got '.*'; restore the file"):
            images[0, 0]
        (root / path).unlink()
        with pytest.raises(ImageError, match=rf"{path} needs to be a readable image, got 'no such file'"):
            images[0, 0]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_jpeg_reaches_the_trainer_as_one_sentence(root, workers):
    images = COCO(root / "coco", "train2017")
    (root / "coco/train2017/000000000003.jpg").write_bytes(b"\xff\xd8\xff")
    loader = Loader(images, InOrder(len(images)), COLLATE, workers)
    with pytest.raises(ImageError, match=r"^\S+000000000003.jpg needs to be a readable image, got '[^\n]*$"):
        list(loader)


def test_a_sample_depends_on_seed_epoch_and_index_alone(written):
    augment = SegmentationTrain(scale=(320, 80), crop=(64, 64)), SMALL
    for images, again in zip(every(written, augment), every(written, augment), strict=True):
        torch.rand(7)
        again[0, 2]
        image, target = images[1, 4]
        same, told = pickle.loads(pickle.dumps(again))[1, 4]                           # as a worker gets it
        assert torch.equal(image, same)
        assert all(torch.equal(value, told[key]) for key, value in target.items() if isinstance(value, torch.Tensor))
        again.seed = 1
        assert image.shape != again[1, 4][0].shape or not torch.equal(image, again[1, 4][0])
        assert image.shape != images[2, 4][0].shape or not torch.equal(image, images[2, 4][0])


def test_workers_deliver_the_batches_that_one_process_reads(written):
    batches = []
    for workers in (0, 2):
        images = COCO(written / "coco", "train2017", SMALL, training=True)
        plan = Batches(len(images), 4, seed=0, groups=images.wide)
        plan.epoch = 3
        batches.append(list(Loader(images, plan, COLLATE, workers)))
    assert len(batches[0]) == 5                                                       # 10 wide, 5 high ones
    for (image, targets), (same, told) in zip(*batches, strict=True):
        assert torch.equal(image, same)
        assert [each["image_id"] for each in targets] == [each["image_id"] for each in told]
        assert all(torch.equal(a["boxes"], b["boxes"]) for a, b in zip(targets, told, strict=True))


def test_micro_batches_of_an_epoch_hold_every_image_and_never_mix_groups():
    wide = np.array([True] * 11 + [False] * 6)
    plan = Batches(17, 4, seed=0, micro_batch=2, groups=wide)
    drawn = list(plan)
    assert (plan.steps, plan.parts) == (5, 2)                                         # 6 + 3 pairs, and one again
    assert len(drawn) == len(plan) == 10
    assert all(len(part) == 2 and len({wide[index] for _, index in part}) == 1 for part in drawn)
    assert {index for part in drawn for _, index in part} == set(range(17))
    steps = [{wide[index] for part in drawn[i : i + 2] for _, index in part} for i in range(0, 10, 2)]
    assert {True, False} in steps                                                     # a step may hold both
    plan.epoch = 1
    assert list(plan) != drawn


def test_without_groups_an_epoch_drops_its_remainder():
    drawn = [index for batch in Batches(17, 4, seed=0) for _, index in batch]
    assert len(drawn) == len(set(drawn)) == 16
    with pytest.raises(ValueError, match="at least one batch of 4 images, got 3"):
        Batches(3, 4, seed=0)


def test_a_resumed_epoch_goes_on_with_the_steps_that_were_left():
    whole, rest = (Batches(17, 4, seed=5, micro_batch=2) for _ in range(2))
    rest.first = 3
    assert list(rest) == list(whole)[6:]
    assert len(rest) == 2


def test_processes_share_a_step_without_overlap():
    whole = list(Batches(17, 8, seed=5, micro_batch=2))
    parts = [list(Batches(17, 8, seed=5, micro_batch=2, rank=rank, world_size=2)) for rank in range(2)]
    assert [each for a, b in ((0, 2), (2, 4)) for rank in parts for each in rank[a:b]] == whole
    with pytest.raises(ValueError, match="multiple of 3 processes x 1 images of a micro-batch, got 4"):
        Batches(17, 4, seed=5, world_size=3)
    seen = [index for rank in range(2) for batch in InOrder(7, 2, rank, 2) for _, index in batch]
    assert sorted(seen) == list(range(7))


def test_collate_pads_images_by_the_mean_colour_and_targets_by_nothing():
    one = torch.full((3, 5, 9), 255, dtype=torch.uint8), {"masks": torch.ones(2, 5, 9, dtype=torch.bool)}
    two = torch.zeros(3, 7, 4, dtype=torch.uint8), {"segmentation": torch.ones(7, 4, dtype=torch.uint8)}
    images, targets = Collate((0.5, 0.5, 0.5), (0.25, 0.25, 0.5), divisor=4)([one, two])
    assert images.shape == (2, 3, 8, 12)
    assert images[0, :, 0, 0].tolist() == [2, 2, 1]
    assert images[1, :, 6, 3].tolist() == [-2, -2, -1]
    assert images[0, :, 5:].abs().max() == images[0, :, :, 9:].abs().max() == images[1, :, :, 4:].abs().max() == 0
    assert targets[0]["masks"].shape == (2, 8, 12)
    assert targets[0]["masks"].sum() == 2 * 45
    assert (targets[1]["segmentation"] == 255).sum() == 8 * 12 - 28
    assert Collate((0.5,) * 3, (0.5,) * 3, divisor=1, size=(16, 16))([one])[0].shape == (1, 3, 16, 16)


def test_collate_leaves_an_annotation_of_the_original_size_alone():
    sample = torch.zeros(3, 5, 9, dtype=torch.uint8), {"segmentation": torch.ones(10, 18, dtype=torch.uint8)}
    assert COLLATE([sample])[1][0]["segmentation"].shape == (10, 18)
