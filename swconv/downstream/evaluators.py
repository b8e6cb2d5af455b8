"""The benchmarks' measures and submission files: mIoU, COCO's AP, PASCAL VOC's mAP.

Detections of an image are a dict in the original image's pixels: `boxes` (n, 4) x1 y1 x2 y2, `scores` (n,), `labels`
(n,) from 0, and for COCO `masks`, bool (n, H, W). All results are percent, nan where there is nothing to measure.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from swconv.atomic import write_atomic
from swconv.downstream.datasets import UNLABELLED

COCO_STATS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
COLUMNS = ("AP", "AP50", "AP75")
KINDS = {"box": "bbox", "mask": "segm"}  # our word, COCO's


class MeanIoU:
    """Confusion of pixels, image after image.

    Parameters
    ----------
    num_classes : int

    Attributes
    ----------
    confusion : int64 Tensor of shape (num_classes, num_classes)
        Pixels by label and prediction. Sums over processes.
    """

    def __init__(self, num_classes: int):
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Add integer maps of one shape; pixels labelled 255 do not count.

        Raises
        ------
        ValueError
            Shapes differ, or a class is out of range.
        """
        if prediction.shape != label.shape:
            raise ValueError(f"mIoU needs prediction and label of one size, got {tuple(prediction.shape)} and "
                             f"{tuple(label.shape)}; resize the prediction to the original image.")
        n, counted = len(self.confusion), label != UNLABELLED
        label, prediction = label[counted].long(), prediction[counted].long()
        for name, values in (("label", label), ("prediction", prediction)):
            if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < n:
                raise ValueError(f"mIoU needs classes from 0 to {n - 1}, got {int(values.min())} to {int(values.max())} in a "
                                 f"{name}; compare num_classes with the dataset.")
        self.confusion += torch.bincount(n * label + prediction, minlength=n * n).view(n, n).cpu()

    def compute(self) -> dict:
        """`mIoU`, `mAcc` and `aAcc`, and per class `IoU` and `Acc`.

        A class that is neither labelled nor predicted has IoU nan and is left out of the mean; one that is only predicted
        has IoU 0, which counts, and Acc nan.
        """
        pixels = self.confusion.double()
        right, labelled, predicted = pixels.diag(), pixels.sum(1), pixels.sum(0)
        iou, acc = 100 * right / (labelled + predicted - right), 100 * right / labelled
        return {
            "mIoU": iou.nanmean().item(), "mAcc": acc.nanmean().item(), "aAcc": (100 * right.sum() / labelled.sum()).item(),
            "IoU": iou.tolist(), "Acc": acc.tolist(),
        }


def coco_results(image_id: int, detections: dict, category_ids: tuple[int, ...]) -> list[dict]:
    """Detections of an image as COCO's results: boxes x y w h, masks as compressed run lengths.

    Raises
    ------
    ValueError
        A label out of range.
    """
    labels = _labels(detections, len(category_ids))
    boxes = detections["boxes"].double()
    boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1).tolist()
    results = [
        {"image_id": image_id, "category_id": category_ids[label], "bbox": box, "score": score}
        for label, box, score in zip(labels, boxes, detections["scores"].double().tolist(), strict=True)
    ]
    if results and "masks" in detections:
        for result, code in zip(results, _encode(detections["masks"]), strict=True):
            result["segmentation"] = code
    return results


def coco_ap(annotations: Path | dict, results: list[dict], kinds: tuple[str, ...] = ("box", "mask")) -> dict[str, float]:
    """COCO's average precision by faster-coco-eval: `AP_box`, `AP50_box`, `AP75_box`, `AP_mask`, ... in percent.

    Parameters
    ----------
    annotations : Path or dict
        instances_*.json, or its content.
    results : list of dict
        Of all images, from `coco_results`.
    kinds : tuple of {"box", "mask"}

    Raises
    ------
    ValueError
        Results of an image or a category that the annotations do not know, or without a mask.
    """
    truth = _coco(annotations)
    stats = {kind: coco_stats(truth, results, kind) for kind in kinds}
    return {f"{name}_{kind}": stats[kind][name] for kind in kinds for name in COLUMNS}


