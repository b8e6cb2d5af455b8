"""Tables of parameters and FLOPs: what counts as equal, what has to be explained, what a page says."""

import csv
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from swconv import downstream_params, params
from swconv.__main__ import main
from swconv.reporting.accuracies import Accuracy
from swconv.reporting.costs import (
    accuracy_cell,
    build_cost_table,
    build_counts,
    build_index,
    compare,
    counts_section,
    rounded,
    tally,
)

CLAIMS = "method,params_M,flops_G,top1_acc_pct\nours,31,5.0,83.4\nthick,56,9.4,83.9\nforeign,22,4.6,81.4\n"


def table(explained=None, of="thick"):
    rows = [{"of": {"method": name}, "key": name, "dense_key": name, "run": None,
             "explained": explained or {} if name == of else {}} for name in ("ours", of)]
    return {"title": "A table", "claims": "x_table1.csv", "columns": {"params_M": "params", "flops_G": "macs"},
            "scores": {}, "rows": rows}


COUNTS = {"ours": {"params": 31_002_670, "macs": 5_024_000_000}, "thick": {"params": 55_990_108, "macs": 9_334_000_000},
          "thop": {"params": 0, "macs": 9_394_000_000}}


@pytest.fixture
def paper(tmp_path) -> Path:
    (tmp_path / "x_table1.csv").write_text(CLAIMS)
    return tmp_path


def cells(paper, plan):
    return compare(plan, COUNTS, list(csv.DictReader(CLAIMS.splitlines())), paper / "x_table1.csv", {})


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


@pytest.mark.parametrize(("printed", "top1", "verdict"), [
    ("83.4", 83.35, "equal"), ("83.4", 83.449, "equal"), ("83.4", 83.45, "differs"), ("83.39", 83.4, "differs"), ("", 80.0, ""),
    ("-", 80.0, ""),
])
def test_an_accuracy_is_compared_at_the_digits_that_are_printed(printed, top1, verdict):
    assert accuracy_cell(printed, Accuracy(top1, "told"), cited=False).verdict == verdict


def test_an_explanation_that_names_a_count_is_checked(paper):
    right = {"flops_G": {"why": "counted by thop", "counts": {"key": "thop"}}}
    assert cells(paper, table(right))[1]["flops_G"].verdict == "explained"
    wrong = {"flops_G": {"why": "counted as ours", "counts": {"key": "ours"}}}
    assert cells(paper, table(wrong))[1]["flops_G"].verdict == "differs"


def test_an_explanation_that_comes_nearer_tells_how_near_and_the_rest(paper):
    def cell(key):
        told = {"flops_G": {"why": "without its head", "counts": {"key": key}, "rest": "the masks are uneven"}}
        known = COUNTS | {"near": {"params": 0, "macs": 9_440_000_000}, "far": {"params": 0, "macs": 9_500_000_000}}
        return compare(table(told), known, list(csv.DictReader(CLAIMS.splitlines())), paper / "x_table1.csv", {})[1]["flops_G"]

    assert (cell("near").verdict, cell("near").why) == ("explained", "without its head: 9.4; the masks are uneven")
    assert cell("far").verdict == "differs"


def test_a_dash_in_the_paper_is_no_cell_and_ours_shows_beside_it(paper):
    dashed = list(csv.DictReader(CLAIMS.replace("56,9.4", "-,-").splitlines()))
    rows = compare(table(), COUNTS, dashed, paper / "x_table1.csv", {})
    assert (rows[1]["params_M"].verdict, rows[1]["params_M"].count) == ("", 55_990_108)
    assert tally(rows).total() == 7


def test_measures_of_fine_tunes_stand_in_the_paper_columns_and_those_on_tiny_sets_apart(tmp_path):
    (tmp_path / "sw_table5.csv").write_text("method,mIoU_SS,mIoU_MS\nours,49.22,50.06\nmine,47.6,-\nforeign,44.5,45.8\n")
    rows = [{"of": {"method": name}, "key": None, "dense_key": None, "run": run, "explained": {}}
            for name, run in (("ours", "a"), ("mine", "b"), ("foreign", None))]
    plan = {"title": "T", "claims": "sw_table5.csv", "columns": {}, "rows": rows,
            "scores": {"mIoU_SS": "mIoU", "mIoU_MS": "mIoU_multi_scale"}}
    build_cost_table(plan, {}, tmp_path, tmp_path / "t.md", "remake", {("sw_table5", 0, "mIoU_SS"): Accuracy(49.221, "run a")},
                     [("a", "overfit", {"mIoU": "97.10 (n = 1)"})])
    text = (tmp_path / "t.md").read_text()
    assert "| ours | 49.22 | 49.22 | equal [^1] | 50.06 | - | not run |" in text
    assert "| mine | 47.6 | - | not run | - | - | not run |" in text
    assert "| foreign | 44.5 | - | cited | 45.8 | - | cited |" in text
    assert "1 equal, 2 cited, 2 not run (cells)." in text
    paper_table, tiny = text.split("## On tiny sets: not to be compared with the paper")
    assert "97.10" not in paper_table
    assert "| run | profile | mIoU, %, tiny set |" in tiny
    assert "| a | overfit | 97.10 (n = 1) |" in tiny
    assert "FLOPs" not in text


