"""A dataset on disk: make it or find it, check it, and write down what it holds. Imports no torch."""

import csv
import hashlib
import io
import json
import logging
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from swconv.atomic import file_sha256, write_atomic, write_json
from swconv.training import digits

SPLITS = ("train", "val")
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # those torchvision reads
DECODED = 200  # images per split that the data rule decodes
NAMED = 3  # bad files or classes that a sentence names

_log = logging.getLogger(__name__)


class ImageError(ValueError):
    """An image file that cannot be decoded; the message names it."""


def prepare(dataset: dict, out: Path) -> dict:
    """Make or find the images, check them, and write `manifest.csv`, its sha256, and `data.json`.

    Parameters
    ----------
    dataset : dict
        Of a resolved row of params: `name`, `num_classes`, and for "digits" `train_images` and `val_images`, else
        `root`, a folder with train/<class>/ and val/<class>/. The manifest holds the sha256 of digits, and only names
        and sizes of a folder. With `bad_files: skip` unreadable images are told and left where they are.
    out : Path
        Folder for the three files, and for `images/` if they are composed.

    Returns
    -------
    dict
        The content of `data.json`, which is written last.

    Raises
    ------
    FileNotFoundError
        The folder is not there.
    ValueError
        Wrong classes, empty classes or unreadable images, by name.
    """
    out.mkdir(parents=True, exist_ok=True)
    composed = is_composed(dataset)
    if composed:
        root = "images"
        digits.write(out / root, {split: dataset[f"{split}_images"] for split in SPLITS})
    else:
        check_root(dataset)
        root = str(Path(dataset["root"]).absolute())
    files = {split: dict(_files(out / root, split)) for split in SPLITS}
    _check_classes(dataset, out / root, files)
    sampled = [out / root / path for split in SPLITS for path in evenly(list(files[split]), DECODED)]
    check_sample(sampled, dataset.get("bad_files") == "skip")
    table = _manifest(out / root, files["train"] | files["val"], hashed=composed)
    record = {
        "dataset": dataset["name"],
        "root": root,
        "n_train": len(files["train"]),
        "n_val": len(files["val"]),
        "num_classes": dataset["num_classes"],
        "hash_contents": composed,
        "manifest_sha256": hashlib.sha256(table).hexdigest(),
    }
    write_atomic(out / "manifest.csv", table)
    write_atomic(out / "manifest.csv.sha256", (record["manifest_sha256"] + "\n").encode())
    write_json(out / "data.json", record)
    return record


def is_composed(dataset: dict) -> bool:
    """Whether the images are made by us rather than found in a folder."""
    return dataset["name"] == "digits"


def check_root(dataset: dict) -> None:
    """Stop with a sentence if a dataset that the user brings is not there.

    Raises
    ------
    FileNotFoundError
        Says what to put where.
    """
    if is_composed(dataset):
        return
    root = dataset.get("root")
    missing = [split for split in SPLITS if not root or not (Path(root) / split).is_dir()]
    if missing:
        got = f"no {' and no '.join(f'{root}/{split}' for split in missing)}" if root else "no folder"
        raise FileNotFoundError(
            f"Dataset '{dataset['name']}' needs a folder with train/<class>/ and val/<class>/, "
            f"{dataset['num_classes']} classes of images each, got {got}; "
            "put the images there, or set its 'root' in params/ to where they are."
        )


