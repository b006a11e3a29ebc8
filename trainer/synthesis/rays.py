"""What each ray of a grid hits first.

Both sensors look along grids whose rays are sums, `ray(row, column) = columns[column] + rows[row]`: a pinhole's pixels, and
a spinning LiDAR's rings and columns once its rays are scaled to horizontal length 1. With x = origin + ray / w, the plane
n x = d is met at nearness w = -(n ray) / (n origin - d), which is a sum over row and column too, and linear: no division.
A ray enters a convex solid at the smallest w of the planes that the origin lies outside of, and leaves it at the largest w
of the others; it hits if it enters before it leaves. A z-buffer keeps the largest w.

Each solid is tested within its window of the grid only, nearest first, and not at all where everything in its window is
nearer already. Letters: K solids, F faces, M windows. Face 0 is the ground, the plane z = 0.

Left to whom: `camera` and `lidar` lay the grid and find the windows.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from trainer.synthesis.solids import Solids

GROUND = 0
NOTHING = -1


@dataclass(frozen=True)
class RayGrid:
    """H x W rays from one point."""

    origin: Float[np.ndarray, " 3"]
    columns: Float[np.ndarray, "W 3"]
    rows: Float[np.ndarray, "H 3"]

    def rays(self) -> Float[np.ndarray, "H W 3"]:
        """All of them."""
        return (self.rows[:, None] + self.columns[None]).astype(np.float32)


@dataclass(frozen=True)
class Windows:
    """Where on the grid to test which solid; a solid may have several."""

    solid: Int[np.ndarray, " M"]
    bounds: Int[np.ndarray, "M 4"]
    """First row, end row, first column, end column."""
    nearness: Float[np.ndarray, " M"]
    """No point of the solid is nearer than this says."""


@dataclass(frozen=True)
class Hits:
    """The first thing on each ray."""

    nearness: Float[np.ndarray, "H W"]
    """The point hit is origin + ray / nearness; 0 where nothing is hit."""
    face: Int[np.ndarray, "H W"]
    """Face hit, or NOTHING."""


def cast(grid: RayGrid, solids: Solids, windows: Windows, *, with_ground: bool = True) -> Hits:
    """Trace the whole grid."""
    hits = _empty_hits(grid, with_ground=with_ground)
    first_face = solids.first_face
    outside, by_column, by_row = _nearness_tables(grid, solids, windows)
    for index in np.argsort(-windows.nearness, kind="stable"):
        row, row_end, column, column_end = windows.bounds[index]
        nearness = hits.nearness[row:row_end, column:column_end]
        if nearness.min() >= windows.nearness[index]:
            continue
        solid = windows.solid[index]
        faces = np.arange(first_face[solid], first_face[solid + 1])
        enters, leaves = faces[outside[faces]], faces[~outside[faces]]
        if not len(enters):
            continue  # the origin is inside this solid
        planes_by_row, planes_by_column = by_row[:, row:row_end, None], by_column[:, None, column:column_end]
        entry = planes_by_row[enters[0]] + planes_by_column[enters[0]]
        face = np.full(entry.shape, enters[0], dtype=np.int32)
        for other in enters[1:]:
            plane = planes_by_row[other] + planes_by_column[other]
            np.copyto(face, other, where=plane < entry)
            np.minimum(entry, plane, out=entry)
        threshold = nearness.copy()
        for other in leaves:
            np.maximum(threshold, planes_by_row[other] + planes_by_column[other], out=threshold)
        is_hit = entry > threshold
        np.copyto(nearness, entry, where=is_hit)
        np.copyto(hits.face[row:row_end, column:column_end], face, where=is_hit)
    return hits


def _empty_hits(grid: RayGrid, *, with_ground: bool) -> Hits:
    nearness = np.zeros((len(grid.rows), len(grid.columns)), dtype=np.float32)
    if with_ground:
        down = -(grid.rows[:, None, 2] + grid.columns[None, :, 2]) / grid.origin[2]
        nearness = np.maximum(down, 0).astype(np.float32)
    return Hits(nearness, np.where(nearness > 0, GROUND, NOTHING).astype(np.int32))


def _nearness_tables(
    grid: RayGrid, solids: Solids, windows: Windows
) -> tuple[np.ndarray, Float[np.ndarray, "F W"], Float[np.ndarray, "F H"]]:
    """Whether the origin lies outside each plane, and the two summands of the nearness at which rays meet it."""
    side = solids.normals @ grid.origin - solids.offsets
    side = np.where(np.abs(side) < 1e-7, 1e-7, side)
    is_tested = np.zeros(solids.count, dtype=bool)
    is_tested[windows.solid] = True
    tested = np.flatnonzero(is_tested[solids.solid_of_face])
    by_column = np.zeros((len(side), len(grid.columns)), dtype=np.float32)
    by_row = np.zeros((len(side), len(grid.rows)), dtype=np.float32)
    normals = solids.normals[tested] / -side[tested, None]
    by_column[tested] = normals @ grid.columns.T
    by_row[tested] = normals @ grid.rows.T
    return side > 0, by_column, by_row
