import csv
import json
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from swconv import params
from swconv.__main__ import main
from swconv.reporting import distance
from swconv.reporting.accuracies import Accuracy
from swconv.reporting.comparison import Control, Row
from swconv.reporting.report import Column, Plan, build_report, verdicts
from swconv.reporting.runs import Evidence
from swconv.reporting.statistics import Interval
from swconv.reporting.table import interval_text, read_claims

PAPER = Path(__file__).parents[2] / "reports" / "paper" / "sw_table2.csv"
COMMAND = "snakemake --cores all reports/table2.md"
ROWS = [
    Row("sw03", "#3", "SW-(pad=N//2)"),
    Row("sw09", "#9", "disordered offset"),
    Row("sw10", "#10", "two edges"),
    Row("sw11", "#11", "rep2 E4"),
    Row("sw12", "#12", "rep4 E4"),
    Row("sw13", "#13", "rep4 E2"),
    Row("sw17", "#17", "#16+gap=3", {"mini": "sw11", "smoke": None}),
]
OURS = Row("mine", "mine", "two branches, one edge")
CONTROLS = [
    Control("control_dw3_skip", "3x3 depthwise, with SW's skip and BN", of="sw03"),
    Control("control_dw3", "3x3 depthwise, plain", of="sw03"),
]
FLAT, FALL = (1.0, -1.0, 1.0, -1.0), (15.0, 10.0, -7.0, -18.0)


def _seed(root, run, seed, top1, by_distance=FLAT, profile="mini", **circumstances):
    """One evaluated seed, with the files that training and evaluation write."""
    record = {
        "key": f"{run}-{seed}-0123456789abcdef",
        "run": run,
        "profile": profile,
        "seed": seed,
        "git_commit": "0123456789abcdef0123456789abcdef01234567",
        "git_dirty": False,
        "lock_sha256": "10c4",
        "data_manifest_sha256": "da7a",
        "library_sha256": "11b0",
        "hardware": {"machine": "x86_64", "cpu": "EPYC 7B13", "cores": 2, "gpu": None, "memory_gib": 8},
        "versions": {"python": "3.12.1", "torch": "2.11.0"},
        "flags": {"threads": 1},
        **circumstances,
    }
    metrics = {"top1": {"value": top1, "unit": "%"}, "images": {"value": 2000, "unit": "images"}}
    if profile != "paper":
        metrics |= {
            f"top1_distance_{cells}": {"value": top1 + change * (1 + seed / 10), "unit": "%"}
            for cells, change in zip((2, 3, 4, 5), by_distance, strict=True)
        }
    if run != "sw12" and not run.startswith("control"):
        alive = {1: 2.0 + seed, 2: 90.0 + seed}
        metrics |= {f"filters_alive_stage_{stage}": {"value": share, "unit": "%"} for stage, share in alive.items()}
    for stage in ("train", "evaluate"):
        folder = root / "artifacts" / profile / stage / run / f"seed{seed}"
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps(record | {"key": f"{stage}-{record['key']}"}))
    (folder / "metrics.json").write_text(json.dumps(metrics))


@pytest.fixture
def tree(tmp_path):
    """#9 above #3, #10 below it, #11 not to be told apart, #12 with two seeds, #13 not run, #17 equal to #11."""
    for run, values in {
        "sw03": (80.0, 81.0, 82.0),
        "sw09": (90.0, 91.0, 92.0),
        "sw10": (70.0, 71.0, 72.0),
        "sw11": (75.0, 82.0, 89.0),
        "sw12": (95.0, 95.5),
    }.items():
        for seed, value in enumerate(values):
            _seed(tmp_path, run, seed, value)
    for seed, value in enumerate((60.0, 61.0, 62.0)):
        _seed(tmp_path, "control_dw3_skip", seed, value, FALL)
    return tmp_path


@pytest.fixture
def whole(tree):
    """The tree with the plain control, below what needs no marker, so that no sentence of the page is left out."""
    for seed, value in enumerate((24.0, 25.0, 27.0)):
        _seed(tree, "control_dw3", seed, value, (8.0, 4.0, -4.0, -8.0))
    return tree


def _plan(rows=ROWS, controls=CONTROLS, claims=PAPER):
    column = Column("120 epochs", "#3", tuple(rows), "in1k_top1_acc_pct_120ep")
    return Plan("table2", "The roadmap", (column,), tuple(controls), claims, sections=("distance", "filters"))


def _build(root, out="reports", seeds=(0, 1, 2), rows=ROWS, controls=CONTROLS, **options):
    proxy = Evidence("mini", seeds, root / "artifacts")
    build_report(_plan(rows, controls), proxy, root / out, command=COMMAND, **options)
    return (root / out / "table2.md").read_text()


