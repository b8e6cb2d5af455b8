"""Experiments as data: the YAML rows of params/, checked and resolved. No torch here.

`load(Path("params"))` reads everything: each file is checked by itself, then every row in every map. `Params.resolve` gives a
run's full configuration. Every fault is one sentence that names file, line, row and key, and the nearest known name.
"""

import difflib
import functools
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from swconv.atomic import write_atomic

Map = Literal["paper", "mini"]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
# Where data lies, how fast they are read, how the work is shared out, and what is done with the result afterwards do not
# change it: left out of a run's identity. The number of processes where BatchNorm sees what all of them have.
_CIRCUMSTANCES = {"dataset": ("root", "workers", "cache"), "machine": ("checkpoint_minutes", "processes", "recompute"),
                  "recipe": ("calibration_passes",)}


class ParamsError(ValueError):
    """A fault in params/, told in one sentence."""


def _odd(value: int) -> int:
    if value % 2 == 0:
        raise PydanticCustomError("odd", "an odd number is needed")
    return value


def _even(value: int) -> int:
    if value % 2:
        raise PydanticCustomError("even", "an even number is needed")
    return value


Odd = Annotated[Count, AfterValidator(_odd)]
Even = Annotated[Count, AfterValidator(_even)]
Small = Annotated[Odd, Field(ge=3)]
# timm's words for RandAugment: magnitude, its spread and cap, whether severity increases, number of operations, odds.
RandAugment = Annotated[str, Field(pattern=r"^rand(-(m\d+|n\d+|w\d+|p[\d.]+|t\d|mstd[\d.]+|mmax\d+|inc[01]))*$")]


