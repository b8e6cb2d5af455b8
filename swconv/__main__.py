"""One verb per rule: `python -m swconv VERB`. Heavy imports wait until a verb needs them, so that --help answers at once."""

import argparse
import logging
import os
import sys
from contextlib import suppress
from pathlib import Path

PARAMS = Path("params")
CHECKPOINTS = Path("checkpoints")
DATABASE = Path("mlflow.db")
PAPER = Path("reports/paper")


def build(args: argparse.Namespace) -> None:
    from swconv import build as builder

    builder.build(args.out)


def bench(args: argparse.Namespace) -> None:
    from importlib import import_module

    more = {}
    if args.suite == "training":
        more["rows"] = {}
    if args.suite == "training" and args.device == "cpu":
        from swconv import params

        known = params.load(PARAMS)
        more["rows"] = {profile: known.resolve("sw24", profile) for profile in ("mini", "paper")}
    import_module(f"swconv.bench.{args.suite}").run(args.out, args.device, args.quick, **more)


def data(args: argparse.Namespace) -> None:
    from swconv import params
    from swconv.training import manifest, reduced

    known = params.load(PARAMS)
    dataset = known.profile(args.profile).dataset.model_dump(exclude_none=True)
    record = manifest.prepare(dataset, args.out)
    try:
        known.check_images(args.profile, record["n_train"], record["n_val"])
    except params.ParamsError:
        (args.out / "data.json").unlink()                             # nothing trains without it
        raise
    if "cache_px" in dataset:
        reduced.build(dataset, args.out)
    logging.info("%s: %d training and %d validation images", args.out, record["n_train"], record["n_val"])


def train(args: argparse.Namespace) -> int:
    from swconv.training import stop

    with stop.requests() as asked:                                    # from here on a request to stop loses nothing
        from swconv import params
        from swconv.training import distributed, loop

        known = params.load(PARAMS)
        known.check_trainable(args.run)
        known.check_init(args.run, args.init)
        processes = known.profile(args.profile).machine.processes
        if processes > 1 and not distributed.started():
            return distributed.launch(args.argv, processes, asked)
        if distributed.rank():
            logging.getLogger().setLevel(logging.WARNING)
        record = _record(args, "swconv.training.loop", init=args.init)
        loop.train(record["config"], args.data, args.out, CHECKPOINTS / record["key"], record, args.log_every, args.init, asked)
    return 0


def evaluate(args: argparse.Namespace) -> None:
    from swconv.training import evaluation

    record = _record(args, "swconv.training.evaluation")
    evaluation.evaluate(record["config"], args.data, args.weights, args.out, record)


def calibrate(args: argparse.Namespace) -> None:
    from swconv import params
    from swconv.training import calibration

    known = params.load(PARAMS)
    config = known.resolve(args.run, args.profile)
    passes = config["recipe"]["calibration_passes"]
    record = _record(args, "swconv.training.calibration", config, f"{known.identity(args.run, args.profile)}{passes}")
    calibration.calibrate(config, args.data, args.weights, args.out, record)


def lay_out(args: argparse.Namespace) -> None:
    from swconv import fingerprint, params
    from swconv.training import conversion

    known = params.load(PARAMS)
    source = known.run(args.run).same_weights
    if source is None:
        raise ValueError(f"run {args.run} has no same_weights in params/runs.yaml: it is trained, not laid out.")
    code = fingerprint.fingerprint("swconv.training.conversion", csrc=True)
    _check_planned(args, known.identity(args.run, args.profile), code)
    conversion.convert_run(known.resolve(source, args.profile), known.resolve(args.run, args.profile), args.data, args.weights,
                           args.out, args.seed)


def fetch(args: argparse.Namespace) -> None:
    from swconv import params, weights

    row = params.load(PARAMS).published(args.name)
    if row.url is None:
        raise ValueError(f"weights {args.name} have no url in params/weights.yaml. Give one there, or get the file from "
                         f"{row.source} and put it at {row.path}.")
    logging.info("%s: sha256 %s", row.path, weights.fetch(row.url, Path(row.path), row.sha256))


