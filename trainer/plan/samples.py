"""A batch with the shapes of a run's, made without its data: what a plan computes with.

Fields of a sample are blank, of the shapes that `models.batch` states; what each objective makes of them is made by its own
preparation. A LiDAR sweep is random points around the car, and nobody has annotated anything.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch

from models.batch import Batch
from models.pretraining import build_preparations
from trainer.config.run import RunConfig
from trainer.data.loader import needed_fields

_SWEEP_POINTS = 30_000
_REACH_M = 40.0


def build_blank_batch(config: RunConfig) -> Batch:
    """A batch of one sample, as the loader of `config` would make it."""
    preparations = build_preparations(config.objectives, config.token_grid, config.encoder, cameras=config.cameras)
    sample = build_blank_sample(config, needed_fields(preparations))
    prepared = {
        name: {key: _batched(value) for key, value in preparation.prepare(sample, np.random.default_rng(0)).items()}
        for name, preparation in preparations.items()
    }
    kept = frozenset[str]().union(*(preparation.keeps for preparation in preparations.values()))
    return Batch({name: _batched(sample[name]) for name in sorted(kept)}, prepared, ("blank",))


def build_blank_sample(config: RunConfig, needs: frozenset[str]) -> Mapping[str, np.ndarray]:
    """The fields `needs` of one sample."""
    clip, cameras = config.data.clip, config.cameras
    T, H, W = clip.frames, clip.height_px, clip.width_px

    def image(frames: int, views: int) -> np.ndarray:
        return np.zeros((frames, views, 3, H, W), dtype=np.uint8)

    make: dict[str, Callable[[], np.ndarray]] = {
        "target_images": lambda: image(T, 1),
        "reference_images": lambda: image(T, 1),
        "consecutive_images": lambda: image(2, 1),
        "images": lambda: image(T, cameras),
        "scene": lambda: np.array(0),
        "flow_px": lambda: np.zeros((2, H, W, 2), dtype=np.float32),
        "points_lidar": lambda: _sweep(T),
        "first_point": lambda: _SWEEP_POINTS * np.arange(T + 1),
        "elapsed_s": lambda: np.arange(T, dtype=np.float32),
        "boxes_ego": lambda: np.zeros((0, 9), dtype=np.float32),
        "level_boxes": lambda: np.zeros((0, 12), dtype=np.float32),
        "box_class": lambda: np.zeros(0, dtype=np.int64),
        "box_is_vehicle": lambda: np.zeros(0, dtype=bool),
        "box_points": lambda: np.zeros(0, dtype=np.int64),
        "world_from_level": lambda: np.broadcast_to(np.eye(4), (T, 4, 4)),
        "sample_token": lambda: np.zeros((T, 32), dtype=np.uint8),
        "drivable_edges": lambda: np.zeros((0, 2, 2), dtype=np.float32),
        "line_points": lambda: np.zeros((0, 2), dtype=np.float32),
        "first_line_point": lambda: np.zeros(1, dtype=np.int64),
        "line_class": lambda: np.zeros(0, dtype=np.int64),
        "reference_from_target": lambda: np.eye(4, dtype=np.float32),
        "target_pix_from_cam": lambda: np.broadcast_to(np.eye(3, dtype=np.float32), (T, 1, 3, 3)),
        "reference_pix_from_cam": lambda: np.broadcast_to(np.eye(3, dtype=np.float32), (T, 1, 3, 3)),
        **{f"first_{name}": lambda: np.zeros(T + 1, dtype=np.int64) for name in ("box", "level_box", "edge", "line")},
        **{f"pix_from_{frame}": lambda: _projections(config) for frame in ("ego", "lidar")},
        **{name: lambda: _poses(T) for name in ("first_from_ego", "ego_from_lidar", "level_from_ego")},
    }
    colours = {name: np.ones(3, dtype=np.float32) for name in needs if name.endswith("_colours")}
    return colours | {name: make[name]() for name in needs - colours.keys()}


def _batched(value: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(value))[None]  # a copy: some are views of one row


def _sweep(frames: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    low, high = (-_REACH_M, -_REACH_M, -2.0, 0.0), (_REACH_M, _REACH_M, 4.0, 1.0)
    return rng.uniform(low, high, (frames * _SWEEP_POINTS, 4)).astype(np.float32)


def _poses(frames: int) -> np.ndarray:
    return np.broadcast_to(np.eye(4, dtype=np.float32), (frames, 4, 4))


def _projections(config: RunConfig) -> np.ndarray:
    """All cameras look ahead, with a field of view of 90 degrees."""
    clip = config.data.clip
    right, down, ahead = np.array([(0, -1, 0, 0), (0, 0, -1, 0), (1, 0, 0, 0)], dtype=np.float32)
    focal_px = clip.width_px / 2
    pix_from_ego = np.stack([focal_px * right + focal_px * ahead, focal_px * down + clip.height_px / 2 * ahead, ahead])
    return np.broadcast_to(pix_from_ego, (clip.frames, config.cameras, 3, 4))
