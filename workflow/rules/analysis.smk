# Tables that need no training: parameters and FLOPs of both papers, the training settings, and the scoreboard. Models are
# counted, not run. Accuracies of profile paper stand beside them where there are some.
COUNTED = list(PARAMS.costs)


def accuracies():
    """Hash of the accuracies that these pages show, and of the runs on ImageNet that the scoreboard judges."""
    shown_runs = PARAMS.trained((run for plan in PARAMS.reports.values() for run in plan.runs), "paper")
    runs = sorted({*shown_runs, *(row.run for row in PARAMS.weights.values() if row.run)})
    shown = [name for name, row in DOWNSTREAM.profiles.items() if PARAMS.profile(row.base).reports == "reports"]
    tuned = [f"{name}/downstream/{run}" for name in shown for run in DOWNSTREAM.runs]
    return contents("paper/released/*/*.json", *(f"paper/evaluate/{run}/seed*/*.json" for run in runs),
                    *(f"paper/train/{run}/seed*/metrics.json" for run in shown_runs),
                    *(f"{folder}/seed*/metrics.json" for folder in tuned))


def judged(plan):
    """A page's columns, and its rows where one was run on ImageNet: what the scoreboard takes from it."""
    ran = any(Path("artifacts/paper/evaluate", run).exists() for run in PARAMS.trained(plan.runs, "paper"))
    return plan.model_dump_json(include={"title", "claims", "named_by", "columns", *(["rows"] if ran else [])})


# The counts belong to the machine: without them a clone, whose pages are there, would not see what changes.
rule count:
    output:
        "artifacts/counts.json",
    params:
        plan=list(PARAMS.counted),
        code=fingerprint("swconv.analysis.kernels"),
        tasks=fingerprint("swconv.analysis.dense_tasks"),
    log:
        "logs/count.log",
    shell:
        "python -m swconv count --out {output} 2>&1 | tee {log}"


rule tables:
    input:
        counts=rules.count.output,
        claims=[f"reports/paper/{PARAMS.costs[table].claims}" for table in COUNTED],
        settings="reports/paper/sw_table8.csv",
    output:
        tables=[f"reports/{table}.{kind}" for table in COUNTED if table not in PARAMS.reports for kind in ("md", "csv")],
        counts=[f"reports/{table}_counts.csv" for table in COUNTED if table in PARAMS.reports],
        figures=[f"reports/figures/slak/{name}" for name in ("fig4.csv", "fig4_macs.svg", "fig4_params.svg")],
        settings="reports/table8.md",
        index="reports/index.md",
    params:
        plan=[PARAMS.costs[table].model_dump_json() for table in COUNTED],
        rows=[PARAMS.identity(run, "paper") for run in PARAMS.settings.values()],
        weights=[row.model_dump_json(exclude={"url"}) for row in PARAMS.weights.values()],
        pages=[judged(plan) for plan in PARAMS.reports.values()],
        accuracies=accuracies(),
        code=fingerprint("swconv.reporting.report"),
        recipes=fingerprint("swconv.reporting.recipes"),
    log:
        "logs/tables.log",
    shell:
        "python -m swconv tables --counts {input.counts} --out reports 2>&1 | tee {log}"
