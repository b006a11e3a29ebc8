"""Boxes as points on a map from above: the centre heatmap head of CenterPoint (Yin et al. 2021), first stage.

Every class has a map whose peaks are centres of boxes; one more map says, at each cell, all else of the box whose centre lies there:

    offset 2   of the centre from the cell's low corner, in cells       yaw 2       sine and cosine
    height 1   of the centre, metres                                    velocity 2  metres a second
    size 3     logarithms of length, width and height in metres

A box is a peak among its 3 x 3 neighbours (Zhou et al. 2019, "Objects as Points") with what the map says there; the surest
peaks of all classes are the answer, always the same number of them, so shapes do not depend on data.

Where we differ: one group holds all classes, and one branch regresses all quantities, where CenterPoint has six groups of classes with six
branches each; group norm in float32 in place of batch norm, which would see a rank's samples alone. No boxes are suppressed by
others beyond the 3 x 3 peaks.

Maps lie as `heads/lift.py` has them. Letter: K boxes, whose nine numbers are x, y, z of the centre, length, width, height, yaw, vx, vy.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from models.geometry import VoxelGrid

REGRESSED = 10
"""Numbers of a box that are regressed, in the order above."""
_PRIOR = 0.1
"""What a fresh head holds likely of every cell, so that the many empty ones do not drown the start (Lin et al. 2017)."""
_LEAST_M, _MOST_M = 0.05, 50.0
"""Sides of a box lie between these, whatever an early answer is."""


class CentreHead(nn.Module):
    """Maps of centres, and of boxes around them."""

    def __init__(self, *, inputs: int, width: int, classes: int) -> None:
        super().__init__()
        self.shared = NormedConv(inputs, width)
        self.heat = nn.Sequential(NormedConv(width, width), nn.Conv2d(width, classes, 3, padding=1))
        self.box = nn.Sequential(NormedConv(width, width), nn.Conv2d(width, REGRESSED, 3, padding=1))
        heat, box = self.heat[1], self.box[1]
        nn.init.constant_(heat.bias, math.log(_PRIOR / (1 - _PRIOR)))  # type: ignore[arg-type]
        nn.init.normal_(box.weight, std=0.01)  # type: ignore[arg-type]
        nn.init.zeros_(box.bias)  # type: ignore[arg-type]

    def forward(self, features: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B maps Y X"]:
        """Logits of centres by class, then what is regressed; float32."""
        x = self.shared(features)
        return torch.cat([self.heat(x).float(), self.box(x).float()], dim=1)


class NormedConv(nn.Module):
    """3 x 3 convolution, group norm, ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(math.gcd(8, outputs), outputs)

    def forward(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B E Y X"]:
        x, norm = self.conv(x).float(), self.norm
        # Float32 as in layers.Norm
        return F.relu(F.group_norm(x, norm.num_groups, norm.weight.float(), norm.bias.float(), norm.eps))


def find_boxes(maps: Float[Tensor, "B maps Y X"], grid: VoxelGrid, count: int) -> Float[Tensor, "B K 11"]:
    """The `count` surest peaks as nine numbers, class and score, the surest first; `count` is at most classes Y X."""
    Y, X = maps.shape[-2:]
    likely = torch.sigmoid(maps[:, :-REGRESSED])
    is_peak = likely == F.max_pool2d(likely, 3, stride=1, padding=1)
    score, place = (likely * is_peak).flatten(1).topk(count)  # (B, K)
    cell = place % (Y * X)
    at_peak = maps[:, -REGRESSED:].flatten(2).gather(2, cell[:, None].expand(-1, REGRESSED, -1)).mT  # (B, K, 10)
    offset_x, offset_y, height_m, *log_size, sine, cosine, vx, vy = at_peak.unbind(-1)
    (low_x, low_y, _), (cell_x, cell_y, _) = grid.low_m, grid.voxel_m
    numbers = [
        low_x + (cell % X + offset_x) * cell_x,
        low_y + (torch.div(cell, X, rounding_mode="floor") + offset_y) * cell_y,
        height_m,
        *(torch.exp(side.clamp(math.log(_LEAST_M), math.log(_MOST_M))) for side in log_size),
        torch.atan2(sine, cosine),
        vx,
        vy,
        torch.div(place, Y * X, rounding_mode="floor").to(score),
        score,
    ]
    return torch.stack(numbers, dim=-1)
