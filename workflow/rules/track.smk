# A report's runs, replayed into MLflow: a view of artifacts/ that can be made again, so DVC does not keep it.
DATABASE = Path("mlflow.db")
SEEDS = " ".join(map(str, ACTIVE.seeds))


def results(*names):
    """Files of every run and seed behind the report; a row that is not trained at this scale only says so."""
    with one_sentence():
        rows = PARAMS.report_rows("table2")
        trained = PARAMS.trained(rows, ACTIVE.profile)
    stages = f"artifacts/{ACTIVE.profile}/{{stage}}/{{run}}"
    return [
        *(
            f"artifacts/{ACTIVE.profile}/{stage}/{run}/seed{seed}/{name}"
            for stage, name in (path.split("/") for path in names)
            for run in trained
            for seed in ACTIVE.seeds
        ),
        *expand(f"{stages}/same_as.json", stage=["train", "evaluate"], run=[run for run in rows if run not in trained]),
    ]


# A stamp claims that the runs are in the database.
if workflow.is_main_process and not DATABASE.exists():
    for stamp in Path("artifacts").glob("*/track/*.json"):
        stamp.unlink()


rule track:
    input:
        results("train/metrics.json", "train/run.json", "train/log.jsonl", "evaluate/metrics.json"),
    output:
        f"artifacts/{ACTIVE.profile}/track/table2.json",
    params:
        code=fingerprint("swconv.training.tracking"),
    log:
        f"logs/track/{ACTIVE.profile}-table2.log",
    shell:
        "{PYTHON:q} -m swconv track table2 --profile {ACTIVE.profile} --seeds {SEEDS} --out {output} 2>&1 | tee {log}"
