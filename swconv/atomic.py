"""Files that are whole or not there."""

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: Any) -> None:
    """`write_atomic` of indented JSON; a value that is not a number is refused."""
    write_atomic(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def write_atomic(path: Path, content: bytes) -> None:
    """Write beside, flush to disk, rename: the path holds the old content or the new, never a part.

    Raises
    ------
    OSError
        With one sentence when the disk is full or the folder cannot be written; nothing is left behind.
    """
    part = path.with_name(f".{path.name}.part")  # one writer per path; what a killed one left is overwritten
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise OSError(
            f"{path} could not be written: {error.strerror}. Make room or give write permission there, then run the same "
            "command again; what was finished is kept."
        ) from error
