"""Record in dvc.lock every stage whose outputs Snakemake calls current. Reads their names from stdin, one per line.

Called by workflow/rules/record.smk at the end of a run. Exit code 1 and a warning when DVC is busy or broken: the next
run, or `dvc repro`, records without running anything again.
"""

import json
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


def record(repo: Repo, current: set[str]) -> list[PipelineStage]:
    """Record the stages that are current and differ from dvc.lock; return all that are current."""
    known = params.load(Path("params"))
    with lock_repo(repo):
        stages = [stage for stage in repo.index.stages if is_current(stage, known, current)]
        if changed := [stage for stage in stages if any(stage.changed_entries())]:
            for stage in changed:
                stage.save()
                stage.commit(relink=False)  # a relinked file has a new date
            changed[0].dvcfile.dump_stages(changed, update_pipeline=False)
            print(f"dvc.lock: {len(changed)} stages recorded", file=sys.stderr)
    return stages


def is_current(stage: PipelineStage, known: params.Params, current: set[str]) -> bool:
    asked = targets(known, *asks(stage.cmd))
    return current.issuperset(asked) and all(Path(path).exists() for path in [*asked, *(out.fs_path for out in stage.outs)])


def remove_checkpoints(stages: list[PipelineStage]) -> None:
    """A published and recorded run needs no resumable state, and with it `--forcerun` would train nothing."""
    for stage in stages:
        for out in stage.outs if asks(stage.cmd)[0] == "run" else []:
            for path in Path(out.fs_path).glob("seed*/run.json"):
                key = json.loads(path.read_text()).get("key", "")
                if re.fullmatch("[0-9a-f]+", key):
                    shutil.rmtree(Path("checkpoints", key), ignore_errors=True)


def main() -> None:
    current = set(sys.stdin.read().splitlines())
    for attempt in range(ATTEMPTS):
        try:
            remove_checkpoints(record(Repo(), current))
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
