"""What makes a bare `snakemake` safe after a kill -9, a clock that runs ahead, and on one GPU, without any option."""

import fcntl
import os
import shutil
import time
from base64 import urlsafe_b64decode


def hold_guard():
    """Hold a shared lock for as long as this driver lives, and clean up after dead ones.

    Whoever gets the lock for itself alone knows that no other driver lives on this host. Then Snakemake's own locks
    are stale, and outputs still marked incomplete were published by a job that nobody saw finish: its checkpoint
    makes them again in seconds, where Snakemake would stop and ask for --unlock and --rerun-incomplete.
    """
    state = Path(".snakemake")
    state.mkdir(exist_ok=True)
    guard = open(state / "swconv.guard", "a")
    try:
        fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pass  # another driver lives: Snakemake's own lock decides
    else:
        if any((state / "locks").glob("*.lock")):
            shutil.rmtree(state / "locks")
            remove_incomplete(state / "incomplete")
            print("An earlier run was killed: its lock is removed, and it is taken up where it stopped.", file=sys.stderr)
    fcntl.flock(guard, fcntl.LOCK_SH)
    return guard


def remove_incomplete(markers):
    """Remove what jobs of a killed driver published; a marker's path is the output's name in base 64, cut in pieces."""
    for marker in [path for path in markers.rglob("*") if path.is_file()]:
        name = "".join(part.removeprefix("@") for part in marker.relative_to(markers).parts)
        output = Path(urlsafe_b64decode(name).decode())
        if output.is_file():
            output.unlink()


def clamp_future(root):
    """Set files dated in the future to now: Snakemake would let a job finish and then delete its fresh outputs."""
    now = time.time()
    for folder, _, names in os.walk(root):
        for name in names:
            path = os.path.join(folder, name)
            if os.stat(path).st_mtime > now + 1:
                os.utime(path)
                print(f"{path} was dated in the future; it is set to now.", file=sys.stderr)


if workflow.is_main_process:
    GUARD = hold_guard()
    clamp_future("artifacts")
    if "gpu" not in workflow.global_resources:
        workflow.register_resource("gpu", 1)
