"""Official weights in our layout, and back. The names of the released code are functions of ours, in one table."""

import argparse
import hashlib
import os
import pickle
import re
import struct
import warnings
from collections.abc import Mapping
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from timm.models.convnext import ConvNeXt, checkpoint_filter_fn
from torch import Tensor, nn
from tqdm import tqdm

from swconv.atomic import file_sha256, write_atomic
from swconv.models import LargeKernelNet
from swconv.ops import ShiftwiseConv2d

# Ours -> official, applied in order. {mixer}, {strip}, {se} and {expansion} are the family's, see _family.
_NAMES = (
    (r"^stem\.", "downsample_layers.0."),
    (r"^stages\.(\d+)\.downsample\.", r"downsample_layers.\1."),
    (r"^stages\.(\d+)\.blocks\.(\d+)\.", r"stages.\1.\2."),
    (r"\.mixer\.", ".{mixer}."),
    (r"(^|\.)filters\.(\d+)$", r"\1LoRAs.\2.weight"),                          # SW
    (r"(^|\.large_kernel\.)norms\.0\.", r"\1bn_lora1."),
    (r"(^|\.large_kernel\.)norms\.1\.", r"\1bn_lora2."),
    (r"(^|\.large_kernel\.)norms\.2\.", r"\1bn_small."),
    (r"\.convs\.vertical\.", ".LoRA1.{strip}."),                                # SLaK
    (r"\.norms\.vertical\.", ".LoRA1.bn."),
    (r"\.convs\.horizontal\.", ".LoRA2.{strip}."),
    (r"\.norms\.horizontal\.", ".LoRA2.bn."),
    (r"\.convs\.small\.", ".small_conv.conv."),
    (r"\.norms\.small\.", ".small_conv.bn."),
    (r"\.large_kernel\.convs\.large\.", ".large_kernel.lkb_origin.conv."),
    (r"\.large_kernel\.norms\.large\.", ".large_kernel.lkb_origin.bn."),
    (r"\.large_kernel\.merged\.", ".large_kernel.lkb_reparam."),
    (r"\.dwconv\.(?:convs\.large|merged)\.", ".dwconv.lk_origin."),             # UniRepLKNet
    (r"\.dwconv\.norms\.large\.", ".dwconv.origin_bn."),
    (r"\.convs\.dilated_(\d+)_(\d+)\.", r".dil_conv_k\1_\2."),
    (r"\.norms\.dilated_(\d+)_(\d+)\.", r".dil_bn_k\1_\2."),
)
# The tail of a block in the skeleton of UniRepLKNet. Without SE the expansion is a bare layer.
_GROWN = (
    (r"\.grn\.weight$", ".act.1.gamma"),
    (r"\.grn\.bias$", ".act.1.beta"),
    (r"\.pwconv2\.", ".pwconv2.0."),
    (r"\.norm_out\.", ".pwconv2.2."),
)
_SE = ((r"\.se\.fc1\.", ".{se}.down."), (r"\.se\.fc2\.", ".{se}.up."), (r"\.pwconv1\.", ".{expansion}."))
# What the released merge calls the summed Rep branches of SW: those of a model with rep_branches=1.
_MERGED = re.compile(r"\.LoRA\.weight$")
# What a checkpoint of the released code may hold beside the weights: its index tables.
_TABLES = re.compile(r"\.?(?:loras\.)?(?:pad_hv1?|idx_identit1?|idx_out1?|rep1|ghost1)$")
MAP_VERSION = 1                                                                 # of all these, for files that they made
TIMEOUT = 60                                                                    # s without a byte before a download stops


