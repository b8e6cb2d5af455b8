"""The verb, from correctness to both files."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from swconv.__main__ import main
from swconv.bench import circumstances, forms, operator, page, work

QUICK = ["bench", "operator", "--quick", "--out"]


def test_a_quick_run_is_short_and_writes_json_and_the_page_made_of_it(tmp_path):
    # Threads that sleep while they wait: spinning ones take seconds for tiny maps where other programs run too.
    done = subprocess.run([sys.executable, "-m", "swconv", *QUICK, tmp_path / "bench"], capture_output=True, text=True,
                          env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"})
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "bench/operator-cpu-quick.json").read_text())
    assert (tmp_path / "bench/operator-cpu-quick.md").read_text() == page.render(found)
    assert found["seconds"] < 30
    assert found["quick"] is True
    assert {row["cell"] for row in found["times"]} == {"ordinary forward", "ordinary training", "forward", "training",
                                                         "counts", "network"}
    assert all(0 < row["q1_ms"] <= row["median_ms"] <= row["q3_ms"] for row in found["times"])
    assert {row["contender"] for row in found["errors"]} == {"ours", "two_step", "two_step_summed", "two_step_taps",
                                                             "torch_strips", "depthwise13", "depthwise7", "slak_pair"}
    assert {row["launched"] for row in found["times"]} == {"eager"}
    assert max(row["error"] for row in found["errors"]) < 1e-5


@pytest.fixture(scope="module")
def three_precisions():
    """A trial of what a GPU measures, in its order, on the CPU: TF32 is float32 there, and a launch is no time of its own."""
    parts = tuple(part for part in operator.CUDA.parts if part.kind != "launches")
    plan = replace(operator.plan_for(torch.device("cpu"), quick=True), threads=(1,), precisions=operator.CUDA.precisions,
                   deciding=operator.CUDA.deciding, parts=parts)
    *_, found = operator.measure(plan, torch.device("cpu"))
    return found


def test_a_gpu_measures_every_contender_once_in_every_precision_and_first_what_decides():
    for precision in operator.CUDA.precisions:
        known = [*forms.sums(True, precision), *work.peers(operator.TINY[0]), "ours_layer"]
        known += ["two_step_layer"] if precision == "float32" else []
        names = [name for part in operator.CUDA.parts if (part.kind, part.precision) == ("operator", precision)
                 for name in part.names]
        assert sorted(names) == sorted(known)
    first, second, *_ = operator.CUDA.parts
    assert (first.precision, {"ours", "two_step", "slak_pair"} <= {*first.names}) == ("float32", True)
    assert (second.precision, {"ours", "slak_pair"} == {*second.names}) == ("bfloat16", True)


def test_a_stop_leaves_what_was_measured_and_a_page_that_says_so(tmp_path, capsys, monkeypatch):
    def broken(*_):
        raise RuntimeError("no more")

    monkeypatch.setattr(operator, "_counts", broken)
    assert main([*QUICK, str(tmp_path)]) == 1
    assert capsys.readouterr().err.endswith("no more\n")
    found = json.loads((tmp_path / "operator-cpu-quick.json").read_text())
    assert {row["cell"] for row in found["times"]} == {"ordinary forward", "ordinary training", "forward", "training"}
    assert found["unfinished"] == ["stage 1, float32: E and Rep", "stage 2, float32: E and Rep", "network, batch 2, float32",
                                   "network, batch 1, float32"]
    text = (tmp_path / "operator-cpu-quick.md").read_text()
    assert "**Stopped before: stage 1, float32: E and Rep; stage 2, float32: E and Rep; network, batch 2" in text
    assert "| forward: time with E = 4 / E = 1 | <= 1.02 |  |  | not measured |" in text
    assert "## Summed over" in text
    assert "## The whole network" not in text


def test_every_precision_has_rows_of_its_own_and_the_two_step_forms_are_float32_only(three_precisions):
    rows = {(row["cell"], row["precision"]): {other["contender"] for other in three_precisions["times"]
                                              if (other["cell"], other["precision"]) == (row["cell"], row["precision"])}
            for row in three_precisions["times"] if row["cell"] in ("forward", "network")}
    peers = {"depthwise13", "depthwise7", "slak_pair"}
    assert rows["forward", "tf32"] == rows["forward", "bfloat16"] == {"ours", "torch_strips", *peers}
    assert rows["forward", "float32"] == {"ours", "torch_strips", "two_step", "two_step_taps", *peers}
    assert rows["network", "bfloat16"] == {"ours"}
    assert {row["precision"] for row in three_precisions["times"] if row["cell"] == "counts"} == {"float32", "bfloat16"}


def test_every_precision_is_held_against_float64_with_its_own_tolerance(three_precisions):
    for precision, allowed in operator.TOLERANCE["operator"].items():
        worst = max(row["error"] for row in three_precisions["errors"]
                    if row["precision"] == precision and row["of"] != "network")
        assert 0 < worst <= allowed
    half = min(row["error"] for row in three_precisions["errors"] if row["precision"] == "bfloat16")
    assert half > operator.TOLERANCE["operator"]["float32"]           # so it was computed in half precision


def test_half_precision_has_half_the_bytes_and_as_much_work(three_precisions):
    rows = {row["precision"]: row for row in three_precisions["times"]
            if (row["cell"], row.get("stage"), row.get("contender")) == ("forward", 1, "ours")}
    assert rows["bfloat16"]["bytes"] * 2 == rows["float32"]["bytes"] == rows["tf32"]["bytes"]
    assert rows["bfloat16"]["macs"] == rows["float32"]["macs"]


def test_some_images_of_both_ends_of_a_batch_are_verified():
    assert operator._some(128) == [0, 1, 2, 3, 124, 125, 126, 127]
    assert operator._some(5) == [0, 1, 2, 3, 4]
    assert operator._some(5, 2) == [0, 4]
    kept = operator._only([0, 2], torch.ones(3, 1, 1, 1))
    assert kept.flatten().tolist() == [1, 0, 1]


@pytest.mark.parametrize("form", ["two_step_taps", "torch_strips"])
def test_a_wrong_result_stops_the_run_before_any_timing(tmp_path, capsys, monkeypatch, form):
    right = getattr(forms, form)
    monkeypatch.setattr(forms, form, lambda layer, x: tuple(1.1 * part for part in right(layer, x)))
    monkeypatch.setattr(operator, "compare", None)
    monkeypatch.setattr(operator, "CPU", replace(operator.CPU, parts=operator.CPU.parts[1:]))   # the first has other forms
    assert main([*QUICK, str(tmp_path)]) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert f"of the form '{form}' in stage 1 (contiguous, float32) is off by" in told
    assert "relative to float64 where 1e-05 is allowed. Build csrc/ anew" in told
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_told_in_a_sentence(tmp_path, capsys):
    assert main([*QUICK, str(tmp_path), "--device", "cuda"]) == 1
    assert capsys.readouterr().err == ("swconv bench: bench operator --device cuda needs a GPU that torch sees, found none. "
                                       "Leave --device out to measure the CPU.\n")


def test_a_missing_library_is_told_in_a_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(circumstances.native, "available", lambda: False)
    assert main([*QUICK, str(tmp_path)]) == 1
    assert capsys.readouterr().err.endswith("they do not load. Build them: python -m swconv build.\n")
