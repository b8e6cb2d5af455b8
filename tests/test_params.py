"""The rows: what they say of the papers' runs, and the sentences that faults in them give."""

import csv
import importlib
import itertools
import json
import re
import shutil
from pathlib import Path

import pytest
import timm
import yaml
from PIL import Image

from swconv import params
from swconv.__main__ import main

# Measurements and downstream runs of reports/paper/runs.csv (measure, seg_ade20k, det_coco, ...) are no rows of runs.yaml.
TRAINED = ("pretrain", "finetune384", "eval_convert")
PAPER_SHAPES = {"depths": [3, 3, 9, 3], "dims": [96, 192, 384, 768], "width_factor": 1.3, "kernel_sizes": [51, 49, 47, 13]}


@pytest.fixture(scope="module")
def known():
    return params.load()


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree("params", tmp_path / "params"))


def edit(folder: Path, old: str, new: str, file: str = "runs.yaml") -> None:
    path = folder / file
    text = path.read_text()
    assert text.count(old) >= 1, old
    path.write_text(text.replace(old, new, 1))


def fault(folder: Path) -> str:
    with pytest.raises(params.ParamsError) as caught:
        params.load(folder)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence.removeprefix(f"{folder}/")


def changed(known, run: str, base: str, scale: str = "paper") -> dict[str, tuple]:
    """Leaves in which two resolved rows differ, as {key: (base value, value)}."""
    ours, theirs = (flat(known.resolve(name, scale)) for name in (run, base))
    return {key: (theirs.get(key), ours.get(key)) for key in sorted(ours.keys() | theirs.keys())
            if ours.get(key) != theirs.get(key)}


def flat(row: dict, prefix: str = "") -> dict:
    leaves = {}
    for key, value in row.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves


def test_every_ablation_of_the_paper_is_a_row_with_its_source(known):
    labels = [row.label for row in known.runs.values()]
    assert {f"#{number}" for number in range(28)} <= set(labels)
    assert all(row.source for row in known.runs.values())


def test_table2_has_the_papers_rows_in_its_order(known):
    lines = Path("reports/paper/sw_table2.csv").read_text().splitlines()[1:]
    assert [(known.runs[run].label, known.runs[run].text) for run in known.reports["table2"].rows] == [
        tuple(line.split(",")[:2]) for line in lines]


@pytest.mark.parametrize(("run", "base", "difference"), [
    ("sw03", "sw02", {"model.args.padding": ("full", "half")}),
    ("sw04", "sw03", {"model.args.rep_branches": (1, 2), "recipe.sparsity.others": ("body", "pointwise")}),
    ("sw05", "sw04", {"model.args.norm": ("filter", "branch")}),
    ("sw06", "sw05", {"model.args.ghost_ratio": (0.0, 0.23)}),
    ("sw07", "sw06", {"model.args.small_kernel": (5, 3)}),
    ("sw08", "sw07", {"model.args.rep_branches": (2, 4)}),
    ("sw09", "sw03", {"model.args.order": ("reversed", "shuffle_v")}),
    ("sw10", "sw09", {"model.args.order": ("shuffle_v", "shuffled"), "model.args.edges": (1, 2)}),
    ("sw11", "sw08", {"model.args.rep_branches": (4, 2), "model.args.edges": (1, 4), "model.args.skip": (False, True),
                      "model.args.order": ("reversed", "shuffled"), "model.args.padding": ("half", "full")}),
    ("sw12", "sw11", {"model.args.rep_branches": (2, 4)}),
    ("sw13", "sw12", {"model.args.edges": (4, 2)}),
    ("sw14", "sw11", {"model.args.rep_branches": (2, 8)}),
    ("sw15", "sw11", {"recipe.sparsity.scores": ("sum", "concat")}),
    ("sw16", "sw11", {"recipe.sparsity.level": (0.4, 0.3)}),
    ("sw17", "sw16", {"recipe.sparsity.share_every": (1, 3)}),
    ("sw18", "sw16", {"recipe.sparsity.share_every": (1, 5)}),
    ("sw20", "sw19", {"model.args.use_se": (False, True)}),
    ("sw21", "sw20", {"model.args.kernel_sizes": ([51, 49, 47, 13], [3, 49, 47, 13])}),
    ("sw22", "sw20", {"recipe.sparsity.subset": (False, True)}),
    ("sw23", "sw20", {"model.args.kernel_sizes": ([51, 49, 47, 13], [51, 49, [47, 3], 13])}),
    ("sw25", "sw24", {"model.args.use_se": (True, False)}),
    ("sw26", "sw24_300", {"model.args.ghost_ratio": (0.23, 0.0)}),
    ("sw27", "sw24_300", {"recipe.sparsity.level": (0.3, 0.2)}),
    ("sw01", "sw00_300", {"model.args.laid_out": (False, True), "recipe.sparsity.granularity": ("element", "filter"),
                          "recipe.sparsity.others": ("all", "body"),
                          "recipe.sparsity.prune": ("magnitude", "magnitude_sum")}),
    ("sw01_infer", "sw00_300", {"model.args.laid_out": (False, True)}),
    ("sw16_concat", "sw16", {"recipe.sparsity.scores": ("sum", "concat")}),
])
def test_a_row_differs_from_its_neighbour_by_what_the_paper_says(known, run, base, difference):
    assert changed(known, run, base) == difference
    mini = changed(known, run, base, "mini")
    assert mini.keys() == difference.keys()


