"""The sensors of a car, as data: where they sit, what they see, when they fire.

A `Rig` is all that the synthetic world knows of the car that carries it. Which sensors there are, how many, what they are called
and how often they fire is read from it alone, so another car is another entry of RIGS and its name in RigName.

    nuscenes  six cameras and a LiDAR; intrinsics and mountings of a nuScenes car (calibration of log n015-2018-07-24)
    five      a van: five cameras around the roof that fire at once, no LiDAR
    seven     a car: six cameras around and a narrow one that looks far ahead, fired by a LiDAR that turns half as fast
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Float

RigName = Literal["nuscenes", "five", "seven"]
Quaternion = tuple[float, float, float, float]


@dataclass(frozen=True)
class Mount:
    """A sensor on the car, as nuScenes writes it down: translation in metres, rotation as (w, x, y, z)."""

    channel: str
    translation_m: tuple[float, float, float]
    rotation: Quaternion

    @cached_property
    def ego_from_sensor(self) -> Float[np.ndarray, "4 4"]:
        transform = np.eye(4)
        transform[:3, :3] = _matrix_of(self.rotation)
        transform[:3, 3] = self.translation_m
        return transform


@dataclass(frozen=True)
class Camera(Mount):
    """A pinhole camera; focal length and principal point in pixels of the full size."""

    focal_px: float
    centre_px: tuple[float, float]

    def pix_from_cam(self, scale: float) -> Float[np.ndarray, "3 3"]:
        """Intrinsics of an image that is `scale` times the full size."""
        (u, v), f = self.centre_px, self.focal_px
        return np.array([[f * scale, 0, u * scale], [0, f * scale, v * scale], [0, 0, 1]])


@dataclass(frozen=True)
class Lidar(Mount):
    """A scanner that turns clockwise and begins each turn behind the car."""

    hz: int
    """Turns a second, each of which is a sweep."""
    beams: int
    elevation_deg: tuple[float, float]
    """Of the lowest and the highest beam; the others lie evenly between."""
    columns: int
    """How often each beam fires in a turn."""
    range_m: float
    """Nothing comes back from beyond."""


@dataclass(frozen=True)
class Rig:
    """The sensors of one car and how often they fire."""

    name: RigName
    cameras: tuple[Camera, ...]
    """Clockwise from the front."""
    lidar: Lidar | None
    camera_hz: int
    """Images a second of each camera."""
    keyframe_hz: int
    """Annotated instants a second; divides the rates of the cameras and the LiDAR."""
    size_px: tuple[int, int]
    """Width and height of a full image."""

    @property
    def sensors(self) -> tuple[Mount, ...]:
        """Everything that writes files."""
        return self.cameras if self.lidar is None else (*self.cameras, self.lidar)

    def offset_us(self, camera: Camera) -> int:
        """When the beam crosses the camera's axis and fires it, from the middle of the turn; without LiDAR all fire at once."""
        if self.lidar is None:
            return 0
        turn_us = 1e6 / self.lidar.hz
        axis = camera.ego_from_sensor[:3, 2]
        turned = (np.pi - np.arctan2(axis[1], axis[0])) / (2 * np.pi) % 1.0
        # A turn begins and ends straight behind the car: the last bit of a rotation must not choose between the two.
        return round(turned * turn_us) % round(turn_us) - round(turn_us / 2)


def _matrix_of(quaternion: Quaternion) -> Float[np.ndarray, "3 3"]:
    w, x, y, z = np.array(quaternion) / np.linalg.norm(quaternion)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


_AHEAD: Quaternion = (0.5, -0.5, 0.5, -0.5)
"""Turns a camera's axes (right, down, forward) into those of the car (forward, left, up)."""


def _facing(*, left_deg: float, down_deg: float) -> Quaternion:
    """Rotation of a camera that looks ahead, tilted down and then turned to the left."""
    left, down = np.deg2rad(left_deg) / 2, np.deg2rad(down_deg) / 2
    turn = (float(np.cos(left)), 0.0, 0.0, float(np.sin(left)))
    tilt = (float(np.cos(down)), 0.0, float(np.sin(down)), 0.0)
    return _compose(_compose(turn, tilt), _AHEAD)


def _compose(second: Quaternion, first: Quaternion) -> Quaternion:
    """The rotation that does `first` and then `second`: Hamilton's product."""
    (a, b, c, d), (w, x, y, z) = second, first
    return (
        a * w - b * x - c * y - d * z,
        a * x + b * w + c * z - d * y,
        a * y - b * z + c * w + d * x,
        a * z + b * y - c * x + d * w,
    )


NUSCENES_LIDAR = Lidar(
    "LIDAR_TOP",
    translation_m=(0.94371, 0.0, 1.84023),
    rotation=(0.70779552, -0.00649224, 0.01064621, -0.70630731),
    hz=20,
    beams=32,
    elevation_deg=(-30.67, 10.67),
    columns=1080,
    range_m=70.0,
)

