"""The verb `bench training`: from training steps to both files."""

import json

import pytest
import torch

from swconv.__main__ import main
from swconv.bench import training

PEAK = ("from swconv.bench.training import peak; "
        "print(peak('ours', 2, 32, {'depths': [1, 1], 'dims': [8, 16], 'kernel_sizes': [13, 5]}))")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    assert main(["bench", "training", "--quick", "--out", str(folder)]) == 0
    record = json.loads((folder / "training-cpu-quick.json").read_text())
    assert (folder / "training-cpu-quick.md").read_text() == training.render(record)
    return record


def test_the_parts_of_a_step_add_up_to_it_and_none_is_missing(found):
    for row in found["steps"].values():
        assert sum(row["parts_ms"].values()) == pytest.approx(row["step_ms"])
        assert all(row["parts_ms"][part] > 0 for part in training.PARTS)
        assert 0 < row["rest_share"] < 1


def test_memory_and_resuming_are_measured_in_processes_of_their_own(found):
    assert found["memory"].keys() == found["form_ms"].keys() == training.FORMS.keys()
    assert all(2**27 < size < 2**33 for size in found["memory"].values())
    assert found["resume"]["import"] > 0.1
    assert 0 < found["resume"]["mini"] < 60


def test_a_peak_is_the_processes_own_and_not_that_of_the_process_that_started_it():
    alone = training._python(PEAK)
    held = torch.ones(2**29, dtype=torch.uint8)                       # with torch itself, more than that process holds
    beside = training._python(PEAK)
    assert abs(int(beside) - int(alone)) < held.numel() // 8


def test_measuring_leaves_torch_as_it_was(found):
    assert torch.Tensor.backward.__module__ == "torch._tensor"
    assert torch.nn.functional.cross_entropy.__module__ == "torch.nn.functional"
