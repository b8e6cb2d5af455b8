"""After every run: what is current goes into dvc.lock, and its checkpoints go. When DVC asks (via-snakemake), it records."""

import logging

from snakemake.common import NOTHING_TO_BE_DONE_MSG
from snakemake.logging import logger

RECORDED = Path(".snakemake/swconv.recorded")


def current_outputs():
    """Outputs of every job of this command that ran to its end, or that had no reason to run."""
    dag = workflow.dag
    return sorted(str(file) for job in dag.jobs if dag.finished(job) or not dag.needrun(job) for file in job.output)


def state(outputs):
    """Hash of names, sizes and dates of all that dvc.lock speaks of."""
    return sha256(repr([SOURCES, stats(map(Path, [*outputs, "dvc.lock"]))]).encode()).hexdigest()


def record():
    """Record in dvc.lock, unless all is as it was when that was last done. Never fails the run, but for DVC's sake."""
    under_dvc = "SWCONV_UNDER_DVC" in os.environ
    if source_stats() != SOURCES:
        said = "Nothing is recorded in dvc.lock: params/, csrc/, swconv/ or a rule changed during the run; repeat the command."
        if under_dvc:
            sys.exit(said)  # of a command that succeeds DVC would record the edited sources with results of the old ones
        print(said, file=sys.stderr)
        return
    outputs = current_outputs()
    if not under_dvc and RECORDED.exists() and RECORDED.read_text() == state(outputs):
        return
    done = subprocess.run([sys.executable, "workflow/scripts/dvc_sync.py"], input="\n".join(outputs), text=True)
    if done.returncode == 0 and not under_dvc:
        RECORDED.write_text(state(outputs))


class NothingToDo(logging.Filter):
    """Snakemake calls no hook when there is nothing to do; it only says so."""

    def filter(self, message):
        if message.msg == NOTHING_TO_BE_DONE_MSG and not workflow.dryrun and not workflow.touch:
            activate()
            record()
        return True


if workflow.is_main_process:
    logger.addFilter(NothingToDo())
