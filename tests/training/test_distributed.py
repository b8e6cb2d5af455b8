"""Two gloo processes: the weights of one process with twice the batch, bit for bit after a stop or a kill, and one command."""

import fcntl
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import multiprocessing

from swconv import params
from swconv.training import distributed, loop, manifest, optim, record
from swconv.training.stop import StoppedError

RUN, STEPS = "sw22", 10


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    manifest.prepare(params.load().profiles["smoke"].dataset.model_dump(exclude_none=True), folder)
    return folder


def configuration(micro_batch: int | None = None, recompute: bool = False) -> dict:
    """No mask, drop path, mixup or augmentation: nothing that knows how many processes there are."""
    config = params.load().resolve(RUN, "smoke")
    config["recipe"] |= {"epochs": 3, "evaluate_every": 1, "sparsity": None}
    config["machine"] |= {"micro_batch": micro_batch, "recompute": recompute}
    return config


def circumstances(config: dict) -> dict:
    return record.circumstances(key="k", run=RUN, profile="smoke", seed=0, code="c", config=config, data_sha256="d")


def trained(kind: str, micro_batch: int | None, digits: Path, recompute: bool = False) -> tuple[dict, list[float]]:
    """Weights and losses of ten steps in float64."""
    build = loop.build
    loop.build = lambda config: build(config).double()
    try:
        config = configuration(micro_batch, recompute)
        training = loop.Training(config, digits, seed=0)
        normalise = training.normalise
        training.normalise = lambda images: normalise(images).double()
        if kind == "sgd":
            training.optimizer = torch.optim.SGD(training.model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
            training.schedule = optim.schedule(training.optimizer, config["recipe"], training.steps)
        losses = []
        while len(losses) < STEPS:
            batches = training.loader.epoch(training.done + 1)
            for _ in range(training.steps):
                losses += training.step(len(losses), [next(batches) for _ in range(training.loader.parts)])
            training.done += 1
        training.leave_group()
        return training.model.state_dict(), losses[:STEPS]
    finally:
        loop.build = build


def begun(digits: Path) -> dict:
    """What a process draws first, and its norms' statistics, which are its own, before and after it looks for bad numbers."""
    config = configuration()
    config["recipe"] |= {"sparsity": params.load().resolve(RUN, "smoke")["recipe"]["sparsity"], "ema_decay": 0.5}
    config["machine"] |= {"sync_bn": False}
    training = loop.Training(config, digits, seed=0)
    training.start(None, {})
    found = {"draws": (random.random(), np.random.rand(), torch.rand(()).item()),
             "masks": training.sparsity.state_dict()["masks"],
             "patience": torch.distributed.group.WORLD._get_backend(torch.device("cpu")).options._timeout.days}
    for _ in training.epoch("", 0, lambda: [False]):
        pass
    kept = [("model", training.model), ("average", training.judged)]
    for when in ("own", "shared"):
        found[when] = {f"{name}.{key}": tensor.clone() for name, network in kept for key, tensor in network.named_buffers()}
        training.check_finite()
    training.leave_group()
    return found


CASES = [*((kind, micro_batch, False) for kind in ("sgd", "adamw") for micro_batch in (None, 16)), ("sgd", 16, True)]


def _process(rank: int, digits: Path, folder: Path) -> None:
    warnings.simplefilter("error")
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                   "SWCONV_RENDEZVOUS": f"file://{folder}/rendezvous"}
    with loop.distributed.group("cpu"):
        for kind, micro_batch, recompute in CASES:
            found = trained(kind, micro_batch, digits, recompute)
            torch.save(found, folder / f"{kind}-{micro_batch}-{recompute}-{rank}.pt")
        torch.save(begun(digits), folder / f"begun-{rank}.pt")
    os.environ["SWCONV_RENDEZVOUS"] += "-again"
    looks = iter(range(100))
    config = configuration()
    try:
        loop.train(config, digits, folder / "out", folder / "checkpoints", circumstances(config),
                   asked=lambda: next(looks) == 5)
    except StoppedError:
        (folder / f"stopped{rank}").touch()


@pytest.fixture(scope="module")
def processes(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gloo")
    multiprocessing.spawn(_process, args=(digits, folder), nprocs=2)
    return folder


@pytest.mark.parametrize(("kind", "micro_batch", "recompute"), CASES)
def test_two_processes_train_to_the_weights_of_one_with_twice_the_batch(processes, digits, kind, micro_batch, recompute):
    alone, losses = trained(kind, micro_batch, digits)
    (first, their_losses), (second, _) = (
        torch.load(processes / f"{kind}-{micro_batch}-{recompute}-{rank}.pt") for rank in range(2))
    tolerance = {"sgd": 1e-12, "adamw": 1e-8}[kind]
    start = loop.build(configuration()).state_dict()
    for name, tensor in alone.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], tensor, atol=tolerance, rtol=0)
    assert (alone["head.weight"] - start["head.weight"]).abs().max() > 1e-3
    assert their_losses == pytest.approx(losses, abs=1e-8)


@pytest.fixture(scope="module")
def beginnings(processes):
    return [torch.load(processes / f"begun-{rank}.pt") for rank in range(2)]


def test_processes_that_begin_draw_other_numbers_each_and_have_the_same_masks(beginnings):
    first, second = beginnings
    assert not set(first["draws"]) & set(second["draws"])
    assert first["masks"]
    assert all(torch.equal(mask, second["masks"][name]) for name, mask in first["masks"].items())


def test_one_process_that_begins_draws_on_where_the_building_of_its_network_left_off(digits):
    config = configuration()
    training = loop.Training(config, digits, seed=0)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    training.start(None, {})
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_norms_of_each_process_become_those_of_the_first_before_they_are_judged(beginnings):
    first, second = beginnings
    for kind in ("model", "average"):
        names = [name for name in first["own"] if name.startswith(kind) and name.endswith("running_mean")]
        assert any(not torch.equal(first["own"][name], second["own"][name]) for name in names)
    for name, tensor in first["own"].items():
        assert torch.equal(tensor, first["shared"][name]), name
        assert torch.equal(tensor, second["shared"][name]), name


def test_processes_wait_for_days_for_one_that_waits_for_a_lock(beginnings):
    assert [each["patience"] for each in beginnings] == [7, 7]


