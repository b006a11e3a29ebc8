"""The index: what a data set holds, as columns that all ranks and workers of a node map read-only, and the files behind them.

One row an image and one row a LiDAR sweep, sorted by scene, sensor and time, so the images of one camera in one scene
are neighbours in time and in the file. Poses are float64, because world coordinates reach kilometres. The columns:

    scene_name          S  bytes
    camera_name         C  bytes, every camera of the dataroot
    image_timestamp_us  N                                    sweep_timestamp_us     M
    image_scene         N  row of scene_name                 sweep_scene            M
    image_camera        N  row of camera_name                sweep_ego_from_lidar   M 4 4
    image_mount         N  row of mount_*                    sweep_world_from_ego   M 4 4
    image_world_from_ego  N 4 4                              sweep_is_key_frame     M
    image_size_px       N 2, width and height
    image_is_key_frame  N
    first_image         S C + 1, first row of each scene and camera, and N
    mount_pix_from_cam  K 3 3, mount_ego_from_cam K 4 4: one row a calibrated camera, as nuScenes repeats them in each scene
    image_file          N  bytes, relative to the root       sweep_file             M   of a dataroot; for shards instead
    image_shard         N  row of shard_key                  sweep_shard            M
    image_offset        N  first byte                        sweep_offset           M
    image_bytes         N                                    sweep_bytes            M
    image_crc32         N                                    sweep_crc32            M
    shard_key           S  bytes, name of a shard in the store

and of a dataroot, whose key frames are annotated, one row a box, sorted by sample:

    scene_location      S  bytes, which map                       image_sample        N    row of the sample it belongs to
    sample_token        G  bytes                                  sample_origin_world G 3  the car as its key frame's sweep is, or NaN
    first_box           G + 1, first box of each sample, and B    box_size_m          B 3  length, width, height
    box_centre_world    B 3                                       box_velocity_world  B 3  m/s; NaN where it is not known
    box_heading_world   B 3  unit vector along its length         box_points          B    LiDAR and radar points inside
    category_name       bytes, as vehicle.car                     box_category        B    row of category_name
    attribute_name      bytes, as vehicle.moving                  box_attribute       B    row of attribute_name; -1 where it has none

Left to others: making it from the tables (`nuscenes.py`) or from packed shards (`shards/`), which rows form frames and clips
(`frames.py`).
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float64, Int, Int64

from trainer.data.columns import Columns
from trainer.data.files import Files

INDEX_FORMAT = 2
"""Raised whenever the columns change, so that an older index is built again."""


@dataclass(frozen=True)
class Index:
    """The columns by name, and the bytes behind their rows."""

    columns: Columns
    files: Files

    @property
    def root(self) -> str:
        """Folder or URI of the data set."""
        return self.columns.header["root"]

    @property
    def version(self) -> str:
        return self.columns.header["version"]

    @property
    def splits(self) -> dict[str, list[str]]:
        """Names of the scenes here by split; a split may be empty here."""
        return self.columns.header["splits"]

    @cached_property
    def scenes(self) -> tuple[str, ...]:
        """Scene names by row."""
        return tuple(name.decode() for name in self.columns["scene_name"].tolist())

    @cached_property
    def cameras(self) -> tuple[str, ...]:
        """Camera names by row."""
        return tuple(name.decode() for name in self.columns["camera_name"])

    def timestamp_us(self, rows: Int[np.ndarray, "*rows"]) -> Int64[np.ndarray, "*rows"]:
        return self.columns["image_timestamp_us"][rows]

    def is_key_frame(self, rows: Int[np.ndarray, "*rows"]) -> Bool[np.ndarray, "*rows"]:
        return self.columns["image_is_key_frame"][rows]

    def size_px(self, rows: Int[np.ndarray, "*rows"]) -> Int[np.ndarray, "*rows 2"]:
        """Width and height."""
        return self.columns["image_size_px"][rows]

    def mount(self, rows: Int[np.ndarray, "*rows"]) -> Int[np.ndarray, "*rows"]:
        """Which calibrated camera took each image."""
        return self.columns["image_mount"][rows]

    def pix_from_cam(self, rows: Int[np.ndarray, "*rows"]) -> Float64[np.ndarray, "*rows 3 3"]:
        return self.columns["mount_pix_from_cam"][self.mount(rows)]

    def ego_from_cam(self, rows: Int[np.ndarray, "*rows"]) -> Float64[np.ndarray, "*rows 4 4"]:
        return self.columns["mount_ego_from_cam"][self.mount(rows)]

    def world_from_ego(self, rows: Int[np.ndarray, "*rows"]) -> Float64[np.ndarray, "*rows 4 4"]:
        return self.columns["image_world_from_ego"][rows]

    def world_from_cam(self, rows: Int[np.ndarray, "*rows"]) -> Float64[np.ndarray, "*rows 4 4"]:
        return self.world_from_ego(rows) @ self.ego_from_cam(rows)

    def cam_from_world(self, rows: Int[np.ndarray, "*rows"]) -> Float64[np.ndarray, "*rows 4 4"]:
        world_from_cam = self.world_from_cam(rows)
        inverse = np.zeros_like(world_from_cam)  # a rotation's is its transpose, several times faster than a general one
        inverse[..., :3, :3] = world_from_cam[..., :3, :3].swapaxes(-1, -2)
        inverse[..., :3, 3] = -(inverse[..., :3, :3] @ world_from_cam[..., :3, 3, None])[..., 0]
        inverse[..., 3, 3] = 1
        return inverse

    @property
    def has_sweeps(self) -> bool:
        """Whether the dataroot has any LiDAR."""
        return len(self.columns["sweep_scene"]) > 0

    @property
    def has_boxes(self) -> bool:
        """Whether any key frame is annotated."""
        return "box_category" in self.columns.header["arrays"] and len(self.columns["box_category"]) > 0

    def boxes_of(self, image: int) -> slice:
        """Rows of the boxes of the sample that an image belongs to."""
        sample = self.columns["image_sample"][image]
        first, end = self.columns["first_box"][sample : sample + 2]
        return slice(int(first), int(end))

    def world_from_lidar(self, rows: Int[np.ndarray, "*rows"]) -> Float64[np.ndarray, "*rows 4 4"]:
        """At the time of each sweep."""
        return self.columns["sweep_world_from_ego"][rows] @ self.columns["sweep_ego_from_lidar"][rows]

    def sweeps_of(self, scene: int) -> slice:
        """Rows of the LiDAR sweeps of one scene, ascending in time."""
        scenes = self.columns["sweep_scene"]
        first, end = np.searchsorted(
            scenes, np.array([scene, scene + 1], dtype=scenes.dtype)
        )  # another type would copy the column
        return slice(int(first), int(end))

    def images_of(self, scene: int, camera: str) -> slice:
        """Rows of one camera in one scene, ascending in time."""
        group = scene * len(self.cameras) + self.cameras.index(camera)
        first, end = self.columns["first_image"][group : group + 2]
        return slice(int(first), int(end))
