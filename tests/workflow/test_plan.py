"""What a dry run lists, and the one sentence that it prints instead when the parameters are wrong."""

import shutil
import time

import pytest

TABLE = {"track": 1, "table2": 1}


def test_an_edited_row_lists_its_jobs_and_the_table(finished):
    finished.replace("params/runs.yaml", "scores: concat", "scores: concat, level: 0.35")
    assert finished.planned() == {"train": 1, "evaluate": 1, **TABLE}


def test_another_label_of_a_row_lists_only_the_table(finished):
    finished.replace("params/runs.yaml", "text: rep2 E4 mean", "text: rep2 E4 of means")
    assert finished.planned() == {"table2": 1}


def test_comments_in_python_csrc_and_params_list_nothing(finished):
    for path, comment in {
        "swconv/training/loop.py": "# why", "swconv/ops/shift.py": '"""Why."""', "csrc/strips_cpu.cpp": "/* why */",
        "setup.py": "# why", "params/runs.yaml": "# why", "params/profiles/mini.yaml": "# why",
    }.items():
        with (finished.root / path).open("a") as file:
            file.write(f"\n{comment}\n")
    assert finished.planned() == {}


@pytest.mark.parametrize(("path", "text", "jobs"), [
    ("swconv/training/loop.py", "VAL_BATCH = 125", {"train": 18, "evaluate": 18, **TABLE}),
    ("swconv/training/evaluation.py", "EXTRA = 1", {"evaluate": 18, **TABLE}),
    ("swconv/reporting/report.py", "EXTRA = 1", {"table2": 1, "tables": 1}),
    ("swconv/build.py", "EXTRA = 1", {}),
    ("csrc/strips_cpu.cpp", "static int extra = 1;", {"build": 1, "train": 18, "evaluate": 18, **TABLE}),
])
def test_other_code_lists_the_jobs_that_use_it(finished, path, text, jobs):
    with (finished.root / path).open("a") as file:
        file.write(f"\n{text}\n")
    assert finished.planned() == jobs


def test_a_row_equal_to_an_earlier_one_is_not_trained(finished):
    with (finished.root / "params/runs.yaml").open("a") as file:
        file.write('\n  twin: {label: "#12", text: twin, source: ours, from: sw15}\n')
    finished.keep_rows("sw03", "sw15", "twin")
    assert finished.planned() == {"same_as": 2, **TABLE}


def test_a_row_with_same_weights_is_laid_out_from_the_row_that_is_trained(finished):
    target = "artifacts/smoke/evaluate/sw01_infer/seed0/metrics.json"
    assert finished.planned(target) == {"train": 1, "lay_out": 1, "evaluate": 1}


@pytest.mark.parametrize(("page", "jobs"), [
    ("table9", {"train": 4, "evaluate": 4, "same_as": 4, "track": 1, "page": 1}),           # #19 and #20 stand in Table 2 too
    ("slak/table1", {"train": 3, "evaluate": 3, "same_as": 8, "track": 1, "page": 1}),      # large extents coincide
    ("slak/figure6", {"train": 5, "evaluate": 5, "same_as": 4, "track": 1, "figure": 1}),
])
def test_a_page_asks_for_its_own_runs_and_nothing_else(finished, page, jobs):
    planned = finished.planned(f"artifacts/smoke/reports/{page}.md")
    assert {rule: number for rule, number in planned.items() if rule != "tables"} == jobs


def test_the_rows_of_a_page_are_as_many_as_its_seeds_allow(fresh, tmp_path):
    project = fresh.copy(tmp_path / "project")
    project.activate("smoke", [0, 1, 2], "artifacts/smoke/reports")
    assert project.planned("artifacts/smoke/reports/slak/table9.md")["train"] == 3
    assert project.planned("artifacts/smoke/reports/table2.md")["train"] == 3 * 18


@pytest.mark.parametrize("left", [None, "", '{"library": {"pa', "{}", "[]"])
def test_a_build_record_that_is_lost_or_cut_short_trains_nothing_again(finished, left):
    record = finished.root / "artifacts/smoke/build/build.json"
    record.unlink()
    if left is not None:
        record.write_text(left)
    finished.replace("params/runs.yaml", "scores: concat", "scores: concat, level: 0.35")
    assert finished.planned() == {"train": 1, "evaluate": 1, **TABLE}


def test_only_a_real_run_writes_what_config_asks_for(finished):
    active = finished.root / "params/active.yaml"
    before = active.read_text()
    finished.snakemake("-n", "--config", "seeds=0,1")
    assert active.read_text() == before
    finished.snakemake("artifacts/smoke/train/sw03/seed0/metrics.json", "--config", "seeds=0,1")  # nothing to do
    assert active.read_text() == before.replace("[0]", "[0, 1]")


