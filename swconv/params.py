"""Experiments as data: the YAML rows of params/, checked and resolved. No torch here.

`load(Path("params"))` reads everything and checks every row in every map; `Params.resolve` gives a run's full configuration.
Every fault is one sentence that names file, line, row and key, and the nearest known name.
"""

import difflib
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

Map = Literal["paper", "mini"]
Share = Annotated[float, Field(ge=0, le=1)]
# Where data lies and how fast it is read do not change a result: left out of a run's identity.
_CIRCUMSTANCES = ("root", "workers", "cache")


class ParamsError(ValueError):
    """A fault in params/, told in one sentence."""


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class NetworkArgs(_Row):
    """Arguments that all our networks take. Kernel sizes and dims in pixels and channels, one entry per stage."""

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    width_factor: float
    kernel_sizes: tuple[int | tuple[int, ...], ...]
    small_kernel: int
    layer_scale_init: float


class ShiftwiseArgs(NetworkArgs):
    """`swconv.models.sw.shiftwise_net`."""

    rep_branches: Annotated[int, Field(ge=1)]
    edges: Annotated[int, Field(ge=1)]
    ghost_ratio: Annotated[float, Field(ge=0, lt=1)]
    use_se: bool
    padding: Literal["full", "half"]
    norm: Literal["branch", "filter"] | None
    skip: bool
    order: Literal["shuffled", "reversed", "shuffle_v"]
    depthwise_norm_skip: bool


class SlakArgs(NetworkArgs):
    """SLaK: strips M x N and N x M with a small square kernel beside them."""

    decomposed: bool
    bn: bool
    laid_out: bool


ARGS: dict[str, type[NetworkArgs]] = {"slak_tiny": SlakArgs, "sw_slak_tiny": ShiftwiseArgs, "sw_tiny": ShiftwiseArgs}


class Sparsity(_Row):
    """Sparse training, see `swconv.sparsity.SparseTraining`. Steps are optimizer steps."""

    level: Annotated[float, Field(gt=0, lt=1)]
    granularity: Literal["filter", "element"]
    others: Literal["none", "pointwise", "body", "all"]
    scores: Literal["sum", "concat"]
    update_every: Annotated[int, Field(ge=1)]
    prune_rate: Annotated[float, Field(ge=0, lt=1)]
    share_every: Annotated[int, Field(ge=1)]
    subset: bool
    growth: Literal["bernoulli", "exact"]