class _Row(BaseModel):
    """Strict and frozen. What concerns several keys is a validator that raises a whole sentence."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class SkeletonArgs(_Row):
    """Arguments that all networks take. Kernel sizes and dims in pixels and channels, one entry per stage."""

    depths: tuple[Count, ...]
    dims: tuple[Count, ...]
    width_factor: Annotated[float, Field(gt=0)]
    kernel_sizes: tuple[Odd | Annotated[tuple[Odd, ...], Field(min_length=1)], ...]
    layer_scale_init: float

    @model_validator(mode="after")
    def _stages(self) -> Self:
        counts = {key: len(getattr(self, key)) for key in ("depths", "dims", "kernel_sizes")}
        if len(set(counts.values())) > 1:
            raise ValueError(f"depths, dims and kernel_sizes need one entry per stage, got {counts}")
        return self


class NetworkArgs(SkeletonArgs):
    """A network with a large and a small kernel."""

    small_kernel: Small


class ShiftwiseArgs(NetworkArgs):
    """`swconv.models.sw.shiftwise_net`."""

    rep_branches: Count
    edges: Count
    ghost_ratio: Annotated[float, Field(ge=0, lt=1)]
    use_se: bool
    padding: Literal["full", "half"]
    norm: Literal["branch", "filter"]
    skip: bool
    order: Literal["shuffled", "reversed", "shuffle_v"]
    depthwise_norm_skip: bool

    @model_validator(mode="after")
    def _edges(self) -> Self:
        if self.order != "shuffled" and self.edges != 1:
            raise ValueError(f"order {self.order} is defined for edges: 1, got {self.edges}; order shuffled takes any number")
        return self


class SlakArgs(NetworkArgs):
    """SLaK: strips M x N and N x M with a small square kernel beside them."""

    decomposed: bool
    bn: bool
    laid_out: bool


class EnlargedArgs(SkeletonArgs):
    """`swconv.models.slak.lk_convnext_net`. Stacked, kernel_sizes are numbers of 3 x 3 convolutions, of any parity."""

    kernel_sizes: tuple[Count, ...]
    small_kernel: Small | None
    bn: bool
    arrangement: Literal["single", "parallel", "sequential", "stacked", "dilated"]

    @model_validator(mode="after")
    def _parity(self) -> Self:
        if self.arrangement != "stacked" and (even := [size for size in self.kernel_sizes if size % 2 == 0]):
            raise ValueError(f"arrangement {self.arrangement} needs odd kernel_sizes, got {even[0]}; stacked takes any number")
        return self


class UniRepArgs(SkeletonArgs):
    """`swconv.models.unireplknet.unireplknet_net`."""

    use_se: bool


ARGS: dict[str, type[SkeletonArgs]] = {
    "sw_slak_tiny": ShiftwiseArgs, "sw_tiny": ShiftwiseArgs, "sw_small": ShiftwiseArgs,
    "slak_tiny": SlakArgs, "slak_small": SlakArgs, "slak_base": SlakArgs,
    "lk_convnext_tiny": EnlargedArgs, "lk_convnext_small": EnlargedArgs,
    "unireplknet_tiny": UniRepArgs, "unireplknet_small": UniRepArgs,
}


class Sparsity(_Row):
    """Sparse training, see `swconv.sparsity.SparseTraining`. Steps are optimizer steps."""

    level: Annotated[float, Field(gt=0, lt=1)]
    granularity: Literal["filter", "element"]
    others: Literal["none", "pointwise", "body", "all"]
    density: Literal["snip", "erk", "uniform", "nonzero"]
    scores: Literal["sum", "concat"]
    prune: Literal["magnitude", "magnitude_sum"]
    update_every: Count
    prune_rate: Annotated[float, Field(ge=0, lt=1)]
    share_every: Count
    subset: bool
    growth: Literal["bernoulli", "exact"]

    @model_validator(mode="after")
    def _sums(self) -> Self:
        if self.prune == "magnitude" and (self.granularity == "filter" or self.share_every != 1 or self.subset):
            raise ValueError("prune: magnitude sums over no filter and no branch, and needs granularity: element, "
                             f"share_every: 1 and subset: false, got {self.granularity}, {self.share_every} and "
                             f"{str(self.subset).lower()}; set prune: magnitude_sum")
        return self


class Recipe(_Row):
    """A training recipe. The learning rate is for `batch_size` images per step."""

    epochs: Count
    batch_size: Count
    lr: Annotated[float, Field(gt=0)]
    min_lr: Annotated[float, Field(ge=0)]
    warmup_epochs: Annotated[float, Field(ge=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    betas: tuple[float, float]
    eps: float
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None
    drop_path_rate: Share
    ema_decay: Share | None
    label_smoothing: Share
    mixup: Annotated[float, Field(ge=0)]
    cutmix: Annotated[float, Field(ge=0)]
    mixup_switch: Share
    rand_augment: RandAugment | None
    random_erasing: Share
    random_resized_crop: bool
    hflip: Share
    evaluate_every: Count
    max_loss: Annotated[float, Field(gt=0)]
    bad_steps: Count
    calibration_passes: Count
    sparsity: Sparsity | None

    @model_validator(mode="after")
    def _sense(self) -> Self:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs must be below epochs, got {self.warmup_epochs:g} of {self.epochs}")
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ValueError(f"mixup and cutmix pair the images of a batch: batch_size must be even, got {self.batch_size}")
        return self


class Dataset(_Row):
    """What a profile trains on. `root` is a folder of the user; sizes are given where we make the data ourselves.

    `cache` keeps what a transform without chance makes in memory. `cache_px` is another thing: the data rule decodes every
    image once, its short side reduced to so many px, and training starts from these pixels, so it belongs to the identity.
    Rows that need larger images read the files.
    """

    name: str
    root: str | None = None
    train_images: Count | None = None
    val_images: Count | None = None
    image_size: Count
    in_chans: Literal[1, 3]
    num_classes: Count
    mean: tuple[float, ...]
    std: tuple[Annotated[float, Field(gt=0)], ...]
    crop_pct: Annotated[float, Field(gt=0)]
    crop_mode: Literal["center", "squash"] = "center"
    interpolation: Literal["bicubic", "bilinear"]
    cache: bool
    cache_px: Count | None = None
    bad_files: Literal["stop", "skip"]
    workers: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _sense(self) -> Self:
        needed = ("train_images", "val_images") if self.name == "digits" else ("root",)
        if missing := [key for key in needed if getattr(self, key) is None]:
            raise ValueError(f"{self.name} needs {' and '.join(needed)}, got no {' and no '.join(missing)}")
        if not len(self.mean) == len(self.std) == self.in_chans:
            raise ValueError(
                f"mean and std need one entry per channel (in_chans: {self.in_chans}), got {len(self.mean)} and {len(self.std)}"
            )
        if self.cache_px and self.cache_px < (side := _resized(self.image_size, self.crop_pct)):
            raise ValueError(f"cache_px needs {side} px or more, to which image_size: {self.image_size} and crop_pct: "
                             f"{self.crop_pct:g} resize images, got {self.cache_px}")
        return self


class Machine(_Row):
    """What bitwise equality depends on: part of a run's identity but for `checkpoint_minutes`, `processes` and `recompute`.

    A batch passes through the network in parts of `micro_batch` images, null for all at once. The processes (one per GPU)
    share every part: with `sync_bn` BatchNorm sees all of it, whatever their number, and this is no part of the identity.
    `threads` are per process. Mixup pairs the images of a part, so their number is even. With `compile` the network runs by
    torch.compile, downstream its backbone alone. With `recompute` the blocks keep less for the backward pass and take
    longer, to the same bits.
    """

    device: Literal["cpu", "cuda"]
    threads: Count
    processes: Count
    memory_format: Literal["contiguous", "channels_last"]
    amp: Literal["bfloat16", "float16"] | None
    tf32: bool
    compile: bool
    sync_bn: bool
    micro_batch: Even | None
    recompute: bool
    checkpoint_minutes: Annotated[float, Field(gt=0)]


class Profile(_Row):
    """A scale: which map of runs.yaml, where its reports go, which data and machine, what stands for models and recipes."""

    parent: str | None = Field(None, alias="from")
    map: Map
    reports: str
    dataset: Dataset
    machine: Machine
    models: dict[str, dict[str, Any]]
    recipes: dict[str, dict[str, Any]]

    @property
    def gpus(self) -> int:
        """That a training takes."""
        return self.machine.processes * self.uses_gpu

    @property
    def uses_gpu(self) -> bool:
        return self.machine.device == "cuda"

    @property
    def threads(self) -> int:
        return self.machine.threads


class _Uses(_Row):
    model: str | None = None
    recipe: str | None = None


class _Sight(_Row):
    """What a row may change in its dataset: how large its images come in."""

    image_size: Count | None = None
    crop_pct: Annotated[float, Field(gt=0)] | None = None
    crop_mode: Literal["center", "squash"] | None = None


class _Changes(_Row):
    model: dict[str, Any] = {}
    recipe: dict[str, Any] = {}
    dataset: _Sight = _Sight()


class Run(_Changes):
    """One row of runs.yaml.

    `certainty` says where its values come from: "published", all of them from a paper or a released command; "inferred", some
    from prose or from a neighbour's command; "unknown", one that matters is not stated, or sources disagree, and `note` says
    what is taken; "ours", no row of a paper. `aliases` are names under which the row is known elsewhere.
    """

    label: str
    text: str
    source: str
    certainty: Literal["published", "inferred", "unknown", "ours"] = "ours"
    note: str | None = None
    aliases: tuple[str, ...] = ()
    parent: str | None = Field(None, alias="from")
    uses: _Uses = _Uses()
    same_weights: str | None = None
    init_from: str | None = None
    paper: _Changes = _Changes()
    mini: _Changes = _Changes()


class ReportColumn(_Row):
    """Accuracies below one heading of a paper; `along` is the setting of a resolved row that places it in a figure."""

    text: str
    reference: str
    along: str | None = None
    log: bool = False


class Report(_Row):
    """A page: a paper's table or figure, in its order, and control rows below it. Names in runs.yaml."""

    title: str | None = None  # that of costs.yaml where it counts the table
    claims: str | None = None
    named_by: tuple[str, ...] = ("id",)
    columns: dict[str, ReportColumn] = Field(min_length=1)
    rows: tuple[str, ...] | dict[str, tuple[str | None, ...]]
    controls: tuple[str, ...] = ()
    sections: tuple[Literal["distance", "filters", "curves", "formulas"], ...] = ()
    seeds: Count | None = None
    notes: str = ""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if isinstance(self.rows, dict):
            for name, runs in self.rows.items():
                if len(runs) != len(self.columns):
                    raise ValueError(f"row {name} needs one run, or null, per column ({len(self.columns)}), got {len(runs)}")
            for column in self.columns.values():
                if column.reference not in self.rows:
                    raise ValueError(_unknown("row", column.reference, self.rows))
        elif len(self.columns) > 1:
            raise ValueError(f"a list of runs fills one column, got {len(self.columns)}; give each row's name and its runs")
        for rows in self.cells.values():
            runs = [*(filter(None, rows.values()) if isinstance(self.rows, dict) else self.rows), *self.controls]
            if twice := [run for run in dict.fromkeys(runs) if runs.count(run) > 1]:
                raise ValueError(f"a run stands once in a report, got {', '.join(twice)} more than once")
        return self

    @property
    def cells(self) -> dict[str, dict[str, str | None]]:
        """Column -> name of the row -> run; a row that names a run in no column or in this one. Lists: the run is its name."""
        if not isinstance(self.rows, dict):
            return {next(iter(self.columns)): {run: run for run in self.rows}}
        return {column: {name: runs[k] for name, runs in self.rows.items() if runs[k] or not any(runs)}
                for k, column in enumerate(self.columns)}

    @property
    def runs(self) -> tuple[str, ...]:
        """Of all columns, each once."""
        return tuple(dict.fromkeys(run for cells in self.cells.values() for run in cells.values() if run))

    @property
    def figures(self) -> tuple[str, ...]:
        """Ends of the names of what is drawn, below figures/."""
        if "curves" in self.sections or all(column.along for column in self.columns.values()):
            return ("_left.svg", "_right.svg", ".csv")
        return ("_distance.svg",) if "distance" in self.sections else ()


