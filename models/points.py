"""The LiDAR point encoder: a PointNet++ with several rings a level (Qi et al. 2017), as SimIPU has it (Li et al. 2022).

    ring(i) = max over neighbours j of MLP(features_j [, (xyz_j - xyz_i) / radius]);    level(i) = layer(rings joined)

Which points are centres and neighbours is given: geometry is found in the loader's workers (`clouds.py`), so all that is left
is linear maps, norms and maxima. The first linear map of a ring is taken before the gather, once a point and not once a
neighbour: W [f_j, x] = W_f f_j + W_x x exactly, and only the short second term belongs to a pair.

Where we differ from SimIPU's code: no sampling by distance in feature space (F-FPS), because geometry cannot wait for features;
the nearest k of a ring and not any k; no running statistics, so a BatchNorm normalises by its batch in evaluation too, and no
bias before one, which it would take out again; Xavier-uniform linear maps. The maximum goes before the last ReLU, which is the
same. Offsets are scaled by the radius of their ring, so that all start at one size.

Letters beside those of `models`: F features of a point, M centres, k neighbours.
"""

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int
from torch import Tensor, nn

from models.config import PointShape, SetAbstractionShape
from models.layers import Norm, build_linear

PointNorm = Literal["layer", "batch"]

BATCH_NORM_EPS = 1e-3


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm over all entries of this process, computed in float32 and without buffers."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=BATCH_NORM_EPS, track_running_stats=False)

    def forward(self, x: Float[Tensor, "N C"]) -> Float[Tensor, "N C"]:
        return F.batch_norm(x.float(), None, None, self.weight.float(), self.bias.float(), training=True, eps=self.eps)


class PointLayer(nn.Module):
    """A linear map and a norm, without the ReLU."""

    def __init__(self, inputs: int, outputs: int, norm: PointNorm) -> None:
        super().__init__()
        self.linear = build_linear(inputs, outputs)
        if norm == "batch":
            self.linear.register_parameter("bias", None)
        self.norm = build_norm(outputs, norm)

    def forward(self, x: Float[Tensor, "N F"]) -> Float[Tensor, "N C"]:
        return _normalise(self.norm, self.linear(x))


class NeighbourLinear(nn.Module):
    """The linear map of what every neighbour shows: of its features before the gather, of its offset after.

    It holds its weights itself, because ZeRO gathers what the module that is called holds.
    """

    def __init__(self, inputs: int, outputs: int, *, radius_m: float, use_xyz: bool, norm: PointNorm) -> None:
        super().__init__()
        self.inputs = inputs
        self.radius_m = radius_m
        self.use_xyz = use_xyz
        linear = build_linear(inputs + 3 if use_xyz else inputs, outputs)
        self.weight = linear.weight
        if norm == "batch":
            self.register_parameter("bias", None)
        else:
            self.bias = linear.bias
            # A LayerNorm takes out the size of what it gets, and a single intensity has nothing but its size.
            bound = linear.in_features**-0.5
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(
        self, xyz: Float32[Tensor, "B P 3"], features: Float[Tensor, "B P F"], neighbours: Int[Tensor, "B M k"]
    ) -> Float[Tensor, "N C"]:
        of_features = _gather(F.linear(features, self.weight[:, : self.inputs], self.bias), neighbours)
        if not self.use_xyz:
            return of_features.flatten(0, 2)
        offset = (_gather(xyz, neighbours) - xyz[:, : neighbours.shape[1], None]) / self.radius_m  # (B, M, k, 3)
        with torch.autocast(xyz.device.type, enabled=False):
            of_offset = F.linear(offset, self.weight[:, self.inputs :].float())
        return (of_features + of_offset).to(of_features.dtype).flatten(0, 2)