def fetch(url: str, path: Path, sha256: str | None = None) -> str:
    """Download a checkpoint beside its place, check it, and put it there; a file that is there and has the sha256 stays.

    Returns
    -------
    The sha256 of the file.

    Raises
    ------
    ValueError
        When the source cannot be reached, sends less than it announced or a web page, or the file has another sha256. Nothing
        is left behind then, and what was at `path` stays.
    """
    if sha256 and path.is_file() and file_sha256(path) == sha256:
        return sha256
    part, digest = path.with_name(f".{path.name}.part"), hashlib.sha256()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with urlopen(url, timeout=TIMEOUT) as source, part.open("wb") as file:
            announced = int(source.headers.get("Content-Length") or 0)
            if source.headers.get_content_type() == "text/html":
                raise ValueError(f"{url} is a web page and no file. Give the address of the file itself, or download it by "
                                 f"hand to {path} and leave url out.")
            with tqdm(total=announced or None, desc=path.name, unit="B", unit_scale=True, disable=None) as bar:
                while block := source.read(2**20):
                    file.write(block)
                    digest.update(block)
                    bar.update(len(block))
            file.flush()
            os.fsync(file.fileno())
            received = file.tell()
        if received < announced:
            raise ValueError(f"{url} announced {announced} bytes, got {received}. Run the same command again.")
        if sha256 not in (None, digest.hexdigest()):
            raise ValueError(_other_hash(url, digest.hexdigest(), sha256))
        part.replace(path)
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise ValueError(f"{url} could not be downloaded to {path}, got '{reason}'. Check the address and the network, or "
                         "download the file by hand.") from error
    finally:
        with suppress(OSError):
            part.unlink()
    return digest.hexdigest()


def read_checkpoint(path: Path, sha256: str | None = None) -> Mapping[str, Any]:
    """Read a published checkpoint (torch's format or safetensors) without running anything that it may hold.

    Besides tensors and plain values it may hold an argparse.Namespace, the arguments of the released training scripts.

    Raises
    ------
    FileNotFoundError, ValueError
        When the file is missing, has another sha256, is cut short, is no checkpoint, or holds other objects or no names.
    """
    if not path.is_file():
        raise FileNotFoundError(f"weights are needed at {path}, and there is no file. The README names the public sources; "
                                "put the downloaded file there.")
    found = file_sha256(path)
    if sha256 not in (None, found):
        raise ValueError(_other_hash(path, found, sha256))
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings(action="ignore"):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, struct.error, AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds objects that are no tensors or plain values, or is no checkpoint, and is not opened: a "
                         "pickle can run code. Ask its source for weights alone.") from error
    except (RuntimeError, EOFError, SafetensorError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is damaged or cut short, got '{reason}'. Download it again.") from error
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"{path} needs to hold tensors by name, or parts that do, got a {type(checkpoint).__name__}. Take the "
                         "file that the released code saved.")
    return checkpoint


def convert(source: Path, model: str, out: Path, arguments: Mapping[str, Any] | None = None, laid_out: bool = False,
            sha256: str | None = None) -> dict[str, str]:
    """Write a published checkpoint as safetensors under our names, and say what it was made from.

    Parameters
    ----------
    source : Path
        Checkpoint of the released code.
    model : str
        timm's name of ours; `arguments` are those that differ from its defaults.
    laid_out : bool
        Cut the strips of a SLaK into square pieces (SW paper #1), for the model with `laid_out=True`.
    sha256 : str, optional
        Of the source; another one is refused.

    Returns
    -------
    The metadata of the written file: source, source_sha256, model, arguments, map_version.
    """
    network = timm.create_model(model, **(arguments or {}))
    state = convert_official(read_checkpoint(source, sha256), network)
    if laid_out:
        if not any(".convs.vertical." in name for name in state):
            raise ValueError(f"laid_out cuts the strips of a decomposed SLaK, and {model} has none. Leave it out.")
        state = lay_out_state(state)
    told = {"source": source.name, "source_sha256": file_sha256(source), "model": model, "map_version": str(MAP_VERSION),
            "arguments": repr(dict(arguments or {}) | ({"laid_out": True} if laid_out else {}))}
    write_atomic(out, to_safetensors({name: tensor.contiguous() for name, tensor in state.items()}, told))
    return told


def _other_hash(where: Path | str, found: str, expected: str) -> str:
    return (f"{where} has sha256 {found[:12]}..., and {expected[:12]}... was expected. Download it again, or correct the hash "
            "where it is written if the source has a new file.")


