"""Replay of finished runs into MLflow: a view that can be thrown away and made again. The only importer of mlflow.

One experiment per table, or task of fine-tunes, and profile, one parent run per row, one child run per seed. Training never
waits for MLflow: it writes JSON lines, and these are replayed.
"""

import fcntl
import hashlib
import json
import logging
import os
import re
import sqlite3
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlencode

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

PER_EPOCH = ("train_loss", "val_loss", "top1", "lr", "density", "images_per_second")
BATCH_METRICS, BATCH_PARAMS = 1000, 100  # what one log_batch call may hold
LOCK_SECONDS = 10
TASKS = {"ade20k": "ADE20K", "coco": "COCO 2017", "voc": "PASCAL VOC 2007", "nuscenes": "nuScenes"}
HOST, PORT = "127.0.0.1", 5000  # of the pages
REFILL = "snakemake --cores all --forcerun track"  # makes a lost database again; without --forcerun nothing is to be done

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # mlflow reads it on import, which the functions below do


@dataclass(frozen=True)
class RunFiles:
    """Where one run's results lie.

    Attributes
    ----------
    run : str
        Row of params/runs.yaml or params/downstream.yaml.
    seed : int
    train : Path
        Folder with log.jsonl, run.json and metrics.json.
    evaluate : Path
        Folder with metrics.json.
    """

    run: str
    seed: int
    train: Path
    evaluate: Path


def replay(report: str, runs: list[RunFiles], database: Path, measure: str = "top1") -> dict[str, str]:
    """Bring an MLflow database up to date with finished runs; what is there and unchanged is left alone.

    A run is found by its tag `swconv.key`. If its files changed, it is replaced, as MLflow's metrics cannot be taken
    back. Runs of the same row and seed under another key stay, with the tag `swconv.current` set to "false".
    The database is created if missing; a second process waits for the first.

    Parameters
    ----------
    report : str
        Name of the table, "table2" or "slak/table1"; "downstream/<task>" for fine-tunes.
    runs : list of RunFiles
        All of one profile.
    database : Path
        SQLite file; artifacts go to `mlartifacts/` beside it.
    measure : str
        Of the evaluation; parents have its mean and standard deviation over their seeds.

    Returns
    -------
    dict of str to str
        MLflow run id of every key, parents included (`<report>/<profile>/<run>`).

    Raises
    ------
    FileNotFoundError, ValueError
        A file of a run is missing or malformed.
    OSError
        The database cannot be opened, written or locked, or was written by another version of MLflow.
    """
    wanted = _wanted(report, runs, measure)
    with _locked(database), _one_sentence(database):
        client = _client(database)
        experiment = _experiment(client, _title(report, wanted[0].tags["profile"]), database)
        return _synchronise(client, experiment, wanted)


