"""What fine-tunes would cost, beside the runs whose weights they start from: as `swconv.plan`, of params/downstream.yaml.

Steps and weights are exact where the images are listed; where they are not, detectors may take one step per epoch more. Memory,
disk and hours are estimates. Steps per epoch of a tiny set are known when it is made.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from math import ceil
from pathlib import Path
from typing import Any

from swconv.downstream.detection_config import CASCADE, FASTER, DetectorConfig
from swconv.downstream_params import Downstream
from swconv.plan import KEPT_CHECKPOINTS, Entry, Plan, earlier, kept, parameters, widths_of
from swconv.plan import plan as plan_training

CLASSES = {"ade20k": 150, "nuscenes": 10}
ATTRIBUTES, SCALES = 9, 15                                            # of FCOS3D: attributes; learned factors, three per level


def plan(known: Downstream, target: str, profile: str, artifacts: Path = Path("artifacts")) -> Plan:
    """Reckon what a target of `swconv.plan.plan`, a fine-tune, a page about them or "downstream" takes.

    "all" is all that a profile trains, fine-tunes included. Where these start from our own pretraining, it comes first.

    Raises
    ------
    ParamsError
        For an unknown target; for runs as `swconv.plan.plan` has it.
    """
    if (runs := _runs(known, target, profile)) is None:
        return plan_training(known.known, target, profile, artifacts)
    scale, before = known.profile(profile), {}
    for run in runs:
        source = known.source(run, profile)
        if source and source[0] == "train":
            before |= {entry.run: entry for entry in plan_training(known.known, source[1], scale.base, artifacts).entries}
    if target == "all":
        before |= {entry.run: entry for entry in plan_training(known.known, "all", profile, artifacts).entries}
    entries = [_entry(known, run, profile, artifacts) for run in runs]
    machine, planning = known.resolve(runs[0], profile)["machine"], known.known.planning
    return Plan(target, profile, (*before.values(), *entries), planning.uncertainty, planning.speed,
                machine["device"] == "cuda")


def network(task: str, row: Mapping[str, Any]) -> tuple[int, float]:
    """Weights of a task's network, and floats that it keeps of one training image for the backward pass, estimated.

    Parameters
    ----------
    row : mapping
        Resolved row of params/downstream.yaml, its backbone one of `swconv.params.ARGS` with all arguments.
    """
    name, args = row["network"]["name"], row["network"]["args"] | {"layer_scale_init": row["recipe"]["layer_scale_init"]}
    widths, pixels, head = widths_of(args), _pixels(task, row["train"]), row["head"]
    body = parameters(name, args, 3, 0) + 2 * (sum(widths) - widths[-1])            # a norm for every map, none behind the last
    maps = sum(width * pixels / 16 / 4**level for level, width in enumerate(widths))            # what the norms put out
    match task:
        case "ade20k":
            weights, floats = _upernet(head, widths, pixels)
        case "coco" | "voc":
            weights, floats = _detector(head, replace(CASCADE if task == "coco" else FASTER, **head), widths, pixels)
        case _:
            weights, floats = _fcos3d(head, widths, pixels)
    return body + weights, kept(name, args, 3, round(pixels**0.5)) + 2 * maps + floats


def _runs(known: Downstream, target: str, profile: str) -> list[str] | None:
    """The fine-tunes that a target names; None where it is one of `swconv.plan.plan`."""
    tables, training = known.known.costs, known.known
    if target == "downstream" or (target == "all" and profile in known.profiles):
        return list(known.runs)
    if target in tables and target not in training.reports:
        return list(dict.fromkeys(row.run for row in tables[target].rows if row.run)) or None
    theirs = {"all", *training.reports, *training.runs, *training.aliases}
    nearest = get_close_matches(target, [*theirs, *known.runs, *known.aliases], 1, 0.0)
    if target not in theirs and nearest[0] not in theirs:
        known.run(target)                                             # or the sentence with the nearest one
        return [target]
    return None


def _entry(known: Downstream, run: str, profile: str, artifacts: Path) -> Entry:
    row, task, source = known.resolve(run, profile), known.run(run).task, known.source(run, profile)
    recipe, machine = row["recipe"], row["machine"]
    sizes, batch = _images(known, task, profile, artifacts), recipe["batch_size"]
    at_once = ceil(min(machine["micro_batch"] or batch, batch) / machine["processes"])
    per_epoch, epochs, steps = None, recipe["epochs"], recipe["iterations"]
    if sizes:
        part = min(machine["micro_batch"] or batch, batch)
        # Detectors drop no image, and their groups do not mix.
        per_epoch = (ceil(sum(ceil(size * machine["processes"] / part) for size in sizes) * part / machine["processes"] / batch)
                     if task in ("coco", "voc") else sum(sizes) // batch)
        epochs, steps = epochs or ceil(steps / per_epoch), steps or per_epoch * epochs
    images = steps and steps * batch
    count = memory = disk = None
    if (backbone := _backbone(known, run, profile)) is not None:
        count, floats = network(task, row | {"network": backbone})
        disk = (KEPT_CHECKPOINTS * 12 + 4) * count                    # weights and two moments
        memory = (16 + recipe["sparse"]) * count + round(at_once * floats * (2 if machine["amp"] else 4))
    if machine["device"] == "cuda":
        rates = known.known.planning.fine_tunes
        rate = rates.get(run, rates.get(task))
        hours, basis = (None, None) if rate is None or images is None else (images / rate / 3600, "guessed")
    else:
        hours, basis = earlier(artifacts / profile / "finetune" / run, row)
    return Entry(run, source and source[1], True, None, epochs, per_epoch, steps, images, count, at_once, memory, disk, hours,
                 basis)


def _backbone(known: Downstream, run: str, profile: str) -> dict[str, Any] | None:
    """With all arguments, of which params/weights.yaml gives those that differ; None where that is another network."""
    trained = known.known.resolve(known.run(run).init_from, known.profile(profile).base)["model"]
    own = known.resolve(run, profile)["network"]
    return trained | {"args": trained["args"] | own["args"]} if own["name"] == trained["name"] else None


def _images(known: Downstream, task: str, profile: str, artifacts: Path) -> Sequence[int]:
    """Training images, by group where batches hold one group: as the data stage lists them, else as params/ says; none of a
    tiny set that is not made yet."""
    listed = artifacts / profile / "downstream_data" / task / "data.json"
    if listed.exists():
        record = json.loads(listed.read_text())
        wide = record.get("n_train_wide", 0)
        return [wide, record["n_train"] - wide]
    return [] if known.of_task(task, profile)["root"] is None else [known.known.planning.images[task].train]


def _pixels(task: str, view: Mapping[str, Any]) -> float:
    """Of a training image, on average."""
    if task == "ade20k":
        return view["crop"][0] * view["crop"][1]
    short = sum(sides := view.get("short_sides") or [view["short_side"]]) / len(sides)
    long = min(view["long_side"], short * (4 / 3 if "short_sides" in view else 16 / 9))
    return (ceil(short / 32) * 32) * (ceil(long / 32) * 32)


def _conv(inputs: int, outputs: int, side: int = 3) -> int:
    """Weights with bias."""
    return inputs * outputs * side**2 + outputs


def _upernet(head: Mapping[str, Any], widths: Sequence[int], pixels: float) -> tuple[int, float]:
    *lower, top = widths
    width, aux, classes, scales = head["channels"], head["aux_channels"], CLASSES["ade20k"], len(head["pool_scales"])

    def normed(inputs: int, outputs: int, side: int) -> int:
        return _conv(inputs, outputs, side) + outputs                  # no bias, but a norm

    weights = (scales * normed(top, width, 1) + normed(top + scales * width, width, 3) + sum(normed(c, width, 1) for c in lower)
               + len(lower) * normed(width, width, 3) + normed(len(widths) * width, width, 3) + _conv(width, classes, 1)
               + normed(widths[2], aux, 3) + _conv(aux, classes, 1))
    levels = sum(4.0**-level for level in range(len(lower)))
    # behind every convolution the input of its norm and the output of its ReLU; logits as large as the image, twice
    floats = width * (5 * levels + 7) + 3 * aux / 16 + 2 * 16 * classes + (top + (scales + 2) * width) / 64
    return weights, floats * pixels / 16


def _detector(head: Mapping[str, Any], config: DetectorConfig, widths: Sequence[int], pixels: float) -> tuple[int, float]:
    width, classes, stages, fc = config.channels, config.num_classes, len(config.stages), config.fc_channels
    box = config.convs * (_conv(width, width) + width) + _conv(49 * width, fc, 1) + (config.fcs - 1) * _conv(fc, fc, 1) \
        + _conv(fc, classes + 1, 1) + _conv(fc, 4 * classes, 1)
    mask = 4 * _conv(width, width) + _conv(width, width, 2) + _conv(width, classes, 1)
    weights = sum(_conv(c, width, 1) for c in widths) + 4 * _conv(width, width) + _conv(width, width) + _conv(width, 15, 1) \
        + stages * (box + config.masks * mask)
    # FPN and RPN: three maps per level; a region: 7 x 7 pooled, behind every convolution two maps; masks of a quarter
    regions = config.roi_samples * (49 * width * (1 + 2 * config.convs) + config.fcs * fc + 6 * classes)
    masks = config.masks * config.roi_samples / 4 * (196 * width * (5 + 4) + 784)
    return weights, 4 / 3 * pixels / 16 * (3 * width + 15) + stages * (regions + masks)


def _fcos3d(head: Mapping[str, Any], widths: Sequence[int], pixels: float) -> tuple[int, float]:
    narrow, width, small, classes = head["fpn_channels"], head["channels"], head["centerness_channels"], CLASSES["nuscenes"]

    def normed(inputs: int, outputs: int) -> int:
        return _conv(inputs, outputs) + 2 * outputs

    moves = head["deformable"] * _conv(width, 27)
    weights = (sum(_conv(c, narrow, 1) for c in widths[1:]) + 5 * _conv(narrow, narrow)
               + 2 * (normed(narrow, width) + normed(width, width) + moves) + 7 * normed(width, width) + normed(width, small)
               + _conv(width, classes + ATTRIBUTES + 2 + 9, 1) + _conv(small, 1, 1) + SCALES)
    # FPN: two maps per level; behind every convolution the input of its norm and the output of its ReLU
    return weights, 4 / 3 * pixels / 64 * (2 * narrow + 22 * width + 2 * small + head["deformable"] * 2 * 36 + 12 * classes)
