"""Lines as points: even steps, and distances by hand."""

import numpy as np
import pytest

from models.polylines import chamfer_distances, resample_line


def test_points_lie_at_even_steps_along_a_line_whatever_its_corners() -> None:
    corner = np.array([(0.0, 0.0), (3.0, 0.0), (3.0, 1.0)])
    np.testing.assert_allclose(resample_line(corner, 5), [(0, 0), (1, 0), (2, 0), (3, 0), (3, 1)])


def test_a_ring_ends_where_it_begins() -> None:
    ring = resample_line(np.array([(0.0, 0), (2, 0), (2, 2), (0, 2), (0, 0)]), 9)
    np.testing.assert_allclose(ring[0], ring[-1])


def test_the_chamfer_distance_is_the_mean_of_both_ways() -> None:
    line = np.array([(0.0, 0.0), (4.0, 0.0)])
    other = np.array([(0.0, 3.0), (0.0, 0.0)])
    # from the line 0 and 4, from the other 3 and 0
    np.testing.assert_allclose(chamfer_distances([line, other], [other]), [[(2 + 1.5) / 2], [0]])
    shifted = line + np.array([0.0, 0.7])
    assert chamfer_distances([line], [shifted])[0, 0] == pytest.approx(0.7)


def test_no_lines_are_at_no_distances() -> None:
    assert chamfer_distances([], [np.zeros((2, 2))]).shape == (0, 1)
