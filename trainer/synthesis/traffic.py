"""Things that nuScenes annotates: vehicles of several classes, parked and moving, pedestrians, cones.

A thing is a stack of boxes that share a route. Traffic does not react; what would come too close to the ego or to each
other during the scene is not put there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float

from trainer.synthesis.boxes import Boxes, Look, join, single
from trainer.synthesis.city import BLOCK_M, BLOCKS, HALF_STREET_M, PARKING_M, PAVEMENT_M
from trainer.synthesis.routes import Route, drive_straight, stand_still, walk_on_pavement

_CHECK_S = 0.25


@dataclass(frozen=True)
class Kind:
    """A nuScenes category: typical size, how it is built, and the attribute of one that moves and one that does not."""

    category: str
    size_m: tuple[float, float, float]
    """Length, width, height."""
    moving: str
    standing: str
    weight: float


VEHICLES = (
    Kind("vehicle.car", (4.6, 1.9, 1.65), "vehicle.moving", "vehicle.parked", 0.68),
    Kind("vehicle.truck", (7.2, 2.5, 3.0), "vehicle.moving", "vehicle.parked", 0.14),
    Kind("vehicle.bus.rigid", (11.0, 2.8, 3.3), "vehicle.moving", "vehicle.stopped", 0.06),
    Kind("vehicle.motorcycle", (2.1, 0.8, 1.45), "cycle.with_rider", "cycle.without_rider", 0.06),
    Kind("vehicle.bicycle", (1.75, 0.6, 1.4), "cycle.with_rider", "cycle.without_rider", 0.06),
)
PEDESTRIAN = Kind("human.pedestrian.adult", (0.7, 0.65, 1.75), "pedestrian.moving", "pedestrian.standing", 1.0)
CONE = Kind("movable_object.trafficcone", (0.4, 0.4, 0.8), "", "", 1.0)
KINDS = (*VEHICLES, PEDESTRIAN, CONE)


@dataclass(frozen=True)
class Thing:
    """One annotated object of a scene."""

    kind: Kind
    size_m: Float[np.ndarray, "3"]
    boxes: Boxes
    """In the frame of the thing, whose origin is on the ground below its centre."""
    route: Route

    @property
    def attribute(self) -> str:
        """nuScenes' attribute for what it does; "" for what has none."""
        return self.kind.moving if self.route.speed_mps else self.kind.standing


@dataclass(frozen=True)
class Traffic:
    """All things of a scene; their numbers are their places in the list."""

    things: tuple[Thing, ...]

    @cached_property
    def _rest(self) -> Boxes:
        return join([thing.boxes for thing in self.things])

    def boxes_at(self, time_s: float) -> Boxes:
        """Every box where it is at `time_s`."""
        poses = self.poses_at(time_s)[self._rest.thing]
        cos, sin = np.cos(poses[:, 2]), np.sin(poses[:, 2])
        x, y, z = self._rest.centre_m.T
        centre = np.stack([poses[:, 0] + cos * x - sin * y, poses[:, 1] + sin * x + cos * y, z], axis=-1)
        return self._rest.moved(centre, self._rest.yaw_rad + poses[:, 2])

    def poses_at(self, time_s: float) -> Float[np.ndarray, "n 3"]:
        """x, y and yaw of every thing."""
        return np.concatenate([thing.route.poses(np.array([time_s])) for thing in self.things])


def build_traffic(rng: np.random.Generator, ego: Route, duration_s: float) -> Traffic:
    """Things around the whole way of the ego."""
    times = np.arange(0, duration_s + _CHECK_S, _CHECK_S)
    way = ego.poses(times)
    placed: list[Thing] = []
    tracks: list[np.ndarray] = [way[:, :2]]
    radii: list[float] = [2.6]
    for kind, route in _propose(rng, way):
        track = route.poses(times)[:, :2]
        radius = 0.55 * kind.size_m[0]
        is_near = np.linalg.norm(track - way[:, :2], axis=1).min() < 70
        clear = all(
            np.linalg.norm(track - other, axis=1).min() > radius + reach for other, reach in zip(tracks, radii, strict=True)
        )
        if is_near and clear:
            placed.append(_build_thing(rng, kind, route, number=len(placed)))
            tracks.append(track)
            radii.append(radius)
    return Traffic(tuple(placed))


