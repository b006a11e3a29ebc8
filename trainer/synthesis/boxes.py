"""Everything that stands in the world is made of upright boxes with a yaw: their poses, looks, and rays against them.

A thing (a car, a tree, a house) is one or more boxes that share a thing number; things that move carry a route. Shapes:
K boxes, M rays. Rays are cast with the slab method (Kay and Kajiya 1986) in the frame of the box.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from enum import IntEnum

import numpy as np
from jaxtyping import Float, Int

from trainer.synthesis.pose import multiply

Vector = Sequence[float | int] | Float[np.ndarray, "3"]


class Look(IntEnum):
    """How the surface of a box is painted (`paint.py`)."""

    FACADE = 0
    BODY = 1
    CABIN = 2
    PERSON = 3
    POLE = 4
    LEAVES = 5
    CONE = 6


@dataclass(frozen=True)
class Boxes:
    """K boxes at one instant."""

    centre_m: Float[np.ndarray, "K 3"]
    half_m: Float[np.ndarray, "K 3"]
    """Half of length (along the yaw), width and height."""
    yaw_rad: Float[np.ndarray, " K"]
    look: Int[np.ndarray, " K"]
    colour: Float[np.ndarray, "K 3"]
    """Linear in [0, 1]."""
    seed: Int[np.ndarray, " K"]
    """Varies the painting of boxes of one look."""
    thing: Int[np.ndarray, " K"]
    """Number of the thing that the box belongs to; -1 for what nobody annotates."""

    def __len__(self) -> int:
        return len(self.yaw_rad)

    def take(self, rows: Int[np.ndarray, " n"] | slice) -> "Boxes":
        """Some of the boxes."""
        return Boxes(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def moved(self, centre_m: Float[np.ndarray, "K 3"], yaw_rad: Float[np.ndarray, " K"]) -> "Boxes":
        """The same boxes elsewhere."""
        return replace(self, centre_m=centre_m, yaw_rad=yaw_rad)

    def corners_m(self) -> Float[np.ndarray, "K 8 3"]:
        """World coordinates of all corners."""
        signs = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
        return self.to_world(self.half_m[:, None] * signs, np.arange(len(self))[:, None])

    def to_world(self, local_m: Float[np.ndarray, "*n 3"], box: Int[np.ndarray, "*n"]) -> Float[np.ndarray, "*n 3"]:
        """World coordinates of points given in the frames of their boxes."""
        cos, sin = np.cos(self.yaw_rad[box]), np.sin(self.yaw_rad[box])
        x, y, z = np.moveaxis(local_m, -1, 0)
        return np.stack([cos * x - sin * y, sin * x + cos * y, z + 0 * cos], axis=-1) + self.centre_m[box]

    def to_local(self, world_m: Float[np.ndarray, "n 3"], box: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n 3"]:
        """Coordinates in the frames of their boxes of points in the world."""
        x, y, z = (world_m - self.centre_m[box]).T
        cos, sin = np.cos(self.yaw_rad[box]), np.sin(self.yaw_rad[box])
        return np.stack([cos * x + sin * y, -sin * x + cos * y, z], axis=-1)

    def cast(self, box: int, origin_m: Float[np.ndarray, "3"], directions: Float[np.ndarray, "M 3"]) -> Float[np.ndarray, " M"]:
        """How far along each ray box `box` is entered, in units of the direction; infinity where it is not."""
        cos, sin = np.cos(self.yaw_rad[box]), np.sin(self.yaw_rad[box])
        turn = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])  # row vectors: local = world @ turn
        start = multiply(origin_m - self.centre_m[box], turn)
        heading = multiply(directions, turn)
        heading = np.where(np.abs(heading) < 1e-12, 1e-12, heading)  # a ray along a face never meets it
        reach = np.sign(heading) * self.half_m[box]
        entered = ((-reach - start) / heading).max(axis=1)
        left = ((reach - start) / heading).min(axis=1)
        return np.where((entered <= left) & (entered > 0.05), entered, np.inf)


def join(parts: Sequence[Boxes]) -> Boxes:
    """All boxes of `parts`, one after the other."""
    return Boxes(**{field.name: np.concatenate([getattr(p, field.name) for p in parts]) for field in fields(Boxes)})


def single(
    centre_m: Vector,
    size_m: Vector,
    *,
    yaw_rad: float = 0.0,
    look: Look,
    colour: Vector,
    seed: int = 0,
    thing: int = -1,
) -> Boxes:
    """One box of length, width and height `size_m`."""
    return Boxes(
        centre_m=np.array([centre_m], dtype=np.float64),
        half_m=np.array([size_m], dtype=np.float64) / 2,
        yaw_rad=np.array([yaw_rad], dtype=np.float64),
        look=np.array([look], dtype=np.int64),
        colour=np.array([colour], dtype=np.float64),
        seed=np.array([seed], dtype=np.int64),
        thing=np.array([thing], dtype=np.int64),
    )
