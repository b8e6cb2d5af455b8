"""Coding, comparing and assigning boxes, against torchvision where it does the same and by hand where it does not."""

import pytest
import torch
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_iou, generalized_box_iou

from swconv.downstream.boxes import NEGATIVE, UNUSED, anchors, assign, decode, encode, giou, random_sample

STD = (0.1, 0.1, 0.2, 0.2)


def some_boxes(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    start = torch.rand(count, 2, generator=generator, dtype=torch.float64) * 60
    return torch.cat([start, start + 2 + torch.rand(count, 2, generator=generator, dtype=torch.float64) * 40], dim=1)


def test_coding_is_torchvision_s_and_decoding_undoes_it():
    priors, boxes = some_boxes(50), some_boxes(50, 1)
    coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
    deltas = encode(priors, boxes, STD)
    torch.testing.assert_close(deltas, coder.encode_single(boxes, priors))
    torch.testing.assert_close(decode(priors, deltas, STD), boxes)
    torch.testing.assert_close(decode(priors, 1.3 * deltas, STD), coder.decode_single(1.3 * deltas, priors))


def test_a_side_grows_and_shrinks_by_at_most_62_5():
    prior = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    boxes = decode(prior, torch.tensor([[0.0, 0.0, 100.0, -100.0]]), (1.0,) * 4)
    torch.testing.assert_close(boxes, torch.tensor([[-307.5, 4.92, 317.5, 5.08]]))


def test_decoded_boxes_are_cut_at_the_image():
    prior, limits = torch.tensor([[-4.0, 2.0, 40.0, 30.0]]), torch.tensor([[32.0, 24.0, 32.0, 24.0]])
    assert decode(prior, torch.zeros(1, 4), STD, limits).tolist() == [[0.0, 2.0, 32.0, 24.0]]


def test_giou_of_pairs_is_torchvision_s_diagonal():
    boxes, others = some_boxes(50), some_boxes(50, 1)
    torch.testing.assert_close(giou(boxes, others), generalized_box_iou(boxes, others).diagonal())
    assert giou(boxes, boxes).allclose(torch.ones(50, dtype=torch.float64))


def test_giou_of_boxes_without_area_is_a_number():
    point = torch.tensor([[3.0, 3.0, 3.0, 3.0]])
    assert giou(point, point).isfinite().all()


def test_anchors_lie_on_the_strides_row_by_row_not_rounded():
    places = anchors([torch.zeros(1, 1, 2, 3)], [4], 8)[0]
    assert len(places) == 2 * 3 * 3
    half = 16 * 2**0.5
    torch.testing.assert_close(places[0], torch.tensor([-half, -half / 2, half, half / 2]))      # half as high as wide
    assert places[1].tolist() == [-16, -16, 16, 16]
    assert places[4].tolist() == [-12, -16, 20, 16]                                # next column
    assert places[10].tolist() == [-16, -12, 16, 20]                               # next row


def by_hand(priors, boxes, positive, negative, every_box):
    """One prior and one object at a time."""
    overlaps = box_iou(boxes, priors)
    found = []
    for column in overlaps.T:
        best = column.max()
        found.append(int(column.argmax()) if best >= positive else NEGATIVE if best < negative else UNUSED)
    for index, row in enumerate(overlaps):
        if row.max() >= every_box:
            for place in (row == row.max()).nonzero()[:, 0].tolist():
                found[place] = index
    return found


def test_assignment_is_that_of_the_slow_rule():
    priors = torch.cat([some_boxes(200), some_boxes(20).round()])
    boxes = torch.cat([some_boxes(6, 3), some_boxes(2).round(), some_boxes(1, 3) + 0.5])
    found = assign(priors, boxes, 0.7, 0.3, every_box=0.3).tolist()
    assert found == by_hand(priors, boxes, 0.7, 0.3, 0.3)
    assert {NEGATIVE, UNUSED} < set(found)
    assert sum(index >= 0 for index in found) > 5


def test_of_two_objects_that_want_a_prior_the_later_one_gets_it():
    prior = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    boxes = torch.tensor([[0.0, 0.0, 10.0, 9.0], [0.0, 0.0, 10.0, 5.0]])
    assert assign(prior, boxes, 0.7, 0.3).tolist() == [0]
    assert assign(prior, boxes, 0.7, 0.3, every_box=0.3).tolist() == [1]


def test_thresholds_belong_to_the_positive():
    priors, box = torch.tensor([[0.0, 0.0, 10.0, 5.0], [0.0, 0.0, 10.0, 4.0]]), torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    assert assign(priors, box, 0.5, 0.5).tolist() == [0, NEGATIVE]


def test_without_objects_or_priors_nothing_is_found():
    assert assign(some_boxes(3), torch.zeros(0, 4), 0.7, 0.3, 0.3).tolist() == [NEGATIVE] * 3
    assert assign(torch.zeros(0, 4), some_boxes(3).float(), 0.7, 0.3, 0.3).tolist() == []


def test_an_object_without_area_does_not_spoil_the_others():
    boxes = torch.tensor([[5.0, 5.0, 5.0, 5.0], [0.0, 0.0, 10.0, 10.0]])
    assert assign(boxes, boxes, 0.5, 0.5).tolist() == [NEGATIVE, 1]


@pytest.mark.parametrize(("positives", "negatives", "expected"), [(100, 100, (16, 48)), (3, 100, (3, 61)), (100, 5, (16, 5))])
def test_samples_are_filled_up_with_negatives(positives, negatives, expected):
    positive, negative = torch.arange(positives), 1000 + torch.arange(negatives)
    drawn = random_sample(positive, negative, 64, 0.25, torch.Generator().manual_seed(1))
    assert tuple(map(len, drawn)) == expected
    for some, all_ in zip(drawn, (positive, negative), strict=True):
        assert torch.isin(some, all_).all()
        assert (some.diff() > 0).all()


def test_a_generator_decides_the_samples():
    indices = torch.arange(1000)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    first, again, other = (random_sample(indices, indices, 64, 0.5, generator)[0] for generator in generators)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
