import numpy as np
import pytest
import torch

from swconv.downstream.pictures import draw

NAMES = ("cat", "dog", "cow")
IMAGE = torch.full((3, 60, 80), 128, dtype=torch.uint8)


def detections(**more):
    masks = torch.zeros(2, 60, 80, dtype=torch.bool)
    masks[0, 30:50, 10:30], masks[1, 30:50, 45:70] = True, True
    boxes = torch.tensor([[10.0, 30, 30, 50], [45, 30, 70, 50]])
    return {"boxes": boxes, "labels": torch.tensor([0, 2]), "masks": masks} | more


def changed(picture):
    return (np.array(picture) != IMAGE.permute(1, 2, 0).numpy()).any(2)


def test_detections_below_the_least_score_are_not_drawn():
    picture = changed(draw(IMAGE, detections(scores=torch.tensor([0.9, 0.2])), NAMES))
    assert picture[40, 20]                                                            # inside the first mask
    assert picture[30, 12:28].all()                                                   # along its box
    assert not picture[:, 60:].any()
    assert not changed(draw(IMAGE, detections(scores=torch.tensor([0.1, 0.2])), NAMES)).any()


def test_an_annotation_is_drawn_whole():
    picture = changed(draw(IMAGE, detections(), NAMES))
    assert picture[40, 20]
    assert picture[40, 60]


def test_boxes_alone_leave_the_inside_of_an_object_as_it_is():
    found = detections()
    del found["masks"]
    picture = changed(draw(IMAGE, found, NAMES))
    assert picture[48:52, 10:30].any()
    assert not picture[46, 20]                                                        # below the name, above the lower edge


def test_a_class_has_the_same_colour_in_detections_and_segmentations():
    segmentation = torch.full((60, 80), 255)
    segmentation[30:50, 45:70] = 2
    masks, maps = (np.array(draw(IMAGE, found, NAMES)) for found in (detections(), segmentation))
    assert masks[46, 60].tolist() == maps[46, 60].tolist()                             # below the name
    assert masks[46, 20].tolist() != maps[46, 60].tolist()
    assert not changed(maps)[:30].any()                                               # unlabelled


def test_nothing_found_leaves_the_image():
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}
    assert not changed(draw(IMAGE, none, NAMES)).any()
    assert not changed(draw(IMAGE, torch.full((60, 80), 255), NAMES)).any()


@pytest.mark.parametrize("found", [torch.zeros(30, 40), detections(masks=torch.zeros(2, 30, 40, dtype=torch.bool))])
def test_maps_of_another_size_are_refused(found):
    with pytest.raises(ValueError, match=r"image's size \(60, 80\), got \(30, 40\); resize them"):
        draw(IMAGE, found, NAMES)