class Counted(_Row):
    """A model whose parameters and multiply-adds are counted: arguments of `swconv.analysis.cost.cost`.

    With a `task` it is the backbone of such a network, of which `without` names the parts that are left out, see
    `swconv.analysis.dense_tasks.count`. `input` in px: the side of a square, or height and width.
    """

    model: str
    args: dict[str, Any] = {}
    task: Literal["upernet", "cascade", "faster"] | None = None
    without: tuple[str, ...] = ()
    form: Literal["training", "merged", "plus"] = "training"
    input: Count | tuple[Count, Count] = 224
    sparsity: Share = 0.0
    counting: Literal["papers", "thop", "unseen"] = "papers"

    @property
    def key(self) -> str:
        return json.dumps({name: getattr(self, name) for name in Counted.model_fields}, sort_keys=True)

    @property
    def dense(self) -> "Counted":
        return Counted(**{name: getattr(self, name) for name in Counted.model_fields} | {"sparsity": 0.0})


class Explained(_Row):
    """Why the paper prints another number, and what has that number; or comes nearer to it, and `rest` says the rest."""

    why: str
    counts: Counted | None = None
    rest: str | None = None


class CostRow(Counted):
    """One row of a paper's table: `of` names it there, `run` its fine-tune in downstream.yaml."""

    model: str | None = None  # where nothing is counted
    of: dict[str, str]
    explained: dict[str, Explained] = {}
    run: str | None = None


class CostTable(_Row):
    """Columns of a paper's table that need no training, and what of ours its rows are; `scores`: column -> measure of `run`."""

    title: str
    claims: str
    columns: dict[str, Literal["params", "macs"]] = {}
    scores: dict[str, str] = {}
    rows: tuple[CostRow, ...]

    @model_validator(mode="after")
    def _complete(self) -> Self:
        for row in self.rows:
            if self.columns and row.model is None:
                raise ValueError(f"the row of {row.of} needs a model, for something is counted here")
            if row.run is not None and not self.scores:
                raise ValueError(f"the row of {row.of} has a run, and the table no scores: say which columns hold its measures")
        return self

    @property
    def counted(self) -> dict[str, Counted]:
        """All that has to be counted, by key."""
        reasons = [reason.counts for row in self.rows for reason in row.explained.values() if reason.counts]
        dense = any(column.endswith("_dense") for column in self.columns)
        rows = [each for row in self.rows if row.model for each in (row, *[row.dense] * dense)]
        return {each.key: each for each in (*rows, *reasons)}

    def plain(self) -> dict[str, Any]:
        """As plain data with the keys of what is counted, for the report."""
        def told(reason: Explained) -> dict[str, Any]:
            return {"why": reason.why, "counts": reason.counts and {"key": reason.counts.key}, "rest": reason.rest}

        rows = [{"of": row.of, "key": row.key, "dense_key": row.dense.key if row.model else None, "run": row.run,
                 "explained": {column: told(reason) for column, reason in row.explained.items()}} for row in self.rows]
        return {"title": self.title, "claims": self.claims, "columns": self.columns, "scores": self.scores, "rows": rows}


class Fill(_Row):
    """Where an accuracy stands in a paper: `of` names the row, or rows, in reports/paper/<table>.csv."""

    table: str
    of: dict[str, str]
    column: str | None = None  # needed where the table has several accuracies
    laid_out: bool = False     # with the strips laid out


