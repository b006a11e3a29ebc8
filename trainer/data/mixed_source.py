"""Several data sets as one, mixed by weight.

Sample numbers of the parts stand on end; which part a place of the run draws from, and how often, is decided by `order.py`.
"""

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np

from trainer.data.order import Portion
from trainer.data.source import Room, Sample, Source, new_room


@dataclass(frozen=True)
class MixedSource:
    """The samples of all `parts`, which offer the same fields."""

    parts: tuple[Source, ...]
    weights: tuple[float, ...]

    @property
    def offers(self) -> frozenset[str]:
        """As Source has it."""
        return frozenset.intersection(*(part.offers for part in self.parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def name(self, index: int) -> str:
        """As Source has it."""
        part, number = self.find(index)
        return part.name(number)

    def load(self, index: int, rng: np.random.Generator, room: Room = new_room) -> Sample:
        """As Source has it."""
        part, number = self.find(index)
        return part.load(number, rng, room)

    def describe(self) -> dict[str, float | int | str]:
        """As Source has it: the figures of each part, numbered."""
        figures: dict[str, float | int | str] = {"samples": len(self)}
        for place, part in enumerate(self.parts):
            figures |= {f"{name}_{place}": value for name, value in part.describe().items()}
        return figures

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(len(part) for part in self.parts))

    def find(self, index: int) -> tuple[Source, int]:
        """The part that sample `index` is of, and its number there."""
        place = bisect_right(self._ends, index)
        return self.parts[place], index - (self._ends[place - 1] if place else 0)


def portions_of(source: Source) -> tuple[Portion, ...]:
    """What an order draws from."""
    if isinstance(source, MixedSource):
        return tuple(Portion(len(part), weight) for part, weight in zip(source.parts, source.weights, strict=True))
    return (Portion(len(source)),)
