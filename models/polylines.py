"""Lines of a map as points: evenly spaced along them, and how far two of them are apart.

    Chamfer distance of a and b = (mean over a of the distance to the nearest of b + mean over b of that to the nearest of a) / 2

as map construction has it since HDMapNet (Li et al. 2022), whose classes these are. A ring is a line that ends where it begins.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float64
from scipy.spatial.distance import cdist  # type: ignore[import-untyped]

LINE_CLASSES = ("divider", "crossing", "boundary")


def resample_line(points: Float[np.ndarray, "P 2"], count: int) -> Float64[np.ndarray, "count 2"]:
    """As many points at equal distances along a line, both ends included."""
    walked = np.concatenate([[0.0], np.linalg.norm(np.diff(points, axis=0), axis=-1).cumsum()])
    at = np.linspace(0, walked[-1], count)
    return np.stack([np.interp(at, walked, points[:, axis]) for axis in range(2)], axis=-1)


def chamfer_distances(
    lines: Sequence[Float[np.ndarray, "P 2"]], others: Sequence[Float[np.ndarray, "P 2"]]
) -> Float64[np.ndarray, "K M"]:
    """Of each of K lines to each of M others, given as points along them."""
    if not len(lines) or not len(others):
        return np.zeros((len(lines), len(others)))
    return np.stack([_distances_of(np.asarray(line), np.asarray(others)) for line in lines])


def _distances_of(line: Float[np.ndarray, "P 2"], others: Float[np.ndarray, "M Q 2"]) -> Float64[np.ndarray, " M"]:
    """Line by line, so that what is compared fits a core's cache."""
    squared = cdist(line, others.reshape(-1, 2), "sqeuclidean").reshape(len(line), *others.shape[:2])
    there, back = (np.sqrt(squared.min(axis=axis)) for axis in (2, 0))
    return (there.mean(axis=0) + back.mean(axis=1)) / 2
