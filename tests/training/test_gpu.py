"""Training on a GPU: in float32 it follows the CPU, in mixed precision it stays near, and a stop costs nothing but time."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

RUN = "sw22"


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    pytest.importorskip("pydantic")                                   # rows come from params
    from swconv import params
    from swconv.training import manifest

    folder = tmp_path_factory.mktemp("data")
    manifest.prepare(params.load().profiles["smoke"].dataset.model_dump(exclude_none=True), folder)
    return folder


@pytest.fixture
def config(digits):
    from swconv import params

    row = params.load().resolve(RUN, "smoke")
    row["recipe"] |= {"epochs": 4, "evaluate_every": 1}
    return row


def run(config, digits: Path, folder: Path, machine: dict, **other) -> Path:
    from swconv.training import loop, record

    config = config | {"machine": config["machine"] | machine}
    told = record.circumstances(key="k", run=RUN, profile="smoke", seed=0, code="c", config=config, data_sha256="d")
    loop.train(config, digits, folder / "out", folder / "checkpoints", told, **other)
    return folder / "out"


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line["train_loss"] for line in lines if "train_loss" in line]


@pytest.mark.parametrize(("machine", "allowed"), [
    ({}, 2e-3), ({"tf32": True}, 2e-2), ({"amp": "bfloat16"}, 5e-2), ({"amp": "float16"}, 5e-2),
    ({"memory_format": "contiguous"}, 2e-3), ({"micro_batch": 16}, 2e-3),
], ids=str)
def test_a_training_on_the_gpu_follows_that_on_the_cpu(config, digits, tmp_path, machine, allowed):
    config["recipe"]["sparsity"] |= {"prune_rate": 0.0}               # which filters are weakest is a matter of last digits
    reference = run(config, digits, tmp_path / "cpu", {key: machine[key] for key in machine if key == "micro_batch"})
    got = run(config, digits, tmp_path / "gpu", machine | {"device": "cuda"})
    assert losses(got) == pytest.approx(losses(reference), rel=allowed)
    weights = load_file(got / "weights.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values() if tensor.is_floating_point())
    assert not any(tensor.is_cuda for tensor in weights.values())


def test_masks_are_kept_in_mixed_precision(config, digits, tmp_path):
    out = run(config, digits, tmp_path, {"device": "cuda", "amp": "bfloat16"})
    metrics = json.loads((out / "metrics.json").read_text())
    filters = [w for name, w in load_file(out / "weights.safetensors").items() if "mixer.filters" in name]
    dead = sum((w.flatten(1) == 0).all(1).sum().item() for w in filters) / sum(len(w) for w in filters)
    assert dead == pytest.approx(1 - metrics["density"]["value"], abs=0.1)
    assert dead > 0.1


def test_a_stopped_training_goes_on_and_ends_where_an_undisturbed_one_ends(config, digits, tmp_path):
    from swconv.training.stop import StoppedError

    machine = {"device": "cuda"}
    straight = run(config, digits, tmp_path / "straight", machine)
    looks = iter(range(1, 10**6))
    with pytest.raises(StoppedError):
        run(config, digits, tmp_path / "cut", machine, asked=lambda: next(looks) == 6)
    resumed = run(config, digits, tmp_path / "cut", machine)
    assert json.loads((resumed / "run.json").read_text())["resumed_from_step"] == 6
    assert losses(resumed) == pytest.approx(losses(straight), rel=1e-3)
