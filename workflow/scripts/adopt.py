"""After `dvc pull`, `dvc checkout` or `git checkout`: tell Snakemake which of the files that are there are still right.

Snakemake goes by dates and by its own records, and a clone has neither: without this it would make everything again.
A run is right when DVC finds its bytes as recorded and its key is the one it would have today (row, data, code, seed).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from dvc.repo import Repo, lock_repo
from stages import ALLOWED, asks, params, rule_modules, targets

from swconv.fingerprint import fingerprint


def snakemake(rules: list[str], files: list[str], *options: str) -> None:
    command = [sys.executable, "-m", "snakemake", "--cores", "all", "--quiet", "all", *options, "--allowed-rules", *rules]
    subprocess.run([*command, "--", *files], check=True, env={**os.environ, "SWCONV_UNDER_DVC": "1"})


def vouch(rule: str, files: list[str]) -> None:
    """Have Snakemake take existing outputs of a rule as made by it, just now.

    One rule at a time, upstream first: `--touch` on a table would vouch for stale results below it too.
    """
    if files:
        snakemake([rule], files, "--touch", "--force")


def has_todays_key(metrics: str, known: params.Params) -> bool:
    """Whether a run's record holds the key that the run would have now."""
    _, profile, stage, run, seed, _ = metrics.split("/")
    record, data = Path(metrics).with_name("run.json"), Path("artifacts", profile, "data", "data.json")
    if not record.exists():
        return False
    [(module, csrc)] = rule_modules()[stage]
    data_sha256 = json.loads(data.read_text())["manifest_sha256"]
    key = params.key(known.identity(run, profile), data_sha256, fingerprint(module, csrc=csrc), int(seed.removeprefix("seed")))
    return json.loads(record.read_text())["key"] == key


def main() -> None:
    try:
        known = params.load(Path("params"))
    except params.ParamsError as error:
        sys.exit(str(error))
    folder = f"artifacts/{known.active.profile}"
    repo = Repo()
    with lock_repo(repo):
        stages = [(asks(stage.cmd), stage.changed_entries()) for stage in repo.index.stages]
    # A run's key says more than the bytes of its deps, where a comment counts.
    as_recorded = {
        kind: [path for ask, (deps, outs, _) in stages if ask[0] == kind and not outs and (kind == "run" or not deps)
               for path in targets(known, *ask)]
        for kind in ALLOWED
    }

    vouch("data", as_recorded["data"])
    snakemake(["data"], [f"{folder}/data/data.json"])
    right = [path for path in as_recorded["run"] if path.endswith("/metrics.json") and has_todays_key(path, known)]
    for rule in ("train", "evaluate"):
        vouch(rule, [path for path in right if path.startswith(f"{folder}/{rule}/")])
    if as_recorded["table2"]:
        snakemake(["track"], [f"{folder}/track/table2.json"])
        vouch("table2", as_recorded["table2"])
    if as_recorded["tables"]:
        snakemake(["count"], ["artifacts/counts.json"])
        vouch("tables", as_recorded["tables"])
    print(f"{len(right)} results of profile {known.active.profile} are right as they are; `snakemake -n` lists what is left.")


if __name__ == "__main__":
    main()