@pytest.mark.parametrize("job", [[], ["--forcerun", "data"]], ids=["nothing to do", "a job to run"])
def test_what_config_asks_for_and_cannot_be_kept_ends_in_one_sentence(finished, job):
    before = (finished.root / "params/active.yaml").read_text()
    (finished.root / "params/.active.yaml.part").mkdir()  # where the new text would be written first
    printed = finished.snakemake("artifacts/smoke/data/data.json", *job, "--config", "seeds=0,1", code=1)
    assert printed.splitlines()[-1].startswith("params/active.yaml could not be written: Is a directory. ")
    assert "Traceback" not in printed
    assert "Error" not in printed
    assert (finished.root / "params/active.yaml").read_text() == before


def test_a_gpu_is_asked_for_only_where_the_profile_computes_on_one(fresh, tmp_path):
    project = fresh.copy(tmp_path / "project")
    assert "gpu=1" not in project.snakemake("-n", "artifacts/smoke/train/sw03/seed0/metrics.json")
    for split in ("train", "val"):
        (project.root / "data/imagenet" / split).mkdir(parents=True)
    assert "gpu=1" in project.snakemake("-n", "artifacts/paper/train/sw03/seed0/metrics.json")


@pytest.mark.parametrize(("arguments", "sentence"), [
    (["artifacts/smoke/train/sw99/seed0/metrics.json"], "unknown run sw99; the nearest known name is sw"),
    (["artifacts/smok/train/sw03/seed0/metrics.json"], "unknown profile smok; the nearest known name is smoke"),
    (["--config", "profile=minni"], "unknown profile minni; the nearest known name is mini"),
    (["--config", "seeds=0,x"], "--config seeds needs whole numbers below 2**32, as in seeds=0,1,2; got seeds=0,x."),
    (["--config", "profil=mini"], "--config takes profile and seeds, got profil."),
    (["--config", "profile=paper"], "profile paper needs imagenet in data/imagenet/"),
    (["artifacts/paper/train/sw03/seed0/metrics.json"], "profile paper needs imagenet in data/imagenet/"),
    (["reports/slak/table9.md"], "smoke is active (params/active.yaml), whose page is artifacts/smoke/reports/slak/table9.md"),
    (["reports/tabel7.md"], "unknown page reports/tabel7.md; the nearest known name is reports/table7.md."),
    (["artifacts/smoke/reports/slak/tabel9.md"], "the nearest known name is artifacts/smoke/reports/slak/table9.md."),
    (["artifacts/smoke/train/sw01_infer/seed0/metrics.json"], "run sw01_infer is evaluated with the weights of sw00_300"),
    (["artifacts/smoke/weights/sw11/seed0/metrics.json"], "run sw11 is trained, not laid out"),
])
def test_what_is_not_known_is_told_in_a_sentence(fresh, arguments, sentence):
    printed = fresh.snakemake("-n", *arguments, code=1)
    assert sentence in printed
    assert "Traceback" not in printed
    assert "Error" not in printed


def test_a_folder_that_cannot_be_written_is_told_in_one_sentence(fresh, tmp_path):
    project = fresh.copy(tmp_path / "project")
    shutil.rmtree(project.root / ".snakemake", ignore_errors=True)
    (project.root / ".snakemake").touch()
    printed = project.snakemake("-n", code=1)
    assert printed.count("\n") == 1
    assert printed.startswith(f"Snakemake needs to write in {project.root}, got 'File exists' for .snakemake. Check its owner")


@pytest.mark.parametrize("script", ["adopt.py", "dvc_sync.py"])
def test_a_misspelt_key_stops_a_script_with_one_sentence(fresh, tmp_path, script):
    project = fresh.copy(tmp_path / "project")
    project.replace("params/runs.yaml", "ghost_ratio: 0.23", "ghost_ration: 0.23")
    printed = project.script(script, code=1)
    assert printed.count("\n") == 1
    assert printed.startswith("params/runs.yaml:")


def test_a_misspelt_key_stops_a_dry_run_a_dry_run_with_one_sentence_within_three_seconds(fresh, tmp_path):
    project = fresh.copy(tmp_path / "project")
    project.replace("params/runs.yaml", "ghost_ratio: 0.23", "ghost_ration: 0.23")
    seconds = []
    for _ in range(3):  # the machine may be busy with something else
        start = time.monotonic()
        printed = project.snakemake("-n", code=1)
        seconds.append(time.monotonic() - start)
    assert min(seconds) < 3
    assert printed.count("\n") == 1
    assert printed.startswith("params/runs.yaml:")
    assert "run sw06, unknown key model.ghost_ration; the nearest known name is ghost_ratio." in printed
