"""What makes a bare `snakemake` safe, without any option: after a kill -9, a clock that ran ahead, a lost library, on a GPU."""

import fcntl
import shutil
import subprocess
import time
from base64 import urlsafe_b64decode
from contextlib import suppress

LONG_AGO = (1, 1)  # dates of a file that the next command makes anew; 0 would be no date to Snakemake


def hold_guard():
    """Hold a shared lock for as long as this driver lives, and, where no other one does, clean up first.

    Whoever gets the lock for itself alone knows that no other driver lives on this host. Then Snakemake's own locks
    are stale, and so are its marks of unfinished jobs; it would stop and ask for --unlock and --rerun-incomplete.
    """
    state = Path(".snakemake")
    state.mkdir(exist_ok=True)
    guard = open(state / "swconv.guard", "a")
    try:
        fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pass  # another driver lives: Snakemake's own lock decides
    else:
        remove_unfinished(state / "incomplete")
        if any((state / "locks").glob("*.lock")):
            shutil.rmtree(state / "locks")
            print("An earlier run was killed: its lock is removed, and it is taken up where it stopped.", file=sys.stderr)
        clamp_future("artifacts")
        restore_library()
    fcntl.flock(guard, fcntl.LOCK_SH)
    return guard


def remove_unfinished(marks):
    """Remove what jobs published that no driver saw finish: their checkpoints make it again in seconds.

    Pages stay, as old ones: a clone has them without what they are made from. The path of a mark is the name of an output
    in base 64, cut in pieces. Jobs on a cluster outlive the driver; theirs stay.
    """
    for mark in [path for path in marks.rglob("*") if path.is_file()]:
        if json.loads(mark.read_text() or "{}").get("external_jobid") is None:
            name = "".join(part.removeprefix("@") for part in mark.relative_to(marks).parts)
            path = Path(urlsafe_b64decode(name).decode())
            if path.parts[0] == "reports" and path.exists():
                os.utime(path, LONG_AGO)
            elif path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
            mark.unlink()


def clamp_future(root):
    """Set files dated in the future to now: Snakemake would let a job finish and then delete its fresh outputs."""
    now = time.time()
    for folder, _, names in os.walk(root):
        for name in names:
            path = os.path.join(folder, name)
            with suppress(FileNotFoundError):  # a trainer that outlived its driver may be writing here
                if os.stat(path).st_mtime > now + 1:
                    os.utime(path)
                    print(f"{path} was dated in the future; it is set to now.", file=sys.stderr)


def restore_library():
    """Build at once where results are there and the library or its record is not.

    Else the first row that changes would have Snakemake build, and then train all others again too.
    """
    for profile in {path.parts[1] for path in Path("artifacts").glob("*/train/*/seed*/metrics.json")}:
        record, meaning = (Path("artifacts", profile, "build", name) for name in ("build.json", "csrc.meaning"))
        if not (has_library(record) and meaning.exists()):
            print(f"{record} or its library is missing: the operator is built before anything is planned.", file=sys.stderr)
            done = subprocess.run(["python", "-m", "swconv", "build", "--out", record])
            if done.returncode:
                sys.exit(done.returncode)
            meaning.write_text(f"{CSRC}\n")


def has_library(record):
    """Whether the library that a build's record names is there; a record that was cut short names none."""
    try:
        return Path(json.loads(record.read_text())["library"]["path"]).exists()
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


if workflow.is_main_process:
    try:
        GUARD = hold_guard()
    except OSError as error:
        sys.exit(
            f"Snakemake needs to write in {Path.cwd()}, got '{error.strerror}' for {error.filename}. "
            "Check its owner and the free space, or work in a copy of the project that is yours."
        )
    if "gpu" not in workflow.global_resources:
        workflow.register_resource("gpu", max(1, *(profile.gpus for profile in PARAMS.profiles.values())))
