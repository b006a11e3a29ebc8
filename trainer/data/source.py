"""Clip, the sample noun, and Source, where samples come from.

A source is an addressable list: sample i is a pure function of (i, random stream), so the order, the world size and the
number of workers are nobody's business here (`order.py`, `loader.py`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int64, UInt8


@dataclass(frozen=True)
class Clip:
    """T timestamps of V cameras; frames and pixels as docs/architecture.md has them.

    Every image has its own timestamp and so its own `world_from_ego`. The intrinsics belong to `images` as they are:
    whoever crops, resizes or flips the pixels moves them too.
    """

    name: str
    """What logs call it: scene, time and cameras."""
    images: UInt8[np.ndarray, "T V 3 H W"]
    pix_from_cam: Float[np.ndarray, "T V 3 3"]
    """Intrinsics; pixel centres at +0.5."""
    ego_from_cam: Float[np.ndarray, "T V 4 4"]
    world_from_ego: Float[np.ndarray, "T V 4 4"]
    """Pose of the car at the timestamp of each image, float64."""
    timestamp_us: Int64[np.ndarray, "T V"]


Sample = Mapping[str, np.ndarray]
"""Fields by name; what each means stands in models.batch. Those that an objective keeps for the device have a fixed shape."""

Room = Callable[[str, tuple[int, ...]], UInt8[np.ndarray, "..."]]
"""Gives an array of a shape to the pixels of a field: where its batch will have them, which spares a copy."""


def new_room(field: str, shape: tuple[int, ...]) -> UInt8[np.ndarray, "..."]:
    """Room for a sample that stands alone."""
    del field
    return np.empty(shape, dtype=np.uint8)


@runtime_checkable
class Source(Protocol):
    """Samples by number."""

    @property
    def offers(self) -> frozenset[str]:
        """Names of the fields that `load` returns."""
        ...

    def __len__(self) -> int:
        """How many samples there are to draw from."""
        ...

    def name(self, index: int) -> str:
        """What logs call sample `index`, without reading it."""
        ...

    def load(self, index: int, rng: np.random.Generator, room: Room = new_room) -> Sample:
        """Read and augment sample `index`, its pixels in `room`; every random choice comes from `rng`.

        ClipError if it cannot be read; `room` then holds anything.
        """
        ...

    def describe(self) -> dict[str, float | int | str]:
        """Figures about the whole source for the log and environment.json: scenes, samples, overlap quantiles."""
        ...
