"""SW Table 8 from params/: every cell of the paper, and a row that was edited shows."""

import copy
from pathlib import Path

import pytest

from swconv import params
from swconv.reporting.recipes import build_table8

CLAIMS = Path("reports/paper/sw_table8.csv")


@pytest.fixture
def configs():
    known = params.load()
    return {column: known.resolve(run, "paper") | {"id": run} for column, run in known.settings.items()}


def test_every_setting_of_the_paper_is_that_of_our_rows(configs, tmp_path):
    score = build_table8(configs, CLAIMS, tmp_path / "table8.md", "remake it")
    assert score == {"equal": 60}
    assert "| u | 2000 | equal | 100 | equal | 100 | equal |" in (tmp_path / "table8.md").read_text()


def test_a_setting_that_differs_is_told_with_the_papers(configs, tmp_path):
    changed = copy.deepcopy(configs)
    changed["SW-tiny"]["recipe"]["warmup_epochs"] = 20
    assert build_table8(changed, CLAIMS, tmp_path / "table8.md", "remake it") == {"equal": 59, "differs": 1}
    assert "| 20 | differs: the paper prints 5 |" in (tmp_path / "table8.md").read_text()


def test_an_unknown_setting_is_refused(configs, tmp_path):
    claims = tmp_path / "claims.csv"
    claims.write_text("setting,SLaK-T,SW-tiny,SW-small\nmomentum,1,1,1\n")
    with pytest.raises(ValueError, match="got momentum"):
        build_table8(configs, claims, tmp_path / "table8.md", "remake it")
