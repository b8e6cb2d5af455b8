"""A nuScenes of two short scenes, in the format of v1.0-mini: cuboids of the ten classes, drawn as the cameras would see them.

Tables, names and geometry are those of the real one; images have a quarter of its width. The same bytes come out every time.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy.spatial.transform import Rotation

SCENES = {"scene-0061": 0, "scene-0103": 1}  # of mini_train and of mini_val: by name, which layout
MOMENTS, PERIOD = 4, 500_000  # key frames per scene, and us between them
START = 1_533_000_000_000_000  # us
SPEED = 1.0  # m/s, of the ego vehicle, along x
WIDTH, HEIGHT, FOCAL = 384, 216, 304.0  # px
MOUNT = 1.5  # m, of the cameras, above the ground
FINER, QUALITY = 2, 88  # pixels drawn per pixel and axis; of JPEGs
LEVEL = Rotation.from_quat([0.5, -0.5, 0.5, -0.5], scalar_first=True)  # takes x right, y down, z ahead to x ahead, y left, z up
CAMERAS = {"CAM_FRONT": 0.0, "CAM_BACK": math.pi}  # rad, about the ego vehicle's z
FACES = ((0, 1, 2, 3), (4, 5, 6, 7), (0, 1, 5, 4), (2, 3, 7, 6), (0, 3, 7, 4), (1, 2, 6, 5))
SHADES = (1.0, 0.35, 0.85, 0.5, 0.6, 0.75)  # front, back, top, bottom, and the two sides


@dataclass(frozen=True)
class Kind:
    """Category, attribute, colour, and extents in m."""

    category: str
    attribute: str
    colour: tuple[int, int, int]
    width: float
    length: float
    height: float


KINDS = (
    Kind("vehicle.car", "vehicle.moving", (220, 40, 40), 1.9, 4.6, 1.7),
    Kind("vehicle.truck", "vehicle.parked", (40, 90, 230), 2.5, 6.9, 2.8),
    Kind("vehicle.trailer", "vehicle.parked", (150, 60, 200), 2.9, 8.0, 3.9),
    Kind("vehicle.bus.rigid", "vehicle.moving", (240, 210, 40), 2.9, 9.0, 3.5),
    Kind("vehicle.construction", "vehicle.stopped", (250, 140, 20), 2.7, 6.4, 3.2),
    Kind("vehicle.bicycle", "cycle.without_rider", (30, 200, 90), 0.6, 1.7, 1.3),
    Kind("vehicle.motorcycle", "cycle.with_rider", (30, 210, 220), 0.8, 2.1, 1.5),
    Kind("human.pedestrian.adult", "pedestrian.moving", (240, 120, 190), 0.7, 0.7, 1.8),
    Kind("movable_object.trafficcone", "", (250, 250, 250), 0.4, 0.4, 1.1),
    Kind("movable_object.barrier", "", (110, 70, 40), 2.4, 0.5, 1.0),
    Kind("movable_object.debris", "", (90, 90, 90), 0.5, 0.5, 0.4),        # is none of the ten classes
)
# Per scene and camera, from left to right: kind, bearing in degrees, distance in m, heading against the ray in degrees, m/s.
LAYOUTS = (
    {"CAM_FRONT": ((5, -25, 9, 60, 0), (0, -13, 13, 160, 2), (10, -5, 8, 0, 0), (8, 1, 8, 0, 0), (1, 10, 20, 20, 0),
                   (7, 24, 9, 100, 1)),
     "CAM_BACK": ((9, -24, 9, 80, 0), (3, -12, 22, 170, 3), (6, 1, 9, 40, 0), (2, 12, 20, 10, 0), (4, 26, 15, -30, 0))},
    {"CAM_FRONT": ((9, -25, 10, 100, 0), (4, -12, 17, 25, 0), (7, -2, 8, 80, 1), (0, 10, 12, -20, 2), (6, 25, 9, 130, 0)),
     "CAM_BACK": ((8, -26, 7, 0, 0), (10, -20, 8, 0, 0), (2, -10, 22, 160, 0), (5, 1, 8, 90, 0), (1, 12, 19, -15, 0),
                  (3, 27, 24, 20, 3))},
)


def write_tiny_nuscenes(root: Path) -> None:
    """Write v1.0-mini/, samples/ and maps/ below `root`: two scenes of four moments, seen by two cameras and a lidar.

    Scene 0061 belongs to mini_train, 0103 to mini_val; each has one object of every class, in another place.
    """
    tables = {name: [] for name in ("sample", "sample_data", "ego_pose", "scene", "instance", "sample_annotation")}
    tables |= _fixed()
    for scene, layout in SCENES.items():
        _write_scene(root, tables, scene, layout)
    (root / "maps").mkdir(parents=True, exist_ok=True)
    Image.new("L", (64, 64), 255).save(root / "maps" / "tiny.png")
    (root / "v1.0-mini").mkdir(exist_ok=True)
    for name, records in tables.items():
        (root / "v1.0-mini" / f"{name}.json").write_text(json.dumps(records))


def _fixed() -> dict[str, list[dict]]:
    """The tables that no scene adds to."""
    attributes = ("vehicle.moving", "vehicle.stopped", "vehicle.parked", "cycle.with_rider", "cycle.without_rider",
                  "pedestrian.sitting_lying_down", "pedestrian.standing", "pedestrian.moving")
    sensors = {**dict.fromkeys(CAMERAS, "camera"), "LIDAR_TOP": "lidar"}
    calibrations = []
    for scene in SCENES:
        for channel in sensors:
            camera = channel in CAMERAS
            turn = Rotation.from_euler("z", CAMERAS[channel]) * LEVEL if camera else Rotation.identity()
            calibrations.append({
                "token": _token("calibration", scene, channel), "sensor_token": _token("sensor", channel),
                "translation": [0.0, 0.0, MOUNT if camera else 1.8], "rotation": turn.as_quat(scalar_first=True).tolist(),
                "camera_intrinsic": [[FOCAL, 0.0, WIDTH / 2], [0.0, FOCAL, HEIGHT / 2], [0.0, 0.0, 1.0]] if camera else [],
            })
    return {
        "attribute": [{"token": _token("attribute", name), "name": name, "description": ""} for name in attributes],
        "calibrated_sensor": calibrations,
        "category": [{"token": _token("category", kind.category), "name": kind.category, "description": "", "index": index}
                     for index, kind in enumerate(KINDS, 1)],
        "log": [{"token": _token("log", scene), "logfile": scene, "vehicle": "n008", "date_captured": "2018-08-01",
                 "location": "singapore-onenorth"} for scene in SCENES],
        "map": [{"token": _token("map"), "log_tokens": [_token("log", scene) for scene in SCENES],
                 "category": "semantic_prior", "filename": "maps/tiny.png"}],
        "sensor": [{"token": _token("sensor", channel), "channel": channel, "modality": modality}
                   for channel, modality in sensors.items()],
        "visibility": [{"token": str(level), "level": name, "description": ""}
                       for level, name in enumerate(("v0-40", "v40-60", "v60-80", "v80-100"), 1)],
    }


def _write_scene(root: Path, tables: dict[str, list[dict]], scene: str, layout: int) -> None:
    origin = np.array([400.0 + 100 * layout, 1100.0, 0.0])
    things = [_placed(origin, CAMERAS[channel], *row) for channel, rows in LAYOUTS[layout].items() for row in rows]
    samples = [_token("sample", scene, moment) for moment in range(MOMENTS)]
    for moment, sample in enumerate(samples):
        time = START + layout * 60_000_000 + moment * PERIOD
        ego = origin + [SPEED * moment * PERIOD / 1e6, 0, 0]
        boxes = [(kind, place + velocity * moment * PERIOD / 1e6, yaw) for kind, place, yaw, velocity in things]
        tables["sample"].append({**_link(moment, "sample", scene), "timestamp": time, "scene_token": _token("scene", scene)})
        for channel in (*CAMERAS, "LIDAR_TOP"):
            suffix, size = ("jpg", (HEIGHT, WIDTH)) if channel in CAMERAS else ("pcd.bin", (0, 0))
            path = root / "samples" / channel / f"n008-{scene}__{channel}__{time}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            if channel in CAMERAS:
                _draw(boxes, ego, CAMERAS[channel]).save(path, quality=QUALITY)
            else:
                _echoes(boxes, ego).tofile(path)
            link = _link(moment, "data", scene, channel)
            tables["ego_pose"].append({"token": link["token"], "timestamp": time, "rotation": [1.0, 0.0, 0.0, 0.0],
                                       "translation": ego.tolist()})
            tables["sample_data"].append({
                **link, "sample_token": sample, "ego_pose_token": link["token"],
                "calibrated_sensor_token": _token("calibration", scene, channel), "timestamp": time,
                "fileformat": suffix.split(".")[0], "is_key_frame": True, "height": size[0], "width": size[1],
                "filename": path.relative_to(root).as_posix(),
            })
        for number, (kind, place, yaw) in enumerate(boxes):
            tables["sample_annotation"].append({
                **_link(moment, "annotation", scene, number), "sample_token": sample,
                "instance_token": _token("instance", scene, number),
                "attribute_tokens": [_token("attribute", kind.attribute)] if kind.attribute else [], "visibility_token": "4",
                "translation": place.tolist(), "size": [kind.width, kind.length, kind.height],
                "rotation": Rotation.from_euler("z", yaw).as_quat(scalar_first=True).tolist(),
                "num_lidar_pts": 8, "num_radar_pts": 0,
            })
    tables["instance"] += [
        {"token": _token("instance", scene, number), "category_token": _token("category", kind.category),
         "nbr_annotations": MOMENTS, "first_annotation_token": _token("annotation", scene, number, 0),
         "last_annotation_token": _token("annotation", scene, number, MOMENTS - 1)}
        for number, (kind, *_) in enumerate(things)
    ]
    tables["scene"].append({"token": _token("scene", scene), "log_token": _token("log", scene), "nbr_samples": MOMENTS,
                            "first_sample_token": samples[0], "last_sample_token": samples[-1], "name": scene,
                            "description": "drawn cuboids"})


def _placed(origin: np.ndarray, camera: float, kind: int, bearing: float, distance: float, heading: float,
            speed: float) -> tuple[Kind, np.ndarray, float, np.ndarray]:
    """Kind, centre in the world, yaw, and velocity; bearings count from the camera's axis to the right."""
    ray, kind = camera - math.radians(bearing), KINDS[kind]
    yaw = ray + math.radians(heading)
    place = origin + [distance * math.cos(ray), distance * math.sin(ray), kind.height / 2]
    return kind, place, yaw, speed * np.array([math.cos(yaw), math.sin(yaw), 0])