def _cells(text, first):
    """The cells of the first line of a markdown table whose first cell is ``first``, without footnote marks."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {first} |"))
    return [re.sub(r" \[\^\w+\]", "", cell.strip()) for cell in line.strip("|").split("|")]


def _spreadsheet(root, out="reports"):
    with (root / out / "table2.csv").open(newline="") as file:
        return {row["id"]: row for row in csv.DictReader(file)}


def _provenance(root):
    """What a report wrote, and its entries by row and column."""
    record = json.loads((root / "reports" / "table2.provenance.json").read_text())
    return record, {(entry["cell"]["row"], entry["cell"]["column"]): entry for entry in record["cells"]}


@pytest.mark.parametrize(
    ("label", "ours", "difference", "direction", "holm"),
    [
        ("#3", "81.0 ± 1.0 (n = 3)", "reference", "-", "-"),
        ("#9", "91.0 ± 1.0 (n = 3)", "+10.0 [+7.7, +12.3]", "agrees", "agrees"),
        ("#10", "71.0 ± 1.0 (n = 3)", "-10.0 [-12.3, -7.7]", "disagrees", "disagrees"),
        ("#11", "82.0 ± 7.0 (n = 3)", "+1.0 [-15.9, +17.9]", "undecided", "undecided"),
        ("#12", "95.2 ± 0.4 (n = 2; 1 seed not run)", "+14.2 [+12.1, +16.4]", *["no verdict (n < 3)"] * 2),
        ("#13", "not run", "-", "-", "-"),
        ("#17", "not expressible at mini scale, same as #11", "-", "-", "-"),
    ],
)
def test_each_row_says_what_its_seeds_can_say(tree, label, ours, difference, direction, holm):
    assert _cells(_build(tree), label)[3:] == [ours, difference, direction, holm]


def test_a_correction_for_many_rows_takes_back_what_one_row_alone_would_decide(tree):
    """#13 alone excludes 0; of four at once it does not, and the page and the spreadsheet say both."""
    for seed, value in enumerate((83.2, 84.9, 86.4)):
        _seed(tree, "sw13", seed, value)
    text, row = _build(tree), _spreadsheet(tree)["#13"]
    assert _cells(text, "#13")[5:] == ["agrees", "undecided"]
    assert (row["direction"], row["direction_holm"]) == ("agrees", "undecided")
    assert float(row["mini_p"]) < 0.05 <= float(row["mini_p_holm"]) == pytest.approx(2 * float(row["mini_p"]), abs=2e-4)
    assert "Holm's correction holds for all 4 that can be decided at once: 1 agrees, 1 disagrees," in text


def test_seeds_that_move_together_are_told_apart_in_pairs(tree):
    for seed, value in enumerate((80.5, 81.6, 82.4)):
        _seed(tree, "sw13", seed, value)
    text, row = _build(tree), _spreadsheet(tree)["#13"]
    assert (row["direction"], row["direction_paired"]) == ("undecided", "agrees")
    low, high = (float(row[f"mini_paired_difference_pct_{end}"]) for end in ("low", "high"))
    assert 0.2 < low < 0.5 < high < 0.8
    assert "Paired by seed instead of Welch's, one by one again: 2 agrees, 1 disagrees," in text


def test_a_seed_that_diverged_is_told_and_its_row_has_no_verdict(tree):
    _diverge(tree, "sw09", 1, step=120)
    text, row = _build(tree), _spreadsheet(tree)["#9"]
    assert _cells(text, "#9")[3] == "91.0 ± 1.4 (n = 2; 1 seed diverged)"
    assert _cells(text, "#9")[5:] == ["diverged", "diverged"]
    assert "1 diverged" in text.split("Direction against #3")[1].split(".")[0]
    assert (row["mini_n"], row["direction"]) == ("2", "diverged")
    _, traced = _provenance(tree)
    assert traced["#9", "mini_top1_pct"]["seeds"] == [0, 2]


def test_a_row_whose_seeds_all_diverged_says_so_in_its_cell(tree):
    """Whether its weights were evaluated all the same, or not."""
    for seed in range(3):
        _diverge(tree, "sw09", seed, step=10 * (seed + 1), evaluated=seed == 0)
    text = _build(tree)
    assert _cells(text, "#9")[3:] == ["diverged at step 10, 20, 30", "-", "diverged", "diverged"]
    assert _spreadsheet(tree)["#9"]["mini_state"] == "diverged"
    assert "seed 2 key `train-sw09-2`, diverged" in next(line for line in text.splitlines() if line.startswith("[^sw09]:"))


def _diverge(root, run, seed, step, evaluated=True):
    folders = [root / "artifacts" / "mini" / stage / run / f"seed{seed}" for stage in ("train", "evaluate")]
    for folder in folders:
        (folder / "metrics.json").write_text(json.dumps({"diverged": {"value": step, "unit": "step"}}))
    if not evaluated:
        shutil.rmtree(folders[1])


