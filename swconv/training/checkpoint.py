"""Resumable state of a training, outside every rule's outputs.

checkpoints/<key>/epoch<n>[_step<m>].pt holds all that the step after epoch n, step m depends on, with a checksum in front;
the two newest are kept, and a damaged one, set aside, falls back to the one before. A lock keeps a second trainer of the same
run waiting.
"""

import fcntl
import hashlib
import io
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from swconv.atomic import write_atomic

KEPT = 2
_DIGEST = hashlib.sha256().digest_size
_log = logging.getLogger(__name__)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; wait while another process trains the same run."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.info("another process trains this run (%s); waiting for it", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def save(folder: Path, epoch: int, step: int, state: dict[str, Any]) -> None:
    """Keep the state after `epoch` whole epochs and `step` steps of the next one, and the checkpoint before it."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    body = buffer.getvalue()
    name = f"epoch{epoch:04d}" + (f"_step{step:06d}" if step else "") + ".pt"
    write_atomic(folder / name, hashlib.sha256(body).digest() + body)
    for old in _saved(folder)[KEPT:]:
        old.unlink()


def newest(folder: Path) -> Path | None:
    """The newest sound checkpoint, or None. A damaged one is set aside, so that it does not count as kept, and told of."""
    for path in _saved(folder):
        if _body(path) is not None:
            return path
        aside = path.replace(path.with_name(f"{path.name}.damaged"))
        _log.warning("%s is damaged (its checksum differs), now %s; falling back to the checkpoint before it", path, aside.name)
    return None


def load(path: Path) -> dict[str, Any]:
    """The state in a checkpoint that `newest` found.

    Raises
    ------
    ValueError
        If it was damaged since.
    """
    if (body := _body(path)) is None:
        raise ValueError(f"{path} is damaged: its checksum differs. Run the same command again to go on from the one before.")
    return torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)


def generators() -> dict[str, Any]:
    """States of Python's, numpy's, torch's and CUDA's global generators, as `torch.load(weights_only=True)` takes them."""
    name, words, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(words.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_generators(states: dict[str, Any]) -> None:
    """Put the global generators where `generators` found them."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    name, array, *rest = states["numpy"]
    np.random.set_state((name, array.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _saved(folder: Path) -> list[Path]:
    return sorted(folder.glob("epoch*.pt"), reverse=True)             # "_" sorts behind ".": a step is newer than its epoch


def _body(path: Path) -> bytes | None:
    """What the checksum speaks for, or None where it speaks against it."""
    content = path.read_bytes()
    return content[_DIGEST:] if hashlib.sha256(content[_DIGEST:]).digest() == content[:_DIGEST] else None
