"""Every task end to end on its tiny set: fine-tuned weights in, measures, submission files and pictures out."""

import json
import math
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from swconv.downstream import evaluation, sources
from swconv.downstream.benchmarks import benchmark
from swconv.downstream.evaluation import SegmentationJudge, corners_of, draw_pictures, evaluate, load_finished
from swconv.downstream.nuscenes import CLASSES
from swconv.training.manifest import read_image

MEASURES = {
    "ade20k": {"mIoU", "mAcc", "aAcc", "mIoU_multi_scale"},
    "coco": {f"{name}_{kind}" for name in ("AP", "AP50", "AP75") for kind in ("box", "mask")},
    "voc": {"mAP"},
    "nuscenes": {"mAP", "NDS", "mATE", "mASE", "mAOE", "mAVE", "mAAE", *(f"AP_{name}" for name in CLASSES)},
}


@pytest.mark.parametrize("task", MEASURES)
def test_a_fine_tune_is_measured_and_leaves_its_benchmarks_submission(task, finished, tiny, told, tmp_path):
    row, weights = finished(task)
    evaluate(row, tiny / task, weights, tmp_path, told)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics.keys() == MEASURES[task] | {"images"}
    assert metrics["images"]["value"] == 8
    assert {metrics[name]["unit"] for name in metrics if name.startswith(("AP", "mAP", "mIoU", "NDS"))} == {"%"}
    assert all(0 <= each["value"] <= 100 for each in metrics.values())
    assert json.loads((tmp_path / "run.json").read_text())["weights_sha256"] == weights.with_name(
        "weights.safetensors.sha256").read_text().strip()
    files = sorted(path.name for path in (tmp_path / "detections").iterdir())
    if task == "ade20k":
        assert files == [f"ADE_val_{number:08d}.png" for number in range(1, 9)]
        labels, truth = (np.array(read_image(path / files[0], "L")) for path in (
            tmp_path / "detections", tiny / "ade20k/files/annotations/validation"))
        assert labels.shape == truth.shape
        assert labels.min() >= 1
    elif task == "coco":
        assert files == ["results.bbox.json", "results.segm.json"] or files == ["results.bbox.json"]
    elif task == "voc":
        assert len(files) == 20
        assert "comp4_det_test_aeroplane.txt" in files
    else:
        assert files == ["results_nusc.json"]
        assert len(json.loads((tmp_path / "detections/results_nusc.json").read_text())["results"]) == 4


def test_no_look_at_an_image_keeps_what_gradients_would_need(finished, tiny, tmp_path, monkeypatch):
    row, weights = finished("ade20k")
    used = benchmark(row, sources.root_of(tiny / "ade20k", "ade20k"))
    seen = []

    def watched(whole, *arguments, **more):
        result = whole(*arguments, **more)
        seen.append((whole.__name__, result.requires_grad, result.is_inference()))
        return result

    for name in ("multi_scale_flip", "whole_inference"):
        monkeypatch.setattr(evaluation, name, partial(watched, getattr(evaluation, name)))
    SegmentationJudge(used, load_finished(row, used, weights), torch.device("cpu")).assess(tmp_path)
    assert set(seen) == {("multi_scale_flip", False, True), ("whole_inference", False, True)}
    assert len(seen) == 16


@pytest.mark.parametrize("task", MEASURES)
def test_pictures_are_drawn_on_the_validation_images(task, finished, tiny, tmp_path):
    row, weights = finished(task)
    draw_pictures(row | {"pictures": 2}, tiny / task, weights, tmp_path)
    pictures = [read_image(path, "RGB") for path in tmp_path.glob("*.png")]
    assert len(pictures) == 2
    sizes = {picture.size for picture in pictures}
    assert sizes <= ({(384, 216)} if task == "nuscenes" else {(160, 120), (160, 128), (120, 160)})


def test_evaluation_twice_says_the_same(finished, tiny, told, tmp_path):
    row, weights = finished("voc")
    for place in ("a", "b"):
        evaluate(row, tiny / "voc", weights, tmp_path / place, told)
    assert (tmp_path / "a/metrics.json").read_bytes() == (tmp_path / "b/metrics.json").read_bytes()


def test_weights_of_another_row_and_changed_ones_are_refused(finished, known, tiny, told, tmp_path):
    row, weights = finished("coco")
    with pytest.raises(ValueError, match=r"the weights of this row's network, got '.*Take the row of params/downstream"):
        evaluate(known.resolve(known.examples["voc"], "smoke"), tiny / "voc", weights, tmp_path, told)
    shutil.copytree(weights.parent, tmp_path / "copy")
    copy = tmp_path / "copy/weights.safetensors"
    copy.write_bytes(copy.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is damaged"):
        evaluate(row, tiny / "coco", copy, tmp_path, told)


def test_a_diverged_run_is_measured_as_that_and_nothing_is_drawn(known, fitted, pretrained, tiny, told, tmp_path):
    row = known.resolve(known.examples["voc"], "smoke")
    row["recipe"]["max_loss"] = 1e-9
    weights = fitted(row, tmp_path, pretrained(known.examples["voc"])) / "weights.safetensors"
    assert json.loads(weights.with_name("metrics.json").read_text())["diverged"]["unit"] == "step"
    assert load_file(weights) == {}
    evaluate(row, tiny / "voc", weights, tmp_path / "assessed", told)
    assert json.loads((tmp_path / "assessed/metrics.json").read_text()).keys() == {"diverged"}
    draw_pictures(row, tiny / "voc", weights, tmp_path / "pictures")
    assert list((tmp_path / "pictures").iterdir()) == []


def test_a_box_turned_by_a_quarter_has_its_length_along_the_view():
    box = torch.tensor([[1.0, 2, 10, 4, 2, 1, math.pi / 2, 0, 0]])     # l, h, w = 4, 2, 1
    corners = corners_of(box)[0]
    torch.testing.assert_close(corners.amin(0), torch.tensor([0.5, 1, 8]))
    torch.testing.assert_close(corners.amax(0), torch.tensor([1.5, 3, 12]))
