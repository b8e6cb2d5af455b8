"""The report holds the numbers of its JSON."""

import pytest

from swconv.bench import page

FORWARD = {"ours": 2.0, "two_step": 84.0, "two_step_taps": 10.0, "torch_strips": 5.0, "depthwise13": 2.5, "depthwise7": 1.0,
           "slak_pair": 8.0}
TRAINING = {"ours": 4.0, "ours_layer": 6.0, "two_step": 200.0, "two_step_layer": 210.0, "two_step_taps": 90.0,
            "torch_strips": 12.0, "depthwise13": 9.0, "depthwise7": 3.0, "slak_pair": 20.0}
COUNTS = {(1, 1): 1.0, (2, 1): 1.0, (4, 1): 1.01, (1, 2): 1.0, (1, 4): 1.25}


def row(ms, threads=2, precision="float32", launched="eager", **labels):
    return {**labels, "precision": precision, "variant": "channels_last", "probe_ms": {}, "left_out": [],
            "launched": launched, "threads": threads, "median_ms": ms, "q1_ms": 0.9 * ms,
            "q3_ms": 1.1 * ms, "rounds": 9, "calls_per_sample": 1}


@pytest.fixture
def record():
    """One stage of 3 blocks and batch 2; one thread takes 1.5 times as long; a map of ours is 100 bytes."""
    times = []
    slower = {"ours": 2.0, "two_step": 120.0}
    for cell, known in (("forward", FORWARD), ("training", TRAINING), ("ordinary forward", slower)):
        for name, ms in known.items():
            least = {"macs": None, "bytes": None} if name.endswith("_layer") else {"macs": 10**6, "bytes": 4 * 10**6}
            times += [row(ms * slow, n, cell=cell, stage=1, contender=name, **least) for n, slow in ((1, 1.5), (2, 1))]
    times += [row(ms, cell="counts", stage=1, mode=mode, edges=e, rep=r)
              for (e, r), ms in COUNTS.items() for mode in ("forward", "training")]
    times += [row(ms, cell="network", batch=batch, contender=name)
              for batch, name, ms in ((1, "ours", 50.0), (1, "two_step", 100.0), (8, "ours", 400.0), (8, "two_step", 480.0))]
    return {
        "device": "cpu", "quick": False, "engine": "compiled", "load_before": 0.01, "seconds": 12.3,
        "git_commit": "abc123", "git_dirty": False, "started": "2026-01-02T03:04:05+00:00",
        "hardware": {"cpu": "Some CPU", "cores": 2, "gpu": None}, "versions": {"torch": "2.11"},
        "flags": {"threads": 2, "SWCONV_CPU": None},
        "plan": {"threads": [1, 2], "batches": [1, 8], "image": 224, "pool": 2**20, "product": 64,
                 "precisions": ["float32"], "deciding": ["float32"], "forward": {"untimed": 0},
                 "stages": [{"number": 1, "side": 56, "channels": 60, "extent": 51, "small": 3, "blocks": 3, "batch": 2}]},
        "tolerance": {"operator": {"float32": 1e-5}, "network": {"float32": 1e-4}}, "launches": [],
        "ceilings": [{"threads": n, "precision": "float32", "flop_per_s": n * 4e9, "bytes_per_s": 8e9} for n in (1, 2)],
        "errors": [{"stage": 1, "precision": "float32", "contender": "two_step", "of": "sums", "error": 3e-7},
                   {"precision": "float32", "of": "network", "error": 4e-6}],
        "memory": [{"stage": 1, "precision": "float32", "contender": name, "map": 100, "peak": peak, "saved": saved,
                    "saved_maps": 0} for name, peak, saved in (("ours", 420, 130), ("two_step", 3900, 110))],
        "times": times,
    }


