# A report's runs, replayed into MLflow: a view of artifacts/ that can be made again, so DVC does not keep it.
rule track:
    input:
        results("train/metrics.json", "train/run.json", "train/log.jsonl", "evaluate/metrics.json"),
    output:
        f"artifacts/{ACTIVE.profile}/track/{{report}}.json",
    params:
        profile=ACTIVE.profile,
        seeds=report_seeds,
        code=fingerprint("swconv.training.tracking"),
    log:
        f"logs/track/{ACTIVE.profile}-{{report}}.log",
    wildcard_constraints:
        report="|".join(PARAMS.reports),
    shell:
        "python -m swconv track {wildcards.report} --profile {params.profile} --seeds {params.seeds} --out {output}"
        " 2>&1 | tee {log}"
