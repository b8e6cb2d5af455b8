"""SW Table 1: the formulas give what the layers compute, per channel."""

from pathlib import Path

import pytest
from torch import nn

from swconv.analysis.cost import cost
from swconv.models.mixers import StripConv2d
from swconv.ops import ShiftwiseConv2d
from swconv.reporting.formulas import FORMULAS, STAGES, section

VALUES = dict(FORMULAS)                                                     # of #1 the second
SHARED = {"rep_branches": 1, "edges": 1, "ghost_ratio": 0.0}


def macs_per_channel(mixer: nn.Module, channels: int, side: int) -> float:
    """As the cost of networks counts them, of the mixer alone."""
    network = nn.Sequential(nn.Conv2d(channels, channels, 1, groups=channels, bias=False), mixer)
    macs = sum(count for (_, _), (_, count) in cost(network, side).parts.items())
    return macs / channels - side * side                                    # less the first layer


@pytest.mark.parametrize(("side", "extent"), STAGES)
def test_formulas_are_what_the_layers_compute(side, extent):
    layers = {"#0": StripConv2d(4, extent, 5, bn=False), "#1": StripConv2d(4, extent, 5, bn=False, laid_out=True),
              "#2": ShiftwiseConv2d(4, extent, 5, **SHARED), "#3": ShiftwiseConv2d(4, extent, 5, padding="half", **SHARED),
              "#8": ShiftwiseConv2d(4, extent, 3, padding="half", **SHARED)}
    for label, layer in layers.items():
        small = 25 * side * side if label in ("#0", "#1") else 0             # the small kernel, which the paper leaves out
        share = 1 - 0.23 if label == "#8" else 1
        assert (macs_per_channel(layer, 4, side) - small) * share == pytest.approx(VALUES[label].value(side, extent))


def test_the_section_has_a_formula_for_every_row_of_the_paper():
    text = section(Path("reports/paper/sw_table1.csv"))
    assert "| #3, SW-(pad=N//2) | HWceil(M/N)NN | H W ceil(M/N) N N | 862,400 |" in text
    assert text.count("\n| #") == len(FORMULAS)


def test_other_rows_are_refused(tmp_path):
    claims = tmp_path / "claims.csv"
    claims.write_text("id,method,in1k_top1_acc_pct_300ep,in1k_top1_acc_pct_120ep,param_formula\n#0,a,b,c,d\n")
    with pytest.raises(ValueError, match="got #0"):
        section(claims)