def coco_stats(annotations, results: list[dict], kind: str) -> dict[str, float]:
    """COCO's twelve numbers, `COCO_STATS`, in percent, for "box" or "mask"; arguments and errors as of `coco_ap`."""
    from faster_coco_eval import COCOeval_faster

    truth = _coco(annotations)
    field = {"box": "bbox", "mask": "segmentation"}[kind]
    for name, key, known in (("images", "image_id", truth.imgs), ("categories", "category_id", truth.cats)):
        unknown = {each[key] for each in results} - set(known)
        if unknown:
            raise ValueError(f"COCO's AP needs results for the {len(known)} {name} of its annotations, got {key} "
                             f"{min(unknown)}; evaluate on the split that was predicted.")
    bare = [each for each in results if field not in each]
    if bare:
        raise ValueError(f"COCO's {kind} AP needs a {field} in every result, got none in {len(bare)} of {len(results)}.")
    evaluator = COCOeval_faster(truth, _predicted(truth, results, field), KINDS[kind], print_function=_quiet)
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    values = evaluator.stats[: len(COCO_STATS)]
    return {name: 100 * float(value) if value > -1 else math.nan for name, value in zip(COCO_STATS, values, strict=True)}


def voc_ap(targets: list[dict], detections: list[dict], num_classes: int, mode: str = "11points", least_iou: float = 0.5,
           plus_one: bool = True) -> dict:
    """PASCAL VOC's mean average precision.

    A detection belongs to the object of its class that it overlaps most. If that is difficult it counts neither way; if
    it is taken by a better detection, or overlaps less than `least_iou`, the detection is wrong.

    Parameters
    ----------
    targets : list of dict
        Per image `boxes`, `labels`, `ignored`, as of `datasets.VOC.target`.
    detections : list of dict
        Per image, in the same order.
    num_classes : int
    mode : {"11points", "area"}
        Mean of the best precision at recalls of at least 0, 0.1, ..., 1 (2007), or area under it (2010 on).
    plus_one : bool
        Widths are x2 - x1 + 1, as in VOC's own tool and in mmdet.

    Returns
    -------
    dict
        `mAP` over the classes that have objects, `AP` per class, nan for those that have none.

    Raises
    ------
    ValueError
        Lists of different lengths, a label out of range.
    """
    if len(targets) != len(detections):
        raise ValueError(f"VOC's mAP needs detections for each of {len(targets)} images, got {len(detections)}.")
    curves = [[] for _ in range(num_classes)]
    objects = np.zeros(num_classes, int)
    for target, found in zip(targets, detections, strict=True):
        truths, predicted = np.array(_labels(target, num_classes), int), np.array(_labels(found, num_classes), int)
        boxes, difficult = (target[key].cpu().numpy() for key in ("boxes", "ignored"))
        objects += np.bincount(truths[~difficult], minlength=num_classes)
        scores, guesses = (found[key].cpu().numpy() for key in ("scores", "boxes"))
        for label in np.unique(predicted):
            mine, theirs = predicted == label, truths == label
            curves[label].append(_judge(guesses[mine], scores[mine], boxes[theirs], difficult[theirs], least_iou, plus_one))
    ap = [100 * _precision(curve, count, mode) if count else math.nan for curve, count in zip(curves, objects, strict=True)]
    measured = [each for each in ap if not math.isnan(each)]
    return {"mAP": float(np.mean(measured)) if measured else math.nan, "AP": ap}


def write_coco(results: list[dict], stem: Path) -> list[Path]:
    """COCO's submission, `<stem>.bbox.json` and, where there are masks, `<stem>.segm.json`."""
    fields = {"bbox": "bbox", "segm": "segmentation"}
    if not any("segmentation" in each for each in results):
        del fields["segm"]
    paths = []
    for kind, field in fields.items():
        paths.append(stem.with_name(f"{stem.name}.{kind}.json"))
        content = [{key: each[key] for key in ("image_id", "category_id", field, "score")} for each in results]
        write_atomic(paths[-1], json.dumps(content, allow_nan=False).encode())
    return paths


def write_voc(image_ids: list[str], detections: list[dict], class_names: tuple[str, ...], folder: Path) -> list[Path]:
    """VOC's submission, `comp4_det_test_<class>.txt`: image, score, and the box in pixels counted from 1."""
    lines = {name: [] for name in class_names}
    for image_id, found in zip(image_ids, detections, strict=True):
        for label, score, box in zip(_labels(found, len(class_names)), found["scores"].tolist(), (found["boxes"] + 1).tolist(),
                                     strict=True):
            lines[class_names[label]].append(f"{image_id} {score:.6f} {' '.join(f'{side:.6f}' for side in box)}\n")
    paths = []
    for name, rows in lines.items():
        paths.append(folder / f"comp4_det_test_{name}.txt")
        write_atomic(paths[-1], "".join(rows).encode())
    return paths


