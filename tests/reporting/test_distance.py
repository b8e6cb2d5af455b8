import numpy as np
import pytest

from swconv.reporting import distance
from swconv.reporting.comparison import Control, Row
from swconv.reporting.distance import ByDistance
from swconv.reporting.runs import Run

ROW, CONTROL = Row("sw03", "#3", "SW"), Control("control", "3x3", of="sw03")
GRID = 6
STEPS = ((0, 1), (0, -1), (1, 0), (-1, 0))


def _line(label, *seeds):
    runs = tuple(Run(f"seed{k}", k, {"top1": float(np.mean(values))}, {}) for k, values in enumerate(seeds))
    return ByDistance(label, runs, (2, 3, 4, 5), tuple(zip(*seeds, strict=True)))


def _report(sw, control):
    lines = {"sw03": sw, "control": control}
    return distance.report(lines, distance.slope_differences(lines, [CONTROL]), [ROW], [CONTROL])


FLAT = _line("#3 SW", [90.0, 89, 91, 90], [88.0, 88, 88, 89], [91.0, 90, 90, 90])
FALLING = _line("3x3", [84.0, 80, 63, 47], [85.0, 78, 62, 50], [83.0, 80, 65, 44])
NOISY = _line("3x3", [60.0, 60, 60, 60], [60.0, 50, 40, 30], [60.0, 62, 58, 64])
LOW = _line("3x3", [24.0, 23, 24, 24], [23.0, 24, 24, 23], [24.0, 24, 23, 24])


def test_slopes_are_points_per_cell_of_each_seed():
    assert _line("x", [90.0, 85, 80, 75], [90.0, 90, 90, 90]).slopes == pytest.approx([-5.0, 0.0])


@pytest.mark.parametrize(
    ("line", "shape"),
    [
        (FLAT, "flat"),
        (FALLING, "falling"),
        (NOISY, "undecided"),
        (_line("x", [47.0, 63, 80, 84], [50.0, 62, 78, 85], [44.0, 65, 80, 83]), "rising"),
        (_line("x", [90.0, 85, 80, 75], [90.0, 85, 80, 75]), "no verdict (n < 3)"),
    ],
)
def test_shape(line, shape):
    assert line.shape == shape


@pytest.mark.parametrize(
    ("sw", "control", "verdict"),
    [
        (FLAT, FALLING, "holds"),
        (FALLING, FALLING, "does not hold"),
        (FLAT, FLAT, "does not hold"),
        (FLAT, NOISY, "undecided"),
        (FLAT, _line("3x3", [84.0, 80, 63, 47]), "no verdict (n < 3)"),
    ],
)
def test_the_claim_is_judged_whichever_way_it_comes_out(sw, control, verdict):
    text = _report(sw, control)
    assert f"#3 flat, control ({control.label}) falling: {verdict}.**" in text


def test_slope_differences_are_the_row_minus_its_control_where_both_were_run():
    sw, control = _line("#3 SW", [90.0, 90, 90, 90], [92.0, 91, 90, 89]), _line("3x3", [90.0, 85, 80, 75], [90.0, 84, 78, 72])
    difference = distance.slope_differences({"sw03": sw, "control": control}, [CONTROL])["control"]
    assert difference.estimate == pytest.approx((0 - 1) / 2 - (-5 - 6) / 2)
    assert distance.slope_differences({"sw03": sw}, [CONTROL]) == {}


def test_a_control_below_the_layout_ceiling_is_named():
    text = _report(FLAT, LOW)
    assert "The control has 23.7 % over all distances, below the 43 %" in text
    assert "#3 has" not in text


def test_nothing_run_says_so():
    assert distance.report({}, {}, [ROW], [CONTROL]) == "Not run: there is no result by distance."


def test_the_layout_ceiling_is_what_the_best_marker_blind_rule_reaches():
    generator = np.random.RandomState(0)
    free = [(i, j) for i in range(GRID) for j in range(GRID)]
    best = []
    for _ in range(4000):
        step = generator.randint(2, 6)
        while True:
            row, column = generator.randint(GRID, size=2)
            down, right = STEPS[generator.randint(4)]
            target = (row + step * down, column + step * right)
            if min(target) >= 0 and max(target) < GRID:
                break
        away = [cell for cell in free if cell[0] != row and cell[1] != column]
        digits = [target] + [away[k] for k in generator.choice(len(away), 3, replace=False)]
        weights = [_weight(digit, [other for other in digits if other != digit]) for digit in digits]
        best.append(max(weights) / sum(weights))
    assert 100 * np.mean(best) == pytest.approx(distance.LAYOUT_CEILING, abs=0.6)  # 3 standard errors


def _weight(target, others):
    """Likelihood of a layout if ``target`` is the digit pointed to, summed over all places of the marker."""
    weight = 0.0
    for step in range(2, 6):
        for down, right in STEPS:
            row, column = target[0] - step * down, target[1] - step * right
            inside = 0 <= row < GRID and 0 <= column < GRID
            if inside and all(other[0] != row and other[1] != column for other in others):
                weight += 1 / (GRID - step)  # there are 4 * 6 * (6 - step) places for a marker at this distance
    return weight