def read(data_dir: Path) -> dict:
    """`data.json`, its `root` made a Path.

    Raises
    ------
    FileNotFoundError
        The data rule has not run.
    """
    path = Path(data_dir) / "data.json"
    if not path.is_file():
        raise FileNotFoundError(f"Training needs the dataset record {path}, got no such file; run the data rule first.")
    try:
        record = json.loads(path.read_text())
        return record | {"root": path.parent / record["root"], "manifest_sha256": record["manifest_sha256"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no dataset record ({error!r}); delete it and run the data rule again.") from None


def samples(data_dir: Path, split: str) -> tuple[list[str], list[str]]:
    """The images that a split's manifest lists, as paths relative to the root, and the classes: both in sorted order.

    Classes first, then files: the order of torchvision's ImageFolder where no class has subfolders.
    """
    parts = sorted(path.split("/") for path, _, _ in _entries(data_dir) if path.startswith(f"{split}/"))
    return ["/".join(part) for part in parts], sorted({part[1] for part in parts})


def verify(data_dir: Path, splits: Sequence[str] = SPLITS) -> None:
    """Compare folders with the manifest: no image is missing or new, and size and (where recorded) sha256 are the same.

    Raises
    ------
    ValueError
        Names the first files that differ.
    """
    root, bad = read(data_dir)["root"], []
    rows = [row for row in _entries(data_dir) if row[0].split("/")[0] in splits]
    found = {path: size for split in splits if (root / split).is_dir() for path, size in _files(root, split)}
    for path, size, sha256 in tqdm(rows, desc="data: verify", unit="file", disable=None):
        there = found.pop(path, None)
        if there is None:
            bad.append(f"{root / path} (missing)")
        elif there != int(size) or (sha256 and sha256 != file_sha256(root / path)):
            bad.append(f"{root / path} (changed)")
    bad += [f"{root / path} (new)" for path in found]
    if bad:
        raise ValueError(
            f"{data_dir}/manifest.csv lists {len(rows)} files of {' and '.join(splits)}, got {len(bad)} that differ: "
            f"{_first(bad)}; restore them or run the data rule again."
        )


def evenly(items: Sequence, count: int) -> Sequence:
    """About `count` of the items, spread evenly over them."""
    return items[:: max(1, len(items) // count)]


def check_sample(paths: list[Path], skip: bool) -> None:
    """Decode some images, so that a damaged copy is noticed before any training.

    Raises
    ------
    ValueError
        Names the first that are unreadable; with `skip` they are logged instead.
    """
    bad = []
    for path in tqdm(paths, desc="data: decode a sample", unit="image", disable=None):
        try:
            read_image(path, "RGB")
        except ImageError:
            bad.append(str(path))
    if bad:
        told = f"got {len(bad)} unreadable among those sampled: {_first(bad)}"
        if not skip:
            raise ValueError(f"The dataset needs readable images, {told}; copy or unpack the dataset again, or set "
                             "bad_files: skip in params/.")
        _log.warning("The dataset needs readable images, %s; bad_files: skip trains without them.", told)


def read_image(path: str | Path, mode: str, short_side: int | None = None) -> Image.Image:
    """Decode one image file.

    Parameters
    ----------
    path : str or Path
    mode : {"L", "RGB"}
        Grey or colour.
    short_side : int, optional
        Reduce a larger image to this many px, bicubic; a JPEG is decoded no finer than needed.

    Raises
    ------
    ImageError
        Missing, truncated, or no image.
    """
    try:
        with Image.open(path) as image:
            if short_side is None or min(image.size) <= short_side:
                return image.convert(mode)
            size = tuple(max(short_side, round(side * short_side / min(image.size))) for side in image.size)
            image.draft(mode, size)
            return image.convert(mode).resize(size, Image.Resampling.BICUBIC)
    except (OSError, SyntaxError, ValueError) as error:  # all three come out of Pillow's decoders
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error).rstrip(".")
        raise ImageError(
            f"{path} needs to be a readable image, got '{reason}'; restore the file or run the data rule again."
        ) from error


def _entries(data_dir: Path) -> list[list[str]]:
    """Rows of the manifest: path, size, sha256."""
    table = Path(data_dir) / "manifest.csv"
    if not table.is_file():
        raise FileNotFoundError(f"Training needs the manifest {table}, got no such file; run the data rule again.")
    with table.open(newline="") as file:
        return list(csv.reader(file))[1:]


def _files(root: Path, folder: str, depth: int = 0) -> Iterator[tuple[str, int]]:
    """Path relative to the root and size of every image in the class folders of a split, sorted folder by folder."""
    for entry in sorted(os.scandir(root / folder), key=lambda entry: entry.name):
        path = f"{folder}/{entry.name}"
        if entry.is_dir():
            yield from _files(root, path, depth + 1)
        elif depth and entry.name.lower().endswith(SUFFIXES):
            yield path, entry.stat().st_size


def _check_classes(dataset: dict, root: Path, files: dict[str, dict[str, int]]) -> None:
    for split in SPLITS:
        classes = {entry.name for entry in os.scandir(root / split) if entry.is_dir()}
        if len(classes) != dataset["num_classes"]:
            raise ValueError(
                f"Dataset '{dataset['name']}' needs {dataset['num_classes']} class folders in {root / split}, "
                f"got {len(classes)}; complete the folder, or correct num_classes in params/."
            )
        empty = sorted(classes - {path.split("/")[1] for path in files[split]})
        if empty:
            raise ValueError(
                f"Dataset '{dataset['name']}' needs at least one image per class in {root / split}, "
                f"got none in {len(empty)} classes: {_first(empty)}; add the missing images."
            )
    train, val = ({path.split("/")[1] for path in files[split]} for split in SPLITS)
    if train != val:
        raise ValueError(
            f"Dataset '{dataset['name']}' needs the same class folders in train and val, "
            f"got some in only one of them: {_first(sorted(train ^ val))}; rename or move them."
        )


def _manifest(root: Path, sizes: dict[str, int], hashed: bool) -> bytes:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["path", "size", "sha256"])
    for path in tqdm(sorted(sizes), desc="data: manifest", unit="file", disable=None):
        table.writerow([path, sizes[path], file_sha256(root / path) if hashed else ""])
    return text.getvalue().encode()


def _first(names: list[str]) -> str:
    return ", ".join(islice(names, NAMED)) + (", ..." if len(names) > NAMED else "")
