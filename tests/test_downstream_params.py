"""The rows of params/downstream.yaml: what they say of the papers' runs, and the sentences that faults in them give."""

import csv
import re
import shutil
from pathlib import Path

import pytest
import yaml

from swconv import downstream_params, params
from swconv.__main__ import main

KINDS = ("seg_ade20k", "det_coco", "det_voc07", "det3d_nuscenes")


@pytest.fixture(scope="module")
def pretraining():
    return params.load()


@pytest.fixture(scope="module")
def known(pretraining):
    return downstream_params.load(Path("params"), pretraining)


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree("params", tmp_path / "params"))


def edit(folder: Path, old: str, new: str) -> None:
    path = folder / "downstream.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def fault(folder: Path, pretraining) -> str:
    with pytest.raises(params.ParamsError) as caught:
        downstream_params.load(folder, pretraining)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence.removeprefix(f"{folder}/")


def paper_rows() -> dict[str, dict]:
    with open("reports/paper/runs.csv", newline="") as file:
        return {row["run_id"]: row for row in csv.DictReader(file) if row["kind"] in KINDS}


def test_every_downstream_run_of_the_papers_is_a_row_and_no_other():
    known = downstream_params.load(Path("params"), params.load())
    assert known.aliases.keys() == paper_rows().keys()
    assert len(known.aliases) == len(known.runs) == 20


def test_rows_say_what_the_list_of_runs_says(known, pretraining):
    for alias, row in paper_rows().items():
        run = known.aliases[alias]
        resolved = known.resolve(run, "paper")
        recipe = resolved["recipe"]
        assert (recipe["iterations"] or recipe["epochs"]) == int(row["epochs_or_iters"]), run
        assert recipe["lr"] == float(row["lr"]), run
        assert recipe["batch_size"] == int(row["batch"]), run
        if row["drop_path"] not in ("", "unstated"):
            assert recipe["drop_path_rate"] == float(row["drop_path"]), run
        if "public weights" in row["init_from"]:
            assert known.runs[run].published, run
        if row["init_from"] != "public weights":
            assert known.runs[run].init_from == pretraining.canonical(row["init_from"].split(" ")[0]), run


def test_notes_of_layer_decay_are_what_the_recipes_have(known):
    decays = {run: known.resolve(run, "paper")["recipe"]["layer_decay"] for run in known.runs}
    assert decays["ade_160k_slak_t"] == {"rule": "stage_wise", "rate": 0.9, "layers": 6}
    assert decays["ade_160k_slak_b"] == {"rule": "stage_wise", "rate": 0.9, "layers": 12}
    assert decays["ade_160k_sw_tiny"] == {"rule": "layer_wise", "rate": 1.0, "layers": 9}
    assert decays["coco_12ep_convnext_t"] == {"rule": "layer_wise", "rate": 0.7, "layers": 6}
    assert decays["coco_36ep_sw_tiny"] == {"rule": "layer_wise", "rate": 0.8, "layers": 12}
    assert decays["nus_fcos3d_sw_small"] == {"rule": "layer_wise", "rate": 0.8, "layers": 12}


def test_a_row_takes_network_and_arguments_of_its_pretraining(known, pretraining):
    run, source = "ade_80k_convnext_t_replknet", "cnx_t_rep_31_120"
    ours, theirs = known.resolve(run, "paper")["network"], pretraining.resolve(source, "paper")["model"]
    assert ours == {"name": "lk_convnext_tiny", "args": {key: value for key, value in theirs["args"].items()
                                                         if key != "layer_scale_init"}}
    grown = known.resolve(run, "mini")
    assert grown["network"]["args"]["depths"] == [*pretraining.resolve(source, "mini")["model"]["args"]["depths"], 1, 1]
    assert grown["grown"] == 2


def test_weights_come_from_the_run_that_is_trained_in_a_rows_place_or_from_a_registered_file(known, pretraining):
    assert known.source("ade_160k_sw_tiny", "mini") == ("train", "sw24_300")
    assert pretraining.same_as("sw24_300", "smoke") == "sw24"
    assert known.source("ade_160k_sw_tiny", "smoke") == ("train", "sw24")
    assert known.source("ade_160k_sw_tiny", "paper") == ("weights", "sw_tiny_300")
    assert known.source("ade_160k_sw_small", "paper") == ("train", "sw_small_300")         # its README links no file
    assert known.source("ade_160k_sw_tiny", "overfit") is None


def test_identity_leaves_out_where_images_lie_and_how_many_read_them(known, folder, pretraining):
    edit(folder, "root: data/ade20k, train: training, val: validation, workers: 8", "root: elsewhere, train: training, val: "
         "validation, workers: 2")
    moved = downstream_params.load(folder, pretraining)
    assert moved.identity("ade_160k_sw_tiny", "paper") == known.identity("ade_160k_sw_tiny", "paper")
    edit(folder, "warmup_iterations: 1500", "warmup_iterations: 1501")
    changed = downstream_params.load(folder, pretraining)
    assert changed.identity("ade_160k_sw_tiny", "paper") != known.identity("ade_160k_sw_tiny", "paper")
    assert changed.identity("coco_36ep_sw_tiny", "paper") == known.identity("coco_36ep_sw_tiny", "paper")


