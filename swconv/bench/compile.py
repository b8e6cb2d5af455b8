"""Compile what `bench throughput` compiles beforehand, each network in a process of its own: `python -m swconv bench compile`.

The programs go to a folder, which throughput then finds by the environment variable TORCHINDUCTOR_CACHE_DIR.
"""

import logging
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from swconv.bench import forms, throughput
from swconv.bench.circumstances import check_ready
from swconv.bench.timing import DTYPES, in_precision

log = logging.getLogger(__name__)


def run(out: Path, device: str = "cuda", quick: bool = False) -> None:
    """Fill inductor's cache in a folder. A network that does not compile is told, and left to throughput.

    Raises
    ------
    RuntimeError
        When the device or the compiled operators are missing.
    """
    check_ready(torch.device(device), "compile")
    plan, start = throughput.plan_for(torch.device(device), quick), time.perf_counter()
    jobs = [(number, precision) for number, entry in enumerate(plan.entries) if entry.compiled for precision in plan.compiled]
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(out.resolve()), "TORCHINDUCTOR_COMPILE_THREADS": "1",
                                "OMP_NUM_THREADS": "1"}

    def compile_one(job: tuple[int, str]) -> None:
        code = f"from swconv.bench.compile import compile_network; compile_network({device!r}, {quick!r}, *{job!r})"
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
        name = f"{plan.entries[job[0]].model} in {job[1]}"
        told = done.stderr.strip().rpartition("\n")[2] if done.returncode else f"{time.perf_counter() - start:.0f} s"
        log.info("%s: %s", name, told)

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        list(pool.map(compile_one, jobs))


def compile_network(device: str, quick: bool, number: int, precision: str) -> None:
    """Compile an entry of the plan in a precision, and run it once: call it in a process of its own."""
    where = torch.device(device)
    plan = throughput.plan_for(where, quick)
    entry = plan.entries[number]
    (network,) = forms.whole_network(forms.make_network(where, entry.model, **entry.arguments), entry.form).values()
    shape = (plan.batches[entry.group], 3, plan.image, plan.image)
    with in_precision(precision):
        images = torch.zeros(shape, device=where, dtype=DTYPES[precision]).to(memory_format=torch.channels_last)
        network = network.to(DTYPES[precision]).to(memory_format=torch.channels_last)
        throughput.compiled_turn(network, [(images,)])()
