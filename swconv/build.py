"""The verb `build`: run setup.py, then record what was built: compiler, architectures, ptxas figures, library, torch."""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = Path("swconv/_C.abi3.so")
OBJECTS = Path("build/native")  # where setup.py leaves settings.json and *.ptxas.log


class BuildError(RuntimeError):
    """csrc/ could not be compiled or the record not be written; the message is one plain sentence or two."""


def build(out: Path) -> None:
    """Compile csrc/ where it changed, and write the record of the build.

    Parameters
    ----------
    out : Path
        The record, JSON: `compiler` {command, version}; `nvcc`, its version or null, then `without_cuda_because` tells
        why; `architectures`; `kernels`, one entry per CUDA kernel and architecture (`parse_ptxas`); `library` {path,
        bytes, sha256}; `torch`, the version of the headers.

    Raises
    ------
    BuildError
        No compiler, no ninja, sources that do not compile, a folder that cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _alone():
            log = _run_setup()
            record = _record()
        fresh = out.with_name(out.name + ".tmp")
        fresh.write_text(json.dumps(record, indent=2) + "\n")
        fresh.replace(out)
    except OSError as error:
        raise BuildError(
            f"The build needs to write {error.filename or out}, and cannot ({error.strerror}). "
            "Check the folder's owner and the free space."
        ) from error
    sys.stdout.write(log)


def parse_ptxas(log: str) -> list[dict]:
    """Read what `nvcc -Xptxas -v` prints.

    Parameters
    ----------
    log : str

    Returns
    -------
    list of dict
        Per kernel and architecture, sorted: `kernel`, `architecture`, `registers` (per thread), `spill_bytes` (stores
        and loads, per thread), `shared_bytes` (static, per block).
    """
    entries = re.findall(
        r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers([^\n]*)",
        log,
        re.DOTALL,
    )
    kernels = []
    for kernel, architecture, stores, loads, registers, rest in entries:
        shared = re.search(r"(\d+) bytes smem", rest)
        kernels.append({
            "kernel": kernel,
            "architecture": architecture,
            "registers": int(registers),
            "spill_bytes": int(stores) + int(loads),
            "shared_bytes": int(shared.group(1)) if shared else 0,
        })
    return sorted(kernels, key=lambda entry: (entry["kernel"], entry["architecture"]))


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One build at a time: `make setup`, the rule and the tests may meet."""
    (ROOT / OBJECTS).mkdir(parents=True, exist_ok=True)
    with (ROOT / OBJECTS / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _run_setup() -> str:
    log = ROOT / OBJECTS / "build.log"
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=ROOT, env=os.environ | {"PYTHONWARNINGS": "ignore"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )
    log.write_text(done.stdout)
    if done.returncode:
        raise BuildError(f"{_cause(done.stdout)} (all of the output: {log})")
    return done.stdout


def _cause(output: str) -> str:
    """The first compiler errors; where there are none, the last line: setup.py's own sentence."""
    lines = [line for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line or ": error" in line]
    if errors:
        return "csrc/ does not compile:\n" + "\n".join(errors[:5]) + "\nMend the source, or set CXX or CUDA_HOME"
    return lines[-1] if lines else "setup.py failed and printed nothing"


def _ptxas_logs() -> str:
    return "\n".join(path.read_text() for path in sorted((ROOT / OBJECTS).glob("*_cuda.o.ptxas.log")))


def _record() -> dict:
    settings = json.loads((ROOT / OBJECTS / "settings.json").read_text())
    library = (ROOT / LIBRARY).read_bytes()
    return settings | {
        "kernels": parse_ptxas(_ptxas_logs()) if settings["nvcc"] else [],
        "library": {"path": str(LIBRARY), "bytes": len(library), "sha256": hashlib.sha256(library).hexdigest()},
    }
