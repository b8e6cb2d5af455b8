"""One training step beside other networks', as on a GPU; here a trial of it on the CPU."""

import json

import pytest
import torch

from swconv.__main__ import main
from swconv.bench import circumstances, training_step

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def found():
    *_, last = training_step.measure(training_step.QUICK, CPU)
    return json.loads(json.dumps(last | {"quick": True}))


def row(network, ms, peak, **more):
    return {"network": network, "precision": "bfloat16", "format": "contiguous", "step_ms": ms, "q1_ms": 0.9 * ms,
            "q3_ms": 1.1 * ms, "images_per_s": 4e3 / ms, "parts_ms": {"forward": 1.0, "backward": 2.0, "optimizer": 3.0},
            "peak": peak, "count": 5, "graph_ms": 0.5 * ms} | more


def test_every_network_has_a_row_in_every_precision_half_precision_first(found):
    rows = [(row["network"], row["precision"], row["format"]) for row in found["steps"]]
    assert rows == [*training_step.FULL.rows]
    assert found["unfinished"] == []
    contiguous = [row[:2] for row in rows if row[2] == "contiguous"]
    assert contiguous == [(name, precision) for precision in ("bfloat16", "float32") for name in training_step.NETWORKS]


def test_a_stop_leaves_the_rows_before_it_and_a_page_of_them(tmp_path, monkeypatch):
    steps = training_step._row

    def one(plan, name, *others):
        if name != "ours":
            raise RuntimeError("no more")
        return steps(plan, name, *others)

    monkeypatch.setattr(training_step, "_row", one)
    with pytest.raises(RuntimeError, match="no more"):
        circumstances.write_growing(training_step.measure(training_step.QUICK, CPU), tmp_path, "training", True,
                                    training_step.render)
    left = json.loads((tmp_path / "training-cpu-quick.json").read_text())
    assert [row["network"] for row in left["steps"]] == ["ours"]
    assert left["unfinished"][0] == "recompute, bfloat16, contiguous"
    assert len(left["unfinished"]) == len(training_step.FULL.rows) - 1
    text = (tmp_path / "training-cpu-quick.md").read_text()
    assert "**Stopped before: recompute, bfloat16, contiguous; two_step" in text
    assert "| **SW-tiny**, strips |" in text
    assert "ConvNeXt-T of timm |" not in text
    assert "| float32 |" not in text


def test_a_step_is_its_parts(found):
    for some in found["steps"]:
        assert some["q1_ms"] <= some["step_ms"] <= some["q3_ms"]
        assert sum(some["parts_ms"].values()) == pytest.approx(some["step_ms"], rel=0.5)      # medians of two
        assert some["images_per_s"] == pytest.approx(4000 / some["step_ms"])


def test_the_parallel_branches_of_a_rival_need_more_memory_than_ours(found):
    peaks = {row["network"]: row["peak"] for row in found["steps"] if row["precision"] == "float32"}
    assert 0 < peaks["ours"] < peaks["unireplknet"]


def test_the_page_takes_the_faster_format_and_puts_rivals_over_ours(found):
    steps = [row("ours", 50.0, 2**30), row("ours", 20.0, 2**31, format="channels_last"), row("two_step", 100.0, 2**33),
             row("unireplknet", 22.0, 2**31), {"network": "convnext", "precision": "bfloat16", "format": "contiguous",
                                               "out_of_memory": True}]
    lines = training_step.render(found | {"steps": steps}).splitlines()
    two_step = "100.0 (90.0-110.0) | 1.0 | 2.0 | 3.0 | 40 | 5.00 | 50.0 | 5.00 | 8.00 | 4.00 | contiguous | 5 |"
    assert f"| SW-tiny, two-step as published | {two_step}" in lines
    assert any(line.startswith("| ConvNeXt-T of timm | out of memory |") for line in lines)
    assert "| time of SW-tiny, two-step as published / **SW-tiny**, strips, as CUDA graphs | >= 4 | 5.00 | reached |" in lines
    rival = "time of UniRepLKNet-T, in training form / **SW-tiny**, strips, as CUDA graphs"
    assert f"| {rival} | >= 1.2 | 1.10 | **not reached** |" in lines
    assert "| peak memory of **SW-tiny**, strips / SW-tiny, two-step as published | <= 0.5 | 0.25 | reached |" in lines
    assert not any(line.startswith("| time of ConvNeXt-T") for line in lines)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_training_on_a_missing_gpu_is_told_in_a_sentence(tmp_path, capsys):
    assert main(["bench", "training", "--quick", "--device", "cuda", "--out", str(tmp_path)]) == 1
    assert "bench training --device cuda needs a GPU that torch sees, found none." in capsys.readouterr().err
