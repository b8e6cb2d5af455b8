"""The circumstances of a result: what `run.json` holds beside `metrics.json`."""

import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy
import timm
import torch
import torchvision

from swconv.ops import native

LOCK = Path("requirements.lock")
# What a result is made from; reports and the active profile change with every run.
SOURCES = ("swconv", "csrc", "setup.py", "params", "workflow", "Snakefile", str(LOCK), ":!params/active.yaml")


def circumstances(*, key: str, run: str, profile: str, seed: int, code: str, config: Mapping[str, Any],
                  data_sha256: str) -> dict[str, Any]:
    """All that is known when a job starts; the job adds `seconds` and what it found.

    Parameters
    ----------
    key, code : str
        The run's key and the fingerprint of the code that makes it.
    config : mapping
        The resolved row.
    data_sha256 : str
        Of the dataset's manifest.
    """
    commit = _git("rev-parse", "HEAD")
    return {
        "key": key,
        "run": run,
        "profile": profile,
        "seed": seed,
        "git_commit": commit,
        "git_dirty": bool(_git("status", "--porcelain", "--untracked-files=no", "--", *SOURCES)) if commit else None,
        "lock_sha256": hashlib.sha256(LOCK.read_bytes()).hexdigest() if LOCK.exists() else None,
        "data_manifest_sha256": data_sha256,
        "library_sha256": native.library_sha256(),
        "code": code,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__),
                     "torchvision": torchvision.__version__, "timm": timm.__version__, "numpy": numpy.__version__},
        "flags": {
            "threads": torch.get_num_threads(),
            "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
            "tf32_cudnn": torch.backends.cudnn.allow_tf32,
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        },
        "config": config,
    }


def hardware() -> dict[str, Any]:
    """Processor, memory and accelerator of this machine."""
    return {
        "machine": platform.machine(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }


def values(**metrics: tuple[float, str]) -> dict[str, dict[str, Any]]:
    """`metrics.json` from name=(value, unit)."""
    return {name: {"value": value, "unit": unit} for name, (value, unit) in sorted(metrics.items())}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