@pytest.fixture
def gpu(record):
    """The same on a GPU with ten times the work per second in bfloat16, where ours takes a tenth and the pair a fifth."""
    half = []
    for cell in ("forward", "training"):
        for name, slower in (("ours", 0.1), ("slak_pair", 0.2)):
            known = FORWARD if cell == "forward" else TRAINING
            half.append(row(slower * known[name], precision="bfloat16", launched="graph", cell=cell, stage=1, contender=name,
                            macs=10**6, bytes=2 * 10**6))
    half += [row(0.1, precision="bfloat16", cell="counts", stage=1, mode=mode, edges=e, rep=r)
             for e, r in COUNTS for mode in ("forward", "training")]
    half += [row(ms, precision="bfloat16", cell="network", batch=batch, contender="ours")
             for batch, ms in ((1, 10.0), (8, 40.0))]
    graphs = [row(ms, launched="graph", cell="network", batch=1, contender=name)
              for name, ms in (("ours", 5.0), ("two_step", 40.0))]
    graphs.append(row(2.0, precision="bfloat16", launched="graph", cell="network", batch=1, contender="ours"))
    graphs += [row(ms, launched="graph", cell="network", batch=8, contender=name)
               for name, ms in (("ours", 80.0), ("two_step", 240.0))]
    graphs.append(row(20.0, precision="bfloat16", launched="graph", cell="network", batch=8, contender="ours"))
    both = ["float32", "bfloat16"]
    return record | {
        "device": "cuda", "hardware": {"cpu": "Some CPU", "cores": 2, "gpu": "Some GPU"},
        "plan": record["plan"] | {"threads": [2], "precisions": both, "deciding": both},
        "tolerance": {"operator": {"float32": 1e-5, "bfloat16": 1e-2}, "network": {"float32": 1e-4, "bfloat16": 5e-2}},
        "ceilings": record["ceilings"] + [{"threads": 2, "precision": "bfloat16", "flop_per_s": 8e10, "bytes_per_s": 8e9}],
        "errors": record["errors"] + [{"stage": 1, "precision": "bfloat16", "contender": "ours", "of": "output", "error": 3e-3},
                                      {"precision": "bfloat16", "of": "network", "error": 4e-2}],
        "launches": [{"stage": 1, "precision": precision, "contender": name, "median_us": us} for precision, name, us in (
            ("float32", "ours", 10.0), ("float32", "depthwise7", 7.0), ("bfloat16", "ours", 20.0))],
        "times": record["times"] + half + graphs,
    }


def test_a_gpu_s_targets_put_half_precision_beside_the_two_steps_of_float32(gpu):
    found = lines(gpu)
    assert "| forward, float32: (a) two-step as published / ours | >= 20 | >= 50 | 42.0 | reached |" in found
    assert "| forward: (a) in float32 / ours in bfloat16 | >= 60 | >= 200 | 420 | reached, and the aim |" in found
    assert "| forward, bfloat16: (e) / ours | >= 10 | >= 40 | 8.000 | **not reached** |" in found
    assert "| forward + backward: (a) in float32 / ours in bfloat16 | >= 25 | >= 120 | 500 | reached, and the aim |" in found
    what = "SW-tiny as a CUDA graph, batch 8: two-step in float32 / merged in bfloat16"
    assert f"| {what} | >= 6 | >= 12 | 12.0 | reached, and the aim |" in found
    assert "| CPU's time for an eager call of ours, float32, us | <= 12 | <= 6 | 10.0 | reached |" in found
    assert "| CPU's time for an eager call of ours, bfloat16, us | <= 12 | <= 6 | 20.0 | **not reached** |" in found


def test_the_share_of_the_floor_is_told_for_the_stages_that_there_are(gpu):
    # 2 MB at 8 GB/s are 0.25 ms, longer than the work at 80 GFLOP/s; ours takes 0.2 ms for two images
    assert page.Figures(gpu).share_of_floor(1, "bfloat16") == pytest.approx(2.5)
    shares = [line for line in lines(gpu) if "floor / ours" in line]
    assert shares == ["| forward, bfloat16, stage 1: floor / ours | >= 0.45 | >= 0.8 | 2.500 | reached, and the aim |"]


def test_rows_of_a_gpu_tell_precision_and_what_was_no_graph(gpu):
    found = lines(gpu)
    assert "| **ours**, strips, bfloat16 | 0.100 (0.0900-0.110) | 1.00 | 0.400 | channels_last | 9 |" in found
    assert "| **ours**, strips, float32 | 1.00 (0.900-1.10) | 1.00 | 2.00 | channels_last, no CUDA graph | 9 |" in found
    assert "| 1, as a CUDA graph | (a) two-step as published, float32 | 40.0 (36.0-44.0) | 8.00 | channels_last | 9 |" in found
    assert "| **ours**, strips, float32 | 10.0 |" in found


def lines(record):
    return page.render(record).splitlines()


def test_a_stage_tells_time_per_image_spread_ratio_floor_and_format(record):
    # 84 ms for 2 images; 84 / 2 times ours; the bytes take 0.5 ms, longer than the multiplications
    assert "| (a) two-step as published | 42.0 (37.8-46.2) | 42.0 | 84.0 | channels_last | 9 |" in lines(record)


def test_the_floor_is_the_larger_of_work_and_bytes(record):
    figures = page.Figures(record)
    assert figures.floor({"threads": 2, "precision": "float32", "macs": 10**6, "bytes": 4 * 10**6}) == 0.5
    assert figures.floor({"threads": 2, "precision": "float32", "macs": 10**7, "bytes": 4 * 10**6}) == 2.5
    assert figures.floor({"threads": 1, "precision": "float32", "macs": 10**7, "bytes": 4 * 10**6}) == 5


