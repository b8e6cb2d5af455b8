"""#0 -> #1: a trained SLaK laid out, through the verbs that the rules call, on the smoke task."""

import json
import shutil
from pathlib import Path

import pytest

from swconv import params
from swconv.__main__ import main
from swconv.training.conversion import convert_run

SCALE = ["--profile", "smoke"]


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    shutil.copytree("params", tmp_path / "params")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def numbers(path: str) -> dict[str, float]:
    return {name: entry["value"] for name, entry in json.loads(Path(path).read_text()).items()}


def test_laid_out_weights_have_the_accuracy_of_the_strips(project):
    assert main(["data", *SCALE, "--out", "data"]) == 0
    some = [*SCALE, "--seed", "0"]
    assert main(["train", "sw00_300", *some, "--data", "data", "--out", "train"]) == 0
    taken = ["--data", "data", "--weights", "train/weights.safetensors", "--out", "laid_out"]
    assert main(["lay-out", "sw01_infer", *some, *taken]) == 0
    for run, weights, out in (("sw00_300", "train", "strips"), ("sw01_infer", "laid_out", "pieces")):
        files = ["--data", "data", "--weights", f"{weights}/weights.safetensors", "--out", out]
        assert main(["evaluate", run, *some, *files]) == 0
    strips, pieces = numbers("strips/metrics.json"), numbers("pieces/metrics.json")
    assert strips["top1"] == pieces["top1"]
    assert strips["loss"] == pytest.approx(pieces["loss"], rel=1e-6)
    told = numbers("laid_out/metrics.json")
    assert told["logit_difference_float64"] < 1e-12
    assert told["logit_difference_float32"] < 1e-5
    assert told["top1_before"] == told["top1_after"] == strips["top1"]
    assert told["images"] == strips["images"] == 64
    assert told["val_logit_difference"] < 1e-5


def test_the_laid_out_row_trains_with_masks_per_filter(project):
    assert main(["data", *SCALE, "--out", "data"]) == 0
    assert main(["train", "sw01", *SCALE, "--seed", "0", "--data", "data", "--out", "train"]) == 0
    assert (project / "train/weights.safetensors").exists()


def test_rows_that_differ_by_more_are_refused(project):
    known = params.load()
    with pytest.raises(ValueError, match="by nothing else"):
        convert_run(known.resolve("sw00", "smoke"), known.resolve("sw00_300", "smoke"), Path("d"), Path("none"), Path("out"), 0)
    assert main(["lay-out", "sw11", *SCALE, "--seed", "0", "--data", "d", "--weights", "none", "--out", "out"]) == 1
