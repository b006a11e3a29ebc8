"""Trivial answers: the best constants of what is true."""

from itertools import product

import numpy as np

from trainer.evaluation.protocol import mean_pose, median_depth, no_flow, usual_map
from trainer.evaluation.scores import BevScores


def test_the_median_depth_is_that_of_all_known_points() -> None:
    truth = np.array([[[[1.0, np.nan, 9.0]]], [[[5.0, np.nan, np.nan]]]])
    assert median_depth(truth) == 5.0


def test_the_mean_pose_of_both_ways_is_half_way_and_a_rotation() -> None:
    c, s = np.cos(0.4), np.sin(0.4)
    turned = np.array([[c, -s, 0, 2], [s, c, 0, 0], [0, 0, 1, 4], [0, 0, 0, 1]])
    mean = mean_pose(np.stack([np.eye(4), turned])[None])
    np.testing.assert_allclose(mean[:2, :2], [[np.cos(0.2), -np.sin(0.2)], [np.sin(0.2), np.cos(0.2)]], atol=1e-12)
    np.testing.assert_allclose(mean[:3, 3], [1, 0, 2])


def test_no_flow_is_none_to_the_right_and_none_down() -> None:
    assert no_flow(np.ones((1, 2, 2, 2, 2))).tolist() == [0, 0]


def test_no_constant_map_has_a_better_iou_than_the_usual_one() -> None:
    rng = np.random.default_rng(0)
    truth = (rng.random((5, 2, 2, 3)) < np.linspace(0.1, 0.9, 6).reshape(2, 3)).astype(np.float32)
    scores = BevScores()

    def iou(constant: np.ndarray) -> dict[str, float]:
        return scores.figures(scores.measure(np.broadcast_to(constant, truth.shape), truth))

    usual = iou(usual_map(truth))
    all_maps = [iou(np.tile(np.reshape(cells, (2, 3)), (2, 1, 1))) for cells in product((-np.inf, np.inf), repeat=6)]
    for name, value in usual.items():
        assert value == max(one[name] for one in all_maps)
