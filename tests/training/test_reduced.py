"""Images decoded once: the pixels are those of the files, and what is there is whole and of this dataset."""

import csv
import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from swconv import params
from swconv.__main__ import main
from swconv.training import manifest, reduced

PARAMS = Path("params").absolute()

DATASET = {"name": "photos", "num_classes": 2, "in_chans": 3, "cache_px": 20, "workers": 0, "bad_files": "stop"}


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Two classes of three images per split, each of another size, in shards of four."""
    monkeypatch.setattr(reduced, "SHARD", 4)
    for split in manifest.SPLITS:
        for label in range(2):
            place = tmp_path / "photos" / split / f"n{label}"
            place.mkdir(parents=True)
            for i in range(3):
                Image.effect_noise((60 + i, 16 + 9 * i), 60).convert("RGB").save(place / f"{i}.png")
    dataset = DATASET | {"root": str(tmp_path / "photos")}
    manifest.prepare(dataset, tmp_path / "data")
    return dataset, tmp_path / "data"


@pytest.mark.parametrize("in_chans", [1, 3])
def test_pixels_are_those_of_the_reduced_files(photos, in_chans):
    dataset, data = photos
    dataset |= {"in_chans": in_chans}
    reduced.build(dataset, data)
    for split in manifest.SPLITS:
        kept = reduced.Reduced(dataset, data, split)
        for index, path in enumerate(manifest.samples(data, split)[0]):
            wanted = manifest.read_image(manifest.read(data)["root"] / path, reduced.mode(dataset), 20)
            assert kept[index].size == wanted.size
            assert np.array_equal(kept[index], wanted)


def test_processes_write_what_one_writes(photos, monkeypatch):
    dataset, data = photos
    monkeypatch.setattr(reduced, "cores", lambda: 2)
    tables = []
    for workers in (0, 2):
        folder = reduced.build(dataset | {"workers": workers}, data)
        tables.append((folder / "manifest.csv").read_text())
        shutil.rmtree(folder)
    assert tables[0] == tables[1]


def test_the_manifest_holds_size_and_sha256_of_every_shard(photos):
    dataset, data = photos
    folder = reduced.build(dataset, data)
    with (folder / "manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [
        f"{split}-0000{shard}.{kind}" for split in manifest.SPLITS for shard in range(2) for kind in ("bin", "npy")]
    for row in rows:
        content = (folder / row["path"]).read_bytes()
        assert (int(row["size"]), row["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())


def test_a_killed_build_keeps_its_finished_shards(photos, monkeypatch):
    dataset, data = photos
    read, decode, left = [], manifest.read_image, 9                   # shards of 4 and 2 per split: the third one breaks off

    def breaks(path, *args):
        if len(read) == left:
            raise KeyboardInterrupt
        read.append(path)
        return decode(path, *args)

    monkeypatch.setattr(manifest, "read_image", breaks)
    with pytest.raises(KeyboardInterrupt):
        reduced.build(dataset, data)
    left = 100
    folder = reduced.build(dataset, data)
    assert len(read) == 9 + 12 - 6                                    # the 6 of the finished shards were not read again
    assert not list(folder.glob("*.partial"))


def test_the_data_verb_reduces_where_the_profile_says_so(photos, monkeypatch):
    _, data = photos
    monkeypatch.chdir(data.parent)
    shutil.copytree(PARAMS, "params")
    dataset = "{name: photos, root: photos, num_classes: 2, in_chans: 3, mean: [0.5, 0.5, 0.5], std: [1, 1, 1], image_size: 12,"
    dataset += " cache_px: 12}"
    Path("params/profiles/photos.yaml").write_text(f"from: mini\nreports: artifacts/photos/reports\ndataset: {dataset}\n")
    assert main(["data", "--profile", "photos", "--out", "made"]) == 0
    row = params.load().resolve("sw11", "photos")["dataset"]
    assert min(reduced.Reduced(row, Path("made"), "val")[0].size) == 12


def test_a_finished_build_reads_nothing_and_another_one_takes_its_place(photos, monkeypatch):
    dataset, data = photos
    first = reduced.build(dataset, data)
    monkeypatch.setattr(reduced, "_write_shard", None)
    assert reduced.build(dataset, data) == first
    monkeypatch.undo()
    second = reduced.build(dataset | {"cache_px": 10}, data)
    assert second != first
    assert [path.name for path in second.parent.iterdir()] == [second.name]


def test_pixels_of_a_dataset_that_changed_since_are_not_used(photos):
    dataset, data = photos
    reduced.build(dataset, data)
    Image.effect_noise((70, 30), 60).save(data.parent / "photos" / "train" / "n0" / "later.png")
    manifest.prepare(dataset, data)
    with pytest.raises(FileNotFoundError, match="cache_px: 20 needs .*manifest.csv, got no such file; run the data rule again"):
        reduced.Reduced(dataset, data, "train")


def test_a_shard_cut_short_is_named(photos):
    dataset, data = photos
    shard = reduced.build(dataset, data) / "train-00001.bin"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match="got 1 that differ: train-00001.bin; delete"):
        reduced.Reduced(dataset, data, "train")


def test_an_unreadable_image_stops_the_build_or_is_left_empty(photos, caplog):
    dataset, data = photos
    bad = data.parent / "photos" / "train" / "n0" / "1.png"
    bad.write_bytes(b"")
    with pytest.raises(manifest.ImageError, match=f"{bad} needs to be a readable image"):
        reduced.build(dataset, data)
    reduced.build(dataset | {"bad_files": "skip"}, data)
    kept = reduced.Reduced(dataset, data, "train")
    assert [kept[index] is None for index in range(6)] == [False, True, False, False, False, False]
    assert f"{bad} needs to be a readable image" in caplog.text


def test_too_little_room_stops_before_anything_is_decoded(photos, monkeypatch):
    dataset, data = photos
    monkeypatch.setattr(reduced, "_write_shard", None)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(OSError, match="needs about 0.0 GiB in .*, got 0.0 GiB free; make room, lower cache_px"):
        reduced.build(dataset, data)
