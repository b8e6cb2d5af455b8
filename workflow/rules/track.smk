# A report's runs, replayed into MLflow: a view of artifacts/ that can be made again, so DVC does not keep it.
rule track:
    input:
        results("train/metrics.json", "train/run.json", "train/log.jsonl", "evaluate/metrics.json"),
    output:
        f"artifacts/{ACTIVE.profile}/track/table2.json",
    params:
        profile=ACTIVE.profile,
        seeds=list(ACTIVE.seeds),
        code=fingerprint("swconv.training.tracking"),
    log:
        f"logs/track/{ACTIVE.profile}-table2.log",
    shell:
        "python -m swconv track table2 --profile {params.profile} --seeds {params.seeds} --out {output} 2>&1 | tee {log}"
