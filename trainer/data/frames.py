"""Frames and clips: which images of the cameras belong to one instant, and which instants make a clip.

The frames of a scene are the images of its reference camera, the first one configured; another camera takes part with
its image nearest in time, if that is within half a period of the reference. A clip is T frames `spacing_s` apart by
nearest timestamps, each nearer than half a spacing of its due time, all in one scene.

Letters beside those of `models`: F frames.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32, Int64

from trainer.data.index import Index

NO_ROW = -1
"""Stands for an image or a frame that is not there."""
_LONE_PERIOD_US = 500_000
"""Period of a scene with a single image: that of nuScenes' key frames."""


@dataclass(frozen=True)
class Frames:
    """The frames of one scene, ascending in time."""

    rows: Int32[np.ndarray, "F V"]
    """Image rows in the index, or NO_ROW."""
    timestamp_us: Int64[np.ndarray, " F"]
    """Of the reference camera."""


def find_frames(index: Index, scene: int, cameras: Sequence[str]) -> Frames:
    """The frames of `scene`; cameras in the order given, the first is the reference."""
    reference = index.images_of(scene, cameras[0])
    timestamp_us = index.columns["image_timestamp_us"][reference]
    period_us = np.median(np.diff(timestamp_us)) if len(timestamp_us) > 1 else _LONE_PERIOD_US
    rows = np.full((len(timestamp_us), len(cameras)), NO_ROW, dtype=np.int32)
    for column, camera in enumerate(cameras):
        images = index.images_of(scene, camera)
        nearest = nearest_within(index.columns["image_timestamp_us"][images], timestamp_us, period_us / 2)
        rows[:, column] = np.where(nearest == NO_ROW, NO_ROW, nearest + images.start)
    return Frames(rows, np.array(timestamp_us))


def find_clips(timestamp_us: Int64[np.ndarray, " F"], frames: int, spacing_s: float) -> Int32[np.ndarray, "F T"]:
    """For every frame the T frames of the clip that it begins, or NO_ROW in all of them where the clip does not fit."""
    spacing_us = spacing_s * 1e6
    due_us = timestamp_us[:, None] + np.round(np.arange(frames) * spacing_us).astype(np.int64)
    clips = nearest_within(timestamp_us, due_us, spacing_us / 2 - 1)  # at just half, two would share a frame
    clips[(clips == NO_ROW).any(-1)] = NO_ROW
    return clips


def nearest_within(
    sorted_us: Int64[np.ndarray, " F"], wanted_us: Int64[np.ndarray, "*wanted"], tolerance_us: float
) -> Int32[np.ndarray, "*wanted"]:
    """Place of the value nearest to each wanted one, or NO_ROW where none is as near as `tolerance_us`."""
    if not len(sorted_us):
        return np.full(wanted_us.shape, NO_ROW, dtype=np.int32)
    after = np.clip(np.searchsorted(sorted_us, wanted_us), 0, len(sorted_us) - 1)
    before = np.maximum(after - 1, 0)
    is_before = np.abs(wanted_us - sorted_us[before]) <= np.abs(sorted_us[after] - wanted_us)
    nearest = np.where(is_before, before, after)
    return np.where(np.abs(sorted_us[nearest] - wanted_us) <= tolerance_us, nearest, NO_ROW).astype(np.int32)
