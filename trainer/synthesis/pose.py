"""Poses on the ground: a place, a yaw, and what nuScenes writes for them."""

import numpy as np
from jaxtyping import Float


def world_from_ground_pose(x_m: float, y_m: float, yaw_rad: float) -> Float[np.ndarray, "4 4"]:
    """The frame of something that stands at (x, y) on the ground and looks along its yaw."""
    cos, sin = np.cos(yaw_rad), np.sin(yaw_rad)
    return np.array([[cos, -sin, 0, x_m], [sin, cos, 0, y_m], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=np.float64)


def multiply(vectors: Float[np.ndarray, "*n 3"], matrix: Float[np.ndarray, "3 k"]) -> Float[np.ndarray, "*n k"]:
    """`vectors @ matrix` term by term: BLAS rounds differently on another number of threads, and bytes must not."""
    x, y, z = vectors[..., 0], vectors[..., 1], vectors[..., 2]
    return np.stack([x * a + y * b + z * c for a, b, c in matrix.T], axis=-1)


def quaternion_of_yaw(yaw_rad: float) -> list[float]:
    """(w, x, y, z) of a turn about z."""
    return [float(np.cos(yaw_rad / 2)), 0.0, 0.0, float(np.sin(yaw_rad / 2))]
