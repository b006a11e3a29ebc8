"""Segmentation from above: which cells of 100 m x 100 m around the car hold a vehicle, and which can be driven on.

    loss = mean over cells and layers of the binary cross entropy, true vehicle cells weighing `vehicle_weight` times

The task, its grid of 0.5 m and the weight are those of Lift-Splat (Philion and Fidler 2020). Vehicles are boxes of nuScenes' categories
vehicle.*, whatever can be seen of them; the drivable area is the map's. A cell is true where its centre lies inside; truth is 0 or 1.
An answer is logits: above zero is yes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from models.batch import Batch
from models.config import BevConfig, EncoderConfig, Grid
from models.encoder import VideoEncoder
from models.geometry import VoxelGrid
from models.heads.bev import MapHead
from models.heads.lift import BevLift, build_bev_grid, build_bev_lift
from models.images import paint_layers
from models.objectives.base import Encoded
from models.objectives.surround_task import SURROUND_IMAGES, SurroundTask, draw_drop_path
from models.rasters import fill_outlines, outline_boxes

BEV_LAYERS = ("vehicle", "drivable")
"""Of an answer, in this order."""
_LAYER_COLOURS = ((0.90, 0.30, 0.10), (0.62, 0.66, 0.72))


@dataclass(frozen=True)
class BevPreparation:
    """Rasters of what is true around the car."""

    config: BevConfig
    drop_path_blocks: int
    """Blocks that need numbers; 0 without drop-path."""
    needs: frozenset[str] = SURROUND_IMAGES | {"boxes_ego", "box_is_vehicle", "drivable_edges"}
    keeps: frozenset[str] = SURROUND_IMAGES

    def prepare(self, sample: Mapping[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """As Preparation has it: `truth` layers Y X, 1 or 0, and `drop_path` (T, V, L, 2)."""
        grid = build_scored_grid(self.config)
        outlines = (outline_boxes(sample["boxes_ego"][sample["box_is_vehicle"]]), sample["drivable_edges"])
        truth = np.stack([fill_outlines(edges_m, grid) for edges_m in outlines]).astype(np.float32)
        return {"truth": truth, **draw_drop_path(sample["images"], self.drop_path_blocks, rng)}


class BevObjective(SurroundTask):
    """Lift and head of segmentation."""

    name = "bev"

    def __init__(self, config: BevConfig, lift: BevLift, head: MapHead, grid: Grid, *, cameras: int) -> None:
        super().__init__(lift, grid, cameras=cameras)
        self.config = config
        self.head = head

    def answer(self, encoded: Sequence[Encoded], batch: Batch) -> Float[Tensor, "B layers Y X"]:
        """Logits."""
        return self.head(self.look_from_above(encoded, batch))

    def measure(self, predicted: Float[Tensor, "B layers Y X"], truth: Float[Tensor, "B layers Y X"]) -> Float[Tensor, " B"]:
        """As the formula above has it."""
        entropy = F.binary_cross_entropy_with_logits(predicted, truth, reduction="none")
        weight = torch.ones_like(truth)
        weight[:, 0] += truth[:, 0] * (self.config.vehicle_weight - 1)
        return (entropy * weight).mean(dim=(1, 2, 3))

    def draw(self, encoder: VideoEncoder, batch: Batch) -> dict[str, Tensor]:
        """All cameras, and the maps that are predicted and true: the car is a dot in the middle and drives up."""
        return {
            "cameras": self.show_cameras(batch),
            "predicted": paint_layers(torch.sigmoid(self.predict(encoder, batch)), _LAYER_COLOURS)[:, None],
            "true": paint_layers(self.truth(batch), _LAYER_COLOURS)[:, None],
        }


def build_scored_grid(config: BevConfig) -> VoxelGrid:
    """The cells that are predicted and scored."""
    return build_bev_grid(config.lift.range_m, config.cell_m)


def build_bev(
    config: BevConfig, encoder_config: EncoderConfig, encoder: VideoEncoder, grid: Grid, *, cameras: int
) -> BevObjective:
    """Segmentation on `encoder`, of surround clips of `cameras` images with `grid` each."""
    lift = build_bev_lift(config.lift, encoder_width=encoder.shape.width, patch_px=encoder_config.patch_px)
    _, rows, columns = build_scored_grid(config).zyx
    head = MapHead(width=config.lift.width, layers=len(BEV_LAYERS), size=(rows, columns))
    return BevObjective(config, lift, head, grid, cameras=cameras)