def write_ade(image_id: str, prediction: Tensor, folder: Path) -> Path:
    """ADE20K's submission of an image, `<image_id>.png`: classes counted from 1, one byte per pixel."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{image_id}.png"
    Image.fromarray((prediction + 1).byte().cpu().numpy()).save(path)
    return path


def _coco(annotations):
    from faster_coco_eval import COCO

    if isinstance(annotations, COCO):
        return annotations
    return COCO(annotations if isinstance(annotations, dict) else str(annotations), print_function=_quiet)


def _predicted(truth, results: list[dict], field: str):
    """What COCO.loadRes makes of the results of one kind, with all areas at once: a mask's size is its own, not its box's."""
    from faster_coco_eval.core import mask

    if field == "bbox":
        areas = [each["bbox"][2] * each["bbox"][3] for each in results]
    else:
        areas = mask.area([each["segmentation"] for each in results]).tolist() if results else []
    annotations = [{"id": number, "image_id": each["image_id"], "category_id": each["category_id"], "score": each["score"],
                    "iscrowd": 0, "area": area, field: each[field]}
                   for number, (each, area) in enumerate(zip(results, areas, strict=True), 1)]
    return _coco({key: truth.dataset[key] for key in ("images", "categories")} | {"annotations": annotations})


def _quiet(*lines) -> None:
    """faster-coco-eval's own reports are not ours."""


def _encode(masks: Tensor) -> list[dict]:
    """Compressed run lengths, as text, of bool (n, H, W)."""
    from faster_coco_eval.core import mask

    codes = mask.encode(np.asfortranarray(masks.cpu().numpy().transpose(1, 2, 0).astype(np.uint8)))
    return [{"size": list(code["size"]), "counts": _text(code["counts"])} for code in codes]


def _text(counts: bytes | str) -> str:
    return counts.decode() if isinstance(counts, bytes) else counts


def _labels(instances: dict, num_classes: int) -> list[int]:
    labels = instances["labels"].tolist()
    if labels and not 0 <= min(labels) <= max(labels) < num_classes:
        raise ValueError(f"Detections and objects need labels from 0 to {num_classes - 1}, got {min(labels)} to {max(labels)}; "
                         "compare num_classes with the dataset.")
    return labels


def _judge(boxes: np.ndarray, scores: np.ndarray, truths: np.ndarray, difficult: np.ndarray, least_iou: float,
           plus_one: bool) -> np.ndarray:
    """(n, 2): score and 1 right, 0 wrong, nan neither, of the detections of one class in one image."""
    order = np.argsort(-scores, kind="stable")
    verdict = np.zeros(len(order))
    if len(truths):
        iou = _iou(boxes[order], truths, plus_one)                                     # (n, m)
        best, taken = iou.argmax(1), set()
        for place, (one, overlap) in enumerate(zip(best.tolist(), iou.max(1).tolist(), strict=True)):
            if overlap >= least_iou:
                verdict[place] = math.nan if difficult[one] else one not in taken
                taken.add(one)
    return np.stack([scores[order], verdict], axis=1)


def _iou(a: np.ndarray, b: np.ndarray, plus_one: bool) -> np.ndarray:
    """(n, m) of (n, 4) and (m, 4)."""
    a, b = a.astype(float)[:, None], b.astype(float)[None]
    sides = [np.minimum(a[..., i + 2], b[..., i + 2]) - np.maximum(a[..., i], b[..., i]) + plus_one for i in (0, 1)]
    both = np.prod(np.clip(sides, 0, None), axis=0)
    areas = [np.prod(each[..., 2:] - each[..., :2] + plus_one, axis=-1) for each in (a, b)]
    union = areas[0] + areas[1] - both
    return np.divide(both, union, out=np.zeros_like(both), where=union > 0)


def _precision(curve: list[np.ndarray], count: int, mode: str) -> float:
    """Average precision of the judged detections of one class that has `count` objects."""
    judged = np.concatenate(curve) if curve else np.zeros((0, 2))
    judged = judged[~np.isnan(judged[:, 1])]
    right = np.cumsum(judged[np.argsort(-judged[:, 0], kind="stable"), 1])
    precision = np.maximum.accumulate((right / np.arange(1, len(right) + 1))[::-1])[::-1]   # the best from here on
    if mode == "11points":
        first = np.searchsorted(right / count, np.arange(11) * 0.1)   # 0.7 is 0.7000000000000001, as in the published tools
        return float(np.append(precision, 0.0)[first].mean())
    if mode == "area":
        return float((precision * np.diff(right, prepend=0) / count).sum())
    raise ValueError(f"VOC's average precision is '11points' or 'area', got '{mode}'.")
