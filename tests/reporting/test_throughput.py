"""Ratios within one run beside the paper's."""

import csv
import json
from pathlib import Path

import pytest

from swconv.reporting import throughput
from swconv.reporting.accuracies import Accuracy

PAPER = Path("reports/paper")


def network(group, model, form, ms, batch=4, **arguments):
    labels = {"precision": "float32", "batch": batch, "group": group, "model": model, "form": form, "arguments": arguments}
    return [labels | {"protocol": "papers", "one_by_one_ms": 2 * ms, "at_once_ms": 2 * ms},
            labels | {"protocol": "strict", "median_ms": ms, "q1_ms": 0.8 * ms, "q3_ms": 1.25 * ms, "variant": "channels_last",
                      "launched": "eager", "rounds": 5}]


def layer(form, side, ms):
    return {"protocol": "strict", "precision": "float32", "group": "layer", "form": form, "side": side, "batch": 1,
            "median_ms": ms, "q1_ms": ms, "q3_ms": ms, "variant": "contiguous",
            "launched": "eager", "rounds": 5}


@pytest.fixture
def record(tmp_path):
    times = [
        *network("tiny", "sw_tiny", "two_step", 200.0, small_kernel=3, rep_branches=1),
        *network("tiny", "sw_tiny", "merged", 50.0, small_kernel=3, rep_branches=1),
        *network("tiny", "unireplknet_tiny", "merged", 100.0),
        *network("small", "sw_small", "merged", 50.0, batch=2, small_kernel=3, rep_branches=1),
        *network("small", "unireplknet_small", "merged", 60.0, batch=2),
        *network("edges", "sw_tiny", "two_step", 100.0, edges=1), *network("edges", "sw_tiny", "two_step", 125.0, edges=4),
        *network("edges", "sw_tiny", "merged", 50.0, edges=1), *network("edges", "sw_tiny", "merged", 50.0, edges=4),
        *network("base", "lk_convnext_base", "square", 900.0), *network("base", "slak_base", "merged", 90.0, width_factor=1.0),
        *(layer(form, 16, ms) for form, ms in (("dense", 8.0), ("sparse", 8.0), ("strips", 4.0), ("ours", 1.0))),
    ]
    found = {
        "device": "cpu", "quick": False, "engine": "compiled", "load_before": 0.01, "seconds": 12.3, "git_commit": "abc123",
        "git_dirty": False, "started": "2026-01-02T03:04:05+00:00", "hardware": {"cpu": "Some CPU", "cores": 2, "gpu": None},
        "versions": {"torch": "2.11"}, "flags": {"threads": 2}, "times": times,
        "tf32": {"float32": {"products": False, "convolutions": False}},
        "plan": {"precisions": ["float32"], "image": 224, "warmups": 1, "at_once": 2},
    }
    path = tmp_path / "throughput-cpu.json"
    path.write_text(json.dumps(found))
    return path


@pytest.fixture
def gpu(record, tmp_path):
    """A second record, of a GPU, stopped after the tiny networks: float32 and bfloat16, the latter compiled."""
    found = json.loads(record.read_text())
    times = [row for row in found["times"] if row["group"] == "tiny"]
    half = [row | {"precision": "bfloat16", "batch": 128, "variant": "channels_last, compiled", "launched": "graph"}
            for row in times
            if row["form"] == "merged"]
    for row in half:
        row |= {"at_once": 7} if row["protocol"] == "papers" else {}
    found |= {"device": "cuda", "hardware": found["hardware"] | {"gpu": "Some GPU"}, "times": times + half,
              "plan": found["plan"] | {"precisions": ["float32", "bfloat16"], "at_once": 25}, "unfinished": ["layer", "small"]}
    found["tf32"]["bfloat16"] = found["tf32"]["float32"]
    path = tmp_path / "throughput-some-gpu.json"
    path.write_text(json.dumps(found))
    return path


@pytest.fixture
def pages(record, tmp_path):
    measured = {("sw_table7", 2, "in1k_top1_acc_pct"): Accuracy(83.21, "published weights")}
    throughput.build([record], measured, PAPER, tmp_path / "reports", "snakemake {}")
    return tmp_path / "reports"


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_networks_stand_as_ratios_to_unireplknet_of_their_size(pages):
    found = {(row["paper_row"], row["here"]): row for row in rows(pages / "table7.csv")}
    published = found["SW-tiny", "sw_tiny, N = 3; two-step, as published"]
    assert (published["paper_ratio"], published["strict_ratio"]) == ("0.336", "0.5")      # 378 / 1125, and 100 ms / 200 ms
    assert found["SW-tiny", "sw_tiny, N = 3; folded, our operator"]["strict_ratio"] == "2.0"
    small = found["SW-small", "sw_small, N = 3; folded, our operator"]
    assert (small["paper_ratio"], small["strict_ratio"]) == ("0.353", "1.2")              # 243 / 689, and 60 ms / 50 ms


