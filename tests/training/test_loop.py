"""The loop: it learns, it publishes whole results, and a killed training ends bit for bit where an undisturbed one ends."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from swconv import params
from swconv.training import checkpoint, evaluation, loop, manifest, record
from swconv.training.stop import StoppedError

RUN, SEED = "sw22", 0                                                 # two Rep branches, subset masks: much state


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    manifest.prepare(params.load().profiles["smoke"].dataset.model_dump(exclude_none=True), folder)
    return folder


@pytest.fixture
def config():
    row = params.load().resolve(RUN, "smoke")
    row["recipe"] |= {"epochs": 4, "evaluate_every": 1}
    return row


def circumstances(config, seed: int = SEED, **other) -> dict:
    return record.circumstances(key="k", run=RUN, profile="smoke", seed=seed, code="c", config=config, data_sha256="d") | other


def run(config, digits, folder: Path, seed: int = SEED, init: Path | None = None, **other) -> Path:
    loop.train(config, digits, folder / "out", folder / "checkpoints", circumstances(config, seed, **other), init=init)
    return folder / "out"


def stop_after(steps: int):
    """Asked to stop in the so-many-th step of this sitting."""
    looks = iter(range(1, 10**6))
    return lambda: next(looks) == steps


def metrics_of(out: Path) -> dict:
    return json.loads((out / "metrics.json").read_text())


def test_published_results_are_complete_and_say_how_long(config, digits, tmp_path):
    out = run(config, digits, tmp_path)
    assert sorted(path.name for path in out.iterdir()) == [
        "log.jsonl", "metrics.json", "run.json", "weights.safetensors", "weights.safetensors.sha256"]
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["steps"] == {"value": 16, "unit": "steps"}
    assert 0.5 < metrics["density"]["value"] < 0.9
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if "epoch" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if line.get("event") == "prune"] == list(range(2, 17, 2))
    assert json.loads((out / "run.json").read_text())["seconds"] > 0


SCRIPT = """
import json, sys
from pathlib import Path
from swconv.training import loop
config, digits, folder, circumstances = json.loads(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4])
loop.train(config, digits, folder / "out", folder / "checkpoints", circumstances)
"""


def test_killed_training_resumes_and_ends_bit_for_bit_where_the_undisturbed_one_ends(config, digits, tmp_path):
    config["recipe"] |= {"epochs": 8}
    straight = run(config, digits, tmp_path / "straight")
    killed = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, json.dumps(config), str(digits), str(killed),
                                json.dumps(circumstances(config))],
                               env=os.environ | {"PYTHONPATH": str(Path.cwd())}, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (killed / "checkpoints/epoch0002.pt").exists():
        assert process.poll() is None, "the training ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "out").exists()
    resumed = run(config, digits, killed)
    assert json.loads((resumed / "run.json").read_text())["resumed_from_epoch"] >= 2
    assert (resumed / "weights.safetensors").read_bytes() == (straight / "weights.safetensors").read_bytes()
    assert (resumed / "metrics.json").read_bytes() == (straight / "metrics.json").read_bytes()


@pytest.mark.parametrize("change", [{"random_erasing": 0.5}, {"mixup": 0.8, "cutmix": 1.0}, {"ema_decay": 0.9},
                                    {"drop_path_rate": 0.3, "sparsity": None}], ids=str)
def test_a_stop_in_the_middle_of_an_epoch_changes_no_bit_with_every_random_part(config, digits, tmp_path, change):
    config["recipe"] |= change
    straight = run(config, digits, tmp_path / "straight")
    cut = tmp_path / "cut"
    for steps, state in ((6, "epoch0001_step000002.pt"), (2, "epoch0001_step000004.pt"), (3, "epoch0002_step000003.pt")):
        with pytest.raises(StoppedError, match="its state is saved in .*The same command goes on") as stopped:
            loop.train(config, digits, cut / "out", cut / "checkpoints", circumstances(config), asked=stop_after(steps))
        assert stopped.value.exit_code == 85
        assert (cut / "checkpoints" / state).exists()
        torch.manual_seed(99)                                         # whatever came between must not matter
        np.random.seed(99)
        random.seed(99)
    resumed = run(config, digits, cut)
    for name in ("weights.safetensors", "metrics.json"):
        assert (resumed / name).read_bytes() == (straight / name).read_bytes()
    lines = [[json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()] for out in (straight, resumed)]
    for line in sum(lines, []):
        line.pop("seconds", None)
        line.pop("images_per_second", None)
    assert lines[0] == lines[1]
    assert json.loads((resumed / "run.json").read_text())["resumed_from_step"] == 11


@pytest.mark.parametrize("amp", [None, "bfloat16"])
def test_recomputing_changes_no_bit_of_weights_and_metrics(config, digits, tmp_path, amp):
    config["machine"] |= {"amp": amp}
    config["recipe"] |= {"drop_path_rate": 0.3, "ema_decay": 0.9, "epochs": 2}
    config["model"]["args"] |= {"depths": [1, 1, 1], "dims": [8, 12, 16], "kernel_sizes": [13, 7, 7]}
    plain = run(config, digits, tmp_path / "plain")
    config["machine"] |= {"recompute": True}
    other = run(config, digits, tmp_path / "recompute")
    for name in ("weights.safetensors", "metrics.json"):
        assert (other / name).read_bytes() == (plain / name).read_bytes()


def test_a_state_is_saved_every_so_many_minutes_and_the_two_newest_are_kept(config, digits, tmp_path):
    config["machine"] |= {"checkpoint_minutes": 1e-9}
    folder, kept = tmp_path / "checkpoints", []

    def asked():
        kept.append(sorted(path.name for path in folder.glob("*.pt")))
        return len(kept) == 8

    with pytest.raises(StoppedError):
        loop.train(config, digits, tmp_path / "out", folder, circumstances(config), asked=asked)
    assert kept[:3] == [[], ["epoch0000_step000001.pt"], ["epoch0000_step000001.pt", "epoch0000_step000002.pt"]]
    assert kept[4] == ["epoch0000_step000004.pt", "epoch0001.pt"]


def test_a_damaged_newest_checkpoint_costs_time_and_no_bit(config, digits, tmp_path, caplog):
    straight = run(config, digits, tmp_path / "straight")
    config["machine"] |= {"checkpoint_minutes": 1e-9}
    folder = tmp_path / "cut/checkpoints"
    with pytest.raises(StoppedError):
        loop.train(config, digits, tmp_path / "cut/out", folder, circumstances(config), asked=stop_after(7))
    newest = folder / "epoch0001_step000003.pt"
    newest.write_bytes(newest.read_bytes()[:-1] + b"?")
    resumed = run(config, digits, tmp_path / "cut")
    assert "epoch0001_step000003.pt is damaged" in caplog.text
    assert json.loads((resumed / "run.json").read_text())["resumed_from_step"] == 6
    assert (resumed / "weights.safetensors").read_bytes() == (straight / "weights.safetensors").read_bytes()


def test_a_kill_in_an_evaluation_costs_no_step_where_it_puts_long_work_at_risk(config, digits, tmp_path, monkeypatch):
    config["recipe"] |= {"evaluate_every": 2}
    straight = run(config, digits, tmp_path / "straight")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "scores", killed)
    for seconds, state in ((3600.0, "epoch0001.pt"), (0.0, "epoch0001_step000004.pt")):
        monkeypatch.setattr(loop, "BEFORE_EVALUATION", seconds)
        with pytest.raises(KeyboardInterrupt):
            run(config, digits, tmp_path / "cut")
        assert checkpoint.newest(tmp_path / "cut/checkpoints").name == state
    monkeypatch.undo()
    resumed = run(config, digits, tmp_path / "cut")
    assert json.loads((resumed / "run.json").read_text())["resumed_from_step"] == 8
    for name in ("weights.safetensors", "metrics.json"):
        assert (resumed / name).read_bytes() == (straight / name).read_bytes()


def test_a_checkpoint_of_another_network_is_refused_with_what_to_do(config, digits, tmp_path):
    with pytest.raises(StoppedError):
        loop.train(config, digits, tmp_path / "out", tmp_path / "checkpoints", circumstances(config), asked=stop_after(1))
    config["model"]["args"] |= {"dims": [8, 16]}
    with pytest.raises(ValueError, match="step000001.pt needs to be a checkpoint of this run, but its model does not fit"):
        run(config, digits, tmp_path)


def test_another_seed_gives_other_weights(config, digits, tmp_path):
    config["recipe"] |= {"epochs": 2}
    first, second = (load_file(run(config, digits, tmp_path / str(seed), seed) / "weights.safetensors") for seed in (0, 1))
    assert not torch.equal(first["head.weight"], second["head.weight"])


def test_a_loss_that_is_no_number_ends_the_run_as_diverged_with_the_step(config, digits, tmp_path, caplog):
    config["recipe"] |= {"lr": 1e30, "warmup_epochs": 0.0, "bad_steps": 3}
    out = run(config, digits, tmp_path)
    (name, found), = metrics_of(out).items()
    assert (name, found["unit"]) == ("diverged", "step")
    assert 4 <= found["value"] <= 16
    assert "sw22 seed 0 DIVERGED: the loss became" in caplog.text
    assert f"step {found['value']}" in json.loads((out / "run.json").read_text())["status"]
    evaluation.evaluate(config, digits, out / "weights.safetensors", tmp_path / "evaluate", circumstances(config))
    assert metrics_of(tmp_path / "evaluate") == metrics_of(out)
    with pytest.raises(ValueError, match="its run diverged at step"):
        run(config, digits, tmp_path / "next", init=out / "weights.safetensors")


def spoil(monkeypatch, steps, part, factor):
    """Have a part of the network give so many times what it gives, in these steps; None stands for what is outside of steps."""
    real_build, real_step, current = loop.build, loop.Training.step, [None]

    def step(self, number, *rest):
        current[0] = number
        found = real_step(self, number, *rest)
        current[0] = None
        return found

    def build(config):
        network = real_build(config)
        network.get_submodule(part).register_forward_hook(lambda _, inputs, y: y * factor if current[0] in steps else y)
        return network

    monkeypatch.setattr(loop.Training, "step", step)
    monkeypatch.setattr(loop, "build", build)


BAD = pytest.mark.parametrize(("part", "factor"), [("stem", float("nan")), ("head", 1e6)])


@BAD
def test_a_step_that_is_not_taken_leaves_no_mark_on_weights_norms_and_average(config, digits, monkeypatch, part, factor):
    config["recipe"] |= {"bad_steps": 3, "ema_decay": 0.9}
    spoil(monkeypatch, {1, 2}, part, factor)
    training, states = loop.Training(config, digits, SEED), []
    training.start(None, {})
    for _ in training.epoch("", 0, lambda: [False]):
        states.append([tensor.clone() for network in (training.model, training.judged)
                       for tensor in network.state_dict().values()])
    assert (training.tally.good, training.tally.bad) == (2, 2)
    assert all(map(torch.equal, states[0], states[1]))
    assert all(map(torch.equal, states[0], states[2]))
    assert not all(map(torch.equal, states[0], states[3]))
    assert all(tensor.isfinite().all() for tensor in states[3])
    counts = [tensor for name, tensor in training.model.named_buffers() if name.endswith("num_batches_tracked")]
    assert counts
    assert all(count == 2 for count in counts)


@BAD
def test_few_bad_steps_in_a_row_are_counted_and_not_taken(config, digits, tmp_path, monkeypatch, part, factor):
    config["recipe"] |= {"bad_steps": 3, "sparsity": None}
    spoil(monkeypatch, {4, 5, 7, 8}, part, factor)
    out = run(config, digits, tmp_path)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line.get("bad_steps", 0) for line in lines] == [0, 3, 1, 0]
    assert all(0 < line["train_loss"] < 10 for line in lines)
    assert "top1" in metrics_of(out)


def test_the_last_good_checkpoint_of_a_run_that_diverged_is_kept(config, digits, tmp_path, monkeypatch):
    config["recipe"] |= {"bad_steps": 3}
    spoil(monkeypatch, {9, 10, 11}, "stem", float("nan"))
    assert metrics_of(run(config, digits, tmp_path))["diverged"]["value"] == 12
    state = checkpoint.load(checkpoint.newest(tmp_path / "checkpoints"))
    assert (state["done"], state["position"]) == (2, 0)


def test_a_validation_loss_that_is_no_number_ends_the_run_as_diverged(config, digits, tmp_path, monkeypatch, caplog):
    config["recipe"] |= {"sparsity": None, "evaluate_every": 2}
    spoil(monkeypatch, {None}, "head", float("inf"))
    assert metrics_of(run(config, digits, tmp_path)) == {"diverged": {"value": 8, "unit": "step"}}
    assert "DIVERGED: the validation loss became nan after step 8" in caplog.text


def test_a_weight_that_is_no_number_is_not_kept_as_a_checkpoint(config, digits, tmp_path, monkeypatch):
    real = loop.Training.step

    def poison(self, step, *rest):
        found = real(self, step, *rest)
        if step == 2 * self.steps - 1:                                # the last step of epoch 2: no later loss tells
            with torch.no_grad():
                self.model.head.bias[0] = float("nan")
        return found

    monkeypatch.setattr(loop.Training, "step", poison)
    assert metrics_of(run(config, digits, tmp_path)) == {"diverged": {"value": 8, "unit": "step"}}
    monkeypatch.undo()
    assert checkpoint.newest(tmp_path / "checkpoints").name == "epoch0001.pt"
    assert "top1" in metrics_of(run(config, digits, tmp_path))


def test_the_average_is_as_sparse_as_the_masks(config, digits, tmp_path):
    config["recipe"] |= {"ema_decay": 0.9}
    weights = load_file(run(config, digits, tmp_path) / "weights.safetensors")
    masks = checkpoint.load(checkpoint.newest(tmp_path / "checkpoints"))["sparsity"]["masks"]
    assert masks
    for name, mask in masks.items():
        assert not weights[name][~mask.expand_as(weights[name])].any(), name


def test_a_run_that_goes_on_elsewhere_says_so(config, digits, tmp_path, caplog):
    run(config, digits, tmp_path)
    out = run(config, digits, tmp_path, library_sha256="another build")
    assert "goes on here" in caplog.text
    places = json.loads((out / "run.json").read_text())["environments"]
    assert [place["library_sha256"] == "another build" for place in places] == [False, True]


def test_the_log_grows_by_the_epoch_beside_the_checkpoint(config, digits, tmp_path):
    out = run(config, digits, tmp_path)
    assert (tmp_path / "checkpoints/log.jsonl").read_bytes() == (out / "log.jsonl").read_bytes()


def test_steps_are_logged_on_request(config, digits, tmp_path):
    loop.train(config, digits, tmp_path / "out", tmp_path / "checkpoints", circumstances(config), log_every=5)
    lines = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line.get("event") == "step"] == [5, 10, 15]


def test_pruned_weights_are_zero_in_what_is_published(config, digits, tmp_path):
    weights = load_file(run(config, digits, tmp_path) / "weights.safetensors")
    filters = weights["stages.1.blocks.0.mixer.filters.0"].flatten(1)
    dead = (filters == 0).all(1)
    assert dead.any()
    assert (filters[~dead] != 0).any(1).all()


@pytest.fixture
def photographs(tmp_path):
    """A folder in ImageNet's form: two classes, JPEGs of several sizes, some grey."""
    for split, count in (("train", 12), ("val", 5)):
        for wnid, shade in (("n01440764", 60), ("n03445777", 190)):
            folder = tmp_path / "imagenet" / split / wnid
            folder.mkdir(parents=True)
            for index in range(count):
                noise = np.random.RandomState(index).randint(-50, 50, (70 + 7 * index, 90, 3))
                image = Image.fromarray((shade + noise).clip(0, 255).astype(np.uint8))
                (image.convert("L") if index == 1 else image).save(folder / f"{wnid}_{index}.JPEG")
    return tmp_path / "imagenet"


