"""Finished runs, read from their artifacts: results from metrics.json, circumstances from run.json."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """One seed of one run that finished.

    Attributes
    ----------
    path : str
        Of its metrics.json, from the folder that holds the artifacts.
    seed : int
    values : mapping of str to float
        Results by name; units are in the metrics file (top-1 in %).
    circumstances : dict
        What provenance records of it: keys, commit, hashes, machine, the command that remakes it.
    """

    path: str
    seed: int
    values: Mapping[str, float]
    circumstances: Mapping[str, Any]

    @property
    def diverged(self) -> bool:
        """Whether its training was stopped at the step ``values["diverged"]``, because its loss was none."""
        return "diverged" in self.values and "top1" not in self.values


@dataclass(frozen=True)
class Results:
    """All seeds asked of one run.

    Attributes
    ----------
    path : str
        Of the metrics files, with ``*`` for the seed.
    finished : tuple of Run
    missing : tuple of int
        Seeds that are not there.
    command : str
        Remakes all of them.
    """

    path: str
    finished: tuple[Run, ...]
    missing: tuple[int, ...]
    command: str

    @property
    def ended(self) -> tuple[Run, ...]:
        """Those that did not diverge."""
        return tuple(run for run in self.finished if not run.diverged)

    def values(self, name: str) -> list[float]:
        """The named result of every finished seed that has it, in the order of seeds."""
        return [run.values[name] for run in self.finished if name in run.values]


@dataclass(frozen=True)
class Evidence:
    """The runs of one profile: ``<artifacts>/<profile>/{train,evaluate}/<run>/seed<k>/`` for the named seeds.

    Parameters
    ----------
    profile : str
    seeds : tuple of int
    artifacts : Path
        Relative to the repository root, so that provenance reads the same on every machine.
    """

    profile: str
    seeds: tuple[int, ...]
    artifacts: Path = Path("artifacts")

    @classmethod
    def on_disk(cls, profile: str, runs: Iterable[str], artifacts: Path = Path("artifacts")) -> Evidence:
        """All seeds that any of `runs` was evaluated with."""
        found = [path for run in runs for path in (artifacts / profile / "evaluate" / run).glob("seed*/metrics.json")]
        seeds = {int(match[1]) for path in found if (match := re.fullmatch(r"seed(\d+)", path.parent.name))}
        return cls(profile, tuple(sorted(seeds)), artifacts)

    def read(self, run: str) -> Results:
        """Read exactly the named seeds of one run; what is absent is reported as absent, never raised.

        A training that diverged has ``diverged`` among its values and needs no evaluation.

        Raises
        ------
        ValueError
            If a file is there but cannot be trusted: not JSON, a value that is not a finite number.
        """
        finished, missing = [], []
        for seed in self.seeds:
            evaluated = self.artifacts / self.profile / "evaluate" / run / f"seed{seed}"
            trained = self.artifacts / self.profile / "train" / run / f"seed{seed}"
            training, evaluation = (read_record(folder / "run.json") for folder in (trained, evaluated))
            if (evaluated / "metrics.json").exists() and evaluation is not None:
                finished.append(self._run(run, seed, evaluated, trained, training, evaluation))
            elif training is not None and "diverged" in (read_record(trained / "metrics.json") or {}):
                finished.append(self._run(run, seed, trained, trained, training, {}))
            else:
                missing.append(seed)
                if (evaluated / "metrics.json").exists():
                    logger.warning("%s has no run.json beside it and is reported as not run.", evaluated)
        path = self._name(self.artifacts / self.profile / "evaluate" / run / "seed*" / "metrics.json")
        return Results(path, tuple(finished), tuple(missing), self._remake(run, self.seeds))

    def epochs(self, run: str, seed: int) -> list[dict[str, Any]]:
        """The lines that a training logged at the end of its epochs, oldest first; none where there is no log.

        Raises
        ------
        ValueError
            If a line is not JSON.
        """
        path = self.artifacts / self.profile / "train" / run / f"seed{seed}" / "log.jsonl"
        if not path.exists():
            return []
        try:
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except ValueError as error:
            raise ValueError(f"{path} needs one JSON object per line, got: {error}. Delete it and remake its run.") from error
        return [line for line in lines if "epoch" in line]

    def _run(self, run: str, seed: int, measured: Path, trained: Path, training: dict | None, evaluation: dict) -> Run:
        path = measured / "metrics.json"
        record = training or evaluation  # weights that were not trained here have no training record
        hardware, flags = record.get("hardware", {}), record.get("flags", {})
        return Run(
            path=self._name(path),
            seed=seed,
            values=read_values(path),
            circumstances={
                "key": record.get("key"),
                "evaluate_key": evaluation.get("key"),
                "seed": seed,
                "git_commit": record.get("git_commit"),
                "git_dirty": record.get("git_dirty"),
                "weights_sha256": _digest(trained / "weights.safetensors.sha256"),
                "data_manifest_sha256": record.get("data_manifest_sha256"),
                "lock_sha256": record.get("lock_sha256"),
                "library_sha256": record.get("library_sha256"),
                "machine": {**hardware, "threads": flags.get("threads")},
                "torch": record.get("versions", {}).get("torch"),
                "command": self._remake(run, (seed,)),
            },
        )

    def _remake(self, run: str, seeds: tuple[int, ...]) -> str:
        """Trains the named seeds again, even where they are up to date, evaluates them, and does nothing else."""
        targets = [self.artifacts / self.profile / "evaluate" / run / f"seed{seed}" / "metrics.json" for seed in seeds]
        return " ".join(["snakemake --cores all --forcerun train --", *map(self._name, targets)])

    def _name(self, path: Path) -> str:
        return path.relative_to(self.artifacts.parent).as_posix()


def read_record(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where there is no file; ValueError where it is none."""
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} needs to be JSON, got: {error}. Delete it and remake its run.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} needs to be a JSON object, got a {type(content).__name__}. Remake its run.")
    return content


def read_values(path: Path) -> dict[str, float]:
    """`metrics.json` by name, units left out; ValueError for a value that is no finite number."""
    values = {}
    for name, entry in (read_record(path) or {}).items():
        value = entry.get("value") if isinstance(entry, dict) else None
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(
                f"{path}: {name} needs a finite number as its value, got {entry!r}. "
                "Delete the file and remake the run."
            )
        values[name] = value
    return values


def _digest(path: Path) -> str | None:
    return path.read_text(encoding="utf-8").split()[0] if path.exists() else None
