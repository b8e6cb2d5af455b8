"""After `dvc pull`, `dvc checkout` or `git checkout`: tell Snakemake which of the files that are there are still right.

Snakemake goes by dates and by its own records, and a clone has neither: without this it would make everything again.
A run is right when DVC finds its bytes as recorded and its key is the one it would have today (row, data, code, seed, and the
weights that it starts from: of a fine-tune they have to be there; DVC keeps those of Table 2's rows).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from dvc.repo import Repo, lock_repo
from stages import ALLOWED, asks, downstream, downstream_params, params, rule_modules, targets

from swconv.fingerprint import fingerprint

KEYED = ("run", "downstream", "overfit")
RULES = {"finetune": "finetune", "downstream": "assess"}              # by the folder of their results


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
    record = Path(metrics).with_name("run.json")
    if not record.exists():
        return False
    [(module, csrc)] = rule_modules()[RULES.get(stage, stage)]
    rows, data, digest = known, Path("artifacts", profile, "data"), None
    if stage in RULES:
        rows = downstream(known)
        data = Path("artifacts", profile, "downstream_data", rows.run(run).task)
        weights = initial(rows, stage, run, profile, seed)
        if weights and not weights.exists():
            return False
        digest = weights and weights.read_text().strip()
    data_sha256 = json.loads((data / "data.json").read_text())["manifest_sha256"]
    code, number = fingerprint(module, csrc=csrc), int(seed.removeprefix("seed"))
    return json.loads(record.read_text())["key"] == params.key(rows.identity(run, profile), data_sha256, code, number, digest)


def initial(rows: downstream_params.Downstream, stage: str, run: str, profile: str, seed: str) -> Path | None:
    """The stamp of the weights that a fine-tune starts from, or that an assessment looks at; None for random ones."""
    name, source = "weights.safetensors.sha256", rows.source(run, profile)
    if stage == "downstream":
        return Path("artifacts", profile, "finetune", run, seed, name)
    if source is None:
        return None
    kind, start = source
    folder = Path("artifacts", rows.profile(profile).base, kind, start)
    return folder / seed / name if kind == "train" else folder / name


def adopt_fine_tunes(asked: list[str], known: params.Params) -> list[str]:
    """Vouch for those behind these files that have today's keys, their pictures too; the metrics of their assessments."""
    assessed = [path for path in asked if path.endswith("/metrics.json")]
    if not assessed:
        return []
    rows = downstream(known)
    sets = {Path("artifacts", path.split("/")[1], "downstream_data", rows.run(path.split("/")[3]).task) for path in assessed}
    snakemake(["downstream_data"], sorted(str(folder / "data.json") for folder in sets))
    finetuned = {path: path.replace("/downstream/", "/finetune/", 1) for path in assessed}
    right = [path for path in assessed if has_todays_key(finetuned[path], known)]
    vouch("finetune", [finetuned[path] for path in right])
    right = [path for path in right if has_todays_key(path, known)]
    vouch("assess", right)
    vouch("pictures", [drawn for path in right if Path(drawn := f"{Path(path).parent}/pictures").exists()])
    return right


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
        kind: [path for ask, (deps, outs, _) in stages if ask[0] == kind and not outs and (kind in KEYED or not deps)
               for path in targets(known, *ask)]
        for kind in ALLOWED
    }

    vouch("data", as_recorded["data"])
    snakemake(["data"], [f"{folder}/data/data.json"])
    right = [path for path in as_recorded["run"] if path.endswith("/metrics.json") and has_todays_key(path, known)]
    for rule in ("train", "evaluate"):
        vouch(rule, [path for path in right if path.startswith(f"{folder}/{rule}/")])
    fine_tuned = adopt_fine_tunes(as_recorded["downstream"], known)
    if as_recorded["overfit"]:
        examples = [f"artifacts/overfit/downstream/{run}/seed0/metrics.json" for run in downstream(known).examples.values()]
        fine_tuned += (found := adopt_fine_tunes(examples, known))
        if found == examples:
            snakemake(["track_downstream"], [path.replace("/downstream/", "/track/downstream/", 1).replace("/metrics", "")
                                             for path in examples])
            vouch("downstream_table", ["artifacts/overfit/downstream/examples.md"])
            vouch("downstream_overfit", as_recorded["overfit"])
    if as_recorded["table2"]:
        snakemake(["track"], [f"{folder}/track/table2.json"])
        vouch("table2", as_recorded["table2"])
    if as_recorded["tables"]:
        snakemake(["count"], ["artifacts/counts.json"])
        vouch("tables", as_recorded["tables"])
    print(f"{len(right)} results of profile {known.active.profile} and {len(fine_tuned)} fine-tunes are right as they are; "
          "`snakemake -n` lists what is left.")


if __name__ == "__main__":
    main()
