"""Checkpoints: whole, checked, two kept, one trainer at a time."""

import logging
import multiprocessing
import random
import time

import numpy as np
import pytest
import torch

from swconv.training import checkpoint


def test_two_newest_are_kept(tmp_path):
    for epoch in (1, 2, 3, 10):
        checkpoint.save(tmp_path, epoch, {"lines": []})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch0003.pt", "epoch0010.pt"]


def test_damaged_newest_falls_back_to_the_one_before_and_says_so(tmp_path, caplog):
    for epoch in (1, 2):
        checkpoint.save(tmp_path, epoch, {"weight": torch.full((2,), float(epoch))})
    newest = tmp_path / "epoch0002.pt"
    newest.write_bytes(newest.read_bytes()[:-5])
    with caplog.at_level(logging.WARNING):
        state = checkpoint.load(tmp_path)
    assert state["epoch"] == 1
    assert state["weight"].tolist() == [1, 1]
    assert "epoch0002.pt is damaged" in caplog.text


def test_nothing_saved_is_none(tmp_path):
    assert checkpoint.load(tmp_path) is None


def test_all_three_generators_continue_where_they_were(tmp_path):
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    np.random.randn()                                                 # leaves half a pair of normals in the state
    checkpoint.save(tmp_path, 1, {})
    draws = [random.random(), np.random.randn(), torch.rand(()).item()]
    checkpoint.load(tmp_path)
    assert [random.random(), np.random.randn(), torch.rand(()).item()] == draws


def test_a_full_disk_leaves_the_old_checkpoint_and_no_part(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, {})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("swconv.atomic.os.fsync", full)
    with pytest.raises(OSError, match="No space left on device. Make room"):
        checkpoint.save(tmp_path, 2, {})
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["epoch0001.pt"]
    assert checkpoint.load(tmp_path)["epoch"] == 1


def _hold(folder, ready, seconds):
    with checkpoint.exclusive(folder):
        ready.set()
        time.sleep(seconds)


def test_a_second_trainer_waits_for_the_first(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    other = context.Process(target=_hold, args=(tmp_path, ready, 0.5))
    other.start()
    assert ready.wait(60)
    start = time.monotonic()
    with checkpoint.exclusive(tmp_path):
        waited = time.monotonic() - start
    other.join()
    assert waited > 0.2
