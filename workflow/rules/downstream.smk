# Fine-tunes of params/downstream.yaml, from pretrained weights to the benchmark's measures, submission files and pictures.
#   snakemake --cores all artifacts/mini/downstream/ade_160k_sw_tiny/seed0/metrics.json
#   snakemake --cores all downstream_smoke          every task end to end, in two steps each
#   snakemake --cores all downstream_overfit        every task on its training images, into reports/downstream_overfit.md
#   snakemake --cores all artifacts/mini/track/downstream/ade_160k_sw_tiny/seed0.json    the same, shown by MLflow too
# A profile of that file names the profile that pretrains (`base`): its library, its weights, its machine.
from swconv import downstream_params

TINY = "artifacts/{profile}/downstream_data/{task}"
FINETUNED = "artifacts/{profile}/finetune/{run}/seed{seed}"
ASSESSED = "artifacts/{profile}/downstream/{run}/seed{seed}"
TRACKED = "artifacts/{profile}/track/downstream/{run}/seed{seed}.json"

with one_sentence():
    DOWNSTREAM = downstream_params.load(Path("params"), PARAMS)


def downstream_row(wildcards):
    """All that a fine-tune takes from params/, as text."""
    with one_sentence():
        return DOWNSTREAM.identity(wildcards.run, wildcards.profile)


def downstream_task(wildcards):
    """What a task's images are made from; stops where the user has to provide them and did not."""
    with one_sentence():
        DOWNSTREAM.check_data(wildcards.task, wildcards.profile)
        return json.dumps({key: value for key, value in DOWNSTREAM.of_task(wildcards.task, wildcards.profile).items()
                           if key != "workers"}, sort_keys=True)


def images_of(name):
    """A file of a run's images."""

    def path(wildcards):
        with one_sentence():
            task = DOWNSTREAM.run(wildcards.run).task
        return f"{TINY}/{name}".format(profile=wildcards.profile, task=task)

    return path


def built(name):
    """A file of the library of the profile that pretrains."""

    def path(wildcards):
        with one_sentence():
            return f"{BUILD}/{name}".format(profile=DOWNSTREAM.profile(wildcards.profile).base)

    return path


def pretrained(name):
    """A file of the weights that a fine-tune starts from; none where it starts from random ones."""

    def path(wildcards):
        with one_sentence():
            source, base = DOWNSTREAM.source(wildcards.run, wildcards.profile), DOWNSTREAM.profile(wildcards.profile).base
        if source is None:
            return []
        stage, run = source
        pattern = RUN if stage == "train" else TAKEN_IN
        return f"{pattern}/{name}".format(profile=base, run=run, name=run, seed=wildcards.seed)

    return path


def downstream_machine(key):
    """threads, or GPUs, of a fine-tune; `processes` share the work."""

    def value(wildcards):
        with one_sentence():
            machine = DOWNSTREAM.resolve(wildcards.run, wildcards.profile)["machine"]
        return {"threads": machine["threads"] * machine["processes"], "thread": machine["threads"],
                "gpus": machine["processes"] * (machine["device"] == "cuda"), "gpu": int(machine["device"] == "cuda")}[key]

    return value


def planned_downstream(module):
    code = fingerprint(module, csrc=True)
    return lambda wildcards: params_yaml.key(downstream_row(wildcards), "", code, int(wildcards.seed))


def examples(*names):
    """Files of the runs that try out the tasks, with seed 0."""
    return lambda wildcards: [each.format(profile=wildcards.profile, run=run, seed=0)
                              for run in DOWNSTREAM.examples.values() for each in names]


rule downstream_data:
    output:
        data=f"{TINY}/data.json",
        manifest=f"{TINY}/manifest.csv",
        digest=f"{TINY}/manifest.csv.sha256",
    params:
        task=downstream_task,
        code=fingerprint("swconv.downstream.sources"),
        out=subpath(output.data, parent=True),
    log:
        "logs/downstream_data/{profile}-{task}.log",
    wildcard_constraints:
        task="|".join(DOWNSTREAM.examples),
    shell:
        "python -m swconv downstream-data {wildcards.task} --profile {wildcards.profile} --out {params.out} 2>&1 | tee {log}"


