"""ADE20K, COCO 2017 and PASCAL VOC, read image by image from the folders as their makers publish them.

A sample is `(image, target)`. The image is uint8 of shape (3, H, W). The target is a dict:

- `image_id`: int (COCO) or str; `original_size`: (H, W) of the file; `size`: (H, W) of the image as it is now;
- ADE20K: `segmentation`, uint8 (H, W), classes 0 to 149 and 255 where nothing is labelled;
- COCO and VOC: `boxes`, float32 (n, 4), x1 y1 x2 y2 in pixels from 0, x2 - x1 wide; `labels`, int64 (n,), from 0;
  `ignored`, bool (n,), crowds of COCO and difficult objects of VOC; COCO also `masks`, bool (n, H, W).
"""

import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from swconv.training.manifest import ImageError, read_image

UNLABELLED = 255
SMALLEST = 32  # px: COCO images with a shorter side are not trained on
FILES = 3  # names in a sentence
VOC_SIDES = ("xmin", "ymin", "xmax", "ymax")

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog", "horse",
    "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)
_ADE = """
    wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door, table,
    mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field, armchair, seat, fence,
    desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard, chest of drawers, counter, sand,
    sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table, pillow, screen door,
    stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill, bench, countertop, stove, palm,
    kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel, light, truck, tower, chandelier,
    awning, streetlight, booth, television receiver, airplane, dirt track, apparel, pole, land, bannister, escalator, ottoman,
    bottle, buffet, poster, stage, van, ship, fountain, conveyer belt, canopy, washer, plaything, swimming pool, stool,
    barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball, food, step, tank, trade name, microwave, pot, animal,
    bicycle, lake, dishwasher, screen, blanket, sculpture, hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt
    screen, plate, monitor, bulletin board, shower, radiator, glass, clock, flag
"""
ADE_CLASSES = tuple(" ".join(_ADE.split()).split(", "))

Target = dict
Sample = tuple[Tensor, Target]
Transform = Callable[[Tensor, Target, torch.Generator], Sample]


class Images(Dataset, ABC):
    """What the three datasets share: a sample is a function of (seed, epoch, index), and survives a trip to a worker.

    Parameters
    ----------
    transform : callable, optional
        Of `transforms`: `(image, target, generator) -> (image, target)`.
    seed : int
        With epoch and index it seeds the generator.

    Attributes
    ----------
    class_names : tuple of str
        By label.
    """

    class_names: tuple[str, ...]

    def __init__(self, transform: Transform | None, seed: int):
        self.transform, self.seed = transform, seed

    @abstractmethod
    def read(self, index: int) -> Sample:
        """One sample as it lies on disk."""

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """The transformed sample of (epoch, index)."""
        epoch, index = key
        image, target = self.read(index)
        if self.transform is None:
            return image, target
        (state,) = np.random.SeedSequence([self.seed, epoch, index]).generate_state(1, np.uint64)
        return self.transform(image, target, torch.Generator().manual_seed(int(state)))

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[Sample] | ValueError:
        """A batch. An error is returned, as a worker process would wrap a raised one in its traceback."""
        try:
            return [self[key] for key in keys]
        except ValueError as error:
            return error


class ADE20K(Images):
    """Scene parsing: ADEChallengeData2016, 150 classes.

    Parameters
    ----------
    root : Path
        With images/{training,validation}/*.jpg and annotations/{training,validation}/*.png, whose 0 is unlabelled and
        whose 1 to 150 are the classes.
    split : {"training", "validation"}
    transform, seed
        As in `Images`.

    Raises
    ------
    FileNotFoundError
        No such folders, or images without annotation, by name.
    ValueError
        From `read`: an annotation with other values or of another size, an unreadable file.
    """

    class_names = ADE_CLASSES

    def __init__(self, root: Path, split: str, transform: Transform | None = None, seed: int = 0):
        super().__init__(transform, seed)
        self.images, self.maps = Path(root) / "images" / split, Path(root) / "annotations" / split
        _need("ADE20K", "images/{training,validation}/*.jpg and annotations/{training,validation}/*.png", root,
              self.images, self.maps)
        self.ids = sorted(path.stem for path in self.images.glob("*.jpg"))
        if not self.ids:
            raise FileNotFoundError(f"ADE20K needs *.jpg in {self.images}, got none; unpack ADEChallengeData2016.zip there.")
        _complete("ADE20K", self.ids, {path.stem for path in self.maps.glob("*.png")}, self.maps, "png")

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, index: int) -> Sample:
        name = self.ids[index]
        image = _image(self.images / f"{name}.jpg")
        path = self.maps / f"{name}.png"
        ids = _map(path)                                                              # (H, W)
        _same_size(path, ids.shape, image)
        if ids.max() > len(ADE_CLASSES):
            raise ValueError(f"{path} needs class ids from 0 to {len(ADE_CLASSES)}, got {int(ids.max())}; restore the file.")
        size = tuple(ids.shape)
        return image, {"image_id": name, "original_size": size, "size": size,
                       "segmentation": ids - 1}                                       # 0 - 1 is 255: unlabelled


