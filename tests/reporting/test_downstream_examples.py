"""The table of the examples says what was wanted and whether it was reached."""

import json

from swconv.reporting.downstream_examples import build


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
    build(tmp_path, [("ade20k", "a", {"mIoU": 90.0}), ("coco", "b", {"AP50_box": 90.0}), ("voc", "c", {"mAP": 90.0})], 0, out)
    lines = [line for line in out.read_text().splitlines() if line.startswith("|")][2:]
    assert lines == [
        "| ade20k | a | mIoU | 90 | 90.00 | % | yes | 100 | 1.5 | c0de | 01234567 + changes |",
        "| coco | b | AP50_box | 90 | 89.99 | % | **no** | 7 | 1.5 | c0de | 01234567 + changes |",
        "| coco | b | AP50_mask |  | 95.00 | % |  | 7 | 1.5 | c0de | 01234567 + changes |",
        "| voc | c | mAP | 90 | none |  | **no** | 3 | 1.5 | c0de | 01234567 + changes |",
    ]
    assert "Profile `overfit`, seed 0" in out.read_text()
