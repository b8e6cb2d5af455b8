"""Downstream experiments as data: params/downstream.yaml, checked and resolved against the rows that pretrain. No torch here.

`load(Path("params"), known)` reads it; `Downstream.resolve` gives a fine-tune's full configuration. Faults are sentences as of
`swconv.params`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from swconv.params import Count, Machine, Params, ParamsError, Share, _essence, _File, _inherit, _merge, _Row, _unknown

Task = Literal["ade20k", "coco", "voc", "nuscenes"]
Size = tuple[Count, Count]
Positive = Annotated[float, Field(gt=0)]
Init = Literal["runs", "published", "random"]

TITLES: dict[str, str] = {"ade20k": "ADEChallengeData2016", "coco": "COCO 2017", "voc": "VOCdevkit", "nuscenes": "nuScenes"}


class LayerDecay(_Row):
    """Learning rates by layer, see `swconv.downstream.pyramid.parameter_groups`; `layers` is the n of its formula."""

    rule: Literal["layer_wise", "stage_wise", "norms"]
    rate: Annotated[float, Field(gt=0, le=1)]
    layers: Count


class FineTune(_Row):
    """A fine-tuning recipe. The learning rate is for `batch_size` images; `milestones`, of `decay: step`, are epochs."""

    batch_size: Count
    epochs: Count | None
    iterations: Count | None
    lr: Positive
    weight_decay: Annotated[float, Field(ge=0)]
    betas: tuple[float, float]
    eps: Positive
    layer_decay: LayerDecay
    decay: Literal["poly", "step"]
    power: Annotated[float, Field(ge=0)]
    milestones: tuple[Count, ...]
    gamma: Positive
    warmup_iterations: Annotated[int, Field(ge=0)]
    warmup_ratio: Share
    drop_path_rate: Share
    layer_scale_init: Annotated[float, Field(ge=0)]
    sparse: bool
    max_loss: Positive
    bad_steps: Count

    @model_validator(mode="after")
    def _sense(self) -> Self:
        if (self.epochs is None) == (self.iterations is None):
            raise ValueError(f"either epochs or iterations needs a number and the other one null, got {self.epochs} and "
                             f"{self.iterations}")
        if self.decay == "step" and (self.epochs is None or sorted(self.milestones) != list(self.milestones)):
            raise ValueError("decay: step needs epochs, and milestones in ascending order")
        return self


class UPerHead(_Row):
    """`swconv.downstream.upernet.UPerNetConfig`."""

    channels: Count
    aux_channels: Count
    pool_scales: tuple[Count, ...]
    dropout: Share
    aux_weight: Annotated[float, Field(ge=0)]


class BoxHead(_Row):
    """What may be changed in `swconv.downstream.detection_config`."""

    channels: Count
    fc_channels: Count
    train_proposals: Size
    test_proposals: Size
    rpn_samples: Count
    roi_samples: Count
    min_score: Share
    detections: Count


class MonoHead(_Row):
    """`swconv.downstream.fcos3d.FCOS3DConfig`; reach in px, the last one is endless."""

    fpn_channels: Count
    channels: Count
    centerness_channels: Count
    groups: Count
    deformable: bool
    reach: tuple[Positive, Positive, Positive, Positive]
    candidates: Count
    score_threshold: Share
    max_boxes: Count


class SegmentationView(_Row):
    """`swconv.downstream.transforms.SegmentationTrain`; sizes in px."""

    scale: Size
    ratio: tuple[Positive, Positive]
    crop: Size
    cat_max_ratio: Positive
    flip: Share
    distort: bool


class DetectionView(_Row):
    """`swconv.downstream.transforms.DetectionTrain`; sizes in px."""

    short_sides: Annotated[tuple[Count, ...], Field(min_length=1)]
    long_side: Count
    crop_short_sides: tuple[Count, ...]
    crop_range: Size
    flip: Share


class MonoView(_Row):
    """`swconv.downstream.nuscenes.Mono`; sizes in px."""

    long_side: Count
    short_side: Count
    flip: Share


class Scales(_Row):
    """mIoU at several scales, over whole images; sides are rounded up to multiples of `divisor`, in px."""

    ratios: Annotated[tuple[Positive, ...], Field(min_length=1)]
    flip: bool
    divisor: Count


class SegmentationTest(_Row):
    """How images are looked at: slide of windows, or whole (sides multiples of `divisor`); sizes in px."""

    scale: Size
    mode: Literal["slide", "whole"]
    window: Count
    stride: Count
    divisor: Count
    scales: Scales | None


class DetectionTest(_Row):
    """Sides of the image in px."""

    long_side: Count
    short_side: Count


class Source(_Row):
    """Where images lie: a folder of the user, or null where we write a tiny set. Splits by the benchmark's own names."""

    root: str | None
    train: str
    val: str
    workers: Annotated[int, Field(ge=0)]