class COCO(Images):
    """Instances of COCO 2017: 80 classes, their ids with gaps, polygons, crowds as run lengths.

    Objects that have no area, are narrower than a pixel or lie outside the image are left out.

    Parameters
    ----------
    root : Path
        With annotations/instances_{train,val}2017.json and {train,val}2017/*.jpg.
    split : {"train2017", "val2017"}
    transform, seed
        As in `Images`.
    training : bool
        Without the images that have no annotation or a side below 32 pixels.

    Attributes
    ----------
    annotation_file : Path
        What `evaluators.coco_ap` reads.
    category_ids : tuple of int
        The dataset's id of each label.
    wide : bool ndarray of shape (n,)
        Images wider than high, for `batches.Batches`.

    Raises
    ------
    FileNotFoundError
        No such folder or file.
    ValueError
        Broken JSON, an image without its size, unknown category or image in an annotation; from `read`: unreadable image,
        size unlike the JSON's.
    """

    def __init__(self, root: Path, split: str, transform: Transform | None = None, seed: int = 0, training: bool = False):
        super().__init__(transform, seed)
        self.images = Path(root) / split
        self.annotation_file = Path(root) / "annotations" / f"instances_{split}.json"
        _need("COCO", "annotations/instances_{train,val}2017.json and {train,val}2017/*.jpg", root, self.images,
              self.annotation_file)
        try:
            content = json.loads(self.annotation_file.read_bytes())
            categories = sorted((each["id"], each["name"]) for each in content["categories"])
            images = _by_id(self.annotation_file, content["images"])
            owned = _by_image(self.annotation_file, content["annotations"], images, dict(categories))
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{self.annotation_file} needs to be COCO's instances with images, categories and annotations, "
                             f"got {error!r}; copy or unpack it again.") from error
        self.category_ids, self.class_names = zip(*categories, strict=True) if categories else ((), ())
        ids = [key for key, (_, height, width) in images.items()
               if not training or (key in owned and min(height, width) >= SMALLEST)]
        if not (ids and categories):
            raise ValueError(f"COCO needs images and categories in {self.annotation_file}, got none that can be used: what is "
                             "trained on needs an annotation and sides of 32 px; copy or unpack the file again.")
        self.ids = np.array(ids)
        self._files = [images[key][0] for key in ids]
        _present("COCO", self._files, self.images)
        self._sizes = np.array([images[key][1:] for key in ids])                      # (n, 2): height, width
        # Bytes, as a million small objects would be copied into every worker that touches them.
        self._owned = [json.dumps(owned.get(key, [])).encode() for key in ids]
        self.wide = self._sizes[:, 1] > self._sizes[:, 0]

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, index: int) -> Sample:
        path = self.images / self._files[index]
        image = _image(path)
        _same_size(self.annotation_file, tuple(self._sizes[index]), image)
        return image, self.target(index)

    def target(self, index: int) -> Target:
        """The annotation alone, without decoding the image."""
        height, width = size = tuple(map(int, self._sizes[index]))
        kept = []
        for each in json.loads(self._owned[index]):
            x, y, w, h = each["bbox"]
            inside = min(x + w, width) > max(x, 0) and min(y + h, height) > max(y, 0)
            if inside and each["area"] > 0 and w >= 1 and h >= 1:
                kept.append(each)
        boxes = torch.tensor([each["bbox"] for each in kept], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        return {
            "image_id": int(self.ids[index]), "original_size": size, "size": size,
            "boxes": boxes,
            "labels": torch.tensor([self.category_ids.index(each["category_id"]) for each in kept], dtype=torch.int64),
            "ignored": torch.tensor([bool(each.get("iscrowd", 0)) for each in kept], dtype=torch.bool),
            "masks": self._masks(kept, height, width),
        }

    def _masks(self, kept: list[dict], height: int, width: int) -> Tensor:
        """bool (n, H, W) of polygons, of run lengths and of compressed run lengths."""
        from faster_coco_eval.core import mask

        masks = torch.zeros(len(kept), height, width, dtype=torch.bool)
        for place, each in zip(masks, kept, strict=True):
            try:
                place[:] = torch.from_numpy(mask.decode(mask.segmToRle(each["segmentation"], width, height)))
            except (KeyError, TypeError, ValueError, RuntimeError) as error:               # what its decoders raise
                reason = str(error).split("\n")[0]
                raise ValueError(
                    f"{self.annotation_file} needs polygons or run lengths of {width} x {height} pixels, got others in "
                    f"annotation {each['id']} ({reason}); restore the file."
                ) from error
        return masks


class VOC(Images):
    """Detection of PASCAL VOC 2007 and 2012, 20 classes.

    Parameters
    ----------
    root : Path
        VOCdevkit, with VOC<year>/{JPEGImages,Annotations,ImageSets/Main}.
    split : {"train", "val", "trainval", "test"}
        A list of ImageSets/Main.
    years : tuple of int
        (2007,), or (2007, 2012) for "07+12".
    transform, seed
        As in `Images`.
    training : bool
        Without the images that have no object.

    Attributes
    ----------
    wide : bool ndarray of shape (n,)
        Images wider than high, for `batches.Batches`; the first use reads all annotations.

    Raises
    ------
    FileNotFoundError
        No such folder, list or annotation, by name.
    ValueError
        From `read`: broken XML, a class that is none of the 20, an unreadable image or one of another size.
    """

    class_names = VOC_CLASSES

    def __init__(self, root: Path, split: str, years: tuple[int, ...] = (2007,), transform: Transform | None = None,
                 seed: int = 0, training: bool = False):
        super().__init__(transform, seed)
        self._places = []
        for year in years:
            place = Path(root) / f"VOC{year}"
            names = place / "ImageSets/Main" / f"{split}.txt"
            _need("PASCAL VOC", "VOC<year>/{JPEGImages,Annotations} and VOC<year>/ImageSets/Main/<split>.txt (this is "
                  "VOCdevkit)", root, place / "JPEGImages", place / "Annotations", names)
            ids = names.read_text().split()
            _present("PASCAL VOC", [f"{name}.jpg" for name in ids], place / "JPEGImages")
            _complete("PASCAL VOC", ids, {path.stem for path in (place / "Annotations").glob("*.xml")},
                      place / "Annotations", "xml")
            self._places += [(place, name) for name in ids]
        if training:
            self._places = [each for each, (_, objects) in zip(self._places, self._annotations, strict=True) if objects]
            del self._annotations                                                     # of the longer list
        if not self._places:
            raise ValueError(f"PASCAL VOC needs images in {split}.txt of {', '.join(map(str, years))} below {root}, got none "
                             "that can be used.")

    def __len__(self) -> int:
        return len(self._places)

    @cached_property
    def _annotations(self) -> list[tuple[tuple[int, int], list]]:
        return [_voc_annotation(place / "Annotations" / f"{name}.xml") for place, name in self._places]

    @cached_property
    def wide(self) -> np.ndarray:
        return np.array([width > height for (height, width), _ in self._annotations])

    def read(self, index: int) -> Sample:
        place, name = self._places[index]
        image, target = _image(place / "JPEGImages" / f"{name}.jpg"), self.target(index)
        _same_size(place / "Annotations" / f"{name}.xml", target["size"], image)
        return image, target

    def target(self, index: int) -> Target:
        """The annotation alone, without decoding the image."""
        place, name = self._places[index]
        size, objects = _voc_annotation(place / "Annotations" / f"{name}.xml")
        return {
            "image_id": name, "original_size": size, "size": size,
            "boxes": torch.tensor([box for _, box, _ in objects], dtype=torch.float32).reshape(-1, 4) - 1,  # VOC counts from 1
            "labels": torch.tensor([label for label, _, _ in objects], dtype=torch.int64),
            "ignored": torch.tensor([difficult for _, _, difficult in objects], dtype=torch.bool),
        }


def _need(name: str, layout: str, root: Path, *places: Path) -> None:
    missing = [str(place) for place in places if not place.exists()]
    if missing:
        raise FileNotFoundError(f"{name} needs a folder with {layout}, got {root} without {' and '.join(missing)}; "
                                "put the dataset there, or set its root in params/ to where it is.")


def _present(name: str, files: list[str], place: Path) -> None:
    there = set(os.listdir(place))
    missing = [each for each in files if each not in there]
    if missing:
        raise FileNotFoundError(f"{name} needs {len(files)} images in {place}, got none for {len(missing)}: {_first(missing)}; "
                                "copy or unpack the dataset again.")


def _complete(name: str, ids: list[str], annotated: set[str], place: Path, suffix: str) -> None:
    missing = [each for each in ids if each not in annotated]
    if missing:
        raise FileNotFoundError(
            f"{name} needs an annotation for each of {len(ids)} images in {place}, got none for {len(missing)}: "
            f"{_first([f'{each}.{suffix}' for each in missing])}; copy or unpack the dataset again."
        )


def _first(names: list[str]) -> str:
    return ", ".join(names[:FILES]) + (", ..." if len(names) > FILES else "")


def _by_id(path: Path, images: list[dict]) -> dict[int, tuple[str, int, int]]:
    """{id: (file name, height, width)}, in order of the ids."""
    for each in images:
        if not all(isinstance(side, int | float) and 0 < side < math.inf for side in (each["height"], each["width"])):
            raise ValueError(f"{path} needs height and width in px for every image, got {each['height']!r} and "
                             f"{each['width']!r} in image {each['id']}; correct or restore the file.")
    ordered = sorted(images, key=lambda each: each["id"])
    return {each["id"]: (each["file_name"], each["height"], each["width"]) for each in ordered}


def _by_image(path: Path, annotations: list[dict], images: dict, categories: dict) -> dict[int, list[dict]]:
    owned = {}
    for each in annotations:
        if each["category_id"] not in categories:
            raise ValueError(f"{path} needs categories of its own list ({len(categories)} ids), got category_id "
                             f"{each['category_id']} in annotation {each['id']}; correct or restore the file.")
        if each["image_id"] not in images:
            raise ValueError(f"{path} needs images of its own list, got image_id {each['image_id']} in annotation "
                             f"{each['id']}; correct or restore the file.")
        numbers = [*(box if isinstance(box := each.get("bbox"), list) else ()), each.get("area")]
        if len(numbers) != 5 or not all(isinstance(number, int | float) for number in numbers):
            raise ValueError(f"{path} needs bbox (x, y, width, height) and area for every object, got {each.get('bbox')} and "
                             f"{each.get('area')} in annotation {each['id']}; correct or restore the file.")
        owned.setdefault(each["image_id"], []).append(each)
    return owned


def _voc_annotation(path: Path) -> tuple[tuple[int, int], list[tuple[int, list[int], bool]]]:
    """((height, width), [(label, box, difficult)]), boxes as in the file; fractions, of some of 2012, are cut as in mmdet."""
    try:
        root = ElementTree.parse(path).getroot()
        size = int(root.findtext("size/height")), int(root.findtext("size/width"))
        found = [(each.findtext("name").strip(), [int(float(each.findtext(f"bndbox/{side}"))) for side in VOC_SIDES],
                  each.findtext("difficult", "0").strip() == "1") for each in root.iter("object")]
    except (ElementTree.ParseError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise ValueError(f"{path} needs size and for each object name and bndbox, got {error!r}; restore the file.") from error
    unknown = sorted({name for name, _, _ in found} - set(VOC_CLASSES))
    if unknown:
        raise ValueError(f"{path} needs objects of the {len(VOC_CLASSES)} classes of PASCAL VOC, got {', '.join(unknown)}; "
                         "correct or restore the file.")
    for name, (left, top, right, bottom), _ in found:
        if not (left < right and top < bottom):
            raise ValueError(f"{path} needs boxes with xmin < xmax and ymin < ymax, got {left} {top} {right} {bottom} of a "
                             f"{name}; correct or restore the file.")
    return size, [(VOC_CLASSES.index(name), box, difficult) for name, box, difficult in found]


def _image(path: Path) -> Tensor:
    return torch.from_numpy(np.array(read_image(path, "RGB"))).permute(2, 0, 1)


def _map(path: Path) -> Tensor:
    """Class ids, uint8 (H, W), of a grey or palette PNG."""
    try:
        with Image.open(path) as image:
            mode, ids = image.mode, np.array(image)
    except (OSError, SyntaxError, ValueError) as error:  # all three come out of Pillow's decoders
        raise ImageError(f"{path} needs to be a readable PNG, got '{error}'; restore the file.") from error
    if mode not in ("L", "P"):
        raise ImageError(f"{path} needs one byte per pixel, the class id, got a PNG of mode {mode}; restore the file.")
    return torch.from_numpy(ids)


def _same_size(path: Path, size: tuple[int, int], image: Tensor) -> None:
    if tuple(size) != tuple(image.shape[1:]):
        (height, width), (h, w) = size, image.shape[1:]
        raise ValueError(f"{path} needs to fit its image, got {width} x {height} pixels for an image of {w} x {h}; "
                         "restore both files.")
