"""Average precision of lines: perfect ones, shuffled ones, by hand, and in several batches."""

import math

import numpy as np
import pytest

from trainer.evaluation.map_scores import MapScores, average_precision
from trainer.evaluation.protocol import usual_layout

PERFECT = {"divider_ap": 1, "crossing_ap": 1, "boundary_ap": 1, "mAP": 1}


def line(kind: int, x: float, y: float, *, likely: float = 1.0) -> np.ndarray:
    """10 m along x from (x, y)."""
    values = np.zeros(3 + 2 * 5)
    values[kind], values[3::2], values[4::2] = likely, x + np.linspace(0, 10, 5), y
    return values


def sample(*lines: np.ndarray, queries: int = 8) -> np.ndarray:
    return np.stack([*lines, *[np.full(13, np.nan)] * (queries - len(lines))])


def score(predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    return MapScores().figures(MapScores().measure(predicted, truth))


def random_truth(count: int = 24) -> np.ndarray:
    """As many as 8 lines a sample."""
    rng = np.random.default_rng(0)
    samples = [
        sample(*(line(int(rng.integers(3)), rng.uniform(-30, 20), rng.uniform(-15, 15)) for _ in range(rng.integers(1, 9))))
        for _ in range(count)
    ]
    return np.stack(samples)


def test_the_truth_scores_perfectly_in_any_order() -> None:
    truth = random_truth()
    assert score(truth, truth) == pytest.approx(PERFECT)
    assert score(truth[:, ::-1], truth) == pytest.approx(PERFECT)


def test_the_truth_of_other_samples_scores_badly() -> None:
    truth = random_truth()
    assert all(value < 0.15 for value in score(np.roll(truth, 1, axis=0), truth).values())


def test_rows_of_several_batches_make_the_figures_of_all() -> None:
    truth = random_truth()
    predicted = truth.copy()
    predicted[..., 4::2] += np.random.default_rng(1).uniform(0, 2, (len(truth), 8, 1))
    parts = [MapScores().measure(predicted[first:end], truth[first:end]) for first, end in ((0, 5), (5, 24))]
    whole = score(predicted, truth)
    assert MapScores().figures(np.concatenate(parts)) == pytest.approx(whole)
    assert 0.1 < whole["mAP"] < 0.9


def test_an_answer_is_right_within_each_distance_and_once() -> None:
    truth = sample(line(0, 0, 0), line(0, 0, 10))[None]
    twice = sample(line(0, 0, 0.7, likely=0.9), line(0, 0, 0.2, likely=0.5))[None]
    # Within 0.5 m only the second is right: precision 1/2 at recall 1/2. Within 1 and 1.5 m the first is, the second finds it taken.
    assert score(twice, truth)["divider_ap"] == pytest.approx((0.25 + 0.5 + 0.5) / 3)
    figures = score(twice, truth)
    assert math.isnan(figures["crossing_ap"]) and figures["mAP"] == figures["divider_ap"]


def test_a_line_of_another_class_is_wrong_and_nothing_said_finds_nothing() -> None:
    truth = sample(line(0, 0, 0))[None]
    wrong = sample(line(1, 0, 0))[None]  # as a divider it is unlikely, yet the only one that is said: it finds the line
    assert score(wrong, truth)["divider_ap"] == 1
    wrong[0, 1] = line(0, 0, 9)  # likelier and wrong
    assert score(wrong, truth)["divider_ap"] == pytest.approx(0.5)
    assert score(sample()[None], truth)["divider_ap"] == 0
    assert math.isnan(score(truth, sample()[None])["mAP"])


def test_average_precision_by_hand() -> None:
    right = np.array([True, False, True, False])
    # precisions 1, 1/2, 2/3, 1/2 from the likeliest down: 1 for the first of four true lines, 2/3 for the second
    assert average_precision(np.array([4.0, 3.0, 2.0, 1.0]), right, 4.0) == pytest.approx((1 + 2 / 3) / 4)


def test_the_usual_layout_is_that_of_most_clips() -> None:
    usual, other = sample(line(0, 0, 0), line(2, 0, 5)), sample(line(0, 0, 9))
    np.testing.assert_array_equal(usual_layout(np.stack([other, usual, usual, usual])), usual)
    assert np.isnan(usual_layout(np.stack([sample()] * 3))).all()