def convert_released(args: argparse.Namespace) -> None:
    from swconv import params
    from swconv.training import released

    known = params.load(PARAMS)
    known.check_weights(args.name)
    released.convert_released(args.name, known.released(args.name, args.profile), args.out)


def evaluate_released(args: argparse.Namespace) -> None:
    from swconv import params
    from swconv.training import released

    known = params.load(PARAMS)
    config, identity = known.released(args.name, args.profile), known.released_identity(args.name, args.profile)
    args.run, args.seed = args.name, 0
    record = _record(args, "swconv.training.released", config, identity)
    released.evaluate_released(config, args.data, args.weights, args.out, record)


def plan(args: argparse.Namespace) -> None:
    import json

    from swconv.downstream_plan import plan as reckon
    from swconv.plan import table

    found = reckon(_downstream(), args.target, args.profile)
    sys.stdout.write((json.dumps(found.plain(), indent=2) if args.json else table(found)) + "\n")


def track(args: argparse.Namespace) -> None:
    from swconv import atomic, params
    from swconv.training import tracking

    known = params.load(PARAMS)
    runs = [
        tracking.RunFiles(run, seed, _folder(args, "train", run, seed), _folder(args, "evaluate", run, seed))
        for run in known.trained(known.report_rows(args.report), args.profile) if not known.runs[run].same_weights
        for seed in args.seeds
    ]
    atomic.write_json(args.out, tracking.replay(args.report, runs, DATABASE))


def track_downstream(args: argparse.Namespace) -> None:
    from swconv import atomic
    from swconv.reporting.downstream_examples import HEADLINE, equal_seeds
    from swconv.training import tracking

    task = _downstream().run(args.row).task
    folders = [Path("artifacts", args.profile, stage, args.row) for stage in ("finetune", "downstream")]
    runs = [tracking.RunFiles(args.row, seed, *(folder / f"seed{seed}" for folder in folders))
            for seed in equal_seeds(*folders, args.seed)]
    atomic.write_json(args.out, tracking.replay(f"downstream/{task}", runs, DATABASE, HEADLINE[task][0]))


def report(args: argparse.Namespace) -> None:
    from swconv import params
    from swconv.reporting import costs, formulas
    from swconv.reporting.report import build_report

    known = params.load(PARAMS)
    known.profile(args.profile)
    plan, counted = known.report(args.report), known.costs.get(args.report)
    extra = [formulas.section(PAPER / plan.claims)] if "formulas" in plan.sections else []
    if counted:
        extra.append(costs.counts_section(counted.columns, Path("reports") / f"{args.report}_counts.csv"))
    proxy, imagenet = ("mini", "paper") if args.profile in ("mini", "paper") else (args.profile, None)
    build_report(
        _page(known, args.report), _evidence(args, proxy), args.out,
        command=f"snakemake --cores all {args.out / args.report}.md", imagenet=imagenet and _evidence(args, imagenet),
        published=_published(known) if imagenet else None, extra=extra,
    )


def _published(known):
    """Accuracies of published weights, by cell; without those of the runs that train such weights, which pages show anyway."""
    from swconv.reporting.accuracies import read_accuracies

    return read_accuracies({name: row.model_dump(mode="json") | {"run": None} for name, row in known.weights.items()}, PAPER)


def _page(known, name: str):
    """A report of params/runs.yaml, as `swconv.reporting.report` takes it."""
    from swconv.reporting.comparison import Control
    from swconv.reporting.report import Column, Plan

    plan = known.report(name)
    columns = tuple(
        Column(text=column.text, reference=column.reference, claim=plan.claims and claim, axis=column.along and column.text,
               logarithmic=column.log,
               rows=tuple(_row(known, label, run, column.along, isinstance(plan.rows, dict)) for label, run in cells.items()))
        for (claim, column), cells in zip(plan.columns.items(), plan.cells.values(), strict=True)
    )
    controls = tuple(Control(run=run, model=known.runs[run].text, of=known.base(run, plan.runs)) for run in plan.controls)
    origins = {run: " ".join(filter(None, (f"Settings: {known.runs[run].certainty}.", known.runs[run].note)))
               for run in known.report_rows(name)}
    return Plan(name, plan.title or known.costs[name].title, columns, controls, plan.claims and PAPER / plan.claims,
                plan.named_by, plan.sections, plan.notes, origins)