@pytest.mark.parametrize("row", ["sw11", "sw24"])
def test_the_papers_recipe_trains_on_a_folder_in_imagenets_form(photographs, tmp_path, row):
    """All of it: RandAugment, crops, erasing, Mixup and CutMix, drop path, EMA, worker processes, micro-batches, masks."""
    config = params.load().resolve(row, "paper")
    config["model"]["args"] |= {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}
    config["recipe"] |= {"epochs": 2, "batch_size": 8, "warmup_epochs": 1}
    config["recipe"]["sparsity"] |= {"update_every": 2}
    config["dataset"] |= {"root": str(photographs), "num_classes": 2, "image_size": 64, "workers": 1}
    config["machine"] |= {"device": "cpu", "threads": 1, "micro_batch": 4}
    manifest.prepare(config["dataset"], tmp_path / "data")
    out = run(config, tmp_path / "data", tmp_path)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["steps"]["value"] == 6
    assert metrics["density"]["value"] < 0.9
    evaluation.evaluate(config, tmp_path / "data", out / "weights.safetensors", tmp_path / "evaluate", circumstances(config))
    assert json.loads((tmp_path / "evaluate/metrics.json").read_text())["images"]["value"] == 10


def test_files_that_others_stood_in_for_are_in_the_results_and_survive_a_stop(config, photographs, tmp_path):
    bad = sorted((photographs / "train").rglob("*_[34].JPEG"))
    for path in bad:
        path.write_bytes(b"")
    config["recipe"] |= {"epochs": 1, "warmup_epochs": 0.0, "batch_size": 4, "sparsity": None}
    config["dataset"] |= {"name": "photos", "root": str(photographs), "num_classes": 2, "bad_files": "skip", "cache": False}
    manifest.prepare(config["dataset"], tmp_path / "data")
    with pytest.raises(StoppedError):                                 # before the last of six steps: most files have been met
        loop.train(config, tmp_path / "data", tmp_path / "out", tmp_path / "checkpoints", circumstances(config),
                   asked=stop_after(5))
    out = run(config, tmp_path / "data", tmp_path)
    assert json.loads((out / "run.json").read_text())["bad_files"] == [str(path) for path in bad]
    assert metrics_of(out)["bad_files"] == {"value": 4, "unit": "files"}
    assert json.loads((out / "log.jsonl").read_text().splitlines()[-1])["bad_files"] == 4


