"""The sensors of the ego car as data: what they are, where they sit, when they fire.

Intrinsics, mounting poses and the order in which the cameras fire are those of a nuScenes car (n015, scene-0061). There,
a camera fires when the turning LiDAR looks along it, and a sweep is stored as if it were taken at one instant. Here a sweep
*is* taken at one instant, in the middle of the turn, so the cameras fire up to 22 ms before or after it, and the image
nearest to a LiDAR keyframe is always the one of its own turn.

Left to whom: `camera` and `lidar` make pictures and points of it, `tables` its nuScenes rows.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float

from trainer.synthesis.transforms import rotation_from_quaternion, transform_from_parts

FULL_WIDTH_PX, FULL_HEIGHT_PX = 1600, 900
KEYFRAME_PERIOD_US = 500_000
LIDAR_SWEEPS_PER_KEYFRAME = 10  # 20 Hz
IMAGES_PER_KEYFRAME = 6  # 12 Hz


@dataclass(frozen=True)
class Camera:
    """A pinhole camera at full size, mounted on the ego car."""

    channel: str
    focal_px: float
    centre_px: tuple[float, float]
    translation_ego_m: tuple[float, float, float]
    rotation_ego: tuple[float, float, float, float]
    """Quaternion of ego_from_cam."""
    fires_after_us: int
    """Exposure relative to the LiDAR sweep of the same turn."""

    @cached_property
    def ego_from_cam(self) -> Float[np.ndarray, "4 4"]:
        """The mounting pose."""
        return transform_from_parts(rotation_from_quaternion(np.array(self.rotation_ego)), np.array(self.translation_ego_m))

    def size_px(self, scale: float) -> tuple[int, int]:
        """(width, height) of an image at this scale."""
        return max(round(FULL_WIDTH_PX * scale), 1), max(round(FULL_HEIGHT_PX * scale), 1)

    def pix_from_cam(self, scale: float) -> Float[np.ndarray, "3 3"]:
        """Intrinsics at this scale; pixel centres lie at +0.5, so everything scales with the sides."""
        width_px, height_px = self.size_px(scale)
        x, y = width_px / FULL_WIDTH_PX, height_px / FULL_HEIGHT_PX
        return np.array([[self.focal_px * x, 0, self.centre_px[0] * x], [0, self.focal_px * y, self.centre_px[1] * y], [0, 0, 1]])


CAMERAS = (
    Camera(
        "CAM_FRONT",
        1266.417203046554,
        (816.2670197447984, 491.50706579294757),
        (1.7007912397384644, 0.01594563201069832, 1.5109575986862183),
        (0.4998015430569128, -0.5030316162024876, 0.4997798114386805, -0.49737083824542755),
        -13_800,
    ),
    Camera(
        "CAM_FRONT_RIGHT",
        1260.8474446004698,
        (807.968244525554, 495.3344268742088),
        (1.5508477687835693, -0.4934048056602478, 1.4957480430603027),
        (0.2060347966337182, -0.2026940577919598, 0.6824507824531167, -0.6713610884174485),
        -5_900,
    ),
    Camera(
        "CAM_FRONT_LEFT",
        1272.5979470598488,
        (826.6154927353808, 479.75165386361925),
        (1.5238779783248901, 0.4946313500404358, 1.5093282461166382),
        (0.6757265034669446, -0.6736266522251881, 0.21214015046209478, -0.21122827103904068),
        -21_400,
    ),
    Camera(
        "CAM_BACK",
        809.2209905677063,
        (829.2196003259838, 481.77842384512485),
        (0.02832603082060814, 0.0034513676073402166, 1.5791034698486328),
        (0.5037872666382278, -0.49740249788611096, -0.4941850223835201, 0.5045496097725578),
        11_300,
    ),
    Camera(
        "CAM_BACK_LEFT",
        1256.7414812095406,
        (792.1125740759628, 492.7757465151356),
        (1.0356910228729248, 0.4847950339317322, 1.5909701585769653),
        (0.6924185592174665, -0.7031619420114925, -0.11648342771943819, 0.11203317912370753),
        21_200,
    ),
    Camera(
        "CAM_BACK_RIGHT",
        1259.5137405846733,
        (807.2529053838625, 501.19579884916527),
        (1.0148781538009644, -0.4805682301521301, 1.562395453453064),
        (0.12280980120078765, -0.132400842670559, -0.7004305821388234, 0.690496031265798),
        1_600,
    ),
)


@dataclass(frozen=True)
class Lidar:
    """A spinning LiDAR: rings at fixed elevations, columns at even azimuths. Frame: x right, y forward, z up."""

    channel: str
    translation_ego_m: tuple[float, float, float]
    rotation_ego: tuple[float, float, float, float]
    elevations_deg: tuple[float, ...]
    columns: int
    range_m: float

    @cached_property
    def ego_from_lidar(self) -> Float[np.ndarray, "4 4"]:
        """The mounting pose."""
        return transform_from_parts(rotation_from_quaternion(np.array(self.rotation_ego)), np.array(self.translation_ego_m))


LIDAR = Lidar(
    channel="LIDAR_TOP",
    translation_ego_m=(0.9437130093574524, 0.0, 1.8402299880981445),
    rotation_ego=(0.7077955119163518, -0.006492242056004365, 0.010646214713995808, -0.7063073142877817),
    elevations_deg=tuple(np.linspace(-30.67, 10.67, 32).tolist()),
    columns=1080,
    range_m=80.0,
)


def lidar_timestamps_us(start_us: int, samples: int) -> list[int]:
    """Sweeps from the first keyframe to the last; every tenth is a keyframe."""
    step_us = KEYFRAME_PERIOD_US // LIDAR_SWEEPS_PER_KEYFRAME
    return [start_us + step_us * sweep for sweep in range((samples - 1) * LIDAR_SWEEPS_PER_KEYFRAME + 1)]


def camera_timestamps_us(start_us: int, samples: int, camera: Camera) -> list[int]:
    """Exposures from the first keyframe to the last; every sixth is a keyframe."""
    images = range((samples - 1) * IMAGES_PER_KEYFRAME + 1)
    return [start_us + camera.fires_after_us + round(KEYFRAME_PERIOD_US * image / IMAGES_PER_KEYFRAME) for image in images]
