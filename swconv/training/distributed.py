"""Several processes that train one model: who they are, how they start, what they tell each other.

`launch` starts them on this machine; torchrun may do it instead, on many: both say who a process is in its environment.
"""

import fcntl
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from swconv.training import stop

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
PATIENCE = timedelta(days=7)                                          # with one that waits for a lock, or verifies files
GRACE = 10.0                                                          # seconds for the others once a process ended badly
_RENDEZVOUS = "SWCONV_RENDEZVOUS"                                     # where those that `launch` started meet
_PROGRAM = [sys.executable, "-m", "swconv"]
_LEASES: dict[str, int] = {}                                          # this process's GPUs: files that it holds locked


def rank() -> int:
    """Number of this process, 0 where it is the only one."""
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    """Its number on this machine: which GPU is its own."""
    return int(os.environ.get("LOCAL_RANK", 0))


def world() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def started() -> bool:
    """Whether `launch`, or torchrun, started this process."""
    return "RANK" in os.environ


def visible_gpus() -> list[str]:
    """GPUs that this process may use, by number or as CUDA_VISIBLE_DEVICES names them."""
    named, there = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count()
    return named.split(",")[:there] if named else [str(number) for number in range(there)]


def own_gpus(count: int) -> list[int]:
    """Places in `visible_gpus` of so many on which no other job of this user computes; the first ones, if too few are free.

    They are kept until this process ends, however it ends.
    """
    folder, names = Path(tempfile.gettempdir(), f"swconv-gpus-{os.getuid()}"), visible_gpus()
    folder.mkdir(exist_ok=True)
    order = sorted(range(len(names)), key=lambda place: names[place] not in _LEASES)
    places = sorted(islice((place for place in order if _lease(folder, names[place])), count))
    return places if len(places) == count else list(range(count))


def _lease(folder: Path, name: str) -> bool:
    if name not in _LEASES:
        file = os.open(folder / name, os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            return False
        _LEASES[name] = file
    return True


@contextmanager
def group(device: str) -> Iterator[None]:
    """Be one of the processes: gloo for tensors on the CPU, nccl for CUDA's. Nothing happens where there is only one."""
    if world() == 1:
        yield
        return
    where = os.environ.get(_RENDEZVOUS, "env://")
    dist.init_process_group(BACKENDS[device], init_method=where, rank=rank(), world_size=world(), timeout=PATIENCE)
    with warnings.catch_warnings():
        # Told of kernels with one input channel, whose strides mean the same both ways.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        try:
            yield
        finally:
            dist.destroy_process_group()


def summed(values: Sequence[float | torch.Tensor], device: torch.device) -> list[float]:
    """Each number summed over the processes, in float64, the same bits in each; the device is waited for once."""
    if world() == 1:
        return [float(value) for value in values]
    row = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in values])
    dist.all_reduce(row)
    return row.tolist()


def gathered(content: Any) -> list[Any] | None:
    """Every process's content in process 0, by rank; None in the others."""
    if world() == 1:
        return [content]
    found = [None] * world() if rank() == 0 else None
    dist.gather_object(content, found)
    return found


def broadcast(content: Any) -> Any:
    """Process 0's content, in every process."""
    if world() == 1:
        return content
    box = [content]
    dist.broadcast_object_list(box)
    return box[0]


def share(tensors: Iterable[torch.Tensor]) -> None:
    """Write process 0's values into the tensors of every process, which lists them in the same order."""
    if world() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def barrier() -> None:
    """Wait for all processes."""
    if world() > 1:
        dist.barrier()


def launch(arguments: Sequence[str], processes: int, asked: Callable[[], bool]) -> int:
    """Run `python -m swconv ARGUMENTS` in so many processes on this machine, and pass on to all of them that one asked to stop.

    When one fails, the others are given `GRACE` seconds and ended. Process 0 speaks for all; what another one said is
    repeated where it was the first to fail.

    Returns
    -------
    int
        Exit code: 0, that of the first process that failed, or `stop.EXIT_CODE` where they stopped as asked.

    Notes
    -----
    They meet in a file, so no port can be taken, and end with their parent's word only: one that is killed leaves them to
    finish, as Snakemake's drivers do.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="swconv-")))
        said = [None, *(stack.enter_context((folder / str(number)).open("w+")) for number in range(1, processes))]
        where = {"WORLD_SIZE": str(processes), _RENDEZVOUS: f"file://{folder}/rendezvous"}
        if processes <= len(gpus := visible_gpus()):
            where["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[place] for place in own_gpus(processes))
        workers: list[subprocess.Popen] = []
        stack.callback(_end, workers)
        for number in range(processes):
            environment = os.environ | where | {"RANK": str(number), "LOCAL_RANK": str(number)}
            workers.append(subprocess.Popen([*_PROGRAM, *arguments], env=environment, stderr=said[number]))
        told, first, deadline = False, None, float("inf")
        while any(worker.poll() is None for worker in workers) and time.monotonic() < deadline:
            if asked() and not told:
                told = True
                for worker in workers:
                    worker.send_signal(stop.SIGNALS[0])
            if first is None and (ended := [number for number, worker in enumerate(workers) if worker.poll()]):
                first, deadline = ended[-1], time.monotonic() + GRACE
            time.sleep(0.05)
        _end(workers)
        codes = [worker.returncode for worker in workers]
        if not any(codes):
            return 0
        if all(code == stop.EXIT_CODE or code < 0 and asked() for code in codes):
            return stop.EXIT_CODE
        first = next(number for number, code in enumerate(codes) if code) if first is None else first
        if first:
            said[first].seek(0)
            sys.stderr.write(f"process {first} of {processes} ended with exit code {codes[first]}: {said[first].read()}\n")
        return max(1, codes[first])


def _end(workers: list[subprocess.Popen]) -> None:
    for worker in workers:
        with suppress(ProcessLookupError):
            worker.kill()
        worker.wait()