@pytest.mark.parametrize("run", ["sw00", "sw02", "sw20", "sw24"])
def test_a_300_epoch_column_is_the_same_row_trained_longer(known, run):
    assert changed(known, f"{run}_300", run) == {"recipe.epochs": (120, 300)}
    mini = changed(known, f"{run}_300", run, "mini")
    assert mini["recipe.epochs"] == (12, 30)
    assert mini.keys() <= {"recipe.epochs", "recipe.warmup_epochs", "recipe.sparsity.update_every"}
    assert mini.get("recipe.warmup_epochs", (1.2, 3.0)) == (1.2, 3.0)     # where SLaK's recipe warms up for a tenth


def test_row_2_is_slak_t_with_one_set_of_shifted_filters(known):
    row, slak = known.resolve("sw02", "paper"), known.resolve("sw00", "paper")
    assert row["model"] == {"name": "sw_slak_tiny", "args": PAPER_SHAPES | {
        "small_kernel": 5, "rep_branches": 1, "edges": 1, "ghost_ratio": 0.0, "use_se": False, "padding": "full",
        "norm": "filter", "skip": False, "order": "reversed", "depthwise_norm_skip": False, "layer_scale_init": 1.0e-6}}
    assert row["recipe"].pop("sparsity") == slak["recipe"].pop("sparsity") | {
        "granularity": "filter", "others": "body", "prune": "magnitude_sum"}
    assert row["recipe"] == slak["recipe"]


def test_row_19_is_row_18_on_the_unireplknet_skeleton_without_se(known):
    row, before = known.resolve("sw19", "paper"), known.resolve("sw18", "paper")
    shapes = {"depths": [3, 3, 18, 3], "dims": [80, 160, 320, 640], "width_factor": 1.0}
    assert row == before | {"model": {"name": "sw_tiny", "args": before["model"]["args"] | shapes}}
    assert row["model"]["args"]["use_se"] is False
    assert changed(known, "sw19", "sw18", "mini").keys() == {"model.name", "model.args.depths", "model.args.dims"}


def test_row_11_is_the_released_module_on_slak_t(known):
    args = known.resolve("sw11", "paper")["model"]["args"]
    assert {key: args[key] for key in PAPER_SHAPES} == PAPER_SHAPES
    assert (args["small_kernel"], args["rep_branches"], args["edges"], args["ghost_ratio"]) == (3, 2, 4, 0.23)
    assert (args["padding"], args["norm"], args["skip"], args["order"]) == ("full", "branch", True, "shuffled")


def test_row_24_is_the_readme_command(known):
    row = known.resolve("sw24", "paper")
    assert row["model"]["args"]["depths"] == [3, 3, 18, 3]
    recipe = row["recipe"]
    assert (recipe["epochs"], recipe["warmup_epochs"], recipe["drop_path_rate"], recipe["ema_decay"]) == (120, 5, 0.2, None)
    assert recipe["sparsity"] | {"growth": None} == {
        "level": 0.3, "granularity": "filter", "others": "none", "density": "snip", "scores": "concat",
        "prune": "magnitude_sum", "update_every": 100, "prune_rate": 0.3, "share_every": 131, "subset": False, "growth": None}


@pytest.mark.parametrize("run", ["sw11", "sw24", "sw26", "slak_s_300", "slak_b_300", "slak_fig5", "slak_fig5_f50",
                                 "slak_fig5_f500", "slak_fig5_f1000", "slak_fig5_f2000"])