# As rule train: killed it resumes, asked to stop it ends with exit code 85, diverged it says so in its metrics.
rule finetune:
    input:
        data=ancient(images_of("data.json")),
        manifest=images_of("manifest.csv.sha256"),
        library=ancient(built("build.json")),
        csrc=built("csrc.meaning"),
        init=ancient(pretrained("weights.safetensors")),
        init_digest=pretrained("weights.safetensors.sha256"),
    output:
        metrics=f"{FINETUNED}/metrics.json",
        run=f"{FINETUNED}/run.json",
        log=f"{FINETUNED}/log.jsonl",
        weights=f"{FINETUNED}/weights.safetensors",
        digest=f"{FINETUNED}/weights.safetensors.sha256",
    params:
        row=downstream_row,
        code=fingerprint("swconv.downstream.finetuning", csrc=True),
        planned=planned_downstream("swconv.downstream.finetuning"),
        data=subpath(input.data, parent=True),
        out=subpath(output.metrics, parent=True),
        init=lambda wildcards, input: f"--init {input.init}" if input.init else "",
    log:
        "logs/finetune/{profile}-{run}-seed{seed}.log",
    threads: downstream_machine("threads")
    resources:
        gpu=downstream_machine("gpus"),
    shell:
        "trap : TERM USR1; python -m swconv finetune {wildcards.run} --profile {wildcards.profile} --seed {wildcards.seed}"
        " --data {params.data} --out {params.out} {params.init} --planned {params.planned}"
        " 2>&1 | (trap '' TERM USR1; exec tee {log})"


rule assess:
    input:
        data=ancient(images_of("data.json")),
        manifest=images_of("manifest.csv.sha256"),
        library=ancient(built("build.json")),
        csrc=built("csrc.meaning"),
        weights=ancient(f"{FINETUNED}/weights.safetensors"),
        digest=f"{FINETUNED}/weights.safetensors.sha256",
    output:
        metrics=f"{ASSESSED}/metrics.json",
        run=f"{ASSESSED}/run.json",
        detections=directory(f"{ASSESSED}/detections"),
    params:
        row=downstream_row,
        code=fingerprint("swconv.downstream.evaluation", csrc=True),
        planned=planned_downstream("swconv.downstream.evaluation"),
        data=subpath(input.data, parent=True),
        out=subpath(output.metrics, parent=True),
    log:
        "logs/assess/{profile}-{run}-seed{seed}.log",
    threads: downstream_machine("thread")
    resources:
        gpu=downstream_machine("gpu"),
    shell:
        "python -m swconv assess {wildcards.run} --profile {wildcards.profile} --seed {wildcards.seed}"
        " --data {params.data} --weights {input.weights} --out {params.out} --planned {params.planned} 2>&1 | tee {log}"


# SW Figure 7.
rule pictures:
    input:
        data=ancient(images_of("data.json")),
        manifest=images_of("manifest.csv.sha256"),
        library=ancient(built("build.json")),
        csrc=built("csrc.meaning"),
        weights=ancient(f"{FINETUNED}/weights.safetensors"),
        digest=f"{FINETUNED}/weights.safetensors.sha256",
    output:
        directory(f"{ASSESSED}/pictures"),
    params:
        row=downstream_row,
        pictures=lambda wildcards: DOWNSTREAM.profile(wildcards.profile).pictures,
        code=fingerprint("swconv.downstream.evaluation", csrc=True),
        data=subpath(input.data, parent=True),
    log:
        "logs/pictures/{profile}-{run}-seed{seed}.log",
    threads: downstream_machine("thread")
    resources:
        gpu=downstream_machine("gpu"),
    shell:
        "python -m swconv pictures {wildcards.run} --profile {wildcards.profile} --data {params.data}"
        " --weights {input.weights} --out {output} 2>&1 | tee {log}"


# As rule track: one fine-tune, in the experiment of its task.
rule track_downstream:
    input:
        f"{FINETUNED}/metrics.json",
        f"{FINETUNED}/run.json",
        f"{FINETUNED}/log.jsonl",
        f"{ASSESSED}/metrics.json",
    output:
        TRACKED,
    params:
        code=fingerprint("swconv.training.tracking"),
    log:
        "logs/track_downstream/{profile}-{run}-seed{seed}.log",
    shell:
        "python -m swconv track-downstream {wildcards.run} --profile {wildcards.profile} --seed {wildcards.seed}"
        " --out {output} 2>&1 | tee {log}"


rule downstream_table:
    input:
        examples(f"{FINETUNED}/metrics.json", f"{FINETUNED}/run.json", f"{ASSESSED}/metrics.json", f"{ASSESSED}/run.json"),
        tracked=examples(TRACKED),
    output:
        "artifacts/{profile}/downstream/examples.md",
    params:
        rows=lambda wildcards: [DOWNSTREAM.examples, DOWNSTREAM.profile(wildcards.profile).targets],
        code=fingerprint("swconv.reporting.downstream_examples"),
    log:
        "logs/downstream_table/{profile}.log",
    shell:
        # a target that is missed is told, and the page stays
        "python -m swconv downstream-table --profile {wildcards.profile} --seed 0 --out {output} 2>&1 | tee {log}"
        " || test -s {output}"


rule downstream_overfit:
    input:
        "artifacts/overfit/downstream/examples.md",
    output:
        "reports/downstream_overfit.md",
    log:
        "logs/downstream_overfit.log",
    shell:
        "cp {input} {output} 2> {log}"


rule downstream_smoke:
    input:
        "artifacts/smoke/downstream/examples.md",
        [f"{ASSESSED}/pictures".format(profile="smoke", run=run, seed=0) for run in DOWNSTREAM.examples.values()],
