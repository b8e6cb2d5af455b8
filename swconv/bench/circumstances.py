"""Where a benchmark runs: what has to be there, what its record tells, and its files, which grow with it."""

import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from swconv import atomic, fingerprint
from swconv.ops import native
from swconv.training import record

log = logging.getLogger(__name__)


def check_ready(device: torch.device, suite: str) -> None:
    """Raise RuntimeError, in a sentence, where the GPU that was asked for or the compiled operators are missing."""
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"bench {suite} --device cuda needs a GPU that torch sees, found none. "
                           "Leave --device out to measure the CPU.")
    if not native.handles(torch.zeros(1, device=device), "strip_mix" if device.type == "cpu" else "shift_add_atomic"):
        raise RuntimeError(f"bench {suite} needs the compiled operators for {device.type}, and they do not load. "
                           "Build them: python -m swconv build.")


def circumstances(suite: str, device: torch.device, module: str, **more: Any) -> dict[str, Any]:
    """Suite, device, engine, load, commit, hardware, versions and flags; and `more`.

    Parameters
    ----------
    module : str
        Of the suite: its code is fingerprinted.
    """
    code = fingerprint.fingerprint(module, csrc=True)
    told = record.circumstances(key="", run="", profile="", seed=0, code=code, config={}, data_sha256="")
    kept = ("git_commit", "git_dirty", "library_sha256", "code", "started", "hardware", "versions", "flags")
    probe = torch.zeros(1, device=device)
    flags = {"cpu_capability": torch.backends.cpu.get_cpu_capability(), "cudnn_benchmark": torch.backends.cudnn.benchmark,
             **{name: os.environ.get(name) for name in ("SWCONV_CPU", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")}}
    versions = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()} if device.type == "cuda" else {}
    kept = {name: told[name] for name in kept}
    return {"suite": suite, "device": device.type, "engine": native.strip_engine(probe),
            "load_before": round(os.getloadavg()[0], 2), **kept, "flags": kept["flags"] | flags,
            "versions": kept["versions"] | versions, **more}


def device_name(record: Mapping[str, Any]) -> str:
    """What the files of a record are called after: cpu, or the name of the GPU, with -quick behind a quick run's."""
    gpu = record["hardware"]["gpu"] if record["device"] == "cuda" else None
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") if gpu else "cpu"
    return f"{name}-quick" if record["quick"] else name


def write_growing(
    records: Iterable[dict[str, Any]], out: Path, suite: str, quick: bool,
    render: Callable[[Mapping[str, Any]], str] | None = None,
) -> tuple[Path, ...]:
    """Write a record as often as it has grown, so that a run that is stopped leaves what it measured.

    Parameters
    ----------
    records : iterable of dict
        The record after each of its parts; `unfinished` names those that are missing.
    out : Path
        A folder, for <suite>-<cpu or name of the GPU>.json, with -quick behind a quick run's name.
    render : callable, optional
        Makes a page of the record, the same name with .md.

    Returns
    -------
    tuple of Path
        What was written.
    """
    for found in records:
        found |= {"quick": quick}
        path = out / f"{suite}-{device_name(found)}.json"
        atomic.write_json(path, found)
        if render:
            atomic.write_atomic(path.with_suffix(".md"), render(found).encode())
    paths = (path, path.with_suffix(".md")) if render else (path,)
    log.info("wrote %s", " and ".join(map(str, paths)))
    return paths


def stopped(found: Mapping[str, Any]) -> str:
    """A paragraph for the page of a record with parts missing; else nothing."""
    missing = found.get("unfinished")
    return f"**Stopped before: {'; '.join(missing)}.** What is missing is left out below.\n\n" if missing else ""
