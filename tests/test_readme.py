"""What the README tells a user to add works as written, and what it names exists."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from swconv import params
from swconv.__main__ import main

README = Path("README.md").read_text()


def snippet(after: str, language: str) -> str:
    """The first code block of a language after some words."""
    return re.search(rf"```{language}\n(.*?)```", README.split(after, 1)[1], re.DOTALL)[1]


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


@pytest.fixture
def project(tmp_path, monkeypatch):
    shutil.copytree("params", tmp_path / "params")
    shutil.copytree("reports/paper", tmp_path / "reports/paper")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_added_ablation_trains_and_stands_in_the_table(project):
    path = project / "params/runs.yaml"
    append(path, snippet("**An ablation**", "yaml"))
    path.write_text(re.sub(r"(?<=  table2:)(.*?rows: \[.*?)(?=\])", r"\1, mine", path.read_text(), count=1, flags=re.DOTALL))
    assert params.load().resolve("mine", "paper")["model"]["args"]["edges"] == 1
    scale = ["--profile", "smoke"]
    assert main(["data", *scale, "--out", "data"]) == 0
    for run in ("sw03", "mine"):
        trained, evaluated = (f"artifacts/smoke/{stage}/{run}/seed0" for stage in ("train", "evaluate"))
        arguments = [run, *scale, "--seed", "0", "--data", "data"]
        assert main(["train", *arguments, "--out", trained]) == 0
        assert main(["evaluate", *arguments, "--weights", f"{trained}/weights.safetensors", "--out", evaluated]) == 0
    assert main(["report", "table2", *scale, "--seeds", "0", "--out", "out"]) == 0
    cells = r"^\| mine \| two branches, one edge \| - \| \d+\.\d \(n = 1\) \[\^mine\] \| [+-]\d+\.\d .*? \| - \|$"
    assert re.search(cells, (project / "out/table2.md").read_text(), re.MULTILINE)


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
    assert main(["data", "--profile", name[2], "--out", "data"]) == 0
    arguments = ["sw11", "--profile", name[2], "--seed", "0", "--data", "data"]
    assert main(["train", *arguments, "--out", "out"]) == 0
    assert main(["evaluate", *arguments, "--weights", "out/weights.safetensors", "--out", "measured"]) == 0
    measured = json.loads((project / "measured/metrics.json").read_text())
    assert measured["images"]["value"] == 4 * dataset["num_classes"]
    assert "top1_distance_2" not in measured


def test_the_added_backbone_is_a_row_that_trains(tmp_path):
    """In a copy of the package, in a process of its own: the steps of the README edit swconv/."""
    for folder in ("swconv", "csrc", "params"):
        shutil.copytree(folder, tmp_path / folder)
    shutil.copy("setup.py", tmp_path)
    (tmp_path / "swconv/models/pool.py").write_text(snippet("**A backbone**", "python"))
    append(tmp_path / "swconv/models/__init__.py", "\nimport swconv.models.pool\n")
    schema, entry = tmp_path / "swconv/params.py", re.search(r"Add `(.*?)` to `ARGS`", README)[1]
    schema.write_text(re.sub(r"^(ARGS\b.*= \{)", rf"\1{entry}, ", schema.read_text(), count=1, flags=re.MULTILINE))
    append(tmp_path / "params/models.yaml", snippet("`swconv/params.py`: which arguments", "yaml"))
    append(tmp_path / "params/runs.yaml", snippet("  args: {depths: [1, 1]", "yaml"))
    scale = ["--profile", "smoke"]
    verbs = [["data", *scale, "--out", "data"], ["train", "pool", *scale, "--seed", "0", "--data", "data", "--out", "out"]]
    code = f"import sys; from swconv.__main__ import main; sys.exit(any(main(verb) for verb in {verbs}))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out/run.json").read_text())
    assert (record["run"], record["config"]["model"]["name"]) == ("pool", "pool_tiny")


def test_the_deployed_network_of_the_readme_runs():
    code = snippet("## One image's journey", "python")
    scope: dict = {}
    exec(code, scope)
    assert scope["deployed"].eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert [f.shape[-1] for f in scope["pyramid"](torch.zeros(1, 3, 64, 64))] == [8, 4, 2]


def test_files_that_the_readme_names_exist():
    named = set(re.findall(r"`((?:swconv|workflow|params|tests|csrc)/[\w/.]+)`", README))
    assert len(named) > 4
    assert [name for name in sorted(named) if not Path(name).exists()] == []


@pytest.mark.parametrize("page", ["README.md", "reports/index.md"])
def test_links_lead_to_files(page):
    linked = set(re.findall(r"\]\(([\w/.-]+)\)", Path(page).read_text()))
    assert len(linked) > 4
    assert [name for name in sorted(linked) if not (Path(page).parent / name).exists()] == []


def test_the_weights_that_the_readme_lists_are_those_that_are_registered():
    table = README.split("| weights | source (GitHub) |", 1)[1].split("\n\n", 1)[0]
    names = [name for line in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", line)]
    assert sorted(names) == sorted(params.load().weights)


def test_conda_door_and_make_door_lead_to_the_same_lock():
    door = yaml.safe_load(Path("environment.yml").read_text())
    assert {"pip": ["-r requirements.lock"]} in door["dependencies"]
    pins = dict(line.split("==") for line in Path("requirements.lock").read_text().splitlines())
    assert (pins["torch"], pins["torchvision"]) == ("2.11.0", "0.26.0")
    assert all("+" not in version for version in pins.values())
