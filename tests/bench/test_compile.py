"""Networks compiled beforehand are found compiled."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from swconv.__main__ import main
from swconv.bench import throughput

CODE = ("from swconv.bench.compile import compile_network; compile_network('cpu', True, {number}, 'float32'); "
        "from torch._dynamo.utils import counters; print(counters['inductor']['fxgraph_cache_hit'])")


@pytest.mark.slow
def test_a_second_process_finds_what_the_first_compiled(tmp_path):
    (number,) = (number for number, entry in enumerate(throughput.QUICK) if entry.model == "convnext_tiny")
    hits = [subprocess.run([sys.executable, "-c", CODE.format(number=number)], capture_output=True, text=True, check=True,
                           env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}).stdout.split()[-1] for _ in range(2)]
    assert hits == ["0", "1"]


def test_what_does_not_compile_is_told_and_stops_nothing(tmp_path, caplog, monkeypatch):
    whole = throughput.plan_for

    def more(*arguments):
        """One entry that no process finds: the plan of another process has as many as before."""
        plan = whole(*arguments)
        unknown = replace(plan.entries[0], compiled=True)
        return replace(plan, entries=(*plan.entries, unknown), compiled=("float32",))

    monkeypatch.setattr(throughput, "plan_for", more)
    with caplog.at_level("INFO"):
        assert main(["bench", "compile", "--quick", "--out", str(tmp_path)]) == 0
    assert caplog.messages[-1] == "sw_tiny in float32: IndexError: tuple index out of range"
