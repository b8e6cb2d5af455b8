"""Detections and segmentations drawn on their images (SW Figure 7)."""

import colorsys

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from swconv.downstream.datasets import UNLABELLED

GOLDEN = 0.618034  # turns of the colour circle between two classes: neighbours look unlike


def draw(image: Tensor, found: dict | Tensor, class_names: tuple[str, ...], least_score: float = 0.3,
         alpha: float = 0.5) -> Image.Image:
    """An image with what was found in it.

    Parameters
    ----------
    image : uint8 Tensor of shape (3, H, W)
    found : dict or Tensor
        Detections: `boxes` (n, 4) in pixels, `labels` (n,), and where there are any `scores` (n,) and `masks`, bool
        (n, H, W); without scores it is an annotation, and all is drawn. Or a segmentation: classes (H, W), 255 for none.
    class_names : tuple of str
        By label. A class has the same colour in every picture.
    least_score : float
        Detections below are not drawn.
    alpha : float
        Opacity of masks.

    Raises
    ------
    ValueError
        A segmentation or masks of another size than the image.
    """
    maps = found if isinstance(found, Tensor) else found.get("masks", image)
    if maps.shape[-2:] != image.shape[-2:]:
        raise ValueError(f"A picture needs maps of its image's size {tuple(image.shape[-2:])}, got {tuple(maps.shape[-2:])}; "
                         "resize them to the original image.")
    if isinstance(found, Tensor):
        labels = found[found != UNLABELLED].unique().tolist()
        return to_pil_image(_fill(image, found == torch.tensor(labels).view(-1, 1, 1), labels, alpha))
    scores = found.get("scores")
    shown = torch.arange(len(found["labels"])) if scores is None else torch.nonzero(scores >= least_score).flatten()
    if scores is not None:
        shown = shown[scores[shown].argsort()]                                        # the surest lies on top
    labels = found["labels"][shown].tolist()
    if "masks" in found:
        image = _fill(image, found["masks"][shown], labels, alpha)
    if labels:
        names = [class_names[label] for label in labels]
        if scores is not None:
            names = [f"{name} {score:.2f}" for name, score in zip(names, scores[shown].tolist(), strict=True)]
        image = draw_bounding_boxes(image, found["boxes"][shown], names, [_colour(label) for label in labels], width=2,
                                    label_colors="white", fill_labels=True)
    return to_pil_image(image)


def _fill(image: Tensor, masks: Tensor, labels: list[int], alpha: float) -> Tensor:
    return draw_segmentation_masks(image, masks, alpha, [_colour(label) for label in labels]) if labels else image


def _colour(label: int) -> tuple[int, int, int]:
    return tuple(int(255 * part) for part in colorsys.hsv_to_rgb(label * GOLDEN % 1, 0.8, 0.75))
