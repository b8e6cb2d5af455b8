import colorsys

import pytest
import torch

from swconv.downstream import transforms
from swconv.downstream.transforms import DetectionTest, DetectionTrain, SegmentationTest, SegmentationTrain


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def scene(height, width, *boxes, ignored=()):
    """An image that is 255 inside integer boxes, with masks of the same pixels."""
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[y1:y2, x1:x2] = True
    image = (255 * masks.any(0).byte()).repeat(3, 1, 1)
    return image, {
        "image_id": 7, "original_size": (height, width), "size": (height, width), "masks": masks,
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), "labels": torch.arange(len(boxes)),
        "ignored": torch.tensor([i in ignored for i in range(len(boxes))], dtype=torch.bool),
    }


def extent(mask):
    """x1 y1 x2 y2 of a mask's pixels."""
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    return [columns[0].item(), rows[0].item(), columns[-1].item() + 1, rows[-1].item() + 1]


@pytest.mark.parametrize(("size", "long", "short", "expected"), [
    ((600, 800), 1333, 800, (800, 1067)),              # the short side decides: 800 / 600, 1066.67 rounded
    ((400, 1000), 1333, 800, (533, 1333)),             # the long side decides: 1.333
    ((512, 683), 2048, 512, (512, 683)),               # as it is
    ((333, 500), 1333, 480, (480, 721)),               # 720.72
])
def test_the_shape_is_kept_within_both_sides(size, long, short, expected):
    assert transforms.fit(size, long, short) == expected


def test_resize_scales_boxes_and_masks_alike_on_each_axis():
    image, target = transforms.resize(*scene(20, 40, (10, 4, 20, 12)), (30, 120))
    assert target["boxes"].tolist() == [[30, 6, 60, 18]]
    assert extent(target["masks"][0]) == [30, 6, 60, 18]
    assert image.shape == (3, 30, 120)
    assert target["size"] == (30, 120)
    assert target["original_size"] == (20, 40)
    assert image[0, 10, 45] == 255
    assert image[0, 10, 10] == 0


def test_flip_mirrors_image_boxes_and_masks():
    image, target = transforms.flip(*scene(20, 40, (10, 4, 19, 12)))
    assert target["boxes"].tolist() == [[21, 4, 30, 12]]
    assert extent(target["masks"][0]) == [21, 4, 30, 12]
    assert extent(image[0] > 0) == [21, 4, 30, 12]


def test_crop_shifts_and_cuts_boxes_and_drops_what_is_outside():
    image, target = scene(40, 40, (0, 0, 12, 12), (8, 6, 30, 20), (0, 0, 10, 30), (10, 35, 20, 39))
    image, target = transforms.crop(image, target, top=5, left=10, height=20, width=15)
    # the first keeps 2 x 7 px, the second 15 x 14, the third ends where the window begins, the fourth lies below it
    assert target["boxes"].tolist() == [[0, 0, 2, 7], [0, 1, 15, 15]]
    assert target["labels"].tolist() == [0, 1]
    assert [extent(mask) for mask in target["masks"]] == [[0, 0, 2, 7], [0, 1, 15, 15]]
    assert image.shape == (3, 20, 15)
    assert target["size"] == (20, 15)


def test_geometry_of_an_image_without_objects_works():
    sample = scene(20, 40)
    for image, target in (transforms.resize(*sample, (10, 20)), transforms.flip(*sample),
                          transforms.crop(*sample, 2, 3, 10, 20)):
        assert target["boxes"].shape == (0, 4)
        assert target["masks"].shape == (0, *image.shape[1:])


def test_a_detection_training_sample_keeps_boxes_on_their_masks_in_both_branches():
    augment = DetectionTrain(short_sides=(48, 64), long_side=128, crop_short_sides=(40, 60), crop_range=(30, 44))
    shapes = set()
    for seed in range(40):
        image, target = augment(*scene(60, 80, (5, 5, 45, 45), (50, 20, 78, 58)), generator(seed))
        shapes.add(tuple(image.shape[1:]))
        assert tuple(target["size"]) == tuple(image.shape[1:])
        assert min(image.shape[1:]) in (48, 64) or max(image.shape[1:]) == 128
        for box, mask in zip(target["boxes"], target["masks"], strict=True):
            assert mask.any()
            # Nearest pixels: one off in the reduced image, which is then enlarged from at least 30 to 64, and one off there.
            assert (box - torch.tensor(extent(mask))).abs().max() <= 64 / 30 + 1
    assert {(48, 64), (64, 85)} < shapes                                              # whole images, and crops


def test_scales_are_drawn_from_the_papers_list_without_crops_for_voc():
    augment = DetectionTrain(crop_short_sides=())
    image, target = scene(375, 500, (5, 5, 45, 45))
    heights = {augment(image, target, generator(seed))[0].shape[1] for seed in range(60)}
    assert heights == set(range(480, 801, 32))


def test_crops_of_detection_lie_within_the_absolute_range(monkeypatch):
    windows, crop = [], transforms.crop
    monkeypatch.setattr(transforms, "crop", lambda *arguments: windows.append(arguments[2:]) or crop(*arguments))
    augment = DetectionTrain(short_sides=(60,), long_side=200, crop_short_sides=(60,), crop_range=(38, 70))
    for seed in range(60):
        augment(*scene(60, 100), generator(seed))
    assert 15 < len(windows) < 45                                                     # of 60, by a coin
    assert {38, 60} < {height for _, _, height, _ in windows} <= set(range(38, 61))   # the image is 60 high
    assert {width for *_, width in windows} <= set(range(38, 71))
    assert all(0 <= top <= 60 - height and 0 <= left <= 100 - width for top, left, height, width in windows)
    assert len({left for _, left, _, _ in windows}) > 10


