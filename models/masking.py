"""Which tokens of a clip stay visible; numpy, because masks are drawn in the loader's workers.

Every mask of one ratio and grid leaves the same number of tokens, N - int(ratio N), so batches need no padding. CroCo draws
places independently; a tube hides the same places in every frame and camera (Tong et al. 2022), so that a hidden patch
cannot be copied from the frame before.
"""

import numpy as np
from jaxtyping import Int64

from models.config import Grid, MaskConfig


def draw_visible(rng: np.random.Generator, grid: Grid, config: MaskConfig) -> Int64[np.ndarray, " N"]:
    """Ascending indices of the visible tokens, in the order (t, v, y, x)."""
    places = grid.h * grid.w
    if config.kind == "tube":
        kept = _draw_kept(rng, places, config.ratio)
        frames = np.arange(grid.t * grid.v)[:, None] * places
        return (frames + kept).reshape(-1)
    return _draw_kept(rng, grid.tokens, config.ratio)


def count_visible(grid: Grid, config: MaskConfig) -> int:
    """How many tokens stay visible."""
    if config.kind == "tube":
        places = grid.h * grid.w
        return grid.t * grid.v * (places - int(config.ratio * places))
    return grid.tokens - int(config.ratio * grid.tokens)


def _draw_kept(rng: np.random.Generator, count: int, ratio: float) -> Int64[np.ndarray, " N"]:
    kept = rng.permutation(count)[int(ratio * count) :]
    return np.sort(kept).astype(np.int64)
