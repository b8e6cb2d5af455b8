"""Resumable state of a training, outside every rule's outputs.

checkpoints/<key>/epoch<n>.pt holds all that the next epoch depends on, with a checksum in front; the two newest are kept,
and a damaged one falls back to the one before. A lock keeps a second trainer of the same run waiting.
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


def save(folder: Path, epoch: int, state: dict[str, Any]) -> None:
    """Keep the state after `epoch`, generators included, and the checkpoint before it."""
    buffer = io.BytesIO()
    torch.save({**state, "epoch": epoch, "generators": _generators()}, buffer)
    body = buffer.getvalue()
    write_atomic(folder / f"epoch{epoch:04d}.pt", hashlib.sha256(body).digest() + body)
    for old in _saved(folder)[KEPT:]:
        old.unlink()


def load(folder: Path) -> dict[str, Any] | None:
    """The newest sound state, its generators restored, or None. Says so when a damaged one is passed over."""
    for path in _saved(folder):
        content = path.read_bytes()
        digest, body = content[:_DIGEST], content[_DIGEST:]
        if hashlib.sha256(body).digest() != digest:
            _log.warning("%s is damaged (its checksum differs); falling back to the checkpoint before it", path)
            continue
        state = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
        _restore(state.pop("generators"))
        return state
    return None


def _saved(folder: Path) -> list[Path]:
    return sorted(folder.glob("epoch*.pt"), reverse=True)


def _generators() -> dict[str, Any]:
    name, words, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(words.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _restore(states: dict[str, Any]) -> None:
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    name, array, *rest = states["numpy"]
    np.random.set_state((name, array.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