def test_images_per_second_come_from_batch_and_median(pages):
    (row,) = [row for row in rows(pages / "table7.csv") if row["paper_row"] == "UniRepLKNet-T"]
    assert (row["strict_img_per_s"], row["strict_q1_img_per_s"], row["papers_protocol_img_per_s"]) == ("40.0", "32.0", "20.0")


def test_edges_are_compared_with_one_edge(pages):
    text = (pages / "table7.md").read_text()
    assert "| two-step, as published | 1.000 | 0.800 |" in text
    assert "| folded, our operator | 1.000 | 1.000 |" in text


def test_the_naive_kernels_are_the_base_of_table_12(pages):
    (naive, decomposed, masked) = rows(pages / "slak/table12.csv")
    assert (naive["strict_ratio"], decomposed["strict_ratio"], masked["paper_row"]) == ("1.0", "10.0", "sparse groups")
    assert decomposed["paper_ratio"] == "2.948"                                           # 283 / 96


def test_figure_4_tells_how_many_times_as_fast_as_dense(pages):
    found = {(row["device"], row["form"], row["side_px"]): row["times_as_fast_as_dense"]
             for row in rows(pages / "slak/fig4_right.csv")}
    assert found["2 cores of Some CPU", "ours", "16"] == "8.0"
    assert found["paper (A100)", "strips", "16"] == "3.523"                               # 13.81 / 3.92
    assert (pages / "figures/slak/fig4_right.svg").read_text().startswith("<?xml")


def test_a_page_tells_device_commit_and_flags(pages):
    text = (pages / "table7.md").read_text()
    assert "## 2 cores of Some CPU" in text
    assert "commit `abc123`; engine of ours: compiled" in text
    assert "TF32 in float32: products False, convolutions False" in text


def test_no_record_is_told_in_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="need a record of the benchmark, got none. Run: python -m swconv bench throughput"):
        throughput.build([], {}, PAPER, tmp_path, "{}")


def test_an_accuracy_stands_beside_the_papers_where_there_is_one(pages):
    text = (pages / "table7.md").read_text()
    assert "| UniRepLKNet-T | 83.2 | 83.21 | equal [^1] |" in text
    assert "| SLaK-T, R, * | 82.5 | - | not run |" in text


def test_a_gpu_s_record_stands_beside_the_cpu_s_each_divided_by_its_own_base(record, gpu, tmp_path):
    throughput.build([record, gpu], {}, PAPER, tmp_path / "reports", "snakemake {}")
    text = (tmp_path / "reports/table7.md").read_text()
    assert text.index("## 2 cores of Some CPU") < text.index("## Some GPU")
    found = {(row["device"], row["paper_row"], row["precision"], row["here"]): row
             for row in rows(tmp_path / "reports/table7.csv")}
    ours = found["Some GPU", "SW-tiny", "bfloat16", "sw_tiny, N = 3; folded, our operator"]
    assert (ours["strict_ratio"], ours["variant"], ours["papers_forwards"]) == ("2.0", "channels_last, compiled", "7")
    published = found["Some GPU", "SW-tiny", "float32", "sw_tiny, N = 3; two-step, as published"]
    assert (published["variant"], published["papers_forwards"]) == ("channels_last, no CUDA graph", "25")
    assert {device for device, *_ in found} == {"2 cores of Some CPU", "Some GPU"}
    assert [row["device"] for row in rows(tmp_path / "reports/slak/table12.csv")] == ["2 cores of Some CPU"] * 3


def test_a_record_that_was_stopped_says_so_and_is_left_out_where_it_has_nothing(record, gpu, tmp_path):
    throughput.build([record, gpu], {}, PAPER, tmp_path / "reports", "snakemake {}")
    assert "**Stopped before: layer, small.** From" in (tmp_path / "reports/table7.md").read_text()
    assert "Some GPU" not in (tmp_path / "reports/slak/fig4_right.md").read_text()
    assert "Some GPU" not in (tmp_path / "reports/slak/table12.md").read_text()
