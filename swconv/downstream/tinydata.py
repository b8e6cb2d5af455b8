"""ADE20K, COCO, PASCAL VOC and nuScenes of a few images each, in the formats of the real ones.

Photographs that ship with scikit-learn are cropped, and shapes are drawn on them; every class has its own shape, colour and
texture, so that a small network can learn to tell them apart. Train and validation images are different scenes. The same
bytes come out every time.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image, ImageDraw

from swconv.downstream.datasets import ADE_CLASSES, VOC_SIDES

SIZES = ((160, 120), (160, 128), (120, 160))  # width, height
TRAIN, VAL = 16, 8  # images
QUALITY = 90  # of JPEGs
GAP = 4  # px between objects

PHOTOS = ("china.jpg", "flower.jpg")
PHOTO_CLASSES = ("building", "flower")  # what ADE20K calls their pixels
COLOURS = ((220, 30, 30), (40, 70, 230), (240, 210, 40), (230, 60, 220), (20, 220, 220), (250, 250, 250))
COCO_NAMES = ("person", "car", "cat", "bottle", "chair", "toothbrush")  # ids 1, 3, 17, 44, 62, 90
VOC_NAMES = ("aeroplane", "bicycle", "bottle", "car", "person", "tvmonitor")
ADE_NAMES = ("person", "car", "chair", "ball", "clock", "flag")  # ids 13, 21, 20, 120, 149, 150

Polygon = list[tuple[float, float]]


@dataclass
class Thing:
    """A shape in a scene: its kind, 0 to 5, the polygons it consists of, and whether benchmarks ignore it."""

    kind: int
    polygons: list[Polygon]
    ignored: bool = False

    def box(self) -> tuple[float, float, float, float]:
        points = np.array([point for polygon in self.polygons for point in polygon])
        return (*points.min(0).tolist(), *points.max(0).tolist())


@dataclass
class Scene:
    """A photograph with things on it: RGB uint8 (H, W, 3), which photograph, and where each thing is, bool (n, H, W)."""

    image: np.ndarray
    photo: int
    things: list[Thing]
    masks: np.ndarray


def write(root: Path) -> None:
    """Write ADEChallengeData2016, coco, VOCdevkit and nuscenes below `root`; what was there is replaced.

    ADE20K has 16 training and 8 validation images with unlabelled rims; COCO the same, with a crowd, objects of two
    polygons and an image without annotation in each split; VOC 2007 16 in trainval and 8 in test, 2012 8 in trainval,
    with difficult objects. nuScenes is `tiny_nuscenes.write_tiny_nuscenes`.
    """
    from swconv.downstream.tiny_nuscenes import write_tiny_nuscenes

    for name, writer in (("ADEChallengeData2016", write_ade20k), ("coco", write_coco), ("VOCdevkit", write_voc),
                         ("nuscenes", write_tiny_nuscenes)):
        shutil.rmtree(root / name, ignore_errors=True)
        (root / name).mkdir(parents=True)
        writer(root / name)


def write_ade20k(root: Path) -> None:
    """ADEChallengeData2016, as `datasets.ADE20K` reads it."""
    for split, stem, scenes in (("training", "train", _scenes(0, TRAIN)), ("validation", "val", _scenes(1, VAL))):
        for number, scene in enumerate(scenes, 1):
            ids = np.full(scene.image.shape[:2], 1 + ADE_CLASSES.index(PHOTO_CLASSES[scene.photo]), np.uint8)
            for thing, mask in zip(scene.things, scene.masks, strict=True):
                ids[_grown(mask)] = 0                                                 # the rim is unlabelled
                ids[mask] = 1 + ADE_CLASSES.index(ADE_NAMES[thing.kind])
            name = f"ADE_{stem}_{number:08d}"
            _save(root / "images" / split / f"{name}.jpg", scene.image)
            _save(root / "annotations" / split / f"{name}.png", ids)


def write_coco(root: Path) -> None:
    """COCO 2017, as `datasets.COCO` reads it."""
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]                # by id, N/A in the gaps
    categories = [{"id": key, "name": name, "supercategory": name} for key, name in enumerate(names)
                  if name not in ("__background__", "N/A")]
    ids = [names.index(name) for name in COCO_NAMES]
    for split, start, scenes in (("train2017", 0, _scenes(2, TRAIN, crowd=0, empty=1)),
                                 ("val2017", 500_000, _scenes(3, VAL, crowd=0, empty=1))):
        images, annotations = [], []
        for number, scene in enumerate(scenes, start + 1):
            height, width = scene.image.shape[:2]
            _save(root / split / f"{number:012d}.jpg", scene.image)
            images.append({"id": number, "file_name": f"{number:012d}.jpg", "width": width, "height": height, "license": 1})
            for thing, mask in zip(scene.things, scene.masks, strict=True):
                x1, y1, x2, y2 = thing.box()
                flat = [[round(side, 2) for point in polygon for side in point] for polygon in thing.polygons]
                annotations.append({
                    "id": len(annotations) + start + 1, "image_id": number, "category_id": ids[thing.kind],
                    "iscrowd": int(thing.ignored), "area": float(mask.sum()),
                    "bbox": [round(side, 2) for side in (x1, y1, x2 - x1, y2 - y1)],
                    "segmentation": _run_lengths(mask) if thing.ignored else flat,
                })
        content = {"info": {"description": "drawn shapes, in the format of COCO 2017"}, "images": images,
                   "licenses": [{"id": 1, "name": "MIT", "url": ""}], "annotations": annotations, "categories": categories}
        path = root / "annotations" / f"instances_{split}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))


def write_voc(root: Path) -> None:
    """VOCdevkit with VOC2007 and VOC2012, as `datasets.VOC` reads it."""
    for year, splits in ((2007, {"trainval": _scenes(4, TRAIN, faint=True), "test": _scenes(5, VAL, faint=True)}),
                         (2012, {"trainval": _scenes(6, VAL)})):
        place, number = root / f"VOC{year}", 0
        for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (place / folder).mkdir(parents=True)
        for split, scenes in splits.items():
            ids = []
            for scene in scenes:
                number += 1
                ids.append(f"{number:06d}" if year == 2007 else f"{year}_{number:06d}")
                _save(place / "JPEGImages" / f"{ids[-1]}.jpg", scene.image)
                (place / "Annotations" / f"{ids[-1]}.xml").write_bytes(_voc_xml(f"VOC{year}", ids[-1], scene))
            (place / "ImageSets/Main" / f"{split}.txt").write_text("".join(f"{each}\n" for each in ids))


def _voc_xml(folder: str, name: str, scene: Scene) -> bytes:
    root = ElementTree.Element("annotation")
    height, width = scene.image.shape[:2]
    _children(root, folder=folder, filename=f"{name}.jpg")
    _children(ElementTree.SubElement(root, "size"), width=width, height=height, depth=3)
    _children(root, segmented=0)
    for thing in scene.things:
        x1, y1, x2, y2 = thing.box()
        each = ElementTree.SubElement(root, "object")
        _children(each, name=VOC_NAMES[thing.kind], pose="Unspecified", truncated=0, difficult=int(thing.ignored))
        sides = (round(x1) + 1, round(y1) + 1, round(x2) + 1, round(y2) + 1)          # VOC counts pixels from 1
        _children(ElementTree.SubElement(each, "bndbox"), **dict(zip(VOC_SIDES, sides, strict=True)))
    ElementTree.indent(root, "\t")
    return ElementTree.tostring(root)


def _children(parent: ElementTree.Element, **texts) -> None:
    for tag, text in texts.items():
        ElementTree.SubElement(parent, tag).text = str(text)


def _scenes(seed: int, count: int, crowd: int | None = None, empty: int | None = None, faint: bool = False) -> list[Scene]:
    """Scenes in which every kind occurs; one may have a crowd, one nothing, and every fourth a faint thing to ignore."""
    random = np.random.RandomState(seed)
    photos = [_photo(name) for name in PHOTOS]
    scenes = []
    for number in range(count):
        width, height = SIZES[number % len(SIZES)]
        photo = number // 2 % len(PHOTOS)
        canvas = Image.fromarray(_crop(photos[photo], width, height, random))
        things = []
        if number == crowd:
            things.append(_crowd(random, kind=number % len(COLOURS)))
        if number != empty:
            for order in range(3):
                _place(things, (number * 3 + order) % len(COLOURS), canvas.size, random)
            if faint and number % 4 == 0:
                _place(things, number % len(COLOURS), canvas.size, random, ignored=True)
        masks = [_drawn(canvas, thing) for thing in things]
        scenes.append(Scene(np.array(canvas), photo, things, np.array(masks, bool).reshape(-1, height, width)))
    return scenes


def _place(things: list[Thing], kind: int, size: tuple[int, int], random: np.random.RandomState, ignored: bool = False) -> None:
    """Add a thing where it meets no other, smaller after every failure."""
    radius = random.uniform(15, 28)
    for _ in range(200):
        x, y = (random.uniform(radius + 1, side - radius - 2) for side in size)
        thing = Thing(kind, _polygons(kind, x, y, radius, random), ignored)
        x1, y1, x2, y2 = thing.box()
        if all(x1 > b[2] + GAP or x2 < b[0] - GAP or y1 > b[3] + GAP or y2 < b[1] - GAP
               for b in (other.box() for other in things)):
            things.append(thing)
            return
        radius = max(11.0, radius * 0.98)


def _polygons(kind: int, x: float, y: float, radius: float, random: np.random.RandomState) -> list[Polygon]:
    """A triangle, a square, a star, a disc, a flat bar, or two bars side by side, turned by chance."""
    turn = random.uniform(0, 0.5)
    if kind == 4:
        return [_ring(x, y, [0.35, np.pi - 0.35, np.pi + 0.35, -0.35], [radius])]
    if kind == 5:
        return [_ring(x + shift * radius, y, [1.25, np.pi - 1.25, np.pi + 1.25, -1.25], [radius]) for shift in (-0.55, 0.55)]
    corners, radii = ((3, [1.0]), (4, [1.0]), (10, [1.0, 0.5]), (16, [1.0]))[kind]
    return [_ring(x, y, turn + np.arange(corners) * 2 * np.pi / corners, [each * radius for each in radii])]


def _ring(x: float, y: float, angles, radii: list[float]) -> Polygon:
    return [(float(x + radii[i % len(radii)] * np.cos(angle)), float(y + radii[i % len(radii)] * np.sin(angle)))
            for i, angle in enumerate(angles)]


def _crowd(random: np.random.RandomState, kind: int) -> Thing:
    """Nine small ones of a kind in the top left corner."""
    polygons = []
    for x in range(3):
        for y in range(3):
            polygons += _polygons(kind, 8 + 14 * x, 8 + 14 * y, 5.0, random)
    return Thing(kind, polygons, ignored=True)


def _drawn(canvas: Image.Image, thing: Thing) -> np.ndarray:
    """Draw a thing on the canvas in its colour, striped by kind; an ignored single one lets the photograph through."""
    shape = Image.new("L", canvas.size)
    for polygon in thing.polygons:
        ImageDraw.Draw(shape).polygon(polygon, fill=255)
    mask = np.array(shape) > 0
    rows, columns = np.indices(mask.shape)
    lines = (np.zeros_like(rows), rows, columns, rows + columns, rows - columns, rows // 4 + columns // 4)[thing.kind]
    shade = np.where(lines // 4 % 2, 0.45, 1.0)[..., None] * np.array(COLOURS[thing.kind])
    image = np.array(canvas)
    opacity = 0.5 if thing.ignored and len(thing.polygons) < 3 else 1.0
    image[mask] = (opacity * shade + (1 - opacity) * image)[mask].astype(np.uint8)
    canvas.paste(Image.fromarray(image))
    return mask


def _photo(name: str) -> np.ndarray:
    from sklearn.datasets import load_sample_image

    return load_sample_image(name)


def _crop(photo: np.ndarray, width: int, height: int, random: np.random.RandomState) -> np.ndarray:
    """A window of twice the size, reduced to half."""
    top, left = random.randint(photo.shape[0] - 2 * height + 1), random.randint(photo.shape[1] - 2 * width + 1)
    window = photo[top : top + 2 * height, left : left + 2 * width]
    return window.reshape(height, 2, width, 2, 3).mean((1, 3)).astype(np.uint8)


def _grown(mask: np.ndarray) -> np.ndarray:
    """The mask and its neighbours."""
    padded = np.pad(mask, 1)
    return np.any([padded[i : i + mask.shape[0], j : j + mask.shape[1]] for i in range(3) for j in range(3)], axis=0)


def _run_lengths(mask: np.ndarray) -> dict:
    """COCO's uncompressed run lengths: columns top to bottom, zeros first."""
    flat = np.concatenate([[False], mask.T.flatten(), [not mask.T.flatten()[-1]]])
    ends = np.flatnonzero(np.diff(flat)).tolist()
    return {"size": list(mask.shape), "counts": [b - a for a, b in zip([0, *ends], ends, strict=False)]}


def _save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **({"quality": QUALITY} if path.suffix == ".jpg" else {}))