def _row(known, name: str, run: str | None, along: str | None, named: bool):
    """A row of a report: under the paper's name, or under its run's label."""
    from swconv.reporting.comparison import Row

    if run is None:
        return Row(None, name, "")
    place = known.resolve(run, "paper") if along else None
    for key in along.split(".") if along else ():
        place = place[key]
    return Row(run, name if named else known.runs[run].label, known.runs[run].text,
               {profile: known.same_as(run, profile) for profile in known.profiles}, place)


def cost(args: argparse.Namespace) -> None:
    import json

    from swconv.analysis.cost import count, table

    arguments, network = _model(args.model, args.set)
    try:
        counts = count(args.model, args.input, args.sparsity, args.counting, arguments)
    except RuntimeError as error:
        for last in getattr(network, "feature_info", [])[-1:]:
            if args.input < (least := last["reduction"]):
                raise ValueError(f"{args.model} reduces images {least}-fold and needs --input {least} or more, "
                                 f"got {args.input}.") from error
        raise
    sys.stdout.write((json.dumps(counts, indent=2) if args.json else table(counts)) + "\n")


def count(args: argparse.Namespace) -> None:
    from dataclasses import asdict

    from swconv import atomic, params
    from swconv.analysis.dense_tasks import counts
    from swconv.analysis.kernels import curves

    wanted, counted = params.load(PARAMS).counted, {}
    for key, each in wanted.items():
        counted[key] = counts(**each.model_dump(include=set(params.Counted.model_fields)))
    atomic.write_json(args.out, {"counted": counted, "curves": [asdict(point) for point in curves()]})


def tables(args: argparse.Namespace) -> None:
    import json

    from swconv import params
    from swconv.reporting.accuracies import read_accuracies, read_scores, tiny_scores
    from swconv.reporting.costs import build_cost_table, build_counts, build_figure4, build_index
    from swconv.reporting.recipes import build_table8
    from swconv.reporting.report import verdicts
    from swconv.reporting.runs import Evidence
    from swconv.reporting.throughput import TABLES

    known, found = params.load(PARAMS), json.loads(args.counts.read_text())
    counts = found["counted"]
    if missing := known.counted.keys() - counts:
        raise ValueError(f"{args.counts} holds no count of {min(missing)}. Count again: python -m swconv count --out "
                         f"{args.counts}")
    plain = {name: table.plain() for name, table in known.costs.items()}
    accuracies = read_accuracies({name: row.model_dump(mode="json") for name, row in known.weights.items()}, PAPER)
    fine_tunes = _downstream()
    shown = [name for name, row in fine_tunes.profiles.items() if known.profile(row.base).reports == "reports"]
    for run in {row["run"]: None for table in plain.values() for row in table["rows"] if row["run"]}:
        fine_tunes.run(run)                                               # or the sentence with the nearest one
    for table in plain.values():
        accuracies |= read_scores(table, PAPER)
    for name, table in plain.items():
        if name in known.reports:                                         # its page is made from runs too
            build_counts(table, counts, PAPER, args.out / f"{name}_counts.csv")
            continue
        command = f"snakemake --cores all {args.out / name}.md"
        build_cost_table(table, counts, PAPER, args.out / f"{name}.md", command, accuracies,
                         tiny_scores(table, shown))
    build_figure4(found["curves"], args.out / "figures/slak")
    configs = {column: known.resolve(run, "paper") | {"id": run} for column, run in known.settings.items()}
    command = f"snakemake --cores all {args.out}/table8.md"
    score = build_table8(configs, PAPER / "sw_table8.csv", args.out / "table8.md", command)
    pages = {plan.claims: (name, plan.title) for name, plan in known.reports.items() if plan.claims}
    pages |= {table.claims: (name, table.title) for name, table in TABLES.items()}
    others = {"sw_table8.csv": ("table8", "SW Table 8: training settings", score)}
    published, scores = _published(known), {}
    for name, plan in known.reports.items():
        if plan.claims:
            imagenet = Evidence.on_disk("paper", known.trained(plan.runs, "paper"))
            scores[plan.claims] = verdicts(_page(known, name), imagenet, published)
    build_index(plain, counts, others, pages, scores, accuracies, PAPER, args.out / "index.md")


