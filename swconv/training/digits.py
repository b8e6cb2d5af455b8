"""The mini task "digit pointer": real scanned digits, a label that only far-apart places give away.

Four digits and a plus-shaped marker lie on a 6 x 6 grid of 8 x 8 pixel cells. The label is the class of the only digit
that shares the marker's row or column, two to five cells away. The digits are scikit-learn's 8 x 8 scans.
"""

import errno
import os
import shutil
import struct
import zlib
from functools import cache
from pathlib import Path

import numpy as np
from tqdm import tqdm

CELL, GRID = 8, 6
SIZE = CELL * GRID  # 48 pixels
CLASSES = 10
DISTANCES = (2, 3, 4, 5)  # cells between marker and target: 16 to 40 pixels
NOISE = 8.0  # standard deviation of the grey value, of 255
SEEDS = {"train": 1, "val": 2}
SOURCES = {"train": slice(0, 1297), "val": slice(1297, 1797)}  # scans; the splits share none
DISTRACTORS = 3
DIRECTIONS = ((0, -1), (0, 1), (-1, 0), (1, 0))


def compose(split: str, count: int, seed: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw the first `count` images of a split.

    The stream is one `numpy.random.RandomState`, whose numbers are frozen across numpy versions, drawn image by image:
    a smaller `count` gives a prefix of a larger one.

    Parameters
    ----------
    split : {"train", "val"}
        Which scans the digits are taken from.
    count : int
        Number of images; label i is i mod 10.
    seed : int, optional
        Seed of the stream; by default the split's own.

    Returns
    -------
    images : uint8 array of shape (count, 48, 48)
    labels : int64 array of shape (count,)
    distances : int64 array of shape (count,)
        From marker to target, in cells.
    """
    rng = np.random.RandomState(SEEDS[split] if seed is None else seed)
    scans = _scans(split)
    images = np.empty((count, SIZE, SIZE), np.uint8)
    labels = np.arange(count) % CLASSES
    distances = np.empty(count, np.int64)
    for i, label in enumerate(labels):
        images[i], distances[i] = _compose_one(rng, scans, label)
    return images, labels, distances


def write(out: Path, counts: dict[str, int]) -> None:
    """Write both splits as an ImageFolder of grey PNGs, `out/<split>/<digit>/<index>_d<distance>.png`.

    The folder appears whole or not at all; one that is there already is replaced. The same counts give the same bytes
    on every machine.

    Parameters
    ----------
    out : Path
        Folder to make.
    counts : dict of str to int
        Images of "train" and of "val".

    Raises
    ------
    OSError
        The disk is full or the folder cannot be written.
    """
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for split, count in counts.items():
            _write_split(partial / split, split, count)
        shutil.rmtree(out, ignore_errors=True)
        os.replace(partial, out)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        room = f"{sum(counts.values()) * 4 // 1024 + 1} MiB"
        need = room if error.errno == errno.ENOSPC else "write permission"
        raise OSError(
            f"Writing the digit images needs {need} in {out.parent}, got '{error.strerror}'; "
            "make room or choose another folder, and run the data rule again."
        ) from error


def _write_split(folder: Path, split: str, count: int) -> None:
    images, labels, distances = compose(split, count)
    for label in range(CLASSES):
        (folder / str(label)).mkdir(parents=True)
    for i in tqdm(range(count), desc=f"data: {split} images", unit="image", disable=None):
        (folder / str(labels[i]) / f"{i:05d}_d{distances[i]}.png").write_bytes(_png(images[i]))


@cache
def _scans(split: str) -> list[np.ndarray]:
    """Grey values 0 to 255 of a split's scans, per class: arrays of shape (n, 8, 8)."""
    from sklearn.datasets import load_digits  # a second to import, and only the data rule needs it

    digits = load_digits()
    part = SOURCES[split]
    grey = np.round(digits.images[part] * (255 / 16)).astype(np.uint8)
    return [grey[digits.target[part] == label] for label in range(CLASSES)]


def _compose_one(rng: np.random.RandomState, scans: list[np.ndarray], label: int) -> tuple[np.ndarray, int]:
    # The distance comes first: redrawn together with the position, large distances would be rare.
    distance = DISTANCES[rng.randint(len(DISTANCES))]
    row, column, target = _draw_places(rng, distance)
    others = [c for c in range(CLASSES) if c != label]
    elsewhere = [(r, c) for r in range(GRID) for c in range(GRID) if r != row and c != column]
    classes = [others[k] for k in rng.permutation(len(others))[:DISTRACTORS]]
    cells = [elsewhere[k] for k in rng.permutation(len(elsewhere))[:DISTRACTORS]]

    canvas = np.zeros((SIZE, SIZE))
    _cell(canvas, row, column)[1:7, 3:5] = 255
    _cell(canvas, row, column)[3:5, 1:7] = 255
    for digit, place in zip([label, *classes], [target, *cells], strict=True):
        _cell(canvas, *place)[:] = scans[digit][rng.randint(len(scans[digit]))]
    canvas += NOISE * rng.standard_normal((SIZE, SIZE))
    return np.round(canvas.clip(0, 255)).astype(np.uint8), distance


def _draw_places(rng: np.random.RandomState, distance: int) -> tuple[int, int, tuple[int, int]]:
    """Marker row and column, and the target's cell `distance` away, uniform over all that fit."""
    while True:
        row, column, direction = rng.randint(GRID), rng.randint(GRID), DIRECTIONS[rng.randint(len(DIRECTIONS))]
        target = (row + distance * direction[0], column + distance * direction[1])
        if min(target) >= 0 and max(target) < GRID:
            return row, column, target


def _cell(canvas: np.ndarray, row: int, column: int) -> np.ndarray:
    return canvas[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]


def _png(image: np.ndarray) -> bytes:
    """Grey 8-bit PNG, stored without compression: how zlib builds compress differs, and the manifest holds the hash."""
    height, width = image.shape
    header = struct.pack(">2I5B", width, height, 8, 0, 0, 0, 0)
    rows = np.pad(image, ((0, 0), (1, 0))).tobytes()  # each row starts with filter type 0
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 0)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