def _propose(rng: np.random.Generator, way: Float[np.ndarray, "k 3"]) -> Sequence[tuple[Kind, Route]]:
    """Many more things than there is room for, in the order in which they are tried."""
    weights = np.array([kind.weight for kind in VEHICLES])
    proposals: list[tuple[Kind, Route]] = []
    for _ in range(260):
        kind = VEHICLES[rng.choice(len(VEHICLES), p=weights / weights.sum())]
        proposals.append((kind, drive_straight(rng, speed_mps=float(rng.uniform(4, 10)))))
    for _ in range(500):
        kind = VEHICLES[rng.choice(len(VEHICLES), p=weights / weights.sum())]
        if kind.size_m[0] < 8:
            proposals.append((kind, _park(rng)))
    proposals += [(PEDESTRIAN, walk_on_pavement(rng, speed_mps=float(rng.uniform(0.8, 1.7)))) for _ in range(240)]
    proposals += [(CONE, _drop_cone(rng)) for _ in range(60)]
    middle = way[:, :2].mean(axis=0)
    return [p for p in proposals if np.linalg.norm(p[1].poses(np.zeros(1))[0, :2] - middle) < 200]


def _park(rng: np.random.Generator) -> Route:
    """At the kerb of a street, facing with the traffic of that side, clear of junctions."""
    side = rng.choice([-1.0, 1.0])
    street = rng.integers(1, BLOCKS) * BLOCK_M
    along = rng.integers(0, BLOCKS) * BLOCK_M + rng.uniform(15, BLOCK_M - 15)
    across = street + side * (HALF_STREET_M - PARKING_M / 2)
    if rng.random() < 0.5:
        return stand_still(along, across, 0.0 if side < 0 else np.pi)
    return stand_still(across, along, np.pi / 2 if side > 0 else -np.pi / 2)


def _drop_cone(rng: np.random.Generator) -> Route:
    across = rng.integers(1, BLOCKS) * BLOCK_M + rng.choice([-1.0, 1.0]) * (HALF_STREET_M + rng.uniform(0.3, PAVEMENT_M))
    along = rng.uniform(0, BLOCKS * BLOCK_M)
    x, y = (along, across) if rng.random() < 0.5 else (across, along)
    return stand_still(x, y, 0.0)


def _build_thing(rng: np.random.Generator, kind: Kind, route: Route, *, number: int) -> Thing:
    size = np.array(kind.size_m) * rng.uniform(0.92, 1.08, 3)
    colour = _paint_of(rng, kind)
    boxes = join(_parts(kind, size, colour, seed=int(rng.integers(1 << 30)), number=number))
    return Thing(kind, size, boxes, route)


def _parts(kind: Kind, size_m: Float[np.ndarray, "3"], colour: Float[np.ndarray, "3"], *, seed: int, number: int) -> list[Boxes]:
    length, width, height = size_m
    if kind is CONE:
        return [single((0, 0, height / 2), size_m, look=Look.CONE, colour=colour, seed=seed, thing=number)]
    if kind is PEDESTRIAN or kind.category in ("vehicle.motorcycle", "vehicle.bicycle"):
        return [single((0, 0, height / 2), size_m, look=Look.PERSON, colour=colour, seed=seed, thing=number)]
    if kind.category == "vehicle.car":
        deck = 0.56 * height
        return [
            single((0, 0, deck / 2 + 0.08), (length, width, deck - 0.16), look=Look.BODY, colour=colour, seed=seed, thing=number),
            single(
                (-0.05 * length, 0, (deck + height) / 2),
                (0.56 * length, 0.88 * width, height - deck),
                look=Look.CABIN,
                colour=colour,
                seed=seed,
                thing=number,
            ),
        ]
    if kind.category == "vehicle.truck":
        cab = 0.28 * length
        return [
            single(
                (-cab / 2, 0, height / 2 + 0.2),
                (length - cab - 0.2, width, height - 0.4),
                look=Look.BODY,
                colour=np.array([0.75, 0.75, 0.72]),
                seed=seed,
                thing=number,
            ),
            single(
                ((length - cab) / 2, 0, 0.38 * height + 0.1),
                (cab, 0.95 * width, 0.76 * height - 0.2),
                look=Look.CABIN,
                colour=colour,
                seed=seed,
                thing=number,
            ),
        ]
    return [
        single((0, 0, height / 2 + 0.12), (length, width, height - 0.24), look=Look.CABIN, colour=colour, seed=seed, thing=number)
    ]


def _paint_of(rng: np.random.Generator, kind: Kind) -> Float[np.ndarray, "3"]:
    if kind is CONE:
        return np.array([0.9, 0.35, 0.08])
    palette = np.array(
        [
            [0.78, 0.78, 0.78],
            [0.12, 0.12, 0.13],
            [0.45, 0.47, 0.50],
            [0.60, 0.10, 0.10],
            [0.12, 0.22, 0.50],
            [0.75, 0.60, 0.15],
            [0.15, 0.40, 0.25],
        ]
    )
    return palette[rng.integers(len(palette))] * rng.uniform(0.85, 1.1)