def test_rows_keep_the_papers_order_and_numbers(tree):
    text = _build(tree).split("## Controls")[0]
    with PAPER.open() as file:
        printed = {row["id"]: row["in1k_top1_acc_pct_120ep"] for row in csv.DictReader(file)}
    shown = re.findall(r"^\| (#\d+) \| (?:.*?) \| (\d+\.\d+) \|", text, re.M)
    assert shown == [(row.label, printed[row.label]) for row in ROWS]
    assert [(key, row["paper_top1_pct"]) for key, row in _spreadsheet(tree).items() if key[0] == "#"] == shown


def test_the_tally_counts_every_row_once(tree):
    assert (
        "6 rows of the paper: 1 agrees, 1 disagrees, 1 no verdict (n < 3), 1 not expressible at mini scale, 1 not run, "
        "1 undecided."
    ) in _build(tree)


def test_a_row_that_the_paper_does_not_have_is_compared_but_not_judged_or_ranked(tree):
    before = _build(tree)
    for seed, value in enumerate((90.0, 91.0, 92.0)):
        _seed(tree, "mine", seed, value)
    text = _build(tree, rows=[*ROWS, OURS])
    assert _cells(text, "mine") == ["mine", OURS.model, "-", "91.0 ± 1.0 (n = 3)", "+10.0 [+7.7, +12.3]", "-", "-"]
    assert text.count("[^mine]") == 2                                # in its cell and as a footnote
    own = _spreadsheet(tree)["mine"]
    assert (own["paper_top1_pct"], own["mini_difference_pct"], own["direction"]) == ("", "10.0", "-")
    for section in ("Rank correlation", "What this page can"):
        assert text.split(f"## {section}")[1].split("##")[0].split("[^")[0] in before
    tally = "6 rows of the paper: 1 agrees, 1 disagrees, 1 no verdict (n < 3), 1 not expressible at mini scale, 1 not run"
    assert tally in before
    assert tally in text
    assert "one by one: of 4, about" in before
    assert "one by one: of 5, about" in text


def test_a_row_of_ours_has_no_gap_to_the_paper_on_imagenet(tree):
    _seed(tree, "mine", 0, 81.5, profile="paper")
    text = _build(tree, rows=[*ROWS, OURS], imagenet=Evidence("paper", (0,), tree / "artifacts"))
    assert _cells(text, "mine")[2:5] == ["-", "81.50 (n = 1)", "-"]


def test_controls_are_compared_with_their_row(tree):
    text = _build(tree)
    skip, plain = (_cells(text, control.model) for control in CONTROLS)
    assert skip[1:] == ["#3", "61.0 ± 1.0 (n = 3)", "-20.0 [-22.3, -17.7]", "below #3"]
    assert plain[1:] == ["#3", "not run", "-", "-"]


def test_the_long_range_claim_is_computed_from_the_runs(tree):
    assert "falling: holds.** #3 is flat, the control falling." in _build(tree)


def test_every_number_of_the_spreadsheet_has_provenance_and_vice_versa(whole):
    _build(whole)
    record, traced = _provenance(whole)
    measured = {
        (key, column): float(value)
        for key, row in _spreadsheet(whole).items()
        for column, value in row.items()
        if column not in ("id", "run", "model", "paper_top1_pct") and re.fullmatch(r"-?\d+(\.\d+)?(e-\d+)?", value)
    }
    assert {place: entry["value"] for place, entry in traced.items()} == measured
    assert len(traced) == len(record["cells"]) > 50
    for entry in record["cells"]:
        assert entry["n"] == len(entry["seeds"]) >= 2
        assert all(record["runs"][path]["git_commit"] and (whole / path).exists() for path in entry["runs"])
    assert record["runs"]["artifacts/mini/evaluate/sw09/seed1/metrics.json"]["key"] == "train-sw09-1-0123456789abcdef"
    for row, column, pair in (
        ("#9", "difference_pct", ("sw09", "sw03")),
        ("control_dw3", "row_minus_control_slope_pct_per_8px", ("sw03", "control_dw3")),
        ("control_dw3_skip", "minus_plain_control_pct", ("control_dw3_skip", "control_dw3")),
    ):
        paths = [f"artifacts/mini/evaluate/{run}/seed{k}/metrics.json" for run in pair for k in range(3)]
        assert [traced[row, f"mini_{column}{end}"]["runs"] for end in ("", "_low", "_high")] == [paths] * 3


def test_the_spreadsheet_has_the_same_columns_whatever_was_run(tree):
    _build(tree)
    _build(tree, "less", seeds=(0,))
    (whole, less) = (list(_spreadsheet(tree, out)["#3"]) for out in ("reports", "less"))
    assert whole == less
    assert whole[:6] == ["id", "run", "model", "claim", "paper_top1_pct", "paper_verdict"]
    assert whole[6:10] == ["mini_state", "mini_top1_pct", "mini_sd_pct", "mini_n"]


