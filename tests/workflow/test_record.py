"""What is done at the end of a command besides dvc.lock."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def sync(monkeypatch, tmp_path):
    """The script, in a folder with a checkpoint of five runs."""
    monkeypatch.syspath_prepend(str(ROOT / "workflow/scripts"))
    module = importlib.import_module("dvc_sync")
    monkeypatch.chdir(tmp_path)
    status = dict.fromkeys(("aa", "bb", "cc", "dd", "ee"), "finished") | {"bb": "diverged: at step 7 the loss was nan"}
    for name, (key, said) in enumerate(status.items()):
        stage = "finetune" if key == "cc" else "train"
        folder = tmp_path / f"artifacts/mini/{stage}/r{name}/seed0"
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps({"key": key, "status": said}))
        (tmp_path / f"checkpoints/{key}").mkdir(parents=True)
        (tmp_path / f"checkpoints/{key}/epoch0001.pt").touch()
    return module


def test_checkpoints_of_current_runs_go_and_of_a_diverged_one_the_last_good_one_stays(sync):
    runs = {f"artifacts/mini/{stage}/r{i}/seed0/run.json" for i in range(4) for stage in ("train", "finetune")}
    sync.remove_checkpoints({*runs, "mlflow.db"})
    assert sorted(os.listdir("checkpoints")) == ["bb", "ee"]          # ee is not current
    assert os.listdir("checkpoints/bb") == ["epoch0001.pt"]


def test_under_dvc_checkpoints_go_and_nothing_is_recorded(sync):
    """With one left, `snakemake --forcerun train` after `dvc repro` would resume at the end and train nothing."""
    shutil.copytree(ROOT / "params", "params")
    command, environment = [sys.executable, ROOT / "workflow/scripts/dvc_sync.py"], os.environ | {"SWCONV_UNDER_DVC": "1"}
    done = subprocess.run(command, input="artifacts/mini/train/r0/seed0/run.json", env=environment, text=True,
                          capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")                  # this is no DVC repository: recording would fail
    assert sorted(os.listdir("checkpoints")) == ["bb", "cc", "dd", "ee"]
