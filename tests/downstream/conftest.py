"""Tiny data of every task, and weights of the smoke networks as a pretraining publishes them: random ones, some zero."""

import hashlib
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

import swconv.models  # noqa: F401  registers the models with timm
from swconv.downstream import sources
from swconv.downstream.finetuning import fine_tune
from swconv.training import record

TASKS = ("ade20k", "coco", "voc", "nuscenes")


@pytest.fixture(scope="session")
def pretraining():
    from swconv import params  # and with it pydantic, which test_gpu.py does without

    return params.load()


@pytest.fixture(scope="session")
def known(pretraining):
    from swconv import downstream_params

    return downstream_params.load(Path("params"), pretraining)


@pytest.fixture(scope="session")
def tiny(known, tmp_path_factory):
    """Folders of the data rule, by task."""
    folder = tmp_path_factory.mktemp("downstream_data")
    for task in TASKS:
        sources.prepare(task, known.of_task(task, "smoke"), folder / task)
    return folder


@pytest.fixture(scope="session")
def pretrained(known, pretraining, publish, tmp_path_factory):
    """Of a downstream run: weights.safetensors of its pretraining, as that would publish them."""
    folder = tmp_path_factory.mktemp("pretrained")

    def weights(run: str) -> Path:
        _, source = known.source(run, "smoke")
        row, path = pretraining.resolve(source, "smoke"), folder / source / "weights.safetensors"
        if not path.exists():
            torch.manual_seed(0)
            network = timm.create_model(row["model"]["name"], num_classes=10, in_chans=1, **row["model"]["args"])
            state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
            for name, tensor in state.items():
                if name.startswith("stages.") and tensor.dim() in (2, 4):
                    tensor[::2] = 0
            path.parent.mkdir()
            publish(state, path)
        return path

    return weights


@pytest.fixture(scope="session")
def publish():
    """Weights as a finished run leaves them."""

    def write(state: dict, path: Path) -> None:
        save_file(state, path)
        path.with_name(f"{path.name}.sha256").write_text(hashlib.sha256(path.read_bytes()).hexdigest() + "\n")

    return write


@pytest.fixture(scope="session")
def told():
    """Circumstances."""
    return record.circumstances(key="k", run="row", profile="smoke", seed=0, code="c", config={}, data_sha256="d")


@pytest.fixture(scope="session")
def fitted(tiny, told):
    """Fine-tune a resolved row into a folder, from the weights of its pretraining; gives the folder of the results."""

    def fit(config: dict, folder: Path, init: Path, **more) -> Path:
        fine_tune(config, tiny / config["task"], folder / "out", folder / "checkpoints", told, init=init, **more)
        return folder / "out"

    return fit


@pytest.fixture(scope="session")
def finished(known, pretrained, fitted, tmp_path_factory):
    """Of a task: resolved row and weights of its example on profile smoke."""
    done = {}

    def get(task: str) -> tuple[dict, Path]:
        if task not in done:
            row = known.resolve(known.examples[task], "smoke")
            out = fitted(row, tmp_path_factory.mktemp(task), pretrained(known.examples[task]))
            done[task] = row, out / "weights.safetensors"
        return done[task]

    return get
