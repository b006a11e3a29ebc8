"""A downstream task around the car: all cameras of one instant, each image encoded by itself, lifted to features seen from above.

Left to the tasks: what a head makes of those features. A sample is a surround clip of one frame.
"""

from collections.abc import Sequence

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from models.batch import Batch
from models.config import Grid
from models.encoder import ClipGroup
from models.heads.lift import BevLift
from models.images import denormalise, normalise, tile_cameras
from models.objectives.base import Encoded
from models.objectives.downstream import DownstreamObjective

SURROUND_IMAGES = frozenset({"images", "images_colours", "pix_from_ego"})
"""Fields that go to the device."""


def draw_drop_path(images: np.ndarray, blocks: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """`drop_path` T V L 2, a pair of numbers for each block and image; nothing where there are no blocks."""
    return {"drop_path": rng.random((*images.shape[:2], blocks, 2), dtype=np.float32)} if blocks else {}


class SurroundTask(DownstreamObjective):
    """A task whose head reads features seen from above."""

    def __init__(self, lift: BevLift, grid: Grid, *, cameras: int) -> None:
        super().__init__()
        self.lift = lift
        self.grid = grid
        """Of one image."""
        self.cameras = cameras
        self.tokens_per_sample = cameras * grid.tokens

    def clips(self, batch: Batch) -> list[ClipGroup]:
        """Every image as a clip of its own."""
        images = normalise(batch.shared["images"], batch.shared["images_colours"])
        numbers = batch.prepared[self.name].get("drop_path")
        return [
            ClipGroup(
                rearrange(images, "B 1 V c H W -> (B V) 1 1 c H W"),
                drop_path=None if numbers is None else numbers.flatten(0, 2),
            )
        ]

    def look_from_above(self, encoded: Sequence[Encoded], batch: Batch) -> Float[Tensor, "B E Y X"]:
        """Features around each car, as `models.heads.lift` lays them."""
        (images,) = encoded
        tokens = rearrange(images.tokens, "(B V) (h w) C -> B V h w C", V=self.cameras, h=self.grid.h)
        pix_from_above = self.find_cameras(batch)
        present = torch.ones(pix_from_above.shape[:2], dtype=torch.bool, device=tokens.device)
        return self.lift(tokens, pix_from_above, present)

    def find_cameras(self, batch: Batch) -> Float[Tensor, "B V 3 4"]:
        """From the frame of the map to pixels: the ego frame, where a task has no other."""
        return batch.shared["pix_from_ego"][:, 0]

    def show_cameras(self, batch: Batch) -> Float[Tensor, "B 1 3 rows columns"]:
        """The images of each sample as one picture."""
        (group,) = self.clips(batch)
        shown = rearrange(denormalise(group.images), "(B V) 1 1 c H W -> B V c H W", V=self.cameras)
        return tile_cameras(shown)[:, None]