class Weights(_Row):
    """A published checkpoint: what it is, where the user puts it, how its accuracy is measured."""

    model: str
    args: dict[str, Any] = {}
    path: str                  # where the user puts the file, or where `url` is downloaded to
    url: Annotated[str, Field(pattern=r"^(https?|ftp|file)://.+")] | None = None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    part: Literal["model", "model_ema", "state_dict"] | None = None
    source: str
    input: Count = 224         # px
    crop_pct: Annotated[float, Field(gt=0)] = 0.875
    crop_mode: Literal["center", "squash"] = "center"
    run: str | None = None     # the row of runs.yaml that trains such weights
    fills: tuple[Fill, ...] = ()


class Rate(_Row):
    """Images per second of inference on one A100, and how sure that is."""

    rate: Annotated[float, Field(gt=0)]
    basis: Literal["measured", "scaled", "guessed"]


class Images(_Row):
    """How many a dataset has."""

    train: Count
    val: Count


class Planning(_Row):
    """What `swconv.plan` reckons with, see params/plan.yaml."""

    images: dict[str, Images]
    uncertainty: Share
    passes: Annotated[float, Field(gt=0)]
    speed: dict[str, Annotated[float, Field(gt=0)]] = Field(min_length=1)
    rates: dict[str, Rate]
    fine_tunes: dict[str, Annotated[float, Field(gt=0)]]


class Active(_Row):
    """What both engines make when nothing else is asked for."""

    profile: str
    seeds: tuple[Seed, ...] = Field(min_length=1)
    reports_folder: str  # that of the profile; DVC cannot look it up


class _Model(_Row):
    name: str
    args: dict[str, Any]


class _RecipeRow(Recipe):
    parent: str | None = Field(None, alias="from")


class _Rows(_Row):
    """runs.yaml as a whole."""

    reports: dict[str, dict[str, Any]] = Field(min_length=1)
    settings: dict[str, str] = {}
    runs: dict[str, dict[str, Any]] = Field(min_length=1)


class Params:
    """All of params/, checked.

    Attributes
    ----------
    runs : dict of str to Run
    aliases : dict of str to str
        Another name of a run -> the run.
    reports : dict of str to Report
    settings : dict of str to str
        Column of SW Table 8 -> run.
    profiles : dict of str to Profile
    costs : dict of str to CostTable
    weights : dict of str to Weights
    planning : Planning
    active : Active
    """

    def __init__(self, folder: Path) -> None:
        self._runs_file, self._resolved, self._identities = _File(folder / "runs.yaml"), {}, {}
        self._models = _models(_File(folder / "models.yaml", "model"))
        self._recipes = _recipes(_File(folder / "recipes.yaml", "recipe"))
        self.profiles = _profiles(folder / "profiles", self._models, self._recipes)
        self._runs_file.check(_Rows)
        self.runs = {run: self._runs_file.check(Run, ("runs", run)) for run in self._runs_file.data["runs"]}
        self.aliases = self._named_again()
        self.reports = {name: self._runs_file.check(Report, ("reports", name)) for name in self._runs_file.data["reports"]}
        self.settings = dict(self._runs_file.data.get("settings", {}))
        self._check_references()
        file = _File(folder / "costs.yaml")
        self.costs = {name: file.check(CostTable, (name,)) for name in file.data}
        self._weights_file = _File(folder / "weights.yaml", "weights")
        self.weights = {name: self._weights_file.check(Weights, (name,)) for name in self._weights_file.data}
        self._check_weights()
        self.planning = self._planning(_File(folder / "plan.yaml"))
        self.active = self._active(_File(folder / "active.yaml"))
        for profile in self.profiles:
            for run in self.runs:
                self.resolve(run, profile)

    def resolve(self, run: str, profile: str) -> dict[str, Any]:
        """A run's full configuration at a profile's scale: `model`, `recipe`, `dataset`, `machine`. JSON types only.

        A run that starts from the weights of another one has that one's name as `init`.

        Raises
        ------
        ParamsError
            For an unknown run or profile, or a configuration that does not check.
        """
        self.run(run)
        self.profile(profile)
        if (run, profile) not in self._resolved:
            self._resolved[run, profile] = self._resolve(run, profile)
        return json.loads(self._resolved[run, profile])

    def _resolve(self, run: str, profile: str) -> str:
        scale, line = self.profiles[profile], self._ancestry(run)
        model, recipe = self._used(run, "model"), self._used(run, "recipe")
        args = _merge(self._models[model].args, scale.models.get(model, {}))
        training = _merge(self._recipes[recipe], scale.recipes.get(recipe, {}))
        dataset = scale.dataset.model_dump(mode="json", exclude_none=True)
        for row in line:
            for changes in (row, getattr(row, scale.map)):
                args, training = _merge(args, changes.model), _merge(training, changes.recipe)
                dataset |= changes.dataset.model_dump(exclude_none=True)
        name, check = self._models[model].name, self._runs_file.check
        _read_files_where_larger(dataset)
        checked_recipe = check(Recipe, ("runs", run, "recipe"), training)
        self._check_shares(run, profile, checked_recipe)
        checked = {
            "model": {"name": name, "args": check(ARGS[name], ("runs", run, "model"), args).model_dump(mode="json")},
            "recipe": checked_recipe.model_dump(mode="json"),
            "dataset": dataset,
            "machine": scale.machine.model_dump(mode="json"),
        } | ({"init": init} if (init := self._init(run)) else {})
        return json.dumps(checked, sort_keys=True)

    def _check_shares(self, run: str, profile: str, recipe: Recipe) -> None:
        """A batch falls into equal parts, and a part into equal shares of the processes."""
        machine = self.profiles[profile].machine
        part = machine.micro_batch or recipe.batch_size
        pairs = 2 if recipe.mixup or recipe.cutmix else 1
        if recipe.batch_size > part and recipe.batch_size % part or min(part, recipe.batch_size) % (machine.processes * pairs):
            raise self._runs_file.fault(
                ("runs", run), f"run {run} on profile {profile}: batch_size {recipe.batch_size} must fall into parts of "
                               f"machine.micro_batch ({machine.micro_batch}) images, and each part into equal shares of "
                               f"machine.processes ({machine.processes}){', in pairs for mixup' * (pairs - 1)}")

    def identity(self, run: str, profile: str) -> str:
        """The part of a resolved row that makes a result what it is, as JSON text: equal text, equal experiment."""
        self.run(run)
        self.profile(profile)
        return self._identity(run, profile)

    def _identity(self, run: str, profile: str) -> str:
        if (run, profile) not in self._identities:
            self._identities[run, profile] = _essence(self.resolve(run, profile))
        return self._identities[run, profile]

    @property
    def counted(self) -> dict[str, Counted]:
        """All that has to be counted for any table, by key."""
        return {key: each for table in self.costs.values() for key, each in table.counted.items()}

    def run(self, name: str) -> Run:
        """A run by its id; ParamsError with the id for an alias (nothing is trained under two names), else with the nearest."""
        if name in self.aliases:
            raise ParamsError(f"{self._runs_file.path}: run {name} is known here as {self.aliases[name]}; use that name.")
        if name not in self.runs:
            raise ParamsError(f"{self._runs_file.path}: {_unknown('run', name, [*self.runs, *self.aliases])}.")
        return self.runs[name]

    def canonical(self, name: str) -> str:
        """A run's id, from its id or an alias; ParamsError with the nearest name if it is unknown."""
        name = self.aliases.get(name, name)
        self.run(name)
        return name

    def source(self, run: str) -> str | None:
        """The run whose weights this one starts from, or is evaluated with: trained before it."""
        return self.run(run).same_weights or self._init(run)

    def profile(self, name: str) -> Profile:
        """A profile by name; ParamsError with the nearest name if it is unknown."""
        if name not in self.profiles:
            raise ParamsError(f"params/profiles: {_unknown('profile', name, self.profiles)}.")
        return self.profiles[name]

    def published(self, name: str) -> Weights:
        """Published weights by name; ParamsError with the nearest name if it is unknown."""
        if name not in self.weights:
            raise ParamsError(f"{self._weights_file.path}: {_unknown('weights', name, self.weights)}.")
        return self.weights[name]

    def released(self, name: str, profile: str) -> dict[str, Any]:
        """Published weights as a profile takes them: `model`, `file`, `dataset` (with their size and crop), `machine`."""
        row, scale = self.published(name), self.profile(profile)
        dataset = scale.dataset.model_dump(mode="json", exclude_none=True)
        dataset |= {"image_size": row.input, "crop_pct": row.crop_pct, "crop_mode": row.crop_mode}
        _read_files_where_larger(dataset)
        return {
            "model": {"name": row.model, "args": row.args},
            "file": {"path": row.path, "sha256": row.sha256, "part": row.part, "source": row.source},
            "dataset": dataset,
            "machine": scale.machine.model_dump(mode="json"),
        }

    def released_identity(self, name: str, profile: str) -> str:
        """The part of it that makes an accuracy what it is, as JSON text; the weights themselves go by their digest."""
        row = self.released(name, profile)
        del row["file"]
        return _essence(row)

    def check_weights(self, name: str) -> None:
        """Stop before any work when published weights are not there and nobody said from where to download them."""
        row = self.published(name)
        if not Path(row.path).is_file() and row.url is None:
            raise self._weights_file.fault(
                (name, "path"), f"weights {name} are needed at {row.path}, and there is no file. Get them from {row.source} "
                                "and put them there, or give `url` in this row, then run the same command again")

    def report_rows(self, report: str) -> list[str]:
        """Run ids of a report: rows, then controls."""
        plan = self.report(report)
        return [*plan.runs, *plan.controls]

    def report(self, name: str) -> Report:
        """A report by name; ParamsError with the nearest name if it is unknown."""
        if name not in self.reports:
            raise ParamsError(f"{self._runs_file.path}: {_unknown('report', name, self.reports)}.")
        return self.reports[name]

    def same_as(self, run: str, profile: str) -> str | None:
        """The first row of runs.yaml that is equal at this scale, and trained in `run`'s stead; None if that is `run`."""
        if self.run(run).same_weights:
            return None
        mine = self.identity(run, profile)
        first = next(other for other, row in self.runs.items()
                     if not row.same_weights and self._identity(other, profile) == mine)
        return None if first == run else first

    def base(self, run: str, rows: Iterable[str]) -> str:
        """The nearest row of `rows` that `run` descends from: what a control is compared with."""
        rows, parent = set(rows), self.runs[run].parent
        while parent is not None and parent not in rows:
            parent = self.runs[parent].parent
        if parent is None:
            raise self._runs_file.fault(("runs", run), f"control {run} must descend from a row of its report")
        return parent

    def trained(self, runs: Iterable[str], profile: str) -> list[str]:
        """What is trained for `runs` at this scale, each once: a run, or in its place the run before it that is equal."""
        return list(dict.fromkeys(self.same_as(run, profile) or run for run in runs))

    def seeds(self, report: str, seeds: Iterable[int]) -> tuple[int, ...]:
        """Those of the active seeds that a report is made from."""
        return tuple(seeds)[: self.report(report).seeds]

    def check_trainable(self, run: str) -> None:
        """Stop before any work when a row is not trained but takes the weights of another."""
        if weights := self.run(run).same_weights:
            raise self._runs_file.fault(("runs", run), f"run {run} is evaluated with the weights of {weights}, not trained")

    def check_init(self, run: str, init: Path | None) -> None:
        """Stop before any work when a row with init_from is not given the weights to start from, or another one is."""
        source, at = self._init(run), ("runs", run)
        if source and init is None:
            raise self._runs_file.fault(at, f"run {run} starts from the weights of {source}; give them: --init "
                                            f"artifacts/.../train/{source}/.../weights.safetensors")
        if init and not source:
            raise self._runs_file.fault(at, f"run {run} starts from random weights, but {init} is given; leave --init out, or "
                                            "give the row init_from")

    def check_data(self, profile: str) -> None:
        """Stop before any work when the profile's dataset is a folder of the user that is not there."""
        dataset = self.profiles[profile].dataset
        if dataset.root is None:
            return
        missing = [split for split in ("train", "val") if not (Path(dataset.root) / split).is_dir()]
        if missing:
            raise ParamsError(
                f"profile {profile} needs {dataset.name} in {dataset.root}/ with one folder per class under train/ and "
                f"val/, but {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not there. Put the images there "
                f"or link them: ln -s /path/to/{dataset.name} {dataset.root}."
            )

    def check_images(self, profile: str, train: int, val: int) -> None:
        """Stop before any training when the folder of a dataset that params/plan.yaml knows holds another number of images."""
        dataset = self.profile(profile).dataset
        needed = self.planning.images.get(dataset.name)
        if needed and (train, val) != (needed.train, needed.val):
            raise ParamsError(
                f"profile {profile} needs {needed.train} training and {needed.val} validation images of {dataset.name} "
                f"(params/plan.yaml), got {train} and {val} in {dataset.root}. Complete the folder; or, to go on with these, "
                f"give the dataset another name than {dataset.name} in a profile of your own (params/profiles/)."
            )

    def _ancestry(self, run: str) -> list[Run]:
        """The rows from the first of the family to this one."""
        line = [run]
        while parent := self.runs[line[0]].parent:
            if parent in line:
                raise self._runs_file.fault(("runs", run, "from"), f"run {run} descends from itself through {parent}")
            line.insert(0, parent)
        return [self.runs[name] for name in line]

    def _used(self, run: str, part: Literal["model", "recipe"]) -> str:
        """The nearest name that the row or its ancestors give under `uses`."""
        return next(name for row in reversed(self._ancestry(run)) if (name := getattr(row.uses, part)))

    def _init(self, run: str) -> str | None:
        """The nearest run that the row or its ancestors give under `init_from`."""
        return next((row.init_from for row in reversed(self._ancestry(run)) if row.init_from), None)

    def _named_again(self) -> dict[str, str]:
        """Alias -> run; no name stands for two."""
        aliases: dict[str, str] = {}
        for run, row in self.runs.items():
            for alias in row.aliases:
                if other := alias if alias in self.runs else aliases.get(alias):
                    raise self._runs_file.fault(("runs", run, "aliases"), f"run {run}: alias {alias} is already run {other}")
                aliases[alias] = run
        return aliases

    def rate(self, run: str) -> Rate | None:
        """The nearest rate that params/plan.yaml gives for the row or its ancestors."""
        line: str | None = run
        while line is not None and line not in self.planning.rates:
            line = self.run(line).parent
        return None if line is None else self.planning.rates[line]

    def _planning(self, file: "_File") -> Planning:
        planning = file.check(Planning)
        for run in planning.rates:
            if run not in self.runs:
                raise file.fault(("rates", run), _unknown("run", run, self.runs))
        return planning

    def _active(self, file: "_File") -> Active:
        active = file.check(Active)
        if active.profile not in self.profiles:
            raise file.fault(("profile",), _unknown("profile", active.profile, self.profiles))
        if active.reports_folder != (folder := self.profiles[active.profile].reports):
            raise file.fault(("reports_folder",), f"profile {active.profile} needs reports_folder: {folder}")
        if len(set(active.seeds)) < len(active.seeds):
            raise file.fault(("seeds",), f"seeds must differ from each other, got {list(active.seeds)}")
        return active

    def _check_references(self) -> None:
        file = self._runs_file
        for name, run in self.runs.items():
            at = ("runs", name)
            for key, value in (("from", run.parent), ("same_weights", run.same_weights), ("init_from", run.init_from)):
                if value is not None and value not in self.runs:
                    raise file.fault((*at, key), f"run {name}: {_unknown('run', value, self.runs)}")
            for key, known in (("model", self._models), ("recipe", self._recipes)):
                value = getattr(run.uses, key)
                if value is not None and value not in known:
                    raise file.fault((*at, "uses", key), f"run {name}: {_unknown(key, value, known)}")
                if run.parent is None and value is None:
                    raise file.fault(at, f"run {name} needs `from: <run>` or `uses: {{model: ..., recipe: ...}}`")
        for name, run in self.runs.items():
            args = ARGS[self._models[self._used(name, "model")].name]
            for part, at in ((run, ("runs", name)), (run.paper, ("runs", name, "paper")), (run.mini, ("runs", name, "mini"))):
                file.check(args, (*at, "model"), part.model, partial=True)
                file.check(Recipe, (*at, "recipe"), part.recipe, partial=True)
            self._check_init(name)
        for column, value in self.settings.items():
            if value not in self.runs:
                raise file.fault(("settings", column), f"column {column}: {_unknown('run', value, self.runs)}")
        for report, rows in self.reports.items():
            for key, named in (("rows", rows.runs), ("controls", rows.controls)):
                for value in named:
                    if value not in self.runs:
                        raise file.fault(("reports", report, key), f"report {report}: {_unknown('run', value, self.runs)}")


    def _check_weights(self) -> None:
        models = {*ARGS, *(row.model for table in self.costs.values() for row in table.rows if row.model)}
        for name, row in self.weights.items():
            if row.model not in models:
                raise self._weights_file.fault((name, "model"), f"weights {name}: {_unknown('network', row.model, models)}")
            if row.run is not None and row.run not in self.runs:
                raise self._weights_file.fault((name, "run"), f"weights {name}: {_unknown('run', row.run, self.runs)}")

    def _check_init(self, run: str) -> None:
        """A run starts from weights that are trained, and at last from random ones."""
        line = [run]
        while (source := self._init(line[-1])) is not None:
            at = ("runs", run, "init_from")
            if weights := self.runs[source].same_weights:
                raise self._runs_file.fault(at, f"run {run} needs a trained run to start from, got {source}, which takes the "
                                                f"weights of {weights}")
            if source in line:
                raise self._runs_file.fault(at, f"run {run} starts from its own weights through {source}")
            line.append(source)


