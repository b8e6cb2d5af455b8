import csv
import hashlib
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from swconv.training import manifest

DIGITS = {"name": "digits", "num_classes": 10, "train_images": 20, "val_images": 10}


def test_manifest_of_the_mini_task_is_the_same_on_every_machine(tmp_path):
    record = manifest.prepare(DIGITS | {"train_images": 4000, "val_images": 2000}, tmp_path)
    assert record["manifest_sha256"] == "d3fa4f4c547beb0c9717a7abf5cbe39bdc96370b0f7505db458f5eb9455809b8"


def test_manifest_lists_every_file_with_size_and_hash(tmp_path):
    record = manifest.prepare(DIGITS, tmp_path)
    with (tmp_path / "manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    root = tmp_path / "images"
    assert [row["path"] for row in rows] == sorted(path.relative_to(root).as_posix() for path in root.rglob("*.png"))
    for row in rows:
        content = (root / row["path"]).read_bytes()
        assert int(row["size"]) == len(content)
        assert row["sha256"] == hashlib.sha256(content).hexdigest()
    assert record == json.loads((tmp_path / "data.json").read_text())
    assert (record["root"], record["n_train"], record["n_val"]) == ("images", 20, 10)
    assert record["manifest_sha256"] == hashlib.sha256((tmp_path / "manifest.csv").read_bytes()).hexdigest()


def test_folder_of_the_user_is_found_not_copied_and_listed_without_hashes(tmp_path):
    dataset = _folder(tmp_path / "photos", classes=2)
    record = manifest.prepare(dataset, tmp_path / "data")
    assert record["root"] == str(tmp_path / "photos")
    assert record["hash_contents"] is False
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["data.json", "manifest.csv", "manifest.csv.sha256"]
    assert (tmp_path / "data" / "manifest.csv").read_text().splitlines()[1].endswith(",")
    manifest.verify(tmp_path / "data")


def test_verify_names_missing_and_changed_files(tmp_path):
    manifest.prepare(DIGITS, tmp_path)
    manifest.verify(tmp_path)
    first, second, *_ = sorted((tmp_path / "images" / "val").rglob("*.png"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1] + b"\0")
    differ = rf"2 that differ: {first} \(missing\), {second} \(changed\)"
    with pytest.raises(ValueError, match=f"30 files of train and val, got {differ}"):
        manifest.verify(tmp_path)
    with pytest.raises(ValueError, match=f"10 files of val, got {differ}"):
        manifest.verify(tmp_path, ("val",))
    manifest.verify(tmp_path, ("train",))


def test_verify_names_files_that_came_after_the_manifest(tmp_path):
    manifest.prepare(DIGITS, tmp_path)
    later = tmp_path / "images" / "train" / "3" / "later.png"
    shutil.copy(next((tmp_path / "images" / "val").rglob("*.png")), later)
    with pytest.raises(ValueError, match=rf"30 files of train and val, got 1 that differ: {later} \(new\); restore"):
        manifest.verify(tmp_path)


def test_samples_are_in_the_order_of_their_classes(tmp_path):
    dataset = _folder(tmp_path / "photos", classes=2)
    for split in manifest.SPLITS:
        (tmp_path / "photos" / split / "n0").rename(tmp_path / "photos" / split / "n1-a")    # "n1-a/" < "n1/"
    manifest.prepare(dataset, tmp_path / "data")
    assert manifest.samples(tmp_path / "data", "train") == (["train/n1/0.jpeg", "train/n1-a/0.jpeg"], ["n1", "n1-a"])


def test_with_bad_files_skip_an_unreadable_image_is_told_and_kept_in_the_manifest(tmp_path, caplog):
    dataset = _folder(tmp_path / "photos", classes=2) | {"bad_files": "skip"}
    bad = tmp_path / "photos" / "train" / "n0" / "0.jpeg"
    bad.write_bytes(b"")
    assert manifest.prepare(dataset, tmp_path / "data")["n_train"] == 2
    assert f"got 1 unreadable among those sampled: {bad}; bad_files: skip trains without them." in caplog.text


def test_an_image_is_reduced_to_its_short_side_and_never_enlarged(tmp_path):
    gradient = Image.linear_gradient("L").resize((400, 300))
    gradient.save(tmp_path / "0.jpeg")
    assert manifest.read_image(tmp_path / "0.jpeg", "RGB", 60).size == (80, 60)
    assert manifest.read_image(tmp_path / "0.jpeg", "L", 301).size == (400, 300)
    small = np.asarray(manifest.read_image(tmp_path / "0.jpeg", "L", 60), float)
    assert np.abs(small - np.asarray(gradient.resize((80, 60), Image.Resampling.BICUBIC), float)).mean() < 2


@pytest.mark.parametrize("root", [None, "nowhere"])
def test_missing_dataset_stops_with_what_to_put_where(root):
    with pytest.raises(FileNotFoundError, match=r"needs a folder with train/<class>/ and val/<class>/, 1000 classes"):
        manifest.check_root({"name": "imagenet", "root": root, "num_classes": 1000})


def test_wrong_number_of_classes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="needs 3 class folders in .*train, got 2"):
        manifest.prepare(_folder(tmp_path / "photos", classes=2) | {"num_classes": 3}, tmp_path / "data")


def test_empty_class_is_named(tmp_path):
    dataset = _folder(tmp_path / "photos", classes=2)
    (tmp_path / "photos" / "val" / "n1" / "0.jpeg").unlink()
    with pytest.raises(ValueError, match="got none in 1 classes: n1"):
        manifest.prepare(dataset, tmp_path / "data")


def test_class_in_one_split_only_is_named(tmp_path):
    dataset = _folder(tmp_path / "photos", classes=2)
    (tmp_path / "photos" / "val" / "n1").rename(tmp_path / "photos" / "val" / "n2")
    with pytest.raises(ValueError, match="got some in only one of them: n1, n2"):
        manifest.prepare(dataset, tmp_path / "data")


def test_truncated_image_is_named_and_nothing_is_recorded(tmp_path):
    dataset = _folder(tmp_path / "photos", classes=2)
    bad = tmp_path / "photos" / "train" / "n0" / "0.jpeg"
    bad.write_bytes(bad.read_bytes()[:200])
    with pytest.raises(ValueError, match=f"got 1 unreadable among those sampled: {bad}"):
        manifest.prepare(dataset, tmp_path / "data")
    assert not list((tmp_path / "data").iterdir())


@pytest.mark.parametrize("damage", [b"", b"no image", None])
def test_unreadable_image_is_one_sentence_with_its_name(tmp_path, damage):
    path = tmp_path / "0.png"
    if damage is not None:
        path.write_bytes(damage)
    with pytest.raises(manifest.ImageError, match=f"{path} needs to be a readable image, got '.+'; restore") as caught:
        manifest.read_image(path, "L")
    assert "\n" not in str(caught.value)


def test_training_before_the_data_rule_is_told_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="run the data rule first"):
        manifest.read(tmp_path)


def test_manifest_is_made_without_torch(tmp_path):
    code = "import sys, swconv.training.manifest; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def _folder(root, classes):
    """One photo-like JPEG per class and split."""
    shutil.rmtree(root, ignore_errors=True)
    for split in manifest.SPLITS:
        for label in range(classes):
            (root / split / f"n{label}").mkdir(parents=True)
            Image.effect_noise((40, 30), 60).convert("RGB").save(root / split / f"n{label}" / "0.jpeg")
    return {"name": "photos", "root": str(root), "num_classes": classes}