def test_every_number_of_the_page_is_in_the_spreadsheet_and_has_provenance(whole):
    """Place by place; then nothing with a decimal is left but what the paper or the package fixed."""
    page, sheet, (_, traced) = _build(whole).split("\n[^")[0], _spreadsheet(whole), _provenance(whole)

    def number(row, column):
        assert traced[row, f"mini_{column}"]["value"] == float(sheet[row][f"mini_{column}"])
        return float(sheet[row][f"mini_{column}"])

    def interval(row, column, digits=1):
        return interval_text(Interval(*(number(row, column + end) for end in ("", "_low", "_high")), seeds=3), digits)

    labels, controls = ["#3", "#9", "#10", "#11", "#12"], [control.run for control in CONTROLS]
    measured = {
        r"\d+\.\d+ ± \d+\.\d+ \(n = \d": [
            f"{number(row, 'top1_pct'):.1f} ± {number(row, 'sd_pct'):.1f} (n = {number(row, 'n'):.0f}"
            for row in labels + controls
        ],
        r"[+-]\d+\.\d+ \[.*?\]": [
            *(interval(row, "difference_pct") for row in labels[1:] + controls),
            interval("all rows", "rank_correlation", 2),
            *(interval(row, "slope_pct_per_8px") for row in labels[:1] + controls),
            *(interval(row, "row_minus_control_slope_pct_per_8px") for row in controls),
            interval("control_dw3_skip", "minus_plain_control_pct"),
        ],
        r"has \d+\.\d+ % over all": [f"has {number('control_dw3', 'top1_pct'):.1f} % over all"],
        r"^\| #\d+ \| \d+\.\d+ \| \d+\.\d+ \|$": [
            "| {} | {:.1f} | {:.1f} |".format(row, *(number(row, f"filters_alive_stage{stage}_pct") for stage in (1, 2)))
            for row in labels[:4]
        ],
    }
    for pattern, numbers in measured.items():
        assert re.findall(pattern, page, re.M) == numbers
        page = re.sub(pattern, "", page, flags=re.M)
    assert page.count("Their slopes differ by  points per 8 px.") == len(controls)
    assert page.count("Here they differ by  points (") == 1
    claims = [row["paper_top1_pct"] for row in sheet.values() if row["paper_top1_pct"]]
    span = f"{max(map(float, claims)) - min(map(float, claims)):.2f}"
    fixed = {"2.11", f"{distance.FLAT_MARGIN}", f"{0.05 * 4:.1f}", span}  # torch, margin, 4 intervals by chance, span
    assert set(re.findall(r"\d+\.\d+", page)) == {*claims, *fixed}


def test_filters_that_live_are_shown_by_stage(tree):
    section = _build(tree).split("## Where the filters live")[1]
    assert _cells(section, "#3") == ["#3", "3.0", "91.0"]
    shown = re.findall(r"^\| (#\d+) \| (.*?) \| (.*?) \|$", section, re.M)
    sheet = _spreadsheet(tree)
    columns = ("mini_filters_alive_stage1_pct", "mini_filters_alive_stage2_pct")
    counted = [(label, *(row[column] for column in columns)) for label, row in sheet.items() if row[columns[0]]]
    assert [label for label, *_ in shown] == ["#3", "#9", "#10", "#11"]  # #12 has no counts, #17 was not trained
    assert shown == counted


def test_footnotes_lead_to_runs_and_to_the_command_that_remakes_them(tree):
    text = _build(tree)
    marks, notes = set(re.findall(r"\[\^(\w+)\](?!:)", text)), set(re.findall(r"^\[\^(\w+)\]:", text, re.M))
    assert marks == notes == {"sw03", "sw09", "sw10", "sw11", "sw12", "sw13", "control_dw3_skip", "control_dw3"}
    note = next(line for line in text.splitlines() if line.startswith("[^sw09]:"))
    keys = "seed 0 key `train-sw09-0`, seed 1 key `train-sw09-1`, seed 2 key `train-sw09-2`"
    assert f"`artifacts/mini/evaluate/sw09/seed*/metrics.json`: {keys}, commit `0123456789ab`, EPYC" in note
    assert "--forcerun train -- artifacts/mini/evaluate/sw09/seed0/metrics.json artifacts/mini/evaluate/sw09/seed1/" in note
    assert "sw13/seed*/metrics.json`: seed 0 not run; seed 1 not run; seed 2 not run." in text


def test_the_header_names_profile_seeds_machine_and_command(tree):
    header = _build(tree).split("| id |")[0]
    assert (
        "Profile `mini`, 3 seeds (0, 1, 2); EPYC 7B13, 2 cores, 1 thread; torch 2.11.0; commit `0123456789ab`" in header
    )
    assert COMMAND in header
    assert "Mixed" not in header


