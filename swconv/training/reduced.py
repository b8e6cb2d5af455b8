"""Images decoded once, at reduced scale: raw pixels in memory-mapped files, with a manifest of their own. Imports no torch.

`reduced/<px>-<mode>-<digest>/` in the data folder, named after the settings and the dataset's manifest, so that what lies
there is never of another dataset. Shards of SHARD images, `<split>-<number>.bin`, hold the pixels one image after another;
`.npy` beside it holds offset, height and width of each, int64 (n, 3), height 0 where the file could not be read.
"""

import csv
import io
import logging
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from swconv.atomic import file_sha256, write_atomic
from swconv.training import manifest

SHARD = 2048  # images
PROBED = 200  # images whose size is read to estimate the room that is needed

_log = logging.getLogger(__name__)


def mode(dataset: dict) -> str:
    """Pillow's mode of a dataset's images: grey or colour."""
    return "L" if dataset["in_chans"] == 1 else "RGB"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def build(dataset: dict, data_dir: Path) -> Path:
    """Decode all images of a dataset with `cache_px` and write them down; finished shards of a killed build are kept.

    Parameters
    ----------
    dataset : dict
        Of a resolved row of params: `cache_px`, the short side in px, `in_chans`, `workers` (processes that decode) and
        `bad_files`.
    data_dir : Path
        Where `manifest.prepare` wrote.

    Returns
    -------
    Path
        The folder, with manifest.csv (path, size, sha256 of every shard) written last.

    Raises
    ------
    ValueError
        An image that cannot be read, by name, unless `bad_files` is "skip".
    OSError
        Too little room, before anything is decoded.
    """
    folder, root = _folder(dataset, data_dir), manifest.read(data_dir)["root"]
    if (folder / "manifest.csv").is_file():
        return folder
    paths = {split: [root / path for path in manifest.samples(data_dir, split)[0]] for split in manifest.SPLITS}
    shards = {folder / f"{split}-{start // SHARD:05}": paths[split][start : start + SHARD]
              for split in manifest.SPLITS for start in range(0, len(paths[split]), SHARD)}
    missing = {shard: part for shard, part in shards.items() if not shard.with_suffix(".npy").is_file()}
    folder.mkdir(parents=True, exist_ok=True)
    _check_room(folder, [path for part in missing.values() for path in part], dataset)
    write = partial(_write_shard, mode(dataset), dataset["cache_px"], dataset["bad_files"] == "skip")
    with _workers(min(dataset["workers"], cores(), len(missing))) as run:
        done = run(write, missing, missing.values())
        for bad in tqdm(done, total=len(missing), desc="data: reduce", unit="shard", disable=None):
            for told in bad:
                _log.warning("%s (bad_files: skip)", told)
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["path", "size", "sha256"])
    for file in (shard.with_suffix(kind) for shard in shards for kind in (".bin", ".npy")):
        rows.writerow([file.name, file.stat().st_size, file_sha256(file)])
    write_atomic(folder / "manifest.csv", table.getvalue().encode())
    for other in folder.parent.iterdir():                             # of other settings, or of the dataset as it was
        if other != folder:
            shutil.rmtree(other)
    return folder


class Reduced:
    """The images of one split, by their place in `manifest.samples`.

    Raises
    ------
    FileNotFoundError, ValueError
        Not built, or not as its manifest says.
    """

    def __init__(self, dataset: dict, data_dir: Path, split: str) -> None:
        self.folder, self.split, self.mode = _folder(dataset, data_dir), split, mode(dataset)
        table = self.folder / "manifest.csv"
        if not table.is_file():
            raise FileNotFoundError(
                f"Dataset '{dataset['name']}' with cache_px: {dataset['cache_px']} needs {table}, got no such file; "
                "run the data rule again (python -m swconv data), or leave cache_px out of params/.")
        with table.open(newline="") as file:
            sizes = {name: int(size) for name, size, _ in list(csv.reader(file))[1:] if name.startswith(f"{split}-")}
        bad = [name for name, size in sizes.items()
               if not (self.folder / name).is_file() or (self.folder / name).stat().st_size != size]
        if bad:
            raise ValueError(f"{table} lists {len(sizes)} files of {split}, got {len(bad)} that differ: "
                             f"{', '.join(bad[: manifest.NAMED])}; delete {self.folder} and run the data rule again.")
        self._shard = lru_cache(None)(self._open)

    def __getitem__(self, index: int) -> Image.Image | None:
        """One image, or None where its file could not be read."""
        pixels, places = self._shard(index // SHARD)
        offset, height, width = places[index % SHARD].tolist()
        if not height:
            return None
        shape = (height, width) if self.mode == "L" else (height, width, 3)
        return Image.fromarray(pixels[offset : offset + int(np.prod(shape))].reshape(shape))

    def __getstate__(self) -> dict:
        """Without the open maps: a worker process opens its own."""
        return {name: value for name, value in vars(self).items() if name != "_shard"}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._shard = lru_cache(None)(self._open)

    def _open(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        shard = self.folder / f"{self.split}-{number:05}"
        return np.memmap(shard.with_suffix(".bin"), np.uint8, "r"), np.load(shard.with_suffix(".npy"))


def _folder(dataset: dict, data_dir: Path) -> Path:
    digest = manifest.read(data_dir)["manifest_sha256"]
    return Path(data_dir) / "reduced" / f"{dataset['cache_px']}-{mode(dataset)}-{digest[:12]}"


def _write_shard(kind: str, short_side: int, skip: bool, shard: Path, paths: list[Path]) -> list[str]:
    """Write one shard, the index last; return the sentences about files that were skipped."""
    places, bad, offset = [], [], 0
    partial_file = shard.with_suffix(".partial")
    with partial_file.open("wb") as file:
        for path in paths:
            try:
                pixels = np.asarray(manifest.read_image(path, kind, short_side))
            except manifest.ImageError as error:
                if not skip:
                    raise
                bad.append(str(error))
                pixels = np.empty((0, 0), np.uint8)
            places.append((offset, *pixels.shape[:2]))
            offset += file.write(pixels.tobytes())
        file.write(b"\0" * (offset == 0))                             # an empty file cannot be mapped
    partial_file.replace(shard.with_suffix(".bin"))
    index = io.BytesIO()
    np.save(index, np.array(places, np.int64))
    write_atomic(shard.with_suffix(".npy"), index.getvalue())
    return bad


def _check_room(folder: Path, paths: list[Path], dataset: dict) -> None:
    """Estimate the bytes to be written from the sizes of some images, and compare with the free space."""
    areas = []
    for path in manifest.evenly(paths, PROBED):
        try:
            with Image.open(path) as image:
                scale = min(1.0, dataset["cache_px"] / min(image.size))
                areas.append(image.size[0] * image.size[1] * scale**2)
        except (OSError, SyntaxError, ValueError):                    # told when it is decoded
            continue
    need = dataset["in_chans"] * len(paths) * sum(areas) / max(1, len(areas))
    free = shutil.disk_usage(folder).free
    if need > free:
        raise OSError(f"cache_px: {dataset['cache_px']} of dataset '{dataset['name']}' needs about {need / 2**30:.1f} GiB in "
                      f"{folder}, got {free / 2**30:.1f} GiB free; make room, lower cache_px, or leave it out.")


@contextmanager
def _workers(count: int) -> Iterator:
    """A `map` over so many processes; with fewer than two, over none."""
    if count < 2:
        yield map
        return
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        try:
            yield pool.map
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
