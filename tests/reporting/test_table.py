import csv
import json

import pytest

from swconv.reporting.runs import Run
from swconv.reporting.statistics import Interval
from swconv.reporting.table import Measured, Sheet, count, interval_cells, interval_text, markdown_table, read_claims

RUNS = tuple(Run(f"artifacts/mini/evaluate/sw03/seed{k}/metrics.json", k, {}, {"key": f"key{k}"}) for k in (1, 0))


def test_provenance_cites_runs_by_path_and_describes_each_once(tmp_path):
    sheet = Sheet(
        ["id", "top1_pct", "top1_pct_low"],
        [
            {"id": "#3", **interval_cells("top1_pct", Interval(1 / 3, -0.00001, 0.5, 2), "%", RUNS)},
            {"id": "#9", "top1_pct": "not run", "top1_pct_low": Measured(2, "seeds", RUNS[:1])},
        ],
    )
    sheet.write_csv(tmp_path / "new" / "t.csv")
    sheet.write_provenance(tmp_path / "t.json", "make t")
    rows = list(csv.DictReader((tmp_path / "new" / "t.csv").read_text().splitlines()))
    assert rows == [
        {"id": "#3", "top1_pct": "0.3333", "top1_pct_low": "0.0"},
        {"id": "#9", "top1_pct": "not run", "top1_pct_low": "2"},
    ]
    record = json.loads((tmp_path / "t.json").read_text())
    assert record["command"] == "make t"
    assert record["runs"] == {RUNS[1].path: {"key": "key0"}, RUNS[0].path: {"key": "key1"}}
    assert record["cells"] == [
        {
            "cell": {"row": "#3", "column": "top1_pct"},
            "value": 0.3333,
            "unit": "%",
            "n": 2,
            "seeds": [0, 1],
            "runs": [RUNS[0].path, RUNS[1].path],
        },
        {
            "cell": {"row": "#3", "column": "top1_pct_low"},
            "value": 0.0,
            "unit": "%",
            "n": 2,
            "seeds": [0, 1],
            "runs": [RUNS[0].path, RUNS[1].path],
        },
        {
            "cell": {"row": "#9", "column": "top1_pct_low"},
            "value": 2,
            "unit": "seeds",
            "n": 1,
            "seeds": [1],
            "runs": [RUNS[0].path],
        },
    ]


def test_intervals_print_signs_and_never_minus_zero():
    assert interval_text(Interval(1.24, -0.04, 2.5, 3), 1) == "+1.2 [+0.0, +2.5]"
    assert interval_text(Interval(-1.26, None, None, 1), 1) == "-1.3 (no interval)"
    assert interval_text(None, 1) == "-"


def test_a_bar_in_a_cell_does_not_end_it():
    assert markdown_table(["a"], [["x|y"]]) == "| a |\n| --- |\n| x\\|y |"


def test_counting_puts_the_s_on_the_noun():
    assert (count(1, "seed"), count(2, "seed"), count(2, "state of the code")) == (
        "1 seed",
        "2 seeds",
        "2 states of the code",
    )


def test_claims_are_as_printed(tmp_path):
    (tmp_path / "t.csv").write_text("id,acc\n#3,81.60\n#4,-\n")
    assert read_claims(tmp_path / "t.csv", "acc") == {"#3": "81.60", "#4": "-"}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("id,top\n#3,1\n", "needs the columns id and acc, got id, top"), ("id,acc\n#3,1\n#3,2\n", "2 lines for 1 names")],
)
def test_claims_without_the_column_or_with_a_row_twice_are_refused(tmp_path, text, sentence):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        read_claims(tmp_path / "t.csv", "acc")