def _corners(kind: Kind, place: np.ndarray, yaw: float) -> np.ndarray:
    """(8, 3) in the world: the four of the front, then those of the back, each from top left."""
    half = np.array([kind.length, kind.width, kind.height]) / 2
    signs = np.array([[x, y, z] for x in (1, -1) for y, z in ((1, 1), (-1, 1), (-1, -1), (1, -1))])
    return place + Rotation.from_euler("z", yaw).apply(signs * half)


def _draw(boxes: Sequence[tuple[Kind, np.ndarray, float]], ego: np.ndarray, turn: float) -> Image.Image:
    """What a camera sees: ground and sky, then the boxes from far to near, each face that looks at the camera in its shade."""
    eye = ego + [0, 0, MOUNT]
    camera = (Rotation.from_euler("z", turn) * LEVEL).inv()
    rows = np.linspace(0, 1, HEIGHT * FINER)[:, None]
    sky, ground = np.array([130, 170, 210]) + 60 * rows, np.array([70, 72, 74]) + 60 * rows
    canvas = np.where(rows < 0.5, sky, ground)[:, None].repeat(WIDTH * FINER, 1).astype(np.uint8)
    image = Image.fromarray(canvas)
    pen = ImageDraw.Draw(image)
    for kind, place, yaw in sorted(boxes, key=lambda box: -np.linalg.norm(box[1] - eye)):
        corners = _corners(kind, place, yaw)
        seen = camera.apply(corners - eye)
        if seen[:, 2].min() < 1:
            continue
        pixels = FINER * (FOCAL * seen[:, :2] / seen[:, 2:] + [WIDTH / 2, HEIGHT / 2])
        for face, shade in zip(FACES, SHADES, strict=True):
            middle = corners[list(face)].mean(0)
            if (middle - place) @ (middle - eye) < 0:
                pen.polygon([tuple(pixels[corner]) for corner in face], outline=(20, 20, 20),
                            fill=tuple(int(shade * channel) for channel in kind.colour))
    return image.reduce(FINER)


def _echoes(boxes: Sequence[tuple[Kind, np.ndarray, float]], ego: np.ndarray) -> np.ndarray:
    """A lidar's returns, float32 (n, 5): x, y, z, intensity, ring; one just inside every corner."""
    inside = [place + 0.95 * (_corners(kind, place, yaw) - place) for kind, place, yaw in boxes]
    points = np.concatenate(inside) - ego - [0, 0, 1.8]
    return np.column_stack([points, np.full(len(points), 30.0), np.zeros(len(points))]).astype(np.float32)


def _link(moment: int, *parts: str | int) -> dict[str, str]:
    """A record's token, and those of its neighbours in time."""
    return {name: _token(*parts, each) if 0 <= each < MOMENTS else ""
            for name, each in (("token", moment), ("prev", moment - 1), ("next", moment + 1))}


def _token(*parts: str | int) -> str:
    return hashlib.md5("/".join(map(str, parts)).encode(), usedforsecurity=False).hexdigest()
