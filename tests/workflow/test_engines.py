"""Snakemake and DVC make the same things from the same parameters, and neither repeats what the other did."""

import json
import shutil

import pytest

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


@pytest.mark.slow
def test_dvc_starts_from_nothing(fresh, tmp_path):
    project = fresh.copy(tmp_path / "project")
    project.keep_rows("sw03", "sw15")

    project.run("dvc", "repro")
    results = project.results()

    assert len(results) == 4
    assert not list(project.root.glob("checkpoints/*"))  # with one left, --forcerun would resume at the end and train nothing
    assert NOTHING in project.snakemake()
    assert UP_TO_DATE in project.run("dvc", "repro")
    assert project.results() == results


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


def test_a_page_of_its_own_file_is_made_by_either_engine_and_a_plain_repro_starts_none(finished):
    stage, page = "reports/dvc.yaml:page@smoke-slak/table9", "artifacts/smoke/reports/slak/table9.md"
    assert UP_TO_DATE in finished.run("dvc", "repro")
    assert not (finished.root / page).exists()

    finished.run("dvc", "repro", stage)
    results = finished.results()
    assert "SLaK-T, 7" in (finished.root / page).read_text()
    assert NOTHING in finished.snakemake(page)

    finished.snakemake("artifacts/smoke/reports/slak/figure5.md")
    assert UP_TO_DATE in finished.run("dvc", "repro", "reports/dvc.yaml:figure@smoke-slak/figure5")
    assert UP_TO_DATE in finished.run("dvc", "repro", stage)
    assert results.items() < finished.results().items()


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
    clone.run("dvc", "pull", "dvc.yaml")
    results = clone.results()
    clone.replace("params/runs.yaml", "scores: concat", "scores: sum, level: 0.35")

    clone.script("adopt.py")

    assert results == finished.results()
    counted = {"count": 1, "tables": 1}                  # of runs.yaml too
    assert clone.planned() == {"train": 1, "evaluate": 1, "track": 1, "table2": 1, **counted}
    clone.replace("params/runs.yaml", "scores: sum, level: 0.35", "scores: concat")
    clone.script("adopt.py")
    assert clone.planned() == {"track": 1, "table2": 1}  # nobody keeps the tables of smoke
    clone.snakemake()
    assert UP_TO_DATE in clone.run("dvc", "repro")
    assert clone.results() == results
    clone.run("dvc", "pull", "--allow-missing")          # past the fine-tunes, which nobody made


@pytest.mark.parametrize(("dep", "path", "stage"), [
    ("swconv/models", "swconv/models/sw.py", "run@smoke-sw03"),
    ("swconv/training/tracking.py", "swconv/training/tracking.py", "table2@smoke"),
    ("workflow/rules/train.smk", "workflow/rules/train.smk", "run@smoke-sw03"),
])
def test_a_dependency_taken_from_dvc_yaml_is_drift(finished, dep, path, stage):
    finished.replace("dvc.yaml", f"      - {dep}\n", "")
    found = finished.script("check_drift.py", code=1)
    assert f"{path}: read for stage {stage}, missing among its deps" in found


@pytest.mark.parametrize(("path", "old", "new", "jobs", "stage"), [
    ("swconv/training/tracking.py", "BATCH_PARAMS = 1000, 100", "BATCH_PARAMS = 500, 100", {}, "table2@smoke:"),
    ("workflow/rules/evaluate.smk", "swconv evaluate", "swconv  evaluate", {"evaluate": 18}, "run@smoke-sw03:"),
    ("workflow/rules/track.smk", "swconv track", "swconv  track", {}, "table2@smoke:"),
])
def test_an_edit_that_one_engine_sees_the_other_sees_too(finished, path, old, new, jobs, stage):
    finished.replace(path, old, new)
    assert finished.planned() == {**jobs, "track": 1, "table2": 1}
    assert stage in finished.run("dvc", "status")


