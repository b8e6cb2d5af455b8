"""What a DVC stage asks of Snakemake: `via-snakemake KIND [PROFILE [RUN | REPORT]]`, the command of every stage."""

import functools
import os
import re
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from swconv import downstream_params, params  # noqa: E402

# What stands behind a page whose runs have no stages of their own (reports/dvc.yaml).
PAGE = ("build", "same_as", "train", "lay_out", "evaluate", "track", "count", "tables")
FINE_TUNE = ("build", "downstream_data", "finetune", "assess", "track_downstream")
# Rules that a stage may run. The library and the MLflow database belong to the machine: no stage owns them.
ALLOWED = {
    "data": ["data"],
    "run": ["build", "same_as", "train", "evaluate"],
    "table2": ["track", "table2"],
    "page": [*PAGE, "page"],
    "figure": [*PAGE, "figure"],
    "tables": ["count", "tables"],
    "downstream": [*FINE_TUNE, "train", "convert", "fetch", "pictures"],
    "overfit": [*FINE_TUNE, "downstream_table", "downstream_overfit"],
}


def asks(command: str) -> list[str]:
    """Kind of stage, profile where it has one and, for a stage per run or report, which, from a stage's command."""
    return shlex.split(command)[1:]


def targets(known: params.Params, kind: str, profile: str = "", which: str = "table2") -> list[str]:
    """The files that a stage asks for: one of each job's outputs, for all active seeds, upstream first.

    Raises
    ------
    ParamsError
        For a profile, a run or a report that is not known.
    """
    if kind == "tables":
        return ["reports/index.md"]
    if kind == "overfit":
        return ["reports/downstream_overfit.md"]
    if kind == "data":
        return [f"artifacts/{profile}/data/data.json"]
    if kind == "downstream":
        if profile not in (rows := downstream(known)).profiles:
            return []                                                     # a profile of the user that fine-tunes nothing
        rows.run(which)
        return [path for seed in known.active.seeds
                for path in (f"artifacts/{profile}/downstream/{which}/seed{seed}/metrics.json",
                             f"artifacts/{profile}/downstream/{which}/seed{seed}/pictures",
                             f"artifacts/{profile}/track/downstream/{which}/seed{seed}.json")]
    if kind in ("table2", "page", "figure"):
        known.report(which)
        return [f"{known.profile(profile).reports}/{which}.md"]
    seeds = known.active.seeds
    names = ["same_as.json"] if known.same_as(which, profile) else [f"seed{seed}/metrics.json" for seed in seeds]
    return [f"artifacts/{profile}/{stage}/{which}/{name}" for stage in ("train", "evaluate") for name in names]


@functools.cache
def downstream(known: params.Params) -> downstream_params.Downstream:
    return downstream_params.load(ROOT / "params", known)


def rule_files() -> dict[str, Path]:
    """The .smk file of each rule."""
    files = sorted((ROOT / "workflow" / "rules").glob("*.smk"))
    rule = re.compile(r"^(?:use rule \w+ as|rule) (\w+)(?: with)?:", re.MULTILINE)
    return {name: path for path in files for name in rule.findall(path.read_text())}


def rule_modules() -> dict[str, list[tuple[str, bool]]]:
    """The modules whose meaning each rule depends on, and whether csrc/ counts, as its .smk file says."""
    text = "\n".join(path.read_text() for path in sorted((ROOT / "workflow" / "rules").glob("*.smk")))
    found = {}
    for name, body in re.findall(r"^rule (\w+):\n((?:    .*\n|\n)*)", text, re.MULTILINE):
        found[name] = [(module, bool(csrc)) for module, csrc in re.findall(r'=fingerprint\("([\w.]+)"(, csrc=True)?\)', body)]
    return found


def main() -> None:
    kind, *which = sys.argv[1:]
    try:
        files = targets(params.load(ROOT / "params"), kind, *which)
    except params.ParamsError as error:
        sys.exit(str(error))
    if not files:
        sys.exit(f"profile {which[0]} fine-tunes nothing: it is no profile of params/downstream.yaml.")
    snakemake = [sys.executable, "-m", "snakemake", "--cores", "all", "--quiet", "all"]
    os.environ["SWCONV_UNDER_DVC"] = "1"
    os.execv(sys.executable, [*snakemake, "--allowed-rules", *ALLOWED[kind], "--", *files])


if __name__ == "__main__":
    main()
