import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml

from swconv.training import tracking
from swconv.training.tracking import RunFiles, replay

CONFIG = {"model": {"name": "sw_tiny", "args": {"dims": [16, 32]}}, "recipe": {"lr": 0.004, "sparsity": None}}
TOP1 = {0: 87.0, 1: 89.0, 2: 94.0}


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    """A database without runs: its tables take longer to make than all that is tested here."""
    folder = tmp_path_factory.mktemp("empty")
    _client(folder).search_experiments()
    return folder / "mlflow.db"


@pytest.fixture
def database(tmp_path, empty):
    with closing(sqlite3.connect(empty)) as source, closing(sqlite3.connect(tmp_path / "mlflow.db")) as copy:
        source.backup(copy)
    return tmp_path / "mlflow.db"


@pytest.fixture
def runs(tmp_path):
    """Two rows of two and three seeds."""
    rows = [("sw03", 0), ("sw03", 1), ("sw11", 0), ("sw11", 1), ("sw11", 2)]
    return [_finished(tmp_path, run, seed) for run, seed in rows]


def test_runs_hold_the_numbers_of_the_json_lines(tmp_path, runs, database):
    ids = replay("table2", runs, database)
    client = _client(tmp_path)
    for files in runs:
        run = client.get_run(ids[f"key-{files.run}-{files.seed}"])
        lines = [json.loads(text) for text in (files.train / "log.jsonl").read_text().splitlines()]
        for name in ("train_loss", "lr", "images_per_second"):
            history = client.get_metric_history(run.info.run_id, name)
            expected = [(line["epoch"], line[name]) for line in lines if "epoch" in line]
            assert sorted((point.step, point.value) for point in history) == expected
        assert [p.step for p in client.get_metric_history(run.info.run_id, "top1")] == [2]
        assert run.data.metrics["evaluate/top1"] == TOP1[files.seed]
        assert run.data.metrics["train/parameters"] == 21606
        assert run.data.params == {
            "model.name": "sw_tiny", "model.args.dims": "[16, 32]", "recipe.lr": "0.004", "recipe.sparsity": "null"
        }
        assert (run.info.start_time, run.info.end_time, run.info.status) == (1735689600000, 1735689640000, "FINISHED")


def test_tags_lead_back_to_code_data_machine_and_files(tmp_path, runs, database):
    ids = replay("table2", runs, database)
    expected = {
        "swconv.key": "key-sw11-2",
        "run": "sw11",
        "seed": "2",
        "profile": "mini",
        "git.sha": "abc",
        "git.dirty": "true",
        "env.lock.sha256": "lock",
        "data.manifest.sha256": "data",
        "hardware.cpu": "Xeon",
        "hardware.gpu": "none",
        "artifacts": str(runs[-1].train),
        "mlflow.runName": "sw11 seed 2",
        "mlflow.parentRunId": ids["table2/mini/sw11"],
    }
    tags = _client(tmp_path).get_run(ids["key-sw11-2"]).data.tags
    assert {name: tags[name] for name in expected} == expected


def test_parent_has_mean_and_sd_of_its_seeds(tmp_path, runs, database):
    parent = _client(tmp_path).get_run(replay("table2", runs, database)["table2/mini/sw11"])
    assert parent.data.metrics["top1_mean"] == pytest.approx(90.0)
    assert parent.data.metrics["top1_sd"] == pytest.approx(13**0.5)
    assert parent.data.metrics["n"] == 3


def test_one_seed_has_no_sd(tmp_path, database):
    ids = replay("table2", [_finished(tmp_path, "sw03", 0)], database)
    metrics = _client(tmp_path).get_run(ids["table2/mini/sw03"]).data.metrics
    assert metrics == {"top1_mean": 87.0, "n": 1}


def test_a_row_whose_seeds_all_diverged_is_replayed_without_a_mean(tmp_path, database):
    files = _finished(tmp_path, "sw03", 0)
    for folder in (files.train, files.evaluate):
        (folder / "metrics.json").write_text(json.dumps({"diverged": {"value": 120, "unit": "step"}}))
    ids = replay("table2", [files], database)
    client = _client(tmp_path)
    assert client.get_run(ids["table2/mini/sw03"]).data.metrics == {"n": 0}
    assert client.get_run(ids["key-sw03-0"]).data.metrics["evaluate/diverged"] == 120


