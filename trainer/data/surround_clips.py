"""Surround clips: which instants of a scene show all cameras, and which LiDAR sweep belongs to each of them.

A clip begins at every frame whose T frames are there in all cameras. A frame's sweep is the one nearest in time, if it is
not further than 0.1 s away: a scanner turns in 0.05 to 0.1 s, and the motion of the car in between is known and taken out
(`surround_source.py`). A frame without one is kept with NO_ROW; where LiDAR is asked for, a clip needs at least one sweep. Where
boxes are asked for, all frames are key frames, which alone are annotated.

Found once and kept as columns beside the index, so that a worker maps what it reads:

    clip_images  K T V  rows of the images        clip_sweeps  K T  rows of the sweeps, or NO_ROW

Letters beside those of `models`: K clips.
"""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int32, Int64

from trainer.config.data import DrivesData
from trainer.data.columns import write_columns
from trainer.data.frames import NO_ROW, find_clips, find_frames, nearest_within
from trainer.data.index import Index
from trainer.errors import DataError

log = logging.getLogger(__name__)

SURROUND_FORMAT = 1
"""Raised whenever the columns change, so that older ones are found again."""

_SWEEP_TOLERANCE_US = 100_000.0


def surround_path(
    index: Index, config: DrivesData, scenes: Sequence[int], *, needs_lidar: bool, needs_boxes: bool = False
) -> Path:
    """Where the surround clips of these scenes under these settings are kept."""
    clip = config.clip
    key = repr((SURROUND_FORMAT, config.cameras, clip.frames, clip.spacing_s, needs_lidar, needs_boxes, list(scenes)))
    return index.columns.folder / f"surround-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def find_surround_clips(
    index: Index,
    config: DrivesData,
    scenes: Sequence[int],
    *,
    needs_lidar: bool,
    needs_boxes: bool = False,
    split: str,
) -> Path:
    """Find the clips of these scenes and write them; returns where. DataError when there are none."""
    found = [_clips_of_scene(index, config, scene) for scene in scenes]
    images, sweeps = (np.concatenate([of_scene[part] for of_scene in found]) for part in range(2))
    whole = len(images)
    chosen = np.ones(whole, dtype=bool)
    if needs_lidar:
        chosen &= (sweeps != NO_ROW).any(-1)
    if needs_boxes:
        chosen &= index.is_key_frame(images[..., 0]).all(-1)
    images, sweeps = images[chosen], sweeps[chosen]
    if not len(images):
        raise DataError(_explain_nothing(index, config, split, whole=whole, needs_lidar=needs_lidar))
    path = surround_path(index, config, scenes, needs_lidar=needs_lidar, needs_boxes=needs_boxes)
    figures = {"scenes": len(scenes), "clips": len(images), "clips_with_lidar": int((sweeps != NO_ROW).any(-1).sum())}
    write_columns(path, {"clip_images": images, "clip_sweeps": sweeps}, {"figures": figures})
    log.info("found %d surround clips of split %s: %s", len(images), split, path)
    return path


def _clips_of_scene(index: Index, config: DrivesData, scene: int) -> tuple[Int32[np.ndarray, "K T V"], Int32[np.ndarray, "K T"]]:
    frames = find_frames(index, scene, config.cameras)
    clips = find_clips(frames.timestamp_us, config.clip.frames, config.clip.spacing_s)
    clips = clips[(clips[:, 0] != NO_ROW) & (frames.rows[clips] != NO_ROW).all((1, 2))]
    return frames.rows[clips], find_sweeps(index, scene, frames.timestamp_us)[clips]


def find_sweeps(index: Index, scene: int, timestamp_us: Int64[np.ndarray, " F"]) -> Int32[np.ndarray, " F"]:
    """Row of the sweep of `scene` nearest to each time, or NO_ROW."""
    rows = index.sweeps_of(scene)
    nearest = nearest_within(index.columns["sweep_timestamp_us"][rows], timestamp_us, _SWEEP_TOLERANCE_US)
    return np.where(nearest == NO_ROW, NO_ROW, nearest + rows.start).astype(np.int32)


def _explain_nothing(index: Index, config: DrivesData, split: str, *, whole: int, needs_lidar: bool) -> str:
    clip, asked = config.clip, f"surround clips of split {split} were asked for in {index.root} {index.version}"
    if whole and not needs_lidar:
        return (
            f"{asked} with boxes, and of {whole} clips with all {len(config.cameras)} cameras none is of annotated key frames alone; "
            "set data.clip.frames to 1, or leave out the tasks that need boxes"
        )
    if whole:
        return (
            f"{asked} with LiDAR, and of {whole} clips with all {len(config.cameras)} cameras none has a sweep within "
            f"{_SWEEP_TOLERANCE_US / 1e6} s of a frame; bring the LiDAR files' tables, or leave out the objectives that need LiDAR"
        )
    return (
        f"{asked} and no scene has {clip.frames} frames {clip.spacing_s} s apart with an image of each of "
        f"{', '.join(config.cameras)}; lower data.clip.frames or data.clip.spacing_s, or leave cameras out of data.cameras"
    )