def throughput(args: argparse.Namespace) -> None:
    from swconv import params
    from swconv.reporting import throughput as pages
    from swconv.reporting.accuracies import read_accuracies

    registry = {name: row.model_dump(mode="json") for name, row in params.load(PARAMS).weights.items()}
    pages.build(args.records, read_accuracies(registry, PAPER), PAPER, args.out, "snakemake --cores all {}")


def convert(args: argparse.Namespace) -> None:
    from swconv import weights

    arguments, _ = _model(args.model, args.set)
    told = weights.convert(args.source, args.model, args.out, arguments, args.laid_out, args.sha256)
    logging.info("wrote %s: %s", args.out, ", ".join(f"{key} {value}" for key, value in told.items()))


def tinydata(args: argparse.Namespace) -> None:
    from swconv.downstream import tinydata as tiny

    tiny.write(args.out)


def downstream_data(args: argparse.Namespace) -> None:
    from swconv.downstream import sources

    known = _downstream()
    known.check_data(args.task, args.profile)
    sources.prepare(args.task, known.of_task(args.task, args.profile), args.out)


def finetune(args: argparse.Namespace) -> int:
    from swconv.training import stop

    with stop.requests() as asked:
        known = _downstream()
        processes = known.resolve(args.row, args.profile)["machine"]["processes"]
        known.check_init(args.row, args.profile, args.init)
        from swconv.downstream import finetuning
        from swconv.training import distributed

        if processes > 1 and not distributed.started():
            return distributed.launch(args.argv, processes, asked)
        if distributed.rank():
            logging.getLogger().setLevel(logging.WARNING)
        record = _downstream_record(args, "swconv.downstream.finetuning", args.init)
        finetuning.fine_tune(record["config"], args.data, args.out, CHECKPOINTS / record["key"], record, args.log_every,
                             args.init, asked)
    return 0


def assess(args: argparse.Namespace) -> None:
    from swconv.downstream import evaluation

    record = _downstream_record(args, "swconv.downstream.evaluation", args.weights)
    evaluation.evaluate(record["config"], args.data, args.weights, args.out, record)


def pictures(args: argparse.Namespace) -> None:
    from swconv.downstream import evaluation

    evaluation.draw_pictures(_downstream().resolve(args.row, args.profile), args.data, args.weights, args.out)


def downstream_table(args: argparse.Namespace) -> None:
    from swconv.reporting import downstream_examples

    known = _downstream()
    rows = [(task, run, known.profile(args.profile).targets.get(task, {})) for task, run in known.examples.items()]
    downstream_examples.build(Path("artifacts") / args.profile, rows, args.seed, args.out,
                              f"snakemake --cores all {'downstream_overfit' if args.profile == 'overfit' else args.out}")


def export(args: argparse.Namespace) -> None:
    from swconv.downstream import export as exporting

    exporting.export(_downstream().resolve(args.row, args.profile), args.weights, args.out)
    logging.info("wrote %s", args.out)


def ui(args: argparse.Namespace) -> None:
    from swconv.training import tracking

    command = tracking.ui_command(DATABASE, tracking.REFILL)
    for title, page in tracking.comparisons(DATABASE).items():
        logging.info("%s, all rows compared: %s", title, page)
    os.execvp(command[0], command)


def _model(name: str, pairs: list[str]):
    """Arguments from `width_factor=1.5` and the like, values as in YAML, and the network that they make, of shapes only."""
    import timm
    import torch
    import yaml

    import swconv.models  # noqa: F401
    from swconv import params

    for pair in pairs:
        if "=" not in pair:
            raise ValueError(f"--set needs name=value, as in width_factor=1.5, got {pair}.")
    try:
        arguments = {key: yaml.safe_load(value) for key, value in (pair.split("=", 1) for pair in pairs)}
    except yaml.YAMLError as error:
        raise ValueError(f"--set needs values in YAML, as in depths=[3,3,27,3], got {' '.join(pairs)}.") from error
    if not timm.is_model(name):
        raise ValueError(f"{params._unknown('model', name, timm.list_models())}.")
    try:
        with torch.device("meta"):
            return arguments, timm.create_model(name, **arguments)
    except (TypeError, ValueError) as error:
        said = _wrong_argument(name, arguments) or f"{name}, --set {' '.join(pairs)}: {str(error).splitlines()[0]}"
        raise ValueError(said) from error


