"""What the README tells a user to add works as written, and what it names exists."""

import importlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

from swconv import params
from swconv.__main__ import main

README = Path("README.md").read_text()


def snippet(after: str, language: str) -> str:
    """The first code block of a language after some words."""
    return re.search(rf"```{language}\n(.*?)```", README.split(after, 1)[1], re.DOTALL)[1]


@pytest.fixture
def project(tmp_path, monkeypatch):
    shutil.copytree("params", tmp_path / "params")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_added_ablation_is_a_row_that_trains(project):
    path = project / "params/runs.yaml"
    path.write_text(path.read_text() + snippet("**An ablation**", "yaml"))
    known = params.load()
    assert known.resolve("mine", "paper")["model"]["args"]["edges"] == 1
    assert main(["data", "--profile", "smoke", "--out", "data"]) == 0
    assert main(["train", "mine", "--profile", "smoke", "--seed", "0", "--data", "data", "--out", "out"]) == 0
    assert (project / "out/weights.safetensors").exists()


def test_the_added_dataset_trains_and_evaluates(project):
    block = snippet("**A dataset**", "yaml")
    name = re.match(r"# (params/profiles/(\w+)\.yaml)", block)
    (project / name[1]).write_text(block)
    dataset = yaml.safe_load(block)["dataset"]
    colours = np.random.RandomState(0).randint(0, 255, (dataset["num_classes"], 3))
    for split, count in (("train", 40), ("val", 4)):
        for label, colour in enumerate(colours):
            folder = project / dataset["root"] / split / f"kind{label}"
            folder.mkdir(parents=True)
            for index in range(count):
                noise = np.random.RandomState(index).randint(-20, 20, (70, 90, 3))
                Image.fromarray((colour + noise).clip(0, 255).astype(np.uint8)).save(folder / f"{index}.jpg")
    edit = project / "params/recipes.yaml"
    edit.write_text(edit.read_text().replace("epochs: 120", "epochs: 30"))
    assert main(["data", "--profile", name[2], "--out", "data"]) == 0
    arguments = ["sw11", "--profile", name[2], "--seed", "0", "--data", "data"]
    assert main(["train", *arguments, "--out", "out"]) == 0
    assert main(["evaluate", *arguments, "--weights", "out/weights.safetensors", "--out", "measured"]) == 0
    measured = json.loads((project / "measured/metrics.json").read_text())
    assert measured["images"]["value"] == 4 * dataset["num_classes"]
    assert "top1_distance_2" not in measured


def test_the_added_backbone_is_a_timm_model(tmp_path, monkeypatch):
    (tmp_path / "pool_backbone.py").write_text(snippet("**A backbone**", "python"))
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("pool_backbone")
    model = timm.create_model("pool_tiny", num_classes=7)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 7)


def test_the_deployed_network_of_the_readme_runs():
    code = snippet("## One image's journey", "python")
    scope: dict = {}
    exec(code, scope)
    assert scope["deployed"].eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_files_that_the_readme_names_exist():
    named = set(re.findall(r"`((?:swconv|workflow|params|tests|csrc)/[\w/.]+)`", README))
    assert len(named) > 4
    assert [name for name in sorted(named) if not Path(name).exists()] == []


def test_conda_door_and_make_door_lead_to_the_same_lock():
    door = yaml.safe_load(Path("environment.yml").read_text())
    assert {"pip": ["-r requirements.lock"]} in door["dependencies"]
    pins = dict(line.split("==") for line in Path("requirements.lock").read_text().splitlines())
    assert (pins["torch"], pins["torchvision"]) == ("2.11.0", "0.26.0")
    assert all("+" not in version for version in pins.values())
