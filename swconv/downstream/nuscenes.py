"""nuScenes for monocular detection: images with 3-D boxes, detections as a submission, and the devkit's verdict on them.

A sample is `(image, target)` as in `datasets`: an image is uint8 (3, H, W), one camera's at one moment, and the target is what
`fcos3d.FCOS3D` takes. Two frames occur: the camera's (x to the right, y down, z ahead) and the world's (z up). Lengths are in
m, angles in rad. nuscenes-devkit reads the tables and evaluates.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor
from tqdm import tqdm

from swconv.atomic import write_json
from swconv.downstream.datasets import Images, Sample, Target, Transform
from swconv.downstream.fcos3d import rotated_nms
from swconv.downstream.transforms import fit, flip, resize
from swconv.training.manifest import read_image

CLASSES = ("car", "truck", "trailer", "bus", "construction_vehicle", "bicycle", "motorcycle", "pedestrian", "traffic_cone",
           "barrier")
ATTRIBUTES = ("cycle.with_rider", "cycle.without_rider", "pedestrian.moving", "pedestrian.standing",
              "pedestrian.sitting_lying_down", "vehicle.moving", "vehicle.parked", "vehicle.stopped", "")
KINDS = {"bicycle": "cycle", "motorcycle": "cycle", "pedestrian": "pedestrian", "traffic_cone": None, "barrier": None}
USUAL = {"bus": "vehicle.moving", "pedestrian": "pedestrian.moving"}  # where the attribute said does not go with the class
USUAL_OF_KIND = {"vehicle": "vehicle.parked", "cycle": "cycle.without_rider"}
SPLITS = {"v1.0-mini": {"train": "mini_train", "val": "mini_val"}, "v1.0-trainval": {"train": "train", "val": "val"}}
TABLES = ("attribute", "calibrated_sensor", "category", "ego_pose", "instance", "log", "map", "sample", "sample_annotation",
          "sample_data", "scene", "sensor", "visibility")
ERRORS = {"trans_err": "mATE", "scale_err": "mASE", "orient_err": "mAOE", "vel_err": "mAVE", "attr_err": "mAAE"}
MERGE_IOU, MERGED = 0.05, 500  # detections of all cameras of a moment: overlap that they may have, and how many may stay
FILES = 3  # names in a sentence


class NuScenesImages(Images):
    """The key frames of all cameras, in the order of scenes, moments and cameras.

    A target holds `image_id` (sample_data token), `sample` (token of the moment), `original_size`, `size`; `boxes`, float32
    (n, 4), x1 y1 x2 y2 in px, of what the projected box covers of the image; `labels` and `attributes`, int64 (n,), into
    `CLASSES` and `ATTRIBUTES`; `boxes3d`, float32 (n, 9), and `camera`, float32 (3, 3), as in `fcos3d`; `rotation`, float64
    (4,), the quaternion w x y z, and `position`, float64 (3,), that take the camera's frame to the world's.

    Parameters
    ----------
    root : Path
        With <version>/ (the 13 tables), samples/ and maps/.
    split : {"train", "val"}
    version : {"v1.0-mini", "v1.0-trainval"}
    transform, seed
        As in `datasets.Images`.
    training : bool
        Without the images that have no box.

    Attributes
    ----------
    tables : nuscenes.NuScenes
        The devkit's view.
    moments : tuple of str
        Sample tokens of the split.

    Raises
    ------
    ModuleNotFoundError
        Without nuscenes-devkit, which numpy 2 keeps out of a plain install: `pip install --no-deps nuscenes-devkit==1.2.0`.
    FileNotFoundError
        No such folder, table, map or image.
    ValueError
        Another version or split, broken or incomplete tables, a camera without intrinsics; from `read`: an unreadable image or
        one of another size.
    """

    class_names = CLASSES

    def __init__(self, root: Path, split: str, version: str = "v1.0-mini", transform: Transform | None = None, seed: int = 0,
                 training: bool = False):
        super().__init__(transform, seed)
        if version not in SPLITS or split not in SPLITS[version]:
            raise ValueError(f"nuScenes needs one of the versions {', '.join(SPLITS)} and the split train or val, got "
                             f"'{version}' and '{split}'; correct params/.")
        self.tables, self.split = _open(Path(root), version), SPLITS[version][split]
        from nuscenes.utils.splits import create_splits_scenes

        names = set(create_splits_scenes()[self.split])
        scenes = [scene for scene in self.tables.scene if scene["name"] in names]
        self.moments = tuple(token for scene in scenes for token in self._moments(scene["first_sample_token"]))
        self._tokens = [token for moment in self.moments for token in self._cameras(moment)]
        if not self._tokens:
            raise ValueError(f"nuScenes needs camera images of the scenes of {self.split} in {root}/{version}, got none of "
                             f"{len(names)} scenes; unpack the parts of the dataset that hold them.")
        self._check_files()
        if training:
            self._tokens = [token for token in tqdm(self._tokens, desc="nuScenes: images with boxes", disable=None)
                            if any(True for _ in self._objects(token))]
            if not self._tokens:
                raise ValueError(f"nuScenes needs boxes of the {len(CLASSES)} classes in images of {self.split} to train, got "
                                 f"none in {root}/{version}; unpack the metadata again.")

    def __len__(self) -> int:
        return len(self._tokens)

    def read(self, index: int) -> Sample:
        target = self.target(index)
        path = self.tables.get_sample_data_path(target["image_id"])
        image = torch.from_numpy(np.array(read_image(path, "RGB"))).permute(2, 0, 1)
        (height, width), (h, w) = target["size"], image.shape[1:]
        if (height, width) != (h, w):
            raise ValueError(f"{path} needs {width} x {height} pixels, as sample_data.json says, got {w} x {h}; restore the "
                             "file.")
        return image, target

    def target(self, index: int) -> Target:
        """The annotation alone, without decoding the image."""
        token = self._tokens[index]
        record = self.tables.get("sample_data", token)
        sensor = self.tables.get("calibrated_sensor", record["calibrated_sensor_token"])
        ego = self.tables.get("ego_pose", record["ego_pose_token"])
        turn = Rotation.from_quat(ego["rotation"], scalar_first=True)
        rotation = turn * Rotation.from_quat(sensor["rotation"], scalar_first=True)
        objects = list(self._objects(token))
        size = (record["height"], record["width"])
        return {
            "image_id": token, "sample": record["sample_token"], "original_size": size, "size": size,
            "boxes": torch.tensor([each["box"] for each in objects], dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor([each["label"] for each in objects], dtype=torch.int64),
            "attributes": torch.tensor([each["attribute"] for each in objects], dtype=torch.int64),
            "boxes3d": torch.tensor([each["box3d"] for each in objects], dtype=torch.float32).reshape(-1, 9),
            "camera": torch.tensor(sensor["camera_intrinsic"], dtype=torch.float32),
            "rotation": torch.from_numpy(rotation.as_quat(scalar_first=True)),
            "position": torch.from_numpy(turn.apply(sensor["translation"]) + ego["translation"]),
        }

    def _moments(self, token: str) -> Iterator[str]:
        while token:
            yield token
            token = self.tables.get("sample", token)["next"]

    def _cameras(self, moment: str) -> list[str]:
        return [token for channel, token in sorted(self.tables.get("sample", moment)["data"].items())
                if self.tables.get("sample_data", token)["sensor_modality"] == "camera"]

    def _objects(self, token: str) -> Iterator[dict]:
        """The boxes of the ten classes, ahead of the camera, of which a pixel or more may be seen."""
        from nuscenes.eval.detection.utils import category_to_detection_name
        from nuscenes.utils.geometry_utils import BoxVisibility, view_points
        from shapely.geometry import MultiPoint, box

        record = self.tables.get("sample_data", token)
        canvas = box(0, 0, record["width"], record["height"])
        for annotation in self.tables.get("sample", record["sample_token"])["anns"]:
            note = self.tables.get("sample_annotation", annotation)
            name = category_to_detection_name(note["category_name"])
            if name is None:
                continue
            _, (found,), camera = self.tables.get_sample_data(token, BoxVisibility.NONE, [annotation])
            if found.center[2] <= 0:
                continue
            corners = found.corners()
            seen = view_points(corners[:, corners[2] > 0], camera, normalize=True)[:2].T
            left, top, right, bottom = sides = MultiPoint(seen).convex_hull.intersection(canvas).bounds
            if not (right - left >= 1 and bottom - top >= 1):                           # nan where they do not meet
                continue
            yield {"box": sides, "label": CLASSES.index(name), "attribute": self._attribute(note),
                   "box3d": self._box3d(found, annotation, record)}

    def _box3d(self, found, annotation: str, record: dict) -> list[float]:
        sensor = self.tables.get("calibrated_sensor", record["calibrated_sensor_token"])
        ego = self.tables.get("ego_pose", record["ego_pose_token"])
        rotation = Rotation.from_quat([ego["rotation"], sensor["rotation"]], scalar_first=True)
        east, north, _ = self.tables.box_velocity(annotation)                           # nan where it is not known
        velocity = (rotation[0] * rotation[1]).inv().apply(np.nan_to_num([east, north, 0]))
        width, length, height = found.wlh
        ahead = found.rotation_matrix[:, 0]
        yaw = -math.atan2(ahead[2], ahead[0])
        return [*found.center.tolist(), length, height, width, yaw, velocity[0], velocity[2]]

    def _attribute(self, note: dict) -> int:
        tokens = note["attribute_tokens"]
        return ATTRIBUTES.index(self.tables.get("attribute", tokens[0])["name"] if tokens else "")

    def _check_files(self) -> None:
        """Every image is there, every camera has intrinsics, every moment a lidar, whose pose evaluation needs."""
        for moment in self.moments:
            if "LIDAR_TOP" not in self.tables.get("sample", moment)["data"]:
                raise ValueError("nuScenes needs a LIDAR_TOP key frame in sample_data.json at every moment, got none at sample "
                                 f"{moment}; unpack the metadata again.")
        cameras = {self.tables.get("sample_data", token)["calibrated_sensor_token"] for token in self._tokens}
        for token in sorted(cameras):
            if not _projects(self.tables.get("calibrated_sensor", token)["camera_intrinsic"]):
                raise ValueError("nuScenes needs a 3 x 3 camera_intrinsic for every camera, and an inverse of it, got another "
                                 f"at the calibration {token} in calibrated_sensor.json; unpack the metadata again.")
        paths = [Path(self.tables.get_sample_data_path(token)) for token in self._tokens]
        missing = [str(path) for path in paths if not path.exists()]
        if missing:
            raise FileNotFoundError(f"nuScenes needs {len(paths)} images for {self.split}, got none for {len(missing)}: "
                                    f"{_first(missing)}; unpack the parts of the dataset that hold them.")


@dataclass(frozen=True)
class Mono:
    """The recipe's only augmentation: resize within a long and a short side, keeping the ratio, and mirror the scene.

    Parameters
    ----------
    long_side, short_side : int
        In px.
    flip : float
        Probability.
    """

    long_side: int = 1600
    short_side: int = 900
    flip: float = 0.0

    def __call__(self, image: Tensor, target: Target, generator: torch.Generator) -> Sample:
        if torch.rand((), generator=generator).item() < self.flip:
            image, target = mirror(image, target)
        (height, width), size = image.shape[1:], fit(image.shape[1:], self.long_side, self.short_side)
        image, target = resize(image, target, size)
        scale = torch.tensor([size[1] / width, size[0] / height, 1.0])
        return image, target | {"camera": scale[:, None] * target["camera"]}


def mirror(image: Tensor, target: Target) -> Sample:
    """Left and right exchanged, in the image and in the scene ("BEV flip"): x becomes W - x in px, and -x in m."""
    width = image.shape[2]
    image, target = flip(image, target)
    camera, boxes3d = target["camera"].clone(), target["boxes3d"].clone()
    camera[0, 2] = width - camera[0, 2]
    boxes3d[:, [0, 7]] = -boxes3d[:, [0, 7]]
    boxes3d[:, 6] = math.pi - boxes3d[:, 6]
    return image, target | {"camera": camera, "boxes3d": boxes3d}


def in_world(found: dict[str, Tensor], target: Target) -> dict:
    """One image's detections in the world's frame.

    Parameters
    ----------
    found : dict
        As `fcos3d.FCOS3D` gives it.
    target : dict
        Of a `NuScenesImages`: where the camera was.

    Returns
    -------
    dict
        `sample`, and arrays of m rows: `translation`, `size` (w, l, h), `rotation` (quaternion), `velocity` (x, y), `scores`,
        `labels`, `attributes`.
    """
    boxes = found["boxes3d"].double().cpu().numpy()
    camera = Rotation.from_quat(target["rotation"].numpy(), scalar_first=True)
    upright = Rotation.from_euler("x", math.pi / 2)                                     # a box's own z is up
    rotation = camera * upright * Rotation.from_rotvec(np.outer(-boxes[:, 6], [0, 0, 1]))
    velocity = np.stack([boxes[:, 7], np.zeros(len(boxes)), boxes[:, 8]], 1)
    return {
        "sample": target["sample"], "translation": camera.apply(boxes[:, :3]) + target["position"].numpy(),
        "size": boxes[:, [5, 3, 4]], "rotation": rotation.as_quat(scalar_first=True), "velocity": camera.apply(velocity)[:, :2],
        **{key: found[key].cpu().numpy() for key in ("scores", "labels", "attributes")},
    }


def submission(detections: Iterable[dict], moments: Iterable[str]) -> dict:
    """nuScenes' detection format: what all cameras saw at each moment, the doubles where they overlap removed.

    Parameters
    ----------
    detections : iterable of dict
        From `in_world`, in any order.
    moments : iterable of str
        Sample tokens; each gets an entry, empty where nothing was found.
    """
    views = defaultdict(list)
    for each in detections:
        views[each["sample"]].append(each)
    return {
        "meta": {"use_camera": True, "use_lidar": False, "use_radar": False, "use_map": False, "use_external": False},
        "results": {moment: _merged(views[moment]) if views[moment] else [] for moment in moments},
    }


def evaluate(dataset: NuScenesImages, path: Path) -> dict[str, float]:
    """The devkit's evaluation (configuration detection_cvpr_2019) of a submission of the dataset's split.

    Returns
    -------
    dict
        `mAP`, `NDS` and `AP_<class>` in %; the mean errors of true positives, lower is better: `mATE` (m), `mASE` (1 - IoU),
        `mAOE` (rad), `mAVE` (m/s), `mAAE` (1 - accuracy).

    Raises
    ------
    ValueError
        A file that is no submission, or one of other moments; a split without annotated boxes.
    """
    from nuscenes.eval.common.config import config_factory
    from nuscenes.eval.detection.evaluate import DetectionEval

    results = _results(Path(path), dataset)
    settings = config_factory("detection_cvpr_2019")
    if not any(dataset.tables.get("sample", moment)["anns"] for moment in dataset.moments):
        raise ValueError(f"nuScenes evaluation needs annotated boxes, got none in {dataset.split}; unpack the metadata "
                         "again.")
    if not any(results.values()):                                                       # the devkit cannot begin without a box
        return {"mAP": 0.0, "NDS": 0.0, **dict.fromkeys(ERRORS.values(), 1.0), **{f"AP_{name}": 0.0 for name in CLASSES}}
    with TemporaryDirectory() as folder:
        metrics, _ = DetectionEval(dataset.tables, settings, str(path), dataset.split, folder, verbose=False).evaluate()
    found = metrics.serialize()
    return {
        "mAP": 100 * float(found["mean_ap"]), "NDS": 100 * float(found["nd_score"]),
        **{ours: float(found["tp_errors"][theirs]) for theirs, ours in ERRORS.items()},
        **{f"AP_{name}": 100 * float(found["mean_dist_aps"][name]) for name in CLASSES},
    }


def write_submission(content: dict, path: Path) -> None:
    """Write what `submission` made, whole or not at all."""
    write_json(path, content)


def attribute_name(attribute: int, name: str) -> str:
    """What a class may be said to do: the attribute said if it goes with the class, else the usual one."""
    kind = KINDS.get(name, "vehicle")
    if kind is None:
        return ""
    said = ATTRIBUTES[attribute]
    return said if said.startswith(f"{kind}.") else USUAL.get(name, USUAL_OF_KIND.get(kind))


def _merged(views: list[dict]) -> list[dict]:
    """The boxes of one moment, best first."""
    joined = {key: np.concatenate([view[key] for view in views]) for key in views[0] if key != "sample"}
    ahead = Rotation.from_quat(joined["rotation"], scalar_first=True).as_matrix()[:, :, 0]
    seen = np.column_stack([joined["translation"][:, :2], joined["size"][:, [1, 0]], np.arctan2(ahead[:, 1], ahead[:, 0])])
    scores, labels = torch.from_numpy(joined["scores"]), torch.from_numpy(joined["labels"])
    kept = rotated_nms(torch.from_numpy(seen), scores, labels, MERGE_IOU)[:MERGED].tolist()
    return [
        {
            "sample_token": views[0]["sample"],
            **{key: joined[key][index].tolist() for key in ("translation", "size", "rotation", "velocity")},
            "detection_name": CLASSES[joined["labels"][index]], "detection_score": float(joined["scores"][index]),
            "attribute_name": attribute_name(joined["attributes"][index], CLASSES[joined["labels"][index]]),
        }
        for index in kept
    ]


def _results(path: Path, dataset: NuScenesImages) -> dict[str, list]:
    try:
        results = json.loads(path.read_bytes())["results"]
        moments = set(results)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} needs to be a nuScenes submission with meta and results, got {error!r}; run the evaluation "
                         "that writes it again.") from error
    if moments != set(dataset.moments):
        raise ValueError(f"{path} needs an entry for each of the {len(dataset.moments)} moments of {dataset.split}, got "
                         f"{len(moments)}, of which {len(moments & set(dataset.moments))} are among them; evaluate that split.")
    return results


def _open(root: Path, version: str):
    """The devkit's tables, after what it would stumble over has been looked at."""
    try:
        import shapely  # noqa: F401
        from nuscenes import NuScenes
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"nuScenes needs nuscenes-devkit and what it imports, got '{error}'; run `make setup`, or `pip install "
            "--no-deps nuscenes-devkit==1.2.0` (its metadata ask for numpy 1, it runs with 2) and `pip install -e "
            "'.[nuscenes]'`.") from error
    places = (root / version, root / "samples", root / "maps")
    missing = [str(place) for place in places if not place.is_dir()]
    if missing:
        raise FileNotFoundError(f"nuScenes needs a folder with {version}/ (the 13 tables), samples/ and maps/, got {root} "
                                f"without {' and '.join(missing)}; put the dataset there, or set its root in params/ to "
                                "where it is.")
    missing = [f"{name}.json" for name in TABLES if not (root / version / f"{name}.json").is_file()]
    if missing:
        raise FileNotFoundError(f"nuScenes needs 13 tables in {root / version}, got no {' and no '.join(missing)}; unpack the "
                                "metadata again.")
    try:
        maps = [root / each["filename"] for each in json.loads((root / version / "map.json").read_bytes())]
        missing = [str(path) for path in maps if not path.is_file()]
        if missing:
            raise FileNotFoundError(f"nuScenes needs the maps that map.json names, got no {_first(missing)}; unpack the "
                                    "metadata again.")
        return NuScenes(version, str(root), verbose=False)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(_diagnosis(root / version, error)) from error


def _diagnosis(folder: Path, error: Exception) -> str:
    """Which table is broken, or which one refers to what is not there."""
    tables = {}
    for name in TABLES:
        try:
            tables[name] = json.loads((folder / f"{name}.json").read_bytes())
        except json.JSONDecodeError as broken:
            return f"{folder / name}.json needs to be JSON, got '{broken}'; unpack the metadata again."
    for name, records in tables.items():
        for record in records:
            for field, value in record.items():
                referred = field.removesuffix("_token")
                if field.endswith("_token") and value == error.args[0]:
                    return (f"{folder / name}.json needs every {field} in {referred}.json, got '{value}', which is not there; "
                            "unpack the metadata again.")
    return f"The tables in {folder} need the fields of nuScenes, got {error!r}; unpack the metadata again."


def _projects(camera: list) -> bool:
    try:
        matrix = np.array(camera, float)
    except (TypeError, ValueError):
        return False
    return matrix.shape == (3, 3) and np.isfinite(matrix).all() and np.linalg.matrix_rank(matrix) == 3


def _first(names: list[str]) -> str:
    return ", ".join(names[:FILES]) + (", ..." if len(names) > FILES else "")
