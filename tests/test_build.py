import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from swconv import build

ROOT = Path(__file__).parents[1]
SOURCES = ("csrc", "setup.py", "pyproject.toml")


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """The tree's own library, built if need be."""
    out = tmp_path_factory.mktemp("build") / "build.json"
    build.build(out)
    return json.loads(out.read_text())


@pytest.fixture
def clone(tmp_path):
    """The files that a build reads, alone in a folder."""
    for name in SOURCES:
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    (tmp_path / "README.md").touch()
    (tmp_path / "swconv").mkdir()
    for name in ("__init__.py", "build.py"):
        shutil.copy(ROOT / "swconv" / name, tmp_path / "swconv" / name)
    return tmp_path


def run(clone, out="build.json", **environment):
    code = f"import pathlib, swconv.build; swconv.build.build(pathlib.Path({out!r}))"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=clone, env=os.environ | {"SWCONV_CUDA": "0"} | environment,
        capture_output=True, text=True,
    )


def test_the_record_describes_the_library_that_lies_there(record):
    library = ROOT / record["library"]["path"]
    assert library.stat().st_size == record["library"]["bytes"]
    assert re.fullmatch("[0-9a-f]{64}", record["library"]["sha256"])
    assert record["compiler"]["version"]
    assert record["torch"].split(".")[0] == "2"


def test_a_second_build_compiles_nothing_and_keeps_the_library(record, tmp_path):
    library = ROOT / record["library"]["path"]
    before = library.stat().st_mtime_ns
    build.build(tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == record
    assert library.stat().st_mtime_ns == before


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_cuda_kernels_stay_within_their_budget(record):
    assert record["without_cuda_because"] is None
    budget = json.loads((ROOT / "csrc/ptxas_budget.json").read_text())
    built = {(k["kernel"], k["architecture"]): k for k in record["kernels"]}
    assert set(built) == {(kernel, architecture) for kernel in budget for architecture in ("sm_80", "sm_89", "sm_90")}
    over = [k for (kernel, _), k in built.items() if any(k[figure] > most for figure, most in budget[kernel].items())]
    assert over == []


def test_ptxas_figures_are_read_from_what_nvcc_prints():
    log = """\
ptxas info    : Compiling entry function 'plain' for 'sm_90'
ptxas info    : Function properties for plain
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 1024 bytes smem, 432 bytes cmem[0]
ptxas info    : Compiling entry function 'lean' for 'sm_80'
ptxas info    : Function properties for lean
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 18 registers, used 0 barriers
"""
    assert build.parse_ptxas(log) == [
        {"kernel": "lean", "architecture": "sm_80", "registers": 18, "spill_bytes": 0, "shared_bytes": 0},
        {"kernel": "plain", "architecture": "sm_90", "registers": 40, "spill_bytes": 20, "shared_bytes": 1024},
    ]


@pytest.mark.slow
def test_a_fresh_clone_builds_without_cuda_and_its_library_does_not_depend_on_the_folder(clone, tmp_path_factory):
    assert run(clone).returncode == 0
    record = json.loads((clone / "build.json").read_text())
    assert (record["nvcc"], record["kernels"], record["without_cuda_because"]) == (None, [], "SWCONV_CUDA=0")
    other = tmp_path_factory.mktemp("other") / "deeper"
    shutil.copytree(clone, other, ignore=shutil.ignore_patterns("build", "*.so"))
    assert run(other).returncode == 0
    assert json.loads((other / "build.json").read_text()) == record


def test_sources_that_do_not_compile_are_reported_by_their_first_error(clone):
    source = clone / "csrc/shift_add_cpu.cpp"
    source.write_text(source.read_text() + "int half_a_function(\n")
    done = run(clone)
    assert done.returncode != 0
    assert "csrc/ does not compile:\n" in done.stderr
    assert re.search(r"csrc/\S+:\d+:\d+: error: ", done.stderr)
    assert str(clone / "build/native/build.log") in done.stderr


def test_a_missing_compiler_is_named(clone):
    done = run(clone, CXX="no-such-compiler")
    assert "needs a C++17 compiler, and could not run no-such-compiler. Install g++" in done.stderr


def test_a_record_that_cannot_be_written_is_reported(clone):
    (clone / "taken").touch()
    done = run(clone, out="taken/build.json")
    assert re.search(r"The build needs to write .*taken.*, and cannot \(.+\)\. Check the folder's owner", done.stderr)


@pytest.mark.parametrize("source", ["shift_add_cpu.cpp", "strips_cpu.cpp", "binding.cpp"])
def test_sources_are_valid_as_newer_cpp_too(source):
    flags = ["-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-DSWCONV_CUDA",
             "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    torch = Path(importlib.util.find_spec("torch").origin).parent
    command = ["g++", *flags, "-isystem", torch / "include", ROOT / "csrc" / source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