def test_an_explanation_of_what_is_equal_does_not_show(paper):
    told = {"params_M": {"why": "no reason", "counts": None}}
    assert cells(paper, table(told))[1]["params_M"] == cells(paper, table())[1]["params_M"]


def test_a_row_that_the_paper_does_not_have_is_refused(paper):
    with pytest.raises(ValueError, match="needs to name one row"):
        cells(paper, table(of="thin"))


def test_the_page_and_the_spreadsheet_hold_every_cell(paper, tmp_path):
    out = tmp_path / "reports/table1.md"
    build_cost_table(table({"flops_G": {"why": "counted by thop", "counts": {"key": "thop"}}}), COUNTS, paper, out, "remake it",
                     {("x_table1", 1, "top1_acc_pct"): Accuracy(83.94, "published weights thick")})
    text = out.read_text()
    assert "| thick | 56 | 55.990 | equal | 9.4 | 9.334 | explained [^1] | 83.9 | 83.94 | equal [^2] |" in text
    assert "| ours | 31 | 31.003 | equal | 5.0 | 5.024 | equal | 83.4 | - | not run |" in text
    assert "[^1]: counted by thop." in text
    assert "[^2]: published weights thick." in text
    assert "4 equal, 1 explained, 3 cited, 1 not run" in text
    rows = list(csv.DictReader(out.with_suffix(".csv").read_text().splitlines()))
    assert rows[1]["flops_G_why"] == "counted by thop"
    assert rows[0]["params_M_ours"] == "31002670"
    assert rows[1]["top1_acc_pct_ours"] == "83.94"


def test_what_is_counted_of_a_table_stands_on_the_page_of_its_runs_without_accuracies(paper, tmp_path):
    plan = table({"flops_G": {"why": "counted by thop", "counts": {"key": "thop"}}})
    build_counts(plan, COUNTS, paper, tmp_path / "r/table1_counts.csv")
    text = counts_section(plan["columns"], tmp_path / "r/table1_counts.csv")
    assert "| thick | 56 | 55.990 | equal | 9.4 | 9.334 | explained [^1] |" in text
    assert "[^1]: counted by thop." in text
    assert "3 equal, 1 explained, 2 cited (cells)." in text
    assert "83.9" not in text


def test_the_scoreboard_adds_up_and_knows_tables_that_were_not_made(paper, tmp_path):
    (paper / "x_table2.csv").write_text("method,top1_acc_pct\na,81.0\nb,-\n")
    (paper / "sw_table3.csv").write_text("setting,a\nu,100\n")
    (paper / "x_table1.csv").rename(paper / "sw_table1.csv")
    (paper / "x_table2.csv").rename(paper / "sw_table2.csv")
    plan = table() | {"claims": "sw_table1.csv"}
    others = {"sw_table3.csv": ("table3", "Other", Counter(equal=4))}
    pages = {"sw_table2.csv": ("table2", "Runs")}
    build_index({"table1": plan}, COUNTS, others, pages, {}, {}, paper, tmp_path / "index.md")
    text = (tmp_path / "index.md").read_text()
    assert "| [A table](table1.md) | 9 | 3 | - | 1 | 3 | 2 |" in text
    assert "| [Runs](table2.md) | 1 | - | - | - | - | 1 |" in text
    assert "| [Other](table3.md) | 4 | 4 | - | - | - | - |" in text
    assert "| all | 14 | 7 | - | 1 | 3 | 3 |" in text
    scores = {"sw_table1.csv": Counter({"reproduced": 1, "not run": 2}), "sw_table2.csv": Counter({"no verdict (n < 3)": 1})}
    build_index({"table1": plan}, COUNTS, others, pages, scores, {}, paper, tmp_path / "index.md")
    text = (tmp_path / "index.md").read_text()
    assert "| table | cells | equal | explained | differs | cited | not run | no verdict (n < 3) | reproduced |" in text
    assert "| [A table](table1.md) | 9 | 3 | - | 1 | 2 | 2 | - | 1 |" in text   # of what is counted, and of its runs
    assert "| [Runs](table2.md) | 1 | - | - | - | - | - | 1 | - |" in text
    assert "| all | 14 | 7 | - | 1 | 2 | 2 | 1 | 1 |" in text


