"""Killed, or with a clock that ran ahead: the same command again goes on, and nothing finished is lost."""

import json
import os
import signal
import subprocess
import time
from base64 import urlsafe_b64encode
from pathlib import Path

RUN = "artifacts/smoke/train/sw15/seed0"


def train_until_first_checkpoint(project, environment, told=subprocess.DEVNULL):
    """Start a training and return its driver's process when there is something to lose."""
    driver = subprocess.Popen(
        ["snakemake", "--cores", "all", f"{RUN}/metrics.json"], cwd=project.root, env=environment, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=told,
    )
    deadline = time.monotonic() + 120
    while not list(project.root.glob("checkpoints/*/epoch*.pt")):
        assert driver.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return driver


def lengthen(project):
    """Many short epochs, so that a kill finds the training in the middle."""
    project.replace("params/profiles/smoke.yaml", "epochs: 2", "epochs: 60")


def mark_unfinished(project, *outputs):
    """Leave the notes of a driver that was killed while these were made."""
    for output in outputs:
        path = project.root / ".snakemake/incomplete" / urlsafe_b64encode(output.encode()).decode()
        path.write_text('{"external_jobid": null}')


def test_the_whole_tree_killed_ends_with_the_weights_of_an_undisturbed_run(finished, tmp_path):
    lengthen(finished)
    undisturbed = finished.copy(tmp_path / "undisturbed")
    undisturbed.snakemake(f"{RUN}/metrics.json")

    driver = train_until_first_checkpoint(finished, undisturbed.environment)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    finished.snakemake(f"{RUN}/metrics.json")

    assert 0 < json.loads((finished.root / RUN / "run.json").read_text())["resumed_from_epoch"] < 60
    for name in ("weights.safetensors", "metrics.json"):
        assert (finished.root / RUN / name).read_bytes() == (undisturbed.root / RUN / name).read_bytes()


def test_the_driver_alone_killed_trains_nothing_twice(finished):
    lengthen(finished)
    driver = train_until_first_checkpoint(finished, finished.environment)
    driver.kill()
    driver.wait()
    finished.snakemake(f"{RUN}/metrics.json")  # waits for the trainer that is still there, then finds its work

    assert json.loads((finished.root / RUN / "run.json").read_text())["resumed_from_epoch"] == 60
    assert finished.planned(f"{RUN}/metrics.json") == {}


def test_killed_between_publishing_and_snakemakes_note_needs_no_option(finished):
    state, target = finished.root / ".snakemake", f"{RUN}/metrics.json"
    (state / "locks").mkdir(exist_ok=True)
    (state / "locks/0.output.lock").write_text(f"{target}\n")
    mark_unfinished(finished, target)

    assert "An earlier run was killed" in finished.snakemake(target)
    assert (finished.root / target).exists()
    assert finished.planned(target) == {}


def test_an_unfinished_folder_goes_whole_and_an_unfinished_page_stays_until_it_is_made_anew(finished):
    folder, page = "artifacts/smoke/downstream/ade_160k_sw_tiny/seed0/detections", "reports/table2.md"
    (finished.root / folder / "maps").mkdir(parents=True)
    (finished.root / folder / "maps/0.png").touch()
    (finished.root / page).write_text("old")
    mark_unfinished(finished, folder, page)
    finished.snakemake("-n", f"{RUN}/metrics.json")
    assert not (finished.root / folder).exists()
    assert (finished.root / page).read_text() == "old"
    assert (finished.root / page).stat().st_mtime == 1
    assert not any((finished.root / ".snakemake/incomplete").iterdir())


def test_a_trainer_that_is_asked_to_stop_fails_its_job_and_the_same_command_goes_on(finished):
    lengthen(finished)
    driver = train_until_first_checkpoint(finished, finished.environment)
    (trainer,) = [int(path.name) for path in Path("/proc").glob("[0-9]*") if is_trainer(path, driver.pid)]
    os.kill(trainer, signal.SIGTERM)
    assert driver.wait(timeout=120) == 1
    assert "stopped as asked after step" in (finished.root / "logs/train/smoke-sw15-seed0.log").read_text()
    assert not (finished.root / RUN / "metrics.json").exists()
    finished.snakemake(f"{RUN}/metrics.json")
    assert json.loads((finished.root / RUN / "run.json").read_text())["resumed_from_step"] > 0


def test_a_request_to_the_whole_process_group_ends_the_job_with_the_trainers_own_sentence_and_code(finished):
    lengthen(finished)
    with (finished.root / "told").open("w") as told:
        driver = train_until_first_checkpoint(finished, finished.environment, told)
        os.killpg(driver.pid, signal.SIGTERM)
        assert driver.wait(timeout=120) == 1
    assert "stopped as asked after step" in (finished.root / "logs/train/smoke-sw15-seed0.log").read_text()
    assert "exit status 85" in (finished.root / "told").read_text()


def is_trainer(process, session):
    """Whether a folder of /proc is of `python -m swconv train` below this session's leader."""
    try:
        return b"swconv\0train" in (process / "cmdline").read_bytes() and os.getsid(int(process.name)) == session
    except (OSError, ValueError):
        return False


def test_a_run_that_diverges_stops_nothing_and_its_cell_says_so(finished):
    finished.replace("params/runs.yaml", "{sparsity: {scores: concat}}", "{lr: 1.0e+30}")  # sw15
    assert "sw15 seed 0 DIVERGED: " in finished.snakemake()
    assert list(json.loads((finished.root / RUN / "metrics.json").read_text())) == ["diverged"]
    (row,) = [line for line in (finished.root / "artifacts/smoke/reports/table2.md").read_text().splitlines()
              if line.startswith("| #15 ")]
    assert "diverged" in row
    assert finished.planned() == {}


def test_a_lock_of_a_living_driver_is_respected(finished):
    lengthen(finished)
    driver = train_until_first_checkpoint(finished, finished.environment)
    try:
        assert "LockException" in finished.snakemake(f"{RUN}/metrics.json", code=1)
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()


def test_a_file_from_the_future_costs_no_result(finished):
    results = finished.results()
    path = Path(finished.root, "artifacts/smoke/data/data.json")
    ahead = time.time() + 3600
    os.utime(path, (ahead, ahead))

    assert "was dated in the future" in finished.snakemake()
    assert path.stat().st_mtime < ahead
    assert finished.results() == results


def test_a_failed_run_stops_no_other_and_its_old_results_come_back(finished):
    results = finished.results()
    finished.replace("params/runs.yaml", "{sparsity: {scores: concat}}", "{batch_size: 4096}")  # sw15
    finished.replace("params/runs.yaml", "{sparsity: {share_every: 3}}", "{sparsity: {share_every: 2}}")  # sw17

    printed = finished.snakemake("--keep-going", code=1)
    status = finished.run("dvc", "status")
    assert "Training needs at least one batch of 4096 images, got 128" in printed
    assert "run@smoke-sw15" in status
    assert "run@smoke-sw17" not in status

    finished.run("git", "checkout", "--quiet", "params", "dvc.lock")
    finished.run("dvc", "checkout", "dvc.yaml")
    finished.script("adopt.py")
    assert finished.planned() == {}
    assert finished.results() == results
