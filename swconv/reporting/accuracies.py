"""Accuracies at the papers' scale for the cells that the papers print: of published weights, and of runs of profile paper.

Those of fine-tunes on the tiny sets belong in no cell of a paper; `tiny_scores` has them for a section of their own.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swconv.reporting.runs import Evidence, read_record, read_values
from swconv.reporting.statistics import mean, sd

PROFILE = "paper"
Place = tuple[str, int, str]  # claims file without its suffix, number of the row, column

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Accuracy:
    """A measured accuracy.

    Attributes
    ----------
    top1 : float
        In %; of a fine-tune the measure that the column prints.
    told : str
        What was measured, and the files that say so.
    """

    top1: float
    told: str


def read_accuracies(
    registry: Mapping[str, Mapping[str, Any]], paper: Path, artifacts: Path = Path("artifacts")
) -> dict[Place, Accuracy]:
    """All accuracies that are on disk, by the cell that they belong in.

    Where published weights were evaluated, the cell shows them and tells of the run too; else the mean of the run's seeds.

    Parameters
    ----------
    registry : mapping
        Rows of params/weights.yaml as plain data.
    paper : Path
        Folder of the claims.
    artifacts : Path

    Raises
    ------
    ValueError
        When a row fills no row of a table, or a column that is not there; or a file that is there cannot be trusted.
    """
    found: dict[Place, list[Accuracy]] = {}
    for name, row in registry.items():
        trained = _trained(row["run"], artifacts) if row["run"] else None
        for fill in row["fills"]:
            measured = [_released(name, row, artifacts, fill["laid_out"]), None if fill["laid_out"] else trained]
            for place in _places(name, fill, paper):
                found.setdefault(place, []).extend(accuracy for accuracy in measured if accuracy)
    return {place: Accuracy(all_[0].top1, "; ".join(each.told for each in all_)) for place, all_ in found.items() if all_}


def read_scores(table: Mapping[str, Any], paper: Path, artifacts: Path = Path("artifacts")) -> dict[Place, Accuracy]:
    """What fine-tunes of profile paper measured, the mean of the seeds that are on disk, by the cell that it belongs in.

    Parameters
    ----------
    table : mapping
        `CostTable` of params/costs.yaml as plain data; `run` and `scores` are read.
    paper : Path
        Folder of the claims.
    artifacts : Path

    Raises
    ------
    ValueError
        When a file that is there cannot be trusted.
    """
    found: dict[Place, Accuracy] = {}
    file = paper / table["claims"]
    with file.open(encoding="utf-8", newline="") as text:
        claims = list(csv.DictReader(text))
    for row in table["rows"]:
        seeds = _fine_tuned(row["run"], PROFILE, artifacts) if row["run"] else []
        for column, measure in table["scores"].items():
            if values := [each[measure] for each in seeds if measure in each]:
                told = f"run {row['run']} of profile {PROFILE}, {_told(values)}, `{_place(row['run'], PROFILE, artifacts)}`"
                found |= {(file.stem, i, column): Accuracy(mean(values), told) for i, claim in enumerate(claims)
                          if all(claim.get(key) == value for key, value in row["of"].items())}
    return found


def tiny_scores(
    table: Mapping[str, Any], profiles: Iterable[str], artifacts: Path = Path("artifacts")
) -> list[tuple[str, str, dict[str, str]]]:
    """What fine-tunes measured on the tiny sets: run, profile, and measure -> mean and number of seeds, as text."""
    lines, runs = [], dict.fromkeys(row["run"] for row in table["rows"] if row["run"])
    for run, profile in ((run, profile) for run in runs for profile in profiles if profile != PROFILE):
        seeds = _fine_tuned(run, profile, artifacts)
        found = {name: [each[name] for each in seeds if name in each] for name in table["scores"].values()}
        if told := {name: _told(values) for name, values in found.items() if values}:
            lines.append((run, profile, told))
    return lines


def _fine_tuned(run: str, profile: str, artifacts: Path) -> list[dict[str, float]]:
    """The measures of every seed that was assessed; of one that diverged only at which step."""
    return [read_values(path) for path in sorted((artifacts / profile / "downstream" / run).glob("seed*/metrics.json"))]


def _place(run: str, profile: str, artifacts: Path) -> str:
    return (artifacts / profile / "downstream" / run / "seed*/metrics.json").relative_to(artifacts.parent).as_posix()


def _told(values: Sequence[float]) -> str:
    spread = "" if len(values) == 1 else f", sd {sd(values):.2f}"
    return f"{mean(values):.2f} (n = {len(values)}{spread})"


def _released(name: str, row: Mapping[str, Any], artifacts: Path, laid_out: bool) -> Accuracy | None:
    folder = artifacts / PROFILE / "released" / name
    record = read_record(folder / "run.json")
    if record is None or not (folder / "metrics.json").exists():
        return None
    model, dataset = record["config"]["model"], record["config"]["dataset"]
    measured = (model["name"], model["args"], dataset["image_size"], dataset["crop_pct"], dataset["crop_mode"])
    if measured != (row["model"], row["args"], row["input"], row["crop_pct"], row["crop_mode"]):
        logger.warning("%s was measured with another row of params/weights.yaml and is left out; repeat: snakemake --cores all "
                       "%s", folder, folder / "metrics.json")
        return None
    values = read_values(folder / "metrics.json")
    top1 = values.get("top1_laid_out" if laid_out else "top1")
    return None if top1 is None else Accuracy(top1, (
        f"published weights {name}{', laid out' if laid_out else ''} ({row['source']}; sha256 {record['source_sha256']}), "
        f"{values['images']:.0f} images, `{(folder / 'run.json').relative_to(artifacts.parent)}`"))


def _trained(run: str, artifacts: Path) -> Accuracy | None:
    results = Evidence.on_disk(PROFILE, [run], artifacts).read(run)
    top1 = results.values("top1")
    return Accuracy(mean(top1), f"run {run} of profile {PROFILE}, {_told(top1)}, `{results.path}`") if top1 else None


def _places(name: str, fill: Mapping[str, Any], paper: Path) -> Iterator[Place]:
    """The cells that a `fills` entry names."""
    file = paper / f"{fill['table']}.csv"
    if not file.is_file():
        raise ValueError(f"params/weights.yaml: weights {name} fill {fill['table']}, and there is no {file}. Correct `table`.")
    with file.open(encoding="utf-8", newline="") as text:
        claims = list(csv.DictReader(text))
    rows = [i for i, claim in enumerate(claims) if all(claim.get(key) == value for key, value in fill["of"].items())]
    columns = [column for column in claims[0] if "acc_pct" in column and fill["column"] in (None, column)]
    if not rows or len(columns) != 1:
        raise ValueError(f"params/weights.yaml: weights {name} need to fill one accuracy column of some rows of {file}, got "
                         f"{len(columns)} columns and {len(rows)} rows. Correct `column` or `of`.")
    yield from ((fill["table"], row, columns[0]) for row in rows)
