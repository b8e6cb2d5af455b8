"""The verb, from correctness to both files."""

import json
import os
import subprocess
import sys

import pytest
import torch

from swconv.__main__ import main
from swconv.bench import circumstances, forms, operator, page

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
    assert {row["cell"] for row in found["times"]} == {"forward", "training", "counts", "network"}
    assert all(0 < row["q1_ms"] <= row["median_ms"] <= row["q3_ms"] for row in found["times"])
    assert {row["contender"] for row in found["errors"]} >= {"ours", "two_step", "two_step_taps", "torch_strips"}
    assert max(row["error"] for row in found["errors"]) < 1e-5


@pytest.mark.parametrize("form", ["two_step_taps", "torch_strips"])
def test_a_wrong_result_stops_the_run_before_any_timing(tmp_path, capsys, monkeypatch, form):
    right = getattr(forms, form)
    monkeypatch.setattr(forms, form, lambda layer, x: tuple(1.1 * part for part in right(layer, x)))
    monkeypatch.setattr(operator, "compare", None)
    assert main([*QUICK, str(tmp_path)]) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert f"of the form '{form}' in stage 1 (contiguous) is off by" in told
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