def ui_command(database: Path, refill: str) -> list[str]:
    """The command that opens MLflow's pages on a database.

    Parameters
    ----------
    database : Path
    refill : str
        The command that makes the database, for the error's sentence.

    Raises
    ------
    FileNotFoundError
        There is no database.
    """
    if not Path(database).is_file():
        raise FileNotFoundError(f"The MLflow pages need the database {database}, got no such file; make it: {refill}")
    return [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", _uri(database), "--host", HOST, "--port", str(PORT)]


def comparisons(database: Path) -> dict[str, str]:
    """Address of MLflow's page that compares the rows of each report, by the experiment's title.

    Raises
    ------
    OSError
        The database cannot be opened or written, or was written by another version of MLflow.
    """
    from mlflow.entities import ViewType

    pages = {}
    with _one_sentence(database):
        client = _client(database)
        for experiment in client.search_experiments(ViewType.ACTIVE_ONLY):
            rows = [run.info.run_id for run in _runs(client, experiment.experiment_id) if "seed" not in run.data.tags]
            if rows:
                query = urlencode({"runs": json.dumps(rows), "experiments": json.dumps([experiment.experiment_id])})
                pages[experiment.name] = f"http://{HOST}:{PORT}/#/compare-runs?{query}"
    return pages


# --- what the database should hold --------------------------------------------------------------


@dataclass(frozen=True)
class _Wanted:
    """An MLflow run: `content` decides whether it must be replaced, tags are updated in place."""

    key: str
    name: str
    parent: str | None
    start: int  # ms since 1970, as all times in MLflow
    end: int
    params: dict[str, str]
    metrics: list[tuple[str, float, int, int]]  # name, value, time, step
    tags: dict[str, str]

    @property
    def content(self) -> str:
        facts = [self.start, self.end, self.params, self.metrics]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _wanted(report: str, runs: list[RunFiles], measure: str) -> list[_Wanted]:
    """Parents first."""
    rows = defaultdict(list)
    dvc = {folder: _dvc_md5(folder) for folder in {files.train.parent for files in runs}}
    for files in runs:
        rows[files.run].append((files, _child(report, files, dvc[files.train.parent])))
    if not rows:
        raise ValueError(f"Replaying '{report}' into MLflow needs at least one finished run, got none; train first.")
    parents = [_parent(report, run, [child for _, child in row], measure) for run, row in rows.items()]
    return parents + [child for row in rows.values() for _, child in row]


def _child(report: str, files: RunFiles, dvc_md5: str) -> _Wanted:
    record = _json(files.train / "run.json")
    results = {"train": _json(files.train / "metrics.json"), "evaluate": _json(files.evaluate / "metrics.json")}
    start = round(datetime.fromisoformat(record["started"]).timestamp() * 1000)
    end = start + round(record["seconds"] * 1000)
    metrics = []
    now = start
    for line in _epochs(files.train / "log.jsonl"):
        now += round(line["seconds"] * 1000)
        metrics += [(name, line[name], now, line["epoch"]) for name in PER_EPOCH if line.get(name) is not None]
    for stage, result in results.items():
        metrics += [(f"{stage}/{name}", cell["value"], end, 0) for name, cell in result.items()]
    return _Wanted(
        key=record["key"],
        name=f"{files.run} seed {files.seed}",
        parent=_parent_key(report, record["profile"], files.run),
        start=start,
        end=end,
        params=_flat(record["config"]),
        metrics=metrics,
        tags={
            "run": files.run,
            "seed": str(files.seed),
            "profile": record["profile"],
            "artifacts": str(files.train),
            "git.sha": str(record["git_commit"]),
            "git.dirty": str(record["git_dirty"]).lower(),
            "env.lock.sha256": str(record["lock_sha256"]),
            "data.manifest.sha256": str(record["data_manifest_sha256"]),
            "hardware.cpu": str(record["hardware"]["cpu"]),
            "hardware.gpu": str(record["hardware"]["gpu"] or "none"),
            "dvc.out": str(files.train.parent),
            "dvc.out.md5": dvc_md5,
        },
    )


def _parent(report: str, run: str, children: list[_Wanted], measure: str) -> _Wanted:
    found = [value for child in children for name, value, _, _ in child.metrics if name == f"evaluate/{measure}"]
    end = max(child.end for child in children)
    summary = {"n": len(found)} | ({f"{measure}_mean": statistics.fmean(found)} if found else {})  # none: all seeds diverged
    if len(found) > 1:
        summary[f"{measure}_sd"] = statistics.stdev(found)
    profile = children[0].tags["profile"]
    return _Wanted(
        key=_parent_key(report, profile, run),
        name=run,
        parent=None,
        start=min(child.start for child in children),
        end=end,
        params=children[0].params,
        metrics=[(name, value, end, 0) for name, value in summary.items()],
        tags={"run": run, "profile": profile},
    )


def _parent_key(report: str, profile: str, run: str) -> str:
    return f"{report}/{profile}/{run}"


def _json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"The replay into MLflow needs {path}, got no such file; run its rule first.") from None
    except ValueError as error:
        raise ValueError(f"{path} needs to be JSON, got '{error}'; delete it and run its rule again.") from None


def _epochs(path: Path) -> list[dict]:
    """The lines of epochs; of one that was trained twice, around a kill, the later."""
    if not path.is_file():
        raise FileNotFoundError(f"The replay into MLflow needs {path}, got no such file; train the run first.")
    found = {}
    for number, text in enumerate(path.read_text().splitlines(), start=1):
        try:
            line = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path}:{number} needs to be a JSON line, got '{error}'; train the run again.") from None
        if "epoch" in line and "event" not in line:
            found[line["epoch"]] = line
    return [found[epoch] for epoch in sorted(found)]


def _flat(config: Mapping, prefix: str = "") -> dict[str, str]:
    flat = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, str) else json.dumps(value)
    return flat


def _dvc_md5(folder: Path) -> str:
    """The hash under which DVC records a folder.

    It is computed, not looked up in dvc.lock, which is written after the replay and would give the hash before last.
    """
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    listing = [{"md5": _md5(paths[name]), "relpath": name} for name in sorted(paths)]
    return hashlib.md5(json.dumps(listing, sort_keys=True).encode()).hexdigest() + ".dir"


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def _title(report: str, profile: str) -> str:
    """`table2` becomes "SW Table 2, mini", `slak/table1` "SLaK Table 1, mini", `downstream/coco` "COCO 2017, mini"."""
    if report.startswith("downstream/"):
        return f"{TASKS[report.removeprefix('downstream/')]}, {profile}"
    paper = "SLaK" if report.startswith("slak/") else "SW"
    table = re.sub(r"(\D)(\d)", r"\1 \2", report.rpartition("/")[2]).capitalize()
    return f"{paper} {table}, {profile}"