def load(folder: Path = Path("params")) -> Params:
    """Read and check params/.

    Raises
    ------
    ParamsError
        One sentence that names file, line, row and key.
    """
    return Params(folder)


def write_active(path: Path, active: Active) -> None:
    """Write params/active.yaml, if it changes. OSError with one sentence where that is not possible."""
    text = yaml.safe_dump(active.model_dump(mode="json"), default_flow_style=None, sort_keys=False)
    if not path.exists() or path.read_text() != text:
        write_atomic(path, text.encode())


def _resized(image_size: int, crop_pct: float) -> int:
    """Px to which timm resizes an image's short side before it takes the crop."""
    return math.floor(image_size / crop_pct)


def _read_files_where_larger(dataset: dict[str, Any]) -> None:
    """Images reduced to less than a row needs would be blown up again: such a row reads the files."""
    if dataset.get("cache_px", math.inf) < _resized(dataset["image_size"], dataset["crop_pct"]):
        del dataset["cache_px"]


def _essence(row: dict[str, Any]) -> str:
    """A resolved row without what does not change its result, as JSON text."""
    kept = {part: dict(row[part]) for part in row.keys() & _CIRCUMSTANCES.keys()}
    for part, values in kept.items():
        for name in _CIRCUMSTANCES[part]:
            if name != "processes" or values["sync_bn"]:
                values.pop(name, None)
    return json.dumps(row | kept, sort_keys=True)


