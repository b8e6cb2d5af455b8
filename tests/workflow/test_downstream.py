"""Fine-tunes by Snakemake and DVC: from our own pretraining, again when that changes, every task end to end."""


import pytest

ROW = "artifacts/smoke/downstream/ade_160k_sw_tiny/seed0"
NOTHING = "Nothing to be done"


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
    assert "artifacts/smoke/train/sw24/seed0/weights.safetensors" in fresh.snakemake("-n", f"{ROW}/metrics.json")
    assert "train" not in fresh.planned("artifacts/overfit/downstream/ade_160k_sw_tiny/seed0/metrics.json")
