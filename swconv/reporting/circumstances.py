"""Under which circumstances a report's runs were made: the header line of a profile, and the footnotes."""

from __future__ import annotations

from collections.abc import Sequence

from swconv.reporting.runs import Results, Run
from swconv.reporting.table import count

KEY_CHARACTERS = 12  # of keys and commits in text; provenance has them whole


def header_line(profile: str, runs: Sequence[Run]) -> str:
    """Profile, seeds, machine, torch and commit; says so where the runs do not share them."""
    if not runs:
        return f"- Profile `{profile}`: not run."
    seeds = sorted({run.seed for run in runs})
    machines = dict.fromkeys(_machine(run) for run in runs)
    versions = dict.fromkeys(f"torch {run.circumstances['torch']}" for run in runs)
    commits = dict.fromkeys(_commit(run) for run in runs)
    text = (
        f"- Profile `{profile}`, {count(len(seeds), 'seed')} ({', '.join(map(str, seeds))}); "
        f"{' / '.join(machines)}; {' / '.join(versions)}; {' / '.join(commits)}."
    )
    mixed = [
        count(len(found), what)
        for found, what in ((machines, "machine setting"), (versions, "torch version"), (commits, "state of the code"))
        if len(found) > 1
    ]
    return text + (f" **Mixed: these runs come from {' and '.join(mixed)}; the footnotes say which.**" if mixed else "")


def footnote(results: Results) -> str:
    """Where the seeds of a run lie, what made them, and the command that remakes them all."""
    groups: dict[str, list[str]] = {}
    for run in results.finished:
        key = (run.circumstances["key"] or "none")[:KEY_CHARACTERS]
        told = f"seed {run.seed} key `{key}`" + (", diverged" if run.diverged else "")
        groups.setdefault(f"{_commit(run)}, {_machine(run)}", []).append(told)
    parts = [f"{', '.join(seeds)}, {made}" for made, seeds in groups.items()]
    parts += [f"seed {seed} not run" for seed in results.missing]
    return f"`{results.path}`: {'; '.join(parts)}. Remake: `{results.command}`."


def _machine(run: Run) -> str:
    machine = run.circumstances["machine"]
    parts = [
        machine.get("cpu") or "unknown cpu",
        count(machine.get("cores") or 0, "core"),
        count(machine.get("threads") or 0, "thread"),
        machine.get("gpu"),
    ]
    return ", ".join(part for part in parts if part)


def _commit(run: Run) -> str:
    commit = run.circumstances["git_commit"]
    dirty = " with uncommitted changes" if run.circumstances["git_dirty"] else ""
    return f"commit `{commit[:KEY_CHARACTERS]}`{dirty}" if commit else "no commit"
