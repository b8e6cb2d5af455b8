"""A dataset on disk: make it or find it, check it, and write down what it holds. Imports no torch."""

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from swconv.atomic import write_atomic, write_json
from swconv.training import digits

SPLITS = ("train", "val")
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # those torchvision reads
DECODED = 200  # images per split that are decoded before anything is trained
NAMED = 3  # bad files or classes that a sentence names


class ImageError(ValueError):
    """An image file that cannot be decoded; the message names it."""


def prepare(dataset: dict, out: Path) -> dict:
    """Make or find the images, check them, and write `manifest.csv`, its sha256, and `data.json`.

    Parameters
    ----------
    dataset : dict
        Of a resolved row of params: `name`, `num_classes`, and for "digits" `train_images` and `val_images`, else
        `root`, a folder with train/<class>/ and val/<class>/. The manifest holds the sha256 of digits, and only names
        and sizes of a folder.
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
    files = {split: list(_files(out / root, split)) for split in SPLITS}
    _check_classes(dataset, out / root, files)
    _check_sample(out / root, files)
    table = _manifest(out / root, [path for split in SPLITS for path in files[split]], hashed=composed)
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


def verify(data_dir: Path) -> None:
    """Compare every file with the manifest: it is there, and size and (where recorded) sha256 are the same.

    Raises
    ------
    ValueError
        Names the first files that differ.
    """
    root, table = read(data_dir)["root"], Path(data_dir) / "manifest.csv"
    if not table.is_file():
        raise FileNotFoundError(f"Training needs the manifest {table}, got no such file; run the data rule again.")
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    bad = []
    for row in tqdm(rows, desc="data: verify", unit="file", disable=None):
        path = root / row["path"]
        if not path.is_file():
            bad.append(f"{path} (missing)")
        elif path.stat().st_size != int(row["size"]) or (row["sha256"] and row["sha256"] != _sha256(path)):
            bad.append(f"{path} (changed)")
    if bad:
        raise ValueError(
            f"{data_dir}/manifest.csv lists {len(rows)} files, got {len(bad)} that differ: {_first(bad)}; "
            "restore them or run the data rule again."
        )


def read_image(path: str | Path, mode: str) -> Image.Image:
    """Decode one image file.

    Parameters
    ----------
    path : str or Path
    mode : {"L", "RGB"}
        Grey or colour.

    Raises
    ------
    ImageError
        Missing, truncated, or no image.
    """
    try:
        with Image.open(path) as image:
            return image.convert(mode)
    except (OSError, SyntaxError, ValueError) as error:  # all three come out of Pillow's decoders
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error).rstrip(".")
        raise ImageError(
            f"{path} needs to be a readable image, got '{reason}'; restore the file or run the data rule again."
        ) from error


def _files(root: Path, split: str) -> Iterator[str]:
    """Paths of a split's images relative to the root, sorted."""
    for folder, subfolders, names in os.walk(root / split, followlinks=True):
        subfolders.sort()
        relative = Path(folder).relative_to(root)
        if relative != Path(split):
            yield from (f"{relative.as_posix()}/{name}" for name in sorted(names) if name.lower().endswith(SUFFIXES))


def _check_classes(dataset: dict, root: Path, files: dict[str, list[str]]) -> None:
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


def _check_sample(root: Path, files: dict[str, list[str]]) -> None:
    """Decode images spread evenly over each split, so that a damaged copy is noticed before any training."""
    bad = []
    for split in SPLITS:
        stride = max(1, len(files[split]) // DECODED)
        for path in tqdm(files[split][::stride], desc=f"data: decode {split}", unit="image", disable=None):
            try:
                read_image(root / path, "RGB")
            except ImageError:
                bad.append(str(root / path))
    if bad:
        raise ValueError(
            f"The dataset needs readable images, got {len(bad)} unreadable among those sampled: {_first(bad)}; "
            "copy or unpack the dataset again."
        )


def _manifest(root: Path, paths: list[str], hashed: bool) -> bytes:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["path", "size", "sha256"])
    for path in tqdm(sorted(paths), desc="data: manifest", unit="file", disable=None):
        table.writerow([path, (root / path).stat().st_size, _sha256(root / path) if hashed else ""])
    return text.getvalue().encode()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _first(names: list[str]) -> str:
    return ", ".join(islice(names, NAMED)) + (", ..." if len(names) > NAMED else "")