class YearsSource(Source):
    """PASCAL VOC: which years are trained on, and evaluated on."""

    train_years: tuple[Literal[2007, 2012], ...]
    val_years: tuple[Literal[2007, 2012], ...]


class VersionSource(Source):
    """nuScenes."""

    version: Literal["v1.0-mini", "v1.0-trainval"]


class _Setting(_Row):
    recipe: FineTune


class Ade20k(_Setting):
    """UPerNet on ADE20K."""

    head: UPerHead
    train: SegmentationView
    test: SegmentationTest
    data: Source


class Coco(_Setting):
    """Cascade Mask R-CNN on COCO 2017."""

    head: BoxHead
    train: DetectionView
    test: DetectionTest
    data: Source


class Voc(_Setting):
    """Faster R-CNN on PASCAL VOC 2007."""

    head: BoxHead
    train: DetectionView
    test: DetectionTest
    data: YearsSource


class NuScenes(_Setting):
    """FCOS3D on nuScenes."""

    head: MonoHead
    train: MonoView
    test: DetectionTest
    data: VersionSource


SETTINGS: dict[str, type[_Setting]] = {"ade20k": Ade20k, "coco": Coco, "voc": Voc, "nuscenes": NuScenes}


class Stages(_Row):
    """Stages behind those of a pretraining network that has too few; channels before the width factor."""

    depths: tuple[Count, ...]
    dims: tuple[Count, ...]
    kernel_sizes: tuple[Count, ...]


class FineTuneProfile(_Row):
    """A scale: whose pretraining and machine, where weights come from, what is laid over each task.

    `init`: "runs" are our own pretraining; "published" takes the registered file where a row names one; "random" trains from
    nothing. `grow` follows the stages of the pretraining network; `network` is laid over its arguments. `targets` are what
    the examples have to reach, in the units of their metrics.
    """

    parent: str | None = Field(None, alias="from")
    base: str
    init: Init
    machine: dict[str, Any]
    network: dict[str, Any]
    grow: Stages | None
    pictures: Count
    tasks: dict[Task, dict[str, Any]]
    targets: dict[Task, dict[str, Positive]] = {}


class FineTuneRun(_Row):
    """One row: which pretraining run, which task and what it changes there. `certainty` as in `swconv.params.Run`."""

    known_as: str
    text: str
    source: str
    certainty: Literal["published", "inferred", "unknown"]
    note: str | None = None
    task: Task
    init_from: str
    published: str | None = None
    recipe: dict[str, Any] = {}
    test: dict[str, Any] = {}


class _Whole(_Row):
    tasks: dict[Task, dict[str, Any]]
    recipes: dict[str, dict[str, Any]]
    profiles: dict[str, dict[str, Any]] = Field(min_length=1)
    examples: dict[Task, str]
    runs: dict[str, dict[str, Any]] = Field(min_length=1)


