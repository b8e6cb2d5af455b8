"""Published checkpoints: taken in under our names, and their accuracy on a profile's validation images. Nothing is trained."""

import hashlib
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from timm.utils import reparameterize_model
from torch import Tensor, nn

import swconv.models  # noqa: F401  registers the models with timm
from swconv.atomic import file_sha256, write_atomic, write_json
from swconv.training import manifest
from swconv.training.conversion import differences
from swconv.training.data import MEMORY_FORMATS, ValLoader
from swconv.training.finished import published_sha256
from swconv.training.loop import VAL_BATCH, normaliser, prepare_machine, scores
from swconv.training.record import values
from swconv.weights import MAP_VERSION, convert_official, density_in, lay_out_state, masks_in, read_checkpoint

_log = logging.getLogger(__name__)


def convert_released(name: str, config: Mapping[str, Any], out: Path) -> None:
    """Publish a checkpoint's weights under our names: weights.safetensors with its sha256, and metrics.json.

    The metrics say how far the logits of the training form and of the merged one are apart, for a SLaK those of the strips
    and of the strips laid out, in float64 and float32 on seeded images; and what share of the weights is not masked.

    Parameters
    ----------
    name : str
        Of the row of params/weights.yaml.
    config : mapping
        That row at a profile (`Params.released`): model, file, dataset.
    out : Path
        Folder of the three files.

    Raises
    ------
    FileNotFoundError, ValueError
        When the file is not there, has another sha256, is damaged, holds code, or does not fit the model; names the row.
    """
    file, dataset = config["file"], config["dataset"]
    try:
        network = _create(config)
        state = convert_official(read_checkpoint(Path(file["path"]), file["sha256"]), network, file["part"])
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"weights {name} of params/weights.yaml ({file['path']}, from {file['source']}): {error}") from error
    digest = file_sha256(Path(file["path"]))
    if file["sha256"] is None:
        _log.info("%s has sha256 %s. params/weights.yaml gives none for %s: write it there, and another file is refused.",
                  file["path"], digest, name)
    network.load_state_dict(state)
    apart = differences("merged_logit_difference", network.eval(), reparameterize_model, dataset, 0)
    if _has_strips(state):
        apart |= differences("laid_out_logit_difference", network, lambda _: _laid_out(config, state), dataset, 0)
    body = to_safetensors({key: tensor.contiguous() for key, tensor in state.items()}, {
        "source": file["source"], "source_file": Path(file["path"]).name, "source_sha256": digest,
        "model": config["model"]["name"], "arguments": repr(config["model"]["args"]), "map_version": str(MAP_VERSION)})
    write_atomic(out / "weights.safetensors", body)
    write_json(out / "metrics.json", values(
        **apart, density=(density_in(state), ""), masked_tensors=(len(masks_in(state)), "tensors"),
        parameters=(sum(p.numel() for p in network.parameters()), "weights")))
    write_atomic(out / "weights.safetensors.sha256", (hashlib.sha256(body).hexdigest() + "\n").encode())


def evaluate_released(config: Mapping[str, Any], data_dir: Path, weights: Path, out: Path, record: dict[str, Any]) -> None:
    """Measure published weights on the validation images; publish metrics.json and run.json.

    Top-1 and top-5 in training form, top-1 merged, and for a SLaK top-1 laid out (SW Table 1, #0 and #1).

    Parameters
    ----------
    config : mapping
        A row of params/weights.yaml at a profile (`Params.released`): model, dataset, machine.
    data_dir : Path
        Holds data.json and the images.
    weights : Path
        As `convert_released` wrote them.

    Raises
    ------
    ValueError
        When the weights are not those that were published (sha256), or do not fit the model, or the images changed.
    """
    began, machine = time.monotonic(), config["machine"]
    device, digest = prepare_machine(machine), published_sha256(weights)
    manifest.verify(data_dir, ("val",))
    state = load_file(weights)
    network = _create(config)
    network.load_state_dict(state)
    val, normalise = ValLoader(config["dataset"], data_dir, VAL_BATCH), normaliser(config, device)

    def measured(model: nn.Module) -> dict[str, Any]:
        return scores(model.to(device, memory_format=MEMORY_FORMATS[machine["memory_format"]]), val, normalise)

    plain = measured(network)
    forms = {"merged": reparameterize_model(network.eval())}
    if _has_strips(state):
        forms["laid_out"] = _laid_out(config, state)
    metrics = {key: (plain[key], unit) for key, unit in (("top1", "%"), ("top5", "%"), ("loss", ""), ("images", "images"))}
    for form, model in forms.items():
        found = measured(model)
        metrics[f"top1_{form}"] = (found["top1"], "%")
        metrics[f"{form}_logit_difference"] = ((plain["logits"] - found["logits"]).abs().max().item(), "")
    with safe_open(weights, "pt") as file:
        told = file.metadata()
    source = {key: told[key] for key in ("source", "source_file", "source_sha256")}
    write_json(out / "run.json", record | source | {"weights_sha256": digest, "seconds": round(time.monotonic() - began, 1)})
    write_json(out / "metrics.json", values(**metrics, density=(density_in(state), "")))


def _create(config: Mapping[str, Any], **arguments: Any) -> nn.Module:
    model, dataset = config["model"], config["dataset"]
    return timm.create_model(model["name"], num_classes=dataset["num_classes"], in_chans=dataset["in_chans"],
                             **model["args"], **arguments)


def _has_strips(state: Mapping[str, Tensor]) -> bool:
    """Whether there are strips to lay out."""
    return any(".convs.vertical." in key and tensor.shape[2] != tensor.shape[3] for key, tensor in state.items())


def _laid_out(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
    network = _create(config, laid_out=True)
    network.load_state_dict(lay_out_state(state))
    return network.eval()