NUSCENES = Rig(
    name="nuscenes",
    cameras=(
        Camera(
            "CAM_FRONT",
            translation_m=(1.70079, 0.01595, 1.51096),
            rotation=(-0.49980155, 0.50303162, -0.49977981, 0.49737084),
            focal_px=1266.4172,
            centre_px=(816.2670, 491.5071),
        ),
        Camera(
            "CAM_FRONT_RIGHT",
            translation_m=(1.55085, -0.49340, 1.49575),
            rotation=(0.20603479, -0.20269405, 0.68245078, -0.67136109),
            focal_px=1260.8474,
            centre_px=(807.9682, 495.3344),
        ),
        Camera(
            "CAM_BACK_RIGHT",
            translation_m=(1.01488, -0.48057, 1.56240),
            rotation=(-0.12280980, 0.13240084, 0.70043058, -0.69049603),
            focal_px=1259.5137,
            centre_px=(807.2529, 501.1958),
        ),
        Camera(
            "CAM_BACK",
            translation_m=(0.02833, 0.00345, 1.57910),
            rotation=(0.50378727, -0.49740250, -0.49418502, 0.50454961),
            focal_px=809.2210,
            centre_px=(829.2196, 481.7784),
        ),
        Camera(
            "CAM_BACK_LEFT",
            translation_m=(1.03569, 0.48479, 1.59097),
            rotation=(-0.69241856, 0.70316194, 0.11648343, -0.11203318),
            focal_px=1256.7415,
            centre_px=(792.1126, 492.7758),
        ),
        Camera(
            "CAM_FRONT_LEFT",
            translation_m=(1.52388, 0.49463, 1.50933),
            rotation=(0.67572650, -0.67362665, 0.21214015, -0.21122827),
            focal_px=1272.5979,
            centre_px=(826.6155, 479.7517),
        ),
    ),
    lidar=NUSCENES_LIDAR,
    camera_hz=12,
    keyframe_hz=2,
    size_px=(1600, 900),
)

FIVE = Rig(
    name="five",
    cameras=(
        Camera(
            "FRONT",
            translation_m=(2.05, 0.00, 2.10),
            rotation=_facing(left_deg=0.0, down_deg=4.0),
            focal_px=802.4,
            centre_px=(642.7, 356.1),
        ),
        Camera(
            "RIGHT",
            translation_m=(1.10, -0.92, 2.12),
            rotation=_facing(left_deg=-70.0, down_deg=6.0),
            focal_px=690.8,
            centre_px=(636.9, 361.4),
        ),
        Camera(
            "REAR_RIGHT",
            translation_m=(-0.85, -0.90, 2.14),
            rotation=_facing(left_deg=-142.0, down_deg=6.0),
            focal_px=688.3,
            centre_px=(640.2, 363.0),
        ),
        Camera(
            "REAR_LEFT",
            translation_m=(-0.85, 0.90, 2.14),
            rotation=_facing(left_deg=142.0, down_deg=6.0),
            focal_px=692.1,
            centre_px=(644.5, 358.7),
        ),
        Camera(
            "LEFT",
            translation_m=(1.10, 0.92, 2.12),
            rotation=_facing(left_deg=70.0, down_deg=6.0),
            focal_px=689.6,
            centre_px=(638.8, 360.9),
        ),
    ),
    lidar=None,
    camera_hz=10,
    keyframe_hz=5,
    size_px=(1280, 720),
)

SEVEN = Rig(
    name="seven",
    cameras=(
        Camera(
            "FRONT",
            translation_m=(1.68, 0.00, 1.48),
            rotation=_facing(left_deg=0.0, down_deg=1.0),
            focal_px=1372.0,
            centre_px=(958.3, 545.2),
        ),
        Camera(
            "FRONT_FAR",
            translation_m=(1.68, -0.12, 1.48),
            rotation=_facing(left_deg=0.0, down_deg=0.0),
            focal_px=3851.5,
            centre_px=(964.0, 537.6),
        ),
        Camera(
            "FRONT_RIGHT",
            translation_m=(1.46, -0.52, 1.50),
            rotation=_facing(left_deg=-60.0, down_deg=1.0),
            focal_px=1368.9,
            centre_px=(955.1, 540.8),
        ),
        Camera(
            "REAR_RIGHT",
            translation_m=(1.02, -0.51, 1.55),
            rotation=_facing(left_deg=-118.0, down_deg=1.0),
            focal_px=1374.4,
            centre_px=(961.7, 543.3),
        ),
        Camera(
            "REAR",
            translation_m=(0.05, 0.00, 1.57),
            rotation=_facing(left_deg=180.0, down_deg=2.0),
            focal_px=1143.2,
            centre_px=(959.4, 538.9),
        ),
        Camera(
            "REAR_LEFT",
            translation_m=(1.02, 0.51, 1.55),
            rotation=_facing(left_deg=118.0, down_deg=1.0),
            focal_px=1370.6,
            centre_px=(957.8, 541.5),
        ),
        Camera(
            "FRONT_LEFT",
            translation_m=(1.46, 0.52, 1.50),
            rotation=_facing(left_deg=60.0, down_deg=1.0),
            focal_px=1373.1,
            centre_px=(962.5, 539.7),
        ),
    ),
    lidar=Lidar(
        "LIDAR_TOP",
        translation_m=(1.20, 0.00, 1.92),
        rotation=(1.0, 0.0, 0.0, 0.0),
        hz=10,
        beams=40,
        elevation_deg=(-25.0, 15.0),
        columns=1800,
        range_m=100.0,
    ),
    camera_hz=10,
    keyframe_hz=2,
    size_px=(1920, 1080),
)

RIGS: Mapping[RigName, Rig] = {rig.name: rig for rig in (NUSCENES, FIVE, SEVEN)}
