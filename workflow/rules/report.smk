"""Table 2 of SW, from metrics files and what the paper prints. It waits for the replay, so that one command does all."""

from hashlib import sha256

REPORTS = ACTIVE.reports_folder


def other_results():
    """Hash of what the report shows of the other profile. No input: what is there is shown, and nothing is run for it."""
    digest = sha256()
    for profile in {"mini": ["paper"], "paper": ["mini"]}.get(ACTIVE.profile, []):
        for run in PARAMS.report_rows("table2"):
            for path in sorted(Path("artifacts", profile).glob(f"*/{run}/seed*/*.json")):
                digest.update(f"{path}\n{path.read_text()}\n".encode())
    return digest.hexdigest()


rule table2:
    input:
        results(
            "train/metrics.json",
            "train/run.json",
            "evaluate/metrics.json",
            "evaluate/run.json",
        ),
        tracked=rules.track.output,
        claims="reports/paper/sw_table2.csv",
    output:
        table=f"{REPORTS}/table2.md",
        cells=f"{REPORTS}/table2.csv",
        provenance=f"{REPORTS}/table2.provenance.json",
        figure=f"{REPORTS}/figures/table2_distance.svg",
    params:
        profile=ACTIVE.profile,
        rows=[PARAMS.runs[run].model_dump_json() for run in PARAMS.report_rows("table2")],
        others=other_results(),
        code=fingerprint("swconv.reporting"),
        out=subpath(output.table, parent=True),
    log:
        f"logs/report/{ACTIVE.profile}-table2.log",
    shell:
        "{PYTHON:q} -m swconv report table2 --profile {ACTIVE.profile} --seeds {SEEDS} --out {params.out} 2>&1 | tee {log}"
