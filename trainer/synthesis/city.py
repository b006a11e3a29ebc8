"""A city on a grid: streets, what stands beside them, and what the ground looks like.

Streets lie every BLOCK_M metres in both directions, each with one lane and one parking strip a side, pavements, dashed
centre lines and zebra crossings at every junction. Blocks are filled with houses along their edges, trees and lamp posts
along the pavements. World coordinates are metres from the south-west corner, x east, y north; traffic keeps right.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from trainer.synthesis.boxes import Boxes, Look, join, single

BLOCK_M = 64.0
BLOCKS = 8
LANE_M = 3.6
PARKING_M = 2.6
HALF_STREET_M = LANE_M + PARKING_M
PAVEMENT_M = 3.2
CITY_M = BLOCK_M * BLOCKS
CROSSING_FROM_M = HALF_STREET_M + 1.0
CROSSING_TO_M = CROSSING_FROM_M + 3.0

LOCATIONS = ("singapore-onenorth", "boston-seaport", "singapore-queenstown", "singapore-hollandvillage")
"""nuScenes knows only these names of maps; here each names another synthetic city."""


@dataclass(frozen=True)
class City:
    """What stands still."""

    location: str
    seed: int
    boxes: Boxes


def street_centres_m() -> Float[np.ndarray, " n"]:
    """Where streets lie, along either axis; none at the edge of the map."""
    return np.arange(1, BLOCKS) * BLOCK_M


def build_city(seed: int, location: str) -> City:
    """The city that `location` names under this seed."""
    rng = np.random.default_rng([seed, LOCATIONS.index(location), 1])
    parts = []
    for column in range(BLOCKS):
        for row in range(BLOCKS):
            corner = np.array([column, row]) * BLOCK_M
            parts += _build_houses(rng, corner)
            parts += _build_street_side(rng, corner)
    return City(location, seed, join(parts))


def _build_houses(rng: np.random.Generator, corner_m: Float[np.ndarray, "2"]) -> list[Boxes]:
    """A ring of houses around the inside of a block."""
    inset = HALF_STREET_M + PAVEMENT_M
    length = BLOCK_M - 2 * inset
    houses = []
    for side in range(4):
        along = 0.0
        while along < length - 8:
            width = min(rng.uniform(8, 18), length - along)
            if rng.random() < 0.85:
                houses.append(_build_house(rng, corner_m + BLOCK_M / 2, side, along + width / 2 - length / 2, width, length))
            along += width + rng.choice([0.0, 0.0, 3.0])
    return houses


def _build_house(
    rng: np.random.Generator, centre_m: Float[np.ndarray, "2"], side: int, along_m: float, width_m: float, ring_m: float
) -> Boxes:
    depth, height = rng.uniform(8, 12), rng.choice([rng.uniform(5, 9), rng.uniform(9, 18), rng.uniform(18, 40)])
    setback = rng.uniform(0.0, 1.5)
    yaw = side * np.pi / 2
    out = np.array([np.cos(yaw), np.sin(yaw)])  # from the middle of the block towards its street
    place = centre_m + out * (ring_m / 2 - depth / 2 - setback) + np.array([-out[1], out[0]]) * along_m
    return single(
        (*place, height / 2),
        (depth, width_m - 0.2, height),
        yaw_rad=yaw,
        look=Look.FACADE,
        colour=_house_colour(rng),
        seed=int(rng.integers(1 << 30)),
    )


def _build_street_side(rng: np.random.Generator, corner_m: Float[np.ndarray, "2"]) -> list[Boxes]:
    """Trees and lamp posts on the pavements of one block."""
    things = []
    edge = HALF_STREET_M + 0.8
    for side in range(4):
        yaw = side * np.pi / 2
        out = np.array([np.cos(yaw), np.sin(yaw)])
        for along in np.arange(-18, 19, 9.0):
            place = (
                corner_m + BLOCK_M / 2 + out * (BLOCK_M / 2 - edge) + np.array([-out[1], out[0]]) * (along + rng.uniform(-1, 1))
            )
            kind = rng.random()
            if kind < 0.45:
                things += _build_tree(rng, place)
            elif kind < 0.8:
                things.append(single((*place, 3.0), (0.16, 0.16, 6.0), look=Look.POLE, colour=(0.3, 0.31, 0.33)))
    return things


def _build_tree(rng: np.random.Generator, place_m: Float[np.ndarray, "2"]) -> list[Boxes]:
    trunk, crown = rng.uniform(1.8, 2.6), rng.uniform(2.0, 3.4)
    green = np.array([0.16, 0.33, 0.1]) * rng.uniform(0.7, 1.3)
    seed = int(rng.integers(1 << 30))
    yaw = float(rng.uniform(0, np.pi))
    return [
        single((*place_m, trunk / 2), (0.3, 0.3, trunk), look=Look.POLE, colour=(0.28, 0.2, 0.13), yaw_rad=yaw),
        single((*place_m, trunk + crown / 2), (crown, crown, crown), look=Look.LEAVES, colour=green, seed=seed, yaw_rad=yaw),
        single(
            (*place_m, trunk + crown * 0.95),
            (crown * 0.65, crown * 0.65, crown * 0.7),
            look=Look.LEAVES,
            colour=green * 1.15,
            seed=seed + 1,
            yaw_rad=yaw + 0.7,
        ),
    ]


def _house_colour(rng: np.random.Generator) -> Float[np.ndarray, "3"]:
    palette = np.array(
        [[0.62, 0.35, 0.26], [0.72, 0.68, 0.58], [0.55, 0.57, 0.6], [0.78, 0.62, 0.42], [0.42, 0.46, 0.5], [0.82, 0.8, 0.76]]
    )
    return palette[rng.integers(len(palette))] * rng.uniform(0.8, 1.1, 3)


def from_street_m(x_m: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Signed distance of a coordinate from the centre of the nearest street."""
    nearest = np.clip(np.round(x_m / BLOCK_M), 1, BLOCKS - 1)
    return x_m - nearest * BLOCK_M


def street_of(x_m: Float[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Number of the nearest street."""
    return np.clip(np.round(x_m / BLOCK_M), 1, BLOCKS - 1).astype(np.int64)
