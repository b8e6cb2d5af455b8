# A trained run with the statistics of its BatchNorms computed anew over the training images; accuracy before and after.
CALIBRATION = "artifacts/{profile}/calibrate/{run}/seed{seed}"


def passes(wildcards):
    """How many times the images are seen: no part of a row's identity, for it changes no training."""
    with one_sentence():
        return PARAMS.resolve(wildcards.run, wildcards.profile)["recipe"]["calibration_passes"]


def planned_calibration(wildcards):
    code = fingerprint("swconv.training.calibration", csrc=True)
    return params_yaml.key(f"{row(wildcards)}{passes(wildcards)}", "", code, int(wildcards.seed))


rule calibrate:
    input:
        data=ancient(f"{DATA}/data.json"),
        manifest=f"{DATA}/manifest.csv.sha256",
        library=ancient(f"{BUILD}/build.json"),
        csrc=f"{BUILD}/csrc.meaning",
        weights=ancient(weights_of("weights.safetensors")),
        digest=weights_of("weights.safetensors.sha256"),
    output:
        metrics=f"{CALIBRATION}/metrics.json",
        run=f"{CALIBRATION}/run.json",
        weights=f"{CALIBRATION}/weights.safetensors",
        digest=f"{CALIBRATION}/weights.safetensors.sha256",
    params:
        row=row,
        passes=passes,
        code=fingerprint("swconv.training.calibration", csrc=True),
        planned=planned_calibration,
        data=subpath(input.data, parent=True),
        out=subpath(output.metrics, parent=True),
    log:
        "logs/calibrate/{profile}-{run}-seed{seed}.log",
    threads: machine_threads
    resources:
        gpu=machine_gpus,
    shell:
        "python -m swconv calibrate {wildcards.run} --profile {wildcards.profile} --seed {wildcards.seed}"
        " --data {params.data} --weights {input.weights} --out {params.out} --planned {params.planned} 2>&1 | tee {log}"
