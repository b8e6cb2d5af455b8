"""SLaK Figure 4, left: what ConvNeXt-T costs as the kernels of all its stages grow, whole and decomposed."""

from dataclasses import dataclass

from swconv.analysis.cost import cost

EXTENTS = tuple(range(7, 152, 12))  # px, the same in all stages; the figure goes from 7 to 151
FORMS = {"M x M": {"arrangement": "single"}, "M x 5 and 5 x M": {"arrangement": "parallel", "small_kernel": 5}}


@dataclass(frozen=True)
class Point:
    """One kernel size of one form: extent in pixels, parameters, multiply-adds at 224 px."""

    form: str
    extent: int
    params: int
    macs: int


def curves() -> list[Point]:
    """The points of both curves, form by form; the decomposed kernel with its 5 x 5 added to a strip."""
    points = []
    for form, arguments in FORMS.items():
        for extent in EXTENTS:
            found = cost("lk_convnext_tiny", form="merged", kernel_sizes=(extent,) * 4, **arguments)
            points.append(Point(form, extent, found.params, found.macs))
    return points
