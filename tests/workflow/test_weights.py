"""Published weights by Snakemake: taken in, measured, downloaded where a row says from where, and shown without any run."""

import argparse
import hashlib
import json
import re

import pytest
import timm
import torch
import yaml

import swconv.models  # noqa: F401
from swconv.weights import to_official

SMALL = {"depths": [1, 1], "dims": [8, 12], "kernel_sizes": [13, 13], "width_factor": 1.0}
ROW = {"model": "slak_tiny", "args": SMALL, "path": "data/weights/small.pth", "source": "somebody/SLaK", "input": 48}
TARGET = "artifacts/smoke/released/small/metrics.json"
UP_TO_DATE = "Data and pipelines are up to date."
NOTHING = "Nothing to be done"


def register(project, **changes) -> None:
    """One small file instead of all, from which no fine-tune starts."""
    (project.root / "params/weights.yaml").write_text(yaml.safe_dump({"small": ROW | changes}))
    tunes = project.root / "params/downstream.yaml"
    tunes.write_text(re.sub(r"^    published: \w+\n", "", tunes.read_text(), flags=re.MULTILINE))


@pytest.fixture
def published(tmp_path):
    """A checkpoint of ten classes and grey images, as the released code saves it."""
    torch.manual_seed(0)
    network = timm.create_model("slak_tiny", num_classes=10, in_chans=1, **SMALL)
    path = tmp_path / "elsewhere/small.pth"
    path.parent.mkdir()
    torch.save({"model": to_official(network), "epoch": 299, "args": argparse.Namespace(model="SLaK_tiny")}, path)
    return path


def test_a_registered_file_is_downloaded_taken_in_and_measured(finished, published):
    register(finished, url=f"file://{published}")
    assert finished.planned(TARGET) == {"fetch": 1, "convert": 1, "evaluate_released": 1}
    finished.snakemake(TARGET)
    assert finished.planned(TARGET) == {}

    digest, folder = hashlib.sha256(published.read_bytes()).hexdigest(), finished.root / "artifacts/smoke"
    assert json.loads((folder / "released/small/run.json").read_text())["source_sha256"] == digest
    metrics = json.loads((folder / "released/small/metrics.json").read_text())
    assert metrics["top1"] == metrics["top1_laid_out"]
    assert metrics["images"]["value"] == 64
    told = json.loads((folder / "weights/small/metrics.json").read_text())
    assert told["laid_out_logit_difference_float64"]["value"] < 1e-12

    register(finished, url="file:///nowhere/small.pth")                     # a download that fails takes nothing away
    finished.snakemake(TARGET, code=1)
    assert (finished.root / "data/weights/small.pth").read_bytes() == published.read_bytes()

    register(finished)
    finished.snakemake("released")
    register(finished, sha256="0" * 64)
    printed = finished.snakemake(TARGET, code=1)
    assert f"data/weights/small.pth has sha256 {digest[:12]}..., and 000000000000... was expected" in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize(("target", "sentence"), [
    (TARGET, "weights small are needed at data/weights/small.pth, and there is no file. Get them from somebody/SLaK"),
    ("released", "weights small are needed at data/weights/small.pth, and there is no file. Get them from somebody/SLaK"),
    ("artifacts/smoke/weights/smal/metrics.json", "unknown weights smal; the nearest known name is small"),
])
def test_a_file_that_is_not_there_stops_the_plan_with_where_it_is_from(fresh, tmp_path, target, sentence):
    project = fresh.copy(tmp_path / "project")
    register(project)
    printed = project.snakemake("-n", target, code=1)
    assert sentence in printed
    assert "Traceback" not in printed


def test_a_measured_accuracy_makes_the_tables_again_and_nothing_else(finished):
    known = yaml.safe_load((finished.root / "params/weights.yaml").read_text())["sw_tiny_300"]
    folder = finished.root / "artifacts/paper/released/sw_tiny_300"
    folder.mkdir(parents=True)
    seen = {"image_size": 224, "crop_pct": 0.875, "crop_mode": "center"}
    config = {"model": {"name": known["model"], "args": {}}, "dataset": seen}
    (folder / "run.json").write_text(json.dumps({"source_sha256": "ab", "config": config}))
    metrics = {"top1": {"value": 83.391, "unit": "%"}, "images": {"value": 50000, "unit": "images"}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    assert finished.planned("reports/table3.md") == {"tables": 1}
    finished.snakemake("reports/table3.md")
    page = (finished.root / "reports/table3.md").read_text()
    assert "| 83.4 | 83.39 | equal [^1] |" in page
    assert "[^1]: published weights sw_tiny_300 (" in page
    assert finished.planned() == {}


def test_either_engine_makes_the_tables_and_the_other_has_nothing_to_do(finished):
    title, other = "SLaK Table 7: beside CSWin", "Beside CSWin"
    for before, after, make in ((title, other, ["snakemake", "--cores", "all"]), (other, title, ["dvc", "repro"])):
        finished.replace("params/costs.yaml", before, after)
        assert finished.planned() == {"tables": 1}
        assert "tables:" in finished.run("dvc", "status")
        finished.run(*make)
        assert f"# {after}\n" in (finished.root / "reports/slak/table7.md").read_text()
        assert NOTHING in finished.snakemake()
        assert UP_TO_DATE in finished.run("dvc", "repro")
