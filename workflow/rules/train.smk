# One model per row of params/runs.yaml and seed. Killed, it goes on from checkpoints/, which no rule owns. Asked to stop
# (SIGTERM, SIGUSR1), it saves its state and ends with exit code 85: a failed job, which the same command takes up again.
# The traps are for a request that reaches the whole group: shell and tee outlive the training, and tell how it ended.
# A training that diverges is a result, too: its metrics say at which step, and its cells in the reports.
RUN = "artifacts/{profile}/train/{run}/seed{seed}"


def start_of(name):
    """A file of the weights that a run starts from; none where it starts from random ones."""

    def path(wildcards):
        with one_sentence():
            source = PARAMS.source(wildcards.run)
        return f"{RUN}/{name}".format(profile=wildcards.profile, run=source, seed=wildcards.seed) if source else []

    return path


def training_threads(wildcards):
    """Of all processes of a training."""
    return machine_threads(wildcards) * PARAMS.profiles[wildcards.profile].machine.processes


def training_gpus(wildcards):
    return PARAMS.profiles[wildcards.profile].gpus


rule train:
    input:
        data=ancient(f"{DATA}/data.json"),
        manifest=f"{DATA}/manifest.csv.sha256",
        library=ancient(f"{BUILD}/build.json"),
        csrc=f"{BUILD}/csrc.meaning",
        init=ancient(start_of("weights.safetensors")),
        init_digest=start_of("weights.safetensors.sha256"),
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
        init=lambda wildcards, input: f"--init {input.init}" if input.init else "",
    log:
        "logs/train/{profile}-{run}-seed{seed}.log",
    threads: training_threads
    resources:
        gpu=training_gpus,
    shell:
        "trap : TERM USR1; python -m swconv train {wildcards.run} --profile {wildcards.profile} --seed {wildcards.seed}"
        " --data {params.data} --out {params.out} {params.init} --planned {params.planned}"
        " 2>&1 | (trap '' TERM USR1; exec tee {log})"


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
