"""The plan: what it says of steps, weights, memory and hours against the networks themselves and against the list of runs."""

import csv
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from swconv import params
from swconv.__main__ import main
from swconv.models.network import set_recompute
from swconv.plan import kept, parameters, plan, table


@pytest.fixture(scope="module")
def known():
    return params.load()


@pytest.fixture
def project(tmp_path, monkeypatch):
    shutil.copytree("params", tmp_path / "params")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def entry(known, run, profile="paper", **where):
    return {entry.run: entry for entry in plan(known, run, profile, **where).entries}[known.canonical(run)]


def network(config, **changes):
    return timm.create_model(config["model"]["name"], num_classes=config["dataset"]["num_classes"],
                             in_chans=config["dataset"]["in_chans"], **config["model"]["args"] | changes)


@pytest.mark.parametrize("profile", ["mini", "paper"])
def test_weights_are_counted_as_the_network_has_them_for_every_row(known, profile):
    configs = {json.dumps(config["model"]): config for run in known.runs for config in [known.resolve(run, profile)]}
    assert len(configs) > 40
    for config in configs.values():
        if profile == "paper":
            config["model"]["args"]["depths"] = [1, 1, 2, 1]          # stage by stage all is the same, and 27 blocks take long
        with torch.device("meta"):
            model = network(config)
        dataset = config["dataset"]
        counted = parameters(config["model"]["name"], config["model"]["args"], dataset["in_chans"], dataset["num_classes"])
        assert counted == sum(weight.numel() for weight in model.parameters()), config["model"]


@pytest.mark.parametrize("change", [
    {"use_se": True}, {"norm": "filter", "padding": "full"}, {"layer_scale_init": 0.0}, {"ghost_ratio": 0.0},
    {"depthwise_norm_skip": True, "kernel_sizes": [3, 49, 47, 13]},
])
def test_weights_are_counted_for_what_no_row_has_yet(known, change):
    config = known.resolve("sw11", "paper")
    with torch.device("meta"):
        model = network(config, **change)
    assert parameters("sw_slak_tiny", config["model"]["args"] | change, 3, 1000) == sum(w.numel() for w in model.parameters())


def torch_keeps(module, x):
    """Floats that one pass keeps, besides the module's own."""
    floats, own = {}, {tensor.untyped_storage().data_ptr() for tensor in [*module.parameters(), *module.buffers()]}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            floats[storage.data_ptr()] = (storage.nbytes() / 4, tensor)  # held, or its place would be given to another
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module.train()(x)
    return sum(count for count, _ in floats.values())


@pytest.mark.parametrize("run", ["sw00", "sw02", "sw04", "sw11", "sw21", "sw24", "sw25", "sw26", "cnx_t_rep_31_120",
                                 "cnx_t_stack10x3_120", "cnx_t_seq_120", "unireplknet_t_300"])
def test_what_a_backward_pass_needs_is_within_a_tenth_of_what_torch_keeps(known, run):
    config, size, batch = known.resolve(run, "paper"), 128, 4
    config["model"]["args"]["depths"] = [1, 1, 2, 1]
    found = torch_keeps(network(config), torch.zeros(batch, 3, size, size))
    assert kept(config["model"]["name"], config["model"]["args"], 3, size) == pytest.approx(found / batch, rel=0.1)


@pytest.mark.parametrize("run", ["sw00", "sw11", "sw24", "unireplknet_t_300"])
def test_with_recompute_it_is_what_torch_keeps_and_the_maps_of_the_largest_block(known, run):
    config, size, batch = known.resolve(run, "paper"), 128, 4
    config["model"]["args"]["depths"] = [1, 1, 2, 1]
    model = network(config)
    x = model.stem(torch.zeros(batch, 3, size, size)).detach()
    largest = torch_keeps(model.stages[0].blocks[0], x) - 2 * x.numel()         # its input and its contraction are kept anyway
    set_recompute(model)
    found = torch_keeps(model, torch.zeros(batch, 3, size, size)) + largest
    estimate = kept(config["model"]["name"], config["model"]["args"], 3, size, recompute=True)
    assert estimate == pytest.approx(found / batch, rel=0.1)


def test_hours_are_those_of_the_list_of_runs(known):
    with Path("reports/paper/runs.csv").open(newline="") as file:
        listed = [row for row in csv.DictReader(file) if row["kind"] in ("pretrain", "finetune384") and row["gpu_h_A100_est"]]
    assert len(listed) > 60
    for row in listed:
        assert entry(known, row["run_id"]).hours == pytest.approx(float(row["gpu_h_A100_est"]), rel=0.01), row["run_id"]


def test_every_row_has_a_rate_and_no_rate_is_for_nothing(known):
    assert [run for run in known.runs if known.rate(run) is None] == []


