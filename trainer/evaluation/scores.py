"""Metrics of the downstream tasks: predictions and truth in, figures out.

A median, a root and a ratio over a data set are no means of what its samples have. So each task says of every sample the few numbers
that its figures need, one row a sample; rows of batches, or of ranks should several score, are put on end, and the figures come from all:

    depth   over the points within range that the task takes of an image: delta1, the share with max(p / t, t / p) < 1.25; abs_rel, mean
            of |p - t| / t; rmse_m (Eigen et al. 2014; pooled over points, since images have unequal numbers of them)
    pose    over all pairs, both ways: median_cm, of |t - t*|; median_deg, of the angle of R R*^-1 (Kendall et al. 2015)
    flow    over all known pixels, both ways: epe_px, mean end-point error; outliers, the share with an error > 3 px and > 5 % of the
            true flow (Fl of KITTI 2015, Menze and Geiger 2015)
    bev     over all cells of all samples: vehicle_iou and drivable_iou, intersection by union of what is rather so than not (Philion
            and Fidler 2020); vehicle_best_iou and drivable_best_iou, the largest over thresholds from 0.35 to 0.65 (Liu et al. 2023,
            BEVFusion): a young head is unsure, and IoU at a half says how unsure rather than what it knows
    map     average precision of lines by Chamfer distance: `map_scores.py`
    detection  nuScenes' own figures: `detection.py`

What is NaN in the truth is not known and not scored. Letters beside those of `models`: n samples, k numbers of each.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float, Float64

Rows = Float64[np.ndarray, "n ..."]

_THRESHOLDS = np.array([0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65])
"""Of the probability that a cell of a map is so."""


class Scores(ABC):
    """The metrics of one task."""

    keeps: tuple[str, ...] = ()
    """What else of a sample's preparation its files need."""

    @abstractmethod
    def measure(self, predicted: Float[np.ndarray, "n ..."], truth: Float[np.ndarray, "n ..."]) -> Rows:
        """What the figures need of each sample."""

    @abstractmethod
    def figures(self, rows: Rows) -> dict[str, float]:
        """The metrics over all samples by name; NaN where nothing was known."""

    def write_files(self, rows: Rows, kept: Mapping[str, np.ndarray]) -> dict[str, bytes]:
        """What is kept of the answers beside the figures, by name of the file; mostly nothing."""
        del rows, kept
        return {}


class DepthScores(Scores):
    """Of depths in metres."""

    def measure(self, predicted: Float[np.ndarray, "n ..."], truth: Float[np.ndarray, "n ..."]) -> Rows:
        """Points, those within a factor of 1.25, and sums of relative and of squared errors."""
        known = np.isfinite(truth)
        p, t = (np.where(known, depth_m, 1.0).astype(np.float64) for depth_m in (predicted, truth))
        is_near = np.maximum(p / t, t / p) < 1.25
        return _sum_known(known, np.ones_like(t), is_near, np.abs(p - t) / t, (p - t) ** 2)

    def figures(self, rows: Rows) -> dict[str, float]:
        """As Scores has it."""
        near, relative, squared = _mean_of_sums(rows)
        return {"delta1": near, "abs_rel": relative, "rmse_m": float(np.sqrt(squared))}


class PoseScores(Scores):
    """Of transforms n 2 4 4, there and back."""

    def measure(self, predicted: Float[np.ndarray, "n ..."], truth: Float[np.ndarray, "n ..."]) -> Rows:
        """Errors in metres and degrees, n 2 2."""
        p, t = predicted.astype(np.float64), truth.astype(np.float64)
        apart = p[..., :3, :3] @ t[..., :3, :3].swapaxes(-2, -1)
        # By its sine as well: the arc cosine of a trace near 3 loses half the digits of a small angle.
        axis = np.stack([apart[..., i, j] - apart[..., j, i] for i, j in ((2, 1), (0, 2), (1, 0))], axis=-1)
        angle = np.arctan2(np.linalg.norm(axis, axis=-1), np.trace(apart, axis1=-2, axis2=-1) - 1)
        return np.stack([np.linalg.norm(p[..., :3, 3] - t[..., :3, 3], axis=-1), np.degrees(angle)], axis=-1)

    def figures(self, rows: Rows) -> dict[str, float]:
        """As Scores has it."""
        metres, degrees = np.median(rows, axis=(0, 1)).tolist()
        return {"median_cm": 100 * metres, "median_deg": degrees}


class FlowScores(Scores):
    """Of flows n 2 H W 2 in pixels, there and back."""

    def measure(self, predicted: Float[np.ndarray, "n ..."], truth: Float[np.ndarray, "n ..."]) -> Rows:
        """Pixels, sum of end-point errors, and outliers."""
        known = np.isfinite(truth).all(-1)
        p, t = (np.where(known[..., None], flow_px, 0.0).astype(np.float64) for flow_px in (predicted, truth))
        error = np.linalg.norm(p - t, axis=-1)
        is_outlier = (error > 3) & (error > 0.05 * np.linalg.norm(t, axis=-1))
        return _sum_known(known, np.ones_like(error), error, is_outlier)

    def figures(self, rows: Rows) -> dict[str, float]:
        """As Scores has it."""
        error, outliers = _mean_of_sums(rows)
        return {"epe_px": error, "outliers": outliers}


class BevScores(Scores):
    """Of maps n 2 Y X of log odds, layers vehicle and drivable; truth 0 or 1."""

    def measure(self, predicted: Float[np.ndarray, "n ..."], truth: Float[np.ndarray, "n ..."]) -> Rows:
        """For every threshold, cells in the intersection of each layer, and in the union of each."""
        is_so = truth > 0
        says = [predicted > odds for odds in np.log(_THRESHOLDS / (1 - _THRESHOLDS))]
        counts = [[cells.sum(axis=(2, 3)) for cells in (one & is_so, one | is_so)] for one in says]
        return np.moveaxis(np.array(counts, dtype=np.float64), 2, 0)  # (n, thresholds, 2, layers)

    def figures(self, rows: Rows) -> dict[str, float]:
        """As Scores has it."""
        intersection, union = rows.sum(axis=0).swapaxes(0, 1)
        iou = np.divide(intersection, union, out=np.full_like(union, np.nan), where=union > 0)
        at_half, best = iou[_THRESHOLDS == 0.5][0], np.fmax.reduce(iou)
        names = ("vehicle_iou", "drivable_iou", "vehicle_best_iou", "drivable_best_iou")
        return dict(zip(names, (*at_half.tolist(), *best.tolist()), strict=True))


def _sum_known(known: Bool[np.ndarray, "n ..."], *values: np.ndarray) -> Rows:
    """Sums over what is known of each sample, one column for each of `values`."""
    return np.stack([np.where(known, value, 0.0).reshape(len(known), -1).sum(axis=1) for value in values], axis=-1)


def _mean_of_sums(rows: Rows) -> list[float]:
    """All columns but the first, by the first, which counts."""
    count, *sums = rows.sum(axis=0).tolist()
    return [value / count if count else float("nan") for value in sums]