def test_counts_of_another_time_are_refused(tmp_path, capsys):
    (tmp_path / "counts.json").write_text('{"counted": {}, "curves": []}')
    assert main(["tables", "--counts", str(tmp_path / "counts.json"), "--out", str(tmp_path / "reports")]) == 1
    assert "Count again: python -m swconv count --out" in capsys.readouterr().err
    assert not (tmp_path / "reports").exists()


@pytest.mark.parametrize(("old", "new", "sentence"), [
    ("model: sw_tiny\n      task: cascade", "task: cascade", "the row of {'method': 'SW-tiny'} needs a model"),
    ("  scores: {mAP: mAP}\n", "", "has a run, and the table no scores"),
    ("run: coco_36ep_sw_tiny", "run: coco_36ep_sw_tini", "coco_36ep_sw_tiny"),
])
def test_a_row_that_says_too_little_or_names_no_fine_tune_is_refused(tmp_path, monkeypatch, capsys, old, new, sentence):
    counts = {key: {"params": 1, "macs": 1} for key in params.load().counted}
    for folder in ("params", "reports/paper"):
        shutil.copytree(folder, tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    text = Path("params/costs.yaml").read_text()
    Path("params/costs.yaml").write_text(text.replace(old, new, 1))
    Path("counts.json").write_text(json.dumps({"counted": counts, "curves": []}))
    assert main(["tables", "--counts", "counts.json", "--out", "out"]) == 1
    assert sentence in capsys.readouterr().err
    assert not Path("out").exists()


def test_runs_on_imagenet_and_published_weights_of_pages_on_runs_enter_the_scoreboard(tmp_path, monkeypatch):
    for folder in ("params", "reports/paper"):
        shutil.copytree(folder, tmp_path / folder)
    monkeypatch.chdir(tmp_path)

    def write(folder: str, values: dict, record: dict) -> None:
        Path(folder).mkdir(parents=True)
        metrics = {key: {"value": value, "unit": "%"} for key, value in values.items()}
        Path(folder, "metrics.json").write_text(json.dumps(metrics))
        Path(folder, "run.json").write_text(json.dumps(record))

    for seed, top1 in enumerate((81.3, 81.35, 81.45)):                    # #9, printed as 81.36
        write(f"artifacts/paper/evaluate/sw09/seed{seed}", {"top1": top1}, {"key": "k", "seed": seed})
    config = params.load().released("slak_tiny_300", "paper")             # 82.5 at 300 epochs, laid out too
    write("artifacts/paper/released/slak_tiny_300", {"top1": 82.48, "top1_laid_out": 82.3, "images": 50_000},
          {"config": config, "source_sha256": "ab"})
    Path("counts.json").write_text(json.dumps({"counted": {key: {"params": 1, "macs": 1} for key in params.load().counted},
                                               "curves": []}))
    assert main(["tables", "--counts", "counts.json", "--out", "reports"]) == 0
    text = Path("reports/index.md").read_text()
    assert "| table | cells | equal | explained | differs | cited | not run | reproduced |" in text
    assert "roadmap, row by row](table2.md) | 16 | - | - | - | - | 15 | 1 |" in text
    assert "from SLaK to shared filters](table1.md) | 12 | 1 | - | 1 | - | 10 | - |" in text


def test_the_committed_tables_leave_nothing_that_differs():
    known = params.load()
    for name, plan in known.costs.items():
        page = Path("reports", f"{name}.md").read_text()
        assert " differs" not in page
        assert plan.title in page
    assert tally([]) == {}


def test_every_fine_tune_of_the_papers_stands_in_a_table_of_its_task():
    known = params.load()
    fine_tunes, shown = downstream_params.load(Path("params"), known), set()
    tasks = {"sw_table4.csv": "coco", "sw_table5.csv": "ade20k", "sw_table6.csv": "nuscenes", "slak_table4.csv": "ade20k",
             "slak_table5.csv": "voc", "slak_table6.csv": "coco"}
    for plan in known.costs.values():
        for row in plan.rows:
            if row.run:
                assert fine_tunes.run(row.run).task == tasks[plan.claims]
                shown.add(row.run)
    assert shown == set(fine_tunes.runs)
