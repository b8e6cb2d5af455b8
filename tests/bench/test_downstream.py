"""The comparison of detectors is fair, and the evaluation sees what it should."""

import json

import pytest
import torch

from swconv.bench import downstream
from swconv.downstream.evaluators import coco_ap


def test_a_quick_run_writes_both_files_and_says_that_it_is_one(tmp_path):
    paths = downstream.run(tmp_path, quick=True)
    assert [path.name for path in paths] == ["downstream-cpu-quick.json", "downstream-cpu-quick.md"]
    record = json.loads(paths[0].read_text())
    assert [row["detector"] for row in record["steps"]] == ["Cascade Mask R-CNN, ours", "Mask R-CNN, torchvision"]
    assert all(row["median_ms"] > 0 for row in record["steps"])
    assert record["evaluation"]["detections"] == 200
    text = paths[1].read_text()
    assert "its numbers say nothing" in text
    assert "| Mask R-CNN, torchvision |" in text


def test_synthetic_detections_are_neither_all_right_nor_all_wrong():
    truth, results = downstream.synthetic(10, 20)
    assert {each["image_id"] for each in results} == set(range(10))
    scores = coco_ap(truth, results)
    assert 5 < scores["AP50_box"] < 95
    assert 5 < scores["AP50_mask"] < 95
    perfect = [{"image_id": each["image_id"], "category_id": each["category_id"], "bbox": each["bbox"], "score": 1.0}
               for each in truth["annotations"]]
    assert coco_ap(truth, perfect, ("box",))["AP_box"] == pytest.approx(100)


def test_a_gpu_that_is_not_there_is_told(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(RuntimeError, match="needs a GPU that torch sees, found none. Leave --device out"):
        downstream.run(tmp_path, "cuda")
