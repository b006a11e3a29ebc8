"""3D boxes around the car from its cameras: tokens of all images, lifted and seen from above, and CenterPoint's head on them.

    loss = focal(heat) + 1/4 sum over what is regressed of |b - b*|        (Yin et al. 2021; focal as Law and Deng 2018, equation 1)

A sample is a surround clip of one instant; each image is encoded by itself and all are lifted by their calibration (`heads/lift.py`), so
nothing but cameras tells where boxes are. Means over boxes are a sample's own, so a loss does not depend on its batch.

Everything lies in the frame `level`: z points up in the world, x where the car heads, and the origin is where the car stood as its
LiDAR swept. The car pitches and rolls, nuScenes' boxes do not: in this frame they are upright, heights are heights over the
street, and the devkit's figures, which do not change with a turn about z, are those of the world.

Where we differ from CenterPoint's targets: the spot around every centre is as wide as CenterPoint's smallest, two cells, as at cells of
a metre nothing has a larger one; of boxes whose centres share a cell the nearest to it is regressed. A box that no point of
LiDAR or radar hits is not scored by nuScenes, and not learnt.

Letters: K boxes that are predicted, G that are true, Y X cells of the map.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from models.batch import Batch
from models.config import DETECTION_CLASSES, DetectionConfig, EncoderConfig, Grid
from models.encoder import VideoEncoder
from models.geometry import VoxelGrid
from models.heads.centre import REGRESSED, CentreHead, find_boxes
from models.heads.lift import BevLift, build_bev_grid, build_bev_lift
from models.images import denormalise, normalise, tile_cameras, turn_up
from models.objectives.base import Encoded, encode
from models.objectives.downstream import mean_of_known
from models.objectives.surround_task import SURROUND_IMAGES, SurroundTask, draw_drop_path
from models.wireframes import draw_boxes, draw_from_above

TRUE_BOXES = 400
"""Most true boxes of an instant that are kept, the nearest ones; no instant of nuScenes has so many within range."""
TRUE_VALUES = 12
"""Of a true box: nine numbers, class, attribute, points of LiDAR and radar."""
_SPOT_CELLS = 2
"""Radius of the spot around a centre; three deviations of a normal distribution lie within it and half a cell."""
_BOX_WEIGHT, _VELOCITY_WEIGHT = 0.25, 0.2
"""CenterPoint's: of all that is regressed against the heat, and of velocities against the rest."""
_PICTURE_PX = 400
"""Side of a picture from above."""
_TRUTH = frozenset({"level_boxes", "first_level_box", "level_from_ego", "world_from_level", "sample_token"})