# --- MLflow ------------------------------------------------------------------------------------


def _synchronise(client: "MlflowClient", experiment: str, wanted: list[_Wanted]) -> dict[str, str]:
    found = {run.data.tags["swconv.key"]: run for run in _runs(client, experiment)}
    ids: dict[str, str] = {}
    for item in wanted:
        tags = item.tags | {
            "swconv.key": item.key,
            "swconv.content": item.content,
            "swconv.current": "true",
            "mlflow.runName": item.name,
        }
        if item.parent:
            tags["mlflow.parentRunId"] = ids[item.parent]
        present = found.get(item.key)
        if present and present.data.tags["swconv.content"] != item.content:
            client.delete_run(present.info.run_id)
            present = None
        ids[item.key] = _update(client, present, tags) if present else _create(client, experiment, item, tags)
    current = {(item.tags["run"], item.tags.get("seed")): item for item in wanted}
    for key, run in found.items():
        successor = current.get((run.data.tags["run"], run.data.tags.get("seed")))
        if key not in ids and successor:
            _update(client, run, {"swconv.current": "false", "mlflow.parentRunId": ids[successor.parent]})
    return ids


def _create(client: "MlflowClient", experiment: str, item: _Wanted, tags: dict[str, str]) -> str:
    from mlflow.entities import Metric, Param

    # The tag that says "complete" comes last: a replay that is killed in between starts this run over.
    draft = tags | {"swconv.content": "incomplete"}
    run = client.create_run(experiment, start_time=item.start, tags=draft, run_name=item.name).info.run_id
    metrics = [Metric(name, value, time, step) for name, value, time, step in item.metrics]
    params = [Param(name, value) for name, value in item.params.items()]
    for start in range(0, len(metrics), BATCH_METRICS):
        client.log_batch(run, metrics[start : start + BATCH_METRICS])
    for start in range(0, len(params), BATCH_PARAMS):
        client.log_batch(run, params=params[start : start + BATCH_PARAMS])
    client.set_terminated(run, end_time=item.end)
    client.set_tag(run, "swconv.content", item.content)
    return run


def _update(client: "MlflowClient", run: "Run", tags: dict[str, str]) -> str:
    from mlflow.entities import RunTag

    changed = [RunTag(name, value) for name, value in tags.items() if run.data.tags.get(name) != value]
    if changed:
        client.log_batch(run.info.run_id, tags=changed)
    return run.info.run_id


def _runs(client: "MlflowClient", experiment: str) -> Iterator["Run"]:
    token = None
    while True:
        page = client.search_runs([experiment], filter_string="tags.`swconv.key` LIKE '%'", page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _experiment(client: "MlflowClient", title: str, database: Path) -> str:
    from mlflow.entities import ViewType

    present = [e for e in client.search_experiments(ViewType.ALL) if e.name == title]
    if not present:
        folder = database.resolve().parent / "mlartifacts" / re.sub(r"\W+", "-", title.lower())
        return client.create_experiment(title, artifact_location=folder.as_uri())
    if present[0].lifecycle_stage == "deleted":
        client.restore_experiment(present[0].experiment_id)
    return present[0].experiment_id


def _client(database: Path) -> "MlflowClient":
    """A client; the first on a new file creates the tables."""
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # their errors are raised too, and told in a sentence
    return MlflowClient(tracking_uri=_uri(database))


def _uri(database: Path) -> str:
    return f"sqlite:///{Path(database).resolve()}"


@contextmanager
def _locked(database: Path) -> Iterator[None]:
    """One replay at a time: processes that create a database at the same time crash."""
    with ExitStack() as stack:
        try:
            database.parent.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(database.with_name(f"{database.name}.lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            raise OSError(_cannot(database, error.strerror)) from error
        yield


@contextmanager
def _one_sentence(database: Path) -> Iterator[None]:
    """Work on a database that can be written; MLflow itself would try for minutes. Faults end in one sentence."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        with closing(sqlite3.connect(database, timeout=LOCK_SECONDS, isolation_level=None)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
        yield
    except (sqlite3.Error, MlflowException, SQLAlchemyError) as error:
        raise OSError(_cannot(database, re.split(r"\. |\n", str(error))[0])) from error


def _cannot(database: Path, got: str) -> str:
    return (
        f"MLflow needs to write the database {database}, got '{got}'; close what else writes to it, check permissions and "
        f"free space, or delete it and make it again: {REFILL}. No result is lost."
    )
