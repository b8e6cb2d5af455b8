"""Record in dvc.lock every stage whose outputs Snakemake calls current. Reads their names from stdin, one per line.

Their checkpoints go: a published run needs none, and with one a second `--forcerun` would train nothing. Those of a run that
diverged stay, for the last good one to be looked at.

Called by workflow/rules/record.smk at the end of a run. Under DVC, which records on its own, removing is all it does. Exit
code 1 and a warning when DVC is busy or broken: the next run, or `dvc repro`, records without running anything again.
"""

import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

from dvc.exceptions import DvcException
from dvc.lock import LockError
from dvc.repo import Repo, lock_repo
from dvc.scm import SCMError
from dvc.stage import PipelineStage
from stages import asks, params, targets

ATTEMPTS, PAUSE = 6, 2.0  # s


def record(repo: Repo, known: params.Params, current: set[str]) -> None:
    """Record the stages that are current and differ from dvc.lock, each in the one beside its dvc.yaml."""
    with lock_repo(repo):
        stages = [stage for stage in repo.index.stages if is_current(stage, known, current)]
        if changed := [stage for stage in stages if any(stage.changed_entries())]:
            for stage in changed:
                stage.save()
                stage.commit(relink=False)  # a relinked file has a new date
            for path in {stage.path for stage in changed}:
                listed = [stage for stage in changed if stage.path == path]
                listed[0].dvcfile.dump_stages(listed, update_pipeline=False)
            print(f"dvc.lock: {len(changed)} stages recorded", file=sys.stderr)


def is_current(stage: PipelineStage, known: params.Params, current: set[str]) -> bool:
    asked = targets(known, *asks(stage.cmd))
    there = all(Path(path).exists() for path in [*asked, *(out.fs_path for out in stage.outs)])
    return bool(asked) and current.issuperset(asked) and there


def remove_checkpoints(current: set[str]) -> None:
    """Remove the resumable state of every run that is current, whether or not its stage can be recorded."""
    for path in map(Path, current):
        trains = path.match("artifacts/*/train/*/seed*/run.json") or path.match("artifacts/*/finetune/*/seed*/run.json")
        if trains and path.exists():
            record = json.loads(path.read_text())
            key, diverged = record.get("key", ""), record.get("status", "").startswith("diverged")
            if re.fullmatch("[0-9a-f]+", key) and not diverged:
                shutil.rmtree(Path("checkpoints", key), ignore_errors=True)


def main() -> None:
    try:
        known = params.load(Path("params"))
    except params.ParamsError as error:
        sys.exit(str(error))
    current = set(sys.stdin.read().splitlines())
    remove_checkpoints(current)
    if "SWCONV_UNDER_DVC" in os.environ:
        return
    for attempt in range(ATTEMPTS):
        try:
            record(Repo(), known, current)
            return
        except LockError as error:
            reason = error
            time.sleep(PAUSE if attempt < ATTEMPTS - 1 else 0)
        except (DvcException, SCMError, OSError) as error:
            reason = error
            break
    sys.exit(f"warning: dvc.lock is not up to date ({reason}); the next run or `dvc repro` records, and trains nothing.")


if __name__ == "__main__":
    main()
