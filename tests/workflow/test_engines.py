"""Snakemake and DVC make the same things from the same parameters, and neither repeats what the other did."""

import shutil

UP_TO_DATE = "Data and pipelines are up to date."
NOTHING = "Nothing to be done"


def test_every_row_of_table_2_is_made_and_both_engines_agree(whole):
    results = whole.results()
    table = (whole.root / "artifacts/smoke/reports/table2.md").read_text()

    assert len(results) == 2 * 18
    assert [row for row in [3, *range(9, 24)] if f"| #{row} |" not in table] == []
    assert UP_TO_DATE in whole.run("dvc", "repro")
    assert NOTHING in whole.snakemake()
    assert whole.results() == results
    assert whole.run("git", "show", "--format=", "--name-only") == "dvc.lock\n"  # all that the run changed


def test_both_engines_describe_the_same_work(fresh):
    assert fresh.script("check_drift.py") == "dvc.yaml and the Snakefile agree\n"


def test_what_dvc_makes_snakemake_leaves_alone(finished):
    for folder in ("train/sw15", "evaluate/sw15", "reports"):
        shutil.rmtree(finished.root / "artifacts/smoke" / folder)
    others = finished.results()

    finished.run("dvc", "repro")
    results = finished.results()

    assert others.items() < results.items()
    assert len(results) == len(others) + 2
    assert NOTHING in finished.snakemake()
    assert UP_TO_DATE in finished.run("dvc", "repro")
    assert finished.results() == results


def test_seeds_changed_and_changed_back_repeat_no_run(finished):
    finished.keep_rows("sw03", "sw15")
    finished.snakemake()
    results = finished.results()

    finished.snakemake("--config", "seeds=0,1")
    more = finished.results()
    assert "seeds: [0, 1]" in (finished.root / "params/active.yaml").read_text()
    assert len(more) == len(results) + 4
    assert UP_TO_DATE in finished.run("dvc", "repro")

    finished.activate("smoke", [0], "artifacts/smoke/reports")
    finished.run("dvc", "repro")
    assert NOTHING in finished.snakemake()
    assert UP_TO_DATE in finished.run("dvc", "repro")
    assert finished.results() == more


def test_dvc_remembers_a_profile_while_another_is_active(finished):
    recorded = (finished.root / "dvc.lock").read_text()
    finished.activate("mini", [0], "reports")
    assert "artifacts/mini/data" in finished.run("dvc", "status")

    finished.activate("smoke", [0], "artifacts/smoke/reports")
    assert UP_TO_DATE in finished.run("dvc", "repro")
    assert (finished.root / "dvc.lock").read_text() == recorded


def test_a_comment_is_recorded_without_running_anything(finished):
    results = finished.results()
    with (finished.root / "swconv/training/loop.py").open("a") as file:
        file.write("# why\n")
    with (finished.root / "csrc/binding.cpp").open("a") as file:
        file.write("// why\n")

    assert NOTHING in finished.snakemake()
    assert UP_TO_DATE in finished.run("dvc", "repro")
    assert finished.results() == results


def test_a_clone_takes_over_what_dvc_pulled(finished, tmp_path):
    finished.run("dvc", "remote", "add", "--default", "here", str(tmp_path / "remote"))
    finished.run("dvc", "push")
    finished.commit()
    finished.run("git", "clone", "--quiet", str(finished.root), str(tmp_path / "clone"))
    clone = type(finished)(tmp_path / "clone")
    clone.run("dvc", "pull")
    results = clone.results()
    clone.replace("params/runs.yaml", "scores: concat", "scores: sum, level: 0.35")

    clone.script("adopt.py")

    assert results == finished.results()
    assert clone.planned() == {"train": 1, "evaluate": 1, "track": 1, "table2": 1}
    clone.replace("params/runs.yaml", "scores: sum, level: 0.35", "scores: concat")
    clone.script("adopt.py")
    assert clone.planned() == {"track": 1, "table2": 1}  # nobody keeps the tables of smoke
    clone.snakemake()
    assert UP_TO_DATE in clone.run("dvc", "repro")
    assert clone.results() == results


def test_a_dependency_taken_from_dvc_yaml_is_drift(finished):
    finished.replace("dvc.yaml", "      - swconv/models\n", "")
    found = finished.script("check_drift.py", code=1)
    assert "swconv/models/sw.py: read for stage run@smoke-sw03, missing among its deps" in found


def test_a_broken_dvc_spoils_no_run(finished):
    (finished.root / ".dvc/config").write_text("[core\n")
    (finished.root / "artifacts/smoke/reports/table2.md").unlink()
    printed = finished.snakemake()
    assert "warning: dvc.lock is not up to date" in printed
    assert (finished.root / "artifacts/smoke/reports/table2.md").exists()


def test_a_recorded_run_keeps_no_checkpoint(finished):
    assert list(finished.root.glob("checkpoints/*")) == []
