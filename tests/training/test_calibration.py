"""BatchNorm recalibration: statistics are the mean over the training batches, and nothing else moves."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from swconv import params
from swconv.training import calibration, evaluation, loop, manifest, record

RUN = "sw15"


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    manifest.prepare(params.load().profiles["smoke"].dataset.model_dump(exclude_none=True), folder)
    return folder


def configuration(run: str = RUN, **recipe) -> dict:
    config = params.load().resolve(run, "smoke")
    config["recipe"] |= {"epochs": 1, "warmup_epochs": 0.5, "evaluate_every": 1, "sparsity": None} | recipe
    return config


def circumstances(config: dict, run: str = RUN) -> dict:
    return record.circumstances(key="k", run=run, profile="smoke", seed=0, code="c", config=config, data_sha256="d")


@pytest.fixture(scope="module")
def weights(digits, tmp_path_factory):
    folder, config = tmp_path_factory.mktemp("run"), configuration()
    loop.train(config, digits, folder / "out", folder / "checkpoints", circumstances(config))
    return folder / "out/weights.safetensors"


def metrics_of(folder) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def test_statistics_are_the_average_over_all_training_batches(digits, weights, tmp_path):
    config = configuration(calibration_passes=2)
    calibration.calibrate(config, digits, weights, tmp_path, circumstances(config))
    before, after = load_file(weights), load_file(tmp_path / "weights.safetensors")
    for name in before:
        assert torch.equal(before[name], after[name]) == ("running" not in name and "num_batches" not in name), name

    model = loop.build(config)                                        # by hand, in the first norm of the network
    model.load_state_dict(before)
    name, norm = next((name, module) for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d))
    means = []
    norm.register_forward_pre_hook(lambda _, inputs: means.append(inputs[0].mean((0, 2, 3))))
    loader = loop.TrainLoader(config["dataset"], config["recipe"], digits, 0)
    normalise = loop.normaliser(config, torch.device("cpu"))
    model.train()
    with torch.no_grad():
        for epoch in (2, 3):
            for images, _ in loader.epoch(epoch):
                model(normalise(images))
    assert len(means) == 8
    assert after[f"{name}.num_batches_tracked"] == 8
    torch.testing.assert_close(after[f"{name}.running_mean"], torch.stack(means).mean(0), atol=1e-5, rtol=1e-5)


def test_accuracy_before_and_after_is_what_evaluation_finds(digits, weights, tmp_path):
    config = configuration()
    calibration.calibrate(config, digits, weights, tmp_path / "calibrate", circumstances(config))
    told = metrics_of(tmp_path / "calibrate")
    for key, path in (("before", weights), ("after", tmp_path / "calibrate/weights.safetensors")):
        evaluation.evaluate(config, digits, path, tmp_path / key, circumstances(config))
        found = metrics_of(tmp_path / key)
        assert (told[f"top1_{key}"], told[f"loss_{key}"]) == (found["top1"], found["loss"])
    assert told["loss_before"]["value"] != told["loss_after"]["value"]


def test_calibrating_twice_gives_the_same_bytes_with_erasing_and_drop_path(digits, weights, tmp_path):
    config = configuration(random_erasing=0.5, drop_path_rate=0.2)
    for name in ("one", "two"):
        torch.rand(3)
        calibration.calibrate(config, digits, weights, tmp_path / name, circumstances(config))
    assert (tmp_path / "one/weights.safetensors").read_bytes() == (tmp_path / "two/weights.safetensors").read_bytes()


def test_a_network_without_norms_is_refused(digits, weights, tmp_path):
    config = configuration("control_dw3")
    with pytest.raises(ValueError, match="run control_dw3 has no BatchNorm to calibrate"):
        calibration.calibrate(config, digits, weights, tmp_path, circumstances(config, "control_dw3"))


def test_weights_of_another_network_are_refused(digits, weights, tmp_path):
    config = configuration()
    config["model"]["args"] |= {"dims": [8, 16]}
    with pytest.raises(ValueError, match="needs to hold the weights of this row's network"):
        calibration.calibrate(config, digits, weights, tmp_path, circumstances(config))


def test_a_run_that_diverged_stays_diverged(digits, tmp_path):
    config = configuration(lr=1e30, warmup_epochs=0.0, epochs=2, bad_steps=2)
    loop.train(config, digits, tmp_path / "out", tmp_path / "checkpoints", circumstances(config))
    calibration.calibrate(config, digits, tmp_path / "out/weights.safetensors", tmp_path / "calibrate", circumstances(config))
    assert metrics_of(tmp_path / "calibrate") == metrics_of(tmp_path / "out")
    assert list(metrics_of(tmp_path / "out")) == ["diverged"]