def test_one_process_takes_up_what_two_began_and_sees_the_same_batches(processes, digits, tmp_path, caplog):
    assert (processes / "stopped0").exists()
    assert (processes / "stopped1").exists()
    shutil.copytree(processes / "checkpoints", tmp_path / "checkpoints")
    config = configuration()
    loop.train(config, digits, tmp_path / "out", tmp_path / "checkpoints", circumstances(config))
    loop.train(config, digits, tmp_path / "alone/out", tmp_path / "alone/checkpoints", circumstances(config))
    assert "was written by 2 processes, and 1 go on: the order of the images stays" in caplog.text
    told = json.loads((tmp_path / "out/run.json").read_text())
    assert told["resumed_from_step"] == 6
    assert [place["processes"] for place in told["environments"]] == [2, 1]
    lines = [[json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
             for out in (tmp_path / "out", tmp_path / "alone/out")]
    for line, other in zip(*lines, strict=True):
        assert line["train_loss"] == pytest.approx(other["train_loss"], abs=1e-3)
        assert line["val_loss"] == pytest.approx(other["val_loss"], abs=1e-2)


# --- the verb, which starts the processes


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """An empty folder with params/, two processes in its profile, and data."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree("params", folder / "params")
    mini = folder / "params/profiles/mini.yaml"
    mini.write_text(re.sub(r"(?m)^  processes: 1", "  processes: 2", mini.read_text()))
    smoke = folder / "params/profiles/smoke.yaml"
    smoke.write_text(re.sub(r"epochs: 2,", "epochs: 10, ema_decay: 0.9, drop_path_rate: 0.2,", smoke.read_text(), count=1))
    assert verb(folder, "data", "--profile", "smoke", "--out", "data").wait() == 0
    return folder


def verb(folder: Path, *arguments: str) -> subprocess.Popen:
    with (folder / "told").open("w") as told:
        return subprocess.Popen([sys.executable, "-m", "swconv", *arguments], cwd=folder, stderr=told,
                                env=os.environ | {"PYTHONPATH": str(Path.cwd())}, start_new_session=True)


def ended(process: subprocess.Popen, folder: Path, code: int) -> str:
    """What a verb said until it ended with this exit code."""
    found, told = process.wait(timeout=300), (folder / "told").read_text()
    assert found == code, told
    return told


def training(folder: Path, out: str) -> subprocess.Popen:
    return verb(folder, "train", "sw15", "--profile", "smoke", "--seed", "0", "--data", "data", "--out", out)


def wait_for_epoch(process: subprocess.Popen, folder: Path, epoch: int) -> None:
    deadline = time.monotonic() + 240
    while not [path for path in folder.glob("checkpoints/*/epoch*.pt") if int(path.name[5:9]) >= epoch]:
        assert process.poll() is None, (folder / "told").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def three_gpus(tmp_path, monkeypatch):
    """A machine with three, by name; gives what another job does that takes one."""
    monkeypatch.setattr(distributed, "visible_gpus", lambda: ["a", "b", "c"])
    monkeypatch.setattr(distributed, "_LEASES", {})
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with ExitStack() as stack:
        def take(name: str) -> None:
            folder = tmp_path / f"swconv-gpus-{os.getuid()}"
            folder.mkdir(exist_ok=True)
            fcntl.flock(stack.enter_context((folder / name).open("w")), fcntl.LOCK_EX)
        yield take
    for file in distributed._LEASES.values():
        os.close(file)


def test_a_job_takes_gpus_that_no_other_one_has_and_keeps_them(three_gpus):
    three_gpus("a")
    assert distributed.own_gpus(1) == [1]
    assert distributed.own_gpus(1) == [1]
    assert distributed.own_gpus(2) == [1, 2]


def test_a_gpu_is_free_again_when_its_job_is_killed(three_gpus):
    hold = ("import time; from swconv.training import distributed as d; d.visible_gpus = lambda: ['a', 'b', 'c']; "
            "print(d.own_gpus(2), flush=True); time.sleep(99)")
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True,
                          env=os.environ | {"TMPDIR": tempfile.gettempdir()}) as job:
        assert job.stdout.readline() == "[0, 1]\n"
        assert distributed.own_gpus(1) == [2]
        job.kill()
    assert distributed.own_gpus(3) == [0, 1, 2]


def test_where_too_few_gpus_are_free_the_first_are_shared(three_gpus):
    three_gpus("b")
    assert distributed.own_gpus(3) == [0, 1, 2]


def test_processes_that_train_together_see_the_gpus_that_are_free(three_gpus, monkeypatch, tmp_path):
    three_gpus("b")
    tell = "import os; open(os.environ['RANK'], 'w').write(os.environ['CUDA_VISIBLE_DEVICES'])"
    monkeypatch.setattr(distributed, "_PROGRAM", [sys.executable, "-c", tell])
    monkeypatch.chdir(tmp_path)
    assert distributed.launch([], 2, lambda: False) == 0
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["a,c", "a,c"]


@pytest.mark.slow
def test_one_command_trains_in_two_processes_and_stops_and_kills_change_no_bit(project):
    assert ended(training(project, "straight"), project, 0).count("epoch  10/10") == 1
    (checkpoints,) = project.glob("checkpoints/*")
    shutil.rmtree(checkpoints)

    cut = training(project, "cut")
    wait_for_epoch(cut, project, 2)
    cut.send_signal(signal.SIGUSR1)
    assert "stopped as asked after step" in ended(cut, project, 85)
    assert not (project / "cut").exists()

    cut = training(project, "cut")
    wait_for_epoch(cut, project, 5)
    os.killpg(cut.pid, signal.SIGKILL)
    cut.wait()
    assert not (project / "cut").exists()

    ended(training(project, "cut"), project, 0)
    for name in ("weights.safetensors", "metrics.json"):
        assert (project / "cut" / name).read_bytes() == (project / "straight" / name).read_bytes()
    result = json.loads((project / "cut/run.json").read_text())
    assert result["resumed_from_epoch"] >= 5
    assert result["environments"][0]["processes"] == 2
    assert load_file(project / "cut/weights.safetensors")


def test_a_process_that_dies_ends_the_others_and_the_command_says_which(project):
    shutil.rmtree(project / "checkpoints", ignore_errors=True)
    process = training(project, "dead")
    wait_for_epoch(process, project, 1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (second,) = [child for child in children if b"RANK=1\0" in Path(f"/proc/{child}/environ").read_bytes()]
    os.kill(int(second), signal.SIGKILL)
    assert "process 1 of 2 ended with exit code -9" in ended(process, project, 1)
    assert not [child for child in children if Path(f"/proc/{child}").exists()]
