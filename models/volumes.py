"""From images to volumes: depth distributions lift what patches say into the cells of a grid, frame by frame.

    pull    volume(p) = sum over cameras that see p of  feature(u, v) density(u, v, z),   (u, v, z) the pixel and depth of centre p
    push    volume(p) = sum over patches and depth bins whose centre lies in cell p of  feature(patch) density(patch, bin)

`pull` is UVTR's (Li et al. 2022), which MIM4D takes for its small grid: every cell near enough gets something. `push` is LSS
(Philion and Fidler 2020): no mass is lost, and cells far off may stay empty. Pulled values are density a bin, pushed ones mass a cell.

Where we differ, and why:
    - cells are read at their centres (the release lifts to their corners, half a cell off)
    - a patch counts up to the border of its image, a bin up to the end of its range, and nothing beyond: interpolation is clamped
      to their centres, so pull and push see the same region, and `density` integrates to 1 for both
    - all cameras go through one weighted sum, so no tensor of cameras x channels x cells is made, or kept for the backward
    - push sums by sorting, not atomically: the same bits every time
    - one stride instead of four levels of an FPN: a ViT has one
    - `warp` moves metres. The release applies its metric motion to cell indices, which in turns is worse than not moving at all

Volumes lie with channels running fastest, as a view of (B, C, Z, Y, X). Letters: `bins` of depth, E channels of a patch.
"""

from dataclasses import dataclass
from math import gcd
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from models.geometry import (
    Corners,
    VoxelGrid,
    find_corners,
    project,
    see_through_pixels,
    spread_rows,
    sum_rows,
    to_cells,
    transform,
    voxel_centres,
)
from models.layers import build_linear

Lift = Literal["pull", "push"]


@dataclass(frozen=True)
class DepthBins:
    """Equal intervals of depth along a camera's axis."""

    near_m: float
    far_m: float
    count: int

    @property
    def size_m(self) -> float:
        return (self.far_m - self.near_m) / self.count

    def centres_m(self, device: torch.device) -> Float[Tensor, " bins"]:
        """Depth in the middle of each."""
        return self.near_m + self.size_m * (torch.arange(self.count, device=device) + 0.5)


class Lifted(NamedTuple):
    """What patches say, and how far away."""

    features: Float[Tensor, "B V E h w"]
    density: Float[Tensor, "B V bins h w"]
    """Sums to 1 over the bins."""


class VolumeHead(nn.Module):
    """Tokens to features and a distribution over depth, one linear map each (`SimpleDepth` of the release).

    Features have no bias: where a token is zeros because it was masked, nothing is lifted, as with the release's sparse convolutions.
    """

    def __init__(self, width: int, channels: int, bins: int) -> None:
        super().__init__()
        self.features = nn.Linear(width, channels, bias=False)
        self.depth = build_linear(width, bins)
        nn.init.xavier_uniform_(self.features.weight)

    def forward(self, tokens: Float[Tensor, "B V h w C"], hint: Float[Tensor, "B V h w bins"] | None = None) -> Lifted:
        """Float32 views whose channels run fastest; a `hint` of where patches may be is added to their logits of depth."""
        features, logits = self.features(tokens).float(), self.depth(tokens).float()
        depth = (logits if hint is None else logits + hint).softmax(dim=-1)
        return Lifted(rearrange(features, "B V h w E -> B V E h w"), rearrange(depth, "B V h w bins -> B V bins h w"))


