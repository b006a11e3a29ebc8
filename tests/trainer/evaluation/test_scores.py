"""Metrics: by hand, perfect ones, shuffled ones, and the same in one piece and in several."""

import math

import numpy as np
import pytest

from trainer.evaluation.scores import BevScores, DepthScores, FlowScores, PoseScores, Scores


def score(kind: type[Scores], predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    return kind().figures(kind().measure(predicted, truth))


def random_truth(kind: type[Scores], count: int = 64) -> np.ndarray:
    rng = np.random.default_rng(0)
    if kind is DepthScores:
        return np.where(rng.random((count, 1, 2, 8)) < 0.2, np.nan, rng.uniform(2, 60, (count, 1, 2, 8)))
    if kind is FlowScores:
        truth = rng.normal(scale=8, size=(count, 2, 4, 6, 2))
        truth[:, :, 0, 0] = np.nan
        return truth
    if kind is BevScores:
        return (rng.random((count, 2, 10, 10)) < np.array([0.05, 0.4])[:, None, None]).astype(np.float32)
    angle = rng.uniform(-0.5, 0.5, count)
    there = np.tile(np.eye(4), (count, 1, 1))
    there[:, 0, 0], there[:, 0, 2], there[:, 2, 0], there[:, 2, 2] = np.cos(angle), np.sin(angle), -np.sin(angle), np.cos(angle)
    there[:, :3, 3] = rng.normal(size=(count, 3))
    return np.stack([there, np.linalg.inv(there)], axis=1)


def as_prediction(kind: type[Scores], truth: np.ndarray) -> np.ndarray:
    """What a head says that is sure of this truth."""
    return 20 * truth - 10 if kind is BevScores else np.nan_to_num(truth, nan=7.0)


PERFECT = {
    DepthScores: {"delta1": 1, "abs_rel": 0, "rmse_m": 0},
    PoseScores: {"median_cm": 0, "median_deg": 0},
    FlowScores: {"epe_px": 0, "outliers": 0},
    BevScores: {"vehicle_iou": 1, "drivable_iou": 1, "vehicle_best_iou": 1, "drivable_best_iou": 1},
}
BAD = {
    DepthScores: {"delta1": (0.0, 0.5), "abs_rel": (0.4, 10), "rmse_m": (10, 60)},
    PoseScores: {"median_cm": (50, 1000), "median_deg": (5, 60)},
    FlowScores: {"epe_px": (5, 50), "outliers": (0.5, 1)},
    # p / (2 - p) of two independent draws: 0.026 and 0.25
    BevScores: {
        name: limits
        for kind in ("", "best_")
        for name, limits in ((f"vehicle_{kind}iou", (0, 0.1)), (f"drivable_{kind}iou", (0.15, 0.35)))
    },
}


@pytest.mark.parametrize("kind", PERFECT)
def test_the_truth_scores_perfectly(kind: type[Scores]) -> None:
    truth = random_truth(kind)
    figures = score(kind, as_prediction(kind, truth), truth)
    assert figures == pytest.approx(PERFECT[kind], abs=1e-6)


@pytest.mark.parametrize("kind", BAD)
def test_the_truth_of_other_samples_scores_badly(kind: type[Scores]) -> None:
    truth = random_truth(kind)
    figures = score(kind, as_prediction(kind, np.roll(truth, 1, axis=0)), truth)
    for name, (least, most) in BAD[kind].items():
        assert least <= figures[name] <= most, name


@pytest.mark.parametrize("kind", PERFECT)
def test_rows_of_several_batches_make_the_figures_of_all(kind: type[Scores]) -> None:
    truth = random_truth(kind)
    predicted = np.nan_to_num(truth, nan=1.0) * 1.1
    whole = score(kind, predicted, truth)
    parts = [kind().measure(predicted[first:end], truth[first:end]) for first, end in ((0, 5), (5, 40), (40, 64))]
    assert kind().figures(np.concatenate(parts)) == pytest.approx(whole)


def test_depth_by_hand() -> None:
    truth = np.array([[[[10.0, 20.0, 40.0, np.nan]]]])
    predicted = np.array([[[[12.0, 10.0, 40.0, 99.0]]]])
    # factors 1.2, 2 and 1; errors 0.2, 0.5 and 0 of the truth; 2, 10 and 0 metres
    expected = {"delta1": 2 / 3, "abs_rel": 0.7 / 3, "rmse_m": math.sqrt(104 / 3)}
    assert score(DepthScores, predicted, truth) == pytest.approx(expected)


def test_pose_by_hand() -> None:
    truth = np.tile(np.eye(4), (3, 2, 1, 1))
    predicted = truth.copy()
    for pair, (degrees, metres) in enumerate([(1e-4, 0.03), (90.0, 0.5), (170.0, 2.0)]):
        for way, sign in enumerate((1, -1)):
            c, s = math.cos(math.radians(degrees)), sign * math.sin(math.radians(degrees))
            predicted[pair, way, :2, :2] = [[c, -s], [s, c]]
            predicted[pair, way, 2, 3] = sign * metres
    rows = PoseScores().measure(predicted, truth)
    np.testing.assert_allclose(rows[:, :, 1], [[1e-4] * 2, [90] * 2, [170] * 2], rtol=1e-6)
    assert PoseScores().figures(rows) == pytest.approx({"median_cm": 50.0, "median_deg": 90.0})


def test_flow_by_hand() -> None:
    truth = np.array([[[[0.0, 0.0], [100.0, 0.0], [100.0, 0.0], [np.nan, 0.0]]]])
    predicted = np.array([[[[3.0, 4.0], [104.0, 0.0], [100.0, 6.0], [9.0, 9.0]]]])
    # errors 5, 4 and 6 px: the second is 4 % of its flow, so no outlier
    assert score(FlowScores, predicted, truth) == pytest.approx({"epe_px": 5.0, "outliers": 2 / 3})


@pytest.mark.parametrize("kind", [DepthScores, FlowScores])
def test_where_nothing_is_known_nothing_is_scored(kind: type[Scores]) -> None:
    truth = np.full_like(random_truth(kind), np.nan)
    assert all(math.isnan(value) for value in score(kind, np.zeros_like(truth), truth).values())


def test_bev_by_hand() -> None:
    truth = np.zeros((2, 2, 1, 4))
    truth[0, 0, 0, :2] = truth[1, 0, 0, 0] = 1
    predicted = np.full(truth.shape, -1.0)
    predicted[0, 0, 0, 1:4] = predicted[1, 0, 0, 0] = 0.1
    # of vehicles 1 + 1 cells hit, 4 + 1 said or so; nowhere was anything drivable, nor was it said
    figures = score(BevScores, predicted, truth)
    assert figures["vehicle_iou"] == 2 / 5 and math.isnan(figures["drivable_iou"])
    # at less than a half the first cell is hit as well: log odds of -0.5 are a probability of 0.38
    predicted[0, 0, 0, 0] = -0.5
    figures = score(BevScores, predicted, truth)
    assert figures["vehicle_iou"] == 2 / 5 and figures["vehicle_best_iou"] == 3 / 5 and math.isnan(figures["drivable_best_iou"])
