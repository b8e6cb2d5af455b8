"""The table of the examples says what was wanted and whether it was reached."""

import json
import shutil

import pytest

from swconv import downstream_params, params
from swconv.__main__ import main
from swconv.reporting.downstream_examples import build, equal_seeds


def write(folder, metrics, **run):
    folder.mkdir(parents=True)
    values = {name: {"value": value, "unit": unit} for name, (value, unit) in metrics.items()}
    (folder / "metrics.json").write_text(json.dumps(values))
    (folder / "run.json").write_text(json.dumps({
        "seconds": 90, "code": "c0de", "git_commit": "0123456789", "git_dirty": True, "profile": "overfit",
        "hardware": {"cpu": "a processor"}, "flags": {"threads": 1}, **run}))


def test_a_target_is_reached_missed_or_not_measured(tmp_path):
    write(tmp_path / "finetune/a/seed0", {"steps": (100, "steps")})
    write(tmp_path / "downstream/a/seed0", {"mIoU": (90.0, "%")})
    write(tmp_path / "finetune/b/seed0", {"steps": (7, "steps")})
    write(tmp_path / "downstream/b/seed0", {"AP50_box": (89.99, "%"), "AP50_mask": (95.0, "%")})
    write(tmp_path / "finetune/c/seed0", {"diverged": (3, "step")})
    write(tmp_path / "downstream/c/seed0", {"diverged": (3, "step")})
    out = tmp_path / "table.md"
    rows = [("ade20k", "a", {"mIoU": 90.0}), ("coco", "b", {"AP50_box": 90.0}), ("voc", "c", {"mAP": 90.0})]
    with pytest.raises(ValueError, match=r"got AP50_box of b with 89\.99 for 90, mAP of c with none for 90\. Look at the loss"):
        build(tmp_path, rows, 0, out, "snakemake --cores all table.md")
    lines = [line for line in out.read_text().splitlines() if line.startswith("|")][2:]
    assert lines == [
        "| ade20k | a | mIoU | 90 | 90.00 | % | yes | 100 | 1.5 | c0de | 01234567 + changes |",
        "| coco | b | AP50_box | 90 | 89.99 | % | **no** | 7 | 1.5 | c0de | 01234567 + changes |",
        "| coco | b | AP50_mask |  | 95.00 | % |  | 7 | 1.5 | c0de | 01234567 + changes |",
        "| voc | c | mAP | 90 | none |  | **no** | 3 | 1.5 | c0de | 01234567 + changes |",
    ]
    assert "Profile `overfit`, seed 0" in out.read_text()
    assert out.read_text().endswith("Remake: `snakemake --cores all table.md`.\n")


def test_seeds_are_equal_that_differ_in_nothing_else_and_are_assessed(tmp_path):
    finetuned, assessed = tmp_path / "finetune/a", tmp_path / "downstream/a"
    same = {"config": {"lr": 1}, "code": "c", "data_manifest_sha256": "d"}
    for seed, changes in enumerate([{}, {}, {"code": "older"}, {"config": {"lr": 2}}, {"data_manifest_sha256": "e"}, {}]):
        write(finetuned / f"seed{seed}", {}, **same | changes)
        if seed != 5:                                                     # which is not assessed yet
            write(assessed / f"seed{seed}", {})
    assert equal_seeds(finetuned, assessed, 1) == [1, 0]
    assert equal_seeds(finetuned, assessed, 2) == [2]


def test_the_verb_fails_where_a_target_is_missed_and_only_there(tmp_path, monkeypatch, capsys):
    shutil.copytree("params", tmp_path / "params")
    monkeypatch.chdir(tmp_path)
    known = downstream_params.load(tmp_path / "params", params.load(tmp_path / "params"))
    wanted = {run: known.profile("overfit").targets[task] for task, run in known.examples.items()}
    for run, targets in wanted.items():
        write(tmp_path / f"artifacts/overfit/finetune/{run}/seed0", {"steps": (100, "steps")})
        write(tmp_path / f"artifacts/overfit/downstream/{run}/seed0", {name: (value, "%") for name, value in targets.items()})
    verb = ["downstream-table", "--profile", "overfit", "--seed", "0", "--out", "table.md"]
    assert main(verb) == 0
    missed = tmp_path / f"artifacts/overfit/downstream/{known.examples['nuscenes']}/seed0/metrics.json"
    missed.write_text(json.dumps({"mAP": {"value": 12.5, "unit": "%"}}))
    assert main(verb) == 1
    assert f"got mAP of {known.examples['nuscenes']} with 12.50 for 50." in capsys.readouterr().err
    assert "| 12.50 | % | **no** |" in (tmp_path / "table.md").read_text()
