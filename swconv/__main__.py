"""One verb per rule: `python -m swconv VERB`. Heavy imports wait until a verb needs them, so that --help answers at once."""

import argparse
import logging
import os
import sys
from pathlib import Path

PARAMS = Path("params")
CHECKPOINTS = Path("checkpoints")
DATABASE = Path("mlflow.db")
PAPER = Path("reports/paper")


def build(args: argparse.Namespace) -> None:
    from swconv import build as builder

    builder.build(args.out)


def bench(args: argparse.Namespace) -> None:
    from swconv.bench import operator

    {"operator": operator.run}[args.suite](args.out, args.device, args.quick)


def data(args: argparse.Namespace) -> None:
    from swconv import params
    from swconv.training import manifest

    dataset = params.load(PARAMS).profile(args.profile).dataset
    record = manifest.prepare(dataset.model_dump(exclude_none=True), args.out)
    logging.info("%s: %d training and %d validation images", args.out, record["n_train"], record["n_val"])


def train(args: argparse.Namespace) -> None:
    from swconv import params
    from swconv.training import loop

    params.load(PARAMS).check_trainable(args.run)
    record = _record(args, "swconv.training.loop")
    loop.train(record["config"], args.data, args.out, CHECKPOINTS / record["key"], record, args.log_every)


def evaluate(args: argparse.Namespace) -> None:
    from swconv.training import evaluation

    record = _record(args, "swconv.training.evaluation")
    evaluation.evaluate(record["config"], args.data, args.weights, args.out, record)


def lay_out(args: argparse.Namespace) -> None:
    from swconv import params
    from swconv.training import conversion

    known = params.load(PARAMS)
    source = known.run(args.run).same_weights
    if source is None:
        raise ValueError(f"run {args.run} has no same_weights in params/runs.yaml: it is trained, not laid out.")
    conversion.convert_run(known.resolve(source, args.profile), known.resolve(args.run, args.profile), args.weights, args.out,
                           args.seed)


def track(args: argparse.Namespace) -> None:
    from swconv import atomic, params
    from swconv.training import tracking

    known = params.load(PARAMS)
    runs = [
        tracking.RunFiles(run, seed, _folder(args, "train", run, seed), _folder(args, "evaluate", run, seed))
        for run in known.trained(known.report_rows(args.report), args.profile) for seed in args.seeds
    ]
    atomic.write_json(args.out, tracking.replay(args.report, runs, DATABASE))


def report(args: argparse.Namespace) -> None:
    from swconv import params
    from swconv.reporting.comparison import Control, Row
    from swconv.reporting.table2 import build_table2

    known = params.load(PARAMS)
    known.profile(args.profile)
    ids, plan = known.report_rows(args.report), known.reports[args.report]
    rows = [Row(run=run, label=known.runs[run].label, model=known.runs[run].text,
                same_as={profile: known.same_as(run, profile, ids) for profile in known.profiles}) for run in plan.rows]
    controls = [Control(run=run, model=known.runs[run].text, of=known.base(run, plan.rows)) for run in plan.controls]
    proxy, imagenet = ("mini", "paper") if args.profile in ("mini", "paper") else (args.profile, None)
    build_table2(rows, controls, _evidence(args, proxy, ids), args.out,
                 command=f"snakemake --cores all {args.out / args.report}.md",
                 imagenet=imagenet and _evidence(args, imagenet, ids))


def cost(args: argparse.Namespace) -> None:
    import json

    from swconv.analysis.cost import count, table

    counts = count(args.model, args.input, args.sparsity, args.counting, _model_arguments(args.set))
    sys.stdout.write((json.dumps(counts, indent=2) if args.json else table(counts)) + "\n")


