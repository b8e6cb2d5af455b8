"""Rounds, choices and memory."""

import time

import pytest
import torch

from swconv.bench import forms
from swconv.bench.timing import Contender, Pace, ceilings, compare, training_memory
from swconv.bench.work import Stage

PACE = Pace(seconds=0.0, rounds=4, sample=0.0, probes=1)


def test_every_round_runs_each_contender_once():
    calls = []
    contenders = [Contender({"name": name}, {"only": lambda name=name: calls.append(name)}) for name in "abc"]
    rows = compare(contenders, [1], PACE, cuda=False)
    rounds = calls[-12:]                                              # after the warm calls and the probes
    assert all(sorted(rounds[start : start + 3]) == ["a", "b", "c"] for start in range(0, 12, 3))
    assert [(row["name"], row["threads"], row["rounds"]) for row in rows] == [("a", 1, 4), ("b", 1, 4), ("c", 1, 4)]


def test_the_faster_variant_takes_part_and_the_median_is_its_time():
    variants = {"slow": lambda: time.sleep(0.03), "fast": lambda: time.sleep(0.01)}
    (row,) = compare([Contender({}, variants)], [1], PACE, cuda=False)
    assert row["variant"] == "fast"
    assert row["probe_ms"]["slow"] > row["probe_ms"]["fast"]
    assert row["q1_ms"] <= row["median_ms"] <= row["q3_ms"]
    assert row["median_ms"] >= 10


def test_short_calls_are_repeated_within_a_sample():
    pace = Pace(seconds=0.0, rounds=1, sample=0.004, probes=1)
    (row,) = compare([Contender({}, {"only": lambda: time.sleep(0.001)})], [1], pace, cuda=False)
    assert 2 <= row["calls_per_sample"] <= 4
    assert row["median_ms"] < 4


def test_untimed_calls_come_before_every_sample():
    calls, pace = [], Pace(seconds=0.0, rounds=3, sample=0.0, probes=1, untimed=1)

    def call(name):
        calls.append(name)
        time.sleep(0.001 if calls.count(name) % 2 == 0 else 0.04)     # warm, probe, untimed, timed, untimed, ...

    rows = compare([Contender({}, {"only": lambda name=name: call(name)}) for name in "ab"], [1], pace, cuda=False)
    assert [calls.count(name) for name in "ab"] == [8, 8]
    assert all(len({*calls[start : start + 2]}) == 1 for start in range(4, 16, 2))
    assert all(row["q3_ms"] < 20 for row in rows)


def test_threads_are_compared_in_the_same_rounds_and_set_back():
    seen, before = [], torch.get_num_threads()
    rows = compare([Contender({}, {"only": lambda: seen.append(torch.get_num_threads())})], [1, 2], PACE, cuda=False)
    assert torch.get_num_threads() == before
    assert [row["threads"] for row in rows] == [1, 2]
    assert {1, 2} <= set(seen)


def test_ceilings_are_positive_for_each_number_of_threads():
    for top, n in zip(ceilings([1, 2], 32, 4096, 2, torch.device("cpu")), (1, 2), strict=True):
        assert top["threads"] == n
        assert top["flop_per_s"] > 0
        assert top["bytes_per_s"] > 0


def test_memory_of_a_product_is_its_output_and_its_gradients():
    x, w = torch.randn(2, 3, 64, 64, requires_grad=True), torch.randn(2, 3, 64, 64)
    found = training_memory(lambda: torch.autograd.grad(x * w, x, w), x)
    assert found["peak"] == 2 * x.nbytes                              # the product, and the gradient of x
    assert found["saved"] == found["saved_maps"] == w.nbytes          # x is not needed


@pytest.mark.parametrize(("form", "keeps_maps"), [("ours", False), ("two_step", False), ("torch_strips", True)])
def test_only_ours_expands_nothing(form, keeps_maps):
    stage = Stage(1, 32, 4, 31, 1, 16)
    layer, function = forms.make_layer(stage, torch.device("cpu")), forms.sums(cuda=False)[form]
    x = torch.randn(stage.batch, stage.channels, stage.side, stage.side, requires_grad=True)
    upstream = [torch.randn(x.shape) for _ in range(3)]
    found = training_memory(lambda: torch.autograd.grad(function(layer, x), [x, *layer.filters], upstream), x)
    assert (found["saved_maps"] > 0) == keeps_maps
    assert (found["peak"] > 4.5 * x.nbytes) == (form != "ours")       # three sums, one gradient, and kernels
