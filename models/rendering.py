"""NeuS: colours and depths along rays through a volume of features (Wang et al. 2021; as MIM4D and UniPAD render, Yang et al. 2024).

A point's feature is read between voxel centres; a small network makes of both a signed distance f and 16 numbers, another of
those, the direction and the gradient of f a colour. With k the sharpness, Phi the sigmoid of k times its argument, and intervals
of length d that begin at t:

    cos = -relu(-direction . grad f)                     a surface is seen from its front only
    alpha = 1 - Phi(f + cos d / 2) / Phi(f - cos d / 2)  with 1e-5 added above (to the difference) and below
    w_i = alpha_i prod_{j<i} (1 - alpha_j)
    colour = sum w c        depth = sum w t / sum w      opacity = sum w

Points along a ray: `coarse` equal intervals, moved by one number a ray, and `fine` more where those see a surface at a sharpness
of 64; they are chosen without gradient.

The gradient of f is no call of autograd but its chain rule written out: what the networks pass back to a point and its feature,
times how the feature's eight weights change. Those are ordinary operations and `geometry.dot_rows`, so training needs a
single backward, evaluation works under no_grad, and neither ZeRO's nor FSDP2's hooks meet a backward inside a forward. Both
networks own their weights and are called as modules, which is when a sharded weight is whole.

Where we differ from the release, and why:
    - the gradient as above instead of a CUDA kernel that is twice differentiable
    - volumes are read at cell centres with align_corners=False, as they are lifted
    - rays that miss the grid are masked instead of asserted away: all numbers of them are 0, and so are their gradients
    - the product of (1 - alpha) is the exponential of a sum: cumprod's backward waits for the device to look for zeros
    - an eikonal term comes with the rest; the release has it without a weight
    - stratified intervals are cut off at the ends of the ray instead of moving half as far there

Distances inside are in units of the grid's largest bound (`VoxelGrid.scale`), as the sharpness expects; in and out it is metres.
All float32. Letters: n points = R S, k their corners, E channels of the volume, F features a network is given.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.geometry import Corners, VoxelGrid, dot_rows, enter_and_leave, find_corners, find_slopes, sum_rows, to_cells

CHUNK_BYTES = 2**28
"""Of what one chunk of rays keeps for its backward."""

_GEOMETRY = 16
"""Numbers of a point that the network of distances hands to that of colours."""
_SOFTPLUS = 100.0
_PROPOSAL_SHARPNESS = 64.0
_FIRST_LOG_SHARPNESS = 0.3
"""A tenth of it: the sharpness starts at exp(3)."""
_EPS = 1e-5
_EPS_LIGHT = 1e-7
_EPS_DEPTH = 1e-10
_KEPT_BY_FORMULA = 12
"""Numbers of a sample between the networks and what the ray sees."""


class RenderShape(NamedTuple):
    """Networks and samples of the renderer."""

    hidden: int = 16
    sdf_blocks: int = 5
    rgb_blocks: int = 3
    coarse: int = 72
    """Equal intervals of a ray."""
    fine: int = 24
    """Intervals more, where a surface is."""
    near_m: float = 1.0
    """Nothing is seen nearer to the camera."""

    @property
    def samples(self) -> int:
        return self.coarse + self.fine


class Rendering(NamedTuple):
    """What rays see; zero where they miss the grid."""

    rgb: Float[Tensor, "B R 3"]
    """Between 0 and 1, on black."""
    depth_m: Float[Tensor, "B R"]
    """Along the ray."""
    opacity: Float[Tensor, "B R"]
    hit: Bool[Tensor, "B R"]
    """Whether the ray meets the grid."""
    eikonal: Float[Tensor, "B R"]
    """Mean over the ray of (|grad f| - 1)^2; a loss takes its mean over rays that hit."""


class Slope(NamedTuple):
    """How a signed distance changes."""

    by_point: Float[Tensor, "n 3"]
    """At a fixed feature."""
    by_feature: Float[Tensor, "n E"]


class Distance(NamedTuple):
    """What the network of distances says of points."""

    sdf: Float[Tensor, " n"]
    geometry: Float[Tensor, "n G"]
    """What else the network of colours is told."""
    slope: Slope | None
    """Where it was asked for."""


class ConditionedMlp(nn.Module):
    """x = P p;  x = act(L_i (x + F_i f)) for each block i;  out = O x.   Weights are whole only while it is called."""

    def __init__(self, features: int, hidden: int, blocks: int, outputs: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.blocks = blocks
        self.point_weight, self.point_bias = _weight(hidden, 3), _bias(hidden, 3)
        self.feature_weight, self.feature_bias = _weight(blocks * hidden, features), _bias(blocks * hidden, features)
        self.block_weight, self.block_bias = _weight(blocks * hidden, hidden), _bias(blocks * hidden, hidden)
        self.out_weight, self.out_bias = _weight(outputs, hidden), _bias(outputs, hidden)

    def _embed(self, points: Tensor, features: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The first x, and what each block adds to it: one product for all blocks."""
        x = F.linear(points, self.point_weight.float(), self.point_bias.float())
        return x, F.linear(features, self.feature_weight.float(), self.feature_bias.float()).split(self.hidden, dim=-1)

    def _block_layers(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        return self.block_weight.float().split(self.hidden), self.block_bias.float().split(self.hidden)


class ColourMlp(ConditionedMlp):
    """The network of colours: ReLU between layers, sigmoid at the end."""

    def __init__(self, features: int, hidden: int, blocks: int) -> None:
        super().__init__(features, hidden, blocks, 3)

    def forward(self, points: Float[Tensor, "n 3"], features: Float[Tensor, "n F"]) -> Float[Tensor, "n 3"]:
        """Red, green and blue between 0 and 1."""
        x, injected = self._embed(points, features)
        for weight, bias, more in zip(*self._block_layers(), injected, strict=True):
            x = F.relu(F.linear(x + more, weight, bias))
        return torch.sigmoid(F.linear(x, self.out_weight.float(), self.out_bias.float()))


class SdfMlp(ConditionedMlp):
    """The network of distances: softplus between layers, and the chain rule back to point and feature."""

    def __init__(self, features: int, hidden: int, blocks: int) -> None:
        super().__init__(features, hidden, blocks, 1 + _GEOMETRY)

    def forward(self, points: Float[Tensor, "n 3"], features: Float[Tensor, "n E"], *, with_slope: bool) -> Distance:
        """Signed distance at each point; `points` and distance in units of the grid's largest bound."""
        weights, biases = self._block_layers()
        x, injected = self._embed(points, features)
        slopes = []
        for weight, bias, more in zip(weights, biases, injected, strict=True):
            before = F.linear(x + more, weight, bias)
            if with_slope:
                x, slope = _SoftplusAndSlope.apply(before)
                slopes.append(slope)
            else:
                x = F.softplus(before, beta=_SOFTPLUS)
        out = F.linear(x, self.out_weight.float(), self.out_bias.float())
        return Distance(out[:, 0], out[:, 1:], self._slope(weights, slopes) if with_slope else None)

    def _slope(self, weights: tuple[Tensor, ...], slopes: list[Tensor]) -> Slope:
        by_x = self.out_weight[:1].float()
        by_injected = []
        for weight, slope in zip(reversed(weights), reversed(slopes), strict=True):
            by_x = (by_x * slope) @ weight
            by_injected.append(by_x)
        by_feature = torch.cat(by_injected[::-1], dim=-1) @ self.feature_weight.float()
        return Slope(by_x @ self.point_weight.float(), by_feature)


class _SoftplusAndSlope(torch.autograd.Function):
    """Softplus and its derivative, which is all that their backward needs: a third of what both would keep by themselves."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        slope = torch.sigmoid(_SOFTPLUS * x)
        ctx.save_for_backward(slope)
        larger = 1 - slope
        larger = torch.maximum(larger, slope, out=larger)
        return F.relu(x).sub_(larger.log_(), alpha=1 / _SOFTPLUS), slope

    @staticmethod
    def backward(ctx: Any, by_value: Tensor, by_slope: Tensor) -> Tensor:
        (slope,) = ctx.saved_tensors
        return torch.addcmul(by_value * slope, by_slope, slope - slope.square(), value=_SOFTPLUS)


class Rays(NamedTuple):
    """A chunk of rays, and where they are sampled."""

    origin: Float[Tensor, "R 3"]
    """In units of the grid's largest bound."""
    direction: Float[Tensor, "R 3"]
    first_row: Int[Tensor, " R"]
    """Where the ray's volume begins in the table of all."""
    edges: Float[Tensor, "R edges"]
    """Distances at which intervals begin, and the last one ends."""

    @property
    def starts(self) -> Float[Tensor, "n 3"]:
        """The points where intervals begin."""
        return (self.origin[:, None] + self.direction[:, None] * self.edges[:, :-1, None]).flatten(0, 1)


class Renderer(nn.Module):
    """Renders volumes of `channels` over `grid`."""

    def __init__(self, channels: int, grid: VoxelGrid, shape: RenderShape) -> None:
        super().__init__()
        self.grid = grid
        self.shape = shape
        self.channels = channels
        self.rgb_inputs = 3 + channels + 3 + _GEOMETRY
        self.sdf = SdfMlp(channels, shape.hidden, shape.sdf_blocks)
        self.rgb = ColourMlp(self.rgb_inputs, shape.hidden, shape.rgb_blocks)
        self.log_sharpness = nn.Parameter(torch.full((1,), _FIRST_LOG_SHARPNESS))

    def forward(
        self,
        volume: Float[Tensor, "B E Z Y X"],
        origin_m: Float[Tensor, "B R 3"],
        direction: Float[Tensor, "B R 3"],
        jitter: Float[Tensor, "B R 2"] | None = None,
        *,
        recompute: bool = False,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> Rendering:
        """Rays in the frame of their volume: origins in metres, unit vectors; zeros are a ray that is none, and misses.

        `jitter` are uniform numbers in [0, 1), for the coarse and for the fine intervals of each ray; without, all are 0.5.
        `recompute` keeps where rays are sampled and does the rest again in the backward, one chunk at a time.
        """
        B, R = origin_m.shape[:2]
        with torch.autocast(volume.device.type, enabled=False):
            table = rearrange(volume.float(), "B E Z Y X -> (B Z Y X) E").contiguous()
            sharpness = torch.exp(10 * self.log_sharpness.float()).clamp(1e-6, 1e6)
            jitter = origin_m.new_full((B, R, 2), 0.5) if jitter is None else jitter
            first_row = torch.arange(B, device=table.device, dtype=torch.int32)[:, None] * self.grid.voxels
            parts = [part.flatten(0, 1) for part in (origin_m, direction, jitter, first_row.expand(-1, R))]
            at_once = self.rays_at_once(chunk_bytes)
            chunks = [
                self._render(table, sharpness, *chunk, recompute=recompute and torch.is_grad_enabled())
                for chunk in zip(*(part.split(at_once) for part in parts), strict=True)
            ]
        return Rendering(*(torch.cat(parts).unflatten(0, (B, R)) for parts in zip(*chunks, strict=True)))

    def rays_at_once(self, chunk_bytes: int) -> int:
        """Rays whose backward keeps at most `chunk_bytes`."""
        return max(1, chunk_bytes // (self.kept_numbers * 4 * self.shape.samples))

    @property
    def kept_numbers(self) -> int:
        """Numbers that a sample keeps for its backward."""
        shape, corners = self.shape, 8
        reading = 3 + corners * (1 + 1 + 3 + 1) + 2 * self.channels
        distance = shape.sdf_blocks * shape.hidden * 5 + shape.hidden
        colour = self.rgb_inputs + shape.rgb_blocks * shape.hidden * 2 + 3
        return reading + distance + colour + _KEPT_BY_FORMULA

    def _render(
        self,
        table: Tensor,
        sharpness: Tensor,
        origin_m: Tensor,
        direction: Tensor,
        jitter: Tensor,
        first_row: Tensor,
        *,
        recompute: bool,
    ) -> Rendering:
        near_m, far_m, hit = enter_and_leave(origin_m.float(), direction.float(), self.grid, self.shape.near_m)
        scale = self.grid.scale
        shift = jitter[:, :1].float() - 0.5
        steps = torch.arange(self.shape.coarse + 1, device=table.device)
        share = ((steps + shift) / self.shape.coarse).clamp(0, 1)
        edges = scale * torch.lerp(near_m[:, None], far_m[:, None], share)
        rays = Rays(origin_m.float() * scale, direction.float(), first_row, edges)
        rays = self._refine(table, rays, jitter[:, 1:].float())
        if recompute:
            seen = checkpoint(self._shade, table, sharpness, rays, use_reentrant=False, preserve_rng_state=False)
        else:
            seen = self._shade(table, sharpness, rays)
        rgb, depth_m, opacity, eikonal = (torch.where(hit.view(-1, *[1] * (part.ndim - 1)), part, 0.0) for part in seen)
        return Rendering(rgb, depth_m, opacity, hit, eikonal)

    @torch.no_grad()
    def _refine(self, table: Tensor, rays: Rays, jitter: Float[Tensor, "R 1"]) -> Rays:
        """The same rays with the fine intervals, which begin where the coarse ones have their weight."""
        coarse, fine = self.shape.coarse, self.shape.fine
        points = rays.starts
        index, weight = self._corners(points, rays.first_row)
        sdf = self.sdf(points, sum_rows(table, index, weight), with_slope=False).sdf.view(-1, coarse)
        length = rays.edges.diff(dim=-1)[:, :-1]
        cos = sdf.diff(dim=-1) / (length + _EPS)
        cos = torch.minimum(F.pad(cos[:, :-1], (1, 0)), cos).clamp(-1e3, 0)
        survival = survive((sdf[:, 1:] + sdf[:, :-1]) / 2, cos * length, _PROPOSAL_SHARPNESS)
        weight = F.pad(weigh(survival), (0, 1)) + _EPS  # (R, coarse)
        share = weight / weight.sum(dim=-1, keepdim=True)
        below = F.pad(share.cumsum(dim=-1), (1, 0))  # (R, coarse + 1)
        wanted = (torch.arange(fine, device=table.device) + jitter) / fine
        place = (torch.searchsorted(below, wanted, right=True) - 1).clamp(0, coarse - 1)
        within = ((wanted - below.gather(1, place)) / share.gather(1, place)).clamp(0, 1)
        more = torch.lerp(rays.edges.gather(1, place), rays.edges.gather(1, place + 1), within)
        return rays._replace(edges=torch.cat([rays.edges, more], dim=-1).sort(dim=-1).values)

    def _shade(self, table: Tensor, sharpness: Tensor, rays: Rays) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Colour, depth in metres, opacity and eikonal term of each ray."""
        R, starts, length = len(rays.edges), rays.edges[:, :-1], rays.edges.diff(dim=-1)
        points, direction = rays.starts, rays.direction.repeat_interleave(self.shape.samples, dim=0)
        index, weight = self._corners(points, rays.first_row)
        feature = sum_rows(table, index, weight)
        sdf, geometry, slope = self.sdf(points, feature, with_slope=True)
        gradient = slope.by_point + self._along_cells(points, dot_rows(table, index, slope.by_feature))
        rgb = self.rgb(points, torch.cat([direction, feature, gradient, geometry], dim=-1))
        cos = -F.relu(-(direction * gradient).sum(-1))
        light = weigh(survive(sdf.view(R, -1), cos.view(R, -1) * length, sharpness))  # (R, S)
        opacity = light.sum(-1)
        depth_m = (light * starts).sum(-1) / ((opacity + _EPS_DEPTH) * self.grid.scale)
        steepness = (gradient.square().sum(-1) + _EPS_DEPTH).sqrt()  # whose gradient is finite at 0
        eikonal = (steepness - 1).square().view(R, -1).mean(-1)
        return (light[..., None] * rgb.view(R, -1, 3)).sum(1), depth_m, opacity, eikonal

    def _corners(self, points: Float[Tensor, "n 3"], first_row: Int[Tensor, " R"]) -> Corners:
        index, weight = find_corners(self._cells(points), self.grid.zyx)
        return Corners((index.view(len(first_row), -1) + first_row[:, None]).view_as(index), weight)

    def _along_cells(self, points: Float[Tensor, "n 3"], dots: Float[Tensor, "n k"]) -> Float[Tensor, "n 3"]:
        """The gradient of what is read between cells, of which `dots` are the values at the corners."""
        slopes = find_slopes(self._cells(points), self.grid.zyx)
        axes = zip((slopes * dots).sum(-1).flip(0), self.grid.voxel_m, strict=True)
        return torch.stack([by_cell / (size_m * self.grid.scale) for by_cell, size_m in axes], dim=-1)

    def _cells(self, points: Float[Tensor, "n 3"]) -> Float[Tensor, "n 3"]:
        """(z, y, x) counted in cells."""
        return to_cells(points / self.grid.scale, self.grid).flip(-1)


def survive(
    sdf: Float[Tensor, "R S"], change: Float[Tensor, "R S"], sharpness: Float[Tensor, "#one"] | float
) -> Float[Tensor, "R S"]:
    """1 - alpha: the share of light that passes intervals in whose middle is `sdf`, and along which it changes by `change` <= 0."""
    before, after = torch.sigmoid(sharpness * (sdf - change / 2)), torch.sigmoid(sharpness * (sdf + change / 2))
    return after / (before + _EPS)


def weigh(survival: Float[Tensor, "R S"]) -> Float[Tensor, "R S"]:
    """How much of what is seen along a ray is in each interval."""
    passed = torch.log(survival + _EPS_LIGHT)
    return (1 - survival) * torch.exp(passed.cumsum(-1) - passed)


def _weight(outputs: int, inputs: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(outputs, inputs).uniform_(-(inputs**-0.5), inputs**-0.5))


def _bias(outputs: int, inputs: int) -> nn.Parameter:
    """As torch's linear layers begin: no geometric start, as released."""
    return nn.Parameter(torch.empty(outputs).uniform_(-(inputs**-0.5), inputs**-0.5))