def tables(args: argparse.Namespace) -> None:
    from swconv import params
    from swconv.analysis.cost import cost as count
    from swconv.analysis.kernels import curves
    from swconv.reporting.costs import build_cost_table, build_figure4, build_index
    from swconv.reporting.formulas import build_table1
    from swconv.reporting.recipes import build_table8

    known = params.load(PARAMS)
    tables = known.costs
    wanted = {key: each for table in tables.values() for key, each in table.counted.items()}
    counts = {}
    for key, each in wanted.items():
        found = count(each.model, each.input, each.form, each.sparsity, each.counting, **each.args)
        counts[key] = {"params": found.params, "macs": found.macs}
    plain = {name: table.plain() for name, table in tables.items()}
    for name, table in plain.items():
        build_cost_table(table, counts, PAPER, args.out / f"{name}.md", f"snakemake --cores all {args.out / name}.md")
    build_figure4(curves(), args.out / "figures/slak")
    build_table1(PAPER / "sw_table1.csv", args.out / "table1.md", f"snakemake --cores all {args.out}/table1.md")
    configs = {column: known.resolve(run, "paper") | {"id": run} for column, run in known.settings.items()}
    command = f"snakemake --cores all {args.out}/table8.md"
    score = build_table8(configs, PAPER / "sw_table8.csv", args.out / "table8.md", command)
    build_index(plain, counts, {"sw_table8.csv": ("table8", "SW Table 8: training settings", score)}, PAPER,
                args.out / "index.md")


def convert(args: argparse.Namespace) -> None:
    from swconv import weights

    told = weights.convert(args.source, args.model, args.out, _model_arguments(args.set), args.laid_out, args.sha256)
    logging.info("wrote %s: %s", args.out, ", ".join(f"{key} {value}" for key, value in told.items()))


def ui(args: argparse.Namespace) -> None:
    from swconv.training import tracking

    command = tracking.ui_command(DATABASE, tracking.REFILL)
    for title, page in tracking.comparisons(DATABASE).items():
        logging.info("%s, all rows compared: %s", title, page)
    os.execvp(command[0], command)


def _model_arguments(pairs: list[str]) -> dict:
    """`width_factor=1.5` and the like, values as in YAML."""
    import yaml

    for pair in pairs:
        if "=" not in pair:
            raise ValueError(f"--set needs name=value, as in width_factor=1.5, got {pair}.")
    return {name: yaml.safe_load(value) for name, value in (pair.split("=", 1) for pair in pairs)}


def _evidence(args: argparse.Namespace, profile: str, runs: list[str]):
    """The seeds asked for; of the profile that was not asked for those on disk, so that its columns stay as they are."""
    from swconv.reporting.runs import Evidence

    asked = Evidence(profile, tuple(args.seeds))
    found = asked if profile == args.profile else Evidence.on_disk(profile, runs)
    return found if found.seeds else asked


def _folder(args: argparse.Namespace, stage: str, run: str, seed: int) -> Path:
    return Path("artifacts") / args.profile / stage / run / f"seed{seed}"


def _record(args: argparse.Namespace, module: str) -> dict:
    """Circumstances of a run, under its key."""
    from swconv import fingerprint, params
    from swconv.training import loop, manifest, record

    known = params.load(PARAMS)
    config, identity = known.resolve(args.run, args.profile), known.identity(args.run, args.profile)
    code = fingerprint.fingerprint(module, csrc=True)
    if args.planned not in (None, params.key(identity, "", code, args.seed)):
        raise ValueError("csrc/, params/ or swconv/ changed since this run was planned; repeat the command.")
    loop.prepare_machine(config["machine"])                           # the record tells the flags that hold
    data_sha256 = manifest.read(args.data)["manifest_sha256"]
    return record.circumstances(key=params.key(identity, data_sha256, code, args.seed), run=args.run, profile=args.profile,
                                seed=args.seed, code=code, config=config, data_sha256=data_sha256)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m swconv", description="ShiftwiseConv and SLaK, stage by stage.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(function, summary: str, *arguments: str) -> None:
        sub = verbs.add_parser(function.__name__.replace("_", "-"), help=summary, description=summary)
        sub.set_defaults(function=function)
        for name in arguments:
            sub.add_argument(name, **_ARGUMENTS[name])

    verb(build, "compile csrc/ and record how", "--out")
    verb(bench, "time the operator against its rivals and write a report", "suite", "--device", "--quick", "--out")
    verb(data, "make or check a profile's images and write their manifest", "--profile", "--out")
    verb(train, "train one run; a killed training resumes", "run", "--profile", "--seed", "--data", "--out", "--planned",
         "--log-every")
    verb(evaluate, "measure trained weights, in training form and merged", "run", "--profile", "--seed", "--data",
         "--weights", "--out", "--planned")
    verb(lay_out, "cut a trained SLaK's strips into squares for a row with same_weights", "run", "--profile", "--seed",
         "--weights", "--out")
    verb(track, "replay the runs of a report into MLflow", "report", "--profile", "--seeds", "--out")
    verb(report, "write a table with its figure and provenance", "report", "--profile", "--seeds", "--out")
    verb(cost, "count a model's parameters and multiply-adds", "model", "--input", "--sparsity", "--counting", "--set",
         "--json")
    verb(tables, "write the tables that need no training: parameters, FLOPs and settings", "--out")
    verb(convert, "write a published checkpoint as safetensors under our names", "source", "--model", "--laid-out", "--sha256",
         "--set", "--out")
    verb(ui, "open the MLflow pages")
    return parser


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"a whole number from 0 to {2**32 - 1} is needed, got {text}")
    return int(text)


