"""Recording: what has to be known of a rig's logs to pack them, and the recording of a nuScenes dataroot.

How many cameras there are, what they are called, when they fire and whether there is a LiDAR is data of each drive, and drives
of different rigs may stand in one data set. To pack another rig, write a class with the three methods of Recording:

    class FleetRecording:
        name = "fleet of 2026"
        def drives(self):              return ["2026-11-03-berlin-17", ...]
        def read_drive(self, drive):   return Drive(drive, splits=("train",), images=Images(...), sweeps=NO_SWEEPS)
        def read_file(self, file):     return (self.folder / file).read_bytes()

    pack(FleetRecording(...), "s3://bucket/fleet")

It travels to worker processes, so it pickles, best as a path and little else. Images stay as they are, byte for byte, in any
format that Pillow reads; a sweep's file is nuScenes' .pcd.bin: x, y, z in metres, intensity from 0 to 255 and ring, as little-endian
float32. Frames: `ego` with x ahead, y left, z up; `cam` with x right, y down, z ahead; `world` is any fixed one.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float64, Int, Int64

from trainer.data.index import Index

_TYPES = {
    "timestamp_us": np.int64,
    "is_key_frame": np.bool_,
    "ego_from_sensor": np.float64,
    "world_from_ego": np.float64,
    "pix_from_cam": np.float64,
    "size_px": np.int64,
}


@dataclass(frozen=True)
class Captures:
    """K files of one drive and how they were taken, in any order."""

    sensor: tuple[str, ...]
    """What took each, as CAM_FRONT."""
    file: tuple[str, ...]
    """What the recording calls each file."""
    timestamp_us: Int64[np.ndarray, " K"]
    is_key_frame: Bool[np.ndarray, " K"]
    """Whether it belongs to the sparse frames that most clips are made of; they get shards of their own."""
    ego_from_sensor: Float64[np.ndarray, "K 4 4"]
    world_from_ego: Float64[np.ndarray, "K 4 4"]
    """Pose of the car when each was taken."""

    def __len__(self) -> int:
        return len(self.file)

    def __post_init__(self) -> None:
        """Lists, and arrays of other types, do as well: what is equal packs equally."""
        for name in ("sensor", "file"):
            object.__setattr__(self, name, tuple(map(str, getattr(self, name))))
        for name, dtype in _TYPES.items():
            if hasattr(self, name):
                object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=dtype))


@dataclass(frozen=True)
class Images(Captures):
    """Captures of cameras."""

    pix_from_cam: Float64[np.ndarray, "K 3 3"]
    """Pinhole intrinsics; pixel centres at +0.5."""
    size_px: Int[np.ndarray, "K 2"]
    """Width and height."""


NO_SWEEPS = Captures((), (), np.empty(0, np.int64), np.empty(0, bool), np.empty((0, 4, 4)), np.empty((0, 4, 4)))
"""A drive without LiDAR."""


@dataclass(frozen=True)
class Drive:
    """Everything about one drive but the bytes of its files."""

    name: str
    splits: tuple[str, ...]
    images: Images
    sweeps: Captures

    @property
    def fingerprint(self) -> str:
        """The same for the same files taken in the same way; what is in the files is not looked at."""
        digest = hashlib.sha256(repr((self.name, self.splits)).encode())
        for captures in (self.images, self.sweeps):
            for field in fields(captures):
                value = getattr(captures, field.name)
                digest.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
        return digest.hexdigest()[:16]


@runtime_checkable
class Recording(Protocol):
    """Drives by name, and their files."""

    @property
    def name(self) -> str:
        """What messages and the version call it."""
        ...

    def drives(self) -> Sequence[str]:
        """Names of all drives, each once, in an order that stays."""
        ...

    def read_drive(self, drive: str) -> Drive:
        """What is known of a drive. DataError where that is wrong."""
        ...

    def read_file(self, file: str) -> bytes:
        """The bytes of a file. OSError where it cannot be read."""
        ...


@dataclass(frozen=True)
class NuscenesRecording:
    """A nuScenes dataroot by its index; `prefix` before the names of its scenes tells them from those of another one."""

    index: Index
    prefix: str = ""

    @property
    def name(self) -> str:
        """As Recording has it."""
        return f"{self.index.root} {self.index.version}"

    def drives(self) -> Sequence[str]:
        """As Recording has it."""
        return [f"{self.prefix}{scene}" for scene in self.index.scenes]

    def read_drive(self, drive: str) -> Drive:
        """As Recording has it."""
        index, name = self.index, drive.removeprefix(self.prefix)
        scene = index.scenes.index(name)
        first, end = index.columns["first_image"][[scene * len(index.cameras), (scene + 1) * len(index.cameras)]]
        rows = np.arange(first, end)
        images = Images(
            sensor=tuple(index.cameras[camera] for camera in index.columns["image_camera"][rows]),
            **self._taken("image", rows),
            ego_from_sensor=index.ego_from_cam(rows),
            pix_from_cam=index.pix_from_cam(rows),
            size_px=index.size_px(rows),
        )
        swept = np.arange(len(index.columns["sweep_scene"]))[index.sweeps_of(scene)]
        sweeps = Captures(
            sensor=("LIDAR",) * len(swept),
            **self._taken("sweep", swept),
            ego_from_sensor=index.columns["sweep_ego_from_lidar"][swept],
        )
        splits = tuple(split for split, names in index.splits.items() if name in names and split != "all")
        return Drive(drive, splits, images, sweeps)

    def read_file(self, file: str) -> bytes:
        """As Recording has it."""
        return (Path(self.index.root) / file).read_bytes()

    def _taken(self, kind: str, rows: Int[np.ndarray, " K"]) -> dict:
        columns = self.index.columns
        return {
            "file": tuple(name.decode() for name in columns[f"{kind}_file"][rows]),
            "timestamp_us": np.array(columns[f"{kind}_timestamp_us"][rows]),
            "is_key_frame": np.array(columns[f"{kind}_is_key_frame"][rows]),
            "world_from_ego": np.array(columns[f"{kind}_world_from_ego"][rows]),
        }