@pytest.mark.parametrize(("report", "title"), [("table2", "SW Table 2, mini"), ("slak/table12", "SLaK Table 12, mini")])
def test_experiment_is_named_after_table_and_profile(tmp_path, report, title, database):
    replay(report, [_finished(tmp_path, "sw03", 0)], database)
    assert {e.name for e in _client(tmp_path).search_experiments()} == {"Default", title}


def test_fine_tunes_stand_in_the_experiment_of_their_task_with_the_mean_of_its_measure(tmp_path, database):
    found = [_finished(tmp_path, "ade_160k_sw_tiny", seed) for seed in (0, 1)]
    for files, value in zip(found, (40.0, 43.0), strict=True):
        _write(files.evaluate / "metrics.json", {"mIoU": {"value": value, "unit": "%"}, "mAcc": {"value": 50.0, "unit": "%"}})
    ids = replay("downstream/ade20k", found, database, "mIoU")
    client = _client(tmp_path)
    assert {e.name for e in client.search_experiments()} == {"Default", "ADE20K, mini"}
    parent = client.get_run(ids["downstream/ade20k/mini/ade_160k_sw_tiny"])
    assert parent.data.metrics == {"n": 2, "mIoU_mean": 41.5, "mIoU_sd": pytest.approx(4.5**0.5)}
    assert client.get_run(ids["key-ade_160k_sw_tiny-1"]).data.metrics["evaluate/mIoU"] == 43.0


def test_replaying_again_changes_nothing(tmp_path, runs, database):
    first = replay("table2", runs, database)
    before = _dump(tmp_path)
    assert replay("table2", runs, database) == first
    assert _dump(tmp_path) == before
    assert len(_active(tmp_path)) == len(first) == 7


def test_changed_result_replaces_its_run(tmp_path, runs, database):
    first = replay("table2", runs, database)
    _write(runs[-1].evaluate / "metrics.json", {"top1": {"value": 91.0, "unit": "%"}})
    second = replay("table2", runs, database)
    active = _active(tmp_path)
    assert len(active) == 7
    assert active["key-sw11-2"].data.metrics["evaluate/top1"] == 91.0
    assert active["table2/mini/sw11"].data.metrics["top1_mean"] == pytest.approx(89.0)
    assert active["key-sw11-0"].data.tags["mlflow.parentRunId"] == second["table2/mini/sw11"]
    assert {key for key in first if first[key] != second[key]} == {"key-sw11-2", "table2/mini/sw11"}


def test_run_under_an_older_key_stays_and_is_marked(tmp_path, runs, database):
    replay("table2", runs, database)
    record = json.loads((runs[0].train / "run.json").read_text())
    _write(runs[0].train / "run.json", record | {"key": "new"})
    ids = replay("table2", runs, database)
    active = _active(tmp_path)
    assert len(active) == 8
    assert {key for key, run in active.items() if run.data.tags["swconv.current"] == "false"} == {"key-sw03-0"}
    assert active["key-sw03-0"].data.tags["mlflow.parentRunId"] == ids["table2/mini/sw03"]


def test_replay_that_was_killed_is_completed(tmp_path, runs, database):
    ids = replay("table2", runs, database)
    _client(tmp_path).set_tag(ids["key-sw03-1"], "swconv.content", "incomplete")
    replay("table2", runs, database)
    assert len(_active(tmp_path)) == 7
    assert _active(tmp_path)["key-sw03-1"].data.metrics["evaluate/top1"] == TOP1[1]


def test_epoch_that_was_trained_twice_around_a_kill_counts_once(tmp_path, database):
    files = _finished(tmp_path, "sw03", 0)
    with (files.train / "log.jsonl").open("a") as log:
        log.write(json.dumps({"epoch": 2, "train_loss": 0.25, "lr": 0.0, "seconds": 1.0}) + "\n")
    ids = replay("table2", [files], database)
    history = _client(tmp_path).get_metric_history(ids["key-sw03-0"], "train_loss")
    assert [(point.step, point.value) for point in history] == [(1, 2.0), (2, 0.25)]


