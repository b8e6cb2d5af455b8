# Tables that need no training: parameters and FLOPs of both papers, the training settings, and the scoreboard. Models are
# counted, not run.
COUNTED = list(PARAMS.costs)
PAGES = ("reporting.costs", "reporting.formulas", "reporting.recipes")


rule tables:
    input:
        claims=[f"reports/paper/{PARAMS.costs[table].claims}" for table in COUNTED],
        formulas="reports/paper/sw_table1.csv",
        settings="reports/paper/sw_table8.csv",
    output:
        tables=[f"reports/{table}.{kind}" for table in COUNTED for kind in ("md", "csv")],
        figures=[f"reports/figures/slak/{name}" for name in ("fig4.csv", "fig4_macs.svg", "fig4_params.svg")],
        formulas="reports/table1.md",
        settings="reports/table8.md",
        index="reports/index.md",
    params:
        plan=[PARAMS.costs[table].model_dump_json() for table in COUNTED],
        rows=[PARAMS.identity(run, "paper") for run in PARAMS.settings.values()],
        code=[fingerprint(f"swconv.{module}") for module in ("analysis.kernels", *PAGES)],
    log:
        "logs/tables.log",
    shell:
        "python -m swconv tables --out reports 2>&1 | tee {log}"
