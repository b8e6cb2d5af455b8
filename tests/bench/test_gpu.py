"""What only a GPU can show of the benchmarks: graphs, and that every suite runs on one."""

import json

import pytest
import torch

from swconv.__main__ import main
from swconv.bench.timing import Contender, Pace, Turn, compare

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

PACE = Pace(seconds=0.0, rounds=3, sample=0.0, probes=1)


def pool(count=3):
    return [(torch.randn(16, 4, 32, 32, device="cuda", requires_grad=True), torch.randn(16, 4, 32, 32, device="cuda"))
            for _ in range(count)]


def test_calls_are_timed_as_one_graph_of_all_sets_in_less_time_than_launched_by_the_cpu():
    def step(x, gradient):
        y = x
        for _ in range(20):
            y = y * 1.01
        return torch.autograd.grad(y, x, gradient)

    contenders = [Contender({}, {"only": Turn(step, pool())})]
    (graph,), (eager,) = (compare(contenders, [1], PACE, cuda=True, graphs=graphs) for graphs in (True, False))
    assert (graph["launched"], eager["launched"]) == ("graph", "eager")
    assert graph["calls_per_sample"] == 3
    assert graph["median_ms"] < eager["median_ms"]


def test_a_graph_holds_the_calls_of_every_set():
    totals = torch.zeros(3, device="cuda")
    sets = [(torch.ones(4, device="cuda", dtype=torch.int64) * number,) for number in range(3)]
    contenders = [Contender({}, {"only": Turn(lambda index: totals.index_add_(0, index[:1], totals.new_ones(1)), sets)})]
    (row,) = compare(contenders, [1], PACE, cuda=True, graphs=True)
    assert row["launched"] == "graph"
    assert totals.min() >= 1 + 1 + 3                                   # a replay when made, one to probe, three rounds
    assert totals.max() - totals.min() <= 2                            # two eager calls came before


def test_what_cannot_be_captured_is_called_and_its_row_says_so():
    waiting = Turn(lambda x, gradient: x.sum().item(), pool())
    (row,) = compare([Contender({}, {"only": waiting})], [1], PACE, cuda=True, graphs=True)
    assert row["launched"] == "eager"
    assert row["median_ms"] > 0
    assert torch.randn(9, device="cuda").std() > 0                     # nothing is left of the capture that failed


def test_variants_that_are_slow_on_a_few_images_are_left_out():
    heavy = torch.randn(4096, 4096, device="cuda")

    def slow(x, gradient):
        for _ in range(10):
            heavy @ heavy

    variants = {"slow": Turn(slow, pool()), "fast": Turn(lambda x, gradient: x + 1, pool())}
    (row,) = compare([Contender({}, variants)], [1], PACE, cuda=True, graphs=True)
    assert (row["variant"], row["left_out"], list(row["probe_ms"])) == ("fast", ["slow"], ["fast"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")       # torch.compile's own, of torch.jit
@pytest.mark.parametrize("suite", ["operator", "throughput", "training"])
def test_every_suite_runs_on_a_gpu(suite, tmp_path):
    assert main(["bench", suite, "--quick", "--device", "cuda", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    found = json.loads(path.read_text())
    assert found["device"] == "cuda"
    if suite == "operator":
        assert {row["launched"] for row in found["times"] if row["cell"] != "network"} == {"graph"}
        assert {row["precision"] for row in found["times"]} == {"float32", "tf32", "bfloat16"}
