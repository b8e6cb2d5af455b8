# Tables that need no training: parameters and FLOPs of both papers, and the scoreboard. Models are counted, not run.
COST_TABLES = list(PARAMS.costs)


rule costs:
    input:
        claims=[f"reports/paper/{PARAMS.costs[table].claims}" for table in COST_TABLES],
    output:
        tables=[f"reports/{table}.{kind}" for table in COST_TABLES for kind in ("md", "csv")],
        index="reports/index.md",
    params:
        plan=[PARAMS.costs[table].model_dump_json() for table in COST_TABLES],
        code=[fingerprint("swconv.analysis.cost"), fingerprint("swconv.reporting.costs")],
    log:
        "logs/costs.log",
    shell:
        "python -m swconv costs --out reports 2>&1 | tee {log}"