def masks_in(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks of a sparse checkpoint, which keeps none: True where a weight of two or four dimensions is not zero."""
    return {name: tensor != 0 for name, tensor in _maskable(state_dict).items() if (tensor == 0).any()}


def density_in(state_dict: Mapping[str, Tensor]) -> float:
    """Share of the weights of two or four dimensions that are not zero: 1 - sparsity, as SLaK counts it."""
    weights = _maskable(state_dict).values()
    return sum(int(tensor.count_nonzero()) for tensor in weights) / sum(tensor.numel() for tensor in weights)


def _maskable(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state_dict.items() if tensor.dim() in (2, 4)}


def official_names(model: nn.Module) -> dict[str, str]:
    """Our name -> the released code's, for every entry of the model's state dict.

    Parameters
    ----------
    model : nn.Module
        A network of `swconv.models`, or one `ShiftwiseConv2d`; in training form, or, where the released code has one, merged.
    """
    family, rules = _family(model), list(_NAMES)
    if getattr(model, "skeleton", None) == "unireplknet":
        rules += _GROWN
    rules += _SE
    names = {}
    for ours in model.state_dict():
        name = ours
        for pattern, to in rules:
            for key, value in family.items():
                to = to.replace(f"{{{key}}}", value)
            name = re.sub(pattern, to, name)
        names[ours] = name
    return names


def convert_official(state_dict: Mapping[str, Any], model: nn.Module, part: str | None = None) -> dict[str, Tensor]:
    """Rename the entries of an official state dict so that `model.load_state_dict` takes them strictly.

    Parameters
    ----------
    state_dict : mapping of str to Tensor
        Of a SLaK, SW, UniRepLKNet or ConvNeXt as published, or of one SW module; or the checkpoint that holds it under
        "model" (or "model_ema", where there is nothing else), beside the "args" of its training, whose kernel sizes and
        edges have to be the model's: the filters of an SW of 49 px and of 51 px, of 2 edges and of 4, have one shape.
    model : nn.Module
        Our model of the same configuration; for ConvNeXt timm's.
    part : str, optional
        The key that holds the weights, see `weights_in`.

    Raises
    ------
    ValueError
        When entries are missing, left over, of another shape, no tensors or not finite, the kernel sizes or edges are
        others, or an index table is not the one that we draw.
    """
    args = state_dict.get("args")
    args = args if isinstance(args, Mapping) else getattr(args, "__dict__", {})
    _check_edges(args, model)
    _check_kernels(args, model)
    state_dict = weights_in(state_dict, part)
    if strange := [key for key, value in state_dict.items() if not (isinstance(key, str) and isinstance(value, Tensor))]:
        raise ValueError(f"the weights need to be tensors by name, got others under {', '.join(map(str, strange[:3]))}. Say "
                         "which part of the checkpoint holds the weights, or take another file.")
    if isinstance(model, ConvNeXt):
        try:
            converted = dict(checkpoint_filter_fn(dict(state_dict), model))
        except (KeyError, RuntimeError) as error:                               # a name, a shape that it cannot place
            widths = tuple(stage["num_chs"] for stage in model.feature_info)
            came = ", ".join(f"{key} {tuple(tensor.shape)}" for key, tensor in list(_maskable(state_dict).items())[:3])
            raise ValueError(f"the weights need to be those of a ConvNeXt of this size (widths {widths}), got {came}. Take the "
                             "file of this ConvNeXt, or name the model that the file is of.") from error
    else:
        ours = {official: name for name, official in official_names(model).items()}
        _check_tables(state_dict, model)
        named = {_MERGED.sub(".LoRAs.0.weight", key): tensor for key, tensor in state_dict.items() if not _TABLES.search(key)}
        converted = {ours.get(key, key): tensor for key, tensor in named.items()}
    target = model.state_dict()
    for name, value in target.items():
        if name in converted and converted[name].dim() == 4 and value.dim() == 1:  # GRN: (1, 1, 1, C) -> (C,)
            converted[name] = converted[name].flatten()
    _check_fit(converted, target, model)
    return converted


def to_official(model: nn.Module) -> dict[str, Tensor]:
    """The model's weights under the names and in the shapes of the released code."""
    names, state = official_names(model), model.state_dict()
    return {names[name]: tensor[None, None, None] if ".grn." in name else tensor for name, tensor in state.items()}


def weights_in(checkpoint: Mapping[str, Any], part: str | None = None) -> Mapping[str, Tensor]:
    """The state dict in a published checkpoint, which may itself be one; `part` says under which key.

    Raises
    ------
    ValueError
        When there is no such part.
    """
    if part is not None:
        if not isinstance(checkpoint.get(part), Mapping):
            held = [key for key, value in checkpoint.items() if isinstance(value, Mapping)]
            raise ValueError(f"the checkpoint has no weights under '{part}', got {', '.join(held) or 'a bare state dict'}. "
                             "Correct the part, or leave it out.")
        return checkpoint[part]
    for key in ("model", "model_ema", "state_dict"):
        if isinstance(checkpoint.get(key), Mapping):
            return checkpoint[key]
    return checkpoint


def lay_out(kernel: Tensor, size: int) -> Tensor:
    """Cut strips into square pieces, exactly (SW paper section 3.2): #0 -> #1.

    Parameters
    ----------
    kernel : Tensor of shape (C, 1, M, N) or (C, 1, N, M)
        M > N = size; the long side is filled up with zeros at its end.
    size : int
        N.

    Returns
    -------
    Tensor of shape (C * ceil(M / N), 1, N, N)
        Piece i of channel c at c * ceil(M / N) + i.
    """
    tall = kernel.shape[2] > kernel.shape[3]
    long = kernel.transpose(2, 3) if not tall else kernel                          # (C, 1, M, N)
    filled = nn.functional.pad(long, (0, 0, 0, -long.shape[2] % size))
    pieces = filled.reshape(-1, 1, size, size)                                     # (C * n, 1, N, N)
    return pieces if tall else pieces.transpose(2, 3).contiguous()


def lay_out_state(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a decomposed SLaK (our names) as those of the same network with `laid_out=True`."""
    return {name: lay_out(tensor, min(tensor.shape[2:])) if re.search(r"\.convs\.(vertical|horizontal)\.", name) else tensor
            for name, tensor in state_dict.items()}


def _family(model: nn.Module) -> dict[str, str]:
    """What the released code calls the parts that every family has."""
    modules = list(model.modules())
    shiftwise = any(isinstance(module, ShiftwiseConv2d) for module in modules)
    grown = getattr(model, "skeleton", None) == "unireplknet"
    squeezed = any(name.endswith(".se.fc1") for name, _ in model.named_modules())
    laid_out = any(getattr(module, "laid_out", False) for module in modules)
    return {"mixer": "dwconv" if grown and not shiftwise else "large_kernel",
            "strip": "split_convs" if laid_out else "conv",
            "se": "se" if grown else "se.0",
            "expansion": "pwconv1.1" if grown and squeezed else "pwconv1"}


def _check_tables(state_dict: Mapping[str, Tensor], model: nn.Module) -> None:
    """Tables that a file carries have to be those that our layers draw, else the weights mean something else."""
    official = _shiftwise(model)
    for key in state_dict:
        if match := re.fullmatch(r"stages\.(\d+)\.(\d+)\.large_kernel\.(?:loras\.|LoRAs\.)?(\w+?)1?", key):
            stage, block, table = match.groups()
            layer = official.get(f"stages.{stage}.blocks.{block}.mixer")
            known = layer and {"pad_hv": torch.cat([layer.pad_h, layer.pad_v], dim=1), "idx_identit": layer.pick,
                               "rep": layer.mixed, "ghost": layer.ghost}.get(table)
            if known is not None and not torch.equal(known.long(), state_dict[key].long()):
                raise ValueError(f"{key} is not the table that this model draws. Is the model of the same configuration "
                                 "(kernel sizes, edges, ghost ratio), and the file from the released code?")


def _shiftwise(model: nn.Module) -> dict[str, ShiftwiseConv2d]:
    return {name: module for name, module in model.named_modules() if isinstance(module, ShiftwiseConv2d)}


def _check_edges(args: Mapping[str, Any], model: nn.Module) -> None:
    """The released flag of SW's edges is `--N_rep`; they change no shape."""
    got = args.get("N_rep")
    wanted = {layer.pick.shape[1] for layer in _shiftwise(model).values()}
    if isinstance(got, int) and wanted - {got}:
        raise ValueError(f"the weights were trained with {got} edges, as their args say (N_rep {got}), and the model has "
                         f"{max(wanted - {got})}. Create the model with edges={got}.")


def _check_kernels(args: Mapping[str, Any], model: nn.Module) -> None:
    """The released scripts save their `--kernel_size M1 M2 M3 M4 N`; strips tell theirs by shape, filters of SW do not."""
    try:
        *_, small = extents = [int(each) for each in args.get("kernel_size", ())]
    except (TypeError, ValueError):
        return                                                                  # none, or none that we know
    for name, layer in _shiftwise(model).items():
        stage = re.match(r"stages\.(\d+)\.", name)
        got = stage and int(stage[1]) < len(extents) - 1 and (extents[int(stage[1])], small)
        if got and got != (layer.kernel_size, layer.small_kernel):
            raise ValueError(
                f"the weights were trained with a kernel of {got[0]} px from filters of {got[1]} px in stage {stage[1]}, as "
                f"their args say (kernel_size {' '.join(map(str, extents))}), and the model has {layer.kernel_size} px from "
                f"{layer.small_kernel} px. Create the model with kernel_sizes={tuple(extents[:-1])}, small_kernel={small}.")


def _tell_taps(sizes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]], model: nn.Module) -> None:
    """Where nothing but the number of filters differs, it is the kernel size that does."""
    layers = _shiftwise(model)
    owners = {key: layers.get(re.sub(r"\.?(filters\.\d+|norms\.\d+\.\w+)$", "", key)) for key in sizes}
    if not all(owner and ("filters." in key or owner.norm == "filter") for key, owner in owners.items()):
        return
    for key, (got, wanted) in sizes.items():
        channels, small = len(owners[key].mixed), owners[key].small_kernel
        if "filters." in key and got[1:] == wanted[1:] and got[0] % channels == 0:
            taps, extent = got[0] // channels, owners[key].kernel_size
            least = (taps - 1) * small + 1
            raise ValueError(
                f"the weights have {taps} filters per channel in {key}, that is M of {least + 1 - least % 2} to {taps * small} "
                f"px, and the model has {wanted[0] // channels} for M = {extent} px. Create the model with the weights' kernel "
                "sizes.")


