"""One drive: simulate it, render every image and sweep, and give its rows of the tables.

Times are microseconds; the drive begins at `start_us`. Sweep k has its time stamp, the middle of its turn, k LiDAR periods after
that; image k of a camera is taken k camera periods after it, plus the camera's place in the turn (`rig.py`). One in so many of each
is a keyframe.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from trainer.data.ground_truth import GROUND_TRUTH, GroundTruth, save_ground_truth
from trainer.synthesis.boxes import Boxes, join
from trainer.synthesis.camera import FAR_M, View, flow_to, look, paint, things_of
from trainer.synthesis.city import LOCATIONS, City, build_city
from trainer.synthesis.config import SynthesisConfig
from trainer.synthesis.lidar import scan
from trainer.synthesis.paint import Light, draw_light
from trainer.synthesis.pose import quaternion_of_yaw, world_from_ground_pose
from trainer.synthesis.rig import RIGS, Camera, Mount, Rig
from trainer.synthesis.routes import Route, drive_around
from trainer.synthesis.tables import (
    Row,
    Tables,
    attribute_token,
    category_token,
    link,
    sensor_token,
    token,
    visibility_token,
    write_json,
)
from trainer.synthesis.traffic import Traffic, build_traffic

_ANNOTATED_M = 75.0


@dataclass(frozen=True)
class Scene:
    """Everything that happens in a drive, as functions of time in seconds from its start."""

    config: SynthesisConfig
    number: int
    city: City
    ego: Route
    traffic: Traffic
    light: Light

    @property
    def rig(self) -> Rig:
        return RIGS[self.config.rig]

    @property
    def name(self) -> str:
        return f"scene-{self.number + 1:04d}"

    @property
    def start_us(self) -> int:
        return 1_600_000_000_000_000 + self.number * 1_000_000_000

    @property
    def logfile(self) -> str:
        return f"s{self.config.seed:03d}-{self.number + 1:04d}"

    @property
    def keyframes(self) -> int:
        return max(2, int(self.config.duration_s * self.rig.keyframe_hz))

    @cached_property
    def _city_near(self) -> Boxes:
        """What of the city can be seen from the way of the ego; the rest is never looked at."""
        way = self.ego.poses(np.linspace(0, self.config.duration_s, 64))[:, :2]
        distance = np.linalg.norm(self.city.boxes.centre_m[:, None, :2] - way, axis=-1).min(axis=1)
        return self.city.boxes.take(np.flatnonzero(distance < FAR_M + 20))

    def world_from_ego(self, time_s: float) -> Float[np.ndarray, "4 4"]:
        """Pose of the car."""
        x, y, yaw = self.ego.poses(np.array([time_s]))[0]
        return world_from_ground_pose(x, y, yaw)

    def boxes_at(self, time_s: float) -> Boxes:
        """All that stands and moves."""
        return join([self._city_near, self.traffic.boxes_at(time_s)])

    def view(self, camera: Camera, time_s: float) -> View:
        """What `camera` looks at."""
        pose = self.world_from_ego(time_s) @ camera.ego_from_sensor
        return View(camera.pix_from_cam(self.config.scale), pose, self.config.size_px)

    def token(self, *parts: object) -> str:
        """A token of this scene."""
        return token(self.config.seed, self.name, *parts)


def build_scene(config: SynthesisConfig, number: int) -> Scene:
    """Draw the drive `number` of the data set."""
    rng = np.random.default_rng([config.seed, number, 2])
    city = build_city(config.seed, LOCATIONS[number % len(LOCATIONS)])
    speed_mps = float(rng.uniform(5.0, 9.0))
    ego = drive_around(rng, length_m=speed_mps * config.duration_s + 20, speed_mps=speed_mps)
    traffic = build_traffic(rng, ego, config.duration_s)
    return Scene(config, number, city, ego, traffic, draw_light(rng))


def write_scene(config: SynthesisConfig, number: int, out: Path) -> Tables:
    """Render the drive into `out`; its rows of the tables."""
    scene = build_scene(config, number)
    shown: dict[int, dict[int, list[int]]] = {}
    camera_rows = [_write_images(scene, camera, out, shown) for camera in scene.rig.cameras]
    lidar_rows, lidar_counts = _write_sweeps(scene, out)
    rows = [row for of_sensor in (*camera_rows, lidar_rows) for row in of_sensor]
    instances, annotations = _annotate(scene, shown, lidar_counts)
    samples = _sample_rows(scene)
    if config.ground_truth:
        tokens = [scene.token("instance", thing) for thing in range(len(scene.traffic.things))]
        write_json(out / GROUND_TRUTH / f"{scene.name}.json", tokens)
    return {
        "log": [_log_row(scene)],
        "scene": [_scene_row(scene, samples)],
        "sample": samples,
        "sample_data": rows,
        "ego_pose": [_ego_pose_row(scene, row) for row in rows],
        "calibrated_sensor": [_calibration_row(scene, sensor) for sensor in scene.rig.sensors],
        "instance": instances,
        "sample_annotation": annotations,
    }


def _write_images(scene: Scene, camera: Camera, out: Path, shown: dict[int, dict[int, list[int]]]) -> list[Row]:
    rows = []
    images_per_keyframe = scene.rig.camera_hz // scene.rig.keyframe_hz
    for image in range((scene.keyframes - 1) * images_per_keyframe + 1):
        is_key = image % images_per_keyframe == 0
        offset_us = round(image * 1e6 / scene.rig.camera_hz) + scene.rig.offset_us(camera)
        row = _data_row(scene, camera, offset_us, is_key, image / images_per_keyframe)
        coverage = _write_image(scene, camera, out, row)
        if is_key:
            for thing, (visible, whole) in coverage.items():
                counts = shown.setdefault(image // images_per_keyframe, {}).setdefault(thing, [0, 0])
                counts[0] += visible
                counts[1] += whole
        rows.append(row)
    return link(rows)


def _write_image(scene: Scene, camera: Camera, out: Path, row: Row) -> dict[int, tuple[int, int]]:
    time_s = (row["timestamp"] - scene.start_us) / 1e6
    boxes, view = scene.boxes_at(time_s), scene.view(camera, time_s)
    seen = look(view, boxes, count_coverage=row["is_key_frame"])
    path = out / row["filename"]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(paint(seen, boxes, scene.light, seed=scene.city.seed)).save(path, quality=scene.config.jpeg_quality)
    if scene.config.ground_truth:
        period_s = 1 / scene.rig.camera_hz
        forward, backward = (
            flow_to(seen, boxes, scene.view(camera, other_s), scene.boxes_at(other_s))
            for other_s in (time_s + period_s, time_s - period_s)
        )
        depth = seen.depth_m.reshape(forward.shape[:2])
        save_ground_truth(out, row["filename"], GroundTruth(depth, forward, backward, things_of(seen, boxes)))
    return seen.coverage


def _write_sweeps(scene: Scene, out: Path) -> tuple[list[Row], Int[np.ndarray, "keyframes things"]]:
    """Rows of all sweeps, and points on each thing at each keyframe; no rows and no points without LiDAR."""
    rows: list[Row] = []
    counts = np.zeros((scene.keyframes, len(scene.traffic.things)), dtype=np.int64)
    lidar = scene.rig.lidar
    if lidar is None:
        return rows, counts
    sweeps_per_keyframe = lidar.hz // scene.rig.keyframe_hz
    for sweep in range((scene.keyframes - 1) * sweeps_per_keyframe + 1):
        is_key = sweep % sweeps_per_keyframe == 0
        row = _data_row(scene, lidar, round(sweep * 1e6 / lidar.hz), is_key, sweep / sweeps_per_keyframe)
        time_s = sweep / lidar.hz
        rng = np.random.default_rng([scene.config.seed, scene.number, 3, sweep])
        found = scan(lidar, scene.world_from_ego(time_s), scene.boxes_at(time_s), rng)
        path = out / row["filename"]
        path.parent.mkdir(parents=True, exist_ok=True)
        found.points.astype(np.float32).tofile(path)
        if is_key:
            on_things = found.thing[found.thing >= 0]
            counts[sweep // sweeps_per_keyframe] = np.bincount(on_things, minlength=len(scene.traffic.things))
        rows.append(row)
    return link(rows), counts


def _annotate(
    scene: Scene, shown: dict[int, dict[int, list[int]]], lidar_counts: Int[np.ndarray, "keyframes things"]
) -> tuple[list[Row], list[Row]]:
    """Instances and their boxes at keyframes where a camera or the LiDAR caught them."""
    instances, annotations = [], []
    for number, thing in enumerate(scene.traffic.things):
        rows = []
        for keyframe in range(scene.keyframes):
            visible, whole = shown.get(keyframe, {}).get(number, [0, 0])
            points = int(lidar_counts[keyframe, number])
            time_s = keyframe / scene.rig.keyframe_hz
            x, y, yaw = thing.route.poses(np.array([time_s]))[0]
            ego_x, ego_y, _ = scene.ego.poses(np.array([time_s]))[0]
            if (visible == 0 and points == 0) or np.hypot(x - ego_x, y - ego_y) > _ANNOTATED_M:
                continue
            rows.append(
                {
                    "token": scene.token("annotation", number, keyframe),
                    "sample_token": scene.token("sample", keyframe),
                    "instance_token": scene.token("instance", number),
                    "visibility_token": visibility_token(visible / whole if whole else 0.0),
                    "attribute_tokens": [attribute_token(thing.attribute)] if thing.attribute else [],
                    "translation": [float(x), float(y), float(thing.size_m[2] / 2)],
                    "size": [float(thing.size_m[1]), float(thing.size_m[0]), float(thing.size_m[2])],
                    "rotation": quaternion_of_yaw(yaw),
                    "num_lidar_pts": points,
                    "num_radar_pts": 0,
                }
            )
        if rows:
            annotations += link(rows)
            instances.append(
                {
                    "token": scene.token("instance", number),
                    "category_token": category_token(thing.kind.category),
                    "nbr_annotations": len(rows),
                    "first_annotation_token": rows[0]["token"],
                    "last_annotation_token": rows[-1]["token"],
                }
            )
    return instances, annotations


def _data_row(scene: Scene, sensor: Mount, offset_us: int, is_key: bool, keyframe: float) -> Row:
    is_camera = isinstance(sensor, Camera)
    timestamp_us = scene.start_us + offset_us
    folder, ending = "samples" if is_key else "sweeps", "jpg" if is_camera else "pcd.bin"
    width, height = scene.config.size_px if is_camera else (0, 0)
    name = scene.token("data", sensor.channel, offset_us)
    return {
        "token": name,
        "sample_token": scene.token("sample", math.ceil(keyframe)),  # a sweep belongs to the keyframe that follows
        "ego_pose_token": name,
        "calibrated_sensor_token": scene.token("calibration", sensor.channel),
        "timestamp": timestamp_us,
        "fileformat": "jpg" if is_camera else "pcd",
        "is_key_frame": is_key,
        "height": height,
        "width": width,
        "filename": f"{folder}/{sensor.channel}/{scene.logfile}__{sensor.channel}__{timestamp_us}.{ending}",
    }


def _ego_pose_row(scene: Scene, data_row: Row) -> Row:
    time_s = (data_row["timestamp"] - scene.start_us) / 1e6
    x, y, yaw = scene.ego.poses(np.array([time_s]))[0]
    return {
        "token": data_row["ego_pose_token"],
        "timestamp": data_row["timestamp"],
        "rotation": quaternion_of_yaw(yaw),
        "translation": [float(x), float(y), 0.0],
    }


def _calibration_row(scene: Scene, sensor: Mount) -> Row:
    intrinsic = sensor.pix_from_cam(scene.config.scale).tolist() if isinstance(sensor, Camera) else []
    return {
        "token": scene.token("calibration", sensor.channel),
        "sensor_token": sensor_token(sensor.channel),
        "translation": list(sensor.translation_m),
        "rotation": list(sensor.rotation),
        "camera_intrinsic": intrinsic,
    }


def _sample_rows(scene: Scene) -> list[Row]:
    return link(
        [
            {
                "token": scene.token("sample", keyframe),
                "timestamp": scene.start_us + round(keyframe * 1e6 / scene.rig.keyframe_hz),
                "scene_token": scene.token("scene"),
            }
            for keyframe in range(scene.keyframes)
        ]
    )


def _scene_row(scene: Scene, samples: list[Row]) -> Row:
    return {
        "token": scene.token("scene"),
        "log_token": scene.token("log"),
        "nbr_samples": len(samples),
        "first_sample_token": samples[0]["token"],
        "last_sample_token": samples[-1]["token"],
        "name": scene.name,
        "description": f"Synthetic drive, seed {scene.config.seed}",
    }


def _log_row(scene: Scene) -> Row:
    return {
        "token": scene.token("log"),
        "logfile": scene.logfile,
        "vehicle": "synthetic",
        "date_captured": "2020-09-13",
        "location": scene.city.location,
    }
