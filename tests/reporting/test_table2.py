import csv
import json
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from swconv.__main__ import main
from swconv.reporting import distance
from swconv.reporting.comparison import Control, Row
from swconv.reporting.runs import Evidence
from swconv.reporting.statistics import Interval
from swconv.reporting.table import interval_text
from swconv.reporting.table2 import build_table2

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


def _build(root, out="reports", seeds=(0, 1, 2), rows=ROWS, controls=CONTROLS, **options):
    proxy = Evidence("mini", seeds, root / "artifacts")
    build_table2(rows, controls, proxy, root / out, command=COMMAND, paper=PAPER, **options)
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
    ("label", "ours", "difference", "direction"),
    [
        ("#3", "81.0 ± 1.0 (n = 3)", "reference", "-"),
        ("#9", "91.0 ± 1.0 (n = 3)", "+10.0 [+7.7, +12.3]", "agrees"),
        ("#10", "71.0 ± 1.0 (n = 3)", "-10.0 [-12.3, -7.7]", "disagrees"),
        ("#11", "82.0 ± 7.0 (n = 3)", "+1.0 [-15.9, +17.9]", "undecided"),
        ("#12", "95.2 ± 0.4 (n = 2; 1 seed not run)", "+14.2 [+12.1, +16.4]", "no verdict (n < 3)"),
        ("#13", "not run", "-", "-"),
        ("#17", "not expressible at mini scale, same as #11", "-", "-"),
    ],
)
def test_each_row_says_what_its_seeds_can_say(tree, label, ours, difference, direction):
    assert _cells(_build(tree), label)[3:] == [ours, difference, direction]


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
    assert _cells(text, "mine") == ["mine", OURS.model, "-", "91.0 ± 1.0 (n = 3)", "+10.0 [+7.7, +12.3]", "-"]
    assert text.count("[^mine]") == 2                                # in its cell and as a footnote
    own = _spreadsheet(tree)["mine"]
    assert (own["paper_top1_pct"], own["mini_difference_pct"], own["direction"]) == ("", "10.0", "-")
    for section in ("Rank correlation", "What this table can"):
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
    assert whole[:8] == ["id", "run", "model", "paper_top1_pct", "mini_state", "mini_top1_pct", "mini_sd_pct", "mini_n"]


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
    assert _cells(text, "#9")[3:] == ["not run", "-", "-"]
    assert "Profile `mini`: not run" in text
    assert (tmp_path / "reports" / "figures" / "table2_distance.svg").exists()
    assert json.loads((tmp_path / "reports" / "table2.provenance.json").read_text())["cells"] == []


def test_without_the_reference_rows_are_not_compared(tree):
    for seed in range(3):
        (tree / "artifacts" / "mini" / "evaluate" / "sw03" / f"seed{seed}" / "metrics.json").unlink()
    text = _build(tree)
    assert _cells(text, "#9")[3:] == ["91.0 ± 1.0 (n = 3)", "-", "-"]
    assert "4 without #3 to compare with" in text


def test_one_seed_gives_numbers_and_no_verdict(tree):
    text = _build(tree, seeds=(0,))
    assert _cells(text, "#9")[3:] == ["90.0 (n = 1)", "+10.0 (no interval)", "no verdict (n < 3)"]
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


@pytest.fixture
def project(tree, monkeypatch):
    """The tree with params/ and the paper's numbers, as the verb sees the project; one ImageNet seed of #9."""
    shutil.copytree(PAPER.parents[2] / "params", tree / "params")
    shutil.copytree(PAPER.parent, tree / "reports" / "paper")
    _seed(tree, "sw09", 0, 81.5, profile="paper")
    monkeypatch.chdir(tree)
    return tree


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
        ([ROWS[0], Row("sw09", "#9", "x", {"mini": "sw77"})], [], "sw77 is not trained"),
        (ROWS, [Control("control", "3x3", of="sw77")], "needs a row of this table"),
    ],
)
def test_rows_that_do_not_fit_together_are_refused(tree, rows, controls, sentence):
    with pytest.raises(ValueError, match=sentence):
        _build(tree, rows=rows, controls=controls)


def test_reporting_imports_no_torch():
    code = "import sys, swconv.reporting.table2; sys.exit(bool({'torch', 'matplotlib', 'scipy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=PAPER.parents[2]).returncode == 0
