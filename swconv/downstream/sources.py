"""A benchmark's files on disk: those of the user, or a tiny set that we write; checked, and written down. No torch but to read.

`prepare` leaves data.json, manifest.csv and its sha256 in a folder, as the pretraining's data rule does.
"""

import csv
import hashlib
import io
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from swconv.atomic import file_sha256, write_atomic, write_json
from swconv.downstream import tinydata
from swconv.downstream.tiny_nuscenes import write_tiny_nuscenes
from swconv.training import manifest

WRITERS = {"ade20k": tinydata.write_ade20k, "coco": tinydata.write_coco, "voc": tinydata.write_voc,
           "nuscenes": write_tiny_nuscenes}
HASHED = (".json", ".xml", ".txt")                                    # of a user's files: what says what is in the images
FILES = 3                                                             # names in a sentence
_log = logging.getLogger(__name__)


def prepare(task: str, data: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Find a benchmark's files, or write the tiny ones, and list them.

    Parameters
    ----------
    task : {"ade20k", "coco", "voc", "nuscenes"}
    data : mapping
        The `data` of a resolved row: `root`, a folder, or None for the tiny set; splits; years or version.
    out : Path
        Gets manifest.csv (path, size, and sha256 of annotations and of all tiny files), its sha256, data.json, and the tiny
        files in files/.

    Returns
    -------
    dict
        The content of data.json, which is written last.

    Raises
    ------
    FileNotFoundError, ValueError
        As the benchmark's dataset says it: what is missing where, or what is wrong with it; an image that cannot be read.
    """
    from swconv.downstream.benchmarks import DATASETS

    tiny = data["root"] is None
    if tiny:
        shutil.rmtree(out / "files", ignore_errors=True)
        (out / "files").mkdir(parents=True)
        WRITERS[task](out / "files")
    root = "files" if tiny else str(Path(data["root"]).absolute())
    sets = [DATASETS[task](out / root, data, training) for training in (True, False)]       # says what is missing
    paths = sorted(path for folder in _folders(task, data) for path in (out / root).glob(folder) if path.is_file())
    for suffix in (".jpg", ".png"):
        _check_sample(manifest.evenly([path for path in paths if path.suffix == suffix], manifest.DECODED))
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["path", "size", "sha256"])
    for path in tqdm(paths, desc="data: manifest", unit="file", disable=None):
        name = path.relative_to(out / root).as_posix()
        hashed = tiny or path.suffix in HASHED or name.startswith("annotations/")      # ADE20K's are images
        table.writerow([name, path.stat().st_size, file_sha256(path) if hashed else ""])
    body = text.getvalue().encode()
    record = {"task": task, "root": root, "n_train": len(sets[0]), "n_val": len(sets[1]),
              "manifest_sha256": hashlib.sha256(body).hexdigest()}
    if (wide := getattr(sets[0], "wide", None)) is not None:          # batches hold wide images or high ones
        record["n_train_wide"] = int(wide.sum())
    write_atomic(out / "manifest.csv", body)
    write_atomic(out / "manifest.csv.sha256", (record["manifest_sha256"] + "\n").encode())
    write_json(out / "data.json", record)
    _log.info("%s: %d training and %d validation images", out, record["n_train"], record["n_val"])
    return record


def root_of(data_dir: Path, task: str) -> Path:
    """Where the files lie.

    Raises
    ------
    FileNotFoundError, ValueError
        When the data rule has not run there, or for another task.
    """
    record = manifest.read(data_dir)
    if record.get("task") != task:
        raise ValueError(f"{data_dir}/data.json needs to be of {task}, got {record.get('task')}; give the folder of that task.")
    return record["root"]


def verify(data_dir: Path, task: str) -> None:
    """Compare the files with the manifest: each is there, of its size and, where it is recorded, with its sha256.

    Raises
    ------
    ValueError
        Names the first files that differ.
    """
    root, bad = root_of(data_dir, task), []
    with (data_dir / "manifest.csv").open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    for name, size, digest in tqdm(rows, desc="data: verify", unit="file", disable=None):
        path = root / name
        if not path.is_file():
            bad.append(f"{path} (missing)")
        elif path.stat().st_size != int(size) or (digest and digest != file_sha256(path)):
            bad.append(f"{path} (changed)")
    if bad:
        named = ", ".join(bad[:FILES]) + (", ..." if len(bad) > FILES else "")
        raise ValueError(f"{data_dir}/manifest.csv lists {len(rows)} files, got {len(bad)} that differ: {named}; restore "
                         "them or run the data rule again.")


def _check_sample(paths: Sequence[Path]) -> None:
    """Decode some images and maps of classes, so that a damaged copy is noticed before any training."""
    bad = []
    for path in tqdm(paths, desc="data: decode a sample", unit="image", disable=None):
        try:
            manifest.read_image(path, "RGB")
        except manifest.ImageError:
            bad.append(str(path))
    if bad:
        raise ValueError(f"the dataset needs readable images, got {len(bad)} of {len(paths)} sampled that are not: "
                         f"{', '.join(bad[:FILES])}{', ...' if len(bad) > FILES else ''}; copy or unpack it again.")


def _folders(task: str, data: Mapping[str, Any]) -> list[str]:
    """Patterns of the files that the benchmark reads."""
    splits = sorted({data["train"], data["val"]})
    match task:
        case "ade20k":
            return [f"{kind}/{split}/*" for split in splits for kind in ("images", "annotations")]
        case "coco":
            return [place for split in splits for place in (f"{split}/*", f"annotations/instances_{split}.json")]
        case "voc":
            years = sorted({*data["train_years"], *data["val_years"]})
            return [f"VOC{year}/{kind}/*" for year in years for kind in ("JPEGImages", "Annotations", "ImageSets/Main")]
        case _:
            return [f"{data['version']}/*.json", "samples/CAM_*/*", "maps/*"]