def test_runs_of_several_machines_and_commits_are_called_mixed(tree):
    hardware = {"cpu": "Xeon", "cores": 8}
    _seed(tree, "control_dw3", 0, 25.0, hardware=hardware, git_commit="fedcba9876543210", git_dirty=True)
    header = _build(tree).split("| id |")[0]
    assert "Mixed: these runs come from 2 machine settings and 2 states of the code" in header
    assert "commit `fedcba987654` with uncommitted changes" in header


def test_the_same_runs_give_the_same_bytes(tree):
    _build(tree, "first")
    _build(tree, "second")
    files = sorted(path.relative_to(tree / "first") for path in (tree / "first").rglob("*") if path.is_file())
    names = ["figures/table2_distance.svg", "table2.csv", "table2.md", "table2.provenance.json"]
    assert [file.as_posix() for file in files] == names
    for file in files:
        assert (tree / "first" / file).read_bytes() == (tree / "second" / file).read_bytes()


def test_nothing_run_still_gives_the_whole_page(tmp_path):
    text = _build(tmp_path)
    assert _cells(text, "#9")[3:] == ["not run", "-", "-", "-"]
    assert "Profile `mini`: not run" in text
    assert (tmp_path / "reports" / "figures" / "table2_distance.svg").exists()
    assert json.loads((tmp_path / "reports" / "table2.provenance.json").read_text())["cells"] == []


def test_without_the_reference_rows_are_not_compared(tree):
    for seed in range(3):
        (tree / "artifacts" / "mini" / "evaluate" / "sw03" / f"seed{seed}" / "metrics.json").unlink()
    text = _build(tree)
    assert _cells(text, "#9")[3:] == ["91.0 ± 1.0 (n = 3)", "-", "-", "-"]
    assert "4 without #3 to compare with" in text


def test_one_seed_gives_numbers_and_no_verdict(tree):
    text = _build(tree, seeds=(0,))
    assert _cells(text, "#9")[3:] == ["90.0 (n = 1)", "+10.0 (no interval)", "no verdict (n < 3)", "no verdict (n < 3)"]
    assert not re.search(r"\| (agrees|disagrees|undecided|below #3|above #3|flat|falling) \|", text)
    assert "(no interval): no verdict (n < 3). The interval" in text


def test_imagenet_runs_get_their_own_columns_beside_the_mini_ones(tree):
    imagenet = Evidence("paper", (0, 1, 2), tree / "artifacts")
    before = _build(tree, imagenet=imagenet)
    assert "ours, top-1 % (ImageNet)" not in before
    for seed, value in enumerate((81.40, 81.50, 81.60)):
        _seed(tree, "sw09", seed, value, profile="paper")
    text = _build(tree, imagenet=imagenet)
    assert _cells(text, "#9")[2:5] == ["81.36", "81.50 ± 0.10 (n = 3)", "+0.14 [-0.11, +0.39]"]
    assert _cells(text, "#10")[3:5] == ["not run", "-"]
    assert _cells(text, "#9")[5:] == _cells(before, "#9")[3:]
    assert "- Profile `paper`, 3 seeds" in text
    assert _spreadsheet(tree)["#9"]["imagenet_minus_paper_pct"] == "0.14"


def test_a_row_shows_the_runs_that_are_trained_in_its_place_under_another_name(tree):
    """Also where that other run is no row of the page; a second row that stands on the same runs says which one does."""
    rows = [ROWS[0], Row("a", "#9", "a", {"mini": "sw09"}), Row("b", "#10", "b", {"mini": "sw09"})]
    text = _build(tree, rows=rows, controls=[])
    assert _cells(text, "#9")[3] == "91.0 ± 1.0 (n = 3)"
    assert "`artifacts/mini/evaluate/sw09/seed*/metrics.json`" in text
    assert _cells(text, "#10")[3] == "not expressible at mini scale, same as #9"


def test_a_row_without_a_run_says_so(tree):
    text = _build(tree, rows=[*ROWS[:2], Row(None, "#14", "rep8 E4")], controls=[])
    assert _cells(text, "#14") == ["#14", "rep8 E4", "81.85", "not run", "-", "-", "-"]
    assert "2 rows of the paper: 1 agrees, 1 not run." in text


LONG = "id,method,long,short\n#0,first,82.5,81.6\n#1,a,82.5,-\n#1,b,82.27,-\n#2,c,82.38,81.36\n"


@pytest.fixture
def two_columns(tmp_path):
    """Two columns of accuracies: 300 epochs of three rows, 120 epochs of two, each row a run of its own."""
    (tmp_path / "claims.csv").write_text(LONG)
    for run, values in {"x0": (80.0, 81.0, 82.0), "x1": (70.0, 71.0, 72.0), "x2": (60.0, 61.0, 62.0),
                        "s0": (50.0, 51.0, 52.0), "s2": (55.0, 56.0, 57.0)}.items():
        for seed, value in enumerate(values):
            _seed(tmp_path, run, seed, value)
    long = [Row("x0", "#0, first", ""), Row("x1", "#1, a", ""), Row(None, "#1, b", ""), Row("x2", "#2, c", "")]
    short = [Row("s0", "#0, first", ""), Row("s2", "#2, c", "")]
    columns = (Column("300 epochs", "#0, first", tuple(long), "long"), Column("120 epochs", "#0, first", tuple(short), "short"))
    return Plan("slak/t", "T", columns, claims=tmp_path / "claims.csv", named_by=("id", "method"))


