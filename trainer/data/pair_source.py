"""The source of pairs from a nuScenes dataroot: a clip of one camera and the clip that completes it.

Which second views there are was mined beforehand (`pairs.py`); here one is drawn, with windows and colours for both.

CroCo crops its two views independently, which works where crop and image have nearly one shape. A square window cut
from a wide image can miss the whole overlap of two neighbouring cameras, so windows are drawn again, a few times,
until they themselves overlap by `min_overlap`; the best draw is taken when none does. Without augmentation the windows
are the largest ones, centred unless those overlap too little: then the corners and edges that overlap most.
"""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
from jaxtyping import Float, Int

from trainer.config.data import AugmentConfig, ClipConfig, DrivesData
from trainer.data.clips import name_clip, read_clip
from trainer.data.columns import Columns
from trainer.data.index import Index
from trainer.data.pairs import frustum_points, visible_share
from trainer.data.source import Room, Sample, new_room
from trainer.data.transforms import Window, draw_colours, draw_window, move_intrinsics, place_window
from trainer.errors import ClipError

_WINDOW_DRAWS = 16
_PLACES: tuple[tuple[float, float], ...] = tuple(itertools.product((0.5, 0.0, 1.0), (0.5, 0.0, 1.0)))
"""Where evaluation may put a window, the centre first."""

PAIR_FIELDS = frozenset(
    {
        "target_images",
        "reference_images",
        "target_colours",
        "reference_colours",
        "scene",
        "target_pix_from_cam",
        "reference_pix_from_cam",
        "reference_from_target",
    }
)

WindowPair = tuple[Window, Window]


@dataclass(frozen=True)
class PairSource:
    """Pairs of clips by number; `augment` none reads them the same way every time, but for the choice of the partner."""

    index: Index
    pairs: Columns
    config: DrivesData
    augment: AugmentConfig | None

    offers = PAIR_FIELDS

    def __len__(self) -> int:
        return len(self.pairs["anchor"])

    def name(self, index: int) -> str:
        """As Source has it."""
        return name_clip(self.index, self.rows_of(self.anchor(index)))

    def describe(self) -> dict[str, float | int | str]:
        """As Source has it."""
        root = {"kind": self.config.kind, "root": str(self.index.root), "version": self.index.version}
        return {**root, "samples": len(self), **self.pairs.header["figures"]}

    def load(self, index: int, rng: np.random.Generator, room: Room = new_room) -> Sample:
        """As Source has it."""
        target_rows = self.rows_of(self.anchor(index))
        reference_rows = self.rows_of(self._draw_candidate(index, rng))
        view = _Views(self.index, np.concatenate([target_rows[0], reference_rows[0]]))
        windows, out_size_px = self._choose_windows(view, rng), _out_size_px(self.config.clip)
        try:
            target, reference = (
                read_clip(self.index, rows, out_size_px, windows=[window], room=partial(room, f"{name}_images"))
                for name, rows, window in zip(("target", "reference"), (target_rows, reference_rows), windows, strict=True)
            )
        except ClipError as error:
            raise ClipError(self.name(index), error.reason) from error
        jitter = self.augment.colour_jitter if self.augment else 0.0
        return {
            "target_images": target.images,
            "reference_images": reference.images,
            "target_colours": draw_colours(jitter, rng),
            "reference_colours": draw_colours(jitter, rng),
            "scene": np.array(self.index.columns["image_scene"][target_rows[0, 0]], dtype=np.int64),
            "target_pix_from_cam": target.pix_from_cam.astype(np.float32),
            "reference_pix_from_cam": reference.pix_from_cam.astype(np.float32),
            "reference_from_target": view.reference_from_target.astype(np.float32),
        }

    def draw_reads(self, index: int, rng: np.random.Generator) -> tuple[list[Int[np.ndarray, " K"]], Int[np.ndarray, " S"]]:
        """Rows of the images that `load` reads with such a stream, one array a read, and of sweeps, which it reads none; for plans."""
        target, reference = self.rows_of(self.anchor(index)), self.rows_of(self._draw_candidate(index, rng))
        return [target[:, 0], reference[:, 0]], np.empty(0, np.int32)

    def anchor(self, index: int) -> int:
        """The target clip of a sample as frame * V + camera."""
        return int(self.pairs["anchor"][index])

    def candidates(self, index: int) -> tuple[Int[np.ndarray, " across"], Int[np.ndarray, " in_time"]]:
        """The reference clips of a sample, of other cameras and of other times, each as frame * V + camera."""
        first, end = self.pairs["first_candidate"][index : index + 2]
        first_in_time = self.pairs["first_in_time"][index]
        return self.pairs["candidate"][first:first_in_time], self.pairs["candidate"][first_in_time:end]

    def rows_of(self, code: int) -> Int[np.ndarray, "T 1"]:
        """Image rows of the clip that `code`, frame * V + camera, begins."""
        frame, camera = divmod(code, len(self.config.cameras))
        return self.pairs["frame_rows"][self.pairs["clip_frames"][frame], camera][:, None]

    def _draw_candidate(self, index: int, rng: np.random.Generator) -> int:
        across, in_time = self.candidates(index)
        wants_across = rng.random() < self.config.pairs.cross_camera_share
        chosen = across if len(across) and (wants_across or not len(in_time)) else in_time
        return int(chosen[rng.integers(len(chosen))])

    def _choose_windows(self, view: "_Views", rng: np.random.Generator) -> WindowPair:
        size_px = _out_size_px(self.config.clip)
        augment = self.augment
        offered = _drawn_windows(view, size_px, augment, rng) if augment else _placed_windows(view, size_px)
        return _first_that_overlaps(offered, view.overlap, self.config.pairs.min_overlap)


