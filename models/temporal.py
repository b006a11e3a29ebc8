"""The temporal decoder of MIM4D: a withheld frame's volume from the volumes of its neighbours, already moved to its ego pose.

Height is folded into channels; learned queries, one a BEV cell, look into the neighbours' maps by deformable attention (Zhu et
al. 2021): K places around the cell, found by the query, softmax over the K within a map, mean over the maps that are present.
A short branch sees the two nearest frames at full width, a long branch all of them at half; one convolution joins them
(Wu et al. 2023, HoP, which MIM4D's released decoder follows).

The learned places are what the paper calls continuous scene flow: the release has no other module of that name. Ego motion is
undone before, so a place away from its cell is where what will be here was then. Here a place is

    cell + fixed + velocity * (seconds from target to source),     velocity and fixed linear in the query,

continuous in time by construction, and `Rebuilt.flow_m` returns it for a picture. Where we differ, and why:
    - time is given in seconds and signed; the release embeds the place in a list, which says nothing of before and after. For
      the same reason places depend on seconds (velocity starts at zero) and not on one set of weights a place in the list
    - the short branch sees the nearest two, as the paper's figure has it; the release takes the first of the list
    - any number of frames, some of them absent, of any batch; the release holds one clip of two by its shapes
    - blocks use GELU, which all other blocks here do
    - a map is read once, by one weighted sum over all places and frames, so no tensor of cells x places x width is made or kept

Letters: Q frames around the target, K places a head looks at, E channels of a map.
"""

import math
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from models.config import Grid, TransformerShape
from models.geometry import VoxelGrid, find_corners, sum_rows
from models.layers import Mlp, Norm, build_linear
from models.positions import PositionTables

_PERIODS_S = tuple(0.1 * 2**octave for octave in range(8))
"""Of the sines and cosines that say how far away in time a frame is: from a camera's frame interval to a scene's length."""


class TemporalShape(NamedTuple):
    """Widths, heads and layers of the two branches."""

    short_width: int = 128
    short_heads: int = 4
    short_frames: int = 2
    long_width: int = 64
    long_heads: int = 2
    layers: int = 2
    """Of each branch."""
    places: int = 4
    """A head looks at in each map."""


class Rebuilt(NamedTuple):
    """A volume made of its neighbours."""

    volume: Float[Tensor, "B C Z Y X"]
    flow_m: Float[Tensor, "B Q Y X 2"]
    """(x, y) metres from each cell to where the long branch's last layer looks for it in each frame, mean over its places;
    without gradient. Frames that are not present have one too, which nothing used."""


class Frames(NamedTuple):
    """The maps a branch reads, and when they are."""

    maps: Float[Tensor, "B Q Y X E"]
    offsets_s: Float[Tensor, "B Q"]
    """Seconds from the target to each; of frames that are not present, 0."""
    share: Float[Tensor, "B Q"]
    """Weights of the mean over present frames; all 0 where there is none."""


