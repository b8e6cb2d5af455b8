import json

import pytest

from swconv.reporting.runs import Evidence


def _write(folder, metrics=None, record=None):
    folder.mkdir(parents=True, exist_ok=True)
    if metrics is not None:
        (folder / "metrics.json").write_text(json.dumps(metrics))
    if record is not None:
        (folder / "run.json").write_text(json.dumps(record))


def _folder(root, stage, seed, run="sw11"):
    return root / "artifacts" / "mini" / stage / run / f"seed{seed}"


def _read(root, seeds=(0,)):
    return Evidence("mini", seeds, root / "artifacts").read("sw11")


def test_a_finished_seed_carries_the_circumstances_of_its_training(tmp_path):
    training = {
        "key": "trained",
        "git_commit": "c0ffee",
        "git_dirty": True,
        "data_manifest_sha256": "d1",
        "hardware": {"cpu": "EPYC", "cores": 2},
        "flags": {"threads": 1},
        "versions": {"torch": "2.11.0"},
    }
    _write(_folder(tmp_path, "train", 0), record=training)
    (_folder(tmp_path, "train", 0) / "weights.safetensors.sha256").write_text("ab12  weights.safetensors\n")
    _write(_folder(tmp_path, "evaluate", 0), {"top1": {"value": 89.0, "unit": "%"}}, {"key": "evaluated"})
    (run,) = _read(tmp_path).finished
    assert run.path == "artifacts/mini/evaluate/sw11/seed0/metrics.json"
    assert run.values == {"top1": 89.0}
    assert run.circumstances == {
        "key": "trained",
        "evaluate_key": "evaluated",
        "seed": 0,
        "git_commit": "c0ffee",
        "git_dirty": True,
        "weights_sha256": "ab12",
        "data_manifest_sha256": "d1",
        "lock_sha256": None,
        "library_sha256": None,
        "machine": {"cpu": "EPYC", "cores": 2, "threads": 1},
        "torch": "2.11.0",
        "command": "snakemake --cores all --forcerun train -- artifacts/mini/evaluate/sw11/seed0/metrics.json",
    }


def test_only_the_named_seeds_are_read(tmp_path):
    for seed in (0, 1):
        _write(_folder(tmp_path, "evaluate", seed), {"top1": {"value": 80.0 + seed, "unit": "%"}}, {"key": "k"})
    assert _read(tmp_path, (1,)).values("top1") == [81.0]
    assert _read(tmp_path, (0, 1, 2)).missing == (2,)


def test_seeds_on_disk_are_those_that_any_of_the_runs_was_evaluated_with(tmp_path):
    metrics = {"top1": {"value": 80.0, "unit": "%"}}
    for run, seed in (("sw11", 2), ("sw03", 10), ("sw24", 5)):
        _write(_folder(tmp_path, "evaluate", seed, run), metrics, {"key": "k"})
    _write(_folder(tmp_path, "train", 3), metrics, {"key": "k"})
    _write(_folder(tmp_path, "evaluate", 4), record={"key": "k"})
    found = Evidence.on_disk("mini", ["sw03", "sw11"], tmp_path / "artifacts")
    assert found.seeds == (2, 10)
    assert Evidence.on_disk("paper", ["sw03"], tmp_path / "artifacts").seeds == ()


def test_metrics_without_circumstances_count_as_not_run(tmp_path, caplog):
    _write(_folder(tmp_path, "evaluate", 0), {"top1": {"value": 89.0, "unit": "%"}})
    assert _read(tmp_path).missing == (0,)
    assert "has no run.json" in caplog.text


@pytest.mark.parametrize("entry", [{"value": float("nan"), "unit": "%"}, {"unit": "%"}, {"value": "89"}, 89.0])
def test_a_value_that_is_no_finite_number_is_refused(tmp_path, entry):
    _write(_folder(tmp_path, "evaluate", 0), {"top1": entry}, {"key": "k"})
    with pytest.raises(ValueError, match=r"seed0/metrics.json: top1 needs a finite number"):
        _read(tmp_path)


def test_a_file_cut_short_is_refused(tmp_path):
    _write(_folder(tmp_path, "evaluate", 0), record={"key": "k"})
    (_folder(tmp_path, "evaluate", 0) / "metrics.json").write_text('{"top1": {"val')
    with pytest.raises(ValueError, match="needs to be JSON"):
        _read(tmp_path)
