"""What a DVC stage asks of Snakemake: `via-snakemake KIND PROFILE [RUN]`, the command of every stage in dvc.yaml."""

import os
import re
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from swconv import params  # noqa: E402

# Rules that a stage may run. The library and the MLflow database belong to the machine: no stage owns them.
ALLOWED = {
    "data": ["data"],
    "run": ["build", "same_as", "train", "evaluate"],
    "table2": ["track", "table2"],
}


def asks(command: str) -> list[str]:
    """Kind of stage, profile and, for a stage per run, the run, from a stage's command."""
    return shlex.split(command)[1:]


def targets(known: params.Params, kind: str, profile: str, run: str | None = None) -> list[str]:
    """The files that a stage asks for: one of each job's outputs, for all active seeds, upstream first.

    Raises
    ------
    ParamsError
        For a profile or a run that is not known.
    """
    if kind == "data":
        return [f"artifacts/{profile}/data/data.json"]
    if kind == "table2":
        return [f"{known.profile(profile).reports}/table2.md"]
    if known.same_as(run, profile, known.report_rows("table2")):
        names = ["same_as.json"]
    else:
        names = [f"seed{seed}/metrics.json" for seed in known.active.seeds]
    return [f"artifacts/{profile}/{stage}/{run}/{name}" for stage in ("train", "evaluate") for name in names]


def rule_files() -> dict[str, Path]:
    """The .smk file of each rule."""
    files = sorted((ROOT / "workflow" / "rules").glob("*.smk"))
    return {name: path for path in files for name in re.findall(r"^rule (\w+):", path.read_text(), re.MULTILINE)}


def rule_modules() -> dict[str, tuple[str, bool]]:
    """The module whose meaning each rule depends on, and whether csrc/ counts, as its .smk file says."""
    text = "\n".join(path.read_text() for path in sorted((ROOT / "workflow" / "rules").glob("*.smk")))
    rule = re.compile(r'^rule (\w+):(?:(?!^rule ).)*?code=fingerprint\("([\w.]+)"(, csrc=True)?\)', re.DOTALL | re.MULTILINE)
    return {name: (module, bool(csrc)) for name, module, csrc in rule.findall(text)}


def main() -> None:
    kind, *which = sys.argv[1:]
    try:
        files = targets(params.load(ROOT / "params"), kind, *which)
    except params.ParamsError as error:
        sys.exit(str(error))
    snakemake = [sys.executable, "-m", "snakemake", "--cores", "all", "--quiet", "all"]
    os.environ["SWCONV_UNDER_DVC"] = "1"
    os.execv(sys.executable, [*snakemake, "--allowed-rules", *ALLOWED[kind], "--", *files])


if __name__ == "__main__":
    main()