class DeformableAttention(nn.Module):
    """Each query sums what it finds at K places a head of every map."""

    def __init__(self, width: int, heads: int, places: int) -> None:
        super().__init__()
        self.heads = heads
        self.places = places
        self.value = build_linear(width, width)
        self.look = nn.Linear(width, heads * places * 2 * 3)
        """Of each head and place, fixed and a second: y, x in cells, and the logit of the softmax."""
        self.proj = build_linear(width, width)
        self._look_around()

    def forward(self, queries: Float[Tensor, "N E"], frames: Frames) -> tuple[Float[Tensor, "N E"], Float[Tensor, "B Q Y X 2"]]:
        """What B Y X queries find, and how far from their cells they look in each map, in cells along (y, x)."""
        B, Q, Y, X, _ = frames.maps.shape
        A = self.heads
        place, weight = self._places(queries, frames)  # (B, Y X, A, Q, K, 2), (B, Y X, A, Q, K)
        flow = (place * weight[..., None]).sum(-2).mean(2)  # (B, Y X, Q, 2)
        cells = _cell_centres(Y, X, queries.device)[:, None, None, None] + place
        corners = find_corners(cells.flatten(0, -2), (Y, X))
        # Rows of the table are (B, Q, Y X, A): one for what a head reads in a cell of a map.
        head = torch.arange(A, device=queries.device, dtype=torch.int32)[:, None, None, None]
        of_map = torch.arange(B * Q, device=queries.device, dtype=torch.int32).view(B, 1, 1, Q, 1, 1)
        index = (corners.rows.view(*weight.shape, 4) + of_map * (Y * X)) * A + head  # (B, Y X, A, Q, K, 4)
        weight = weight[..., None] * frames.share[:, None, None, :, None, None] * corners.weight.view_as(index)
        table = self.value(frames.maps).float().reshape(B * Q * Y * X * A, -1)  # (B Q Y X A, D)
        found = sum_rows(table, index.flatten(3).flatten(0, 2), weight.flatten(3).flatten(0, 2))  # (B Y X A, D)
        flow = rearrange(flow.detach(), "B (Y X) Q c -> B Q Y X c", Y=Y)
        return self.proj(found.view(len(queries), -1)), flow

    def _places(self, queries: Tensor, frames: Frames) -> tuple[Float[Tensor, "B cells A Q K 2"], Float[Tensor, "B cells A Q K"]]:
        B = len(frames.offsets_s)
        learned = self.look(queries).float().view(B, -1, self.heads, 1, self.places, 2, 3)
        fixed, a_second = learned.unbind(-2)  # (B, Y X, A, 1, K, 3)
        at = torch.addcmul(fixed, a_second, frames.offsets_s[:, None, None, :, None, None])  # (B, Y X, A, Q, K, 3)
        return at[..., :2], at[..., 2].softmax(dim=-1)

    def _look_around(self) -> None:
        """Every head starts towards its own side, place k at k + 1 cells, whatever the query, and stands still."""
        angle = torch.arange(self.heads) * (2 * math.pi / self.heads)
        side = torch.stack([angle.sin(), angle.cos()], dim=-1)  # (A, 2)
        side = side / side.abs().amax(dim=-1, keepdim=True)
        steps = torch.arange(1, self.places + 1.0)[:, None]
        nn.init.zeros_(self.look.weight)
        nn.init.zeros_(self.look.bias)
        with torch.no_grad():
            self.look.bias.view(self.heads, self.places, 2, 3)[:, :, 0, :2] = side[:, None] * steps


class TemporalLayer(nn.Module):
    """Deformable attention and MLP, each added and then normalised."""

    def __init__(self, width: int, heads: int, places: int) -> None:
        super().__init__()
        self.attn = DeformableAttention(width, heads, places)
        self.norm1 = Norm(width)
        self.mlp = Mlp(width, 2 * width)
        self.norm2 = Norm(width)

    def forward(
        self, x: Float[Tensor, "N E"], positions: Float[Tensor, "N E"], frames: Frames
    ) -> tuple[Float[Tensor, "N E"], Float[Tensor, "B Q Y X 2"]]:
        """Queries after this layer, and the flow of its attention."""
        found, flow = self.attn(x + positions, frames)
        x = self.norm1(x + found)
        return self.norm2(x + self.mlp(x)), flow


class TemporalBranch(nn.Module):
    """Learned queries through a few layers."""

    def __init__(self, inputs: int, width: int, heads: int, *, cells: tuple[int, int], shape: TemporalShape) -> None:
        super().__init__()
        self.grid = Grid(1, 1, *cells)
        self.tables = PositionTables("sincos", TransformerShape(width, shape.layers, heads, 2 * width), has_time=False)
        self.narrow = build_linear(inputs, width)
        self.norm = Norm(width)
        self.queries = nn.Parameter(torch.empty(self.grid.tokens, width))
        self.layers = nn.ModuleList(TemporalLayer(width, heads, shape.places) for _ in range(shape.layers))
        nn.init.normal_(self.queries, std=0.02)

    def forward(self, frames: Frames) -> tuple[Float[Tensor, "N E"], Float[Tensor, "B Q Y X 2"]]:
        """The queries of B Y X cells in the end, and the last layer's flow."""
        B = len(frames.maps)
        maps = self.norm(self.narrow(frames.maps).flatten(0, -2)).view(*frames.maps.shape[:-1], -1)
        positions = self.tables.added(self.grid, maps.device)
        assert positions is not None
        x, positions = (rows.float().expand(B, -1, -1).flatten(0, 1) for rows in (self.queries, positions))
        flow = maps.new_zeros(*maps.shape[:-1], 2)
        for layer in self.layers:
            x, flow = layer(x, positions, frames._replace(maps=maps))
        return x, flow


