# Table 2 of SW, from metrics files and from what the paper prints. It waits for the replay, so that one command does all.
# update, because the old table must stay where a new one fails: without it Snakemake deletes first.
REPORTS = ACTIVE.reports_folder


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
        table=update(f"{REPORTS}/table2.md"),
        cells=update(f"{REPORTS}/table2.csv"),
        provenance=update(f"{REPORTS}/table2.provenance.json"),
        figure=update(f"{REPORTS}/figures/table2_distance.svg"),
    params:
        profile=ACTIVE.profile,
        seeds=list(ACTIVE.seeds),
        rows=[PARAMS.runs[run].model_dump_json() for run in PARAMS.report_rows("table2")],
        others=other_results(),
        code=fingerprint("swconv.reporting.table2"),
        out=subpath(output.table, parent=True),
    log:
        f"logs/report/{ACTIVE.profile}-table2.log",
    shell:
        "python -m swconv report table2 --profile {params.profile} --seeds {params.seeds} --out {params.out} 2>&1 | tee {log}"


def outdate_failed_report():
    """Have the next command make a report that failed.

    Snakemake brings the old one back, with the date of now and a note that it was made from what the new one failed on.
    """
    for job in workflow.scheduler.failed:
        for path in filter(os.path.exists, job.output if job.rule.name == "table2" else []):
            workflow.persistence.cleanup_metadata(path)
            os.utime(path, (1, 1))  # 0 would be no date to Snakemake


def belongs_elsewhere(wildcards):
    sys.exit(
        f"reports/table2.md shows the profiles mini and paper, but {ACTIVE.profile} is active (params/active.yaml), whose table is "
        f"{REPORTS}/table2.md. For the other: snakemake --cores all reports/table2.md --config profile=mini seeds=0,1,2"
    )


# Asked for while another profile is active, the committed table would pass for up to date.
if REPORTS != "reports":

    rule elsewhere:
        input:
            belongs_elsewhere,
        output:
            "reports/table2.md",
        log:
            "logs/report/elsewhere.log",
        shell:
            "false > {log}"