def test_images_that_changed_since_the_manifest_are_not_measured(config, digits, tmp_path):
    out, data = run(config, digits, tmp_path), shutil.copytree(digits, tmp_path / "data")
    changed = next((data / "images" / "val").rglob("*.png"))
    changed.write_bytes(changed.read_bytes() + b"\0")
    with pytest.raises(ValueError, match=rf"{changed} \(changed\); restore them"):
        evaluation.evaluate(config, data, out / "weights.safetensors", tmp_path / "evaluate", circumstances(config))


def test_micro_batches_give_the_gradient_of_the_whole_batch(config, digits):
    """float64, no BatchNorm in the way (its statistics are per micro-batch, as published)."""
    config["recipe"] |= {"sparsity": None, "batch_size": 12}
    x, target = torch.randn(12, 1, 8, 8, dtype=torch.float64), torch.arange(12) % 10
    gradients = []
    for size in (12, 4, 5):
        training = loop.Training(config, digits, SEED)
        training.normalise = lambda images: images
        torch.manual_seed(1)
        training.forward = training.model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).double()
        training.optimizer = torch.optim.SGD(training.model.parameters(), lr=0.0)
        (loss,) = training.step(0, zip(x.split(size), target.split(size), strict=True))
        gradients.append((loss, training.model[1].weight.grad))
    for loss, gradient in gradients[1:]:
        assert loss == pytest.approx(gradients[0][0], abs=1e-12)
        torch.testing.assert_close(gradient, gradients[0][1], atol=1e-14, rtol=1e-12)