def _check_fit(converted: Mapping[str, Tensor], target: Mapping[str, Tensor], model: nn.Module) -> None:
    sizes = {key: (tuple(value.shape), tuple(target[key].shape)) for key, value in converted.items()
             if key in target and value.shape != target[key].shape}
    for key, (got, wanted) in sizes.items():
        if key.startswith("head.") and got[1:] == wanted[1:] and isinstance(model, LargeKernelNet | ConvNeXt):
            raise ValueError(f"the weights classify into {got[0]} classes and the model into {wanted[0]}. Create the model "
                             f"with num_classes={got[0]}, load, and then call reset_classifier.")
        if (".mixer." in key or "filters." in key) and len(got) == len(wanted) == 4 and got[2:] != wanted[2:]:
            raise ValueError(f"the weights have kernels of {got[2]} x {got[3]} px in {key} (shape {got}), and the model has "
                             f"{wanted}. Create the model with the weights' kernel sizes.")
    _tell_taps(sizes, model)
    wrong = [f"{key} {got} for {wanted}" for key, (got, wanted) in sizes.items()]
    missing, extra = sorted(target.keys() - converted.keys()), sorted(converted.keys() - target.keys())
    if wrong or missing or extra:
        raise ValueError(
            f"the weights do not fit the model: {len(missing)} missing {missing[:3]}, {len(extra)} unexpected {extra[:3]}, "
            f"{len(wrong)} of another shape {wrong[:3]}. Is the model of the same configuration?"
        )
    broken = [key for key, value in converted.items() if not value.is_meta and not torch.isfinite(value).all()]
    if broken:
        raise ValueError(f"the weights are not all finite numbers: {', '.join(broken[:3])}. Is the file damaged?")
