"""Accuracies of published weights and of runs at the papers' scale: which cells they fill, and what is told of them."""

import json
from pathlib import Path

import pytest

from swconv import params
from swconv.reporting.accuracies import read_accuracies, read_scores, tiny_scores

PAPER = Path("reports/paper")
SHA256 = "ab" * 32


@pytest.fixture(scope="module")
def registry() -> dict[str, dict]:
    return {name: row.model_dump(mode="json") for name, row in params.load().weights.items()}


def measure(root: Path, name: str, row: dict, **top1: float) -> None:
    """As `evaluate_released` writes."""
    folder = root / "artifacts/paper/released" / name
    folder.mkdir(parents=True)
    dataset = {"image_size": row["input"], "crop_pct": row["crop_pct"], "crop_mode": row["crop_mode"]}
    config = {"model": {"name": row["model"], "args": row["args"]}, "dataset": dataset}
    (folder / "run.json").write_text(json.dumps({"config": config, "source_sha256": SHA256}))
    values = {"images": 50_000.0, **top1}
    (folder / "metrics.json").write_text(json.dumps({key: {"value": value, "unit": "%"} for key, value in values.items()}))


def train(root: Path, run: str, *top1: float) -> None:
    """As the rules train and evaluate write, seed by seed."""
    for seed, value in enumerate(top1):
        for stage in ("train", "evaluate"):
            folder = root / "artifacts/paper" / stage / run / f"seed{seed}"
            folder.mkdir(parents=True)
            (folder / "run.json").write_text(json.dumps({"key": f"k{seed}", "seed": seed}))
            (folder / "metrics.json").write_text(json.dumps({"top1": {"value": value, "unit": "%"}}))


def test_nothing_is_measured_until_something_is(registry, tmp_path):
    assert read_accuracies(registry, PAPER, tmp_path / "artifacts") == {}


def test_every_accuracy_that_the_papers_print_of_these_models_has_its_weights(registry, tmp_path):
    for name, row in registry.items():
        measure(tmp_path, name, row, top1=80.0, top1_laid_out=81.0)
    found = read_accuracies(registry, PAPER, tmp_path / "artifacts")
    filled = {table: sorted(row for where, row, _ in found if where == table) for table, *_ in found}
    assert filled["sw_table7"] == list(range(10))
    for table, plan in params.load().costs.items():
        if table in ("table3", "slak/table3", "slak/table7"):
            assert len(filled[Path(plan.claims).stem]) == len(plan.rows)
    assert found["sw_table1", 0, "in1k_top1_acc_pct_300ep"].top1 == 80
    assert found["sw_table1", 1, "in1k_top1_acc_pct_300ep"].top1 == 81
    assert ("sw_table1", 2, "in1k_top1_acc_pct_300ep") not in found


def test_published_weights_tell_their_file_and_a_run_its_seeds(registry, tmp_path):
    train(tmp_path, "sw24_300", 83.0, 83.2)
    place = ("sw_table3", 0, "top1_acc_pct")
    run = read_accuracies(registry, PAPER, tmp_path / "artifacts")[place]
    assert run.top1 == pytest.approx(83.1)
    assert run.told == ("run sw24_300 of profile paper, 83.10 (n = 2, sd 0.14), "
                        "`artifacts/paper/evaluate/sw24_300/seed*/metrics.json`")
    measure(tmp_path, "sw_tiny_300", registry["sw_tiny_300"], top1=83.39)
    both = read_accuracies(registry, PAPER, tmp_path / "artifacts")[place]
    assert both.top1 == 83.39
    assert both.told == (f"published weights sw_tiny_300 ({registry['sw_tiny_300']['source']}; sha256 {SHA256}), 50000 images, "
                         f"`artifacts/paper/released/sw_tiny_300/run.json`; {run.told}")


def test_what_was_measured_with_another_row_is_left_out_and_said(registry, tmp_path, caplog):
    measure(tmp_path, "sw_tiny_300", registry["sw_tiny_300"] | {"input": 256}, top1=83.39)
    assert read_accuracies(registry, PAPER, tmp_path / "artifacts") == {}
    assert "was measured with another row of params/weights.yaml" in caplog.text


@pytest.mark.parametrize(("fill", "sentence"), [
    ({"table": "sw_table33", "of": {}}, "there is no reports/paper/sw_table33.csv"),
    ({"table": "sw_table3", "of": {"method": "SW-huge"}}, "1 columns and 0 rows"),
    ({"table": "sw_table1", "of": {"id": "#0"}}, "2 columns and 1 rows"),
    ({"table": "sw_table3", "of": {"method": "SW-tiny"}, "column": "top5"}, "0 columns and 1 rows"),
])
def test_a_cell_that_is_not_there_is_told(registry, tmp_path, fill, sentence):
    row = registry["sw_tiny_300"] | {"fills": [{"column": None, "laid_out": False, **fill}]}
    with pytest.raises(ValueError, match=sentence):
        read_accuracies({"sw_tiny_300": row}, PAPER, tmp_path / "artifacts")


def tune(root: Path, profile: str, run: str, seed: int, **measures: float) -> None:
    """As the rule that assesses a fine-tune writes."""
    folder = root / "artifacts" / profile / "downstream" / run / f"seed{seed}"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps({key: {"value": value, "unit": "%"} for key, value in measures.items()}))


def test_fine_tunes_fill_every_row_that_names_them_and_tiny_ones_none(tmp_path):
    table = params.load().costs["table4"].plain()
    assert read_scores(table, PAPER, tmp_path / "artifacts") == {}
    for seed, value in enumerate((51.0, 51.4)):
        tune(tmp_path, "paper", "coco_36ep_slak_t", seed, AP_box=value, AP_mask=44.0, AP50_box=70.0)
    tune(tmp_path, "overfit", "coco_36ep_sw_tiny", 0, AP_box=95.0, AP_mask=93.0)
    tune(tmp_path, "mini", "coco_36ep_sw_tiny", 0, diverged=12.0)
    found = read_scores(table, PAPER, tmp_path / "artifacts")
    assert sorted(found) == [("sw_table4", row, column) for row in (4, 9) for column in ("AP_box", "AP_mask")]
    assert found["sw_table4", 4, "AP_box"].top1 == pytest.approx(51.2)
    assert found["sw_table4", 4, "AP_box"].told == ("run coco_36ep_slak_t of profile paper, 51.20 (n = 2, sd 0.28), "
                                                    "`artifacts/paper/downstream/coco_36ep_slak_t/seed*/metrics.json`")
    assert tiny_scores(table, ("paper", "mini", "smoke", "overfit"), tmp_path / "artifacts") == [
        ("coco_36ep_sw_tiny", "overfit", {"AP_box": "95.00 (n = 1)", "AP_mask": "93.00 (n = 1)"})]
