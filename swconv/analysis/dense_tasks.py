"""What the papers' downstream models cost: backbone, pyramid norms and heads, without computing anything.

The backbone is counted as `swconv.analysis.cost` does, the heads by torch's FlopCounterMode on the meta device.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from swconv.analysis.cost import Counting, Form, cost
from swconv.downstream.detection import Detector
from swconv.downstream.detection_config import CASCADE, FASTER
from swconv.downstream.pyramid import Pyramid
from swconv.downstream.roi import BOX_SIDE, MASK_SIDE
from swconv.downstream.upernet import UPerNet, UPerNetConfig

Task = Literal["upernet", "cascade", "faster"]
INPUT = {"upernet": (512, 2048), "cascade": (1280, 800), "faster": (1280, 800)}    # px, height and width, as the tables say
REGIONS, MASKED = 1000, 100                                                         # that heads are counted for
STRIDES = (4, 8, 16, 32)


def count(
    task: Task, backbone: str, arguments: Mapping[str, Any] | None = None, form: Form = "training", sparsity: float = 0.0,
    num_classes: int | None = None, input_size: tuple[int, int] | None = None, counting: Counting = "papers",
) -> dict[str, Any]:
    """Parameters and multiply-adds of one image, by the papers' conventions.

    The auxiliary head of UPerNet has parameters and no multiply-adds; box heads see 1000 regions, mask heads 100.

    Parameters
    ----------
    task : str
        "upernet", "cascade" or "faster".
    backbone : str
        timm's name; `arguments` are those that differ from its defaults.
    form, sparsity, counting
        Of the backbone, as in `cost`; heads are dense.
    num_classes : int, optional
        Of the data set: 150, 80 and 20 by default.
    input_size : (int, int), optional
        Height and width of the image in px: as the papers' tables say, 512 x 2048 for "upernet", else 1280 x 800.

    Returns
    -------
    dict
        params, macs and mmcv of the whole, and `parts`: name -> the same three. macs are those of convolutions and linear
        layers; mmcv also has what MMCV's counter adds, which the tools of MMDetection and MMSegmentation print: biases of
        convolutions, one per element of a ReLU or of what is pooled; of the backbone only the biases. It does not know the
        SyncBatchNorms that the heads train with. That is what the papers' tables have rounded.

    Raises
    ------
    ValueError
        For an unknown task or form.
    """
    if task not in get_args(Task):
        raise ValueError(f"count needs one of the tasks {', '.join(get_args(Task))}, got {task!r}.")
    (height, width), changes = input_size or INPUT[task], {} if num_classes is None else {"num_classes": num_classes}
    with torch.device("meta"):
        pyramid = Pyramid(backbone, **(arguments or {})).eval()
        maps = [torch.empty(1, channels, -(-height // stride), -(-width // stride))
                for channels, stride in zip(pyramid.channels, STRIDES, strict=True)]
        steps = (_segmenter if task == "upernet" else _detector)(pyramid, task, maps, changes)
        with _watched(pyramid, _bias) as biases:                      # its copy in `cost` has the same hooks
            body = cost(pyramid, (height, width), form, sparsity, counting)
        parts = {"backbone": {"params": body.params, "macs": body.macs, "mmcv": body.macs + sum(biases)}}
        for name, (module, run) in steps.items():
            params = sum(weight.numel() for weight in module.parameters())
            parts[name] = {"params": params, "macs": 0, "mmcv": 0} | (_count(module, run) if run else {})
    whole = {key: sum(part[key] for part in parts.values()) for key in ("params", "macs", "mmcv")}
    return {"task": task, "backbone": backbone, "arguments": dict(arguments or {}), "input_size": [height, width], "form": form,
            "sparsity": sparsity, "counting": counting, "parts": parts} | whole


def counts(
    model: str, args: Mapping[str, Any], task: Task | None, without: tuple[str, ...], form: Form, input: int | tuple[int, int],
    sparsity: float, counting: Counting,
) -> dict[str, int]:
    """A model of params/costs.yaml, a classifier or a whole network of a task: params and macs, as the papers print them.

    `without` names parts of `count` that are left out.

    Raises
    ------
    ValueError
        For a part that is not there.
    """
    if task is None:
        found = cost(model, input, form, sparsity, counting, **args)
        return {"params": found.params, "macs": found.macs}
    parts = count(task, model, args, form, sparsity, None, input, counting)["parts"]
    if lacking := [name for name in without if name not in parts]:
        raise ValueError(f"`without` needs parts of {task}, {', '.join(parts)}, got {', '.join(lacking)}.")
    kept = [part for name, part in parts.items() if name not in without]
    return {"params": sum(part["params"] for part in kept), "macs": sum(part["mmcv"] for part in kept)}


Steps = dict[str, tuple[nn.Module, Callable[[], Any] | None]]


def _segmenter(pyramid: Pyramid, task: str, maps: list[Tensor], changes: dict[str, int]) -> Steps:
    model = UPerNet(pyramid, replace(UPerNetConfig(), **changes)).eval()
    return {"decode head": (model.decode_head, lambda: model.decode_head(maps)), "auxiliary head": (model.auxiliary_head, None)}


def _detector(pyramid: Pyramid, task: str, maps: list[Tensor], changes: dict[str, int]) -> Steps:
    config = replace(CASCADE if task == "cascade" else FASTER, **changes)
    model, width = Detector(pyramid, config).eval(), config.channels
    levels = model.features(maps)
    boxes, masks = torch.empty(REGIONS, width, BOX_SIDE, BOX_SIDE), torch.empty(MASKED, width, MASK_SIDE, MASK_SIDE)
    steps: Steps = {"feature pyramid": (model.neck, lambda: model.features(maps)),
                    "region proposals": (model.rpn, lambda: model.rpn.head(levels)),
                    "box heads": (model.roi.boxes, lambda: [head(boxes) for head in model.roi.boxes])}
    if config.masks:
        steps["mask heads"] = (model.roi.masks, lambda: [head(masks) for head in model.roi.masks])
    return steps


def _count(module: nn.Module, run: Callable[[], Any]) -> dict[str, int]:
    with FlopCounterMode(display=False) as counter, torch.no_grad(), _watched(module, _mmcv_extra) as extra:
        run()
    macs = counter.get_total_flops() // 2
    return {"macs": macs, "mmcv": macs + sum(extra)}


@contextmanager
def _watched(module: nn.Module, measure: Callable[[nn.Module, Tensor, Tensor], int]) -> Iterator[list[int]]:
    """What `measure` says of every layer that runs meanwhile."""
    found: list[int] = []
    hooks = [layer.register_forward_hook(lambda layer, inputs, output: found.append(measure(layer, inputs[0], output)))
             for layer in module.modules() if not next(layer.children(), None)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _bias(layer: nn.Module, x: Tensor, y: Tensor) -> int:
    return y.numel() if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) and layer.bias is not None else 0


def _mmcv_extra(layer: nn.Module, x: Tensor, y: Tensor) -> int:
    return x.numel() if isinstance(layer, nn.ReLU | nn.AdaptiveAvgPool2d) else _bias(layer, x, y)