@dataclass(frozen=True)
class _Views:
    """The first images of the target and of the reference."""

    index: Index
    rows: Int[np.ndarray, "2"]

    @cached_property
    def sizes_px(self) -> tuple[tuple[int, int], tuple[int, int]]:
        target, reference = self.index.size_px(self.rows).tolist()
        return tuple(target), tuple(reference)

    @cached_property
    def reference_from_target(self) -> Float[np.ndarray, "4 4"]:
        return self.index.cam_from_world(self.rows)[1] @ self.index.world_from_cam(self.rows)[0]

    def overlap(self, windows: WindowPair) -> float:
        """Share of the target window's frustum that the reference window shows."""
        target, reference = windows
        pix_from_cam = self.index.pix_from_cam(self.rows)
        points = frustum_points(
            move_intrinsics(pix_from_cam[0], target),
            (target.width_px, target.height_px),
            self.index.ego_from_cam(self.rows)[0],
        )
        size_px = np.array([[reference.width_px, reference.height_px]])
        pix_from_reference = move_intrinsics(pix_from_cam[1], reference)[None]
        return float(visible_share(points, self.reference_from_target[None], pix_from_reference, size_px)[0])


def _drawn_windows(
    view: _Views, out_size_px: tuple[int, int], augment: AugmentConfig, rng: np.random.Generator
) -> Iterable[WindowPair]:
    """Random windows, both mirrored or neither."""
    is_mirrored = bool(rng.random() < augment.flip_probability)
    for _ in range(_WINDOW_DRAWS):
        target, reference = (
            draw_window(size_px, out_size_px, crop_share=augment.crop_share, is_mirrored=is_mirrored, rng=rng)
            for size_px in view.sizes_px
        )
        yield target, reference


def _placed_windows(view: _Views, out_size_px: tuple[int, int]) -> Iterable[WindowPair]:
    """The largest windows at all combinations of places that differ, the centred ones first."""
    target, reference = (
        dict.fromkeys(place_window(size_px, out_size_px, place=place) for place in _PLACES) for size_px in view.sizes_px
    )
    yield from itertools.product(target, reference)


def _first_that_overlaps(offered: Iterable[WindowPair], overlap: Callable[[WindowPair], float], enough: float) -> WindowPair:
    best: tuple[float, WindowPair] | None = None
    for windows in offered:
        share = overlap(windows)
        if share >= enough:
            return windows
        if best is None or share > best[0]:
            best = share, windows
    assert best is not None, "at least one pair of windows is offered"
    return best[1]


def _out_size_px(clip: ClipConfig) -> tuple[int, int]:
    return clip.width_px, clip.height_px
