"""From the tokens of all cameras of one instant to features seen from above: what downstream tasks around the car share.

    tokens -> features and depth of each patch (VolumeHead, HeightHead) -> pulled into the cells of a box around the car (`volumes.lift`)
    -> height folded into channels, 1 x 1 -> + residual units at a quarter of the resolution -> a residual unit, 3 x 3

Lifting is MIM4D's own, but that a patch also says how high over the ground it is, as in BEVHeight (Yang et al. 2023), and both are added
up: what stands on a street is found at once, where depth alone has to be learnt from row to row.

Folding the height and convolutions from above follow Simple-BEV (Harley et al. 2023); of its ResNet-18 with a way back up only one
coarse level is kept, since the head is to be light. Group norm in float32, as pulled values are small.

How a map from above lies, here and in all that is built on it: `B C Y X` in the ego frame, x forward, y left. Columns run along x,
the first is the farthest behind the car; rows along y, the first is the farthest to the right. So cell [i, j] has its
centre at x = -range + (j + 0.5) cell, y = -range + (i + 0.5) cell. Pictures are turned until x points up (`images.turn_up`).

Left to others: rasters and boxes on such a grid (the tasks), more channels or a finer grid (their heads).
"""

from math import gcd

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from models.config import LiftConfig
from models.geometry import VoxelGrid, see_through_pixels
from models.heads.dense import ResidualUnit
from models.layers import build_linear
from models.volumes import DepthBins, VolumeHead, lift, patch_centres

_LOW_M, _HIGH_M, _LAYERS = -1.0, 3.0, 4
"""Heights over the ground, where nuScenes' ego frame has its origin, and layers between them: what stands on a street."""
_NEAR_M = 1.0
"""Nothing of interest is nearer to a camera."""
_LOWEST_M, _HEIGHT_STEP_M, _HEIGHTS = -2.0, 0.5, 14
"""Heights over the ground that a patch chooses from; the outermost stand for all beyond."""
_CAMERAS_OF_A_CELL = 3
"""No rig has cells that more cameras see."""
_COARSE = 4
"""Cells to a side of one of the coarse level."""


class BevLift(nn.Module):
    """Features from above of the cameras around one car."""

    def __init__(self, *, encoder_width: int, patch_px: int, grid: VoxelGrid, bins: DepthBins, channels: int, width: int) -> None:
        super().__init__()
        self.patch_px = patch_px
        self.grid = grid
        self.bins = bins
        self.width = width
        """Channels that come out."""
        self.head = VolumeHead(encoder_width, channels, bins.count)
        self.height = HeightHead(encoder_width, bins)
        self.fold = nn.Conv2d(channels * grid.zyx[0], width, 1, bias=False)
        self.norm = nn.GroupNorm(gcd(8, width), width)
        self.coarse = nn.Sequential(ResidualUnit(width), ResidualUnit(width))
        self.unit = ResidualUnit(width)
        self.out = nn.Conv2d(width, width, 3, padding=1)

    def forward(
        self, tokens: Float[Tensor, "B V h w C"], pix_from_ego: Float[Tensor, "B V 3 4"], camera_present: Bool[Tensor, "B V"]
    ) -> Float[Tensor, "B E Y X"]:
        """Of images that `tokens` tile, with cameras as they are mounted; nothing is seen of those that are not present."""
        h, w = tokens.shape[2:4]
        size_px = (h * self.patch_px, w * self.patch_px)
        lifted = self.head(tokens, self.height(tokens, pix_from_ego, size_px))
        volume = lift(
            lifted.features,
            lifted.density,
            pix_from_ego,
            camera_present,
            grid=self.grid,
            bins=self.bins,
            size_px=size_px,
            overlap=_CAMERAS_OF_A_CELL,
        )
        folded = self.fold(rearrange(volume, "B E Z Y X -> B (E Z) Y X")).float()
        norm = self.norm
        x = F.group_norm(folded, norm.num_groups, norm.weight.float(), norm.bias.float(), norm.eps)  # float32 as in layers.Norm
        context = F.interpolate(self.coarse(F.avg_pool2d(x, _COARSE, ceil_mode=True)), x.shape[-2:], mode="bilinear")
        return self.out(F.relu(self.unit(x + context)))


class HeightHead(nn.Module):
    """How high over the ground is what a patch shows? Logits of heights, read at the heights of the depths along its line of sight."""

    def __init__(self, width: int, bins: DepthBins) -> None:
        super().__init__()
        self.bins = bins
        self.out = build_linear(width, _HEIGHTS)

    def forward(
        self, tokens: Float[Tensor, "B V h w C"], pix_from_ego: Float[Tensor, "B V 3 4"], size_px: tuple[int, int]
    ) -> Float[Tensor, "B V h w bins"]:
        """What heights say of depths, as logits in float32; of images that `tokens` tile, `size_px` high and wide."""
        h, w = tokens.shape[2:4]
        logits = rearrange(self.out(tokens).float(), "B V h w K -> B V (h w) K")
        rays = see_through_pixels(pix_from_ego, patch_centres((h, w), size_px, tokens.device).expand(*tokens.shape[:2], -1, -1))
        height_m = rays.origin[..., 2:] + rays.reach[..., 2:] * self.bins.centres_m(tokens.device)
        place = ((height_m - _LOWEST_M) / _HEIGHT_STEP_M).clamp(0, _HEIGHTS - 1)
        below = place.floor().clamp(max=_HEIGHTS - 2)
        share, index = place - below, below.long()
        at_depth = torch.lerp(logits.gather(-1, index), logits.gather(-1, index + 1), share)
        return rearrange(at_depth, "B V (h w) bins -> B V h w bins", h=h)


def build_bev_grid(range_m: float, cell_m: float, layers: int = 1) -> VoxelGrid:
    """A square around the car that reaches `range_m` to all four sides, between the heights of interest."""
    cells = round(2 * range_m / cell_m)
    return VoxelGrid((-range_m, -range_m, _LOW_M), (range_m, range_m, _HIGH_M), (cells, cells, layers))


def build_bev_lift(config: LiftConfig, *, encoder_width: int, patch_px: int) -> BevLift:
    """As a task's config has it, on an encoder of this width and patch size."""
    return BevLift(
        encoder_width=encoder_width,
        patch_px=patch_px,
        grid=build_bev_grid(config.range_m, config.cell_m, _LAYERS),
        bins=DepthBins(_NEAR_M, config.far_m, config.depth_bins),
        channels=config.channels,
        width=config.width,
    )