def _wrong_argument(model: str, arguments: dict) -> str | None:
    """What is wrong with arguments of which `model` could not be made, as far as params/ knows its arguments."""
    import inspect
    import json

    from pydantic import ValidationError

    from swconv import params
    from swconv.models import LargeKernelNet

    if (schema := params.ARGS.get(model)) is None:
        return None
    general = inspect.signature(LargeKernelNet).parameters.values()
    known = [*schema.model_fields, *(each.name for each in general if each.default is not each.empty)]
    if unknown := [name for name in arguments if name not in known]:
        return f"{model}: {params._unknown('argument', unknown[0], known)}."
    try:
        schema.model_validate_json(json.dumps(arguments, default=str))
    except ValidationError as error:
        for fault in error.errors():
            if fault["type"] not in ("missing", "extra_forbidden"):
                name = fault["loc"][0]
                return f"{model}, argument {name}: {fault['msg'][:1].lower()}{fault['msg'][1:]}, got {arguments[name]!r}."
    return None


def _evidence(args: argparse.Namespace, profile: str):
    """The seeds asked for; of the profile that was not asked for those on disk, so that its columns stay as they are."""
    from swconv import params
    from swconv.reporting.runs import Evidence

    known, asked = params.load(PARAMS), Evidence(profile, tuple(args.seeds))
    if profile == args.profile:
        return asked
    found = Evidence.on_disk(profile, known.trained(known.report_rows(args.report), profile))
    return found if found.seeds else asked


def _folder(args: argparse.Namespace, stage: str, run: str, seed: int) -> Path:
    return Path("artifacts") / args.profile / stage / run / f"seed{seed}"


def _check_planned(args: argparse.Namespace, identity: str, code: str) -> None:
    """Refuse another row or other code than Snakemake planned with."""
    from swconv import params

    if args.planned not in (None, params.key(identity, "", code, args.seed)):
        raise ValueError("csrc/, params/ or swconv/ changed since this run was planned; repeat the command.")


def _record(args: argparse.Namespace, module: str, config: dict | None = None, identity: str | None = None,
            init: Path | None = None) -> dict:
    """Circumstances of a run, under its key."""
    from swconv import fingerprint, params
    from swconv.training import finished, loop, manifest, record

    if config is None:
        known = params.load(PARAMS)
        config, identity = known.resolve(args.run, args.profile), known.identity(args.run, args.profile)
    code = fingerprint.fingerprint(module, csrc=True)
    _check_planned(args, identity, code)
    loop.prepare_machine(config["machine"])                           # the record tells the flags that hold
    data_sha256 = manifest.read(args.data)["manifest_sha256"]
    key = params.key(identity, data_sha256, code, args.seed, init and finished.published_sha256(init))
    return record.circumstances(key=key, run=args.run, profile=args.profile, seed=args.seed, code=code, config=config,
                                data_sha256=data_sha256)


def _downstream():
    from swconv import downstream_params, params

    return downstream_params.load(PARAMS, params.load(PARAMS))