def test_each_column_of_a_table_has_its_own_runs_reference_and_verdicts(two_columns, tmp_path):
    build_report(two_columns, Evidence("mini", (0, 1, 2), tmp_path / "artifacts"), tmp_path / "reports", command=COMMAND)
    page = (tmp_path / "reports/slak/t.md").read_text()
    long, short = page.split("## 300 epochs")[1].split("## 120 epochs")
    assert _cells(long, "#2, c") == ["#2, c", "82.38", "61.0 ± 1.0 (n = 3)", "-20.0 [-22.3, -17.7]", "agrees", "agrees"]
    assert _cells(long, "#1, a")[4] == "the paper has no difference"
    assert _cells(long, "#1, b")[2] == "not run"
    assert _cells(short, "#2, c") == ["#2, c", "81.36", "56.0 ± 1.0 (n = 3)", "+5.0 [+2.7, +7.3]", "disagrees", "disagrees"]
    assert "300 epochs. Spearman" in page
    with (tmp_path / "reports/slak/t.csv").open(newline="") as file:
        lines = {row["id"]: row for row in csv.DictReader(file)}
    assert list(lines)[:6] == ["#0, first, 300 epochs", "#1, a, 300 epochs", "#1, b, 300 epochs", "#2, c, 300 epochs",
                               "#0, first, 120 epochs", "#2, c, 120 epochs"]
    assert (lines["#2, c, 120 epochs"]["run"], lines["#2, c, 120 epochs"]["claim"]) == ("s2", "short")


def test_printed_numbers_are_judged_by_imagenet_runs_and_published_weights_and_no_other(two_columns, tmp_path):
    imagenet = Evidence("paper", (0, 1, 2), tmp_path / "artifacts")
    assert verdicts(two_columns, imagenet, {}) == {"not run": 6}
    for run, values in {"x0": (82.4, 82.5, 82.7), "x1": (81.0, 81.1, 81.2), "s0": (81.6, 81.7)}.items():
        for seed, value in enumerate(values):
            _seed(tmp_path, run, seed, value, profile="paper")
    runs = {"reproduced": 1, "differs": 1, "no verdict (n < 3)": 1, "not run": 3}
    assert verdicts(two_columns, imagenet, {}) == runs
    weights = {("claims", 0, "long"): Accuracy(82.54, "w"), ("claims", 3, "short"): Accuracy(81.4, "v")}
    assert verdicts(two_columns, imagenet, weights) == {"equal": 1, "differs": 2, "no verdict (n < 3)": 1, "not run": 2}
    proxy = Evidence("mini", (0, 1, 2), tmp_path / "artifacts")
    build_report(two_columns, proxy, tmp_path / "r", command=COMMAND, imagenet=imagenet)
    assert "of the 4 numbers of the paper: 1 differs, 2 not run, 1 reproduced" in (tmp_path / "r/slak/t.md").read_text()


def test_published_weights_have_a_section_with_their_files_where_they_were_measured(two_columns, tmp_path):
    proxy = Evidence("mini", (0, 1, 2), tmp_path / "artifacts")
    weights = {("claims", 3, "short"): Accuracy(81.364, "weights v, `run.json`"),
               ("other", 0, "long"): Accuracy(70.0, "no cell here")}
    build_report(two_columns, proxy, tmp_path / "r", command=COMMAND, published=weights)
    page = (tmp_path / "r/slak/t.md").read_text()
    section = page.split("## Published weights")[1].split("\n## ")[0]
    assert "| #2, c | 120 epochs | 81.36 | 81.36 [^weights1] | equal |" in section
    assert "[^weights1]: weights v, `run.json`." in section
    assert "no cell here" not in page
    build_report(two_columns, proxy, tmp_path / "r", command=COMMAND)
    assert "Published weights" not in (tmp_path / "r/slak/t.md").read_text()


def test_every_row_tells_how_sure_its_settings_are_even_where_it_was_not_run(tree):
    origins = {"sw09": "Settings: unknown. EMA as in #2.", "sw13": "Settings: inferred."}
    proxy = Evidence("mini", (0, 1, 2), tree / "artifacts")
    build_report(replace(_plan(), origins=origins), proxy, tree / "r", command=COMMAND)
    text = (tree / "r/table2.md").read_text()
    assert "\n[^sw09]: Settings: unknown. EMA as in #2. `artifacts/mini/evaluate/sw09/seed*/metrics.json`: seed 0" in text
    assert "| not run [^sw13] |" in text
    assert "\n[^sw13]: Settings: inferred." in text


