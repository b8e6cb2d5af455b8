"""The verbs: light to start, and faults end in one sentence."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from swconv.__main__ import main

ROOT = Path.cwd()
HELP = """
import sys, swconv, swconv.__main__
try:
    swconv.__main__.main(["--help"])
except SystemExit:
    pass
heavy = {"torch", "timm", "mlflow", "pandas", "pydantic", "numpy", "yaml"} & sys.modules.keys()
assert not heavy, heavy
"""
REST = ["--seed", "0", "--data", "d", "--out", "o"]
REPORT = ["--profile", "smoke", "--seeds", "0", "--out", "o"]
LIGHT = "import sys, swconv.params, swconv.fingerprint; swconv.params.load(); assert 'torch' not in sys.modules"


def python(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=cwd,
                          env=os.environ | {"PYTHONPATH": str(ROOT)} | environment)


def test_help_and_import_load_nothing_heavy():
    done = python("-c", HELP)
    assert done.returncode == 0, done.stderr
    assert "train one run; a killed training resumes" in done.stdout


def test_reading_params_loads_no_torch():
    done = python("-c", LIGHT)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An empty folder with params/, as the verbs see the project."""
    shutil.copytree("params", tmp_path / "params")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def one_sentence(capsys, *arguments: str) -> str:
    assert main([*arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_reader_that_is_gone_hides_no_exit_code(project, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with io.TextIOWrapper(io.FileIO(writing, "w"), write_through=True) as deaf:
        monkeypatch.setattr(sys, "stderr", deaf)
        assert main(["train", "sw99", "--profile", "smoke", *REST]) == 1


@pytest.mark.parametrize(("arguments", "sentence"), [
    (["train", "sw99", "--profile", "smoke", *REST], "unknown run sw99; the nearest known name is"),
    (["train", "sw01_infer", "--profile", "smoke", *REST], "sw00"),
    (["train", "sw11", "--profile", "smok", *REST], "the nearest known name is smoke"),
    (["train", "sw11", "--profile", "smoke", *REST], "run the data rule first"),
    (["data", "--profile", "paper", "--out", "d"], "put the images there"),
    (["ui"], "mlflow.db, got no such file; make it: snakemake --cores all --forcerun track"),
    (["report", "tabel2", *REPORT], "unknown report tabel2; the nearest known name is table2"),
    (["report", "table2", "--profile", "smok", *REPORT[2:]], "unknown profile smok; the nearest known name is smoke"),
    (["train", "sw11", "--profile", "smoke", *REST, "--planned", "x"], "swconv/ changed since this run was planned"),
    (["evaluate", "sw11", "--profile", "smoke", "--weights", "w", *REST, "--planned", "x"], "since this run was planned"),
    (["calibrate", "sw11", "--profile", "smoke", "--weights", "w", *REST, "--planned", "x"], "since this run was planned"),
    (["lay-out", "sw01_infer", "--profile", "smoke", "--weights", "w", *REST, "--planned", "x"], "since this run was planned"),
    (["cost", "slak_tinx"], "unknown model slak_tinx; the nearest known name is slak_tiny."),
    (["cost", "slak_tiny", "--input", "31"], "slak_tiny reduces images 32-fold and needs --input 32 or more, got 31."),
    (["cost", "slak_tiny", "--set", "widht_factor=3"], "unknown argument widht_factor; the nearest known name is width_"),
    (["cost", "sw_tiny", "--set", "edges=abc"], "sw_tiny, argument edges: input should be a valid integer, got 'abc'."),
    (["cost", "sw_base", "--set", "foo=3"], "sw_base, --set foo=3: LargeKernelNet.__init__() got an unexpected"),
    (["cost", "sw_tiny", "--set", "depths=[3"], "--set needs values in YAML, as in depths=[3,3,27,3], got depths=[3."),
    (["cost", "slak_tiny", "--set", "num_classes=abc"], "slak_tiny, --set num_classes=abc: "),
    (["convert", "w.pth", "--model", "sw_tiny", "--set", "edgse=3", "--out", "o"], "the nearest known name is edges."),
])
def test_faults_end_in_one_sentence_and_exit_code_1(project, capsys, arguments, sentence):
    assert sentence in one_sentence(capsys, *arguments)


@pytest.mark.parametrize(("package", "arguments", "sentence"), [
    ("nuscenes", ["downstream-data", "nuscenes", "--profile", "smoke", "--out", "d"],
     "nuScenes needs nuscenes-devkit and what it imports, got 'import of nuscenes halted; None in sys.modules'; run `make"),
    ("faster_coco_eval", ["bench", "downstream", "--quick", "--out", "d"],
     "faster_coco_eval needs to be installed, got 'import of faster_coco_eval halted; None in sys.modules'. Run `make setup`"),
])
def test_a_package_that_is_not_installed_is_told_before_anything_is_measured(project, capsys, monkeypatch, package, arguments,
                                                                            sentence):
    monkeypatch.setitem(sys.modules, package, None)
    assert main(arguments) == 1
    told = capsys.readouterr().err
    assert sentence in told.splitlines()[-1]
    assert "training steps" not in told
    assert not list(project.glob("d/*.json"))


def test_what_the_system_refuses_is_told_with_what_to_do(project, capsys):
    (project / "taken").touch()
    told = one_sentence(capsys, "data", "--profile", "smoke", "--out", "taken/data")
    assert told == ("swconv data: taken/data needs to be there and open to you, got 'Not a directory'. "
                    "Check the path, its owner and the free space, then run the same command again.")


def test_an_image_without_pixels_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["cost", "sw_tiny", "--input", "0"])
    assert "argument --input: a whole number above 0 is needed, got 0" in capsys.readouterr().err


def test_a_step_interval_that_is_no_number_is_named_and_spoils_no_help():
    assert python("-m", "swconv", "train", "--help", SWCONV_LOG_EVERY="ten").returncode == 0
    done = python("-m", "swconv", "train", "sw11", "--profile", "smoke", *REST, SWCONV_LOG_EVERY="ten")
    assert done.stderr.splitlines()[-1].endswith("argument --log-every: invalid int value: 'ten'")


def test_a_python_without_venv_is_told_in_a_sentence_that_names_the_package(tmp_path):
    for name in ("Makefile", "requirements.lock", "setup.py"):
        shutil.copy(name, tmp_path)
    (tmp_path / "python3").write_text("#!/bin/sh\n[ \"$2\" != 'import ensurepip' ]\n")  # as Debian's, without python3-venv
    (tmp_path / "python3").chmod(0o755)
    done = subprocess.run(["make", "setup", "PYTHON=./python3", "VENV=.venv"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    sentence, *rest = done.stderr.splitlines()
    assert sentence == "make needs ./python3 with its venv module; on Debian and Ubuntu: apt install python3-venv"
    assert all(line.startswith("make") for line in rest)


def test_an_unreadable_image_is_named_before_training(project, capsys):
    assert main(["data", "--profile", "smoke", "--out", "data"]) == 0
    capsys.readouterr()
    image = next((project / "data/images/train").rglob("*.png"))
    image.write_bytes(b"not a picture")
    told = one_sentence(capsys, "train", "sw11", "--profile", "smoke", "--seed", "0", "--data", "data", "--out", "out")
    assert image.name in told
    assert not (project / "out").exists()


def test_a_folder_that_cannot_be_written_is_told_and_nothing_finished_is_lost(project, capsys):
    assert main(["data", "--profile", "smoke", "--out", "data"]) == 0
    capsys.readouterr()
    (project / "out").write_text("a file where the folder should be")
    arguments = ["train", "control_dw3", "--profile", "smoke", "--seed", "0", "--data", "data", "--out", "out/seed0"]
    assert main(arguments) == 1
    assert "could not be written: Not a directory. Make room or give write permission" in capsys.readouterr().err
    (project / "out").unlink()
    assert main(arguments) == 0                                       # publishes from the finished checkpoint
    assert json.loads((project / "out/seed0/run.json").read_text())["resumed_from_epoch"] == 2


def test_a_disk_that_takes_no_more_stops_with_a_sentence_and_the_next_run_goes_on(project):
    """A limit on file size makes the system itself refuse the checkpoint's bytes, as a full disk does."""
    assert main(["data", "--profile", "smoke", "--out", "data"]) == 0
    arguments = ["train", "control_dw3", "--profile", "smoke", "--seed", "0", "--data", "data", "--out", "out"]
    limited = ("import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)); "
               "from swconv.__main__ import main; sys.exit(main(sys.argv[1:]))")
    done = python("-c", limited, *arguments, cwd=project)
    assert done.returncode == 1
    assert "could not be written: File too large. Make room" in done.stderr.splitlines()[-1]
    assert not list(project.rglob("*.part"))
    assert main(arguments) == 0


def test_run_json_tells_key_code_machine_and_row_whatever_the_environment_says(project):
    main(["data", "--profile", "smoke", "--out", "data"])
    arguments = ["train", "control_dw3", "--profile", "smoke", "--seed", "3", "--data", "data", "--out", "out"]
    assert python("-m", "swconv", *arguments, cwd=project, OMP_NUM_THREADS="2").returncode == 0
    record = json.loads((project / "out/run.json").read_text())
    assert (project / "checkpoints" / record["key"]).is_dir()
    assert record["seed"] == 3
    assert record["config"]["model"]["args"]["kernel_sizes"] == [3, 3]
    assert record["data_manifest_sha256"] == json.loads((project / "data/data.json").read_text())["manifest_sha256"]
    assert record["hardware"]["cores"] >= 1
    assert record["flags"] == {"threads": 1, "tf32_matmul": False, "tf32_cudnn": False, "deterministic": False}
    assert record["versions"]["torch"].startswith("2.")
