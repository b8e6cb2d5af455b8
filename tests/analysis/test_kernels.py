"""SLaK Figure 4, left: both curves grow, the decomposed one in a line, and meet the counts of single models."""

from swconv.analysis.cost import cost
from swconv.analysis.kernels import EXTENTS, curves


def test_whole_kernels_cost_their_square_and_strips_their_length():
    points = curves()
    whole, strips = ([p for p in points if p.form == form] for form in ("M x M", "M x 5 and 5 x M"))
    assert [p.extent for p in whole] == [p.extent for p in strips] == list(EXTENTS)
    steps = {b.macs - a.macs for a, b in zip(strips, strips[1:], strict=False)}
    assert len(steps) == 1                                                  # a line
    last = [b.macs - a.macs for a, b in zip(whole, whole[1:], strict=False)]
    assert all(b > a for a, b in zip(last, last[1:], strict=False))         # ever steeper
    assert whole[-1].macs > 7 * strips[-1].macs


def test_the_first_point_is_convnext_with_norms():
    first = curves()[0]
    assert first.macs == cost("lk_convnext_tiny", kernel_sizes=(7, 7, 7, 7)).macs