def test_two_replays_at_once_on_a_new_database_both_succeed(tmp_path, runs):
    code = (
        "import sys; from pathlib import Path; from swconv.training.tracking import RunFiles, replay; "
        "root = Path(sys.argv[1]); rows = [('sw03', 0), ('sw03', 1), ('sw11', 0), ('sw11', 1), ('sw11', 2)]; "
        "replay('table2', [RunFiles(r, s, root / f'train/{r}/seed{s}', root / f'evaluate/{r}/seed{s}') "
        "for r, s in rows], root / 'mlflow.db')"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    started = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate()[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], errors
    assert len(_active(tmp_path)) == 7


def test_dvc_tag_is_the_hash_that_dvc_records(tmp_path, runs, database):
    ids = replay("table2", runs, database)
    for command in (["init", "--no-scm", "--quiet"], ["add", "--quiet", str(runs[-1].train.parent)]):
        subprocess.run(
            [sys.executable, "-m", "dvc", *command],
            cwd=tmp_path,
            env=os.environ | {"DVC_NO_ANALYTICS": "1", "DVC_SITE_CACHE_DIR": str(tmp_path / "site")},
            check=True,
        )
    recorded = yaml.safe_load((tmp_path / "train" / "sw11.dvc").read_text())["outs"][0]["md5"]
    assert _client(tmp_path).get_run(ids["key-sw11-2"]).data.tags["dvc.out.md5"] == recorded


def test_locked_database_stops_with_a_sentence(tmp_path, runs, monkeypatch):
    monkeypatch.setattr(tracking, "LOCK_SECONDS", 0.1)
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(OSError, match="mlflow.db, got 'database is locked'; close what else writes to it"):
            replay("table2", runs, tmp_path / "mlflow.db")


def test_file_that_is_no_database_stops_with_a_sentence(tmp_path, runs):
    (tmp_path / "mlflow.db").write_text("this is not a database, " * 100)
    with pytest.raises(OSError, match="needs to write the database .*mlflow.db, got 'file is not a database'"):
        replay("table2", runs, tmp_path / "mlflow.db")


def test_pages_of_a_file_that_is_no_database_stop_with_a_sentence(tmp_path):
    (tmp_path / "mlflow.db").write_text("this is not a database, " * 100)
    with pytest.raises(OSError, match="needs to write the database .*mlflow.db, got 'file is not a database'"):
        tracking.comparisons(tmp_path / "mlflow.db")


@pytest.mark.parametrize(("limit", "there"), [(300_000, False), (40_000, True)])
def test_a_full_disk_stops_with_a_sentence_and_nothing_else(tmp_path, runs, database, limit, there):
    """A limit on file size makes the system refuse the bytes, as a full disk does: of a new database, of one more run."""
    if not there:
        database.unlink()
    code = (
        "import resource, sys; from pathlib import Path; from swconv.training.tracking import RunFiles, replay\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); root = Path(sys.argv[1])\n"
        "try: replay('table2', [RunFiles('sw03', 0, root / 'train/sw03/seed0', root / 'evaluate/sw03/seed0')], "
        "root / 'mlflow.db')\n"
        "except OSError as error: sys.exit(str(error))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], stderr=subprocess.PIPE, text=True, check=False)
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"MLflow needs to write the database {database}, got ")
    assert line.endswith("make it again: snakemake --cores all --forcerun track. No result is lost.")


def test_place_that_cannot_be_written_stops_with_a_sentence(tmp_path, runs):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="needs to write the database .*mlflow.db, got 'File exists'"):
        replay("table2", runs, tmp_path / "file" / "mlflow.db")


def test_database_of_another_mlflow_version_stops_with_a_sentence(tmp_path, runs, database):
    replay("table2", runs, database)
    code = (
        "import sys; from pathlib import Path; from swconv.training.tracking import RunFiles, replay; "
        "root = Path(sys.argv[1]); "
        "replay('table2', [RunFiles('sw03', 0, root / 'train/sw03/seed0', root / 'evaluate/sw03/seed0')], "
        "root / 'mlflow.db')"
    )
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = 'feedbeef'")
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], stderr=subprocess.PIPE, text=True, check=False)
    assert result.stderr.splitlines()[-1].startswith("OSError: MLflow needs to write the database")


