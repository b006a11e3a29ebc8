"""Lines of the map around the car: dividers, crossings and boundaries as points, of the patch of 60 m x 30 m (`trainer.data.maps`).

    each true line is matched with one query (Hungarian, by the same costs), in that of its equal orders of points that lies nearest
    loss = [ focal loss of classes over all queries + point_weight * sum over matched lines of the mean |p - p*| / half patch ] / true lines

MapTR (Liao et al. 2023): a line is the same from either end and a ring from any point of it. Its loss of directions is left out. A
line is 3 logits, one a class, then (x, y) of its points in metres, evenly spaced; in the truth 1 and 0, and NaN where there is no line.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]
from torch import Tensor

from models.batch import Batch
from models.config import DECODER_SHAPES, LINE_PATCH_M, EncoderConfig, Grid, MapConfig
from models.encoder import VideoEncoder
from models.heads.lift import BevLift, build_bev_lift
from models.heads.lines import LineHead
from models.images import paint_lines
from models.objectives.base import Encoded
from models.objectives.surround_task import SURROUND_IMAGES, SurroundTask, draw_drop_path
from models.polylines import LINE_CLASSES, resample_line

CLASSES = len(LINE_CLASSES)
_CLASS_COLOURS = ((0.90, 0.47, 0.08), (0.12, 0.35, 0.86), (0.08, 0.59, 0.24))
_TRUE_LINES = 128
"""Lines of an instant that are scored, however many a head can find; synthetic streets have 20 at most."""
_SHOWN = 0.3
"""Lines that are thought less likely are not drawn."""
_FOCUS, _BALANCE = 2.0, 0.25
"""Of focal loss (Lin et al. 2017), as MapTR has them."""


@dataclass(frozen=True)
class MapPreparation:
    """The lines that are learnt and scored."""

    config: MapConfig
    drop_path_blocks: int
    """Blocks that need numbers; 0 without drop-path."""
    needs: frozenset[str] = SURROUND_IMAGES | {"line_points", "first_line_point", "line_class"}
    keeps: frozenset[str] = SURROUND_IMAGES

    def prepare(self, sample: Mapping[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """As Preparation has it: `truth` E (3 + 2 points), of too many lines the longest, and `drop_path` (T, V, L, 2)."""
        truth = np.full((_TRUE_LINES, CLASSES + 2 * self.config.points), np.nan, dtype=np.float32)
        first = sample["first_line_point"]
        lines = [sample["line_points"][begin:end] for begin, end in pairwise(first)]
        lengths = np.array([np.linalg.norm(np.diff(line, axis=0), axis=-1).sum() for line in lines])
        for place, number in enumerate(np.argsort(-lengths, kind="stable")[:_TRUE_LINES]):
            truth[place, :CLASSES] = np.arange(CLASSES) == sample["line_class"][number]
            truth[place, CLASSES:] = resample_line(lines[number], self.config.points).reshape(-1)
        return {"truth": truth, **draw_drop_path(sample["images"], self.drop_path_blocks, rng)}


class MapObjective(SurroundTask):
    """Lift and head of lines."""

    name = "map"

    def __init__(self, config: MapConfig, lift: BevLift, head: LineHead, grid: Grid, *, cameras: int) -> None:
        super().__init__(lift, grid, cameras=cameras)
        self.config = config
        self.head = head

    def answer(self, encoded: Sequence[Encoded], batch: Batch) -> Float[Tensor, "B Q values"]:
        """Logits and metres."""
        features = self.look_from_above(encoded, batch)
        rows, columns = self.config.patch_cells
        Y, X = features.shape[-2:]
        patch = features[..., (Y - rows) // 2 : (Y + rows) // 2, (X - columns) // 2 : (X + columns) // 2]
        logits, points = self.head(patch)
        metres = torch.stack([along * half for along, half in zip(points.unbind(-1), LINE_PATCH_M, strict=True)], dim=-1)
        return torch.cat([logits, metres.flatten(2)], dim=-1)

    def measure(self, predicted: Float[Tensor, "B Q values"], truth: Float[Tensor, "B E values"]) -> Float[Tensor, " B"]:
        """As the formula above has it; where there is no line, the focal loss alone."""
        return torch.stack([self._measure_one(*pair) for pair in zip(predicted, truth, strict=True)])

    def draw(self, encoder: VideoEncoder, batch: Batch) -> dict[str, Tensor]:
        """All cameras, and the lines that are predicted and true: the car is a dot in the middle and drives up."""
        predicted, truth = self.predict(encoder, batch), self.truth(batch)
        return {
            "cameras": self.show_cameras(batch),
            "predicted": self._paint(predicted, torch.sigmoid(predicted[..., :CLASSES])),
            "true": self._paint(truth, truth[..., :CLASSES].nan_to_num()),
        }

    def _measure_one(self, predicted: Float[Tensor, "Q values"], truth: Float[Tensor, "E values"]) -> Float[Tensor, ""]:
        true = truth[truth[:, 0].isfinite()]
        logits, points = predicted[:, :CLASSES], self._scale_points(predicted)
        orders = list_orders(self._scale_points(true))  # (E, K, P, 2)
        apart = (
            (points[:, None, None] - orders).abs().mean(dim=(-2, -1)).amin(dim=-1)
        )  # (Q, E), also where E is 0: all weights learn
        cost = self.config.point_weight * apart.detach() - torch.sigmoid(logits.detach()) @ true[:, :CLASSES].T
        query, line = linear_sum_assignment(cost.cpu().numpy())
        classes = torch.zeros_like(logits)
        classes[query] = true[line, :CLASSES]
        return (focal_loss(logits, classes) + self.config.point_weight * apart[query, line].sum()) / max(1, len(true))

    def _scale_points(self, lines: Float[Tensor, "E values"]) -> Float[Tensor, "E P 2"]:
        """From -1 to 1 along both axes."""
        metres = lines[:, CLASSES:].unflatten(1, (-1, 2))
        return torch.stack([along / half for along, half in zip(metres.unbind(-1), LINE_PATCH_M, strict=True)], dim=-1)

    def _paint(
        self, lines: Float[Tensor, "B Q values"], likely: Float[Tensor, "B Q classes"]
    ) -> Float[Tensor, "B 1 3 rows columns"]:
        share, which = likely.max(dim=-1)
        colours = torch.tensor(_CLASS_COLOURS, device=lines.device)[which]
        points = lines[..., CLASSES:].unflatten(2, (-1, 2))
        painted = [
            paint_lines(points[one][share[one] > _SHOWN], colours[one][share[one] > _SHOWN], LINE_PATCH_M)
            for one in range(len(lines))
        ]
        return torch.stack(painted)[:, None]


def list_orders(lines: Float[Tensor, "E P 2"]) -> Float[Tensor, "E K P 2"]:
    """Every order of points that makes the same line: from both ends, and of a ring from each of its points."""
    P = lines.shape[1]
    place = torch.arange(P, device=lines.device)
    shifted = lines[:, (place + place[:-1, None]) % (P - 1)]  # (E, P - 1, P, 2)
    is_ring = (lines[:, 0] - lines[:, -1]).abs().amax(dim=-1) < 1e-3
    ahead = torch.where(is_ring[:, None, None, None], shifted, lines[:, None])
    return torch.cat([ahead, ahead.flip(2)], dim=1)


def focal_loss(logits: Float[Tensor, "Q classes"], classes: Float[Tensor, "Q classes"]) -> Float[Tensor, ""]:
    """Summed over all: cross entropy, less of what is already sure (Lin et al. 2017, equation 5)."""
    entropy = F.binary_cross_entropy_with_logits(logits, classes, reduction="none")
    missed = torch.where(classes > 0.5, torch.sigmoid(-logits), torch.sigmoid(logits))
    balance = torch.where(classes > 0.5, _BALANCE, 1 - _BALANCE)
    return (balance * missed**_FOCUS * entropy).sum()


def build_map(
    config: MapConfig, encoder_config: EncoderConfig, encoder: VideoEncoder, grid: Grid, *, cameras: int
) -> MapObjective:
    """Lines on `encoder`, of surround clips of `cameras` images with `grid` each."""
    head = LineHead(
        DECODER_SHAPES[config.decoder],
        inputs=config.lift.width,
        cells=config.patch_cells,
        queries=config.queries,
        classes=CLASSES,
        points=config.points,
        attention=encoder.attention,
    )
    lift = build_bev_lift(config.lift, encoder_width=encoder.shape.width, patch_px=encoder_config.patch_px)
    return MapObjective(config, lift, head, grid, cameras=cameras)
