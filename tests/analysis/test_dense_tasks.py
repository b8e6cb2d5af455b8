"""The Params and FLOPs cells of the downstream tables come out."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from swconv.analysis.cost import cost
from swconv.analysis.dense_tasks import count, counts
from swconv.downstream.pyramid import Pyramid

# Task, backbone, arguments, parameters in M, GMACs, and what MMCV's counter prints in G: of SW's UPerNets as their authors
# print it (948.12, 953.81, 1039.21), of the others it rounds to the papers' cells.
CASES = [
    ("upernet", "convnext_tiny", {}, 60.243, 938.49, 938.68),
    ("upernet", "convnext_small", {}, 81.877, 1026.85, 1027.07),
    ("upernet", "convnext_base", {}, 122.103, 1169.34, 1169.59),
    ("upernet", "sw_tiny", {"rep_branches": 1}, 61.727, 947.97, 948.12),
    ("upernet", "sw_tiny", {}, 62.515, 953.66, 953.81),
    ("upernet", "sw_small", {"rep_branches": 1}, 87.644, 1039.05, 1039.21),
    ("cascade", "convnext_tiny", {}, 85.931, 740.15, 740.65),
    ("cascade", "convnext_small", {}, 107.565, 826.44, 826.97),
    ("cascade", "sw_tiny", {"rep_branches": 1}, 88.410, 750.38, 750.84),
    ("cascade", "sw_small", {"rep_branches": 1}, 113.332, 838.28, 838.75),
    ("faster", "convnext_tiny", {}, 45.145, 208.61, 208.75),
]


@pytest.mark.parametrize(("task", "backbone", "arguments", "params", "macs", "printed"), CASES)
def test_parameters_and_macs_come_out(task, backbone, arguments, params, macs, printed):
    found = count(task, backbone, arguments)
    assert round(found["params"] / 1e6, 3) == params
    assert round(found["macs"] / 1e9, 2) == macs
    assert found["mmcv"] / 1e9 == pytest.approx(printed, abs=0.0051)


def test_parts_are_those_of_the_reference_implementations():
    parts = count("cascade", "convnext_tiny")["parts"]
    assert {name: round(part["macs"] / 1e9, 1) for name, part in parts.items()} == {
        "backbone": 90.9, "feature pyramid": 53.1, "region proposals": 50.6, "box heads": 386.6, "mask heads": 159.0}
    parts = count("upernet", "slak_tiny", {"depths": (1, 1, 1, 1)})["parts"]
    assert parts["decode head"]["params"] + parts["auxiliary head"]["params"] == pytest.approx(34.319e6, abs=500)
    assert parts["decode head"]["macs"] == pytest.approx(848.1e9, abs=5e7)
    assert parts["auxiliary head"]["macs"] == 0


def test_the_backbone_is_counted_as_torch_counts_it():
    with torch.device("meta"):
        pyramid = Pyramid("convnext_tiny").eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            pyramid(torch.empty(1, 3, 512, 2048))
    assert count("upernet", "convnext_tiny")["parts"]["backbone"]["macs"] == counter.get_total_flops() // 2


def test_sparse_and_merged_backbones_are_smaller_and_heads_are_not():
    few = {"depths": (1, 1, 2, 1)}
    dense, sparse = count("upernet", "slak_tiny", few), count("upernet", "slak_tiny", few, sparsity=0.4)
    assert sparse["parts"]["backbone"]["params"] < 0.61 * dense["parts"]["backbone"]["params"]
    assert sparse["parts"]["decode head"] == dense["parts"]["decode head"]
    one, two = count("upernet", "sw_tiny", few, form="merged"), count("upernet", "sw_tiny", few | {"rep_branches": 1})
    assert (one["params"], one["macs"]) == (two["params"], two["macs"])


def test_large_kernels_of_an_unknown_class_are_full_and_free():
    large, few = {"kernel_sizes": (51, 49, 47, 13)}, {"depths": (1, 1, 2, 1)}
    sparse, unseen = (count("faster", "slak_tiny", large | few, sparsity=0.4, counting=how) for how in ("papers", "unseen"))
    strips = 2 * 5 * (51 * 124 + 49 * 249 + 47 * 2 * 499 + 13 * 998)
    assert unseen["params"] - sparse["params"] == pytest.approx(0.4 * strips, abs=8)          # every tensor is rounded
    area = 1280 * 800 // 16
    macs = 2 * 5 * area * (51 * 124 + 49 * 249 / 4 + 47 * 2 * 499 / 16 + 13 * 998 / 64)
    assert sparse["macs"] - unseen["macs"] == pytest.approx(0.6 * macs, rel=1e-6)


def test_what_is_counted_for_a_table_may_leave_a_part_out():
    asked = {"model": "unireplknet_tiny", "args": {}, "task": "upernet", "without": (), "form": "merged", "input": (512, 2048),
             "sparsity": 0.0, "counting": "papers"}
    whole, head = counts(**asked), count("upernet", "unireplknet_tiny", form="merged")["parts"]["auxiliary head"]["params"]
    assert counts(**asked | {"without": ("auxiliary head",)}) == {"params": whole["params"] - head, "macs": whole["macs"]}
    with pytest.raises(ValueError, match=r"parts of upernet, backbone, decode head, auxiliary head, got mask heads\."):
        counts(**asked | {"without": ("mask heads",)})
    alone = cost("unireplknet_tiny", form="merged")
    assert counts(**asked | {"task": None, "input": 224}) == {"params": alone.params, "macs": alone.macs}


def test_an_unknown_task_is_told():
    with pytest.raises(ValueError, match="upernet, cascade, faster, got 'pose'"):
        count("pose", "sw_tiny")