def key(identity: str, data_sha256: str, code: str, seed: int, init: str | None = None) -> str:
    """A run's key: hash of resolved row, data, initial weights, meaning of the code, and seed."""
    parts = json.dumps([identity, data_sha256, init, code, seed])
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


class _File:
    """A YAML file of text, numbers, lists and mappings with distinct names, that knows the line of every key.

    `kind` says what its first level of names stands for; in runs.yaml it is the second.
    """

    def __init__(self, path: Path, kind: str = "") -> None:
        self.path, self._kind = path, kind
        try:
            self._node = yaml.compose(path.read_text(encoding="utf-8"), Loader=_Loader)
            if not isinstance(self._node, yaml.MappingNode):
                raise ParamsError(f"{path}: a mapping of names is needed, got {_shown(self._node)}.")
            self._check_node(self._node)
            self.data = yaml.constructor.SafeConstructor().construct_document(self._node)
        except FileNotFoundError:
            raise ParamsError(f"{path} is missing. Restore it: git checkout -- {path}.") from None
        except OSError as error:
            raise ParamsError(f"{path} cannot be read: {error.strerror}.") from None
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(b"\n") + 1
            raise ParamsError(f"{path}:{line}: text in UTF-8 is needed, got the byte {error.object[error.start]:#x}.") from None
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line, problem = f":{mark.line + 1}" if mark else "", getattr(error, "problem", None) or str(error)
            raise ParamsError(f"{path}{line}: not readable as YAML: {' '.join(problem.split())}.") from None

    def fault(self, at: tuple[str, ...], sentence: str) -> ParamsError:
        """The error to raise for a fault at a place, with the line of its innermost key that stands in the file."""
        node, line = self._node, ""
        for step in at:
            pairs = {name.value: (name, value) for name, value in node.value} if isinstance(node, yaml.MappingNode) else {}
            if step not in pairs:
                break
            line, node = f":{pairs[step][0].start_mark.line + 1}", pairs[step][1]
        return ParamsError(f"{self.path}{line}: {sentence}.")

    def check(self, schema: type[_Row], at: tuple[str, ...] = (), data: Any = None, partial: bool = False) -> Any:
        """`data`, or else what stands at `at`, as a row of `schema`. `partial`: a change to a row, so keys may be missing."""
        if data is None:
            data = functools.reduce(lambda part, step: part[step], at, self.data)
        try:
            return schema.model_validate_json(json.dumps(data))
        except ValidationError as error:
            faults = [fault for fault in error.errors() if not (partial and fault["type"] == "missing")]
        if not faults:
            return None
        # A misspelt key rather than the missing one, and in a union the branch that was meant: the one that goes deepest.
        first = min(faults, key=lambda fault: (fault["type"] != "extra_forbidden", -len(_steps(data, fault))))
        steps = _steps(data, first)
        row, key = self._row((*at, *steps))
        match first["type"]:
            case "extra_forbidden":
                said = _joined(row, _unknown("key", key, _keys(schema, steps[:-1]), steps[-1]))
            case "missing":
                said = _joined(row, f"key {key} is missing")
            case "value_error":
                said = f"{_joined(row, key)}: {first['ctx']['error']}"
            case "dict_type" | "model_type":
                said = f"{_joined(row, key)}: a mapping is needed, got {_short(first['input'])}"
            case _:
                said = f"{_joined(row, key)}: {first['msg'][:1].lower()}{first['msg'][1:]}, got {_short(first['input'])}"
        raise self.fault((*at, *steps), said)

    def _row(self, at: tuple[str, ...]) -> tuple[str, str]:
        """A place in words: the row, and the key within it."""
        if self._kind and at:
            return f"{self._kind} {at[0]}", ".".join(at[1:])
        if at[:1] in (("runs",), ("reports",)) and len(at) > 1:
            return f"{at[0].removesuffix('s')} {at[1]}", ".".join(at[2:])
        return "", ".".join(at)

    def _check_node(self, node: yaml.Node, above: tuple[yaml.Node, ...] = ()) -> None:
        """Only what JSON has too, and every name once: YAML also knows dates, sets, names that are numbers, loops."""
        here = f"{self.path}:{node.start_mark.line + 1}"
        if (tag := node.tag.removeprefix(_TAG)) not in _TAGS:
            raise ParamsError(f"{here}: text, a number, a list or a mapping is needed, got {_shown(node)} ({tag}); quote text.")
        if node in above:
            raise ParamsError(f"{here}: text, a number, a list or a mapping is needed, got one that holds itself.")
        if isinstance(node, yaml.SequenceNode):
            for item in node.value:
                self._check_node(item, (*above, node))
        elif isinstance(node, yaml.MappingNode):
            seen: dict[str, int] = {}
            for name, value in node.value:
                line = name.start_mark.line + 1
                if name.tag.removeprefix(_TAG) not in ("str", "merge"):
                    raise ParamsError(f"{self.path}:{line}: a name needs to be text, got {_shown(name)}; quote it.")
                if name.value in seen and name.value != "<<":
                    first = f"first in line {seen[name.value]}"
                    raise ParamsError(f"{self.path}:{line}: not readable as YAML: {name.value} stands twice, {first}.")
                seen[name.value] = line
                self._check_node(value, (*above, node))


