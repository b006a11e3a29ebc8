"""Shapes seen from above as cells of a grid, in numpy, for the workers of the loader.

A cell is inside where its centre has a winding number other than zero: of all edges that cross the line from it along -x, those that go
left (up in y) less those that go right. Outlines that run the same way may overlap, and holes run the other way round. How rows and columns
lie says `models.heads.lift`.
"""

import numpy as np
from jaxtyping import Bool, Float

from models.geometry import VoxelGrid


def fill_outlines(edges_m: Float[np.ndarray, "K 2 2"], grid: VoxelGrid) -> Bool[np.ndarray, "Y X"]:
    """The cells inside closed outlines, given as edges from (x, y) to (x, y); they may reach beyond the grid."""
    X, Y, _ = grid.shape
    (low_x, low_y, _), (cell_x, cell_y, _) = grid.low_m, grid.voxel_m
    begin, end = edges_m.astype(np.float64).swapaxes(0, 1)
    rows_m = low_y + (np.arange(Y) + 0.5) * cell_y
    is_up = begin[:, 1] <= rows_m[:, None]  # (Y, K)
    row, edge = np.nonzero(is_up != (end[:, 1] <= rows_m[:, None]))
    share = (rows_m[row] - begin[edge, 1]) / (end[edge, 1] - begin[edge, 1])
    crossed_m = begin[edge, 0] + share * (end[edge, 0] - begin[edge, 0])
    first_right = np.ceil((crossed_m - low_x) / cell_x - 0.5).clip(0, X).astype(np.int64)
    turns = np.zeros((Y, X + 1), dtype=np.int64)
    np.add.at(turns, (row, first_right), np.where(is_up[row, edge], 1, -1))
    return turns[:, :X].cumsum(axis=1) != 0


def outline_boxes(boxes_ego: Float[np.ndarray, "K 9"]) -> Float[np.ndarray, "K*4 2 2"]:
    """Edges of boxes (x y z length width height yaw ...) on the ground, around each the same way."""
    centre, half, yaw = boxes_ego[:, None, :2], boxes_ego[:, None, 3:5] / 2, boxes_ego[:, 6]
    along = np.stack([np.cos(yaw), np.sin(yaw)], axis=-1)[:, None]
    across = np.stack([-np.sin(yaw), np.cos(yaw)], axis=-1)[:, None]
    ahead, left = (np.array(signs)[None, :, None] for signs in ((1, -1, -1, 1), (1, 1, -1, -1)))
    corners = centre + ahead * half[..., :1] * along + left * half[..., 1:] * across  # (K, 4, 2)
    return np.stack([corners, np.roll(corners, -1, axis=1)], axis=2).reshape(-1, 2, 2)