class TemporalDecoder(nn.Module):
    """Rebuilds volumes of `channels` over `grid`."""

    def __init__(self, channels: int, grid: VoxelGrid, shape: TemporalShape) -> None:
        super().__init__()
        X, Y, Z = grid.shape
        self.grid = grid
        self.shape = shape
        width = shape.short_width
        self.embed = build_linear(channels * Z, width)
        self.norm = Norm(width)
        self.time = build_linear(2 * len(_PERIODS_S), width)
        self.short = TemporalBranch(width, width, shape.short_heads, cells=(Y, X), shape=shape)
        self.long = TemporalBranch(width, shape.long_width, shape.long_heads, cells=(Y, X), shape=shape)
        self.join = nn.Conv2d(width + shape.long_width, channels * Z, 3, padding=1)
        self.norm_out = Norm(channels * Z)

    def forward(
        self, context: Float[Tensor, "B Q C Z Y X"], offsets_s: Float[Tensor, "B Q"], present: Bool[Tensor, "B Q"]
    ) -> Rebuilt:
        """`context` are the frames around the target, moved to its pose; `offsets_s` is their time less the target's.

        Of frames that are not present anything finite may be given. Where none is, the volume is what the queries know alone.
        """
        B, Q, C, _, Y, X = context.shape
        offsets_s = torch.where(present, offsets_s, 0.0)
        maps = self.embed(rearrange(context, "B Q C Z Y X -> B Q Y X (C Z)"))
        maps = self.norm(maps.flatten(0, -2)).view(B, Q, Y, X, -1)
        maps = maps + self.time(embed_offsets(offsets_s)).float()[:, :, None, None]
        near = nearest_frames(offsets_s, present, self.shape.short_frames)
        of_near = near[..., None, None, None].expand(-1, -1, Y, X, maps.shape[-1])
        short, _ = self.short(_frames(maps.gather(1, of_near), offsets_s.gather(1, near), present.gather(1, near)))
        long, flow = self.long(_frames(maps, offsets_s, present))
        joined = torch.cat([short, long], dim=-1).view(B, Y, X, -1)
        volume = rearrange(self.join(joined.permute(0, 3, 1, 2)), "B E Y X -> (B Y X) E")
        volume = rearrange(self.norm_out(volume), "(B Y X) (C Z) -> B C Z Y X", Y=Y, X=X, C=C)
        x_m, y_m, _ = self.grid.voxel_m
        return Rebuilt(volume, torch.stack([flow[..., 1] * x_m, flow[..., 0] * y_m], dim=-1))


def nearest_frames(offsets_s: Float[Tensor, "B Q"], present: Bool[Tensor, "B Q"], count: int) -> Tensor:
    """Places of the `count` present frames nearest in time, the first of equals; absent ones come last. (B, count or Q)"""
    distance_s = torch.where(present, offsets_s.abs(), torch.inf)
    return distance_s.argsort(dim=1, stable=True)[:, :count]


def embed_offsets(offsets_s: Float[Tensor, "B Q"]) -> Float[Tensor, "B Q E"]:
    """Sines, whose sign is before or after, and cosines of a time offset."""
    turns = torch.stack([offsets_s * (2 * math.pi / period_s) for period_s in _PERIODS_S], dim=-1)
    return torch.cat([turns.sin(), turns.cos()], dim=-1)


def _frames(maps: Tensor, offsets_s: Tensor, present: Tensor) -> Frames:
    share = present / present.sum(dim=1, keepdim=True).clamp(min=1)
    return Frames(maps, offsets_s, share)


def _cell_centres(Y: int, X: int, device: torch.device) -> Float[Tensor, "cells 2"]:
    y, x = (torch.arange(count, device=device, dtype=torch.float32) + 0.5 for count in (Y, X))
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flatten(0, 1)
