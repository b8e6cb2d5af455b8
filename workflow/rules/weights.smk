# Weights that are not trained here or not as they are: of a row with same_weights, which takes another row's, laid out for
# it; and published ones (params/weights.yaml). How far the logits are apart stands in metrics.json.
import re

CONVERTED = "artifacts/{profile}/weights/{run}/seed{seed}"
TAKEN_IN = "artifacts/{profile}/weights/{name}"
RELEASED = "artifacts/{profile}/released/{name}"
DOWNLOADED = [row.path for row in PARAMS.weights.values() if row.url]


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


def published_file(wildcards):
    """The published file; stops where it is not there and cannot be downloaded."""
    with one_sentence():
        PARAMS.check_weights(wildcards.name)
    return PARAMS.weights[wildcards.name].path


def address(wildcards):
    """From where and as what a published file is downloaded."""
    row = next(row for row in PARAMS.weights.values() if row.path == wildcards.path and row.url)
    return f"{row.url} {row.sha256}"


def registered(wildcards):
    """All that taking in published weights depends on but for their bytes, which come as an input."""
    with one_sentence():
        taken = PARAMS.released(wildcards.name, wildcards.profile)
    sight = {key: taken["dataset"][key] for key in ("num_classes", "in_chans", "image_size")}
    return json.dumps([taken["model"], taken["file"], sight])


def measured(wildcards):
    with one_sentence():
        return PARAMS.released_identity(wildcards.name, wildcards.profile)


def planned_released(wildcards):
    code = fingerprint("swconv.training.released", csrc=True)
    return params_yaml.key(measured(wildcards), "", code, 0)


def at_hand(wildcards):
    """The accuracies of all published weights whose files are there or can be downloaded."""
    names = [name for name, row in PARAMS.weights.items() if row.url or Path(row.path).is_file()]
    if not names:
        with one_sentence():
            PARAMS.check_weights(next(iter(PARAMS.weights)))
    return [f"{RELEASED}/metrics.json".format(profile=ACTIVE.profile, name=name) for name in names]


rule lay_out:
    input:
        data=ancient(f"{DATA}/data.json"),
        manifest=f"{DATA}/manifest.csv.sha256",
        library=ancient(f"{BUILD}/build.json"),
        csrc=f"{BUILD}/csrc.meaning",
        weights=ancient(source_of("weights.safetensors")),
        digest=source_of("weights.safetensors.sha256"),
    output:
        weights=f"{CONVERTED}/weights.safetensors",
        digest=f"{CONVERTED}/weights.safetensors.sha256",
        metrics=f"{CONVERTED}/metrics.json",
    params:
        row=row,
        code=fingerprint("swconv.training.conversion", csrc=True),
        planned=planned("swconv.training.conversion"),
        data=subpath(input.data, parent=True),
        out=subpath(output.metrics, parent=True),
    log:
        "logs/lay_out/{profile}-{run}-seed{seed}.log",
    threads: machine_threads
    resources:
        gpu=machine_gpus,
    shell:
        "python -m swconv lay-out {wildcards.run} --profile {wildcards.profile} --seed {wildcards.seed}"
        " --data {params.data} --weights {input.weights} --out {params.out} --planned {params.planned} 2>&1 | tee {log}"


# Only where a row gives a url. update, because a file that is there must stay where the download fails.
rule fetch:
    output:
        update("{path}"),
    params:
        address=address,
        name=lambda wildcards: next(name for name, row in PARAMS.weights.items() if row.path == wildcards.path and row.url),
    log:
        "logs/fetch/{path}.log",
    wildcard_constraints:
        path="|".join(map(re.escape, DOWNLOADED)) or "(?!)",
    shell:
        "python -m swconv fetch {params.name} 2>&1 | tee {log}"


rule convert:
    input:
        published_file,
    output:
        weights=f"{TAKEN_IN}/weights.safetensors",
        digest=f"{TAKEN_IN}/weights.safetensors.sha256",
        metrics=f"{TAKEN_IN}/metrics.json",
    params:
        row=registered,
        code=fingerprint("swconv.training.released", csrc=True),
        out=subpath(output.metrics, parent=True),
    log:
        "logs/convert/{profile}-{name}.log",
    wildcard_constraints:
        name="[^/]+",
    shell:
        "python -m swconv convert-released {wildcards.name} --profile {wildcards.profile} --out {params.out} 2>&1 | tee {log}"


rule evaluate_released:
    input:
        data=ancient(f"{DATA}/data.json"),
        manifest=f"{DATA}/manifest.csv.sha256",
        library=ancient(f"{BUILD}/build.json"),
        csrc=f"{BUILD}/csrc.meaning",
        weights=ancient(f"{TAKEN_IN}/weights.safetensors"),
        digest=f"{TAKEN_IN}/weights.safetensors.sha256",
    output:
        metrics=f"{RELEASED}/metrics.json",
        run=f"{RELEASED}/run.json",
    params:
        row=measured,
        code=fingerprint("swconv.training.released", csrc=True),
        planned=planned_released,
        data=subpath(input.data, parent=True),
        out=subpath(output.metrics, parent=True),
    log:
        "logs/released/{profile}-{name}.log",
    wildcard_constraints:
        name="[^/]+",
    threads: machine_threads
    resources:
        gpu=machine_gpus,
    shell:
        "python -m swconv evaluate-released {wildcards.name} --profile {wildcards.profile} --data {params.data}"
        " --weights {input.weights} --out {params.out} --planned {params.planned} 2>&1 | tee {log}"


# What a user types who put some files there: snakemake --cores all released --config profile=paper
rule released:
    input:
        at_hand,
