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
        checkpoint.save(tmp_path, epoch, 0, {"lines": []})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch0003.pt", "epoch0010.pt"]


def test_a_step_is_newer_than_the_epoch_before_it_and_older_than_the_epoch_behind_it(tmp_path):
    for epoch, step, newest in ((2, 0, "epoch0002.pt"), (2, 9, "epoch0002_step000009.pt"), (2, 10, "epoch0002_step000010.pt"),
                                (3, 0, "epoch0003.pt")):
        checkpoint.save(tmp_path, epoch, step, {})
        assert checkpoint.newest(tmp_path).name == newest


def test_damaged_newest_falls_back_to_the_one_before_and_says_so(tmp_path, caplog):
    for epoch in (1, 2):
        checkpoint.save(tmp_path, epoch, 0, {"weight": torch.full((2,), float(epoch))})
    newest = tmp_path / "epoch0002.pt"
    newest.write_bytes(newest.read_bytes()[:-5])
    with caplog.at_level(logging.WARNING):
        sound = checkpoint.newest(tmp_path)
    assert sound.name == "epoch0001.pt"
    assert checkpoint.load(sound)["weight"].tolist() == [1, 1]
    assert "epoch0002.pt is damaged" in caplog.text


def test_a_damaged_one_is_set_aside_and_not_one_of_the_two_that_are_kept(tmp_path):
    for epoch in (1, 2, 3):
        if epoch == 3:
            (tmp_path / "epoch0002.pt").write_bytes(b"x" * 99)
            checkpoint.newest(tmp_path)
        checkpoint.save(tmp_path, epoch, 0, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch0001.pt", "epoch0002.pt.damaged", "epoch0003.pt"]
    (tmp_path / "epoch0003.pt").write_bytes(b"x" * 99)
    assert checkpoint.newest(tmp_path).name == "epoch0001.pt"


def test_nothing_saved_is_none(tmp_path):
    assert checkpoint.newest(tmp_path) is None


def test_one_that_was_damaged_after_it_was_found_is_refused(tmp_path):
    checkpoint.save(tmp_path, 1, 0, {})
    path = checkpoint.newest(tmp_path)
    path.write_bytes(b"x" + path.read_bytes()[1:])
    with pytest.raises(ValueError, match="epoch0001.pt is damaged"):
        checkpoint.load(path)


def test_all_three_generators_continue_where_they_were(tmp_path):
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    np.random.randn()                                                 # leaves half a pair of normals in the state
    checkpoint.save(tmp_path, 1, 0, {"generators": checkpoint.generators()})
    draws = [random.random(), np.random.randn(), torch.rand(()).item()]
    checkpoint.restore_generators(checkpoint.load(checkpoint.newest(tmp_path))["generators"])
    assert [random.random(), np.random.randn(), torch.rand(()).item()] == draws


def test_a_full_disk_leaves_the_old_checkpoint_and_no_part(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, 0, {})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("swconv.atomic.os.fsync", full)
    with pytest.raises(OSError, match="No space left on device. Make room"):
        checkpoint.save(tmp_path, 2, 0, {})
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["epoch0001.pt"]
    assert checkpoint.newest(tmp_path).name == "epoch0001.pt"


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
