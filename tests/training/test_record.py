"""Circumstances: what run.json says of machine, code and flags is what holds."""

import hashlib
import json
import platform
import subprocess
from pathlib import Path

import torch

from swconv.ops import native
from swconv.training import record

COMMON = {"key": "k", "run": "sw11", "profile": "mini", "seed": 4, "code": "c", "config": {"a": 1}, "data_sha256": "d"}


def test_circumstances_are_json_and_name_what_was_used():
    told = json.loads(json.dumps(record.circumstances(**COMMON)))
    assert told["versions"]["torch"] == torch.__version__
    assert told["versions"]["python"] == platform.python_version()
    assert told["flags"]["threads"] == torch.get_num_threads()
    assert told["lock_sha256"] == hashlib.sha256(Path("requirements.lock").read_bytes()).hexdigest()
    assert told["library_sha256"] == native.library_sha256()
    assert (told["key"], told["run"], told["seed"], told["data_manifest_sha256"]) == ("k", "sw11", 4, "d")


def test_commit_and_dirt_are_those_of_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert record.circumstances(**COMMON)["git_commit"] is None

    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments], check=True, capture_output=True)

    git("init")
    Path("swconv").mkdir()
    Path("swconv/a").write_text("1")
    Path("README.md").write_text("1")
    git("add", ".")
    git("commit", "-m", "first")
    told = record.circumstances(**COMMON)
    assert len(told["git_commit"]) == 40
    assert told["git_dirty"] is False
    Path("README.md").write_text("2")
    assert record.circumstances(**COMMON)["git_dirty"] is False
    Path("swconv/a").write_text("2")
    assert record.circumstances(**COMMON)["git_dirty"] is True


def test_values_carry_units_in_a_fixed_order():
    assert list(record.values(top1=(50.0, "%"), epochs=(2, "epochs")).items()) == [
        ("epochs", {"value": 2, "unit": "epochs"}), ("top1", {"value": 50.0, "unit": "%"})]
