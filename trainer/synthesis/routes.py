"""Where things drive and walk: polylines with rounded corners, run through at a steady speed.

A route is sampled densely once; a pose at any time is an interpolation, so velocities are exact on straights and arcs alike.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from trainer.synthesis.city import BLOCK_M, BLOCKS, HALF_STREET_M, LANE_M, PAVEMENT_M

_SAMPLE_M = 0.1
_TURN_RADIUS_M = 7.5


@dataclass(frozen=True)
class Route:
    """A path through the city and how fast it is followed; standing still is speed 0."""

    points_m: Float[np.ndarray, "n 2"]
    distance_m: Float[np.ndarray, " n"]
    yaw_rad: Float[np.ndarray, " n"]
    start_m: float
    speed_mps: float

    def poses(self, time_s: Float[np.ndarray, " k"]) -> Float[np.ndarray, "k 3"]:
        """x, y and yaw at each time."""
        at = self.start_m + self.speed_mps * time_s
        x, y, yaw = (np.interp(at, self.distance_m, values) for values in (*self.points_m.T, self.yaw_rad))
        return np.stack([x, y, yaw], axis=-1)


def build_route(corners_m: Float[np.ndarray, "n 2"], *, start_m: float, speed_mps: float) -> Route:
    """The route through `corners_m`, each corner rounded to an arc."""
    pieces = [corners_m[:1]]
    for before, corner, after in zip(corners_m, corners_m[1:], corners_m[2:], strict=False):
        pieces.append(_round_corner(before, corner, after))
    points = _resample(np.concatenate([*pieces, corners_m[-1:]]))
    steps = np.diff(points, axis=0)
    distance = np.concatenate([[0.0], np.cumsum(np.linalg.norm(steps, axis=1))])
    yaw = np.unwrap(np.arctan2(steps[:, 1], steps[:, 0]))
    return Route(points, distance, np.append(yaw, yaw[-1]), start_m, speed_mps)


def stand_still(x_m: float, y_m: float, yaw_rad: float) -> Route:
    """Something parked."""
    return Route(np.array([[x_m, y_m]] * 2), np.array([0.0, 1.0]), np.array([yaw_rad] * 2), 0.0, 0.0)


def drive_around(rng: np.random.Generator, length_m: float, speed_mps: float) -> Route:
    """A drive in the right lane that turns left, right or not at all at junctions, and stays inside the city."""
    junction = rng.integers(2, BLOCKS - 1, 2)
    heading = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]])[rng.integers(4)]
    start = rng.uniform(8.0, 24.0)
    corners = [_lane_point(junction, heading, heading)]
    driven = -start
    is_first = True
    while driven < length_m:
        junction = junction + heading
        choices = [turn for turn in _turns(heading) if np.all((junction + turn >= 1) & (junction + turn <= BLOCKS - 1))]
        straight_on = any((turn == heading).all() for turn in choices)
        # The first junction turns more often, so that short scenes show a turn too.
        goes_straight = straight_on and rng.random() < (0.3 if is_first else 0.5)
        turn = heading if goes_straight else choices[rng.integers(len(choices))]
        corners.append(_lane_point(junction, heading, turn))
        heading, is_first, driven = turn, False, driven + BLOCK_M
    corners.append(corners[-1] + heading * BLOCK_M)
    return build_route(np.array(corners, dtype=np.float64), start_m=start, speed_mps=speed_mps)


def drive_straight(rng: np.random.Generator, speed_mps: float) -> Route:
    """Traffic along one street from edge to edge of the city."""
    heading = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]])[rng.integers(4)]
    street = rng.integers(1, BLOCKS) * BLOCK_M
    right = np.array([heading[1], -heading[0]])
    along = np.abs(heading)
    across = 1 - along
    begin = across * street + along * (0.0 if heading.sum() > 0 else BLOCKS * BLOCK_M) + right * LANE_M / 2
    corners = np.array([begin, begin + heading * BLOCKS * BLOCK_M])
    return build_route(corners, start_m=float(rng.uniform(0, 0.6 * BLOCKS * BLOCK_M)), speed_mps=speed_mps)


def walk_on_pavement(rng: np.random.Generator, speed_mps: float) -> Route:
    """A pedestrian along one side of a street, in either direction."""
    offset = (HALF_STREET_M + rng.uniform(1.2, PAVEMENT_M - 0.4)) * rng.choice([-1.0, 1.0])
    street = rng.integers(1, BLOCKS) * BLOCK_M + offset
    block = rng.integers(0, BLOCKS) * BLOCK_M
    ends = np.array([[block + 12.0, street], [block + BLOCK_M - 12.0, street]])
    if rng.random() < 0.5:
        ends = ends[::-1]
    if rng.random() < 0.5:
        ends = ends[:, ::-1]
    return build_route(ends, start_m=float(rng.uniform(0, 20)), speed_mps=speed_mps)


def _lane_point(junction: np.ndarray, heading: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """Where the lane of arrival meets the lane of departure at a junction."""
    centre = junction * BLOCK_M
    keep_right = np.array([heading[1], -heading[0]]) * LANE_M / 2
    if (turn == heading).all():
        return centre + keep_right
    return centre + keep_right + np.array([turn[1], -turn[0]]) * LANE_M / 2


def _turns(heading: np.ndarray) -> list[np.ndarray]:
    """Straight on, left, right."""
    left = np.array([-heading[1], heading[0]])
    return [heading, left, -left]


def _round_corner(before: np.ndarray, corner: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Points of an arc that touches both legs; just the corner where they are one line."""
    arrive = (corner - before) / np.linalg.norm(corner - before)
    leave = (after - corner) / np.linalg.norm(after - corner)
    turn = arrive[0] * leave[1] - arrive[1] * leave[0]
    if abs(turn) < 1e-6:
        return corner[None]
    side = np.sign(turn) * np.array([-arrive[1], arrive[0]])
    centre = corner - arrive * _TURN_RADIUS_M + side * _TURN_RADIUS_M
    angles = np.linspace(0, np.pi / 2, 48)[:, None]
    return centre + _TURN_RADIUS_M * (-side * np.cos(angles) + arrive * np.sin(angles))


def _resample(points_m: np.ndarray) -> np.ndarray:
    """The same line with a point every _SAMPLE_M."""
    lengths = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(points_m, axis=0), axis=1))])
    keep = np.append(True, np.diff(lengths) > 1e-9)
    at = np.arange(0, lengths[-1], _SAMPLE_M)
    return np.stack([np.interp(at, lengths[keep], points_m[keep, axis]) for axis in range(2)], axis=-1)