@pytest.mark.parametrize(("command", "code"), [(["snakemake", "--cores", "all"], 0), (["dvc", "repro"], 255)])
def test_nothing_is_recorded_of_a_run_during_which_params_were_edited(finished, command, code):
    lock = (finished.root / "dvc.lock").read_text()
    finished.replace("workflow/rules/track.smk", '"python -m', "\"echo '# edited' >> params/runs.yaml; python -m")

    printed = finished.run(*command, code=code)
    assert "Nothing is recorded in dvc.lock: params/, csrc/, swconv/ or a rule changed during the run" in printed
    assert "Traceback" not in printed
    assert (finished.root / "dvc.lock").read_text() == lock

    assert NOTHING in finished.snakemake()
    assert UP_TO_DATE in finished.run("dvc", "status", "dvc.yaml")


def test_a_job_refuses_a_row_that_was_edited_since_its_run_was_planned(finished):
    target, results = "artifacts/smoke/train/sw15/seed0/metrics.json", finished.results()
    begin = '"trap : TERM USR1;'
    finished.replace("workflow/rules/train.smk", begin, begin.replace('"', '"sed -i s/concat/sum/ params/runs.yaml; '))
    printed = finished.snakemake(target, code=1)
    assert "swconv train: csrc/, params/ or swconv/ changed since this run was planned; repeat the command." in printed
    assert finished.results().items() < results.items()


@pytest.mark.parametrize(("target", "rules", "verb", "edit"), [
    ("artifacts/smoke/calibrate/sw15/seed0/metrics.json", "calibrate.smk", "calibrate",
     "sed -i '/calibration_passes/s/1/2/' params/recipes.yaml"),
    ("artifacts/smoke/weights/sw01_infer/seed0/metrics.json", "weights.smk", "lay-out",
     "sed -i '/batch_size/s/32/16/' params/profiles/smoke.yaml"),
])
def test_what_is_made_of_weights_is_made_as_planned_and_refused_once_its_row_is_another(finished, target, rules, verb, edit):
    finished.snakemake(target)
    begin = f'"python -m swconv {verb} '
    finished.replace(f"workflow/rules/{rules}", begin, begin.replace('"', f'"{edit}; '))
    printed = finished.snakemake(target, code=1)
    assert f"swconv {verb}: csrc/, params/ or swconv/ changed since this run was planned; repeat the command." in printed


def test_the_sentence_about_a_lost_database_names_the_command_that_makes_it(finished):
    for path in finished.root.glob("mlflow.db*"):
        path.unlink()
    assert NOTHING in finished.snakemake()
    command = finished.run("python", "-m", "swconv", "ui", code=1).partition("make it: ")[2].split()
    assert command[0] == "snakemake"
    finished.run(*command)
    assert (finished.root / "mlflow.db").exists()


def test_a_report_that_fails_leaves_the_old_one(finished):
    reports = finished.root / "artifacts/smoke/reports"
    old = {path: path.read_bytes() for path in reports.rglob("*") if path.is_file()}
    claims = (finished.root / "reports/paper/sw_table2.csv").read_text()
    (finished.root / "reports/paper/sw_table2.csv").write_text("no,claims\n")

    finished.snakemake(code=1)
    assert len(old) == 4
    assert {path: path.read_bytes() for path in reports.rglob("*") if path.is_file()} == old
    assert finished.planned() == {"table2": 1}
    assert "table2@smoke" in finished.run("dvc", "status")

    (finished.root / "reports/paper/sw_table2.csv").write_text(claims)
    finished.snakemake()
    assert finished.planned() == {}


def test_a_broken_dvc_spoils_no_run(finished):
    (finished.root / ".dvc/config").write_text("[core\n")
    (finished.root / "artifacts/smoke/reports/table2.md").unlink()
    printed = finished.snakemake()
    assert "warning: dvc.lock is not up to date" in printed
    assert (finished.root / "artifacts/smoke/reports/table2.md").exists()


def test_a_run_trains_anew_each_time_that_it_is_forced(finished):
    target = "artifacts/smoke/train/sw15/seed0/metrics.json"  # of one seed of two, so that no stage can be recorded
    finished.activate("smoke", [0, 1], "artifacts/smoke/reports")
    for _ in range(2):
        assert list(finished.root.glob("checkpoints/*")) == []
        finished.snakemake("--forcerun", "train", "--", target)
        assert json.loads((finished.root / target).with_name("run.json").read_text())["resumed_from_epoch"] is None
