"""The least work: multiplications that hit the map, and bytes."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from swconv.bench import work
from swconv.bench.operator import SW_TINY
from swconv.bench.work import Stage

STAGES = {stage.number: stage for stage in SW_TINY}


def by_hand(kernel, height, width):
    pixels = list(itertools.product(range(height), range(width)))
    return sum(0 <= y + dy < height and 0 <= x + dx < width for y, x in pixels for dy, dx in kernel)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (4, 7), (9, 9)])
@pytest.mark.parametrize("kernel", [
    work.centred(3, 3), work.centred(13, 13), work.rectangle(range(-1, 2), range(-23, 25)),
    frozenset().union(*work.shiftwise(Stage(3, 9, 2, 11, 1, 1))),
])
def test_the_count_is_that_of_every_pixel_and_tap(kernel, height, width):
    assert work.in_bounds_macs(kernel, height, width) == by_hand(kernel, height, width)


def test_a_plus_counts_every_place_once_and_ones_convolved_with_it_count_the_same():
    stage = Stage(1, 8, 1, 11, 1, 1)
    plus = torch.zeros(1, 1, 25, 25)
    for dy, dx in frozenset().union(*work.shiftwise(stage)):
        plus[0, 0, 12 + dy, 12 + dx] = 1
    hits = F.conv2d(torch.ones(1, 1, 8, 8), plus, padding=12).sum()
    assert work.forward(stage, frozenset().union(*work.shiftwise(stage)))["macs"] == hits


@pytest.mark.parametrize(("number", "taps", "per_pixel"), [(1, 297, 225), (2, 297, 154), (3, 279, 72), (4, 81, 31)])
def test_sw_tiny_needs_what_the_performance_study_counted(number, taps, per_pixel):
    stage = STAGES[number]
    plus = frozenset().union(*work.shiftwise(stage))
    assert len(plus) == taps
    least = work.forward(stage, plus)
    assert round(least["macs"] / (stage.channels * stage.side**2)) == per_pixel
    assert least["bytes"] == 2 * 4 * stage.channels * stage.side**2


def test_training_is_three_times_the_work_of_the_separate_kernels():
    stage = STAGES[4]
    separate = sum(by_hand(kernel, 7, 7) for kernel in work.shiftwise(stage))
    assert work.training(stage, *work.shiftwise(stage)) == {"macs": 3 * separate * 492, "bytes": (3 + 2 * 3) * 4 * 492 * 49}


def test_slaks_pair_is_one_plus():
    assert len(work.peers(STAGES[4])["slak_pair"]) == 2 * 5 * 13 - 25