def test_ignored_objects_are_not_trained_on():
    _, target = DetectionTrain(short_sides=(60,), crop_short_sides=())(
        *scene(60, 80, (5, 5, 45, 45), (50, 20, 78, 58), ignored=[0]), generator())
    assert target["labels"].tolist() == [1]
    assert len(target["boxes"]) == len(target["masks"]) == len(target["ignored"]) == 1


def test_a_detection_test_sample_keeps_its_ignored_objects_and_its_shape():
    image, target = DetectionTest(long_side=160, short_side=120)(*scene(60, 100, (5, 6, 45, 30), ignored=[0]), generator())
    assert image.shape == (3, 96, 160)
    assert target["ignored"].tolist() == [True]
    torch.testing.assert_close(target["boxes"], torch.tensor([[8, 9.6, 72, 48]]))


def labelled(height, width):
    """Left half class 3, right half class 8, as shades of the image too."""
    segmentation = torch.full((height, width), 3, dtype=torch.uint8)
    segmentation[:, width // 2 :] = 8
    return (20 * segmentation).repeat(3, 1, 1), {"image_id": "a", "original_size": (height, width), "size": (height, width),
                                                "segmentation": segmentation}


def test_a_segmentation_crop_moves_image_and_labels_together():
    augment = SegmentationTrain(scale=(256, 64), crop=(48, 48), distort=False)
    heights = set()
    for seed in range(20):
        image, target = augment(*labelled(64, 128), generator(seed))
        heights.add(image.shape[1])
        assert target["segmentation"].shape == image.shape[1:]
        away = (image[0].int() - 20 * target["segmentation"].int()).abs() > 20      # but for the blurred seam
        assert away.float().mean() < 0.06
    assert min(heights) < 48                                                          # small scales are not padded yet
    assert max(heights) == 48


def test_crops_in_which_one_class_dominates_are_drawn_again():
    sample = labelled(64, 640)                                                        # a crop of 48 rarely meets both

    def mixed(cat_max_ratio):
        augment = SegmentationTrain((640, 64), (1, 1), (48, 48), cat_max_ratio, distort=False)
        shares = [augment(*sample, generator(seed))[1]["segmentation"].eq(3).float().mean().item() for seed in range(80)]
        return sum(0.25 < share < 0.75 for share in shares)

    assert mixed(0.75) > 2 * mixed(1.0)


def test_unlabelled_pixels_do_not_count_towards_the_dominating_class():
    image, target = labelled(40, 40)
    target["segmentation"][:, :20] = 255
    target["segmentation"][0, 20:] = 5                                                # 20 px of 5, 780 of 8, 800 of none
    assert not SegmentationTrain()._is_mixed(target["segmentation"])
    target["segmentation"][:20, 20:] = 5
    assert SegmentationTrain()._is_mixed(target["segmentation"])


def test_a_segmentation_test_sample_keeps_its_annotation_in_the_original_size():
    image, target = SegmentationTest(scale=(2048, 64), divisor=32)(*labelled(100, 150), generator())
    assert image.shape == (3, 64, 96)                                                 # 64 x 96 already
    assert SegmentationTest(scale=(2048, 50), divisor=32)(*labelled(100, 150), generator())[0].shape == (3, 64, 96)
    assert target["segmentation"].shape == (100, 150)
    assert target["size"] == (64, 96)


@pytest.mark.parametrize("rgb", [(200, 100, 50), (0, 255, 0), (17, 17, 17), (0, 0, 0), (90, 120, 121)])
@pytest.mark.parametrize("factor", [0.5, 1.5])
def test_saturation_is_that_of_hsv(rgb, factor):
    hue, saturation, value = colorsys.rgb_to_hsv(*(each / 255 for each in rgb))
    expected = [255 * each for each in colorsys.hsv_to_rgb(hue, min(1, saturation * factor), value)]
    got = transforms.saturate(torch.tensor(rgb, dtype=torch.uint8).view(3, 1, 1), factor).flatten()
    torch.testing.assert_close(got.double(), torch.tensor(expected).double(), atol=0.51, rtol=0)


def test_distortion_leaves_some_images_alone_and_changes_others_within_its_range():
    grey = torch.full((3, 4, 4), 100, dtype=torch.uint8)
    values = [transforms.distort(grey, generator(seed)) for seed in range(200)]
    assert all(value.dtype == torch.uint8 and value.unique().numel() == 1 for value in values)   # grey has no hue
    unchanged = sum(torch.equal(value, grey) for value in values) / len(values)
    assert 0.15 < unchanged < 0.4                                                     # 1 of 4: neither brightness nor contrast
    assert all(34 - 1 <= int(value[0, 0, 0]) <= 198 for value in values)                # (100 - 32) / 2 to (100 + 32) * 1.5


def test_a_draw_depends_on_its_generator_alone():
    augment = SegmentationTrain(scale=(256, 64), crop=(48, 48))
    first, again, other = (augment(*labelled(64, 128), generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1]["segmentation"], again[1]["segmentation"])
    assert first[0].shape != other[0].shape or not torch.equal(first[0], other[0])