def test_a_row_of_which_a_seed_diverged_is_no_part_of_the_rank_correlation(tree):
    whole = _build(tree)
    folder = tree / "artifacts/mini/train/sw10/seed2"
    (folder / "metrics.json").write_text(json.dumps({"diverged": {"value": 7, "unit": "step"}}))
    shutil.rmtree(tree / "artifacts/mini/evaluate/sw10/seed2")
    text = _build(tree)
    assert "over the 5 rows that have both" in whole
    assert "over the 4 rows that have both" in text
    assert "1 seed diverged" in _cells(text, "#10")[3]


def test_without_numbers_of_the_paper_rows_stand_above_or_below_their_reference(tmp_path):
    """A figure that the paper only draws: points on two axes, one run on both."""
    for run, values in {"low": (60.0, 61.0, 62.0), "mid": (70.0, 71.0, 72.0), "far": (70.5, 71.0, 71.9)}.items():
        for seed, value in enumerate(values):
            _seed(tmp_path, run, seed, value)
    left = (Row("low", "p = 0.1", "", at=0.1), Row("mid", "p = 0.3", "", at=0.3))
    right = (Row("mid", "f = 100", "", at=100), Row("far", "f = 2000", "", at=2000))
    columns = (Column("rate p", "p = 0.3", left, axis="rate p"),
               Column("steps f", "f = 100", right, axis="steps f", logarithmic=True))
    build_report(Plan("slak/f5", "F", columns, named_by=("id",)), Evidence("mini", (0, 1, 2), tmp_path / "artifacts"),
                 tmp_path / "r", command=COMMAND)
    page = (tmp_path / "r/slak/f5.md").read_text()
    assert _cells(page, "p = 0.1")[3:] == ["-10.0 [-12.3, -7.7]", "below", "below"]
    assert _cells(page, "f = 2000")[4:] == ["undecided", "undecided"]
    assert "Rank correlation" not in page
    assert "Side of p = 0.3, 1 rows: 1 below." in page
    points = list(csv.DictReader((tmp_path / "r/figures/slak/f5.csv").read_text().splitlines()))
    assert [(row["x_is"], row["x"], row["y_mean"]) for row in points] == [
        ("rate p", "0.1", "61.0"), ("rate p", "0.3", "71.0"), ("steps f", "100", "71.0"), ("steps f", "2000", "71.1333")]
    for side in ("left", "right"):
        assert f"](../figures/slak/f5_{side}.svg)" in page
        assert b"not run" not in (tmp_path / f"r/figures/slak/f5_{side}.svg").read_bytes()


