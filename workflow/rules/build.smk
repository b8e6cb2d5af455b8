# The compiled operator of this machine. Building it again must not train again, unless the sources mean something else:
# whoever loads it takes its record as ancient, and beside it `meaning`, which Snakemake compares by content.
BUILD = "artifacts/{profile}/build"


rule build:
    output:
        record=f"{BUILD}/build.json",
        meaning=f"{BUILD}/csrc.meaning",
    params:
        code=CSRC,
    log:
        "logs/build/{profile}.log",
    threads: workflow.cores
    shell:
        "python -m swconv build --out {output.record} 2>&1 | tee {log} && echo {params.code} > {output.meaning}"