class Ring(nn.Module):
    """What the neighbours of a centre in one ring have at most, in each of the features of a small MLP."""

    def __init__(self, inputs: int, widths: Sequence[int], *, radius_m: float, use_xyz: bool, norm: PointNorm) -> None:
        super().__init__()
        self.embed = NeighbourLinear(inputs, widths[0], radius_m=radius_m, use_xyz=use_xyz, norm=norm)
        self.norm = build_norm(widths[0], norm)
        self.layers = nn.ModuleList(PointLayer(before, after, norm) for before, after in itertools.pairwise(widths))

    def forward(
        self, xyz: Float32[Tensor, "B P 3"], features: Float[Tensor, "B P F"], neighbours: Int[Tensor, "B M k"]
    ) -> Float[Tensor, "B M C"]:
        x = _normalise(self.norm, self.embed(xyz, features, neighbours))  # (B M k, C)
        for layer in self.layers:
            x = layer(F.relu(x))
        # Unlike amax, max keeps where it found it and not all entries; the backward is several times as fast.
        return F.relu(x.unflatten(0, neighbours.shape).max(dim=2).values)


class SetAbstraction(nn.Module):
    """One level: centres take up what their rings find."""

    def __init__(self, inputs: int, shape: SetAbstractionShape, *, use_xyz: bool, norm: PointNorm) -> None:
        super().__init__()
        self.rings = nn.ModuleList(
            Ring(inputs, widths, radius_m=radius_m, use_xyz=use_xyz, norm=norm)
            for widths, radius_m in zip(shape.widths, shape.radii_m, strict=True)
        )
        self.join = PointLayer(sum(widths[-1] for widths in shape.widths), shape.out, norm)

    def forward(
        self, xyz: Float32[Tensor, "B P 3"], features: Float[Tensor, "B P F"], neighbours: Sequence[Int[Tensor, "B M _"]]
    ) -> Float[Tensor, "B M C"]:
        found = [ring(xyz, features, around) for ring, around in zip(self.rings, neighbours, strict=True)]
        joined = torch.cat(found, dim=-1)  # (B, M, C of all rings)
        return F.relu(self.join(joined.flatten(0, 1))).unflatten(0, joined.shape[:2])


class PointEncoder(nn.Module):
    """Features of the centres of the last level."""

    def __init__(self, shape: PointShape, *, features: int, use_xyz: bool, norm: PointNorm) -> None:
        """`use_xyz` shows the layers where neighbours lie; without it a turned or mirrored cloud gives the same features."""
        super().__init__()
        widths = (features, *(level.out for level in shape.levels))
        self.levels = nn.ModuleList(
            SetAbstraction(inputs, level, use_xyz=use_xyz, norm=norm) for inputs, level in zip(widths, shape.levels, strict=False)
        )

    def forward(
        self,
        xyz: Float32[Tensor, "B P 3"],
        features: Float[Tensor, "B P F"],
        neighbours: Sequence[Sequence[Int[Tensor, "B _ _"]]],
    ) -> Float32[Tensor, "B M C"]:
        """`neighbours` by level and ring: rows of the inputs of the level, whose first rows are its centres."""
        for level, around in zip(self.levels, neighbours, strict=True):
            features = level(xyz, features, around)
            xyz = xyz[:, : features.shape[1]]
        return features.float()


def build_norm(width: int, norm: PointNorm) -> nn.Module:
    """The norm of so many features."""
    return BatchNorm(width) if norm == "batch" else Norm(width)


def _normalise(norm: nn.Module, x: Float[Tensor, "N C"]) -> Float[Tensor, "N C"]:
    """Back in its precision, because the next layer keeps it for the backward."""
    return norm(x).to(x.dtype)


def _gather(rows: Float[Tensor, "B P C"], neighbours: Int[Tensor, "B M k"]) -> Float[Tensor, "B M k C"]:
    """Rows of each cloud. An embedding, because its backward sums in a fixed order on every device."""
    B, P = rows.shape[:2]
    first = P * torch.arange(B, device=rows.device)[:, None, None]
    return F.embedding(neighbours.long() + first, rows.flatten(0, 1))