def test_curves_are_the_means_over_seeds_of_what_training_logged(tmp_path):
    for seed in range(2):
        _seed(tmp_path, "a", seed, 70.0 + seed)
        log = [{"epoch": 1, "train_loss": 2.0 + seed}, {"event": "update"},
               {"epoch": 2, "train_loss": 1.0, "top1": 70.0 + seed},
               {"epoch": 3} | ({"train_loss": 0.5} if seed else {})]                          # all steps of seed 0 were bad
        (tmp_path / f"artifacts/mini/train/a/seed{seed}/log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    rows = (Row("a", "A", ""), Row("b", "B", ""))
    plan = Plan("f6", "F", (Column("at the end", "A", rows),), sections=("curves",))
    build_report(plan, Evidence("mini", (0, 1), tmp_path / "artifacts"), tmp_path / "r", command=COMMAND)
    points = list(csv.DictReader((tmp_path / "r/figures/f6.csv").read_text().splitlines()))
    assert [(row["line"], row["x"], row["y_is"], row["y_mean"], row["y_sd"]) for row in points] == [
        ("A (n = 2)", "1", "training loss", "2.5", "0.7071"), ("A (n = 2)", "2", "training loss", "1.0", "0.0"),
        ("A (n = 2)", "2", "top-1, %", "70.5", "0.7071")]
    assert _cells((tmp_path / "r/f6.md").read_text(), "B")[2] == "not run"


@pytest.fixture
def project(tree, monkeypatch):
    """The tree with params/ and the paper's numbers, as the verb sees the project; one ImageNet seed of #9."""
    shutil.copytree(PAPER.parents[2] / "params", tree / "params")
    shutil.copytree(PAPER.parent, tree / "reports" / "paper")
    _seed(tree, "sw09", 0, 81.5, profile="paper")
    monkeypatch.chdir(tree)
    return tree


def test_every_number_that_the_papers_print_has_a_row_and_every_row_a_number(known):
    """But for rows that are ours: then the papers' tables and params/runs.yaml name the same cells."""
    for name, plan in known.reports.items():
        for column, cells in plan.cells.items():
            if plan.claims is None:
                continue
            named = {row if isinstance(plan.rows, dict) else known.runs[run].label for row, run in cells.items()}
            printed = read_claims(PAPER.parent / plan.claims, column, plan.named_by)
            assert named == {row for row, value in printed.items() if re.fullmatch(r"\d+\.\d+", value)}, (name, column)
            assert all(cells.values()), (name, column)


def test_every_report_can_be_made_before_anything_was_run(project, known):
    for name in known.reports:
        if name in known.costs:
            columns = known.costs[name].columns
            sheet = project / "reports" / f"{name}_counts.csv"
            sheet.parent.mkdir(exist_ok=True)
            words = [f"{column}_{what}" for column in columns for what in ("paper", "ours", "verdict", "why")]
            cells = ["29", "28600000", "equal", ""] * len(columns)
            sheet.write_text(f"method,{','.join(words)}\nNaive,{','.join(cells)}\n")
        assert main(["report", name, "--profile", "mini", "--seeds", "7", "--out", "reports"]) == 0
        page = (project / "reports" / f"{name}.md").read_text()
        assert "not run" in page
        assert ("## Parameters and FLOPs, counted" in page) == (name in known.costs)
        for link in re.findall(r"\]\(([^)]*)\)", page):
            assert (project / "reports" / name).parent.joinpath(link).exists(), link
    assert "## Formulas" in (project / "reports/table1.md").read_text()


@pytest.fixture
def known():
    return params.load(PAPER.parents[2] / "params")


def _report(project, profile, *seeds):
    arguments = ["report", "table2", "--profile", profile, "--seeds", *map(str, seeds), "--out", "reports"]
    assert main(arguments) == 0
    return {path.name: path.read_bytes() for path in (project / "reports").rglob("table2*")}


def test_either_profile_makes_the_same_report_from_the_same_runs(project):
    of_mini = _report(project, "mini", 0, 1, 2)
    text = of_mini["table2.md"].decode()
    assert _cells(text, "#9")[3:6] == ["81.50 (n = 1)", "+0.14 (no interval)", "91.0 ± 1.0 (n = 3)"]
    assert len(of_mini) == 4
    assert _report(project, "paper", 0) == of_mini


def test_the_other_profile_is_asked_for_the_same_seeds_where_it_has_none(project):
    shutil.rmtree(project / "artifacts" / "mini")
    text = _report(project, "paper", 1)["table2.md"].decode()
    remake = "Remake: `snakemake --cores all --forcerun train -- "
    assert f"`artifacts/mini/evaluate/sw03/seed*/metrics.json`: seed 1 not run. {remake}" in text
    assert "train --`" not in text


def test_smoke_shows_smoke_alone(project):
    _seed(project, "sw09", 0, 50.0, profile="smoke")
    text = _report(project, "smoke", 0)["table2.md"].decode()
    assert _cells(text, "#9")[3:5] == ["50.0 (n = 1)", "-"]


def test_a_full_disk_is_told_and_leaves_the_old_report(tree):
    """A limit on file size makes the system itself refuse the bytes, as a full disk does."""
    _build(tree)
    old = {path: path.read_bytes() for path in (tree / "reports").rglob("*") if path.is_file()}
    _seed(tree, "control_dw3", 0, 25.0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"table2_distance.svg could not be written: File too large. Make room"):
            _build(tree)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path: path.read_bytes() for path in (tree / "reports").rglob("*") if path.is_file()} == old


@pytest.mark.parametrize("file", ["table2.md", "table2.csv", "table2.provenance.json", "figures/table2_distance.svg"])
def test_every_file_that_cannot_be_written_is_named(tree, file):
    (tree / "reports" / file).mkdir(parents=True)
    with pytest.raises(OSError, match=f"{file} could not be written: Is a directory. Make room or give write permission"):
        _build(tree)
    assert not list(tree.rglob("*.part"))


def test_nan_is_refused_with_a_sentence(tree):
    path = tree / "artifacts" / "mini" / "evaluate" / "sw09" / "seed1" / "metrics.json"
    path.write_text('{"top1": {"value": NaN, "unit": "%"}}')
    with pytest.raises(ValueError, match=r"sw09/seed1/metrics.json: top1 needs a finite number"):
        _build(tree)


@pytest.mark.parametrize(
    ("rows", "controls", "sentence"),
    [
        (ROWS[1:], [], "needs row #3"),
        ([*ROWS, Row("sw99", "#9", "new")], [], "one label per row, got #9 more than once"),
        (ROWS, [Control("control", "3x3", of="sw77")], "needs a row of this table"),
    ],
)
def test_rows_that_do_not_fit_together_are_refused(tree, rows, controls, sentence):
    with pytest.raises(ValueError, match=sentence):
        _build(tree, rows=rows, controls=controls)


def test_reporting_imports_no_torch():
    code = "import sys, swconv.reporting.report; sys.exit(bool({'torch', 'matplotlib', 'scipy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=PAPER.parents[2]).returncode == 0