def test_evaluation_equals_the_training_metric_and_merging_changes_nothing(config, digits, tmp_path):
    out = run(config, digits, tmp_path)
    evaluation.evaluate(config, digits, out / "weights.safetensors", tmp_path / "evaluate", circumstances(config))
    trained, measured = (json.loads((tmp_path / stage / "metrics.json").read_text()) for stage in ("out", "evaluate"))
    assert measured["top1"] == trained["top1"]
    assert measured["merged_logit_difference"]["value"] < 1e-5
    assert measured["images"]["value"] == 64
    assert {"top1_distance_2", "top1_distance_5"} <= measured.keys()


def test_damaged_weights_are_refused_with_the_repair(config, digits, tmp_path):
    out = run(config, digits, tmp_path)
    path = out / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ValueError, match="is damaged.*dvc checkout"):
        evaluation.evaluate(config, digits, path, tmp_path / "evaluate", circumstances(config))


def test_a_changed_image_is_noticed_before_training(config, digits, tmp_path):
    image = next((digits / "images/val").rglob("*.png"))
    content = image.read_bytes()
    image.write_bytes(content[:-20] + b"\x00" * 20)
    try:
        with pytest.raises(ValueError, match=f"{image.name} .changed."):
            run(config, digits, tmp_path)
    finally:
        image.write_bytes(content)


