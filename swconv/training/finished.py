"""The weights of a finished run: whether they are those that were published, and into a network with them."""

from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from swconv.atomic import file_sha256


def published_sha256(weights: Path) -> str:
    """The sha256 of finished weights, which has to be the one beside them.

    Raises
    ------
    FileNotFoundError, ValueError
        When one of the two files is not there, or they differ.
    """
    stamp = weights.with_name(weights.name + ".sha256")
    if not (weights.exists() and stamp.exists()):
        raise FileNotFoundError(f"{weights} is needed, with {stamp.name} beside it, and is not there; train the run first.")
    digest, published = file_sha256(weights), stamp.read_text().strip()
    if digest != published:
        raise ValueError(f"{weights} is damaged: its sha256 is {digest[:12]}..., published was {published[:12]}.... "
                         f"Restore it with `dvc checkout --force {weights.parent.parent}` or train it again.")
    return digest


def diverged_at(weights: Path) -> int | None:
    """The step at which the run of these weights diverged; None where it has weights."""
    with safe_open(weights, "pt") as file:
        step = (file.metadata() or {}).get("diverged")
    return None if step is None else int(step)


def load_weights(model: nn.Module, weights: Path) -> None:
    """Give a network the weights of a finished run, all of them; its images may have another size than there.

    Raises
    ------
    ValueError
        When the run diverged, or its network was another one.
    """
    if (step := diverged_at(weights)) is not None:
        raise ValueError(f"{weights} needs to hold weights, but its run diverged at step {step} and has none. Change its "
                         "recipe in params/ and train it again.")
    try:
        model.load_state_dict(load_file(weights))
    except RuntimeError as error:
        raise ValueError(f"{weights} needs to hold the weights of this row's network, got '{first_line(error)}'. Take the row "
                         "of params/ that they were trained with.") from error


def first_line(error: Exception) -> str:
    """A fault of torch, which may fill a page, as far as a sentence has room for it."""
    return " ".join(str(error).split())[:200]