def test_the_sum_counts_every_block_and_tells_the_gain_of_threads(record):
    assert "## Summed over the 3 blocks of the network, per image" in lines(record)
    assert "| **ours**, strips | 3.00 | 1.00 | 2.00 | 4.50 | 1.50 |" in lines(record)
    assert "| (a) with norms and skip | 315 | 52.5 |  | 472 | 1.50 |" in lines(record)


def test_targets_tell_whether_they_are_reached(record):
    found = lines(record)
    assert "| forward: (a) two-step as published / ours | >= 20 | >= 35 | 42.0 | reached, and the aim |" in found
    assert "| the same in an ordinary process | >= 20 | >= 35 | 60.0 | reached, and the aim |" in found
    assert "| the same in an ordinary process | >= 15 | >= 40 |  | not measured |" in found
    assert "| forward: (b) best composable two-step / ours | >= 9 |  | 5.000 | **not reached** |" in found
    assert "| forward: ours / (d) depthwise 13x13 | <= 1.2 | <= 0.8 | 0.800 | reached, and the aim |" in found
    assert "| forward: (e) SLaK's pair / ours, least of stages 1-3 | >= 2.5 |  | 4.000 | reached |" in found
    assert "| forward + backward: time with E = 4 / E = 1 | <= 1.02 |  | 1.010 | reached |" in found
    assert "| forward: time with Rep = 4 / Rep = 1 | <= 1.02 |  | 1.250 | **not reached** |" in found
    assert "| forward: time with one thread / two | >= 1.7 |  | 1.500 | **not reached** |" in found
    assert "| SW-tiny, batch 1: two-step / merged | >= 1.7 |  | 2.000 | reached |" in found
    assert "| SW-tiny, batch 8: two-step / merged | >= 1.7 |  | 1.200 | **not reached** |" in found


def test_a_network_is_summed_only_where_every_stage_was_measured(record):
    second = record["plan"]["stages"][0] | {"number": 2}
    some = record | {"plan": record["plan"] | {"stages": [*record["plan"]["stages"], second]}, "unfinished": ["stage 2", "x"],
                     "times": [row for row in record["times"] if row["cell"] != "network"]}
    found = lines(some)
    assert "**Stopped before: stage 2; x.** What is missing is left out below." in found
    assert "| (a) two-step as published | 42.0 (37.8-46.2) | 42.0 | 84.0 | channels_last | 9 |" in found
    assert not any(line.startswith(("## Summed", "## Edges", "## Stage 2", "## The whole network")) for line in found)
    head = found.index("## Targets") + 4
    targets = found[head : found.index("", head)]
    told = [line for line in targets if not line.endswith("not measured |")]
    assert [line.partition(":")[0] for line in told] == []
    other = [row | {"stage": 2, "median_ms": 3 * row["median_ms"]} for row in some["times"] if row["cell"] == "forward"]
    found = lines(some | {"times": some["times"] + other})
    assert "| **ours**, strips | 12.0 | 1.00 | 4.00 | 18.0 | 1.50 |" in found        # 3 * 1 ms + 3 * 3 ms; 6 * 0.5 ms
    assert "| forward: (a) two-step as published / ours | >= 20 | >= 35 | 42.0 | reached, and the aim |" in found
    assert "| forward + backward: (a) / ours | >= 15 | >= 40 |  | not measured |" in found


def test_memory_is_told_in_maps(record):
    assert "| **ours**, strips | 4.20; 1.30 |" in lines(record)
    assert "| (a) two-step as published | 39.0; 1.10 |" in lines(record)
    record["memory"][0]["peak"] = 2000
    assert any("beyond x, three sums and one gradient" in line and line.endswith("| 16.0 | **not reached** |")
               for line in lines(record))


def test_the_head_tells_machine_commit_versions_flags_and_errors(record):
    text = page.render(record)
    assert text.startswith("# The SW operator on 2 cores of Some CPU\n")
    assert "commit abc123. Engine of ours in float32: compiled. Load before: 0.01." in text
    assert "Versions: torch 2.11. Flags: threads 2." in text
    assert "2 threads: 8 GFLOP/s (float32 product of side 64), 8.0 GB/s" in text
    assert "was 3.0e-07 (stage 1, (a) two-step as published; 1e-05 would" in text


def test_calls_that_were_not_timed_are_told(record):
    assert "not taken" not in page.render(record)
    assert "not taken" in page.render(record | {"plan": record["plan"] | {"forward": {"untimed": 1}}})


def test_a_trial_and_changes_that_are_not_committed_are_told(record):
    text = page.render(record | {"quick": True, "git_dirty": True})
    assert "its numbers say nothing" in text
    assert "commit abc123, with changes that are not committed." in text


def test_numbers_have_three_figures_however_small():
    assert [page._number(value) for value in (0.00043219, 0.05, 0.2345, 1.2, 12.34, 1234.5)] == [
        "0.000432", "0.0500", "0.234", "1.20", "12.3", "1234"]