def test_mini_updates_and_shares_masks_as_often_as_the_paper(known, run):
    counts = []
    for scale, images in (("paper", 1_281_167), ("mini", 4000)):
        recipe = known.resolve(run, scale)["recipe"]
        updates = images // recipe["batch_size"] * recipe["epochs"] // recipe["sparsity"]["update_every"]
        counts.append((updates, updates // recipe["sparsity"]["share_every"]))
    (paper, shared), (mini, mini_shared) = counts
    assert mini == pytest.approx(paper, rel=0.01)
    assert mini_shared == pytest.approx(shared, rel=0.01)


@pytest.mark.parametrize("scale", ["paper", "mini", "smoke"])
def test_rows_of_table2_are_different_experiments_at_every_scale(known, scale):
    rows = known.report_rows("table2")
    identities = {run: known.identity(run, scale) for run in rows}
    equal = [(a, b) for a, b in itertools.combinations(rows, 2) if identities[a] == identities[b]]
    assert not equal
    assert known.trained(rows, scale) == rows


def test_every_training_run_of_both_papers_is_a_row_with_its_certainty(known):
    with Path("reports/paper/runs.csv").open(newline="") as file:
        listed = [row for row in csv.DictReader(file) if row["kind"] in TRAINED]
    assert len(listed) == 70
    for row in listed:
        run = known.canonical(row["run_id"])
        assert known.runs[run].certainty == certainty(row), run
        assert known.runs[run].certainty != "unknown" or known.runs[run].note, run


def certainty(row: dict[str, str]) -> str:
    """The word of params/ for what reports/paper/runs.csv says of a run's settings."""
    said = row["config_certainty"]
    if any(row[setting].startswith("unknown") for setting in ("only_L", "ema")):
        return "unknown"
    if said.startswith(("published command", "exact")):
        return "published"
    return "inferred" if said.startswith(("published recipe", "inferred", "not released", "command and weights")) else "unknown"


def test_what_the_papers_rows_say_of_models_and_recipes_is_what_the_rows_resolve_to(known):
    with Path("reports/paper/runs.csv").open(newline="") as file:
        listed = [row for row in csv.DictReader(file) if row["kind"] == "pretrain" and row["paper"] == "SLaK"]
    for row in listed:
        config = known.resolve(known.canonical(row["run_id"]), "paper")
        args, recipe = config["model"]["args"], config["recipe"]
        assert recipe["epochs"] == int(row["epochs_or_iters"])
        assert ([recipe["warmup_epochs"], recipe["lr"], recipe["batch_size"]]
                == [float(row["warmup_ep"]), float(row["lr"]), int(row["batch"])])
        assert recipe["drop_path_rate"] == float(row["drop_path"])
        for key in ("depths", "dims"):
            assert args[key] == numbers(row[key]), row["run_id"]
        assert args["width_factor"] == float(row["width_factor"])
        if row["kernel_size"]:
            assert args["kernel_sizes"] == numbers(row["kernel_size"]), row["run_id"]
        assert args["small_kernel"] == (None if row["N"] == "100" else int(row["N"])), row["run_id"]
        assert (recipe["sparsity"] or {}).get("level") == (float(row["sparsity"]) if row["sparsity"] else None)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split("-")]


@pytest.mark.parametrize(("run", "base", "difference"), [
    ("cnx_t_naive_51_120", "cnx_t_k7_120", {"model.args.kernel_sizes": ([7, 7, 7, 7], [51, 49, 47, 13])}),
    ("cnx_t_rep_51_120", "cnx_t_naive_51_120", {"model.args.small_kernel": (None, 5)}),
    ("slak_sg_61_120", "slak_w13_61_120", {"model.args.width_factor": (1.3, 1.0)}),
    ("slak_sw_s82_w25_120", "sw00", {"model.args.width_factor": (1.3, 2.5), "recipe.sparsity.level": (0.4, 0.82)}),
    ("slak_w13_51_N7_120", "sw00", {"model.args.small_kernel": (5, 7)}),
    ("slak_fig5", "sw00", {"recipe.sparsity.prune_rate": (0.5, 0.3), "recipe.sparsity.update_every": (2000, 100)}),
    ("slak_fig5_p09", "slak_fig5", {"recipe.sparsity.prune_rate": (0.3, 0.9)}),
    ("slak_fig5_f500", "slak_fig5", {"recipe.sparsity.update_every": (100, 500)}),
    ("slak_s_300", "sw00_300", {"model.name": ("slak_tiny", "slak_small"), "model.args.depths": ([3, 3, 9, 3], [3, 3, 27, 3]),
                                "recipe.drop_path_rate": (0.1, 0.4), "recipe.sparsity.prune_rate": (0.5, 0.3),
                                "recipe.sparsity.update_every": (2000, 100)}),
    ("slak_b_300", "slak_s_300", {"model.name": ("slak_small", "slak_base"), "recipe.drop_path_rate": (0.4, 0.5),
                                  "model.args.dims": ([96, 192, 384, 768], [128, 256, 512, 1024])}),
    ("cnx_t_seq_120", "cnx_t_rep_51_120", {"model.args.arrangement": ("single", "sequential")}),
])
def test_a_row_of_slak_differs_from_its_neighbour_by_what_the_paper_says(known, run, base, difference):
    assert changed(known, run, base) == difference


def test_kernels_larger_than_the_maps_of_mini_are_the_same_experiment_there_and_no_other_rows_are(known):
    equal = {run: same for run in known.runs if (same := known.same_as(run, "mini"))}
    assert equal == {
        "cnx_t_naive_51_120": "cnx_t_naive_31_120", "cnx_t_naive_61_120": "cnx_t_naive_31_120",
        "cnx_t_rep_51_120": "cnx_t_rep_31_120", "cnx_t_rep_61_120": "cnx_t_rep_31_120",
        "cnx_t_pos_7_29_7_7_120": "cnx_t_pos_31_7_7_7_120",          # one stage stands for stages 1 and 2, one for 3 and 4
        "cnx_t_pos_7_7_7_13_120": "cnx_t_pos_7_7_27_7_120", "cnx_t_pos_7_7_27_13_120": "cnx_t_pos_7_7_27_7_120",
        "slak_dec_31_120": "slak_dec_51_120", "slak_dec_61_120": "slak_dec_51_120",
        "slak_sg_31_120": "slak_sg_51_120", "slak_sg_61_120": "slak_sg_51_120",
        "slak_w13_31_120": "sw00", "slak_w13_61_120": "sw00",
    }
    assert not [run for run in known.runs if known.same_as(run, "paper")]


def test_equal_rows_are_trained_under_the_name_that_comes_first_in_the_file_whatever_the_report(known):
    rows = ["slak_dec_61_120", "slak_dec_31_120", "slak_dec_51_120"]
    assert known.trained(rows, "mini") == ["slak_dec_51_120"]
    assert known.trained(rows, "paper") == rows


def test_laid_out_weights_are_no_training_that_another_row_could_share(folder):
    edit(folder, "  control_dw3:\n", "  laid: {label: a, text: b, source: ours, from: sw01_infer}\n  control_dw3:\n")
    known = params.load(folder)
    assert known.identity("laid", "mini") == known.identity("sw01_infer", "mini")
    assert known.same_as("laid", "mini") is None
    assert known.same_as("sw01_infer", "mini") is None


@pytest.mark.parametrize("profile", ["mini", "smoke"])
def test_every_model_and_recipe_has_its_counterpart_at_small_scale(known, profile):
    for kind in ("models", "recipes"):
        names = yaml.safe_load(Path(f"params/{kind}.yaml").read_text()).keys()
        assert names - getattr(known.profiles[profile], kind).keys() == set(), kind


def test_a_fine_tune_starts_from_its_run_with_larger_images_and_its_masks(known):
    row, before = known.resolve("slak_b_384ft", "paper"), known.resolve("slak_b_300", "paper")
    assert row["init"] == known.source("slak_b_384ft") == "slak_b_300"
    assert "init" not in before
    assert row["model"] == before["model"]
    assert row["dataset"] == before["dataset"] | {"image_size": 384, "crop_pct": 1.0, "crop_mode": "squash"}
    assert (row["recipe"]["epochs"], row["recipe"]["sparsity"]["density"], row["recipe"]["sparsity"]["prune_rate"]) == (
        30, "nonzero", 0.0)
    assert known.resolve("slak_b_384ft", "mini")["dataset"]["image_size"] == 80


def test_a_row_from_a_fine_tune_starts_from_the_same_weights(folder):
    edit(folder, "  control_dw3:\n",
         "  again: {label: a, text: b, source: ours, from: slak_b_384ft, recipe: {lr: 1.0e-5}}\n  control_dw3:\n")
    known = params.load(folder)
    assert known.source("again") == known.resolve("again", "mini")["init"] == "slak_b_300"


@pytest.mark.parametrize(("old", "new", "sentence"), [
    ("    init_from: slak_b_300", "    init_from: slak_b_30",
     "run slak_b_384ft: unknown run slak_b_30; the nearest known name is slak_b_300."),
    ("    init_from: slak_b_300", "    init_from: sw01_infer",
     "run slak_b_384ft needs a trained run to start from, got sw01_infer, which takes the weights of sw00_300."),
    ("    init_from: slak_b_300", "    init_from: slak_b_384ft",
     "run slak_b_384ft starts from its own weights through slak_b_384ft."),
    ("aliases: [slak_t_300]", "aliases: [slak_t_300, sw24]", "run sw00_300: alias sw24 is already run sw24."),
    ("aliases: [slak_t_300]", "aliases: [slak_t_300, slak_w13_51_120]",
     "run sw00_300: alias slak_w13_51_120 is already run sw00."),
    ("{dataset: {image_size: 384,", "{dataset: {image_sice: 384,",
     "run slak_b_384ft, unknown key paper.dataset.image_sice; the nearest known name is image_size."),
    ("    certainty: unknown\n", "    certainty: sure\n",
     "run sw00, certainty: input should be 'published', 'inferred', 'unknown' or 'ours', got 'sure'."),
    ("[10, 10, 10, 10]}}", "[10, 10, 10, 10], arrangement: dilated}}",
     "run cnx_t_stack10x3_120, model: arrangement dilated needs odd kernel_sizes, got 10; stacked takes any number."),
    ("model: {arrangement: dilated}", "model: {arrangement: diluted}",
     "run cnx_t_dil3_120, model.arrangement: input should be 'single', 'parallel', 'sequential', 'stacked' or 'dilated', "
     "got 'diluted'."),
], ids=itertools.count())
def test_faults_of_aliases_and_starting_weights_are_one_sentence(folder, old, new, sentence):
    edit(folder, old, new)
    assert fault(folder).split(": ", 1)[1] == sentence


def test_a_run_is_known_by_its_aliases_but_trained_under_one_name(known):
    assert known.canonical("slak_t_300") == known.canonical("sw00_300") == "sw00_300"
    with pytest.raises(params.ParamsError, match="run slak_t_300 is known here as sw00_300; use that name"):
        known.resolve("slak_t_300", "mini")
    with pytest.raises(params.ParamsError, match="unknown run slak_t_301; the nearest known name is slak_t_300"):
        known.canonical("slak_t_301")


def test_a_row_that_equals_another_at_mini_scale_is_found_and_not_trained_twice(folder):
    edit(folder, "    mini: {model: {kernel_sizes: [3, 13]}}\n", "    mini: {model: {kernel_sizes: [13, 13]}}\n")
    known = params.load(folder)
    rows = known.report_rows("table2")
    assert known.same_as("sw21", "mini") == "sw20"
    assert known.same_as("sw20", "mini") is None
    assert known.same_as("sw21", "paper") is None
    assert set(rows) - set(known.trained(rows, "mini")) == {"sw21"}


def test_where_the_data_lie_is_no_part_of_a_runs_identity(folder, known):
    edit(folder, "root: data/imagenet", "root: elsewhere", "profiles/paper.yaml")
    edit(folder, "workers: 8", "workers: 2", "profiles/paper.yaml")
    assert params.load(folder).identity("sw11", "paper") == known.identity("sw11", "paper")
    edit(folder, "threads: 8", "threads: 4", "profiles/paper.yaml")
    assert params.load(folder).identity("sw11", "paper") != known.identity("sw11", "paper")


def test_changing_one_row_changes_it_and_its_descendants_only(folder, known):
    edit(folder, "    text: rep8 E4", "    recipe: {lr: 3.0e-3}\n    text: rep8 E4")
    after = params.load(folder)
    assert [run for run in known.runs if after.identity(run, "mini") != known.identity(run, "mini")] == ["sw14"]


def test_keys_differ_by_seed_data_and_code():
    parts = [("row", "data", "code", 0), ("row", "data", "code", 1), ("row", "other", "code", 0), ("row", "data", "new", 0),
             ("new", "data", "code", 0)]
    keys = {params.key(*part) for part in parts}
    assert len(keys) == 5


@pytest.mark.parametrize(("old", "new", "file", "sentence"), [
    ("{rep_branches: 8}", "{rep_branchs: 8}", "runs.yaml",
     "run sw14, unknown key model.rep_branchs; the nearest known name is rep_branches."),
    ("{rep_branches: 8}", "{rep_branches: eight}", "runs.yaml",
     "run sw14, model.rep_branches: input should be a valid integer, got 'eight'."),
    ("{ghost_ratio: 0.23}", "{ghost_ratio: 1.5}", "runs.yaml",
     "run sw06, model.ghost_ratio: input should be less than 1, got 1.5."),
    ("    from: sw12\n", "    from: sw112\n", "runs.yaml", "run sw13: unknown run sw112; the nearest known name is sw12."),
    ("    recipe: {sparsity: {subset: true}}", "    recipe: {sparsity: {subsets: true}}", "runs.yaml",
     "run sw22, unknown key recipe.sparsity.subsets; the nearest known name is subset."),
    ("    label: \"#12\"", "    lable: \"#12\"", "runs.yaml", "run sw12, unknown key lable; the nearest known name is label."),
    ("  sw13:\n", "  sw12:\n", "runs.yaml", "not readable as YAML: sw12 stands twice, first in line"),
    ("sw21, sw22, sw23]", "sw21, sw22, sw33]", "runs.yaml", "report table2: unknown run sw33; the nearest known name is sw"),
    ("uses: {model: sw_tiny}", "uses: {model: sw_tini}", "runs.yaml",
     "run sw19: unknown model sw_tini; the nearest known name is sw_tiny."),
    ("  weight_decay: 0.05", "  weight_deacy: 0.05", "recipes.yaml",
     "recipe slak_tiny_120, unknown key weight_deacy; the nearest known name is weight_decay."),
    ("  from: sw_tiny_120", "  from: sw_tiny_12", "recipes.yaml",
     "recipe sw_tiny_300: unknown recipe above it sw_tiny_12; the nearest known name is sw_tiny_120."),
    ("profile: mini", "profile: mni", "active.yaml", "unknown profile mni; the nearest known name is mini."),
    ("profile: mini", "profile: smoke", "active.yaml", "profile smoke needs reports_folder: artifacts/smoke/reports."),
    ("seeds: [0, 1, 2]", "seeds: [0, 0]", "active.yaml", "seeds must differ from each other, got [0, 0]."),
    ("device: cpu", "device: tpu", "profiles/mini.yaml", "machine.device: input should be 'cpu' or 'cuda', got 'tpu'."),
    ("  threads: 1", "  thread: 1", "profiles/mini.yaml", "unknown key machine.thread; the nearest known name is threads."),
    ("  sw_tiny_300:\n", "  sw_tiny_30:\n", "profiles/mini.yaml",
     "unknown recipe sw_tiny_30; the nearest known name is sw_tiny_300."),
    ("  sw_tiny:  ", "  sw_tini:  ", "profiles/mini.yaml", "unknown model sw_tini; the nearest known name is sw_tiny."),
    ("    epochs: 12", "    epchs: 12", "profiles/mini.yaml",
     "unknown key recipes.slak_tiny_120.epchs; the nearest known name is epochs."),
    ("{update_every: 40}", "{updat_every: 40}", "profiles/mini.yaml",
     "unknown key recipes.slak_tiny_300.sparsity.updat_every; the nearest known name is update_every."),
    ("    depths: [1, 2]", "    depth: [1, 2]", "profiles/mini.yaml",
     "unknown key models.sw_tiny.depth; the nearest known name is depths."),
    ("    depths: [1, 2]", "    depths: [1, two]", "profiles/mini.yaml",
     "models.sw_tiny.depths.1: input should be a valid integer, got 'two'."),
    ("rand-m9-mstd0.5-inc1", "rand-q9", "recipes.yaml", "recipe slak_tiny_120, rand_augment: string should match pattern"),
    ("micro_batch: 256", "micro_batch: 255", "profiles/paper.yaml", "machine.micro_batch: an even number is needed, got 255."),
    ("warmup_epochs: 1,", "warmup_epochs: 2,", "profiles/smoke.yaml",
     "recipes.slak_tiny_120: warmup_epochs must be below epochs, got 2 of 2."),
    ("from: mini", "from: mni", "profiles/smoke.yaml", "unknown profile without `from`, mni; the nearest known name is mini."),
    ("    prune_rate: 0.3", "    prune_rat: 0.3", "recipes.yaml",
     "recipe sw_tiny_120, unknown key sparsity.prune_rat; the nearest known name is prune_rate."),
    ("  from: sw_tiny_120", "  form: sw_tiny_120", "recipes.yaml",
     "recipe sw_tiny_300, unknown key form; the nearest known name is from."),
    ("  eps: 1.0e-8", "  eps: 1e-8", "recipes.yaml",
     "recipe slak_tiny_120, eps: input should be a valid number, got '1e-8'."),
    ("    rep_branches: 2", "    rep_branchs: 2", "models.yaml",
     "model sw_tiny, unknown key args.rep_branchs; the nearest known name is rep_branches."),
    ("    use_se: true", "    use_se: 1", "models.yaml", "model sw_tiny, args.use_se: input should be a valid boolean, got 1."),
    ("reports:\n", "reports: [\n", "runs.yaml", "not readable as YAML:"),
    ("mini: {model: {kernel_sizes: [3, 13]}}", "mini: {model: {kernel_sizes: [3, 13, 13]}}", "runs.yaml",
     "run sw21, model: depths, dims and kernel_sizes need one entry per stage, "
     "got {'depths': 2, 'dims': 2, 'kernel_sizes': 3}."),
], ids=lambda value: value if str(value).endswith("yaml") else "")
def test_a_fault_is_one_sentence_with_file_line_and_nearest_name(folder, old, new, file, sentence):
    edit(folder, old, new, file)
    told = fault(folder)
    name, line, rest = told.split(":", 2)
    assert name == file
    assert sentence in rest
    text = (folder / file).read_text().splitlines()
    assert int(line) <= len(text)


@pytest.mark.parametrize(("old", "new", "file", "sentence"), [
    ("  name: sw_tiny", "  name: sw_tini", "models.yaml",
     "models.yaml:{line}: model sw_tiny: unknown network sw_tini; the nearest known name is sw_tiny."),
    ("reports:\n", "report:\n", "runs.yaml", "runs.yaml:{line}: unknown key report; the nearest known name is reports."),
    (None, "runs: {a: {}}", "runs.yaml", "runs.yaml: key reports is missing."),
    (None, "reports: {a: {rows: [b]}}\nruns:\n", "runs.yaml", "runs.yaml:2: runs: a mapping is needed, got None."),
    (None, "reports: {a: {rows: [b]}}\nruns: {}\n", "runs.yaml",
     "runs.yaml:2: runs: dictionary should have at least 1 item after validation, not 0, got {{}}."),
    ("sw_tiny_300: ", "empty:\nsw_tiny_300: ", "recipes.yaml",
     "recipes.yaml:{line}: recipe empty: a mapping is needed, got None."),
    ("  from: sw_tiny_120", "  from: [sw_tiny_120]", "recipes.yaml",
     "recipes.yaml:{line}: recipe sw_tiny_300: unknown recipe above it ['sw_tiny_120']; the nearest known name is"),
    ("  sw02:\n", "  2:\n", "runs.yaml", "runs.yaml:{line}: a name needs to be text, got '2'; quote it."),
    ("  sw02:\n", "  ? [sw02]\n  :\n", "runs.yaml", "runs.yaml:{line}: a name needs to be text, got a list; quote it."),
    ("    text: rep8 E4", "    text: 2024-01-01", "runs.yaml",
     "runs.yaml:{line}: text, a number, a list or a mapping is needed, got '2024-01-01' (timestamp); quote text."),
    ("    text: rep8 E4", "    text: !!set {a, b}", "runs.yaml",
     "runs.yaml:{line}: text, a number, a list or a mapping is needed, got a mapping (set); quote text."),
    ("    model: {rep_branches: 8}", "    model: &a {b: *a}", "runs.yaml",
     "runs.yaml:{line}: text, a number, a list or a mapping is needed, got one that holds itself."),
    (None, "sw03", "runs.yaml", "runs.yaml: a mapping of names is needed, got 'sw03'."),
    (None, "", "models.yaml", "models.yaml: a mapping of names is needed, got nothing."),
    ("  betas: [0.9, 0.999]", "  betas: [0.9]", "recipes.yaml",
     "recipes.yaml:{line}: recipe slak_tiny_120, key betas.1 is missing."),
    ("  lr: 4.0e-3", "  lr: .nan", "recipes.yaml",
     "recipes.yaml:{line}: recipe slak_tiny_120, lr: input should be a finite number, got nan."),
    ("  lr: 4.0e-3", "  lr: \0", "recipes.yaml", "recipes.yaml: not readable as YAML: "),
], ids=itertools.count())
def test_what_yaml_allows_and_params_do_not_is_one_sentence(folder, old, new, file, sentence):
    path = folder / file
    text = path.read_text()
    before, after = text.split(old, 1) if old else ("", "")
    path.write_text(f"{before}{new}{after}")
    line = before.count("\n") + 1
    assert fault(folder).startswith(sentence.format(line=line))


def test_a_file_that_is_not_in_utf8_is_one_sentence(folder):
    (folder / "runs.yaml").write_bytes("reports: {}\n# größer\n".encode("latin-1"))
    assert fault(folder) == "runs.yaml:2: text in UTF-8 is needed, got the byte 0xf6."


@pytest.mark.parametrize(("old", "new", "file", "sentence"), [
    ("{small_kernel: 3}", "{small_kernel: 4}", "runs.yaml", "run sw07, model.small_kernel: an odd number is needed, got 4."),
    ("    dims: [10, 20]\n    kernel_sizes: [13, 13]", "    dims: [10, 20]\n    kernel_sizes: [13, 12]", "profiles/mini.yaml",
     "models.sw_tiny.kernel_sizes.1: an odd number is needed, got 12."),
    ("{kernel_sizes: [13, [13, 3]]}", "{kernel_sizes: [13, [13, 2]]}", "runs.yaml",
     "run sw23, mini.model.kernel_sizes.1.1: an odd number is needed, got 2."),
    ("{model: {kernel_sizes: [3, 13]}}", "{model: {kernel_sizes: [3, []]}}", "runs.yaml",
     "run sw21, mini.model.kernel_sizes.1: input should be a valid integer, got []."),
    ("{order: shuffle_v}", "{order: shuffle_v, edges: 2}", "runs.yaml",
     "run sw09, model: order shuffle_v is defined for edges: 1, got 2; order shuffled takes any number."),
    ("  mean: [0.1]", "  mean: [0.1, 0.1]", "profiles/mini.yaml",
     "dataset: mean and std need one entry per channel (in_chans: 1), got 2 and 1."),
    ("  val_images: 2000\n", "", "profiles/mini.yaml",
     "dataset: digits needs train_images and val_images, got no val_images."),
    ("  name: digits", "  name: digit", "profiles/mini.yaml", "dataset: digit needs root, got no root."),
    ("  batch_size: 4096", "  batch_size: 4095", "recipes.yaml",
     "recipe slak_tiny_120: mixup and cutmix pair the images of a batch: batch_size must be even, got 4095."),
    ("    recipe: {sparsity: {subset: true}}", "    recipe: {batch_size: 33, cutmix: 1.0}", "runs.yaml",
     "run sw22, recipe: mixup and cutmix pair the images of a batch: batch_size must be even, got 33."),
    ("sw22, sw23]", "sw22, sw22]", "runs.yaml", "report table2: a run stands once in a report, got sw22 more than once."),
    ("controls: [", "controls: [sw11, ", "runs.yaml", "report table2: a run stands once in a report, got sw11 more than once."),
    ("[sw02_300, sw02]", "[sw02_300]", "runs.yaml",
     "report table1: row #2, SW-(pad=N-1) needs one run, or null, per column (2), got 1."),
    ("[sw02_300, sw02]", "[sw00_300, sw02]", "runs.yaml",
     "report table1: a run stands once in a report, got sw00_300 more than once."),
    ('reference: "SLaK-T, 5"', 'reference: "SLaK-T, 9"', "runs.yaml",
     "report slak/table9: unknown row SLaK-T, 9; the nearest known name is SLaK-T, 7."),
    ('"SLaK-T, 7": [slak_w13_51_N7_120]', '"SLaK-T, 7": [slak_w13_51_N7_121]', "runs.yaml",
     "report slak/table9: unknown run slak_w13_51_N7_121; the nearest known name is slak_w13_51_N7_120."),
], ids=itertools.count())
def test_values_that_only_a_job_would_refuse_are_refused_at_once(folder, old, new, file, sentence):
    edit(folder, old, new, file)
    name, line, rest = fault(folder).split(":", 2)
    assert (name, rest) == (file, f" {sentence}")
    assert int(line) > 1


def test_an_odd_batch_is_fine_where_nothing_is_mixed(folder):
    edit(folder, "    batch_size: 64", "    batch_size: 63", "profiles/mini.yaml")
    assert params.load(folder).resolve("sw11", "mini")["recipe"]["batch_size"] == 63


def test_the_line_is_the_line_of_the_key(folder):
    edit(folder, "{rep_branches: 8}", "{rep_branchs: 8}")
    line = int(fault(folder).split(":")[1])
    assert "rep_branchs" in (folder / "runs.yaml").read_text().splitlines()[line - 1]


def test_a_row_cannot_descend_from_itself(folder):
    edit(folder, "    from: sw11\n    model: {rep_branches: 4}", "    from: sw13\n    model: {rep_branches: 4}")
    assert "descends from itself" in fault(folder)


def test_a_missing_file_says_how_to_restore_it(folder):
    (folder / "models.yaml").unlink()
    assert "models.yaml is missing. Restore it: git checkout" in fault(folder)


def test_unknown_run_names_the_nearest(known):
    with pytest.raises(params.ParamsError, match="unknown run sw99; the nearest known name is sw"):
        known.resolve("sw99", "mini")


@pytest.mark.parametrize(("run", "sentence"), [
    ("sw01_infer", "run sw01_infer is evaluated with the weights of sw00_300, not trained."),
    ("sw111", "unknown run sw111; the nearest known name is sw11."),
])
def test_what_cannot_be_trained_says_why(known, run, sentence):
    with pytest.raises(params.ParamsError, match=re.escape(sentence)):
        known.check_trainable(run)


def test_every_other_row_can_be_trained(known):
    for run in known.runs.keys() - {"sw01_infer"}:
        known.check_trainable(run)


def test_every_network_that_rows_may_name_is_registered():
    importlib.import_module("swconv.models")
    assert all(timm.is_model(name) for name in params.ARGS)


def test_a_row_of_every_kind_of_network_trains_and_is_evaluated_merged(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    scale = ["--profile", "smoke"]
    assert main(["data", *scale, "--out", "data"]) == 0
    for run in ("cnx_t_stack10x3_120", "cnx_t_dil3_120", "cnx_t_seq_120", "unireplknet_t_300"):
        arguments, trained, measured = [run, *scale, "--seed", "0", "--data", "data"], f"trained/{run}", f"measured/{run}"
        assert main(["train", *arguments, "--out", trained]) == 0
        assert main(["evaluate", *arguments, "--weights", f"{trained}/weights.safetensors", "--out", measured]) == 0
        metrics = json.loads(Path(measured, "metrics.json").read_text())
        assert metrics["merged_logit_difference"]["value"] < 1e-5


def test_missing_imagenet_says_what_to_put_where(known):
    with pytest.raises(params.ParamsError, match=r"needs imagenet in data/imagenet/.*ln -s"):
        known.check_data("paper")
    known.check_data("mini")


def test_a_folder_with_other_numbers_of_images_is_refused_before_training_unless_it_has_a_name_of_its_own(folder, monkeypatch,
                                                                                                         capsys):
    monkeypatch.chdir(folder.parent)
    edit(folder, "num_classes: 1000", "num_classes: 2", "profiles/paper.yaml")
    for split, count in (("train", 3), ("val", 1)):
        for wnid in ("n0", "n1"):
            Path("data/imagenet", split, wnid).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (8, 8)).save(Path("data/imagenet", split, wnid, f"{i}.JPEG"))
    assert main(["data", "--profile", "paper", "--out", "data/paper"]) == 1
    told = capsys.readouterr().err
    assert ("profile paper needs 1281167 training and 50000 validation images of imagenet (params/plan.yaml), got 6 and 2 in "
            "data/imagenet. Complete the folder; or, to go on with these, give the dataset another name") in told
    assert not Path("data/paper/data.json").exists()
    (folder / "profiles/part.yaml").write_text("from: paper\nreports: artifacts/part/reports\ndataset: {name: imagenet_part}\n")
    assert main(["data", "--profile", "part", "--out", "data/part"]) == 0
    assert json.loads(Path("data/part/data.json").read_text())["n_train"] == 6
    edit(folder, "{train: 1281167, val: 50000}", "{train: 6, val: 2}", "plan.yaml")
    assert main(["data", "--profile", "paper", "--out", "data/paper"]) == 0


def test_active_that_cannot_be_written_is_told_and_stays_whole(folder):
    path = folder / "active.yaml"
    before, active = path.read_text(), params.Active(profile="smoke", seeds=(3,), reports_folder="artifacts/smoke/reports")
    path.with_name(".active.yaml.part").mkdir()
    with pytest.raises(OSError, match=r"active\.yaml could not be written: Is a directory\. Make room"):
        params.write_active(path, active)
    assert path.read_text() == before


def test_active_is_written_only_when_it_changes(folder):
    path = folder / "active.yaml"
    before = path.stat().st_mtime_ns
    params.write_active(path, params.Active(profile="mini", seeds=(0, 1, 2), reports_folder="reports"))
    assert path.stat().st_mtime_ns == before
    smoke = params.Active(profile="smoke", seeds=(3,), reports_folder="artifacts/smoke/reports")
    params.write_active(path, smoke)
    assert params.load(folder).active == smoke


def test_reduced_images_are_part_of_the_identity_and_workers_are_not(folder):
    edit(folder, "  workers: 8 ", "  workers: 3 ", "profiles/paper.yaml")
    same = params.load(folder).identity("sw11", "paper")
    edit(folder, "  workers: 3 ", "  cache_px: 256\n  workers: 3 ", "profiles/paper.yaml")
    assert same == params.load().identity("sw11", "paper")
    assert same != params.load(folder).identity("sw11", "paper")


def test_rows_and_weights_larger_than_the_reduced_images_read_the_files(folder):
    edit(folder, "  workers: 8 ", "  cache_px: 256\n  workers: 8 ", "profiles/paper.yaml")
    known = params.load(folder)
    assert known.resolve("sw11", "paper")["dataset"]["cache_px"] == 256
    assert "cache_px" not in known.resolve("slak_b_384ft", "paper")["dataset"]
    assert "cache_px" not in known.released("slak_base_384", "paper")["dataset"]


def test_reduced_images_smaller_than_the_profiles_own_are_refused(folder):
    edit(folder, "  workers: 8 ", "  cache_px: 255\n  workers: 8 ", "profiles/paper.yaml")
    with pytest.raises(params.ParamsError, match="paper.yaml.*cache_px needs 256 px or more.* got 255"):
        params.load(folder)


def test_masks_per_filter_by_single_magnitudes_are_refused(folder):
    edit(folder, "    prune: magnitude_sum            # [C]\n", "    prune: magnitude\n", "recipes.yaml")
    with pytest.raises(params.ParamsError, match="granularity: element, .*, got filter, 131 and false"):
        params.load(folder)


@pytest.mark.parametrize(("profile", "old", "new"), [
    ("mini", "processes: 1", "processes: 2"),
    ("mini", "checkpoint_minutes: 10", "checkpoint_minutes: 1.5"),
    ("paper", "processes: 1", "processes: 4"),
    ("mini", "recompute: false", "recompute: true"),
])
def test_how_the_work_is_shared_out_and_saved_is_no_part_of_a_runs_identity(folder, known, profile, old, new):
    path = folder / f"profiles/{profile}.yaml"
    path.write_text(path.read_text().replace(old, new, 1))
    after = params.load(folder)
    assert after.identity("sw24", profile) == known.identity("sw24", profile)
    assert after.resolve("sw24", profile) != known.resolve("sw24", profile)


@pytest.mark.parametrize(("old", "new"), [("tf32: false", "tf32: true"), ("compile: false", "compile: true"),
                                          ("sync_bn: true", "sync_bn: false"), ("amp: null", "amp: float16")])
def test_what_changes_the_arithmetic_is(folder, known, old, new):
    path = folder / "profiles/mini.yaml"
    path.write_text(path.read_text().replace(old, new, 1))
    assert params.load(folder).identity("sw24", "mini") != known.identity("sw24", "mini")


def test_the_number_of_processes_is_where_each_has_norms_of_its_own(folder):
    path = folder / "profiles/mini.yaml"
    path.write_text(path.read_text().replace("sync_bn: true", "sync_bn: false", 1))
    one = params.load(folder).identity("sw24", "mini")
    path.write_text(path.read_text().replace("processes: 1", "processes: 2", 1))
    assert params.load(folder).identity("sw24", "mini") != one


def test_passes_of_calibration_are_no_part_of_what_is_trained(folder, known):
    path = folder / "recipes.yaml"
    path.write_text(path.read_text().replace("calibration_passes: 1", "calibration_passes: 2", 1))
    after = params.load(folder)
    assert after.identity("sw24", "mini") == known.identity("sw24", "mini")
    assert after.resolve("sw24", "mini")["recipe"]["calibration_passes"] == 2


@pytest.mark.parametrize(("old", "new", "told"), [
    ("micro_batch: 256", "micro_batch: 300", "must fall into parts of machine.micro_batch (300) images"),
    ("processes: 1 ", "processes: 3 ", "each part into equal shares of machine.processes (3)"),
    ("processes: 1 ", "processes: 256 ", "machine.processes (256), in pairs for mixup"),
])
def test_a_batch_that_does_not_divide_is_told_before_anything_runs(folder, old, new, told):
    path = folder / "profiles/paper.yaml"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(params.ParamsError) as error:
        params.load(folder)
    assert "batch_size 4096 must fall into parts" in str(error.value) or "batch_size 512 must" in str(error.value)
    assert told in str(error.value)


def test_weights_to_start_from_are_given_where_the_row_says_so_and_nowhere_else(known):
    known.check_init("slak_b_384ft", Path("weights.safetensors"))
    known.check_init("sw11", None)
    with pytest.raises(params.ParamsError, match="run slak_b_384ft starts from the weights of slak_b_300; give them: --init"):
        known.check_init("slak_b_384ft", None)
    with pytest.raises(params.ParamsError, match="run sw11 starts from random weights, but w is given; leave --init out"):
        known.check_init("sw11", Path("w"))