def _downstream_record(args: argparse.Namespace, module: str, weights: Path | None) -> dict:
    """Circumstances of a fine-tune or of its evaluation, under a key that holds the digest of the weights it starts from."""
    from swconv import fingerprint, params
    from swconv.training import finished, loop, manifest, record

    known = _downstream()
    config, identity = known.resolve(args.row, args.profile), known.identity(args.row, args.profile)
    code = fingerprint.fingerprint(module, csrc=True)
    _check_planned(args, identity, code)
    loop.prepare_machine(config["machine"])
    data_sha256 = manifest.read(args.data)["manifest_sha256"]
    digest = weights and finished.published_sha256(weights)
    key = params.key(identity, data_sha256, code, args.seed, digest)
    return record.circumstances(key=key, run=args.row, profile=args.profile, seed=args.seed, code=code, config=config,
                                data_sha256=data_sha256) | {"init_sha256": digest}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m swconv", description="ShiftwiseConv and SLaK, stage by stage.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(function, summary: str, *arguments: str, **defaults: str) -> None:
        sub = verbs.add_parser(function.__name__.replace("_", "-"), help=summary, description=summary)
        sub.set_defaults(function=function)
        for name in arguments:
            sub.add_argument(name, **_ARGUMENTS[name])
        for name, default in defaults.items():
            help = f"{_ARGUMENTS[f'--{name}']['help']} ({default} by default)"
            sub.add_argument(f"--{name}", default=default, help=help)

    verb(build, "compile csrc/ and record how", "--out")
    verb(bench, "time the operator, whole networks, loading of images or training", "suite", "--device", "--quick", "--out")
    verb(data, "make or check a profile's images and write their manifest", "--profile", "--out")
    verb(train, "train one run; a killed training resumes", "run", "--profile", "--seed", "--data", "--init", "--out",
         "--planned", "--log-every")
    verb(evaluate, "measure trained weights, in training form and merged", "run", "--profile", "--seed", "--data",
         "--weights", "--out", "--planned")
    verb(calibrate, "compute a trained run's BatchNorm statistics anew over the training images", "run", "--profile", "--seed",
         "--data", "--weights", "--out", "--planned")
    verb(lay_out, "cut a trained SLaK's strips into squares for a row with same_weights", "run", "--profile", "--seed",
         "--data", "--weights", "--out", "--planned")
    verb(fetch, "download a published checkpoint whose url params/weights.yaml gives", "name")
    verb(convert_released, "take in a published checkpoint of params/weights.yaml", "name", "--profile", "--out")
    verb(evaluate_released, "measure published weights, merged and laid out too", "name", "--profile", "--data", "--weights",
         "--out", "--planned")
    verb(plan, "reckon steps, memory, disk and GPU-hours of a run or a report before anything starts", "target", "--json",
         profile="paper")
    verb(track, "replay the runs of a report into MLflow", "report", "--profile", "--seeds", "--out")
    verb(track_downstream, "replay a fine-tune, with its other seeds that are there, into MLflow", "row", "--profile", "--seed",
         "--out")
    verb(report, "write a table with its figure and provenance", "report", "--profile", "--seeds", "--out")
    verb(cost, "count a model's parameters and multiply-adds", "model", "--input", "--sparsity", "--counting", "--set",
         "--json")
    verb(count, "count the parameters and FLOPs of all models in params/costs.yaml", "--out")
    verb(tables, "write the tables that need no training: parameters, FLOPs and settings", "--counts", "--out")
    verb(throughput, "write the papers' throughput tables from records of the benchmark", "records", "--out")
    verb(convert, "write a published checkpoint as safetensors under our names", "source", "--model", "--laid-out", "--sha256",
         "--set", "--out")
    verb(tinydata, "write tiny ADE20K, COCO, PASCAL VOC and nuScenes sets in the formats of the real ones", "--out")
    verb(downstream_data, "write a task's tiny images or check the user's, and list them", "task", "--profile", "--out")
    verb(finetune, "fine-tune one row of params/downstream.yaml; a killed training resumes", "row", "--profile", "--seed",
         "--data", "--init", "--out", "--planned", "--log-every")
    verb(assess, "measure a fine-tune by its benchmark, and write its detections", "row", "--profile", "--seed", "--data",
         "--weights", "--out", "--planned")
    verb(pictures, "draw what a fine-tune finds in some validation images", "row", "--profile", "--data", "--weights", "--out")
    verb(downstream_table, "write a table of the examples in params/downstream.yaml", "--profile", "--seed", "--out")
    verb(export, "write a fine-tune's backbone under the names of MMDetection and MMSegmentation", "row", "--profile",
         "--weights", "--out")
    verb(ui, "open the MLflow pages")
    return parser


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"a whole number from 0 to {2**32 - 1} is needed, got {text}")
    return int(text)


def _pixels(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"a whole number above 0 is needed, got {text}")
    return int(text)


