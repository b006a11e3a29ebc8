"""Rigid transforms in float64: a_from_b as 4 x 4, quaternions as nuScenes writes them (w, x, y, z)."""

import numpy as np
from jaxtyping import Float


def rotation_from_quaternion(quaternion: Float[np.ndarray, " 4"]) -> Float[np.ndarray, "3 3"]:
    """The rotation matrix of a quaternion of any length."""
    w, x, y, z = quaternion / np.linalg.norm(quaternion)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def quaternion_from_yaw(yaw_rad: float) -> list[float]:
    """A turn about the vertical."""
    return [float(np.cos(yaw_rad / 2)), 0.0, 0.0, float(np.sin(yaw_rad / 2))]


def transform_from_parts(rotation: Float[np.ndarray, "3 3"], translation: Float[np.ndarray, " 3"]) -> Float[np.ndarray, "4 4"]:
    """One matrix from a rotation and the origin's place."""
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = rotation, translation
    return matrix


def transform_from_planar(x_m: float, y_m: float, z_m: float, yaw_rad: float) -> Float[np.ndarray, "4 4"]:
    """A body that stands upright: parent from body."""
    cos, sin = np.cos(yaw_rad), np.sin(yaw_rad)
    return np.array([[cos, -sin, 0, x_m], [sin, cos, 0, y_m], [0, 0, 1, z_m], [0, 0, 0, 1.0]])


def invert(a_from_b: Float[np.ndarray, "*K 4 4"]) -> Float[np.ndarray, "*K 4 4"]:
    """b_from_a, for rigid transforms."""
    b_from_a = np.zeros_like(a_from_b)
    rotation = np.swapaxes(a_from_b[..., :3, :3], -1, -2)
    b_from_a[..., :3, :3] = rotation
    b_from_a[..., :3, 3] = -(rotation @ a_from_b[..., :3, 3:])[..., 0]
    b_from_a[..., 3, 3] = 1
    return b_from_a
