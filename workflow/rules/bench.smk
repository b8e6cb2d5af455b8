# Images per second of whole networks on this machine, and the papers' throughput tables made of that. A record of another
# device (make gpu), reports/bench/throughput-<gpu>.json, gets a section of its own.
RECORD = "reports/bench/throughput-cpu.json"
SPEEDS = ("table7", "slak/table11", "slak/table12", "slak/fig4_right")


rule bench:
    output:
        RECORD,
    input:
        library=ancient(BUILD.format(profile=ACTIVE.profile) + "/build.json"),
    params:
        code=fingerprint("swconv.bench.throughput", csrc=True),
        out=subpath(RECORD, parent=True),
    log:
        "logs/bench.log",
    threads: workflow.cores
    shell:
        "python -m swconv bench throughput --out {params.out} 2>&1 | tee {log}"


rule throughput:
    input:
        records=sorted({RECORD, *map(str, Path("reports/bench").glob("throughput-*[!k].json"))}),     # no -quick ones
        claims=[f"reports/paper/{name}.csv" for name in ("sw_table7", "slak_table11", "slak_table12", "slak_fig4right")],
    output:
        tables=[f"reports/{page}.{kind}" for page in SPEEDS for kind in ("md", "csv")],
        figure="reports/figures/slak/fig4_right.svg",
    params:
        code=fingerprint("swconv.reporting.throughput"),
        accuracies=accuracies(),
    log:
        "logs/throughput.log",
    shell:
        "python -m swconv throughput {input.records} --out reports 2>&1 | tee {log}"
