"""The geometry of point clouds: which points go on, which lie around each, and which of two clouds belong together.

PointNet++ (Qi et al. 2017) looks at geometry alone when it chooses centres and neighbours, so both are found here, in the
loader's workers, and the model receives indices. One pass of farthest point sampling serves every level: sampling its own
output again gives the same order, so the centres of a level are the first rows of the level before, and a cloud whose rows
lie in that order needs no index of centres. Matching is SimIPU's (Li et al. 2022): the pairs, each centre in one, whose
distances sum to the least (Kuhn 1955).

Where we differ from SimIPU's code: its second and third levels take half of their centres by distance in feature space, which
needs the features; ours are all by distance in space. A ring keeps the nearest k points where theirs keeps the k of lowest
index. Points that coincide with a centre are left out of its rings, to which they would bring what the centre brings.

numpy and scipy only. What is done with the indices is left to `points.py`. Letters beside those of `models`: F features of a
point with its coordinates, M centres, k points in a ring, K points asked of the tree.
"""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int32, Int64
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]
from scipy.spatial import cKDTree  # type: ignore[import-untyped]
from scipy.spatial.distance import cdist  # type: ignore[import-untyped]

from models.config import PointShape

_SLACK = 1.0001
"""Far above the rounding of float32 distances, so that no point is passed over because of it."""
_FIRST_ASKED = 64
"""Neighbours that the tree is asked for at first; of a LiDAR sweep few points have more in reach."""


class FarthestFirst(NamedTuple):
    """Rows of a cloud, each the farthest from those before it."""

    rows: Int64[np.ndarray, " M"]
    """No row twice."""
    distinct: int
    """How many of them, always the first ones, are distinct points; the others coincide with one of these."""


@dataclass(frozen=True)
class Cloud:
    """A cloud as the point encoder takes it."""

    points: Float32[np.ndarray, "P F"]
    """Centres of the first level first, farthest first; then the others as they came."""
    neighbours: tuple[tuple[Int32[np.ndarray, "_ _"], ...], ...]
    """For each level and ring (M, k): rows of the inputs of that level around each centre, the centre itself first."""
    distinct: int
    """How many of the centres of the last level are distinct points; the others coincide with one of these."""


@dataclass(frozen=True)
class Similarity:
    """A turn about the vertical through `centre_m`, then a scale about the origin, then perhaps a flip from left to right."""

    yaw_rad: float = 0.0
    scale: float = 1.0
    is_flipped: bool = False
    """Whether y becomes -y."""
    centre_m: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @property
    def matrix(self) -> Float[np.ndarray, "4 4"]:
        """What takes original points to transformed ones."""
        cos, sin = math.cos(self.yaw_rad), math.sin(self.yaw_rad)
        turn = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
        centre = np.array(self.centre_m)
        stretch = self.scale * np.array([1, -1 if self.is_flipped else 1, 1])
        matrix = np.eye(4)
        matrix[:3, :3] = stretch[:, None] * turn
        matrix[:3, 3] = stretch * (centre - turn @ centre)
        return matrix


def describe_cloud(points: Float32[np.ndarray, "P F"], shape: PointShape, *, start: int = 0) -> Cloud:
    """Order a cloud of exactly `shape.points` points farthest first from row `start`, and find the neighbours on every level."""
    assert len(points) == shape.points, f"a cloud of {shape.points} points was asked, this one has {len(points)}"
    first = order_farthest_first(points[:, :3], shape.levels[0].centres, start=start)
    is_left = np.ones(len(points), dtype=bool)
    is_left[first.rows] = False
    ordered = points[np.concatenate([first.rows, np.flatnonzero(is_left)])]
    # Where the centres run out of distinct points, all points that follow coincide with one before and need not be found.
    inputs = len(ordered) if first.distinct == len(first.rows) else first.distinct
    neighbours = []
    for level in shape.levels:
        centres = ordered[: level.centres, :3]
        neighbours.append(find_neighbours(ordered[:inputs, :3], centres, radii_m=level.radii_m, counts=level.neighbours))
        inputs = min(inputs, level.centres)
    return Cloud(ordered, tuple(neighbours), min(first.distinct, shape.centres))


def order_farthest_first(xyz: Float32[np.ndarray, "P 3"], count: int, *, start: int = 0) -> FarthestFirst:
    """Greedy farthest point sampling from row `start` on.

    Of points equally far that with the smallest x is taken, then the lowest row; when all that is left coincides with what
    is taken, it follows by the same rule. Distances are float32. Points are sorted by x, because a new centre changes the
    distance only of those whose x differs by less than the greatest distance left.
    """
    assert 0 < count <= len(xyz), f"{count} of {len(xyz)} points were asked"
    rows = np.argsort(xyz[:, 0], kind="stable")
    columns = np.ascontiguousarray(xyz[rows].T)  # (3, P)
    x: list[float] = columns[0].tolist()
    squared = np.full(len(xyz), np.inf, dtype=np.float32)  # to the nearest centre; -1 for the centres
    picks = np.empty(count, dtype=np.int64)
    pick, distinct = int(np.flatnonzero(rows == start)[0]), 0
    for place in range(count):
        picks[place] = pick
        farthest = float(squared[pick])
        distinct += farthest > 0
        reach = _SLACK * math.sqrt(farthest)
        near = slice(bisect.bisect_left(x, x[pick] - reach), bisect.bisect_right(x, x[pick] + reach))
        gap = columns[:, near] - columns[:, pick, None]  # (3, near)
        gap *= gap
        np.minimum(squared[near], gap[0] + gap[1] + gap[2], out=squared[near])
        squared[pick] = -1
        pick = int(squared.argmax())
    return FarthestFirst(rows[picks], distinct)