_ARGUMENTS = {
    "run": {"help": "id of a row of params/runs.yaml, e.g. sw11"},
    "row": {"help": "id of a row of params/downstream.yaml, e.g. ade_160k_sw_tiny"},
    "task": {"choices": ["ade20k", "coco", "voc", "nuscenes"], "help": "what is fine-tuned for"},
    "name": {"help": "a row of params/weights.yaml, e.g. sw_tiny_300"},
    "report": {"help": "id of a report of params/runs.yaml, e.g. table2"},
    "records": {"type": Path, "nargs": "+", "help": "reports/bench/throughput-<device>.json"},
    "model": {"help": "timm's name of a model, e.g. sw_tiny"},
    "target": {"help": "id or alias of a run, id of a report, or all"},
    "source": {"type": Path, "help": "checkpoint of the released code (.pth, .safetensors)"},
    "--model": {"required": True, "help": "timm's name of our model, e.g. slak_tiny"},
    "--set": {"nargs": "*", "default": [], "metavar": "NAME=VALUE", "help": "arguments of the model, e.g. width_factor=1.5"},
    "--input": {"type": _pixels, "default": 224, "help": "side of the image, in pixels"},
    "--sparsity": {"type": float, "default": 0.0, "help": "share of every weight matrix and kernel that is masked"},
    "--counting": {"choices": ["papers", "thop", "unseen"], "default": "papers",
                   "help": "thop adds four per element of a BatchNorm; unseen: large kernels are full and free"},
    "--json": {"action": "store_true"},
    "--counts": {"required": True, "type": Path, "help": "what `count` wrote"},
    "--laid-out": {"action": "store_true", "help": "cut SLaK's strips into squares, for the model with laid_out=True"},
    "--sha256": {"help": "of the source; another one is refused"},
    "suite": {"choices": ["compile", "data", "downstream", "operator", "throughput", "training"], "help": "what to measure"},
    "--device": {"choices": ["cpu", "cuda"], "default": "cpu"},
    "--quick": {"action": "store_true", "help": "tiny maps, a few rounds: only to see that it runs"},
    "--profile": {"required": True, "help": "scale: a file of params/profiles/"},
    "--seed": {"required": True, "type": _seed},
    "--seeds": {"required": True, "type": _seed, "nargs": "+"},
    "--data": {"required": True, "type": Path, "help": "folder with data.json"},
    "--weights": {"required": True, "type": Path},
    "--init": {"type": Path, "help": "weights to start from, for a run with init_from"},
    "--out": {"required": True, "type": Path, "help": "where the results go"},
    "--planned": {"metavar": "KEY", "help": "from Snakemake: refuse where params or code are not those it planned with"},
    "--log-every": {"type": int, "default": os.environ.get("SWCONV_LOG_EVERY", "0"), "metavar": "STEPS",
                    "help": "also log every so many steps; SWCONV_LOG_EVERY sets it under Snakemake"},
}


def main(argv: list[str] | None = None) -> int:
    """Run a verb. Expected faults end in one sentence on stderr and exit code 1, a training that was asked to stop in 85."""
    argv = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args(argv)
    args.argv = argv
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        return args.function(args) or 0
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        if isinstance(error, ImportError) and (error.name or "").partition(".")[0] == "swconv":
            raise                                                     # a fault of this code, and of no installation
        with suppress(BrokenPipeError):                               # nobody reads any more; the exit code still tells
            sys.stderr.write(f"swconv {args.verb}: {_sentence(error)}\n")
        return getattr(error, "exit_code", 1)


def _sentence(error: Exception) -> str:
    """Our own faults are told as they are; what the system refused and packages that are not there, with what to do."""
    if isinstance(error, ImportError) and error.name:
        return (f"{error.name.partition('.')[0]} needs to be installed, got '{error}'. Run `make setup`, or install it as "
                "requirements.lock has it, then run the same command again.")
    if not (isinstance(error, OSError) and error.strerror):
        return str(error)
    return (f"{error.filename or 'a file'} needs to be there and open to you, got '{error.strerror}'. "
            "Check the path, its owner and the free space, then run the same command again.")


if __name__ == "__main__":
    sys.exit(main())