@pytest.mark.parametrize(("old", "new", "sentence"), [
    ("    init_from: sw24_300", "    init_from: sw_tiny_300",
     "run ade_160k_sw_tiny: pretraining run sw_tiny_300 is known here as sw24_300; use that name"),
    ("    init_from: cnx_s_k7_120", "    init_from: cnx_s_k7_12",
     "run ade_80k_convnext_s: unknown pretraining run cnx_s_k7_12; the nearest known name is cnx_s_k7_120"),
    ("    init_from: sw24_300", "    init_from: sw01_infer", "needs a trained run to start from, got sw01_infer, which takes"),
    ("    published: sw_tiny_300", "    published: sw_tiny", "run ade_160k_sw_tiny: unknown weights sw_tiny; the nearest k"),
    ("    uses: ade_stages_6", "    uses: ade_stage_6",
     "run ade_160k_slak_t: unknown recipe ade_stage_6; the nearest known name is ade_stages_6"),
    ("recipe: {drop_path_rate: 0.3}", "recipe: {drop_path: 0.3}",
     "unknown key recipe.drop_path; the nearest known name is drop_path_rate"),
    ("      power: 1.0 ", "      powr: 1.0 ", "unknown key tasks.ade20k.recipe.powr; the nearest known name is power"),
    ("    task: nuscenes", "    task: nuscene", "run nus_fcos3d_sw_small, task: input should be 'ade20k', 'coco', 'voc' or 'n"),
    ("      iterations: 160000", "      iterations: null",
     "either epochs or iterations needs a number and the other one null, got None and None"),
    ("    base: paper", "    base: papr", "profile paper: unknown profile papr; the nearest known name is paper"),
    ("  voc: voc07_slak_t", "  voc: voc07_slak", "examples: unknown downstream run voc07_slak; the nearest known name is "),
    ("  voc: voc07_slak_t", "  voc: coco_36ep_slak_t",
     "examples: voc needs a run of that task, got coco_36ep_slak_t, which is of coco"),
])
def test_a_fault_is_one_sentence_with_line_and_the_nearest_name(folder, pretraining, old, new, sentence):
    edit(folder, old, new)
    told = fault(folder, pretraining)
    assert told.startswith("downstream.yaml:")
    assert sentence in told


@pytest.mark.parametrize(("arguments", "sentence"), [
    (["finetune", "ade_160k_SW-tiny"], "run ade_160k_SW-tiny is known here as ade_160k_sw_tiny; use that name."),
    (["finetune", "ade_160k_sw_tine"], "unknown downstream run ade_160k_sw_tine; the nearest known name is ade_160k_sw_tiny."),
    (["finetune", "ade_160k_sw_tiny", "--profile", "mine"], "unknown downstream profile mine; the nearest known name is mini."),
    (["finetune", "ade_160k_sw_tiny"], "run ade_160k_sw_tiny starts from the weights of sw24; give them: --init artifacts/"),
    (["finetune", "ade_160k_sw_tiny", "--profile", "overfit", "--init", "x"], "starts from random weights, but x is given"),
])
def test_a_wrong_request_is_refused_before_any_work(tmp_path, capsys, arguments, sentence):
    verb, run, *more = arguments
    whole = [verb, run, "--profile", "smoke", "--seed", "0", "--data", str(tmp_path), "--out", str(tmp_path / "out"), *more]
    assert main(whole) == 1
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_missing_dataset_is_told_with_what_belongs_there(tmp_path, capsys):
    assert main(["downstream-data", "coco", "--profile", "paper", "--out", str(tmp_path)]) == 1
    places = ["train2017", "annotations/instances_train2017.json", "val2017", "annotations/instances_val2017.json"]
    assert (f"profile paper needs COCO 2017 in data/coco/ with {', '.join(places)}, but {' and '.join(places)} are not there. "
            "Put the dataset there or link it: ln -s /path/to/COCO data/coco.") in capsys.readouterr().err


@pytest.mark.parametrize(("task", "needed"), [
    ("ade20k", ["images/training", "annotations/training", "images/validation", "annotations/validation"]),
    ("coco", ["train2017", "annotations/instances_train2017.json", "val2017", "annotations/instances_val2017.json"]),
    ("voc", ["VOC2007", "VOC2012"]),
    ("nuscenes", ["v1.0-trainval", "samples", "maps"]),
])
def test_each_part_of_a_dataset_that_the_recipe_reads_is_asked_for(known, tmp_path, monkeypatch, task, needed):
    monkeypatch.chdir(tmp_path)
    for place in needed:
        (tmp_path / "data" / task / place).mkdir(parents=True)
    known.check_data(task, "paper")
    for place in needed:
        (tmp_path / "data" / task / place).rmdir()
        told = f"with {', '.join(needed)}, but {place} is not there"
        with pytest.raises(params.ParamsError, match=re.escape(told)):
            known.check_data(task, "paper")
        (tmp_path / "data" / task / place).mkdir()


def test_dvc_has_a_stage_for_every_row_and_no_other(known):
    stages = yaml.safe_load(Path("workflow/dvc.yaml").read_text())["stages"]
    assert stages["downstream"]["matrix"]["run"] == list(known.runs)


def test_data_that_are_not_there_yet_are_told(tmp_path, capsys):
    place = str(tmp_path)
    assert main(["finetune", "voc07_slak_t", "--profile", "overfit", "--seed", "0", "--data", place, "--out", place]) == 1
    assert "needs the dataset record" in capsys.readouterr().err


def test_a_number_of_processes_that_some_fine_tunes_cannot_share_stops_only_these(tmp_path):
    shutil.copytree("params", tmp_path / "params")
    path = tmp_path / "params/profiles/mini.yaml"
    text = path.read_text()
    path.write_text(text.replace("  processes: 1", "  processes: 4"))
    assert path.read_text() != text
    known = downstream_params.load(tmp_path / "params", params.load(tmp_path / "params"))
    assert known.resolve("ade_160k_sw_tiny", "paper")["machine"]["processes"] == 1
    with pytest.raises(params.ParamsError, match=r"sw_tiny on profile smoke: batch_size 2 .* machine.processes \(4\)\."):
        known.identity("ade_160k_sw_tiny", "smoke")
