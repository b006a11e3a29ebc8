"""Rasters: which cells shapes cover, by shapes whose area is known, and the same by asking of every centre."""

import math

import numpy as np

from models.heads.lift import build_bev_grid
from models.rasters import fill_outlines, outline_boxes

GRID = build_bev_grid(10.0, 0.5)


def ring(*corners: tuple[float, float]) -> np.ndarray:
    points = np.array(corners, dtype=np.float64)
    return np.stack([points, np.roll(points, -1, axis=0)], axis=1)


def box(x: float, y: float, length: float, width: float, yaw: float) -> np.ndarray:
    return np.array([[x, y, 0.5, length, width, 1.5, yaw, 0, 0]], dtype=np.float32)


def centres() -> tuple[np.ndarray, np.ndarray]:
    """x and y of every cell, rows along y."""
    at = -10 + (np.arange(40) + 0.5) * 0.5
    return np.meshgrid(at, at)


def test_a_rectangle_fills_the_cells_whose_centres_it_holds() -> None:
    filled = fill_outlines(ring((1, 2), (4, 2), (4, 3), (1, 3)), GRID)
    x, y = centres()
    np.testing.assert_array_equal(filled, (x > 1) & (x < 4) & (y > 2) & (y < 3))
    assert filled.sum() == 6 * 2 and filled[24, 22]  # row (2 + 10) / 0.5, column (1 + 10) / 0.5


def test_a_turned_box_fills_the_centres_within_its_length_and_width() -> None:
    yaw = 0.6
    filled = fill_outlines(outline_boxes(box(2, -3, 6, 2, yaw)), GRID)
    x, y = centres()
    along = (x - 2) * math.cos(yaw) + (y + 3) * math.sin(yaw)
    across = -(x - 2) * math.sin(yaw) + (y + 3) * math.cos(yaw)
    np.testing.assert_array_equal(filled, (np.abs(along) < 3) & (np.abs(across) < 1))


def test_boxes_that_overlap_do_not_cancel_and_a_hole_stays_open() -> None:
    pair = np.concatenate([box(0, 0, 4, 4, 0), box(1.05, 0, 4, 4, 0.3)])
    together = fill_outlines(outline_boxes(pair), GRID)
    alone = [fill_outlines(outline_boxes(one[None]), GRID) for one in pair]
    np.testing.assert_array_equal(together, alone[0] | alone[1])
    outer, hole = ring((-5, -5), (5, -5), (5, 5), (-5, 5)), ring((-2, -2), (-2, 2), (2, 2), (2, -2))
    assert fill_outlines(np.concatenate([outer, hole]), GRID).sum() == 20 * 20 - 8 * 8


def test_what_reaches_beyond_the_grid_is_cut_and_nothing_fills_nothing() -> None:
    assert fill_outlines(ring((-99, -99), (99, -99), (99, 99), (-99, 99)), GRID).all()
    assert not fill_outlines(ring((11, -5), (20, -5), (20, 5), (11, 5)), GRID).any()
    assert not fill_outlines(outline_boxes(np.empty((0, 9), dtype=np.float32)), GRID).any()
