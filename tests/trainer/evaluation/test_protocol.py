"""Trivial answers: the best constants of what is true."""

import numpy as np

from trainer.evaluation.protocol import mean_pose, median_depth, no_flow


def test_the_median_depth_is_that_of_all_known_points() -> None:
    truth = np.array([[[[1.0, np.nan, 9.0]]], [[[5.0, np.nan, np.nan]]]])
    assert median_depth(truth) == 5.0


def test_the_mean_pose_is_half_way_and_a_rotation() -> None:
    c, s = np.cos(0.4), np.sin(0.4)
    turned = np.array([[c, -s, 0, 2], [s, c, 0, 0], [0, 0, 1, 4], [0, 0, 0, 1]])
    mean = mean_pose(np.stack([np.eye(4), turned]))
    np.testing.assert_allclose(mean[:2, :2], [[np.cos(0.2), -np.sin(0.2)], [np.sin(0.2), np.cos(0.2)]], atol=1e-12)
    np.testing.assert_allclose(mean[:3, 3], [1, 0, 2])


def test_no_flow_is_none_in_both_directions() -> None:
    assert no_flow(np.ones((1, 2, 2, 2))).tolist() == [0, 0]
