"""SW Table 8, the training settings: generated from the rows of params/ and compared with the paper cell by cell."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from swconv.atomic import write_atomic
from swconv.reporting.table import markdown_table

Config = Mapping[str, Any]

# Setting of the paper -> what a resolved row says. The trainer has one optimizer, one schedule and one initial ranking.
SETTINGS: dict[str, Callable[[Config], str]] = {
    "input scale": lambda c: _plain(c["dataset"]["image_size"]),
    "batch size": lambda c: _plain(c["recipe"]["batch_size"]),
    "optimizer": lambda c: "AdamW",
    "LR": lambda c: _power(c["recipe"]["lr"]),
    "LR schedule": lambda c: "cosine",
    "weight decay": lambda c: _plain(c["recipe"]["weight_decay"]),
    "warmup epochs": lambda c: _plain(c["recipe"]["warmup_epochs"]),
    "epochs": lambda c: _plain(c["recipe"]["epochs"]),
    "mixup alpha": lambda c: str(c["recipe"]["mixup"]),
    "cutmix alpha": lambda c: str(c["recipe"]["cutmix"]),
    "erasing prob.": lambda c: _plain(c["recipe"]["random_erasing"]),
    "label smoothing epsilon": lambda c: _plain(c["recipe"]["label_smoothing"]),
    "sparse init": lambda c: "snip",
    "width factor": lambda c: str(float(c["model"]["args"]["width_factor"])),
    "depths": lambda c: str(list(c["model"]["args"]["depths"])),
    "dims": lambda c: str(list(c["model"]["args"]["dims"])),
    "kernel size": lambda c: str([*c["model"]["args"]["kernel_sizes"], c["model"]["args"]["small_kernel"]]),
    "u": lambda c: _plain(c["recipe"]["sparsity"]["update_every"]),
    "prune": lambda c: c["recipe"]["sparsity"]["prune"],
    "only L": lambda c: str(c["recipe"]["sparsity"]["others"] == "none"),
}


def build_table8(configs: Mapping[str, Config], claims: Path, out: Path, command: str) -> Counter[str]:
    """Write table8.md and say how many cells are equal and how many differ.

    Parameters
    ----------
    configs : mapping
        The paper's column -> the resolved row of params/ that stands for it.
    claims : Path
        The paper's table.
    out : Path
        The Markdown file.

    Raises
    ------
    ValueError
        When the paper has a setting that is not known here.
    """
    with claims.open(encoding="utf-8", newline="") as file:
        printed = list(csv.DictReader(file))
    if unknown := [row["setting"] for row in printed if row["setting"] not in SETTINGS]:
        raise ValueError(f"{claims} needs settings that are known here ({', '.join(SETTINGS)}), got {', '.join(unknown)}.")
    rows, score = [], Counter[str]()
    for row in printed:
        cells = [row["setting"]]
        for column, config in configs.items():
            ours = SETTINGS[row["setting"]](config)
            verdict = "equal" if ours == row[column] else "differs"
            score[verdict] += 1
            cells += [ours, verdict if verdict == "equal" else f"differs: the paper prints {row[column]}"]
        rows.append(cells)
    header = ["setting", *(word for column in configs for word in (column, "paper"))]
    text = "\n".join([
        "# SW Table 8: training settings", "",
        "Generated from `params/` as the trainer gets it, profile `paper`: "
        + ", ".join(f"{column} is `{config['id']}`" for column, config in configs.items()) + ".", "",
        f"{score['equal']} equal, {score['differs']} differ (cells).", "",
        markdown_table(header, rows), "", f"Remake: `{command}`.", ""])
    write_atomic(out, text.encode())
    return score


def _plain(value: float) -> str:
    """3.0 as 3, 0.05 as 0.05."""
    return f"{value:g}"


def _power(value: float) -> str:
    """4e-3 as 4 x 10^-3."""
    digits, exponent = f"{value:e}".split("e")
    return f"{float(digits):g} x 10^{int(exponent)}"
