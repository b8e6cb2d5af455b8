"""Which results stand behind a report."""

from hashlib import sha256


def report_seeds(wildcards):
    """The seeds that a report is made from."""
    with one_sentence():
        return list(PARAMS.seeds(wildcards.report, ACTIVE.seeds))


def results(*names, curves=None):
    """Files, as `stage/name`, of every run and seed behind a report; a row not trained at this scale only says so.

    A row that takes the weights of another is not trained. `curves`: a further file, for reports that draw them.
    """

    def paths(wildcards):
        with one_sentence():
            rows, plan = PARAMS.report_rows(wildcards.report), PARAMS.report(wildcards.report)
            trained = PARAMS.trained(rows, ACTIVE.profile)
        asked = [*names, curves] if curves and "curves" in plan.sections else names
        return [
            *(
                f"artifacts/{ACTIVE.profile}/{stage}/{run}/seed{seed}/{name}"
                for stage, name in (each.split("/") for each in asked)
                for run in trained
                if stage != "train" or not PARAMS.runs[run].same_weights
                for seed in report_seeds(wildcards)
            ),
            *(
                f"artifacts/{ACTIVE.profile}/{stage}/{run}/same_as.json"
                for stage in ("train", "evaluate")
                for run in rows
                if run not in trained
            ),
        ]

    return paths


def other_results(wildcards):
    """Hash of what a report shows of the other profile. No input: what is there is shown, and nothing is run for it."""
    digest = sha256()
    for profile in {"mini": ["paper"], "paper": ["mini"]}.get(ACTIVE.profile, []):
        for run in PARAMS.trained(PARAMS.report_rows(wildcards.report), profile):
            for path in sorted(Path("artifacts", profile).glob(f"*/{run}/seed*/*.json")):
                digest.update(f"{path}\n{path.read_text()}\n".encode())
    return digest.hexdigest()
