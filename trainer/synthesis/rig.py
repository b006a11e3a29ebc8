"""The sensors of the car, as data: where they sit, what they see, when they fire.

Intrinsics and mountings are those of a nuScenes car (calibration of log n015-2018-07-24), at full size 1600 x 900. The LiDAR has
32 beams between -30.67 and +10.67 degrees and turns 20 times a second; a camera fires when the beam sweeps across its axis,
so each camera has its own offset in the cycle.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float

CAMERA_HZ = 12
LIDAR_HZ = 20
KEYFRAME_HZ = 2


@dataclass(frozen=True)
class Mount:
    """A sensor on the car, as nuScenes writes it down: translation in metres, rotation as (w, x, y, z)."""

    channel: str
    translation_m: tuple[float, float, float]
    rotation: tuple[float, float, float, float]

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

    @property
    def offset_us(self) -> int:
        """When in a LiDAR turn, which begins behind the car and goes clockwise, the beam crosses the optical axis."""
        axis = self.ego_from_sensor[:3, 2]
        turn = (np.pi - np.arctan2(axis[1], axis[0])) / (2 * np.pi) % 1.0
        return round(turn * 1e6 / LIDAR_HZ)


LIDAR = Mount("LIDAR_TOP", (0.94371, 0.0, 1.84023), (0.70779552, -0.00649224, 0.01064621, -0.70630731))

CAMERAS = (
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
)

BEAM_ELEVATIONS_RAD = np.deg2rad(np.linspace(-30.67, 10.67, 32))
BEAM_COLUMNS = 1080


def _matrix_of(quaternion: tuple[float, float, float, float]) -> Float[np.ndarray, "3 3"]:
    w, x, y, z = np.array(quaternion) / np.linalg.norm(quaternion)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )
