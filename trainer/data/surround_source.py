"""The source of surround clips from a nuScenes dataroot: all cameras at T instants, and the LiDAR sweeps that belong to them.

A sweep is mapped straight to the pixels of each image by one matrix that holds everything in between: where the LiDAR is
mounted, how the car moved between the time of the sweep and that of this image, where the camera is mounted, its
intrinsics, and the window (crop, scale, mirror) through which the image is seen.

    pix_from_lidar = out_from_source · pix_from_cam · cam_from_world(image time) · world_from_ego(sweep time) · ego_from_lidar

Things that move by themselves between the two times are off by that motion. A frame without a sweep has no points. The ego
frame of an instant is that of its first camera's time; `pix_from_ego` holds how the car moved until another camera fired.
"""

from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int

from trainer.config.data import AugmentConfig, DrivesData
from trainer.data.clips import name_clip, read_clip
from trainer.data.columns import Columns
from trainer.data.frames import NO_ROW
from trainer.data.index import Index
from trainer.data.source import Room, Sample, new_room
from trainer.data.transforms import Window, draw_colours, draw_window, place_window
from trainer.errors import ClipError

CAMERA_FIELDS = frozenset({"images", "images_colours", "pix_from_ego", "first_from_ego", "elapsed_s"})
LIDAR_FIELDS = frozenset({"points_lidar", "first_point", "ego_from_lidar", "pix_from_lidar"})

_POINT_VALUES = 5
"""x, y, z in metres, intensity from 0 to 255, ring: nuScenes' .pcd.bin, little-endian float32."""


@runtime_checkable
class Annotations(Protocol):
    """What people said of the street around a car."""

    @property
    def offers(self) -> frozenset[str]:
        """Names of the fields that `read` returns."""
        ...

    def read(self, rows: Int[np.ndarray, "T V"], world_from_ego: Float64[np.ndarray, "T 4 4"]) -> dict[str, np.ndarray]:
        """Fields of the frames with these images, in the ego frame of each."""
        ...


