"""The loop: it learns, it publishes whole results, and a killed training ends bit for bit where an undisturbed one ends."""

import json
import os
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


def run(config, digits, folder: Path, seed: int = SEED, **other) -> Path:
    loop.train(config, digits, folder / "out", folder / "checkpoints", circumstances(config, seed, **other))
    return folder / "out"


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
def test_resume_is_bitwise_with_every_random_part(config, digits, tmp_path, monkeypatch, change):
    config["recipe"] |= change
    straight = run(config, digits, tmp_path / "straight")

    class Interrupt(Exception):
        pass

    real = loop.checkpoint.save

    def save_then_stop(folder, epoch, state):
        real(folder, epoch, state)
        if epoch == 2:
            raise Interrupt

    monkeypatch.setattr(loop.checkpoint, "save", save_then_stop)
    with pytest.raises(Interrupt):
        run(config, digits, tmp_path / "cut")
    monkeypatch.undo()
    torch.manual_seed(99)                                             # whatever came between must not matter
    resumed = run(config, digits, tmp_path / "cut")
    assert (resumed / "weights.safetensors").read_bytes() == (straight / "weights.safetensors").read_bytes()


def test_another_seed_gives_other_weights(config, digits, tmp_path):
    config["recipe"] |= {"epochs": 2}
    first, second = (load_file(run(config, digits, tmp_path / str(seed), seed) / "weights.safetensors") for seed in (0, 1))
    assert not torch.equal(first["head.weight"], second["head.weight"])


def test_a_loss_that_is_no_number_stops_with_the_epoch_and_keeps_the_checkpoint(config, digits, tmp_path):
    config["recipe"] |= {"lr": 1e30, "warmup_epochs": 1.0}
    with pytest.raises(loop.DivergedError, match=r"the loss became \w+ in epoch \d, step \d+; the last good checkpoint"):
        run(config, digits, tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_weight_that_is_no_number_is_not_kept_as_a_checkpoint(config, digits, tmp_path, monkeypatch):
    real = loop.Training.step

    def poison(self, step, batches):
        loss = real(self, step, batches)
        if step == 2 * self.steps - 1:                                # the last step of epoch 2: no later loss tells
            with torch.no_grad():
                self.model.head.bias[0] = float("nan")
        return loss

    monkeypatch.setattr(loop.Training, "step", poison)
    with pytest.raises(loop.DivergedError, match=r"sw22 seed 0: a weight is no number after epoch 2; the last good checkpoint"):
        run(config, digits, tmp_path)
    monkeypatch.undo()
    assert checkpoint.load(tmp_path / "checkpoints")["epoch"] == 1
    assert run(config, digits, tmp_path).exists()


def test_the_average_is_as_sparse_as_the_masks(config, digits, tmp_path):
    config["recipe"] |= {"ema_decay": 0.9}
    weights = load_file(run(config, digits, tmp_path) / "weights.safetensors")
    masks = checkpoint.load(tmp_path / "checkpoints")["sparsity"]["masks"]
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


def test_schedule_warms_up_from_zero_and_ends_at_min_lr(config):
    config["recipe"] |= {"epochs": 10, "warmup_epochs": 2, "min_lr": 1e-4, "lr": 1e-2}
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-2)
    schedule = loop._schedule(optimizer, config["recipe"], steps=10)
    rates = []
    for step in range(101):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == 0
    assert rates[10] == pytest.approx(5e-3)
    assert rates[20] == pytest.approx(1e-2)
    assert rates[60] == pytest.approx((1e-2 + 1e-4) / 2)
    assert rates[100] == pytest.approx(1e-4)


def test_micro_batches_give_the_gradient_of_the_whole_batch(config, digits):
    """float64, no BatchNorm in the way (its statistics are per micro-batch, as published)."""
    config["recipe"] |= {"sparsity": None, "batch_size": 12}
    x, target = torch.randn(12, 1, 8, 8, dtype=torch.float64), torch.arange(12) % 10
    gradients = []
    for size in (12, 4, 5):
        training = loop.Training(config, digits, SEED)
        training.normalise = lambda images: images
        torch.manual_seed(1)
        training.model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).double()
        loss = training.step(0, zip(x.split(size), target.split(size), strict=True))
        gradients.append((loss, training.model[1].weight.grad))
    for loss, gradient in gradients[1:]:
        assert loss == pytest.approx(gradients[0][0], abs=1e-12)
        torch.testing.assert_close(gradient, gradients[0][1], atol=1e-14, rtol=1e-12)


def test_norms_and_biases_do_not_decay_but_grn_does(config):
    model = loop.build(config)
    decayed, free = loop.parameter_groups(model, 0.05)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)].rsplit(".", 2)[-2] for p in decayed["params"] if p.ndim == 1} == {"grn"}
    assert all(p.ndim == 1 for p in free["params"])
    assert len(decayed["params"]) + len(free["params"]) == len(names)


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