_ARGUMENTS = {
    "run": {"help": "id of a row of params/runs.yaml, e.g. sw11"},
    "report": {"help": "id of a report of params/runs.yaml, e.g. table2"},
    "model": {"help": "timm's name of a model, e.g. sw_tiny"},
    "source": {"type": Path, "help": "checkpoint of the released code (.pth, .safetensors)"},
    "--model": {"required": True, "help": "timm's name of our model, e.g. slak_tiny"},
    "--set": {"nargs": "*", "default": [], "metavar": "NAME=VALUE", "help": "arguments of the model, e.g. width_factor=1.5"},
    "--input": {"type": int, "default": 224, "help": "side of the image, in pixels"},
    "--sparsity": {"type": float, "default": 0.0, "help": "share of every weight matrix and kernel that is masked"},
    "--counting": {"choices": ["papers", "thop"], "default": "papers", "help": "thop adds four per element of a BatchNorm"},
    "--json": {"action": "store_true"},
    "--laid-out": {"action": "store_true", "help": "cut SLaK's strips into squares, for the model with laid_out=True"},
    "--sha256": {"help": "of the source; another one is refused"},
    "suite": {"choices": ["operator"], "help": "what to measure"},
    "--device": {"choices": ["cpu", "cuda"], "default": "cpu"},
    "--quick": {"action": "store_true", "help": "tiny maps, a few rounds: only to see that it runs"},
    "--profile": {"required": True, "help": "scale: a file of params/profiles/"},
    "--seed": {"required": True, "type": _seed},
    "--seeds": {"required": True, "type": _seed, "nargs": "+"},
    "--data": {"required": True, "type": Path, "help": "folder with data.json"},
    "--weights": {"required": True, "type": Path},
    "--out": {"required": True, "type": Path, "help": "where the results go"},
    "--planned": {"metavar": "KEY", "help": "from Snakemake: refuse where params or code are not those it planned with"},
    "--log-every": {"type": int, "default": os.environ.get("SWCONV_LOG_EVERY", "0"), "metavar": "STEPS",
                    "help": "also log every so many steps; SWCONV_LOG_EVERY sets it under Snakemake"},
}


def main(argv: list[str] | None = None) -> int:
    """Run a verb. Expected faults end in one sentence on stderr and exit code 1."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        args.function(args)
    except (OSError, ValueError, RuntimeError) as error:
        sys.stderr.write(f"swconv {args.verb}: {_sentence(error)}\n")
        return 1
    return 0


def _sentence(error: Exception) -> str:
    """Our own faults are told as they are; what the system refused, with what to do."""
    if not (isinstance(error, OSError) and error.strerror):
        return str(error)
    return (f"{error.filename or 'a file'} needs to be there and open to you, got '{error.strerror}'. "
            "Check the path, its owner and the free space, then run the same command again.")


if __name__ == "__main__":
    sys.exit(main())
