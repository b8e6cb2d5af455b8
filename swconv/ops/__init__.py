"""The SW operator: the math of shifted small filters, its two forms, and the layer."""

from swconv.ops.module import ShiftwiseConv2d, affine
from swconv.ops.shift import responses, shift_add, shift_add_ref
from swconv.ops.strips import assemble, assemble_ref, half_border, strip_branches, strip_branches_ref, strip_mix
from swconv.ops.tables import ShiftTables, ghost_split, tap_count

__all__ = [
    "ShiftTables",
    "ShiftwiseConv2d",
    "affine",
    "assemble",
    "assemble_ref",
    "ghost_split",
    "half_border",
    "responses",
    "shift_add",
    "shift_add_ref",
    "strip_branches",
    "strip_branches_ref",
    "strip_mix",
    "tap_count",
]
