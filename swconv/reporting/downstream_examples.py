"""One fine-tune per task, side by side: what it reached, what it had to, and which run it was."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from swconv.atomic import write_atomic

HEADLINE = {"ade20k": ("mIoU",), "coco": ("AP50_box", "AP50_mask"), "voc": ("mAP",), "nuscenes": ("mAP", "NDS")}


def build(artifacts: Path, rows: Sequence[tuple[str, str, Mapping[str, float]]], seed: int, out: Path,
          command: str) -> None:
    """Write the table of a profile.

    Parameters
    ----------
    artifacts : Path
        Of the profile; below it finetune/<run>/seed<k>/ and downstream/<run>/seed<k>/ with metrics.json and run.json.
    rows : sequence of (task, run, targets)
        Targets by name of the metric; none where nothing has to be reached.
    out : Path
        Of the Markdown file.
    command : str
        What makes it.

    Raises
    ------
    ValueError
        When a target is missed; names each. The table is written then too.
    """
    missed = []
    lines = ["| task | run | measure | wanted | found | unit | reached | steps | minutes | code | commit |",
             "|---|---|---|---|---|---|---|---|---|---|---|"]
    for task, run, targets in rows:
        trained, judged = (_read(artifacts / stage / run / f"seed{seed}") for stage in ("finetune", "downstream"))
        steps = trained["metrics"].get("steps", trained["metrics"].get("diverged"))["value"]
        facts = (steps, f"{trained['run']['seconds'] / 60:.1f}", trained["run"]["code"], _commit(trained["run"]))
        for name in HEADLINE[task]:
            found, wanted = judged["metrics"].get(name), targets.get(name)
            lines.append(_line(task, run, name, wanted, found, facts))
            if not _reached(found, wanted):
                missed.append(f"{name} of {run} with {_shown(found)} for {wanted:g}")
    setting = json.loads((artifacts / "finetune" / rows[0][1] / f"seed{seed}" / "run.json").read_text())
    text = "\n".join([
        "# One fine-tune per task", "",
        f"Profile `{setting['profile']}`, seed {seed}: networks and sets of images are tiny, and no number here stands for a "
        "benchmark's. Where a number is wanted, the network is trained and evaluated on the same images, so that targets, "
        "losses, decoding and evaluation have to belong together.", "", *lines, "",
        f"Made by `python -m swconv downstream-table` from metrics.json and run.json of each run, on "
        f"{setting['hardware']['cpu']}, threads: {setting['flags']['threads']}. Remake: `{command}`.", ""])
    write_atomic(out, text.encode())
    if missed:
        raise ValueError(f"every target of the profile needs to be reached, got {', '.join(missed)}. Look at the losses in "
                         "log.jsonl of these runs.")


def equal_seeds(finetuned: Path, assessed: Path, seed: int) -> list[int]:
    """A run's seeds that are there and differ from this one in nothing but the seed: equal configuration, code and data.

    Parameters
    ----------
    finetuned, assessed : Path
        artifacts/<profile>/finetune/<run> and artifacts/<profile>/downstream/<run>.
    """
    told = {int(path.parent.name.removeprefix("seed")): json.loads(path.read_text())
            for path in sorted(finetuned.glob("seed*/run.json")) if (assessed / path.parent.name / "metrics.json").exists()}
    same = ("config", "code", "data_manifest_sha256")
    return [seed, *(other for other in sorted(told) if other != seed and seed in told
                    and all(told[other][key] == told[seed][key] for key in same))]


def _line(task: str, run: str, name: str, wanted: float | None, found: Mapping[str, Any] | None, facts: Sequence[Any]) -> str:
    reached = "" if wanted is None else "yes" if _reached(found, wanted) else "**no**"
    cells = [task, run, name, "" if wanted is None else f"{wanted:g}", _shown(found), found["unit"] if found else "", reached,
             *facts]
    return f"| {' | '.join(map(str, cells))} |"


def _reached(found: Mapping[str, Any] | None, wanted: float | None) -> bool:
    return wanted is None or (found is not None and found["value"] >= wanted)


def _shown(found: Mapping[str, Any] | None) -> str:
    return f"{found['value']:.2f}" if found else "none"


def _read(folder: Path) -> dict[str, Any]:
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in ("metrics", "run")}


def _commit(run: Mapping[str, Any]) -> str:
    return (run["git_commit"] or "none")[:8] + (" + changes" if run["git_dirty"] else "")
