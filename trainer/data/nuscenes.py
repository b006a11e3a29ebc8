"""From the tables of a nuScenes dataroot to the index, through the devkit, once.

The devkit keeps every record as a dict, several GB for the full set, and is slow to import: only `build_index` touches
it, `build.py` runs that in a process of its own, and no loader worker ever sees it. What the whole set rests on is
checked here (tables, references, calibrations, poses); whether a file behind a row can be read shows when it is loaded.

Splits come from `splits.json` in the version folder, {"train": [scene names], ...}, where there is one, and else from
the devkit; `train` and `val` of a mini version mean its mini_train and mini_val, and `all` is every scene.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float64, Int
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from trainer.config.data import DrivesData, NuscenesData
from trainer.data.columns import Columns, is_whole, write_columns
from trainer.data.files import LooseFiles
from trainer.data.index import INDEX_FORMAT, Index
from trainer.data.nuscenes_boxes import read_boxes
from trainer.data.records import Record, check_records, find_rows, read_field, read_numbers, read_transforms
from trainer.errors import DataError

if TYPE_CHECKING:
    from nuscenes.nuscenes import NuScenes

TABLES = (
    "attribute",
    "calibrated_sensor",
    "category",
    "ego_pose",
    "instance",
    "log",
    "map",
    "sample",
    "sample_annotation",
    "sample_data",
    "scene",
    "sensor",
    "visibility",
)
SPLITS_FILE = "splits.json"


def index_path(config: NuscenesData) -> Path:
    """Where the index of these very tables is kept: other tables, or changed ones, have another path."""
    version = find_version(config.root, config.version)
    tables = config.root / version
    missing = [name for name in TABLES if not (tables / f"{name}.json").is_file()]
    if missing:
        raise DataError(
            f"{tables} was to be read as nuScenes tables and lacks {', '.join(f'{name}.json' for name in missing)} "
            f"of the {len(TABLES)} tables; copy the missing files there, the devkit needs them all"
        )
    key = hashlib.sha256(repr((INDEX_FORMAT, str(config.root.resolve()), version)).encode())
    for name in sorted(tables.glob("*.json")):
        key.update(repr((name.name, name.stat().st_size, name.stat().st_mtime_ns)).encode())
    return index_folder(config) / f"{version}-{key.hexdigest()[:16]}"


def index_folder(config: DrivesData) -> Path:
    """Where indices are kept on this node."""
    return config.index_folder or temporary_folder()


def temporary_folder() -> Path:
    """Where indexes are kept that nobody has named a folder for."""
    return Path(tempfile.gettempdir()) / f"odonata-index-{os.getuid()}"


def find_version(root: Path, version: str | None) -> str:
    """The version folder to read; DataError with what there is where that is not clear."""
    if not root.is_dir():
        raise DataError(
            f"{root} was to be read as a dataroot and is not a folder{_where_relative(root)}; give a nuScenes dataroot "
            "(data.root of a run, --data root=... of a command), or make a synthetic one with `odonata synthesize`"
        )
    if (root / "versions").is_dir() and (root / "shards").is_dir():
        raise DataError(f"{root} was to be read as a dataroot and holds packed data; read it with data.kind shards")
    found = sorted(tables.parent.name for tables in root.glob("*/sample_data.json"))
    listing = ", ".join(found) or "no folder with nuScenes tables"
    if version is None and len(found) == 1:
        return found[0]
    if version is None:
        asked = "no version was named, which takes the only one there is,"
    elif (root / version).is_dir():
        return version
    else:
        asked = f"version {version} was asked for"
    advice = "name one of them" if found else "give a nuScenes dataroot"
    raise DataError(f"{asked} and {root} holds {listing}; {advice}")


def _where_relative(path: Path) -> str:
    """A run that is looked at from another folder than it was started in finds nothing by a relative path."""
    return "" if path.is_absolute() else f" in {Path.cwd()}"


def build_index(config: NuscenesData) -> Path:
    """Read the tables and write the index; returns where it stands. DataError where the tables are wrong."""
    path = index_path(config)
    version = find_version(config.root, config.version)
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"reading the tables of {config.root / version}")
        devkit = open_devkit(config.root, version)
        progress.update(task, description=f"indexing {len(devkit.sample_data)} rows of {config.root / version}")
        arrays = read_arrays(devkit)
        header = {"root": str(config.root.resolve()), "version": version, "splits": read_splits(devkit)}
        write_columns(path, arrays, header)
    return path


def open_index(path: Path) -> Index:
    """Map the index that stands at `path`; DataError where it is not whole."""
    if not is_whole(path):
        raise DataError(
            f"the index of a dataroot was asked for at {path} and what is there is missing or half-written; "
            "remove that folder and start again: it is built anew"
        )
    columns = Columns(path)
    return Index(columns, LooseFiles(columns))


def open_devkit(root: Path, version: str) -> "NuScenes":
    """The devkit on these tables; its failures become a DataError that names the file at fault."""
    from nuscenes.nuscenes import NuScenes  # slow, and never in a worker

    try:
        return NuScenes(version=version, dataroot=str(root), verbose=False)
    except Exception as error:
        for name in TABLES:
            check_table(root / version / f"{name}.json")
        raise DataError(
            f"the nuScenes devkit was to open {root / version} and stopped with {type(error).__name__}: {error}; "
            "the tables contradict each other or a map file is missing, write or download them again"
        ) from error


def check_table(path: Path) -> None:
    """DataError unless `path` holds a list of records with tokens."""
    try:
        records = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(
            f"{path} was to be read as a nuScenes table and does not parse: {error}; write or download that file again"
        ) from error
    if not isinstance(records, list) or not all(isinstance(record, dict) and "token" in record for record in records):
        raise DataError(
            f"{path} was to be read as a nuScenes table and is not a list of records with a token each; "
            "write or download that file again"
        )


def read_splits(devkit: "NuScenes") -> dict[str, list[str]]:
    """Scenes of this dataroot by split."""
    scenes = [scene["name"] for scene in devkit.scene]
    path = Path(devkit.dataroot) / devkit.version / SPLITS_FILE
    splits = _splits_of_file(path) if path.exists() else _splits_of_devkit(devkit.version)
    here = {split: [name for name in scenes if name in set(names)] for split, names in splits.items()}
    return {**here, "all": scenes}


def read_arrays(devkit: "NuScenes") -> dict[str, np.ndarray]:
    """All columns of the index, as `index.py` lists them."""
    return {
        "scene_name": _as_bytes(read_field(devkit.scene, "name", "scene")),
        "scene_location": _as_bytes(_read_locations(devkit)),
        **_read_images(devkit),
        **_read_sweeps(devkit),
        **_read_samples(devkit),
        **read_boxes(devkit),
    }


def _read_locations(devkit: "NuScenes") -> list[str]:
    """Of each scene, as singapore-onenorth: its map."""
    logs = find_rows(read_field(devkit.scene, "log_token", "scene"), devkit.log, "log")
    locations = read_field(devkit.log, "location", "log")
    return [locations[row] for row in logs]


@dataclass(frozen=True)
class _Sensors:
    """The records of one modality: what was captured, how its sensors are mounted, and what joins the two."""

    records: Sequence[Record]
    mounts: Sequence[Record]
    channel_of_mount: np.ndarray
    mount_of_record: np.ndarray


def _sensors(devkit: "NuScenes", modality: str) -> _Sensors:
    sensor_of = find_rows(read_field(devkit.calibrated_sensor, "sensor_token", "calibrated_sensor"), devkit.sensor, "sensor")
    chosen = np.array(read_field(devkit.sensor, "modality", "sensor"))[sensor_of] == modality
    channels = np.array(read_field(devkit.sensor, "channel", "sensor"))[sensor_of]
    tokens = read_field(devkit.sample_data, "calibrated_sensor_token", "sample_data")
    mount_of = find_rows(tokens, devkit.calibrated_sensor, "calibrated_sensor")
    captured = np.flatnonzero(chosen[mount_of])
    return _Sensors(
        records=[devkit.sample_data[row] for row in captured],
        mounts=[devkit.calibrated_sensor[row] for row in np.flatnonzero(chosen)],
        channel_of_mount=channels[chosen],
        mount_of_record=(np.cumsum(chosen) - 1)[mount_of[captured]],
    )


def _read_images(devkit: "NuScenes") -> dict[str, np.ndarray]:
    sensors = _sensors(devkit, "camera")
    cameras, camera_of_mount = np.unique(sensors.channel_of_mount, return_inverse=True)
    camera = camera_of_mount[sensors.mount_of_record]
    captures = _read_captures(sensors.records, devkit)
    order = np.lexsort((captures["timestamp_us"], camera, captures["scene"]))
    groups = (captures["scene"].astype(np.int64) * len(cameras) + camera)[order]
    samples = find_rows(read_field(sensors.records, "sample_token", "sample_data"), devkit.sample, "sample")
    return {
        "camera_name": _as_bytes(cameras.tolist()),
        "mount_pix_from_cam": _read_intrinsics(sensors.mounts),
        "mount_ego_from_cam": read_transforms(sensors.mounts, "calibrated_sensor"),
        **{f"image_{name}": column[order] for name, column in captures.items()},
        "image_camera": camera[order].astype(np.int16),
        "image_sample": samples[order].astype(np.int32),
        "image_mount": sensors.mount_of_record[order].astype(np.int32),
        "image_size_px": _read_sizes(sensors.records)[order],
        "first_image": np.searchsorted(groups, np.arange(len(devkit.scene) * len(cameras) + 1)),
    }


def _read_sweeps(devkit: "NuScenes") -> dict[str, np.ndarray]:
    sensors = _sensors(devkit, "lidar")
    captures = _read_captures(sensors.records, devkit)
    order = np.lexsort((captures["timestamp_us"], captures["scene"]))
    ego_from_lidar = read_transforms(sensors.mounts, "calibrated_sensor")
    return {
        **{f"sweep_{name}": column[order] for name, column in captures.items()},
        "sweep_ego_from_lidar": ego_from_lidar[sensors.mount_of_record[order]],
    }


def _read_samples(devkit: "NuScenes") -> dict[str, np.ndarray]:
    """Their tokens, and where the car stood when the LiDAR of a key frame swept; NaN where none did."""
    sensors = _sensors(devkit, "lidar")
    captures = _read_captures(sensors.records, devkit)
    is_key = captures["is_key_frame"]
    sample_of = find_rows(read_field(sensors.records, "sample_token", "sample_data"), devkit.sample, "sample")
    origin_world = np.full((len(devkit.sample), 3), np.nan)
    origin_world[sample_of[is_key]] = captures["world_from_ego"][is_key, :3, 3]
    return {"sample_token": _as_bytes(read_field(devkit.sample, "token", "sample")), "sample_origin_world": origin_world}


def _read_captures(records: Sequence[Record], devkit: "NuScenes") -> dict[str, np.ndarray]:
    """What images and sweeps have in common, in the order of `records`."""
    sample_of = find_rows(read_field(records, "sample_token", "sample_data"), devkit.sample, "sample")
    scene_of = find_rows(read_field(devkit.sample, "scene_token", "sample"), devkit.scene, "scene")
    pose_of = find_rows(read_field(records, "ego_pose_token", "sample_data"), devkit.ego_pose, "ego_pose")
    used, pose_of_record = np.unique(pose_of, return_inverse=True)
    world_from_ego = read_transforms([devkit.ego_pose[row] for row in used], "ego_pose")
    return {
        "file": _as_bytes(read_field(records, "filename", "sample_data")),
        "timestamp_us": read_numbers(records, "timestamp", "sample_data", ()).astype(np.int64),
        "scene": scene_of[sample_of].astype(np.int32),
        "world_from_ego": world_from_ego[pose_of_record],
        "is_key_frame": np.array(read_field(records, "is_key_frame", "sample_data"), dtype=bool),
    }


def _read_intrinsics(records: Sequence[Record]) -> Float64[np.ndarray, "K 3 3"]:
    matrices = read_numbers(records, "camera_intrinsic", "calibrated_sensor", (3, 3))
    is_pinhole = (matrices[:, 2] == (0, 0, 1)).all(-1) & (np.abs(np.linalg.det(matrices)) > 1e-6)
    check_records(is_pinhole, records, "calibrated_sensor", "camera_intrinsic", "is singular or no pinhole matrix")
    return matrices


def _read_sizes(records: Sequence[Record]) -> Int[np.ndarray, "N 2"]:
    sizes = np.stack([read_numbers(records, side, "sample_data", ()) for side in ("width", "height")], axis=-1)
    check_records((sizes > 0).all(-1), records, "sample_data", "width, height", "is no image size")
    return sizes.astype(np.int32)


def _as_bytes(texts: Sequence[str]) -> np.ndarray:
    return np.array([text.encode() for text in texts], dtype=np.bytes_)


def _splits_of_file(path: Path) -> dict[str, list[str]]:
    try:
        splits = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} was to be read as splits and does not parse: {error}; write it again") from error
    if not isinstance(splits, dict) or not all(isinstance(names, list) for names in splits.values()):
        raise DataError(
            f"{path} was to be read as splits and is not of the form "
            '{"train": ["scene-0001", ...], "val": [...]}; write it again'
        )
    return splits


def _splits_of_devkit(version: str) -> dict[str, list[str]]:
    from nuscenes.utils.splits import create_splits_scenes  # slow, and never in a worker

    splits = create_splits_scenes()
    if version.endswith("mini"):
        return {**splits, "train": splits["mini_train"], "val": splits["mini_val"]}
    return splits
