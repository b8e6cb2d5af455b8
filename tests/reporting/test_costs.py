"""Tables of parameters and FLOPs: what counts as equal, what has to be explained, what a page says."""

import csv
from collections import Counter
from pathlib import Path

import pytest

from swconv import params
from swconv.reporting.costs import build_cost_table, build_index, compare, rounded, tally

CLAIMS = "method,params_M,flops_G,top1_acc_pct\nours,31,5.0,83.4\nthick,56,9.4,83.9\nforeign,22,4.6,81.4\n"


def table(explained=None, of="thick"):
    rows = [{"of": {"method": name}, "key": name, "dense_key": name, "explained": explained or {} if name == of else {}}
            for name in ("ours", of)]
    return {"title": "A table", "claims": "x_table1.csv", "columns": {"params_M": "params", "flops_G": "macs"}, "rows": rows}


COUNTS = {"ours": {"params": 31_002_670, "macs": 5_024_000_000}, "thick": {"params": 55_990_108, "macs": 9_334_000_000},
          "thop": {"params": 0, "macs": 9_394_000_000}}


@pytest.fixture
def paper(tmp_path) -> Path:
    (tmp_path / "x_table1.csv").write_text(CLAIMS)
    return tmp_path


def cells(paper, plan):
    return compare(plan, COUNTS, list(csv.DictReader(CLAIMS.splitlines())), paper / "x_table1.csv")


@pytest.mark.parametrize(("count", "what", "printed", "shown"), [
    (31_002_670, "params", "31", "31"), (5_024_000_000, "macs", "5.0", "5.0"), (4_950_000_000, "macs", "5.0", "5.0"),
    (4_949_999_999, "macs", "5.0", "4.9"), (9_334_000_000, "macs", "9.4", "9.3"), (28_500_000, "params", "29", "29"),
])
def test_a_count_is_rounded_as_the_paper_prints(count, what, printed, shown):
    assert rounded(count, what, printed) == shown


def test_a_number_that_differs_is_told_and_a_foreign_model_is_cited(paper):
    ours, thick, foreign = cells(paper, table())
    assert [ours[c].verdict for c in ("params_M", "flops_G", "top1_acc_pct")] == ["equal", "equal", "not run"]
    assert (thick["flops_G"].verdict, thick["flops_G"].count) == ("differs", 9_334_000_000)
    assert {cell.verdict for cell in foreign.values()} == {"cited"}


def test_an_explanation_that_names_a_count_is_checked(paper):
    right = {"flops_G": {"why": "counted by thop", "counts": {"key": "thop"}}}
    assert cells(paper, table(right))[1]["flops_G"].verdict == "explained"
    wrong = {"flops_G": {"why": "counted as ours", "counts": {"key": "ours"}}}
    assert cells(paper, table(wrong))[1]["flops_G"].verdict == "differs"


def test_an_explanation_of_what_is_equal_does_not_show(paper):
    told = {"params_M": {"why": "no reason", "counts": None}}
    assert cells(paper, table(told))[1]["params_M"] == cells(paper, table())[1]["params_M"]


def test_a_row_that_the_paper_does_not_have_is_refused(paper):
    with pytest.raises(ValueError, match="needs to name one row"):
        cells(paper, table(of="thin"))


def test_the_page_and_the_spreadsheet_hold_every_cell(paper, tmp_path):
    out = tmp_path / "reports/table1.md"
    build_cost_table(table({"flops_G": {"why": "counted by thop", "counts": {"key": "thop"}}}), COUNTS, paper, out, "remake it")
    text = out.read_text()
    assert "| thick | 56 | 55.990 | equal | 9.4 | 9.334 | explained [^1] | 83.9 | - | not run |" in text
    assert "[^1]: counted by thop." in text
    assert "3 equal, 1 explained, 3 cited, 2 not run" in text
    rows = list(csv.DictReader(out.with_suffix(".csv").read_text().splitlines()))
    assert rows[1]["flops_G_why"] == "counted by thop"
    assert rows[0]["params_M_ours"] == "31002670"


def test_the_scoreboard_adds_up_and_knows_tables_that_were_not_made(paper, tmp_path):
    (paper / "x_table2.csv").write_text("method,top1_acc_pct\na,81.0\nb,-\n")
    (paper / "sw_table3.csv").write_text("setting,a\nu,100\n")
    (paper / "x_table1.csv").rename(paper / "sw_table1.csv")
    (paper / "x_table2.csv").rename(paper / "sw_table2.csv")
    plan = table() | {"claims": "sw_table1.csv"}
    others = {"sw_table3.csv": ("table3", "Other", Counter(equal=4))}
    build_index({"table1": plan}, COUNTS, others, paper, tmp_path / "index.md")
    text = (tmp_path / "index.md").read_text()
    assert "| [A table](table1.md) | 9 | 3 | - | 1 | 3 | 2 |" in text
    assert "| SW Table 2 | 1 | - | - | - | - | 1 |" in text
    assert "| [Other](table3.md) | 4 | 4 | - | - | - | - |" in text
    assert "| all | 14 | 7 | - | 1 | 3 | 3 |" in text


def test_the_committed_tables_leave_nothing_that_differs():
    known = params.load()
    for name, plan in known.costs.items():
        page = Path("reports", f"{name}.md").read_text()
        assert " differs" not in page
        assert plan.title in page
    assert tally([]) == {}
