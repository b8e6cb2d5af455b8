# One model per row of params/runs.yaml and seed. Killed, it goes on from checkpoints/, which no rule owns.
RUN = "artifacts/{profile}/train/{run}/seed{seed}"


rule train:
    input:
        data=ancient(f"{DATA}/data.json"),
        manifest=f"{DATA}/manifest.csv.sha256",
        library=ancient(f"{BUILD}/build.json"),
        csrc=f"{BUILD}/csrc.meaning",
    output:
        metrics=f"{RUN}/metrics.json",
        run=f"{RUN}/run.json",
        log=f"{RUN}/log.jsonl",
        weights=f"{RUN}/weights.safetensors",
        digest=f"{RUN}/weights.safetensors.sha256",
    params:
        row=trained_row,
        code=fingerprint("swconv.training.loop", csrc=True),
        planned=planned("swconv.training.loop"),
        data=subpath(input.data, parent=True),
        out=subpath(output.metrics, parent=True),
    log:
        "logs/train/{profile}-{run}-seed{seed}.log",
    threads: machine_threads
    resources:
        gpu=machine_gpus,
    shell:
        "python -m swconv train {wildcards.run} --profile {wildcards.profile} --seed {wildcards.seed}"
        " --data {params.data} --out {params.out} --planned {params.planned} 2>&1 | tee {log}"


# A row that is the same experiment as an earlier one at this scale is not trained twice: it says so instead.
rule same_as:
    output:
        "artifacts/{profile}/{stage}/{run}/same_as.json",
    params:
        run=same_as,
    log:
        "logs/same_as/{profile}-{stage}-{run}.log",
    wildcard_constraints:
        stage="train|evaluate",
    shell:
        """echo '{{"same_as": "{params.run}"}}' > {output} 2> {log}"""
