"""Fine-tunes by Snakemake and DVC: from our own pretraining, again when that changes, every task end to end."""

import json
import time

import pytest

NOTHING = "Nothing to be done"
ROW = "artifacts/smoke/downstream/ade_160k_sw_tiny/seed0"
VOC = "artifacts/smoke/downstream/voc07_slak_t/seed0/metrics.json"
VOC_TRACKED = "artifacts/smoke/track/downstream/voc07_slak_t/seed0.json"
TRACKED = "artifacts/smoke/track/downstream/ade_160k_sw_tiny/seed0.json"


@pytest.mark.parametrize(("target", "sentence"), [
    ("artifacts/smoke/downstream/ade_160k_sw_tine/seed0/metrics.json",
     "unknown downstream run ade_160k_sw_tine; the nearest known name is ade_160k_sw_tiny."),
    ("artifacts/smok/downstream/ade_160k_sw_tiny/seed0/metrics.json",
     "unknown downstream profile smok; the nearest known name is smoke."),
    ("artifacts/paper/downstream/ade_160k_sw_tiny/seed0/metrics.json",
     "weights sw_tiny_300 are needed at data/weights/sw_tiny_300.pth, and there is no file."),
    ("artifacts/paper/downstream_data/nuscenes/data.json",
     "profile paper needs nuScenes in data/nuscenes/ with v1.0-trainval, samples, maps, but v1.0-trainval and samples and "
     "maps are not there."),
])
def test_a_target_that_cannot_be_made_stops_the_plan_in_a_sentence(fresh, target, sentence):
    printed = fresh.snakemake("-n", target, code=1)
    assert sentence in printed
    assert "Traceback" not in printed


def test_a_fine_tune_waits_for_the_pretraining_that_stands_for_its_own(fresh):
    planned = fresh.planned(f"{ROW}/metrics.json")
    assert planned == {"build": 1, "data": 1, "train": 1, "downstream_data": 1, "finetune": 1, "assess": 1}
    assert fresh.planned(TRACKED) == planned | {"track_downstream": 1}
    assert "artifacts/smoke/train/sw24/seed0/weights.safetensors" in fresh.snakemake("-n", f"{ROW}/metrics.json")
    assert "train" not in fresh.planned("artifacts/overfit/downstream/ade_160k_sw_tiny/seed0/metrics.json")


def test_a_changed_pretraining_row_makes_its_fine_tunes_due_and_no_other_change_does(finished):
    targets = (f"{ROW}/metrics.json", f"{ROW}/pictures")
    finished.snakemake(*targets)
    assert finished.planned(*targets) == {}
    told = json.loads((finished.root / "artifacts/smoke/finetune/ade_160k_sw_tiny/seed0/run.json").read_text())
    digest = finished.root / "artifacts/smoke/train/sw24/seed0/weights.safetensors.sha256"
    assert told["init_sha256"] == digest.read_text().strip()
    assert json.loads((finished.root / ROW / "metrics.json").read_text())["images"]["value"] == 8

    finished.replace("params/downstream.yaml", "    certainty: published", "    certainty: inferred")
    assert finished.planned(*targets) == {}
    finished.replace("params/downstream.yaml", "{iterations: 2, batch_size: 2", "{iterations: 3, batch_size: 2")
    assert finished.planned(*targets) == {"finetune": 1, "assess": 1, "pictures": 1}
    finished.replace("params/downstream.yaml", "{iterations: 3, batch_size: 2", "{iterations: 2, batch_size: 2")
    assert finished.planned(*targets) == {}
    finished.replace("params/models.yaml", "    edges: 4                        # official flag N_rep", "    edges: 2")
    planned = finished.planned(*targets)
    assert planned["train"] == 1
    assert {rule: planned[rule] for rule in ("finetune", "assess", "pictures")} == {"finetune": 1, "assess": 1, "pictures": 1}


def test_smoke_runs_every_task_end_to_end_within_six_minutes(finished):
    began = time.monotonic()
    finished.snakemake("downstream_smoke")
    assert time.monotonic() - began < 360
    table = (finished.root / "artifacts/smoke/downstream/examples.md").read_text()
    for task, measure in (("ade20k", "mIoU"), ("coco", "AP50_box"), ("voc", "mAP"), ("nuscenes", "NDS")):
        assert f"| {task} |" in table
        assert f"| {measure} |" in table
    assert len(list(finished.root.glob("artifacts/smoke/downstream/*/seed0/pictures/*.png"))) == 4
    assert finished.planned("downstream_smoke") == {}


def test_a_dvc_stage_per_row_asks_snakemake_and_both_are_done(finished):
    stage = "workflow/dvc.yaml:downstream@smoke-ade_160k_sw_tiny"
    finished.run("dvc", "repro", stage)
    assert NOTHING in finished.snakemake(f"{ROW}/metrics.json", f"{ROW}/pictures")
    assert "Data and pipelines are up to date." in finished.run("dvc", "repro", stage)
    assert "downstream@smoke-ade_160k_sw_tiny" in (finished.root / "workflow/dvc.lock").read_text()
    assert not (finished.root / "artifacts/smoke/downstream/coco_36ep_sw_tiny").exists()


@pytest.mark.slow
def test_a_clone_takes_over_a_fine_tune_that_dvc_pulled(fresh, tmp_path):
    project, files = fresh.copy(tmp_path / "project"), [VOC, f"{VOC.removesuffix('metrics.json')}pictures", VOC_TRACKED]
    project.keep_rows("sw00")
    project.snakemake("artifacts/smoke/evaluate/sw00/seed0/metrics.json", *files)
    project.run("dvc", "remote", "add", "--default", "here", str(tmp_path / "remote"))
    kept = ("data@smoke", "run@smoke-sw00", "workflow/dvc.yaml:downstream@smoke-voc07_slak_t")
    project.run("dvc", "push", *kept)
    project.commit()
    project.run("git", "clone", "--quiet", str(project.root), str(tmp_path / "clone"))
    clone = type(project)(tmp_path / "clone")
    clone.run("dvc", "pull", *kept)
    assert "2 results of profile smoke and 1 fine-tunes are right as they are" in clone.script("adopt.py")
    assert clone.planned(*files) == {"track_downstream": 1}
    clone.snakemake(*files)
    assert clone.results() == project.results()
