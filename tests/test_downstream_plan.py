"""The plan of fine-tunes: against the networks themselves, what they keep for a backward pass, and the list of runs."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from swconv import downstream_params, params
from swconv.__main__ import main
from swconv.downstream import sources
from swconv.downstream.benchmarks import benchmark
from swconv.downstream.finetuning import FineTuning, build_pyramid
from swconv.downstream_plan import _entry, network, plan
from swconv.plan import table

TASKS = ("ade20k", "coco", "voc", "nuscenes")


@pytest.fixture(scope="module")
def known():
    return downstream_params.load(Path("params"), params.load())


def entry(known, run, profile="paper", artifacts=Path("nowhere")):
    return _entry(known, run, profile, artifacts)


@pytest.mark.parametrize("profile", ["paper", "mini", "overfit"])
def test_weights_are_counted_as_the_network_has_them_for_every_row(known, profile):
    seen, unknown = set(), []
    for run, row in known.runs.items():
        config = known.resolve(run, profile)
        key = json.dumps([row.task, config["network"], config["recipe"]["layer_scale_init"]])
        if key not in seen:
            seen.add(key)
            if (counted := entry(known, run, profile).parameters) is None:
                unknown.append(run)
                continue
            with torch.device("meta"):
                model = benchmark(config, Path()).network(build_pyramid(config))
            assert counted == sum(weight.numel() for weight in model.parameters()), run
    assert len(seen) >= 10
    assert unknown == (["voc07_convnext_t"] if profile == "paper" else [])    # with timm's ConvNeXt, which is none of ours


@pytest.mark.parametrize("task", TASKS)
def test_what_a_backward_pass_needs_is_within_a_tenth_of_what_torch_keeps(known, task, tmp_path):
    run = known.examples[task]
    config = known.resolve(run, "mini")
    config["head"] |= {"coco": {"roi_samples": 16}, "voc": {"roi_samples": 64}}.get(task, {})   # as many as there are
    sources.prepare(task, config["data"], tmp_path)
    training, floats = FineTuning(config, tmp_path, seed=0), {}
    own = {tensor.untyped_storage().data_ptr() for tensor in [*training.model.parameters(), *training.model.buffers()]}
    images, targets = next(iter(training.loader.epoch(1)))

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            floats[storage.data_ptr()] = (storage.nbytes() / 4, tensor)  # held, or its place would be given to another
        return tensor

    training.model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        training.model(images, targets)
    _, estimate = network(task, config)
    assert estimate == pytest.approx(sum(count for count, _ in floats.values()) / len(images), rel=0.1)


def test_hours_are_those_of_the_list_of_runs(known):
    with Path("reports/paper/runs.csv").open(newline="") as file:
        listed = {row["run_id"]: float(row["gpu_h_A100_est"]) for row in csv.DictReader(file) if row["run_id"] in known.aliases}
    assert len(listed) == len(known.runs) == 20
    for name, hours in listed.items():
        found = entry(known, known.aliases[name])
        assert found.hours == pytest.approx(hours, rel=0.01), name
        assert found.basis == "guessed"


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("profile", ["mini", "overfit"])
def test_steps_are_the_trainings_once_the_images_are_listed(known, task, profile, tmp_path):
    run = known.examples[task]
    config = known.resolve(run, profile)
    assert entry(known, run, profile, tmp_path).steps_per_epoch is None
    folder = tmp_path / profile / "downstream_data" / task
    sources.prepare(task, config["data"], folder)
    training, found = FineTuning(config, folder, seed=0), entry(known, run, profile, tmp_path)
    assert found.steps == training.epochs * training.steps
    assert found.steps_per_epoch == training.loader.batches.steps
    assert found.images == found.steps * config["recipe"]["batch_size"]


def test_what_a_benchmark_trains_is_known_without_its_images(known):
    segmenter, detector = entry(known, "ade_160k_sw_tiny"), entry(known, "coco_36ep_sw_tiny")
    assert (segmenter.steps, segmenter.images, segmenter.epochs) == (160_000, 2_560_000, 127)
    assert (detector.steps_per_epoch, detector.steps, detector.needs) == (7330, 36 * 7330, "sw_tiny_300")
    assert detector.disk == (2 * 12 + 4) * detector.parameters


def test_a_fine_tune_comes_behind_our_own_pretraining_and_behind_no_published_one(known):
    assert [each.run for each in plan(known, "ade_160k_sw_tiny", "mini").entries] == ["sw24_300", "ade_160k_sw_tiny"]
    assert [each.run for each in plan(known, "ade_160k_sw_tiny", "paper").entries] == ["ade_160k_sw_tiny"]
    assert [each.run for each in plan(known, "ade_160k_sw_tiny", "overfit").entries] == ["ade_160k_sw_tiny"]


def test_pages_all_fine_tunes_and_everything_can_be_planned(known):
    page = plan(known, "slak/table5", "paper")
    assert [each.run for each in page.entries] == ["cnx_t_rep_31_120", "voc07_convnext_t", "voc07_convnext_t_replknet",
                                                   "voc07_slak_t"]
    assert {each.run for each in plan(known, "downstream", "paper").entries} >= set(known.runs)
    whole = plan(known, "all", "mini")
    assert {each.run for each in whole.entries} == {*known.runs, *known.known.runs}
    assert "? " in table(whole)                                           # tiny sets are not made yet
    assert plan(known, "table2", "paper").entries[-1].run in known.known.runs


def test_every_row_says_with_how_many_images_its_memory_is_reckoned(known):
    whole = plan(known, "all", "paper")
    at_once = {each.run: each.at_once for each in whole.entries}
    assert (at_once["sw24"], at_once["ade_160k_sw_tiny"]) == (256, 16)                        # of 4096 and 16
    lines = {line.split()[0]: line for line in table(whole).splitlines() if line}
    assert "31.8 M      256  51.4 GB" in lines["sw24"]
    assert "62.5 M       16  30.4 GB" in lines["ade_160k_sw_tiny"]


def test_hours_on_a_cpu_are_those_of_earlier_seeds(known, tmp_path):
    folder = tmp_path / "mini/finetune/voc07_slak_t/seed3"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"seconds": 72, "config": known.resolve("voc07_slak_t", "mini")}))
    found = entry(known, "voc07_slak_t", "mini", tmp_path)
    assert (found.hours, found.basis) == (pytest.approx(0.02), "earlier seeds")


def test_the_verb_plans_a_fine_tune_without_torch():
    code = ("import sys; from swconv.__main__ import main; main(['plan', 'coco_36ep_sw_tiny', '--json']); "
            "assert not {'torch', 'timm', 'numpy', 'mlflow'} & sys.modules.keys()")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [run["run"] for run in json.loads(done.stdout)["runs"]] == ["coco_36ep_sw_tiny"]


@pytest.mark.parametrize(("target", "sentence"), [
    ("ade_160k_sw_tine", "unknown downstream run ade_160k_sw_tine; the nearest known name is ade_160k_sw_tiny."),
    ("coco_36ep_SW-tiny", "run coco_36ep_SW-tiny is known here as coco_36ep_sw_tiny; use that name."),
    ("slak_t_301", "unknown run slak_t_301; the nearest known name is slak_t_300. A run, a report"),
])
def test_an_unknown_target_is_one_sentence(capsys, target, sentence):
    assert main(["plan", target]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert sentence in line


def test_a_rate_of_an_unknown_task_is_a_fault(tmp_path):
    folder = Path(shutil.copytree("params", tmp_path / "params"))
    path = folder / "plan.yaml"
    path.write_text(path.read_text().replace("  voc: 4", "  vok: 4"))
    with pytest.raises(params.ParamsError, match=r"unknown task or downstream run vok; the nearest known name is voc\."):
        downstream_params.load(folder, params.load(folder))
