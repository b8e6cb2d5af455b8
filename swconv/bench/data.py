"""Images per second of the training loader on JPEGs of ImageNet's form, and what of a core decoding and augmenting take."""

import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from swconv import atomic
from swconv.bench.circumstances import circumstances, device_name
from swconv.bench.timing import Progress
from swconv.training import manifest, reduced
from swconv.training.data import TrainLoader, eval_transform, train_transform

PHOTOGRAPHS = ("china.jpg", "flower.jpg")                             # of scikit-learn
QUALITY = 95
RECIPE = {"random_resized_crop": True, "hflip": 0.5, "rand_augment": "rand-m9-mstd0.5-inc1"}       # both papers'
SOURCES = {"files": "JPEG files", "reduced": "decoded once, `cache_px: {px}`"}
PARTS = {"decode": "decode the JPEG", "augment": "crop, flip, RandAugment", "decode_reduced": "read the reduced image",
         "augment_reduced": "crop, flip, RandAugment of the reduced image", "validate": "resize and crop for validation"}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes
    ----------
    images : int
        JPEG files, half of them of each class.
    size : tuple of int
        Width and height in px; ImageNet's most frequent.
    crop : int
        Side that the network sees, px.
    reduced : int
        Short side of the reduced images, px.
    batch : int
    workers : tuple of int
        Processes that load; 0 is the training process itself.
    rounds : int
        Epochs of every loader, and turns of every part over all images.
    """

    images: int
    size: tuple[int, int]
    crop: int
    reduced: int
    batch: int
    workers: tuple[int, ...]
    rounds: int


def plan_for(quick: bool) -> Plan:
    """The whole; or, to see that it runs, the same on a few small images, whose numbers say nothing."""
    workers = tuple(sorted({0, 1, reduced.cores()}))
    if quick:
        return Plan(8, (80, 60), 32, 48, 4, workers[:2], 1)
    return Plan(256, (500, 375), 224, 256, 64, workers, 3)


def run(out: Path, device: str = "cpu", quick: bool = False) -> tuple[Path, Path]:
    """Measure, and write data-cpu.json and .md into a folder, with -quick behind a quick run's name.

    Raises
    ------
    ValueError
        For another device than the CPU, which loads the images of every device.
    """
    if device != "cpu":
        raise ValueError(f"bench data measures how the CPU loads images, got --device {device}. Leave --device out.")
    found = measure(plan_for(quick)) | {"quick": quick}
    paths = tuple(out / f"data-{device_name(found)}.{kind}" for kind in ("json", "md"))
    atomic.write_json(paths[0], found)
    atomic.write_atomic(paths[1], render(found).encode())
    log.info("wrote %s and %s", *paths)
    return paths


def measure(plan: Plan) -> dict[str, Any]:
    """All that the report tells: circumstances, size of the files, `parts` in ms per image, `loaders` in images per second."""
    start, threads = time.perf_counter(), torch.get_num_threads()
    told = circumstances("data", torch.device("cpu"), "swconv.bench.data", plan=asdict(plan))
    bar = Progress(2 + plan.rounds)
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            bar.step("making JPEG files")
            dataset = {"name": "photographs", "root": f"{folder}/images", "num_classes": 2, "in_chans": 3, "cache": False,
                       "image_size": plan.crop, "crop_pct": 0.875, "interpolation": "bicubic", "mean": [0.5] * 3,
                       "bad_files": "stop", "workers": 0}
            paths = make_photographs(Path(dataset["root"]), plan.images, plan.size)
            told["file_bytes"] = statistics.mean(path.stat().st_size for path in paths)
            small = dataset | {"cache_px": plan.reduced}
            manifest.prepare(dataset, Path(folder))
            reduced.build(small, Path(folder))
            bar.step("decoding and augmenting on one core")
            told["parts"] = _parts(dataset, small, Path(folder), paths, plan.rounds)
            told["loaders"] = _loaders({"files": dataset, "reduced": small}, Path(folder), plan, bar)
    finally:
        torch.set_num_threads(threads)
    bar.close()
    return told | {"seconds": time.perf_counter() - start}


def make_photographs(root: Path, count: int, size: tuple[int, int]) -> list[Path]:
    """Write crops of two photographs as train/<class>/*.JPEG, and one of each as val/<class>/; return those of train.

    The same crops on every machine: between half and all of a photograph's sides, of the aspect that is asked for.
    """
    from sklearn.datasets import load_sample_image  # a second to import

    photographs, rng, paths = [Image.fromarray(load_sample_image(name)) for name in PHOTOGRAPHS], np.random.RandomState(0), []
    wanted = [("train", number) for number in range(count)] + [("val", number) for number in range(2)]
    for split, number in wanted:
        photograph, path = photographs[number % 2], root / split / f"n{number % 2}" / f"{number:05}.JPEG"
        share = rng.uniform(0.5, 1.0) * min(photograph.width / size[0], photograph.height / size[1])
        width, height = int(share * size[0]), int(share * size[1])
        left, top = rng.randint(photograph.width - width + 1), rng.randint(photograph.height - height + 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph.resize(size, Image.Resampling.BICUBIC, (left, top, left + width, top + height)).save(path, quality=QUALITY)
        paths += [path] if split == "train" else []
    return paths


def _parts(dataset: dict, small: dict, folder: Path, paths: Sequence[Path], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds per image of each part in this process, over all images in every round: median and range of the rounds."""
    train, evaluate = train_transform(dataset, RECIPE), eval_transform(dataset)
    kept = reduced.Reduced(small, folder, "train")
    names, _ = manifest.samples(folder, "train")
    place = {Path(dataset["root"]) / name: index for index, name in enumerate(names)}
    images = [manifest.read_image(path, "RGB") for path in paths]
    little = [kept[place[path]] for path in paths]
    calls: dict[str, Callable[[int], Any]] = {
        "decode": lambda i: manifest.read_image(paths[i], "RGB"),
        "augment": lambda i: train(images[i]),
        "decode_reduced": lambda i: kept[place[paths[i]]].copy(),
        "augment_reduced": lambda i: train(little[i]),
        "validate": lambda i: evaluate(images[i]),
    }
    found: dict[str, list[float]] = {name: [] for name in calls}
    for name, call in list(calls.items()) * rounds:
        began = time.perf_counter()
        for i in range(len(paths)):
            call(i)
        found[name].append(1e3 * (time.perf_counter() - began) / len(paths))
    return {name: {"median_ms": statistics.median(ms), "least_ms": min(ms), "most_ms": max(ms)} for name, ms in found.items()}


def _loaders(sources: Mapping[str, dict], folder: Path, plan: Plan, bar: Progress) -> list[dict[str, Any]]:
    """Images per second of an epoch of every loader, in turn in every round, after one to start its processes."""
    recipe = RECIPE | {"batch_size": plan.batch}
    loaders = {(name, workers): TrainLoader(dataset | {"workers": workers}, recipe, folder, seed=0)
               for name, dataset in sources.items() for workers in plan.workers}
    rates: dict[tuple[str, int], list[float]] = {key: [] for key in loaders}
    for epoch in range(plan.rounds + 1):
        if epoch:
            bar.step(f"loaders, round {epoch} of {plan.rounds}")
        for key, loader in loaders.items():
            began = time.perf_counter()
            count = sum(len(images) for images, _ in loader.epoch(epoch))
            if epoch:
                rates[key].append(count / (time.perf_counter() - began))
    return [{"source": name, "workers": workers, "images_per_second": statistics.median(found), "least": min(found),
             "most": max(found), "per_core": statistics.median(found) / max(1, workers)}
            for (name, workers), found in rates.items()]


def render(record: Mapping[str, Any]) -> str:
    """The page of `measure`'s record."""
    plan, hardware = record["plan"], record["hardware"]
    trial = "**A trial on small images, to see that it runs; its numbers say nothing.**\n\n" if record["quick"] else ""
    changed = ", with changes that are not committed" if record["git_dirty"] else ""
    width, height = plan["size"]
    loaders = [[SOURCES[row["source"]].format(px=plan["reduced"]), row["workers"] or "none: in the training process",
                f"{row['images_per_second']:.0f} ({row['least']:.0f}-{row['most']:.0f})", f"{row['per_core']:.0f}"]
               for row in record["loaders"]]
    parts = [[title, f"{row['median_ms']:.2f} ({row['least_ms']:.2f}-{row['most_ms']:.2f})", f"{1e3 / row['median_ms']:.0f}"]
             for part, title in PARTS.items() for row in [record["parts"][part]]]
    return f"""# Loading images on {hardware['cores']} cores of {hardware['cpu']}

{trial}Made by `python -m swconv bench data` at {record['started']} in {record['seconds']:.0f} s; commit \
{record['git_commit'] or 'unknown'}{changed}. Load before: {record['load_before']}. Versions: \
{', '.join(f'{name} {version}' for name, version in record['versions'].items() if version is not None)}.

{plan['images']} JPEGs of {width}x{height} px, {record['file_bytes'] / 1e3:.0f} kB each on average (crops of two photographs, \
quality {QUALITY}), made into training images of {plan['crop']} px as both papers do: random resized crop, bicubic, flip, \
{RECIPE['rand_augment']}. Files lie in the page cache.

## The loader

Batches of {plan['batch']}; medians and range over {plan['rounds']} epochs, in turn with the other loaders.

{_table(['images from', 'worker processes', 'images per second', 'per core'], loaders)}

## One core

Each part alone, in one process; medians and range over {plan['rounds']} turns over all images.

{_table(['part', 'ms per image', 'images per second'], parts)}
"""


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
