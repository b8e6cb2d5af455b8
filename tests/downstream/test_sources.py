"""What the data rule finds, writes down, and refuses."""

import csv
import hashlib
import json
import shutil

import pytest

from swconv.downstream import sources

IMAGES = {"ade20k": (16, 8), "coco": (15, 8), "voc": (16, 8), "nuscenes": (8, 8)}


@pytest.mark.parametrize("task", IMAGES)
def test_the_manifest_lists_every_file_that_the_benchmark_reads(task, tiny):
    record = json.loads((tiny / task / "data.json").read_text())
    assert (record["n_train"], record["n_val"]) == IMAGES[task]
    table = (tiny / task / "manifest.csv").read_bytes()
    assert hashlib.sha256(table).hexdigest() == record["manifest_sha256"]
    rows = list(csv.DictReader(table.decode().splitlines()))
    root = sources.root_of(tiny / task, task)
    assert {row["path"] for row in rows if row["path"].endswith(".jpg")} == {
        path.relative_to(root).as_posix() for path in root.rglob("*.jpg") if "VOC2012" not in path.parts}
    assert all(len(row["sha256"]) == 64 for row in rows)
    sources.verify(tiny / task, task)


def test_of_a_users_folder_annotations_are_hashed_and_images_are_not(known, tiny, tmp_path):
    data = known.of_task("coco", "smoke") | {"root": str(tiny / "coco/files")}
    record = sources.prepare("coco", data, tmp_path)
    assert record["root"] == str(tiny / "coco/files")
    rows = list(csv.DictReader((tmp_path / "manifest.csv").read_text().splitlines()))
    assert {bool(row["sha256"]) for row in rows if row["path"].endswith(".jpg")} == {False}
    assert all(row["sha256"] for row in rows if row["path"].endswith(".json"))
    assert not (tmp_path / "files").exists()


def test_maps_of_classes_are_annotations_and_hashed_though_they_are_images(known, tiny, tmp_path):
    copy = shutil.copytree(tiny / "ade20k/files", tmp_path / "ade")
    sources.prepare("ade20k", known.of_task("ade20k", "smoke") | {"root": str(copy)}, tmp_path / "out")
    rows = list(csv.DictReader((tmp_path / "out/manifest.csv").read_text().splitlines()))
    assert {row["path"].split("/")[0]: bool(row["sha256"]) for row in rows} == {"annotations": True, "images": False}
    path = copy / rows[0]["path"]
    changed = bytearray(path.read_bytes())
    changed[-1] ^= 1                                                  # as long as before
    path.write_bytes(changed)
    with pytest.raises(ValueError, match=rf"got 1 that differ: {path} \(changed\);"):
        sources.verify(tmp_path / "out", "ade20k")


def test_a_folder_without_annotations_and_an_unreadable_image_are_refused(known, tiny, tmp_path):
    copy = shutil.copytree(tiny / "ade20k/files", tmp_path / "ade")
    data = known.of_task("ade20k", "smoke") | {"root": str(copy)}
    for file in ("annotations/training/ADE_train_00000001.png", "images/training/ADE_train_00000001.jpg"):
        (copy / file).write_bytes(b"no image")
        with pytest.raises(ValueError, match=rf"needs readable images, got 1 of \d+ sampled that are not: \S+/{file}; copy or"):
            sources.prepare("ade20k", data, tmp_path / "out")
    shutil.rmtree(copy / "annotations")
    with pytest.raises(FileNotFoundError, match=r"ADE20K needs a folder with .*; put the dataset there, or set its root"):
        sources.prepare("ade20k", data, tmp_path / "out")
    assert not (tmp_path / "out/data.json").exists()


def test_missing_and_changed_files_are_named(tiny, tmp_path):
    copy = shutil.copytree(tiny / "voc", tmp_path / "voc")
    first, second, *_ = sorted((copy / "files/VOC2007/Annotations").glob("*.xml"))
    first.unlink()
    second.write_bytes(second.read_bytes() + b"\n")
    with pytest.raises(ValueError, match=rf"got 2 that differ: .*{first.name} \(missing\), .*{second.name} \(changed\);"):
        sources.verify(copy, "voc")