class Recipe(_Row):
    """A training recipe. The learning rate is for `batch_size` images per step."""

    epochs: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)]
    lr: Annotated[float, Field(gt=0)]
    min_lr: Annotated[float, Field(ge=0)]
    warmup_epochs: Annotated[float, Field(ge=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    betas: tuple[float, float]
    eps: float
    drop_path_rate: Share
    ema_decay: Share | None
    label_smoothing: Share
    mixup: Annotated[float, Field(ge=0)]
    cutmix: Annotated[float, Field(ge=0)]
    mixup_switch: Share
    rand_augment: str | None
    random_erasing: Share
    random_resized_crop: bool
    hflip: Share
    evaluate_every: Annotated[int, Field(ge=1)]
    sparsity: Sparsity | None


class Dataset(_Row):
    """What a profile trains on. `root` is a folder of the user; sizes are given where we make the data ourselves."""

    name: str
    root: str | None = None
    train_images: int | None = None
    val_images: int | None = None
    image_size: int
    in_chans: Literal[1, 3]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    interpolation: Literal["bicubic", "bilinear"]
    cache: bool
    workers: Annotated[int, Field(ge=0)]


class Machine(_Row):
    """What bitwise equality depends on: part of a run's identity. BatchNorm sees `micro_batch` images at a time."""

    device: Literal["cpu", "cuda"]
    threads: Annotated[int, Field(ge=1)]
    memory_format: Literal["contiguous", "channels_last"]
    amp: Literal["bfloat16"] | None
    micro_batch: Annotated[int, Field(ge=1)] | None


class Profile(_Row):
    """A scale: which map of runs.yaml, where its reports go, which data and machine, what stands for models and recipes."""

    map: Map
    reports: str
    dataset: Dataset
    machine: Machine
    models: dict[str, dict[str, Any]]
    recipes: dict[str, dict[str, Any]]

    @property
    def uses_gpu(self) -> bool:
        return self.machine.device == "cuda"

    @property
    def threads(self) -> int:
        return self.machine.threads


class _Uses(_Row):
    model: str | None = None
    recipe: str | None = None


class _Changes(_Row):
    model: dict[str, Any] = {}
    recipe: dict[str, Any] = {}


class Run(_Row):
    """One row of runs.yaml."""

    label: str
    text: str
    source: str
    note: str | None = None
    parent: str | None = Field(None, alias="from")
    uses: _Uses = _Uses()
    same_weights: str | None = None
    model: dict[str, Any] = {}
    recipe: dict[str, Any] = {}
    paper: _Changes = _Changes()
    mini: _Changes = _Changes()


class Report(_Row):
    """Rows of a report, in the paper's order, and control rows below them."""

    rows: tuple[str, ...]
    controls: tuple[str, ...] = ()


class Active(_Row):
    """What both engines make when nothing else is asked for."""

    profile: str
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)
    reports_folder: str  # that of the profile; DVC cannot look it up


class _Model(_Row):
    name: str
    args: dict[str, Any]


class Params:
    """All of params/, checked.

    Attributes
    ----------
    runs : dict of str to Run
    reports : dict of str to Report
    profiles : dict of str to Profile
    active : Active
    """

    def __init__(self, folder: Path) -> None:
        files = {name: _File(folder / f"{name}.yaml") for name in ("models", "recipes", "runs", "active")}
        self._runs_file, self._resolved = files["runs"], {}
        self.active = files["active"].check(Active, ())
        self._models = {name: files["models"].check(_Model, (name,)) for name in files["models"].data}
        self._recipes = _inherit(files["recipes"])
        files["runs"].check_keys(("reports", "runs"), ())
        self.runs = {run: files["runs"].check(Run, ("runs", run)) for run in files["runs"].data["runs"]}
        self.reports = {name: files["runs"].check(Report, ("reports", name)) for name in files["runs"].data["reports"]}
        self.profiles = _profiles(folder / "profiles")
        if self.active.profile not in self.profiles:
            raise files["active"].fault(("profile",), _unknown("profile", self.active.profile, self.profiles))
        if self.active.reports_folder != (folder := self.profiles[self.active.profile].reports):
            raise files["active"].fault(("reports_folder",), f"profile {self.active.profile} needs reports_folder: {folder}")
        seeds = self.active.seeds
        if len(set(seeds)) < len(seeds):
            raise files["active"].fault(("seeds",), f"seeds must differ from each other, got {list(seeds)}")
        self._check_references()
        for profile in self.profiles:
            for run in self.runs:
                self.resolve(run, profile)

    def resolve(self, run: str, profile: str) -> dict[str, Any]:
        """A run's full configuration at a profile's scale: `model`, `recipe`, `dataset`, `machine`. JSON types only.

        Raises
        ------
        ParamsError
            For an unknown run or profile, or a configuration that does not check.
        """
        if run not in self.runs:
            raise ParamsError(f"{self._runs_file.path}: {_unknown('run', run, self.runs)}.")
        self.profile(profile)
        if (run, profile) not in self._resolved:
            self._resolved[run, profile] = self._resolve(run, profile)
        return json.loads(self._resolved[run, profile])

    def _resolve(self, run: str, profile: str) -> str:
        scale = self.profiles[profile]
        line = self._ancestry(run)
        model = next(row.uses.model for row in reversed(line) if row.uses.model)
        recipe = next(row.uses.recipe for row in reversed(line) if row.uses.recipe)
        args = _merge(self._models[model].args, scale.models.get(model, {}))
        training = _merge(self._recipes[recipe], scale.recipes.get(recipe, {}))
        for row in line:
            changes = getattr(row, scale.map)
            args = _merge(_merge(args, row.model), changes.model)
            training = _merge(_merge(training, row.recipe), changes.recipe)
        name = self._models[model].name
        checked = {
            "model": {"name": name, "args": self._checked(ARGS[name], args, run, "model").model_dump(mode="json")},
            "recipe": self._checked(Recipe, training, run, "recipe").model_dump(mode="json"),
            "dataset": scale.dataset.model_dump(mode="json", exclude_none=True),
            "machine": scale.machine.model_dump(mode="json"),
        }
        self._check_sense(run, checked["model"]["args"], checked["recipe"])
        return json.dumps(checked, sort_keys=True)

    def identity(self, run: str, profile: str) -> str:
        """The part of a resolved row that makes a result what it is, as JSON text: equal text, equal experiment."""
        row = self.resolve(run, profile)
        row["dataset"] = {key: value for key, value in row["dataset"].items() if key not in _CIRCUMSTANCES}
        return json.dumps(row, sort_keys=True)

    def profile(self, name: str) -> Profile:
        """A profile by name; ParamsError with the nearest name if it is unknown."""
        if name not in self.profiles:
            raise ParamsError(f"params/profiles: {_unknown('profile', name, self.profiles)}.")
        return self.profiles[name]

    def report_rows(self, report: str) -> list[str]:
        """Run ids of a report: rows, then controls."""
        if report not in self.reports:
            raise ParamsError(f"{self._runs_file.path}: {_unknown('report', report, self.reports)}.")
        return [*self.reports[report].rows, *self.reports[report].controls]

    def same_as(self, run: str, profile: str, among: Iterable[str]) -> str | None:
        """The first run of `among` before `run` whose resolved configuration is equal at this scale, or None."""
        for other in among:
            if other == run:
                return None
            if self.identity(other, profile) == self.identity(run, profile):
                return other
        return None

    def base(self, run: str, rows: Iterable[str]) -> str:
        """The nearest row of `rows` that `run` descends from: what a control is compared with."""
        rows, parent = set(rows), self.runs[run].parent
        while parent is not None and parent not in rows:
            parent = self.runs[parent].parent
        if parent is None:
            raise self._runs_file.fault(("runs", run), f"control {run} must descend from a row of its report")
        return parent

    def trained(self, runs: Iterable[str], profile: str) -> list[str]:
        """Those of `runs` that are trained at this scale: no row whose configuration equals that of a row before it."""
        runs = list(runs)
        return [run for run in runs if self.same_as(run, profile, runs) is None]

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

    def _ancestry(self, run: str) -> list[Run]:
        """The rows from the first of the family to this one."""
        line = [run]
        while parent := self.runs[line[0]].parent:
            if parent in line:
                raise self._runs_file.fault(("runs", run, "from"), f"run {run} descends from itself through {parent}")
            line.insert(0, parent)
        return [self.runs[name] for name in line]

    def _check_references(self) -> None:
        file = self._runs_file
        for name, run in self.runs.items():
            at = ("runs", name)
            for key, known in (("from", self.runs), ("same_weights", self.runs)):
                value = run.parent if key == "from" else run.same_weights
                if value is not None and value not in known:
                    raise file.fault((*at, key), f"run {name}: {_unknown('run', value, known)}")
            for key, known in (("model", self._models), ("recipe", self._recipes)):
                value = getattr(run.uses, key)
                if value is not None and value not in known:
                    raise file.fault((*at, "uses", key), f"run {name}: {_unknown(key, value, known)}")
                if run.parent is None and value is None:
                    raise file.fault(at, f"run {name} needs `from: <run>` or `uses: {{model: ..., recipe: ...}}`")
        for name, run in self.runs.items():
            fields = ARGS[self._models[next(r.uses.model for r in reversed(self._ancestry(name)) if r.uses.model)].name]
            for part, where in ((run, ()), (run.paper, ("paper",)), (run.mini, ("mini",))):
                file.check_keys(fields.model_fields, ("runs", name, *where, "model"), part.model)
                file.check_keys(Recipe.model_fields, ("runs", name, *where, "recipe"), part.recipe)
                sparsity = part.recipe.get("sparsity") or {}
                if isinstance(sparsity, Mapping):
                    file.check_keys(Sparsity.model_fields, ("runs", name, *where, "recipe", "sparsity"), sparsity)
        for report, rows in self.reports.items():
            for key in ("rows", "controls"):
                for value in getattr(rows, key):
                    if value not in self.runs:
                        raise file.fault(("reports", report, key), f"report {report}: {_unknown('run', value, self.runs)}")

    def _checked(self, schema: type[_Row], data: Any, run: str, part: str) -> _Row:
        try:
            return schema.model_validate_json(json.dumps(data))
        except ValidationError as error:
            first = error.errors()[0]
            at = [str(step) for step in first["loc"] if isinstance(step, str) and not step.startswith(("function", "tuple"))]
            where = next((path for path in (("runs", run, *tail, part, *at) for tail in ((), ("paper",), ("mini",)))
                          if self._runs_file.line(path)), ("runs", run))
            raise self._runs_file.fault(
                where, f"run {run}, {'.'.join([part, *at])}: {_lower(first['msg'])}, got {_short(first['input'])}"
            ) from None

    def _check_sense(self, run: str, args: Mapping[str, Any], recipe: Mapping[str, Any]) -> None:
        counts = {key: len(args[key]) for key in ("depths", "dims", "kernel_sizes")}
        if len(set(counts.values())) > 1:
            raise self._runs_file.fault(
                ("runs", run), f"run {run}: depths, dims and kernel_sizes need one entry per stage, got {counts}"
            )
        if recipe["warmup_epochs"] >= recipe["epochs"]:
            raise self._runs_file.fault(
                ("runs", run),
                f"run {run}: warmup_epochs must be below epochs, got {recipe['warmup_epochs']} of {recipe['epochs']}",
            )


def load(folder: Path = Path("params")) -> Params:
    """Read and check params/.

    Raises
    ------
    ParamsError
        One sentence that names file, line, row and key.
    """
    return Params(folder)


def write_active(path: Path, active: Active) -> None:
    """Write params/active.yaml, if it changes."""
    text = yaml.safe_dump(active.model_dump(mode="json"), default_flow_style=None, sort_keys=False)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def key(identity: str, data_sha256: str, code: str, seed: int, init: str | None = None) -> str:
    """A run's key: hash of resolved row, data, initial weights, meaning of the code, and seed."""
    parts = json.dumps([identity, data_sha256, init, code, seed])
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


class _File:
    """A YAML file that knows the line of every key and refuses duplicates."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            text = path.read_text()
            self._node = yaml.compose(text, Loader=_Loader)
            self.data = yaml.load(text, Loader=_Loader)
        except FileNotFoundError:
            raise ParamsError(f"{path} is missing. Restore it: git checkout -- {path}.") from None
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f":{mark.line + 1}" if mark else ""
            raise ParamsError(f"{path}{line}: not readable as YAML: {getattr(error, 'problem', None) or error}.") from None
        if not isinstance(self.data, dict):
            raise ParamsError(f"{path}: a mapping of names is needed, got {_short(self.data)}.")

    def fault(self, at: tuple[str, ...], sentence: str) -> ParamsError:
        found = next((line for cut in range(len(at), 0, -1) if (line := self.line(at[:cut]))), None)
        return ParamsError(f"{self.path}{f':{found}' if found else ''}: {sentence}.")

    def line(self, at: tuple[str, ...]) -> int | None:
        node, line = self._node, None
        for step in at:
            if not isinstance(node, yaml.MappingNode):
                return None
            match = next(((k, v) for k, v in node.value if k.value == step), None)
            if match is None:
                return None
            line, node = match[0].start_mark.line + 1, match[1]
        return line

    def check_keys(self, known: Iterable[str], at: tuple[str, ...], data: Any = None) -> None:
        known = list(known)
        row = f"run {at[1]}, " if at[:1] == ("runs",) else ""
        for name in self.data if data is None else data:
            if name not in known:
                raise self.fault((*at, name), f"{row}{_unknown('key', '.'.join((*at[2:], name)), known, name)}")

    def check(self, schema: type[_Row], at: tuple[str, ...], data: Any = None) -> Any:
        if data is None:
            data = functools.reduce(lambda part, step: part[step], at, self.data)
        title = " ".join(("run" if step == "runs" else step) for step in at)
        if not isinstance(data, dict):
            raise self.fault(at, f"{title} needs a mapping, got {_short(data)}")
        names = [field.alias or name for name, field in schema.model_fields.items()]
        for name in data:
            if name not in names:
                raise self.fault((*at, name), f"{title}{': ' if title else ''}{_unknown('key', name, names)}")
        try:
            return schema.model_validate_json(json.dumps(data))
        except ValidationError as error:
            first = error.errors()[0]
            steps = tuple(str(step) for step in first["loc"])
            names = f"{title}, {'.'.join(steps)}" if title else ".".join(steps)
            if first["type"] == "missing":
                raise self.fault(at, f"{title}: key {'.'.join(steps)} is missing") from None
            raise self.fault((*at, *steps), f"{names}: {_lower(first['msg'])}, got {_short(first['input'])}") from None


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """Safe YAML that refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = {}
        for name, _ in node.value:
            if name.value in seen and name.value != "<<":
                raise yaml.constructor.ConstructorError(
                    problem=f"{name.value} stands twice, first in line {seen[name.value]}", problem_mark=name.start_mark
                )
            seen[name.value] = name.start_mark.line + 1
        return super().construct_mapping(node, deep)


def _inherit(file: _File) -> dict[str, dict[str, Any]]:
    """Recipes with what they take `from` another."""
    done: dict[str, dict[str, Any]] = {}
    for name, row in file.data.items():
        parent = row.get("from")
        if parent is not None and parent not in done:
            raise file.fault((name, "from"), f"recipe {name}: {_unknown('recipe above it', parent, done)}")
        file.check_keys(["from", *Recipe.model_fields], (name,), row)
        own = {key: value for key, value in row.items() if key != "from"}
        done[name] = _merge(done[parent] if parent else {}, own)
        file.check(Recipe, (name,), done[name])
    return done


def _profiles(folder: Path) -> dict[str, Profile]:
    files = {path.stem: _File(path) for path in sorted(folder.glob("*.yaml"))}
    if not files:
        raise ParamsError(f"{folder}/ holds no profile. Restore it: git checkout -- {folder}.")
    profiles = {}
    for name, file in files.items():
        data = dict(file.data)
        if (parent := data.pop("from", None)) is not None:
            if parent not in files:
                raise file.fault(("from",), _unknown("profile", parent, files))
            data = _merge(files[parent].data, data)
        profiles[name] = file.check(Profile, (), data)
    return profiles


def _merge(base: Any, change: Any) -> Any:
    """`base` with `change` laid over it, mapping by mapping. None and lists replace."""
    if isinstance(base, Mapping) and isinstance(change, Mapping):
        return {**base, **{key: _merge(base.get(key), value) for key, value in change.items()}}
    return change


def _unknown(kind: str, shown: str, known: Iterable[str], name: str | None = None) -> str:
    known = list(known)
    near = difflib.get_close_matches(name or shown, known, n=1, cutoff=0)
    return f"unknown {kind} {shown}" + (f"; the nearest known name is {near[0]}" if near else "")


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
