"""A fine-tune ends where it would have ended undisturbed, starts from the weights that it is given, keeps their zeros."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from swconv.__main__ import main
from swconv.downstream import finetuning
from swconv.downstream.finetuning import fine_tune, load_pretrained, rate
from swconv.training.stop import StoppedError

TASKS = ("ade20k", "coco", "voc", "nuscenes")
POLY = {"decay": "poly", "power": 1.0, "warmup_iterations": 4, "warmup_ratio": 0.1}
STEP = {"decay": "step", "milestones": [2, 3], "gamma": 0.1, "warmup_iterations": 0, "warmup_ratio": 0.1}


@pytest.fixture
def config(known):
    """Three passes over PASCAL VOC, with all that draws random numbers."""
    row = known.resolve(known.examples["voc"], "smoke")
    row["recipe"] |= {"epochs": 3, "batch_size": 6, "drop_path_rate": 0.3}
    return row


def stop_after(steps):
    looks = iter(range(1, 10**6))
    return lambda: next(looks) == steps


def test_poly_falls_to_zero_and_its_warm_up_rises_from_a_share_of_it():
    assert [round(rate(POLY, step, 5, 10), 6) for step in (0, 2, 4, 9)] == [0.1, 0.44, 0.6, 0.1]


def test_steps_fall_at_the_start_of_the_epochs_that_are_named():
    assert [round(rate(STEP, step, 5, 20), 6) for step in (0, 9, 10, 14, 15)] == [1.0, 1.0, 0.1, 0.1, 0.01]


def test_a_stopped_fine_tune_ends_bit_for_bit_where_an_undisturbed_one_ends(config, fitted, pretrained, known, tmp_path):
    init = pretrained(known.examples["voc"])
    whole = fitted(config, tmp_path / "whole", init)
    with pytest.raises(StoppedError, match="stopped as asked after step 4"):
        fitted(config, tmp_path / "cut", init, asked=stop_after(4))
    cut = fitted(config, tmp_path / "cut", init)
    assert (cut / "weights.safetensors").read_bytes() == (whole / "weights.safetensors").read_bytes()
    losses = [[json.loads(line)["train_loss"] for line in (out / "log.jsonl").read_text().splitlines()] for out in (whole, cut)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3
    assert json.loads((cut / "run.json").read_text())["resumed_from_step"] == 4


def test_a_stopped_fine_tune_lets_go_of_its_process_group_before_that_ends(config, fitted, pretrained, known, tmp_path,
                                                                             monkeypatch):
    order = []

    @contextmanager
    def group(device):
        try:
            yield
        finally:
            order.append("group ended")

    monkeypatch.setattr(finetuning.distributed, "group", group)
    monkeypatch.setattr(finetuning.FineTuning, "leave_group", lambda self: order.append("left"))
    with pytest.raises(StoppedError):
        fitted(config, tmp_path, pretrained(known.examples["voc"]), asked=stop_after(1))
    assert order == ["left", "group ended"]


def test_a_pass_without_a_good_step_has_no_loss_in_the_log_and_a_status_line(config, fitted, pretrained, known, tmp_path,
                                                                              monkeypatch, caplog):
    real, bad = finetuning.FineTuning.step, []

    def step(self, number, *rest):
        loss, *wished = real(self, number, *rest)
        if number < self.steps:
            bad.append(number)
            loss = float("nan")
        return [loss, *wished]

    monkeypatch.setattr(finetuning.FineTuning, "step", step)
    with caplog.at_level(logging.INFO):
        out = fitted(config, tmp_path, pretrained(known.examples["voc"]))
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert ["train_loss" in line for line in lines] == [False, True, True]
    assert lines[0]["bad_steps"] == len(bad) > 0
    assert "epoch   1/3  loss nan  " in caplog.text
    assert "top-1" not in caplog.text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")       # torch.compile's own, of torch.jit
def test_a_compiled_backbone_takes_images_of_many_sizes_and_keeps_its_zeros(config, tiny, pretrained, known):
    torch.compiler.reset()                                            # and with it the sizes seen
    counters.clear()
    config["recipe"] |= {"drop_path_rate": 0.0}                       # which a compiled network draws otherwise
    plain, compiled = (
        finetuning.FineTuning(config | {"machine": config["machine"] | {"compile": choice}}, tiny / "voc", 0,
                              pretrained(known.examples["voc"])).model for choice in (False, True))
    for size in [(96, 128), (112, 160), (128, 96)]:
        x, grads = torch.randn(2, 3, *size), []
        for model in (plain, compiled):
            for weight in model.pyramid.parameters():
                weight.data.add_(0.01)                                # as a step of the optimizer moves them, zeros too
            maps = model.pyramid(x)
            grads.append(torch.autograd.grad(sum(y.square().sum() for y in maps), list(model.pyramid.parameters())))
        largest = max(grad.abs().max() for grad in grads[0])
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(b, a, atol=1e-5 * float(largest), rtol=1e-3)
    assert counters["stats"]["unique_graphs"] == 2                    # of the first size, and of any
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    assert all((weight[~compiled.pyramid.masks[name]] == 0).all() for name, weight in compiled.pyramid.net.named_parameters()
               if name in compiled.pyramid.masks)


SCRIPT = """
import json, sys
from pathlib import Path
from swconv.downstream.finetuning import fine_tune
config, told = map(json.loads, sys.argv[1:3])
data, folder, init = map(Path, sys.argv[3:])
fine_tune(config, data, folder / "out", folder / "checkpoints", told, init=init)
"""


@pytest.mark.slow
def test_a_killed_fine_tune_loses_nothing(config, fitted, told, tiny, pretrained, known, tmp_path):
    init, folder = pretrained(known.examples["voc"]), tmp_path / "killed"
    config["machine"]["checkpoint_minutes"] = 1e-6                    # after every step
    arguments = [json.dumps(config), json.dumps(told), tiny / "voc", folder, init]
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, *map(str, arguments)])
    deadline = time.monotonic() + 120
    while len(list((folder / "checkpoints").glob("*_step*.pt"))) < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (folder / "out").exists()
    whole, rest = fitted(config, tmp_path / "whole", init), fitted(config, folder, init)
    assert (rest / "weights.safetensors").read_bytes() == (whole / "weights.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("task", ["ade20k", "nuscenes"])
def test_two_processes_share_a_fine_tune_and_publish_one_result(task, known, tiny, pretrained, tmp_path):
    shutil.copytree("params", tmp_path / "params")
    path, run = tmp_path / "params/downstream.yaml", known.examples[task]
    text = path.read_text()
    assert text.count("machine: {memory_format: contiguous}") == 2
    path.write_text(text.replace("machine: {memory_format: contiguous}", "machine: {processes: 2}", 1))
    command = [sys.executable, "-m", "swconv", "finetune", run, "--profile", "smoke", "--seed", "0", "--data", tiny / task,
               "--init", pretrained(run), "--out", tmp_path / "out"]
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.getcwd()}, text=True,
                          capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "out/run.json").read_text())
    assert [each["processes"] for each in told["environments"]] == [2]
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["steps"]["value"] == 2
    assert metrics["train_loss"]["value"] > 0


def test_a_signal_ends_with_85_and_saves(known, tiny, pretrained, tmp_path, monkeypatch, capsys):
    run = known.examples["voc"]
    monkeypatch.setattr("swconv.__main__.CHECKPOINTS", tmp_path / "checkpoints")
    step = finetuning.FineTuning.step

    def interrupted(self, *arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *arguments)

    monkeypatch.setattr(finetuning.FineTuning, "step", interrupted)
    arguments = ["finetune", run, "--profile", "smoke", "--seed", "0", "--data", str(tiny / "voc"),
                 "--init", str(pretrained(run)), "--out", str(tmp_path / "out")]
    assert main(arguments) == 85
    assert "The same command goes on from there" in capsys.readouterr().err
    monkeypatch.setattr(finetuning.FineTuning, "step", step)
    assert main(arguments) == 0
    assert json.loads((tmp_path / "out/run.json").read_text())["resumed_from_step"] >= 1


@pytest.mark.parametrize("task", TASKS)
def test_zeros_of_the_pretrained_weights_stay_zero_and_the_rest_learns(task, known, finished, pretrained):
    _, weights = finished(task)
    before, after = load_file(pretrained(known.examples[task])), load_file(weights)
    kept = [name for name, tensor in before.items() if name.startswith("stages.") and tensor.dim() in (2, 4)]
    assert len(kept) > 5
    for name in kept:
        tensor, was = after[f"pyramid.net.{name}"], before[name]
        assert ((tensor == 0) == (was == 0)).all()
    assert any(not torch.equal(after[f"pyramid.net.{name}"], before[name]) for name in kept)
    metrics = json.loads(weights.with_name("metrics.json").read_text())
    assert metrics["steps"]["value"] == 2
    assert metrics["zeros_kept"]["value"] == sum(int((before[name] == 0).sum()) for name in kept)


def test_a_pretrained_network_of_two_stages_sees_a_grey_image_as_before(known, pretraining, pretrained):
    run = known.examples["ade20k"]
    row, init = known.resolve(run, "smoke"), pretrained(run)
    pyramid = finetuning.build_pyramid(row)
    fresh = {name: tensor.clone() for name, tensor in pyramid.net.state_dict().items()}
    load_pretrained(pyramid, init, row["grown"])
    model = pretraining.resolve(known.source(run, "smoke")[1], "smoke")["model"]
    classifier = timm.create_model(model["name"], num_classes=10, in_chans=1, **model["args"])
    classifier.load_state_dict(load_file(init))
    grey = torch.rand(1, 1, 64, 64)
    seen = classifier.eval().forward_intermediates(grey, indices=2, intermediates_only=True)
    maps = pyramid.eval().net.forward_intermediates(grey.repeat(1, 3, 1, 1), indices=4, intermediates_only=True)
    for ours, theirs in zip(maps[:2], seen, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    new = [name for name in fresh if name.startswith(("stages.2.", "stages.3."))]
    assert len(new) > 10
    assert all(torch.equal(pyramid.net.state_dict()[name], fresh[name]) for name in new)


def test_every_row_takes_the_weights_of_its_pretraining_and_has_a_network_to_overfit(known, pretrained):
    for run in known.runs:
        row = known.resolve(run, "smoke")
        load_pretrained(finetuning.build_pyramid(row), pretrained(run), row["grown"])
        assert len(finetuning.build_pyramid(known.resolve(run, "overfit")).channels) == 4


def test_foreign_damaged_or_missing_initial_weights_are_refused(config, fitted, pretrained, known, publish, tmp_path):
    with pytest.raises(ValueError, match=r"needs the weights of its own backbone, got others: .*name that run in init_from"):
        fitted(config, tmp_path, pretrained(known.examples["coco"]))
    path = tmp_path / "weights.safetensors"
    publish({"head.fc.weight": torch.zeros(2)}, path)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="is damaged"):
        fitted(config, tmp_path, path)
    with pytest.raises(FileNotFoundError, match="train the run first"):
        fitted(config, tmp_path, tmp_path / "nowhere/weights.safetensors")


def test_data_of_another_task_and_changed_files_are_refused(config, tiny, told, pretrained, known, tmp_path):
    init, places = pretrained(known.examples["voc"]), (tmp_path / "out", tmp_path / "checkpoints")
    with pytest.raises(ValueError, match="needs to be of voc, got coco; give the folder of that task"):
        fine_tune(config, tiny / "coco", *places, told, init=init)
    shutil.copytree(tiny / "voc", tmp_path / "voc")
    image = next((tmp_path / "voc/files/VOC2007/JPEGImages").glob("*.jpg"))
    image.write_bytes(image.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"got 1 that differ: .*\.jpg \(changed\); restore them or run the data rule again"):
        fine_tune(config, tmp_path / "voc", *places, told, init=init)