@dataclass(frozen=True)
class SurroundSource:
    """Surround clips by number; `augment` none reads them the same way every time."""

    index: Index
    clips: Columns
    config: DrivesData
    augment: AugmentConfig | None
    has_lidar: bool
    """Whether sweeps are read: they weigh as much as the images."""
    annotations: tuple[Annotations, ...] = ()

    @property
    def offers(self) -> frozenset[str]:
        """As Source has it."""
        lidar = LIDAR_FIELDS if self.has_lidar else frozenset[str]()
        return CAMERA_FIELDS.union(lidar, *(one.offers for one in self.annotations))

    def __len__(self) -> int:
        return len(self.clips["clip_images"])

    def name(self, index: int) -> str:
        """As Source has it."""
        return name_clip(self.index, self.clips["clip_images"][index])

    def describe(self) -> dict[str, float | int | str]:
        """As Source has it."""
        root = {"kind": self.config.kind, "root": str(self.index.root), "version": self.index.version}
        return {**root, "samples": len(self), **self.clips.header["figures"]}

    def load(self, index: int, rng: np.random.Generator, room: Room = new_room) -> Sample:
        """As Source has it."""
        rows = self.clips["clip_images"][index]
        windows = self._choose_windows(rows, rng)
        clip = self.config.clip
        try:
            read = read_clip(self.index, rows, (clip.width_px, clip.height_px), windows=windows, room=partial(room, "images"))
            points = self._read_sweeps(self.clips["clip_sweeps"][index], clip=read.name) if self.has_lidar else []
        except ClipError as error:
            raise ClipError(self.name(index), error.reason) from error
        # of each frame, as the car stood when its first camera fired
        world_from_ego = read.world_from_ego[:, 0]
        pix_from_world = read.pix_from_cam @ self.index.cam_from_world(rows)[..., :3, :]
        sample: dict[str, np.ndarray] = {
            "images": read.images,
            "images_colours": draw_colours(self.augment.colour_jitter if self.augment else 0.0, rng),
            "pix_from_ego": (pix_from_world @ world_from_ego[:, None]).astype(np.float32),
            "first_from_ego": (np.linalg.inv(world_from_ego[0]) @ world_from_ego).astype(np.float32),
            "elapsed_s": ((read.timestamp_us[:, 0] - read.timestamp_us[0, 0]) / 1e6).astype(np.float32),
        }
        if self.has_lidar:
            world_from_lidar, is_there = self._world_from_lidar(index)
            ego_from_lidar = np.linalg.inv(world_from_ego) @ world_from_lidar
            pix_from_lidar = pix_from_world @ world_from_lidar[:, None]
            sample |= {
                "points_lidar": np.concatenate(points),
                "first_point": np.cumsum([0, *map(len, points)]),
                "ego_from_lidar": np.where(is_there[:, None, None], ego_from_lidar, 0).astype(np.float32),
                "pix_from_lidar": np.where(is_there[:, None, None, None], pix_from_lidar, 0).astype(np.float32),
            }
        for one in self.annotations:
            sample |= one.read(rows, world_from_ego)
        return sample

    def draw_reads(self, index: int, rng: np.random.Generator) -> tuple[list[Int[np.ndarray, " K"]], Int[np.ndarray, " S"]]:
        """Rows of the images that `load` reads, one array a read, and of the sweeps; for plans."""
        del rng  # nothing is drawn here
        sweeps = self.clips["clip_sweeps"][index] if self.has_lidar else np.empty(0, np.int32)
        return [self.clips["clip_images"][index].reshape(-1)], sweeps[sweeps != NO_ROW]

    def _choose_windows(self, rows: Int[np.ndarray, "T V"], rng: np.random.Generator) -> list[Window]:
        """One for each camera, all mirrored or none."""
        out_size_px = (self.config.clip.width_px, self.config.clip.height_px)
        sizes = [(width, height) for width, height in self.index.size_px(rows[0]).tolist()]
        if self.augment is None:
            return [place_window(size, out_size_px) for size in sizes]
        share, is_mirrored = self.augment.crop_share, bool(rng.random() < self.augment.flip_probability)
        return [draw_window(size, out_size_px, crop_share=share, is_mirrored=is_mirrored, rng=rng) for size in sizes]

    def _read_sweeps(self, rows: Int[np.ndarray, " T"], *, clip: str) -> list[Float32[np.ndarray, "P 4"]]:
        """The points of each frame; none where there is no sweep."""
        there = [int(row) for row in rows if row != NO_ROW]
        files = dict(zip(there, self.index.files.read_sweeps(np.array(there, dtype=np.int64), clip=clip), strict=True))
        nothing = np.empty((0, 4), dtype=np.float32)
        return [
            nothing if row == NO_ROW else parse_points(files[row], clip=clip, file=self.index.files.name_sweep(row))
            for row in rows.tolist()
        ]

    def _world_from_lidar(self, index: int) -> tuple[Float64[np.ndarray, "T 4 4"], Bool[np.ndarray, " T"]]:
        """Of each frame's sweep at its own time, and whether there is one."""
        sweeps = self.clips["clip_sweeps"][index]
        return self.index.world_from_lidar(np.maximum(sweeps, 0)), sweeps != NO_ROW


def parse_points(data: bytes, *, clip: str, file: str) -> Float32[np.ndarray, "P 4"]:
    """x, y, z in the LiDAR's frame and intensity from 0 to 1; points that are not finite are left out."""
    if len(data) % (4 * _POINT_VALUES):
        raise ClipError(clip, f"{file} has {len(data)} bytes, which is no whole number of points of {_POINT_VALUES} float32")
    points = np.frombuffer(data, dtype="<f4").reshape(-1, _POINT_VALUES)[:, :4]
    points = points[np.isfinite(points).all(-1)]
    points[:, 3] /= 255
    return points
