"""The verb `bench data`: from photographs to both files."""

import json

import pytest
import torch
from PIL import Image

from swconv.__main__ import main
from swconv.bench import data


def test_a_quick_run_writes_json_and_the_page_made_of_it(tmp_path):
    threads = torch.get_num_threads()
    assert main(["bench", "data", "--quick", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "data-cpu-quick.json").read_text())
    assert (tmp_path / "data-cpu-quick.md").read_text() == data.render(found)
    assert {(row["source"], row["workers"]) for row in found["loaders"]} == {
        (source, workers) for source in data.SOURCES for workers in (0, 1)}
    assert all(0 < row["least"] <= row["images_per_second"] <= row["most"] for row in found["loaders"])
    assert all(row["per_core"] == row["images_per_second"] / max(1, row["workers"]) for row in found["loaders"])
    assert found["parts"].keys() == data.PARTS.keys()
    assert torch.get_num_threads() == threads


def test_photographs_are_the_same_jpegs_every_time(tmp_path):
    first, second = (data.make_photographs(tmp_path / name, 4, (80, 60)) for name in ("a", "b"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert len({path.read_bytes() for path in first}) == 4
    for path in first:
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (80, 60))


def test_the_per_core_rate_of_the_page_is_by_workers():
    shown = {"quick": False, "git_dirty": None, "git_commit": None, "started": "now", "seconds": 1.0, "load_before": 0.0,
             "versions": {}, "file_bytes": 1e5, "hardware": {"cores": 2, "cpu": "a CPU"}, "plan": vars(data.plan_for(False)),
             "parts": {part: {"median_ms": 4.0, "least_ms": 3.0, "most_ms": 5.0} for part in data.PARTS},
             "loaders": [{"source": "files", "workers": 2, "images_per_second": 300.0, "least": 290.0, "most": 310.0,
                          "per_core": 150.0}]}
    page = data.render(shown)
    assert "| JPEG files | 2 | 300 (290-310) | 150 |" in page
    assert "| decode the JPEG | 4.00 (3.00-5.00) | 250 |" in page


@pytest.mark.parametrize("device", ["cuda"])
def test_another_device_is_refused(tmp_path, capsys, device):
    assert main(["bench", "data", "--device", device, "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        "swconv bench: bench data measures how the CPU loads images, got --device cuda. Leave --device out.\n")
