"""The source of consecutive images: an image of one camera, its next one, and the dense flow from each to the other.

The flow is ground truth of synthetic dataroots (`ground_truth.py`), to the moments at which the camera's images are due; a pair whose
next image comes at another time, because one is missing, is left out. Both images are seen through one window, so that flow moves
with it as a difference of pixels does: it is scaled, mirrored, and not shifted. It is read at the nearest source pixel, since
between two pixels of different things there is no flow in the middle.
"""

import zipfile
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float32, Int64

from trainer.config.data import AugmentConfig, DrivesData
from trainer.data.clips import name_clip, read_clip
from trainer.data.ground_truth import GROUND_TRUTH, load_flow
from trainer.data.index import Index
from trainer.data.source import Room, Sample, new_room
from trainer.data.transforms import Window, draw_colours, draw_window, place_window
from trainer.errors import ClipError, DataError

FLOW_FIELDS = frozenset({"consecutive_images", "consecutive_colours", "flow_px"})

_DUE_TOLERANCE = 0.1
"""Of a period: by so much the next image may be early or late."""


@dataclass(frozen=True)
class FlowSource:
    """Consecutive images by number; `augment` none reads them the same way every time."""

    index: Index
    rows: Int64[np.ndarray, " K"]
    """Of the first images; the next one of a camera is the next row."""
    config: DrivesData
    augment: AugmentConfig | None

    offers = FLOW_FIELDS

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        """As Source has it."""
        return name_clip(self.index, self._pair(index))

    def describe(self) -> dict[str, float | int | str]:
        """As Source has it."""
        root = {"kind": self.config.kind, "root": str(self.index.root), "version": self.index.version}
        return {**root, "samples": len(self), "consecutive_images": len(self)}

    def load(self, index: int, rng: np.random.Generator, room: Room = new_room) -> Sample:
        """As Source has it."""
        pair = self._pair(index)
        window = self._choose_window(pair, rng)
        try:
            read = read_clip(
                self.index, pair, (window.width_px, window.height_px), windows=[window], room=partial(room, "consecutive_images")
            )
        except ClipError as error:
            raise ClipError(self.name(index), error.reason) from error
        return {
            "consecutive_images": read.images,
            "consecutive_colours": draw_colours(self.augment.colour_jitter if self.augment else 0.0, rng),
            "flow_px": np.stack([move_flow(flow_px, window) for flow_px in self._read_flows(index)]),
        }

    @cached_property
    def _root(self) -> Path:
        return Path(self.index.root)

    def _pair(self, index: int) -> Int64[np.ndarray, "2 1"]:
        return self.rows[index] + np.arange(2)[:, None]

    def _choose_window(self, pair: Int64[np.ndarray, "2 1"], rng: np.random.Generator) -> Window:
        ((width, height),) = self.index.size_px(pair[0]).tolist()
        out_size_px = (self.config.clip.width_px, self.config.clip.height_px)
        if self.augment is None:
            return place_window((width, height), out_size_px)
        is_mirrored = bool(rng.random() < self.augment.flip_probability)
        return draw_window((width, height), out_size_px, crop_share=self.augment.crop_share, is_mirrored=is_mirrored, rng=rng)

    def _read_flows(self, index: int) -> list[Float32[np.ndarray, "rows columns 2"]]:
        """From the first image to the next one, and back."""
        first, following = self._pair(index)[:, 0].tolist()
        return [self._read_flow(index, first, "flow_px"), self._read_flow(index, following, "backward_flow_px")]

    def _read_flow(
        self, index: int, row: int, way: Literal["flow_px", "backward_flow_px"]
    ) -> Float32[np.ndarray, "rows columns 2"]:
        image = self.index.columns["image_file"][row].decode()
        try:
            return load_flow(self._root, image, way)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise ClipError(self.name(index), f"the ground truth of {image} cannot be read: {error}") from error


def find_consecutive(index: Index, config: DrivesData, scenes: list[int], *, split: str) -> Int64[np.ndarray, " K"]:
    """Rows of the images that have a next one when it is due and ground truth; DataError where there is none."""
    asked = f"flow was asked for of split {split} of {index.root} {index.version}"
    if "image_file" not in index.columns.header["arrays"] or not (Path(index.root) / GROUND_TRUTH).is_dir():
        raise DataError(
            f"{asked} and there is no dense ground truth ({GROUND_TRUTH}/ beside the tables), which recorded and packed drives lack; "
            "take a dataroot that `odonata synthesize` wrote with --ground-truth, or another task"
        )
    found = [_consecutive_of(index, scene, camera) for scene in scenes for camera in config.cameras]
    rows = np.concatenate(found)
    if not len(rows):
        raise DataError(f"{asked} and no camera of {', '.join(config.cameras)} has two consecutive images; take longer scenes")
    return rows


def _consecutive_of(index: Index, scene: int, camera: str) -> Int64[np.ndarray, " K"]:
    """Of one camera in one scene."""
    images = index.images_of(scene, camera)
    gap_us = np.diff(index.columns["image_timestamp_us"][images])
    if not len(gap_us):
        return np.empty(0, dtype=np.int64)
    period_us = np.median(gap_us)
    return images.start + np.flatnonzero(np.abs(gap_us - period_us) <= _DUE_TOLERANCE * period_us)


def move_flow(flow_px: Float32[np.ndarray, "rows columns 2"], window: Window) -> Float32[np.ndarray, "H W 2"]:
    """The flow between two images that are both seen through `window`."""
    out_from_source = window.out_from_source
    v, u = np.mgrid[: window.height_px, : window.width_px] + 0.5
    source = np.linalg.inv(out_from_source) @ np.stack([u.ravel(), v.ravel(), np.ones(u.size)])
    column, row = np.floor(source[:2]).astype(np.int64)
    rows, columns = flow_px.shape[:2]
    nearest = flow_px[np.clip(row, 0, rows - 1), np.clip(column, 0, columns - 1)]
    moved = nearest * np.diag(out_from_source)[:2]
    return moved.reshape(window.height_px, window.width_px, 2).astype(np.float32)
