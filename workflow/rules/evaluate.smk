# A trained run on the validation images, with its branches merged and by distance. The weights are taken as ancient
# and their digest by content: DVC gives large files a new date, which means nothing.
EVALUATION = "artifacts/{profile}/evaluate/{run}/seed{seed}"


rule evaluate:
    input:
        data=ancient(f"{DATA}/data.json"),
        manifest=f"{DATA}/manifest.csv.sha256",
        library=ancient(f"{BUILD}/build.json"),
        csrc=f"{BUILD}/csrc.meaning",
        weights=ancient(weights_of("weights.safetensors")),
        digest=weights_of("weights.safetensors.sha256"),
    output:
        metrics=f"{EVALUATION}/metrics.json",
        run=f"{EVALUATION}/run.json",
    params:
        row=row,
        code=fingerprint("swconv.training.evaluation", csrc=True),
        planned=planned("swconv.training.evaluation"),
        data=subpath(input.data, parent=True),
        out=subpath(output.metrics, parent=True),
    log:
        "logs/evaluate/{profile}-{run}-seed{seed}.log",
    threads: machine_threads
    resources:
        gpu=machine_gpus,
    shell:
        "python -m swconv evaluate {wildcards.run} --profile {wildcards.profile} --seed {wildcards.seed}"
        " --data {params.data} --weights {input.weights} --out {params.out} --planned {params.planned} 2>&1 | tee {log}"