_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TAG = "tag:yaml.org,2002:"
_TAGS = ("str", "int", "float", "bool", "null", "seq", "map")


def _models(file: _File) -> dict[str, _Model]:
    models = {name: file.check(_Model, (name,)) for name in file.data}
    for name, model in models.items():
        if model.name not in ARGS:
            raise file.fault((name, "name"), f"model {name}: {_unknown('network', model.name, ARGS)}")
        file.check(ARGS[model.name], (name, "args"))
    return models


def _recipes(file: _File) -> dict[str, dict[str, Any]]:
    """Recipes with what they take `from` another."""
    done: dict[str, dict[str, Any]] = {}
    for name, row in file.data.items():
        recipe = _inherit(file, (name,), row, done, f"recipe {name}: ", "recipe above it")
        file.check(_RecipeRow, (name,), recipe)
        done[name] = {key: value for key, value in recipe.items() if key != "from"}
    return done


def _profiles(folder: Path, models: Mapping[str, _Model], recipes: Mapping[str, dict[str, Any]]) -> dict[str, Profile]:
    """Profiles with what they take `from` another; what they lay over models and recipes is checked in their own file."""
    files = {path.stem: _File(path) for path in sorted(folder.glob("*.yaml"))}
    if not files:
        raise ParamsError(f"{folder}/ holds no profile. Restore it: git checkout -- {folder}.")
    whole = {name: file.data for name, file in files.items() if "from" not in file.data}
    profiles = {}
    for name in sorted(files, key=lambda name: name not in whole):  # a profile before those that are from it
        file = files[name]
        profiles[name] = profile = file.check(Profile, (), _inherit(file, (), file.data, whole, "", "profile without `from`,"))
        for key, overlays, known in (("model", profile.models, models), ("recipe", profile.recipes, recipes)):
            for other in overlays:
                if other not in known:
                    raise file.fault((f"{key}s", other), _unknown(key, other, known))
        for model, args in profile.models.items():
            file.check(ARGS[models[model].name], ("models", model), _merge(models[model].args, args))
        for recipe, change in profile.recipes.items():
            file.check(Recipe, ("recipes", recipe), _merge(recipes[recipe], change))
    return profiles


def _inherit(file: _File, at: tuple[str, ...], row: Any, known: Mapping[str, Any], who: str, kind: str) -> Any:
    """A row laid over the one that it is `from`, if any."""
    if not isinstance(row, Mapping) or "from" not in row:
        return row
    if (parent := row["from"]) not in list(known):
        raise file.fault((*at, "from"), f"{who}{_unknown(kind, parent, known)}")
    return _merge(known[parent], row)


def _merge(base: Any, change: Any) -> Any:
    """`base` with `change` laid over it, mapping by mapping. None and lists replace."""
    if isinstance(base, Mapping) and isinstance(change, Mapping):
        return {**base, **{key: _merge(base.get(key), value) for key, value in change.items()}}
    return change


def _steps(data: Any, fault: Mapping[str, Any]) -> tuple[str, ...]:
    """Where in the data a fault lies: pydantic's steps without those that name a branch of a union or a validator."""
    steps = []
    for step in fault["loc"]:
        inside = data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ()
        if step in inside:
            data = data[step]
        elif fault["type"] != "missing":
            continue
        steps.append(str(step))
    return tuple(steps)


def _keys(schema: type[_Row], steps: Iterable[str]) -> list[str]:
    """Names of the keys that a schema has at a place."""
    for step in steps:
        if step not in schema.model_fields:                           # a place in a list, a name in a mapping
            continue
        kind = schema.model_fields[step].annotation
        schema = next(part for part in (kind, *get_args(kind)) if isinstance(part, type) and issubclass(part, _Row))
    return [field.alias or name for name, field in schema.model_fields.items()]


def _unknown(kind: str, shown: Any, known: Iterable[str], name: str | None = None) -> str:
    near = difflib.get_close_matches(name or str(shown), list(known), n=1, cutoff=0)
    return f"unknown {kind} {shown}" + (f"; the nearest known name is {near[0]}" if near else "")


def _joined(*words: str) -> str:
    return ", ".join(filter(None, words))


def _shown(node: yaml.Node | None) -> str:
    if isinstance(node, yaml.ScalarNode):
        return _short(node.value)
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping" if node else "nothing"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
