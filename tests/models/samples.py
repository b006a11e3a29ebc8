"""Small models and batches for the tests of models/."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from models.batch import Batch
from models.config import CrocoConfig, EncoderConfig, Grid, MaskConfig, Mim4dConfig, SimipuConfig, TransformerShape
from models.objectives.base import Preparation
from models.pretraining import build_preparations

PATCH_PX = 4
SMALL = TransformerShape(width=32, depth=2, heads=2, hidden=64)
VIDEO_GRID = Grid(t=2, v=1, h=2, w=3)

VIDEO_ENCODER = EncoderConfig(size="tiny", patch_px=PATCH_PX, tubelet_frames=2)
CROCO = CrocoConfig(decoder="tiny", mask=MaskConfig(ratio=0.75))


def random_images(grid: Grid, *, batch: int, tubelet_frames: int, patch_px: int = PATCH_PX, seed: int = 0) -> torch.Tensor:
    """Normalised clips whose tokens lie on `grid`."""
    shape = (batch, grid.t * tubelet_frames, grid.v, 3, grid.h * patch_px, grid.w * patch_px)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_batch(
    encoder: EncoderConfig = VIDEO_ENCODER,
    grid: Grid = VIDEO_GRID,
    *,
    croco: CrocoConfig = CROCO,
    scenes: tuple[int, ...] = (0, 1, 2),
    seed: int = 0,
) -> Batch:
    """Random pairs, one a scene given, with what CroCo prepares for them."""
    rng = np.random.default_rng(seed)
    pixels = (grid.h * encoder.patch_px, grid.w * encoder.patch_px)
    shape = (len(scenes), grid.t * encoder.tubelet_frames, grid.v, 3, *pixels)
    views = (torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8)) for _ in range(2))
    shared = dict(zip(("target_images", "reference_images"), views, strict=True)) | {"scene": torch.tensor(scenes)}
    shared |= {f"{view}_colours": torch.ones(len(scenes), 3) for view in ("target", "reference")}
    prepared = {
        name: _stack([preparation.prepare({}, np.random.default_rng((seed, slot))) for slot in range(len(scenes))])
        for name, preparation in build_preparations([croco], grid, encoder).items()
    }
    return Batch(shared, prepared, tuple(f"clip {slot}" for slot in range(len(scenes))))


def _stack(samples: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in samples[0]}


SIMIPU = SimipuConfig(points="tiny")
MIM4D = Mim4dConfig(volume="tiny", mask_cell_px=2 * PATCH_PX, rays=12)
SURROUND_CAMERAS = 3


def surround_sample(
    grid: Grid = VIDEO_GRID, *, tubelet_frames: int = 2, cameras: int = SURROUND_CAMERAS, points: int = 4000, seed: int = 0
) -> dict[str, np.ndarray]:
    """Random images of cameras that look around evenly, 120 degrees wide, and a sweep of ground and walls for each frame."""
    rng = np.random.default_rng(seed)
    frames, height, width = grid.t * tubelet_frames, grid.h * PATCH_PX, grid.w * PATCH_PX
    focal = width / 2 / math.tan(math.pi / 3)
    pix_from_cam = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
    projections = []
    for yaw in 2 * math.pi * np.arange(cameras) / cameras:
        right, ahead = (math.sin(yaw), -math.cos(yaw), 0), (math.cos(yaw), math.sin(yaw), 0)
        projections.append(pix_from_cam @ np.column_stack([np.array([right, (0, 0, -1), ahead]), np.zeros(3)]))
    bearing, reach = rng.uniform(-math.pi, math.pi, frames * points), rng.uniform(3, 40, frames * points)
    height_m = np.where(rng.random(frames * points) < 0.5, -1.8, rng.uniform(-1.8, 6, frames * points))
    cloud = np.stack([reach * np.cos(bearing), reach * np.sin(bearing), height_m, rng.random(frames * points)], axis=-1)
    return {
        "images": rng.integers(0, 256, (frames, cameras, 3, height, width), dtype=np.uint8),
        "images_colours": np.ones(3, dtype=np.float32),
        "points_lidar": cloud.astype(np.float32),
        "first_point": points * np.arange(frames + 1),
        "pix_from_lidar": np.broadcast_to(np.array(projections, dtype=np.float32), (frames, cameras, 3, 4)),
        "pix_from_ego": np.broadcast_to(np.array(projections, dtype=np.float32), (frames, cameras, 3, 4)),
        "ego_from_lidar": np.broadcast_to(np.eye(4, dtype=np.float32), (frames, 4, 4)),
        "first_from_ego": _drive(0.5 * np.arange(frames)),
        "elapsed_s": 0.5 * np.arange(frames, dtype=np.float32),
    }


def _drive(elapsed_s: np.ndarray) -> np.ndarray:
    """Ahead at 4 m/s in a turn to the left of 0.2 rad/s."""
    pose = np.zeros((len(elapsed_s), 4, 4), dtype=np.float32)
    yaw = 0.2 * elapsed_s
    pose[:, 0, 0], pose[:, 0, 1], pose[:, 1, 0], pose[:, 1, 1] = np.cos(yaw), -np.sin(yaw), np.sin(yaw), np.cos(yaw)
    pose[:, 0, 3], pose[:, 2, 2], pose[:, 3, 3] = 4 * elapsed_s, 1, 1
    return pose


def surround_batch(preparations: Mapping[str, Preparation], samples: Sequence[dict[str, np.ndarray]], *, seed: int = 0) -> Batch:
    """What the loader makes of `samples` for these objectives."""
    prepared = {
        name: _stack([preparation.prepare(sample, np.random.default_rng((seed, slot))) for slot, sample in enumerate(samples)])
        for name, preparation in preparations.items()
    }
    kept = sorted(frozenset[str]().union(*(preparation.keeps for preparation in preparations.values())))
    shared = _stack([{name: sample[name] for name in kept} for sample in samples])
    return Batch(shared, prepared, tuple(f"clip {slot}" for slot in range(len(samples))))
