"""What a DVC stage asks of Snakemake: `via-snakemake RULE PROFILE [RUN]`, the command of every stage in dvc.yaml."""

import os
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from swconv import params  # noqa: E402

# Rules that a stage may run. The library and the MLflow database belong to the machine: no stage owns them.
ALLOWED = {
    "data": ["data"],
    "train": ["build", "same_as", "train"],
    "evaluate": ["build", "same_as", "evaluate"],
    "table2": ["track", "table2"],
}


def asks(command: str) -> list[str]:
    """Rule, profile and, for a stage per run, the run, from a stage's command."""
    return shlex.split(command)[1:]


def targets(known: params.Params, rule: str, profile: str, run: str | None = None) -> list[str]:
    """The files that a stage asks for: one of each job's outputs, for all active seeds.

    Raises
    ------
    ParamsError
        For a profile or a run that is not known.
    """
    if rule == "data":
        return [f"artifacts/{profile}/data/data.json"]
    if rule == "table2":
        return [f"{known.profile(profile).reports}/table2.md"]
    folder = f"artifacts/{profile}/{rule}/{run}"
    if known.same_as(run, profile, known.report_rows("table2")):
        return [f"{folder}/same_as.json"]
    return [f"{folder}/seed{seed}/metrics.json" for seed in known.active.seeds]


def main() -> None:
    rule, *which = sys.argv[1:]
    try:
        files = targets(params.load(ROOT / "params"), rule, *which)
    except params.ParamsError as error:
        sys.exit(str(error))
    snakemake = [sys.executable, "-m", "snakemake", "--cores", "all", "--quiet", "all"]
    os.environ["SWCONV_UNDER_DVC"] = "1"
    os.execv(sys.executable, [*snakemake, "--allowed-rules", *ALLOWED[rule], "--", *files])


if __name__ == "__main__":
    main()
