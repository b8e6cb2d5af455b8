"""Whole networks by both protocols."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from swconv.__main__ import main
from swconv.bench import forms, throughput, timing

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
    assert found["unfinished"] == []
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
        with timing.in_precision(name):
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
    assert set(plan.strict) == {*plan.batches, "layer"}


def test_a_gpu_gets_the_papers_batches_and_counts_and_the_deciding_networks_compiled():
    plan = throughput.CUDA
    assert (plan.warmups, plan.one_by_one, plan.at_once, plan.batches["tiny"], plan.batches["small"]) == (10, 100, 25, 128, 128)
    compiled = [(entry.model, entry.arguments.get("small_kernel"), *entry.precisions)
                for entry in plan.entries if entry.compiled]
    names = [("sw_tiny", 3), ("slak_tiny", None), ("unireplknet_tiny", None), ("convnext_tiny", None),
             ("swin_tiny_patch4_window7_224", None)]
    assert compiled == [(*name, "float32", "bfloat16", "tf32") for name in names]
    assert {entry.precisions for entry in plan.entries if entry.form == "two_step"} == {("float32",)}


def test_the_papers_protocol_is_cut_where_a_network_takes_too_long():
    def counted(cap, seconds):
        calls, plan = [], replace(throughput.CUDA, cap=cap)

        def network(images):
            calls.append(images)
            time.sleep(seconds)

        found = throughput._as_the_papers(network, torch.zeros(1), plan, "tiny", cuda=False)
        assert len(calls) == sum(found[key] for key in ("warmups", "one_by_one", "at_once"))
        assert found["at_once_ms"] >= 1e3 * seconds
        return [found[key] for key in ("warmups", "one_by_one", "at_once")]

    assert counted({"tiny": 1e4}, 0.0001) == [10, 100, 25]
    assert counted({"tiny": 0.1}, 0.03) == [1, 2, 4]


def test_what_was_measured_before_a_fault_is_written_and_tells_what_is_missing(tmp_path, capsys, monkeypatch):
    def broken(*_):
        raise RuntimeError("no more")

    monkeypatch.setattr(throughput, "_layer", broken)
    assert main([*QUICK, str(tmp_path)]) == 1
    assert capsys.readouterr().err.endswith("no more\n")
    found = json.loads((tmp_path / "throughput-cpu-quick.json").read_text())
    assert found["unfinished"] == ["layer"]
    assert {row["group"] for row in found["times"]} == {"tiny"}
