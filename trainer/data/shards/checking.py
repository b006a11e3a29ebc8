"""Checking: a drive as its adapter describes it, before a byte of it is packed.

What cannot be meant is an error: it would be in the data set for good. A sensor whose clock runs apart from the others' is a warning:
its drive gives no clips with that sensor, and a fleet has such drives.
"""

import logging
from collections.abc import Iterator

import numpy as np

from trainer.data.shards.recording import Captures, Drive, Images
from trainer.errors import DataError

_ROTATION_TOLERANCE = 1e-3
_SKEW_US = 1_000_000
"""Sensors that are nearer to each other than this may fire in turn."""
_SHORTEST_PERIOD_US = 1_000
"""No camera or LiDAR is faster: times that follow each other more closely are in other units."""

log = logging.getLogger(__name__)


def check_drive(drive: Drive) -> None:
    """DataError with the first fault of `drive`; a log line for each clock that is off."""
    if not drive.name or "/" in drive.name:
        raise DataError(f"a drive was to be packed and is called {drive.name!r}; give it a name without /")
    if not len(drive.images):
        raise DataError(f"drive {drive.name} was to be packed and has no image; leave it out of the recording's drives")
    for captures in (drive.images, drive.sweeps):
        for fault in _find_faults(captures):
            raise DataError(f"drive {drive.name} was to be packed and {fault}; correct that in its recording")
    for sensor, gap_s in find_skewed_clocks(drive).items():
        log.warning(
            "drive %s: all of %s was taken %.1f s or more apart from everything else; its clock is off, and no clip will have it",
            drive.name,
            sensor,
            gap_s,
        )


def find_skewed_clocks(drive: Drive) -> dict[str, float]:
    """Sensors that took nothing while any other one did, with the seconds between."""
    spans: dict[str, tuple[int, int]] = {}
    for captures in (drive.images, drive.sweeps):
        sensors = np.array(captures.sensor, dtype=np.str_)
        for sensor in np.unique(sensors):
            times = captures.timestamp_us[sensors == sensor]
            spans[str(sensor)] = int(times.min()), int(times.max())
    gaps = {
        sensor: min(
            (max(first - ended, began - last, 0) for other, (began, ended) in spans.items() if other != sensor), default=0
        )
        for sensor, (first, last) in spans.items()
    }
    return {sensor: gap / 1e6 for sensor, gap in gaps.items() if gap > _SKEW_US}


def _find_faults(captures: Captures) -> Iterator[str]:
    """In words that follow `was to be packed and`."""
    count = len(captures.file)
    kind = "image" if isinstance(captures, Images) else "sweep"
    arrays = {
        "timestamp_us": (captures.timestamp_us, ()),
        "is_key_frame": (captures.is_key_frame, ()),
        "ego_from_sensor": (captures.ego_from_sensor, (4, 4)),
        "world_from_ego": (captures.world_from_ego, (4, 4)),
    }
    if isinstance(captures, Images):
        arrays |= {"pix_from_cam": (captures.pix_from_cam, (3, 3)), "size_px": (captures.size_px, (2,))}
    if len(captures.sensor) != count:
        yield f"names {count} {kind} files and {len(captures.sensor)} sensors"
    for name, (array, shape) in arrays.items():
        if array.shape != (count, *shape):
            yield f"its {name} has shape {array.shape} where {count} {kind}s ask for {(count, *shape)}"
        if not np.isfinite(array).all():
            yield f"its {name} is not finite, first of {captures.file[np.argwhere(~np.isfinite(array))[0][0]]}"
    for name in ("ego_from_sensor", "world_from_ego"):
        bad = np.flatnonzero(~_are_poses(arrays[name][0]))
        if len(bad):
            yield f"its {name} is no rotation and translation, first of {captures.file[bad[0]]}"
    if isinstance(captures, Images):
        yield from _find_odd_cameras(captures)
    if len(set(captures.file)) != count:
        yield f"names a {kind} file more than once"
    if len(set(zip(captures.sensor, captures.timestamp_us.tolist(), strict=True))) != count:
        yield f"has two {kind}s of one sensor at the same time"
    yield from _find_other_units(captures)


def _find_odd_cameras(images: Images) -> Iterator[str]:
    bad = np.flatnonzero((images.size_px <= 0).any(-1) | (images.pix_from_cam[:, 2] != (0, 0, 1)).any(-1))
    if len(bad):
        yield f"has no pinhole camera of positive size, first of {images.file[bad[0]]}"


def _find_other_units(captures: Captures) -> Iterator[str]:
    sensors = np.array(captures.sensor, dtype=np.str_)
    for sensor in np.unique(sensors):
        gaps_us = np.diff(np.sort(captures.timestamp_us[sensors == sensor]))
        if len(gaps_us) and np.median(gaps_us) < _SHORTEST_PERIOD_US:
            yield f"its {sensor} fires every {np.median(gaps_us):.0f} microseconds, which none can: timestamp_us is in microseconds"


def _are_poses(transforms: np.ndarray) -> np.ndarray:
    rotation = transforms[:, :3, :3]
    is_rotation = (np.abs(rotation @ rotation.swapaxes(1, 2) - np.eye(3)) < _ROTATION_TOLERANCE).all((1, 2))
    return is_rotation & (np.linalg.det(rotation) > 0) & (transforms[:, 3] == (0, 0, 0, 1)).all(-1)