def test_malformed_line_is_named_with_its_number(tmp_path, runs):
    with (runs[0].train / "log.jsonl").open("a") as log:
        log.write('{"epoch": 3, "train_l\n')
    with pytest.raises(ValueError, match=r"sw03/seed0/log.jsonl:4 needs to be a JSON line"):
        replay("table2", runs, tmp_path / "mlflow.db")


@pytest.mark.parametrize("name", ["train/log.jsonl", "train/run.json", "evaluate/metrics.json"])
def test_missing_result_is_named(tmp_path, runs, name):
    stage, file = name.split("/")
    path = getattr(runs[0], stage) / file
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"needs {path}, got no such file"):
        replay("table2", runs, tmp_path / "mlflow.db")


def test_nothing_to_replay_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one finished run, got none"):
        replay("table2", [], tmp_path / "mlflow.db")


def test_pages_of_a_missing_database_name_the_command_that_makes_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="mlflow.db, got no such file; make it: snakemake all"):
        tracking.ui_command(tmp_path / "mlflow.db", refill="snakemake all")
    (tmp_path / "mlflow.db").touch()
    command = tracking.ui_command(tmp_path / "mlflow.db", refill="snakemake all")
    assert command[3:6] == ["ui", "--backend-store-uri", f"sqlite:///{tmp_path / 'mlflow.db'}"]


def test_database_is_written_ahead_so_that_pages_can_be_read_during_a_replay(tmp_path, runs):
    replay("table2", runs, tmp_path / "mlflow.db")
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def _finished(root: Path, run: str, seed: int) -> RunFiles:
    files = RunFiles(run, seed, root / "train" / run / f"seed{seed}", root / "evaluate" / run / f"seed{seed}")
    files.train.mkdir(parents=True)
    files.evaluate.mkdir(parents=True)
    lines = [
        {"epoch": 1, "train_loss": 2.0, "lr": 0.002, "images_per_second": 900.0, "seconds": 4.0},
        {"event": "prune", "step": 3, "rate": 0.5, "density": {"a": 0.6}},
        {"epoch": 2, "train_loss": 0.5, "lr": 0.0, "images_per_second": 950.0, "seconds": 4.0, "top1": TOP1[seed]},
    ]
    (files.train / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _write(files.train / "metrics.json", {"parameters": {"value": 21606, "unit": ""}})
    _write(files.evaluate / "metrics.json", {"top1": {"value": TOP1[seed], "unit": "%"}})
    record = {
        "key": f"key-{run}-{seed}",
        "profile": "mini",
        "git_commit": "abc",
        "git_dirty": True,
        "lock_sha256": "lock",
        "data_manifest_sha256": "data",
        "started": "2025-01-01T00:00:00+00:00",
        "seconds": 40.0,
        "hardware": {"cpu": "Xeon", "gpu": None},
        "config": CONFIG,
    }
    _write(files.train / "run.json", record)
    return files


def _write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content))


def _client(folder: Path):
    return tracking._client(folder / "mlflow.db")


def _active(folder: Path) -> dict:
    client = _client(folder)
    experiments = [e.experiment_id for e in client.search_experiments()]
    runs = client.search_runs(experiments)
    assert len({run.data.tags["swconv.key"] for run in runs}) == len(runs)
    return {run.data.tags["swconv.key"]: run for run in runs}


def _dump(folder: Path) -> list[str]:
    with closing(sqlite3.connect(folder / "mlflow.db")) as database:
        return sorted(database.iterdump())


def test_comparison_page_names_every_row_once_and_no_seed(database, runs):
    ids = replay("table2", runs, database)
    pages = tracking.comparisons(database)
    (address,) = pages.values()
    query = parse_qs(urlsplit(urlsplit(address).fragment).query)
    parents = {identity for key, identity in ids.items() if key.startswith("table2/")}
    assert sorted(json.loads(query["runs"][0])) == sorted(parents)
