"""Whole networks by both protocols."""

import json
import os
import subprocess
import sys

import pytest
import torch

from swconv.__main__ import main
from swconv.bench import forms, throughput

QUICK = ["bench", "throughput", "--quick", "--out"]


def test_a_quick_run_times_every_entry_by_both_protocols(tmp_path):
    done = subprocess.run([sys.executable, "-m", "swconv", *QUICK, tmp_path], capture_output=True, text=True,
                          env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"})
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "throughput-cpu-quick.json").read_text())
    networks = [row for row in found["times"] if row["group"] != "layer"]
    for protocol in ("papers", "strict"):
        assert [(row["model"], row["form"]) for row in networks if row["protocol"] == protocol] == [
            (entry.model, entry.form) for entry in throughput.QUICK]
    layers = {(row["form"], row["side"]) for row in found["times"] if row["group"] == "layer"}
    assert layers == {(form, side) for form in ("dense", "sparse", "strips", "ours") for side in (8, 16)}
    assert found["tf32"] == {"float32": {"products": False, "convolutions": False}}
    assert found["seconds"] < 30


def test_forms_of_one_network_that_differ_stop_the_run(tmp_path, capsys, monkeypatch):
    right = forms.square

    def wrong(mixer):
        conv = right(mixer)
        conv.weight.data[::2] *= 3
        return conv

    monkeypatch.setattr(forms, "square", wrong)
    assert main([*QUICK, str(tmp_path)]) == 1
    assert "slak_tiny, square padding inside is off by" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_precisions_set_both_flags_of_tf32_and_put_them_back():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    for name, on in (("tf32", True), ("float32", False), ("bfloat16", False)):
        with throughput._precision(name):
            assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (on, on)
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before


@pytest.mark.parametrize("plan", [throughput.CPU, throughput.CUDA])
def test_the_papers_rows_are_all_in_the_plan(plan):
    entries = {(entry.model, entry.form) for entry in plan.entries if entry.group == "tiny"}
    assert entries == {
        ("sw_tiny", "two_step"), ("sw_tiny", "merged"), ("slak_tiny", "plain"), ("slak_tiny", "square"),
        ("slak_tiny", "merged"), ("unireplknet_tiny", "merged"), ("convnext_tiny", "as_is"),
        ("swin_tiny_patch4_window7_224", "as_is"),
    }
    edges = {(entry.form, entry.arguments["edges"]) for entry in plan.entries if entry.group == "edges"}
    assert edges == {(form, edge) for form in ("two_step", "merged") for edge in (1, 2, 3, 4)}
    assert (throughput.CUDA.warmups, throughput.CUDA.at_once) == (10, 25)
    assert set(throughput.CUDA.batches.values()) == {128}
