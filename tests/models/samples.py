"""Small models and batches for the tests of models/."""

import numpy as np
import torch

from models.batch import Batch
from models.config import CrocoConfig, EncoderConfig, Grid, MaskConfig, TransformerShape
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
    prepared = {
        name: _stack([preparation.prepare({}, np.random.default_rng((seed, slot))) for slot in range(len(scenes))])
        for name, preparation in build_preparations([croco], grid, encoder).items()
    }
    return Batch(shared, prepared, tuple(f"clip {slot}" for slot in range(len(scenes))))


def _stack(samples: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in samples[0]}
