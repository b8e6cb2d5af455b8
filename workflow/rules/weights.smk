# A row with same_weights is not trained: it takes another row's weights, laid out for it, and how far the logits are apart
# stands in metrics.json.
CONVERTED = "artifacts/{profile}/weights/{run}/seed{seed}"


def source_of(name):
    """A file of the run whose weights a row takes."""

    def path(wildcards):
        with one_sentence():
            source = PARAMS.run(wildcards.run).same_weights
        if source is None:
            sys.exit(f"run {wildcards.run} is trained, not laid out: it has no same_weights in params/runs.yaml.")
        return f"{RUN}/{name}".format(profile=wildcards.profile, run=source, seed=wildcards.seed)

    return path


def weights_of(name):
    """A file of the weights that a run is evaluated with."""

    def path(wildcards):
        with one_sentence():
            laid_out = PARAMS.run(wildcards.run).same_weights is not None
        return f"{CONVERTED if laid_out else RUN}/{name}".format(**wildcards)

    return path


rule lay_out:
    input:
        weights=ancient(source_of("weights.safetensors")),
        digest=source_of("weights.safetensors.sha256"),
    output:
        weights=f"{CONVERTED}/weights.safetensors",
        digest=f"{CONVERTED}/weights.safetensors.sha256",
        metrics=f"{CONVERTED}/metrics.json",
    params:
        row=row,
        code=fingerprint("swconv.training.conversion", csrc=True),
        out=subpath(output.metrics, parent=True),
    log:
        "logs/lay_out/{profile}-{run}-seed{seed}.log",
    shell:
        "python -m swconv lay-out {wildcards.run} --profile {wildcards.profile} --seed {wildcards.seed}"
        " --weights {input.weights} --out {params.out} 2>&1 | tee {log}"
