"""Copies between layouts equal torch's, in Triton's interpreter, which has to be chosen before Triton is imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from swconv.ops import layouts

ROOT = Path(__file__).parents[2]
SHAPES = [(2, 80, 7, 9), (1, 3, 16, 16), (3, 130, 8, 8), (2, 5, 1, 4), (2, 1, 3, 3), (0, 4, 5, 5)]
DTYPES = ["float32", "bfloat16", "float16", "float64"]


def copies():
    """By shape, dtype and direction: whether the copy has torch's values and strides."""
    found = {}
    for shape in SHAPES:
        for dtype in DTYPES:
            x = torch.arange(torch.Size(shape).numel()).view(shape).to(getattr(torch, dtype))
            for last in (True, False):
                given, wanted = (torch.contiguous_format, torch.channels_last)[:: 1 if last else -1]
                got = layouts.relayout(x.contiguous(memory_format=given), last)
                found[f"{shape} {dtype} {last}"] = torch.equal(got, x) and got.is_contiguous(memory_format=wanted)
    return found


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    switches = {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, __file__], env=os.environ | switches, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_copy_has_torchs_values_in_the_other_layout(interpreted, shape, dtype, last):
    assert interpreted[f"{shape} {dtype} {last}"]


if __name__ == "__main__":
    print(json.dumps(copies()))
