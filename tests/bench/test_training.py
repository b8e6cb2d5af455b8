"""The verb `bench training`: from training steps to both files."""

import json

import pytest
import timm
import torch

from swconv.__main__ import main
from swconv.bench import training


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
    assert all(2**27 < size < 2**33 for size in found["memory"].values())
    assert found["resume"]["import"] > 0.1
    assert 0 < found["resume"]["mini"] < 60


def test_measuring_leaves_torch_as_it_was(found):
    assert torch.Tensor.backward.__module__ == "torch._tensor"
    assert torch.nn.functional.cross_entropy.__module__ == "torch.nn.functional"


def test_both_forms_of_the_network_are_one_function_in_training():
    torch.manual_seed(0)
    x, found = torch.randn(2, 3, 32, 32, dtype=torch.float64), []
    for form in ("ours", "two_step"):
        torch.manual_seed(1)
        model = timm.create_model("sw_tiny", depths=[1, 1], dims=[8, 16], kernel_sizes=[13, 5], layer_scale_init=1.0).double()
        logits = training.training_form(model, form).train()(x)
        logits.square().sum().backward()
        found.append((logits, model.stages[0].blocks[0].mixer.filters[0].grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)


def test_another_device_is_refused_in_a_sentence(tmp_path, capsys):
    assert main(["bench", "training", "--device", "cuda", "--out", str(tmp_path)]) == 1
    assert "bench training measures the CPU, got --device cuda" in capsys.readouterr().err
