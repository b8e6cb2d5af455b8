# The compiled operator of this machine. Whoever loads it takes its record as ancient, because building again must not
# train again, and `meaning`, which changes with the sources alone and which Snakemake compares by content.
BUILD = "artifacts/{profile}/build"


rule build:
    output:
        record=f"{BUILD}/build.json",
        meaning=f"{BUILD}/csrc.meaning",
    params:
        code=fingerprint("swconv.build", csrc=True),
        csrc=fingerprint("swconv.build", csrc=True),
    log:
        "logs/build/{profile}.log",
    threads: workflow.cores
    shell:
        "{PYTHON:q} -m swconv build --out {output.record} 2>&1 | tee {log}"
        " && echo {params.csrc} > {output.meaning}"