class VolumeConv(nn.Module):
    """What the renderer reads of a lifted volume: 3 x 3 x 3 convolution, group norm in place of batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(inputs, outputs, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(gcd(8, outputs), outputs)

    def forward(self, volume: Float[Tensor, "B E Z Y X"]) -> Float[Tensor, "B C Z Y X"]:
        x = self.conv(volume).float()
        norm = self.norm
        # Float32 as in layers.Norm; a volume that no camera sees has no deviation, and stays finite by eps.
        return F.relu(F.group_norm(x, norm.num_groups, norm.weight.float(), norm.bias.float(), norm.eps))


def lift(
    features: Float[Tensor, "B V E h w"],
    density: Float[Tensor, "B V bins h w"],
    pix_from_volume: Float[Tensor, "B V 3 4"],
    camera_present: Bool[Tensor, "B V"],
    *,
    grid: VoxelGrid,
    bins: DepthBins,
    size_px: tuple[int, int],
    kind: Lift = "pull",
    overlap: int | None = None,
) -> Float[Tensor, "B E Z Y X"]:
    """The volume of one instant, float32, in the frame of `pix_from_volume`: intrinsics times motion, to pixels of the crop.

    `size_px` is height and width of the crop that the patches tile. `overlap` bounds how many cameras one cell is pulled from,
    the first of those that see it; none takes all. On a rig where no more see a cell the bound changes nothing but the cost.
    """
    assert density.shape[2] == bins.count, f"{density.shape[2]} densities for {bins.count} bins"
    if kind == "push":
        return _push(features.float(), density.float(), pix_from_volume, camera_present, grid, bins, size_px)
    turns = min(overlap or features.shape[1], features.shape[1])
    return _pull(features.float(), density.float(), pix_from_volume, camera_present, grid, bins, size_px, turns)


def warp(
    volume: Float[Tensor, "B C Z Y X"], source_from_target: Float[Tensor, "B 4 4"], grid: VoxelGrid
) -> Float[Tensor, "B C Z Y X"]:
    """The source's volume as the target's grid sees it: trilinear between centres, in metres, zeros from outside."""
    B, _, Z, Y, X = volume.shape
    centres = voxel_centres(grid, volume.device).view(1, -1, 3)
    cells = to_cells(transform(source_from_target, centres.expand(B, -1, -1)), grid)  # (B, Z Y X, 3)
    corners = find_corners(cells.flatten(0, 1).flip(-1), grid.zyx)
    index = corners.rows.view(B, -1, 8) + _first_rows(B, grid.voxels, volume.device)
    table = rearrange(volume.float(), "B C Z Y X -> (B Z Y X) C")
    warped = sum_rows(table, index.flatten(0, 1), corners.weight)
    return rearrange(warped, "(B Z Y X) C -> B C Z Y X", Z=Z, Y=Y, X=X)


def _pull(
    features: Tensor,
    density: Tensor,
    pix_from_volume: Tensor,
    camera_present: Tensor,
    grid: VoxelGrid,
    bins: DepthBins,
    size_px: tuple[int, int],
    turns: int,
) -> Float[Tensor, "B E Z Y X"]:
    B, V, _, h, w = features.shape
    device = features.device
    centres = voxel_centres(grid, device).view(1, 1, -1, 3)
    pixels, depth_m = project(pix_from_volume, centres.expand(B, V, -1, -1))  # (B, V, Z Y X, 2), (B, V, Z Y X)
    seen = _is_seen(pixels, depth_m, bins, size_px) & camera_present[..., None]
    # (d, v, u), in bins and patches
    places = torch.stack(
        [
            ((depth_m - bins.near_m) / bins.size_m).clamp(0.5, bins.count - 0.5),
            (pixels[..., 1] * (h / size_px[0])).clamp(0.5, h - 0.5),
            (pixels[..., 0] * (w / size_px[1])).clamp(0.5, w - 0.5),
        ],
        dim=-1,
    )
    patch_rows = rearrange(features, "B V E h w -> (B V h w) E")
    bin_rows = rearrange(density, "B V bins h w -> (B V bins h w) 1")
    nth_seen = seen.cumsum(dim=1)
    cameras = _first_rows(B, V, device)[..., 0]  # (B, 1)
    taken: list[Corners] = []
    for turn in range(1, turns + 1):
        is_turn = seen & (nth_seen == turn)  # (B, V, Z Y X): at most one camera of a cell
        camera = is_turn.int().argmax(dim=1)  # (B, Z Y X)
        place = places.gather(1, camera[:, None, :, None].expand(-1, -1, -1, 3)).flatten(0, 2)
        camera = (cameras + camera).flatten()[:, None].int()
        around = find_corners(place[:, 1:], (h, w))
        in_bins = find_corners(place, (bins.count, h, w))
        here = sum_rows(bin_rows, in_bins.rows + camera * (bins.count * h * w), in_bins.weight)
        here = here * is_turn.any(dim=1).flatten()[:, None]
        taken.append(Corners(around.rows + camera * (h * w), around.weight * here))
    index, weight = (torch.cat(parts, dim=1) for parts in zip(*taken, strict=True))  # (B Z Y X, 4 turns)
    return _to_volume(sum_rows(patch_rows, index, weight), grid)


def _is_seen(
    pixels: Float[Tensor, "*n 2"], depth_m: Float[Tensor, "*n"], bins: DepthBins, size_px: tuple[int, int]
) -> Bool[Tensor, "*n"]:
    u, v = pixels.unbind(-1)
    in_image = (u >= 0) & (u < size_px[1]) & (v >= 0) & (v < size_px[0])
    return in_image & (depth_m > max(bins.near_m, 0.0)) & (depth_m < bins.far_m)


def _push(
    features: Tensor,
    density: Tensor,
    pix_from_volume: Tensor,
    camera_present: Tensor,
    grid: VoxelGrid,
    bins: DepthBins,
    size_px: tuple[int, int],
) -> Float[Tensor, "B E Z Y X"]:
    B, V, _, h, w = features.shape
    device = features.device
    rays = see_through_pixels(pix_from_volume, patch_centres((h, w), size_px, device).expand(B, V, -1, -1))
    points_m = rays.origin[..., None, :] + rays.reach[..., None, :] * bins.centres_m(device)[:, None]  # (B, V, h w, bins, 3)
    cells = torch.floor(to_cells(points_m, grid)).unbind(-1)
    index = torch.zeros_like(cells[0], dtype=torch.int32)
    counted = camera_present[..., None, None].expand_as(index)
    for along, size in zip(reversed(cells), grid.zyx, strict=True):
        index = index * size + along.clamp(0, size - 1).int()
        counted = counted & (along >= 0) & (along < size)
    index = index + _first_rows(B, grid.voxels, device)[..., None]
    volume = spread_rows(
        rearrange(features, "B V E h w -> (B V h w) E"),
        index.flatten(0, 2),
        rearrange(density, "B V bins h w -> (B V h w) bins") * counted.flatten(0, 2),
        B * grid.voxels,
    )
    return _to_volume(volume, grid)


def patch_centres(patches: tuple[int, int], size_px: tuple[int, int], device: torch.device) -> Float[Tensor, "K 2"]:
    """Pixels (u, v) of the centres of h w patches that tile an image of `size_px`, row by row."""
    v, u = (
        (torch.arange(count, device=device, dtype=torch.float32) + 0.5) * (size / count)
        for count, size in zip(patches, size_px, strict=True)
    )
    return torch.stack(torch.meshgrid(u, v, indexing="xy"), dim=-1).flatten(0, 1)


def _first_rows(batch: int, rows: int, device: torch.device) -> Int[Tensor, "B 1 1"]:
    """Where each sample's rows begin in a table of all."""
    return (torch.arange(batch, device=device, dtype=torch.int32) * rows)[:, None, None]


def _to_volume(rows: Float[Tensor, "n E"], grid: VoxelGrid) -> Float[Tensor, "B E Z Y X"]:
    Z, Y, X = grid.zyx
    return rearrange(rows, "(B Z Y X) E -> B E Z Y X", Z=Z, Y=Y, X=X)