def test_steps_are_whole_batches_of_all_images(known):
    found = entry(known, "sw24")
    assert (found.epochs, found.steps_per_epoch, found.steps, found.images) == (120, 312, 37_440, 37_440 * 4096)
    tuned = entry(known, "slak_b_384ft")
    assert (tuned.steps_per_epoch, tuned.needs) == (1_281_167 // 512, "slak_b_300")


def test_memory_and_disk_are_what_the_state_of_a_run_holds(known):
    plain, averaged, masked = (entry(known, run) for run in ("sw24", "cnx_t_k7_120", "sw00"))
    assert plain.disk == (2 * 12 + 4) * plain.parameters                          # two of weight and moments, and the weights
    assert averaged.disk == (2 * 16 + 4) * averaged.parameters                    # with the average
    assert masked.disk == (2 * 17 + 4) * masked.parameters                        # and masks, a byte per weight
    config = known.resolve("sw24", "paper")
    floats = kept("sw_tiny", config["model"]["args"], 3, 224)
    assert plain.memory == 16 * plain.parameters + round(256 * floats * 4)        # the same, gradients, and the backward pass


def test_a_report_is_planned_with_equal_rows_once_and_with_the_runs_whose_weights_it_needs(known):
    found = plan(known, "all", "mini")
    assert len(found.entries) == len(known.runs)
    assert {entry.run for entry in found.counted} == {
        run for run in known.runs if not known.same_as(run, "mini") and not known.runs[run].same_weights}
    alone = plan(known, "slak_w13_61_120", "mini")
    assert [(entry.run, entry.same_as) for entry in alone.entries] == [("sw00", None), ("slak_w13_61_120", "sw00")]
    assert [entry.run for entry in alone.counted] == ["sw00"]
    laid_out = plan(known, "sw_01_infer", "paper")
    assert [(entry.run, entry.trained) for entry in laid_out.entries] == [("sw00_300", True), ("sw01_infer", False)]
    assert laid_out.total("hours") == pytest.approx(592, abs=1)


def test_totals_of_table_2_are_the_sum_of_its_rows(known):
    found = plan(known, "table2", "paper")
    assert [entry.run for entry in found.entries] == known.report_rows("table2")
    assert found.plain()["totals"]["hours"] == pytest.approx(sum(entry.hours for entry in found.entries))
    text = table(found)
    hours = round(found.total("hours"))
    assert f"18 to train, one seed each: {found.total('disk') / 1e9:.1f} GB of disk; {hours:,} A100-hours" in text
    assert f"{hours / 2.3:,.0f} H200-hours (estimates, +-40%" in text


def test_hours_on_a_cpu_are_those_of_earlier_seeds_of_the_same_row(known, tmp_path):
    assert entry(known, "sw11", "mini", artifacts=tmp_path).hours is None
    for seed, seconds, config in ((0, 30, known.resolve("sw11", "mini")), (1, 42, known.resolve("sw11", "mini")),
                                  (2, 9000, known.resolve("sw12", "mini"))):
        folder = tmp_path / "mini/train/sw11" / f"seed{seed}"
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps({"seconds": seconds, "config": config}))
    found = entry(known, "sw11", "mini", artifacts=tmp_path)
    assert (found.hours, found.basis) == (pytest.approx(36 / 3600), "earlier seeds")
    assert "0.01 hours, as earlier seeds took" in table(plan(known, "sw11", "mini", artifacts=tmp_path))


def test_images_are_counted_where_they_are_listed_and_else_asked_for(known, tmp_path, project):
    listed = tmp_path / "paper/data"
    listed.mkdir(parents=True)
    (listed / "data.json").write_text(json.dumps({"n_train": 8192}))
    assert entry(known, "sw24", artifacts=tmp_path).steps_per_epoch == 2
    (project / "params/profiles/leaves.yaml").write_text(
        "from: paper\ndataset: {name: leaves, root: data/leaves}\n")
    with pytest.raises(params.ParamsError, match=r"training images of leaves, .* snakemake --cores all artifacts/leaves/data/"):
        plan(params.load(project / "params"), "sw24", "leaves")


def test_a_row_without_a_rate_has_unknown_hours(project):
    rates = project / "params/plan.yaml"
    rates.write_text(rates.read_text().replace("  sw24: {", "  sw27: {"))
    known = params.load()
    assert entry(known, "sw24").hours is None
    assert table(plan(known, "sw24", "paper")).splitlines()[-2] == (
        "1 to train, one seed each: 890 MB of disk; hours of 1 not known, they have no rate in params/plan.yaml.")


def test_the_verb_prints_a_table_or_json_without_torch():
    code = ("import sys; from swconv.__main__ import main; main(['plan', 'slak_t_300', '--json']); "
            "assert not {'torch', 'timm', 'numpy', 'mlflow'} & sys.modules.keys()")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["profile"], [run["run"] for run in found["runs"]]) == ("paper", ["sw00_300"])
    assert math.isclose(found["totals"]["hours"], found["runs"][0]["hours"])


@pytest.mark.parametrize(("arguments", "sentence"), [
    (["slak_t_301"], "unknown run slak_t_301; the nearest known name is slak_t_300. A run, a report (table2"),
    (["table2", "--profile", "mni"], "unknown profile mni; the nearest known name is mini."),
])
def test_an_unknown_target_is_one_sentence(capsys, arguments, sentence):
    assert main(["plan", *arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert sentence in line


def test_a_rate_of_an_unknown_run_is_a_fault(project):
    rates = project / "params/plan.yaml"
    rates.write_text(rates.read_text().replace("  sw24: {", "  sw224: {"))
    with pytest.raises(params.ParamsError, match=r"plan\.yaml:\d+: unknown run sw224; the nearest known name is sw24\."):
        params.load()