def test_gpu_profile_without_gpu_is_told_in_a_sentence(config, digits, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    config["machine"] |= {"device": "cuda"}
    with pytest.raises(RuntimeError, match="torch sees none"):
        run(config, digits, tmp_path)


def test_a_fine_tune_starts_from_the_weights_it_is_given_at_any_image_size(config, digits, tmp_path):
    config["recipe"] |= {"epochs": 1, "warmup_epochs": 0.5}
    first = run(config, digits, tmp_path / "first")
    config["dataset"] |= {"image_size": 64}
    config["recipe"] |= {"layer_decay": 0.7, "lr": 1e-30, "weight_decay": 0.0}
    config["recipe"]["sparsity"] |= {"density": "nonzero", "prune_rate": 0.0}
    tuned = run(config, digits, tmp_path / "tuned", init=first / "weights.safetensors")
    before, after = (load_file(out / "weights.safetensors") for out in (first, tuned))
    for name, _ in loop.build(config).named_parameters():
        assert torch.equal(before[name], after[name]), name           # at no learning rate: masks and all


def test_weights_to_start_from_have_to_fit(config, digits, tmp_path):
    config["recipe"] |= {"epochs": 1, "warmup_epochs": 0.5}
    first = run(config, digits, tmp_path / "first")
    config["model"]["args"] |= {"dims": [8, 16]}
    with pytest.raises(ValueError, match="needs to hold the weights of this row's network"):
        run(config, digits, tmp_path / "tuned", init=first / "weights.safetensors")
    (first / "weights.safetensors.sha256").write_text("0" * 64)
    with pytest.raises(ValueError, match="is damaged"):
        run(config, digits, tmp_path / "tuned", init=first / "weights.safetensors")


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_mixed_precision_trains_sparsely_and_resumes_bitwise(config, digits, tmp_path, amp):
    config["machine"] |= {"amp": amp}
    straight = run(config, digits, tmp_path / "straight")
    with pytest.raises(StoppedError):
        loop.train(config, digits, tmp_path / "cut/out", tmp_path / "cut/checkpoints", circumstances(config),
                   asked=stop_after(6))
    resumed = run(config, digits, tmp_path / "cut")
    assert (resumed / "weights.safetensors").read_bytes() == (straight / "weights.safetensors").read_bytes()
    assert metrics_of(straight)["density"]["value"] < 0.9
    state = checkpoint.load(checkpoint.newest(tmp_path / "cut/checkpoints"))
    assert ("scaler" in state) == (amp == "float16")
    weights = load_file(straight / "weights.safetensors")
    for name, mask in state["sparsity"]["masks"].items():
        assert not weights[name][~mask.expand_as(weights[name])].any(), name


def test_a_step_that_overflows_in_half_precision_is_skipped_with_its_mask_update(config, digits):
    config["machine"] |= {"amp": "float16"}
    training = loop.Training(config, digits, SEED)
    training.start(None, {})
    before = {name: p.clone() for name, p in training.model.named_parameters()}
    training.scaler.load_state_dict(training.scaler.state_dict() | {"scale": 2.0**127})
    training.step(3, training.loader.epoch(1))
    assert training.sparsity.steps == 0
    assert all(torch.equal(before[name], p) for name, p in training.model.named_parameters())
    assert training.scaler.get_scale() == 2.0**126


def test_run_json_tells_the_precision_that_held(config, digits, tmp_path):
    config["machine"] |= {"tf32": True}
    try:
        loop.prepare_machine(config["machine"])
        told = circumstances(config)["flags"]
        assert (told["tf32_matmul"], told["tf32_cudnn"]) == (True, True)
    finally:
        loop.prepare_machine(config["machine"] | {"tf32": False})
    assert circumstances(config)["flags"]["tf32_matmul"] is False


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")       # torch.compile's own, of torch.jit
def test_a_compiled_network_trains_to_the_same_losses_and_publishes_plain_names(config, digits, tmp_path):
    config["recipe"] |= {"epochs": 1, "warmup_epochs": 0.5, "sparsity": None}
    config["model"]["args"] |= {"depths": [1], "dims": [8], "kernel_sizes": [13]}
    plain = run(config, digits, tmp_path / "plain")
    config["machine"] |= {"compile": True}
    compiled = run(config, digits, tmp_path / "compiled")
    assert metrics_of(compiled)["train_loss"]["value"] == pytest.approx(metrics_of(plain)["train_loss"]["value"], abs=1e-4)
    assert load_file(compiled / "weights.safetensors").keys() == load_file(plain / "weights.safetensors").keys()


@pytest.mark.parametrize(("micro", "processes", "mixup"), [(12, 1, 0.0), (16, 3, 0.0), (2, 2, 0.8)])
def test_a_batch_that_does_not_divide_is_refused_before_any_work(micro, processes, mixup):
    with pytest.raises(ValueError, match=f"a batch of 32 images must fall into parts of {micro} .* of {processes} processes"):
        loop.share_of_batch({"batch_size": 32, "mixup": mixup, "cutmix": 0.0}, {"micro_batch": micro}, processes)
