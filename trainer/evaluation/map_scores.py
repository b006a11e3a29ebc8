"""Metrics of lines: average precision by Chamfer distance (HDMapNet, Li et al. 2022), as MapTR (Liao et al. 2023) computes it.

Every line says how likely it is each class, and is an answer to each. In a sample, the answers of a class are taken from the likeliest
down; one is right if the nearest true line of its class is nearer than the threshold and not yet taken. Over all samples, again from the
likeliest down, precision and recall make a curve; AP is the area below it, precision raised to the best of any higher recall.

A row holds, of each query and class: how likely, and right at each threshold or not; then the number of true lines of each class. A line
that is NaN is none, in answers as in truth. Letters beside those of `models`: n samples, k numbers, Q lines of a sample, E true ones.
"""

import numpy as np
from jaxtyping import Bool, Float, Float64

from models.polylines import LINE_CLASSES, chamfer_distances, resample_line
from trainer.evaluation.scores import Rows, Scores

THRESHOLDS_M = (0.5, 1.0, 1.5)
_POINTS = 100
"""Along a line, between which distances are measured; MapTR's."""
_NO_ANSWER = -np.inf


class MapScores(Scores):
    """Of lines n Q (classes + 2 P), as `models.objectives.map` has them."""

    def measure(self, predicted: Float[np.ndarray, "n ..."], truth: Float[np.ndarray, "n ..."]) -> Rows:
        """As said above."""
        return np.stack([_measure_sample(p, t) for p, t in zip(predicted, truth, strict=True)])

    def figures(self, rows: Rows) -> dict[str, float]:
        """As Scores has it."""
        classes = len(LINE_CLASSES)
        answers = rows[:, :-classes].reshape(len(rows), -1, classes, 1 + len(THRESHOLDS_M))
        figures = {}
        for place, name in enumerate(LINE_CLASSES):
            of_class = answers[:, :, place].reshape(-1, 1 + len(THRESHOLDS_M))
            likely, right = of_class[:, 0], of_class[:, 1:] > 0
            said = likely != _NO_ANSWER
            true = float(rows[:, place - classes].sum())
            precisions = [average_precision(likely[said], at[said], true) for at in right.T]
            figures[f"{name}_ap"] = float(np.mean(precisions))
        known = [value for value in figures.values() if not np.isnan(value)]
        return {**figures, "mAP": float(np.mean(known)) if known else float("nan")}


def average_precision(likely: Float64[np.ndarray, " K"], right: Bool[np.ndarray, " K"], true: float) -> float:
    """Area below the curve of precision over recall; NaN where nothing is true."""
    if not true:
        return float("nan")
    hits = right[np.argsort(-likely, kind="stable")].cumsum()
    precision = hits / np.arange(1, len(hits) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(hits, prepend=0) * best).sum() / true)


def _measure_sample(predicted: Float[np.ndarray, "Q values"], truth: Float[np.ndarray, "E values"]) -> Float64[np.ndarray, " k"]:
    classes = len(LINE_CLASSES)
    answers = np.zeros((len(predicted), classes, 1 + len(THRESHOLDS_M)))
    is_line = np.isfinite(predicted[:, 0])
    answers[..., 0] = np.where(is_line[:, None], predicted[:, :classes], _NO_ANSWER)
    lines, true = (_read_lines(values) for values in (predicted[is_line], truth[np.isfinite(truth[:, 0])]))
    true_class = truth[np.isfinite(truth[:, 0]), :classes].argmax(axis=1)
    apart_m = chamfer_distances(lines, true)
    for place in range(classes):
        of_class = apart_m[:, true_class == place]
        likely = predicted[is_line, place]
        answers[is_line, place, 1:] = np.stack([_judge(of_class, likely, limit_m) for limit_m in THRESHOLDS_M], axis=-1)
    return np.concatenate([answers.reshape(-1), np.bincount(true_class, minlength=classes)])


def _judge(apart_m: Float64[np.ndarray, "Q E"], likely: Float[np.ndarray, " Q"], limit_m: float) -> Bool[np.ndarray, " Q"]:
    """Which answers are right: each true line is found once."""
    right = np.zeros(len(apart_m), dtype=bool)
    if not apart_m.shape[1]:
        return right
    nearest, taken = apart_m.argmin(axis=1), set[int]()
    for answer in np.argsort(-likely, kind="stable"):
        line = int(nearest[answer])
        if apart_m[answer, line] < limit_m and line not in taken:
            right[answer] = True
            taken.add(line)
    return right


def _read_lines(values: Float[np.ndarray, "K values"]) -> list[Float64[np.ndarray, "P 2"]]:
    """Points along each line, close together."""
    return [resample_line(line.reshape(-1, 2), _POINTS) for line in values[:, len(LINE_CLASSES) :]]
