"""Which results stand behind a report."""

from hashlib import sha256


def results(*names):
    """Files, as `stage/name`, of every run and seed behind the table; a row not trained at this scale only says so."""
    with one_sentence():
        rows = PARAMS.report_rows("table2")
        trained = PARAMS.trained(rows, ACTIVE.profile)
    return [
        *(
            f"artifacts/{ACTIVE.profile}/{stage}/{run}/seed{seed}/{name}"
            for stage, name in (each.split("/") for each in names)
            for run in trained
            for seed in ACTIVE.seeds
        ),
        *(
            f"artifacts/{ACTIVE.profile}/{stage}/{run}/same_as.json"
            for stage in ("train", "evaluate")
            for run in rows
            if run not in trained
        ),
    ]


def other_results():
    """Hash of what the table shows of the other profile. No input: what is there is shown, and nothing is run for it."""
    digest = sha256()
    for profile in {"mini": ["paper"], "paper": ["mini"]}.get(ACTIVE.profile, []):
        for run in PARAMS.report_rows("table2"):
            for path in sorted(Path("artifacts", profile).glob(f"*/{run}/seed*/*.json")):
                digest.update(f"{path}\n{path.read_text()}\n".encode())
    return digest.hexdigest()
