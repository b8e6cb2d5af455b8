"""What the rules read from params/, and the one sentence that stops everything when it is wrong."""

import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(workflow.basedir))

from swconv import params as params_yaml
from swconv.fingerprint import fingerprint

# `python` in a rule is the one that runs Snakemake, whether or not its environment is activated.
os.environ |= {"PATH": os.pathsep.join([str(Path(sys.executable).parent), *os.get_exec_path()])}


@contextmanager
def one_sentence():
    """Leave with the sentence of a fault in params/ alone; a WorkflowError would print more around it."""
    try:
        yield
    except params_yaml.ParamsError as error:
        sys.exit(str(error))


def asked_seeds(asked):
    """`--config seeds=0,1,2`, `seeds=0` or a YAML list, as numbers."""
    items = asked if isinstance(asked, list) else str(asked).replace(",", " ").split()
    if not items or not all(str(item).isdecimal() and int(item) < 2**32 for item in items):
        sys.exit(f"--config seeds needs whole numbers below 2**32, as in seeds=0,1,2; got seeds={asked}.")
    return tuple(dict.fromkeys(int(item) for item in items))


def asked_active():
    """Profile and seeds: those of --config, else those of params/active.yaml."""
    if unknown := config.keys() - {"profile", "seeds"}:
        sys.exit(f"--config takes profile and seeds, got {', '.join(sorted(unknown))}.")
    profile = str(config.get("profile", PARAMS.active.profile))
    seeds = asked_seeds(config["seeds"]) if "seeds" in config else PARAMS.active.seeds
    return params_yaml.Active(profile=profile, seeds=seeds, reports_folder=PARAMS.profile(profile).reports)


def stats(paths):
    """Size and date of files, by name."""
    return {str(path): (stat.st_size, stat.st_mtime_ns) for path in paths if path.is_file() for stat in [path.stat()]}


def source_stats():
    """Those of all that a user edits and dvc.lock speaks of: a look that costs no DVC."""
    folders = [Path("params"), Path("swconv"), Path("csrc"), Path("reports/paper"), Path("workflow/rules")]
    sources = [path for folder in folders for path in sorted(folder.rglob("*.*")) if path.suffix not in (".pyc", ".so")]
    return stats([*sources, Path("setup.py"), Path("dvc.yaml")])


def activate():
    """Keep what --config asked for, so that DVC and the next command ask for the same."""
    path = Path("params/active.yaml")
    try:
        params_yaml.write_active(path, ACTIVE)
    except OSError as error:
        sys.exit(str(error))
    SOURCES.update(stats([path]))


# Before anything is read from them: what is edited from now on is not what this command plans with.
SOURCES = source_stats()

with one_sentence():
    PARAMS = params_yaml.load(Path("params"))
    ACTIVE = asked_active()
    PARAMS.check_data(ACTIVE.profile)


def row(wildcards):
    """All that a run takes from params/: its own resolved row, as text."""
    with one_sentence():
        return PARAMS.identity(wildcards.run, wildcards.profile)


def trained_row(wildcards):
    """The same, of a run that is trained."""
    with one_sentence():
        PARAMS.check_trainable(wildcards.run)
    return row(wildcards)


def planned(module):
    """A run's key as far as it is known before its data are: a job that finds another one refuses to work."""
    code = fingerprint(module, csrc=True)
    return lambda wildcards: params_yaml.key(row(wildcards), "", code, int(wildcards.seed))


def same_as(wildcards):
    """The earlier row of runs.yaml that is the same experiment at this scale."""
    with one_sentence():
        return PARAMS.same_as(wildcards.run, wildcards.profile)


def dataset(wildcards):
    """What a profile's data are made from; stops where the user has to provide them and did not."""
    with one_sentence():
        PARAMS.check_data(wildcards.profile)
    return PARAMS.profiles[wildcards.profile].dataset.model_dump_json(exclude={"cache", "workers"})


def machine_threads(wildcards):
    return PARAMS.profiles[wildcards.profile].threads


def machine_gpus(wildcards):
    """1 where the profile computes on a GPU, else 0: a cap on GPUs must not make CPU runs wait for each other."""
    return int(PARAMS.profiles[wildcards.profile].uses_gpu)


# What the compiled sources mean, and setup.py, which holds their flags: as much of them as a run's key holds.
CSRC = fingerprint("swconv", csrc=True)


wildcard_constraints:
    profile="[^/]+",
    run="[^/]+",
    seed="[0-9]+",