class Downstream:
    """params/downstream.yaml, checked.

    Attributes
    ----------
    runs : dict of str to FineTuneRun
    aliases : dict of str to str
        Name in reports/paper/runs.csv -> run.
    profiles : dict of str to FineTuneProfile
    examples : dict of str to str
        Task -> the run that tries it out (rules downstream_smoke and downstream_overfit).
    """

    def __init__(self, folder: Path, known: Params) -> None:
        self.known = known
        file = self._file = _File(folder / "downstream.yaml")
        file.check(_Whole)
        data = file.data
        for task, schema in SETTINGS.items():
            if task not in data["tasks"]:
                raise file.fault(("tasks",), f"tasks: key {task} is missing")
            file.check(schema, ("tasks", task))
        for recipe, change in data["recipes"].items():
            file.check(FineTune, ("recipes", recipe), change, partial=True)
        self._tasks, done = data["tasks"], {}
        self.profiles = {}
        for name, row in data["profiles"].items():
            done[name] = whole = _inherit(file, ("profiles", name), row, done, f"profile {name}: ", "profile above it")
            self.profiles[name] = profile = file.check(FineTuneProfile, ("profiles", name), whole)
            self._check_profile(name, profile)
        self.runs = {name: self._run(name, dict(row)) for name, row in data["runs"].items()}
        self.aliases = {row.known_as: name for name, row in self.runs.items()}
        self.examples = dict(data["examples"])
        for task, run in self.examples.items():
            if run not in self.runs:
                raise file.fault(("examples", task), f"examples: {_unknown('downstream run', run, self.runs)}")
            if self.runs[run].task != task:
                raise file.fault(("examples", task), f"examples: {task} needs a run of that task, got {run}, which is of "
                                                     f"{self.runs[run].task}")
        rated = [*SETTINGS, *self.runs]
        for name in known.planning.fine_tunes:
            if name not in rated:
                raise ParamsError(f"{folder / 'plan.yaml'}: {_unknown('task or downstream run', name, rated)}.")
        self._resolved = {(run, profile): self._resolve(run, profile) for run in self.runs for profile in self.profiles}

    def run(self, name: str) -> FineTuneRun:
        """A run by its id; ParamsError with the id for the paper's name, else with the nearest one."""
        if name in self.aliases:
            raise ParamsError(f"{self._file.path}: run {name} is known here as {self.aliases[name]}; use that name.")
        if name not in self.runs:
            raise ParamsError(f"{self._file.path}: {_unknown('downstream run', name, [*self.runs, *self.aliases])}.")
        return self.runs[name]

    def profile(self, name: str) -> FineTuneProfile:
        """A profile by name; ParamsError with the nearest one if it is unknown."""
        if name not in self.profiles:
            raise ParamsError(f"{self._file.path}: {_unknown('downstream profile', name, self.profiles)}.")
        return self.profiles[name]

    def resolve(self, run: str, profile: str) -> dict[str, Any]:
        """A fine-tune's full configuration, JSON types only.

        `task`, `network` (name, args), `grown` (how many stages the pretraining does not have), `init` (kind and name of the
        weights' source), `recipe`, `head`, `train`, `test`, `data`, `machine`, `pictures`.

        Raises
        ------
        ParamsError
            For an unknown run or profile, or a batch that the processes of the pretraining's machine cannot share.
        """
        self.run(run)
        self.profile(profile)
        row = json.loads(self._resolved[run, profile])
        self._check_shares(run, profile, row)
        return row

    def identity(self, run: str, profile: str) -> str:
        """The part of a resolved row that makes a result what it is, as JSON text."""
        row = self.resolve(run, profile)
        for name in ("root", "workers"):
            del row["data"][name]
        del row["pictures"]
        return _essence(row)

    def source(self, run: str, profile: str) -> tuple[str, str] | None:
        """The stage ("train" or "weights") and the name of the weights that a run starts from; None where from random ones.

        A pretraining row that is the same experiment as an earlier one resolves to that.
        """
        row = self.resolve(run, profile)
        if row["init"]["kind"] == "random":
            return None
        name = row["init"]["name"]
        if row["init"]["kind"] == "published":
            return "weights", name
        return "train", self.known.same_as(name, self.profile(profile).base) or name

    def of_task(self, task: str, profile: str) -> dict[str, Any]:
        """A task's `data` at a profile's scale; ParamsError for an unknown task."""
        if task not in self._tasks:
            raise ParamsError(f"{self._file.path}: {_unknown('task', task, self._tasks)}.")
        return _merge(self._tasks[task], self.profile(profile).tasks.get(task, {}))["data"]

    def check_data(self, task: str, profile: str) -> None:
        """Stop before any work when a folder that the user has to provide is not there."""
        data = self.of_task(task, profile)
        if (root := data["root"]) is None:
            return
        title, needed = TITLES[task], _layout(task, data)
        missing = [name for name in needed if not (Path(root) / name).exists()]
        if missing:
            raise ParamsError(f"profile {profile} needs {title} in {root}/ with {', '.join(needed)}, but "
                              f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not there. Put the dataset "
                              f"there or link it: ln -s /path/to/{title.split()[0]} {root}.")

    def check_init(self, run: str, profile: str, init: Path | None) -> None:
        """Stop before any work when a run is not given the weights to start from, or is and starts from random ones."""
        source, at = self.source(run, profile), ("runs", run)
        if source and init is None:
            raise self._file.fault(at, f"run {run} starts from the weights of {source[1]}; give them: --init "
                                       f"artifacts/.../{source[0]}/{source[1]}/.../weights.safetensors")
        if init and not source:
            raise self._file.fault(at, f"run {run} on profile {profile} starts from random weights, but {init} is given; leave "
                                       "--init out")

    def _check_profile(self, name: str, profile: FineTuneProfile) -> None:
        file = self._file
        if profile.base not in self.known.profiles:
            told = _unknown("profile", profile.base, self.known.profiles)
            raise file.fault(("profiles", name, "base"), f"profile {name}: {told}")
        file.check(Machine, ("profiles", name, "machine"), profile.machine, partial=True)
        for task, change in profile.tasks.items():
            file.check(SETTINGS[task], ("profiles", name, "tasks", task), change, partial=True)

    def _run(self, name: str, row: Any) -> FineTuneRun:
        file, at = self._file, ("runs", name)
        if (uses := row.pop("uses", None)) is not None:
            if uses not in list(file.data["recipes"]):
                raise file.fault((*at, "uses"), f"run {name}: {_unknown('recipe', uses, file.data['recipes'])}")
            row["recipe"] = _merge(file.data["recipes"][uses], row.get("recipe", {}))
        checked = file.check(FineTuneRun, at, row)
        schema = SETTINGS[checked.task]
        for part in ("recipe", "test"):
            file.check(schema.model_fields[part].annotation, (*at, part), getattr(checked, part), partial=True)
        if checked.init_from not in self.known.runs:
            name_known = self.known.aliases.get(checked.init_from)
            told = (f"pretraining run {checked.init_from} is known here as {name_known}; use that name" if name_known
                    else _unknown("pretraining run", checked.init_from, self.known.runs))
            raise file.fault((*at, "init_from"), f"run {name}: {told}")
        if self.known.runs[checked.init_from].same_weights:
            raise file.fault((*at, "init_from"), f"run {name} needs a trained run to start from, got {checked.init_from}, "
                                                 "which takes the weights of another")
        if checked.published is not None and checked.published not in self.known.weights:
            raise file.fault((*at, "published"), f"run {name}: {_unknown('weights', checked.published, self.known.weights)}")
        return checked

    def _resolve(self, run: str, profile: str) -> str:
        row, scale = self.runs[run], self.profiles[profile]
        setting = _merge(self._tasks[row.task], {"recipe": row.recipe, "test": row.test})
        setting = self._file.check(SETTINGS[row.task], ("runs", run), _merge(setting, scale.tasks.get(row.task, {})))
        pretrained = self.known.resolve(row.init_from, scale.base)
        kind = "runs" if scale.init == "published" and row.published is None else scale.init
        if kind == "published":
            weights = self.known.weights[row.published]
            network, name = {"name": weights.model, "args": weights.args}, row.published
        else:
            network, name = pretrained["model"], row.init_from
        args, grown = _merge(network["args"], scale.network), 0
        if scale.grow:
            grown = len(scale.grow.depths)
            args |= {key: [*args[key], *getattr(scale.grow, key)] for key in ("depths", "dims", "kernel_sizes")}
        args.pop("layer_scale_init", None)                            # the recipe's
        return json.dumps({
            "task": row.task, "network": {"name": network["name"], "args": args}, "grown": grown,
            "init": {"kind": kind, "name": None if kind == "random" else name},
            **setting.model_dump(mode="json"), "pictures": scale.pictures,
            "machine": _merge(pretrained["machine"], scale.machine),
        }, sort_keys=True)

    def _check_shares(self, run: str, profile: str, row: Mapping[str, Any]) -> None:
        batch, machine = row["recipe"]["batch_size"], row["machine"]
        part = min(machine["micro_batch"] or batch, batch)
        if batch % part or part % machine["processes"]:
            raise self._file.fault(("runs", run), f"run {run} on profile {profile}: batch_size {batch} must fall into parts of "
                                                  f"machine.micro_batch ({machine['micro_batch']}) images, and each part into "
                                                  f"equal shares of machine.processes ({machine['processes']})")


def _layout(task: str, data: Mapping[str, Any]) -> list[str]:
    """What has to be in the folder of a task for its splits, years or version."""
    splits = dict.fromkeys((data["train"], data["val"]))
    match task:
        case "ade20k":
            return [f"{kind}/{split}" for split in splits for kind in ("images", "annotations")]
        case "coco":
            return [place for split in splits for place in (split, f"annotations/instances_{split}.json")]
        case "voc":
            return [f"VOC{year}" for year in sorted({*data["train_years"], *data["val_years"]})]
        case _:
            return [data["version"], "samples", "maps"]


def load(folder: Path, known: Params) -> Downstream:
    """Read and check params/downstream.yaml.

    Raises
    ------
    ParamsError
        One sentence that names file, line, row and key.
    """
    return Downstream(folder, known)