@dataclass(frozen=True)
class DetectionPreparation:
    """What is true of an instant, as boxes and as the maps that the head learns."""

    config: DetectionConfig
    drop_path_blocks: int
    """Blocks that need numbers; 0 without drop-path."""
    needs: frozenset[str] = SURROUND_IMAGES | _TRUTH
    keeps: frozenset[str] = SURROUND_IMAGES

    def prepare(self, sample: Mapping[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """As Preparation has it:

        truth             G 12    nine numbers of each box, class, attribute, points; NaN fills up
        maps              20 Y X  heat of each class, and at centres what is regressed; NaN elsewhere
        pix_from_level    V 3 4
        world_from_level  4 4     float64, for what is written down
        sample_token      32      its letters, likewise
        drop_path         T V L 2 where the encoder has it
        """
        boxes = _find_truth(sample)
        truth = np.full((TRUE_BOXES, TRUE_VALUES), np.nan, dtype=np.float32)
        truth[: len(boxes)] = boxes
        return {
            "truth": truth,
            "maps": draw_maps(boxes, build_bev_grid(self.config.lift.range_m, self.config.lift.cell_m)),
            "pix_from_level": (sample["pix_from_ego"][0] @ np.linalg.inv(sample["level_from_ego"][0])).astype(np.float32),
            "world_from_level": sample["world_from_level"][0],
            "sample_token": sample["sample_token"][0],
            **draw_drop_path(sample["images"], self.drop_path_blocks, rng),
        }


def _find_truth(sample: Mapping[str, np.ndarray]) -> Float32[np.ndarray, "n 12"]:
    """Boxes of the first frame that are of a class, or racks; the nearest ones first."""
    first, end = sample["first_level_box"][:2]
    boxes = sample["level_boxes"][first:end]
    boxes = boxes[boxes[:, 9] >= 0]
    return boxes[np.argsort(np.hypot(boxes[:, 0], boxes[:, 1]), kind="stable")[:TRUE_BOXES]]


def draw_maps(boxes: Float32[np.ndarray, "n 12"], grid: VoxelGrid) -> Float32[np.ndarray, "20 Y X"]:
    """What the head should say of boxes in the level frame."""
    _, Y, X = grid.zyx
    centre = (boxes[:, :2] - np.array(grid.low_m[:2])) / np.array(grid.voxel_m[:2])  # in cells, (x, y)
    is_learnt = (boxes[:, 9] < DETECTION_CLASSES) & (boxes[:, 11] > 0) & ((centre >= 0) & (centre < (X, Y))).all(-1)
    boxes, centre = boxes[is_learnt], centre[is_learnt]
    cell = np.floor(centre).astype(np.int64)
    heat = _draw_spots(boxes[:, 9].astype(np.int64), cell, (DETECTION_CLASSES, Y, X))
    yaw = boxes[:, 6, None]
    numbers = [centre - cell, boxes[:, 2:3], np.log(boxes[:, 3:6]), np.sin(yaw), np.cos(yaw), boxes[:, 7:9]]
    regressed = np.full((REGRESSED, Y, X), np.nan, dtype=np.float32)
    # Of boxes in one cell the last assignment stays: that of the box nearest to the cell's centre.
    order = np.argsort(-np.linalg.norm(centre - cell - 0.5, axis=-1), kind="stable")
    column, row = cell[order].T
    regressed[:, row, column] = np.concatenate(numbers, axis=1)[order].T
    return np.concatenate([heat, regressed])


def _draw_spots(
    classes: Int64[np.ndarray, " n"], cell: Int64[np.ndarray, "n 2"], shape: tuple[int, int, int]
) -> Float32[np.ndarray, "10 Y X"]:
    """A spot at every centre on the map of its class, 1 at its cell; where spots overlap the higher one counts."""
    steps = np.stack(np.meshgrid(*[np.arange(-_SPOT_CELLS, _SPOT_CELLS + 1)] * 2), axis=-1).reshape(-1, 2)
    spot = np.exp(-(steps**2).sum(-1) / (2 * ((2 * _SPOT_CELLS + 1) / 6) ** 2)).astype(np.float32)
    column, row = (cell[:, None] + steps).transpose(2, 0, 1)  # (n, steps)
    is_inside = (row >= 0) & (row < shape[1]) & (column >= 0) & (column < shape[2])
    heat = np.zeros(shape, dtype=np.float32)
    where = np.broadcast_to(classes[:, None], row.shape)[is_inside], row[is_inside], column[is_inside]
    np.maximum.at(heat, where, np.broadcast_to(spot, row.shape)[is_inside])
    return heat


class DetectionObjective(SurroundTask):
    """Lift, and the head of centres."""

    name = "detection"

    def __init__(self, config: DetectionConfig, lift: BevLift, head: CentreHead, grid: Grid, *, cameras: int) -> None:
        super().__init__(lift, grid, cameras=cameras)
        self.config = config
        self.head = head

    def find_cameras(self, batch: Batch) -> Float[Tensor, "B V 3 4"]:
        """As SurroundTask has it, of the level frame."""
        return batch.prepared[self.name]["pix_from_level"]

    def answer(self, encoded: Sequence[Encoded], batch: Batch) -> Float[Tensor, "B maps Y X"]:
        """Logits of centres by class, and what is regressed."""
        return self.head(self.look_from_above(encoded, batch))

    def truth(self, batch: Batch) -> Float[Tensor, "B maps Y X"]:
        """Heat of each class from 0 to 1, and what is regressed."""
        return batch.prepared[self.name]["maps"]

    def measure(self, predicted: Float[Tensor, "B maps Y X"], truth: Float[Tensor, "B maps Y X"]) -> Float[Tensor, " B"]:
        """As the formula above has it."""
        heat, true_heat = predicted[:, :-REGRESSED], truth[:, :-REGRESSED]
        box, true_box = predicted[:, -REGRESSED:], truth[:, -REGRESSED:]
        known = true_box.isfinite()
        error = torch.where(known, box - true_box, 0.0).abs()
        means = mean_of_known(error.flatten(0, 1), known.flatten(0, 1)).view(-1, REGRESSED)
        of_boxes = means[:, :-2].sum(dim=1) + _VELOCITY_WEIGHT * means[:, -2:].sum(dim=1)
        return focal_loss(heat, true_heat) + _BOX_WEIGHT * of_boxes

    def predict(self, encoder: VideoEncoder, batch: Batch) -> Float[Tensor, "B K 11"]:
        """Boxes of each sample in the level frame, the surest first: nine numbers, class and score; a score of 0 is none."""
        return self._find(super().predict(encoder, batch))

    def draw(self, encoder: VideoEncoder, batch: Batch) -> dict[str, Tensor]:
        """Boxes on the images and from above: as many of the surest as there are true ones, and the true ones; heat is white."""
        maps = self.answer(encode(encoder, self.clips(batch)), batch)
        images = denormalise(normalise(batch.shared["images"], batch.shared["images_colours"]))[:, 0]
        true = [boxes[(boxes[:, 9] < DETECTION_CLASSES) & (boxes[:, 11] > 0)] for boxes in batch.prepared[self.name]["truth"]]
        surest = [boxes[: len(known)] for boxes, known in zip(self._find(maps), true, strict=True)]
        likely = torch.sigmoid(maps[:, :-REGRESSED])
        columns = {}
        for title, boxes, heat in (("predicted", surest, likely), ("true", true, self.truth(batch)[:, :-REGRESSED])):
            columns[f"{title} boxes"] = self._draw_on_images(images, boxes, batch)
            columns[f"{title}, from above"] = self._draw_from_above(heat, boxes)
        return columns

    def _find(self, maps: Float[Tensor, "B maps Y X"]) -> Float[Tensor, "B K 11"]:
        return find_boxes(maps, self.lift.grid, self.config.boxes)

    def _draw_on_images(
        self, images: Float[Tensor, "B V 3 H W"], boxes: Sequence[Float[Tensor, "_ n"]], batch: Batch
    ) -> Float[Tensor, "B 1 3 rows columns"]:
        matrices = batch.prepared[self.name]["pix_from_level"]
        drawn = [
            draw_boxes(cameras, of_one[:, :9], of_one[:, 9].long(), matrix)
            for cameras, of_one, matrix in zip(images, boxes, matrices, strict=True)
        ]
        return tile_cameras(torch.stack(drawn))[:, None]

    def _draw_from_above(
        self, heat: Float[Tensor, "B classes Y X"], boxes: Sequence[Float[Tensor, "_ n"]]
    ) -> Float[Tensor, "B 1 3 rows columns"]:
        ground = F.interpolate(heat.amax(dim=1, keepdim=True), size=(_PICTURE_PX, _PICTURE_PX)).expand(-1, 3, -1, -1)
        drawn = [
            draw_from_above(one, of_one[:, :9], of_one[:, 9].long(), self.config.lift.range_m)
            for one, of_one in zip(turn_up(0.6 * ground), boxes, strict=True)
        ]
        return torch.stack(drawn)[:, None]


def focal_loss(logits: Float[Tensor, "B classes Y X"], heat: Float[Tensor, "B classes Y X"]) -> Float[Tensor, " B"]:
    """-sum of (1 - p)^2 log p at centres and (1 - heat)^4 p^2 log(1 - p) elsewhere, by the number of centres."""
    likely, is_centre = torch.sigmoid(logits), heat == 1
    at_centres = (1 - likely) ** 2 * F.logsigmoid(logits)
    elsewhere = (1 - heat) ** 4 * likely**2 * F.logsigmoid(-logits)
    return -torch.where(is_centre, at_centres, elsewhere).flatten(1).sum(1) / is_centre.flatten(1).sum(1).clamp(min=1)


def build_detection(
    config: DetectionConfig, encoder_config: EncoderConfig, encoder: VideoEncoder, grid: Grid, *, cameras: int
) -> DetectionObjective:
    """Detection on `encoder`, of surround clips of `cameras` images with `grid` each."""
    lift = build_bev_lift(config.lift, encoder_width=encoder.shape.width, patch_px=encoder_config.patch_px)
    head = CentreHead(inputs=lift.width, width=config.head_width, classes=DETECTION_CLASSES)
    return DetectionObjective(config, lift, head, grid, cameras=cameras)