def find_neighbours(
    xyz: Float32[np.ndarray, "P 3"], centres: Float32[np.ndarray, "M 3"], *, radii_m: Sequence[float], counts: Sequence[int]
) -> tuple[Int32[np.ndarray, "M _"], ...]:
    """For each ring, the rows of `xyz` around each centre: that of the centre itself, which is its number, then the nearest.

    A ring reaches from the radius before (0 for the first) up to, and without, its own. Where it holds fewer points than its
    count the centre is repeated.
    """
    tree = cKDTree(xyz)
    found = [np.empty((len(centres), count), dtype=np.int32) for count in counts]
    rings = list(zip((0.0, *radii_m), radii_m, found, strict=False))  # the last radius bounds only inwards
    rows, K = np.arange(len(centres)), _FIRST_ASKED
    while len(rows):
        distance, others = tree.query(centres[rows], K, distance_upper_bound=_SLACK * radii_m[-1])  # (n, K), infinite if none
        for inner, outer, nearest in rings:
            nearest[rows] = _take_ring(distance, others, rows, inner=inner, outer=outer, count=nearest.shape[1])
        # Whoever has more points in reach than were asked may miss some of the outermost ring.
        is_cut = (distance[:, -1] < radii_m[-1]) & (_count_closer(distance, rings[-1][0]) + counts[-1] > K)
        rows, K = rows[is_cut], 2 * K
    return tuple(found)


def match_centres(
    a: Float32[np.ndarray, "M 3"], b: Float32[np.ndarray, "M 3"], *, gate_m: float | None
) -> tuple[Int64[np.ndarray, " M"], Float32[np.ndarray, " M"]]:
    """For each point of `a` one of `b`, each once, and how far it lies.

    Beyond the gate all distances cost the same, so that a point without a partner does not displace others; such pairs are
    still returned, and their true distance tells.
    """
    distance_m = cdist(a, b)
    rows, match = linear_sum_assignment(distance_m if gate_m is None else np.minimum(distance_m, gate_m))
    return match.astype(np.int64), distance_m[rows, match].astype(np.float32)


def draw_similarity(
    rng: np.random.Generator,
    *,
    max_yaw_rad: float,
    min_scale: float,
    max_scale: float,
    flip_share: float,
    centre_m: tuple[float, float, float] = (0.0, 0.0, 0.0),
) -> Similarity:
    """Yaw up to `max_yaw_rad` to either side and a scale, both uniform; flipped in `flip_share` of the draws."""
    yaw_rad, scale = rng.uniform(-max_yaw_rad, max_yaw_rad), rng.uniform(min_scale, max_scale)
    return Similarity(float(yaw_rad), float(scale), bool(rng.random() < flip_share), centre_m)


def transform_points(matrix: Float[np.ndarray, "4 4"], xyz: Float[np.ndarray, "n 3"]) -> Float32[np.ndarray, "n 3"]:
    """Points through a transform; computed in float64."""
    return (xyz @ matrix[:3, :3].T.astype(np.float64) + matrix[:3, 3]).astype(np.float32)


def _take_ring(
    distance: Float[np.ndarray, "n K"],
    others: Int[np.ndarray, "n K"],
    rows: Int[np.ndarray, " n"],
    *,
    inner: float,
    outer: float,
    count: int,
) -> Int32[np.ndarray, "n k"]:
    """Each row, then what of its sorted neighbours lies in the ring, as much as there is room for."""
    K = distance.shape[1]
    place = _count_closer(distance, inner)[:, None] + np.arange(count - 1)  # (n, k - 1)
    seen = np.minimum(place, K - 1)
    is_inside = (place < K) & (np.take_along_axis(distance, seen, axis=1) < outer)
    kept = np.where(is_inside, np.take_along_axis(others, seen, axis=1), rows[:, None])
    return np.concatenate([rows[:, None], kept], axis=1).astype(np.int32)


def _count_closer(distance: Float[np.ndarray, "n K"], inner: float) -> Int[np.ndarray, " n"]:
    """How many lie within a ring; what coincides with the centre lies within the first."""
    is_closer: Bool[np.ndarray, "n K"] = distance < inner if inner else distance <= 0
    return is_closer.sum(axis=1)
