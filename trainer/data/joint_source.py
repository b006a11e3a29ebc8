"""Several sources as one: for runs whose objectives read different fields, such as pairs and surround clips.

Sample i joins sample i of the longest source with sample i modulo their length of the others; `order.py` shuffles i, so each
source is walked evenly. A sample that cannot be read in one of them is replaced in all.
"""

from dataclasses import dataclass

import numpy as np

from trainer.data.source import Room, Sample, Source, new_room


@dataclass(frozen=True)
class JointSource:
    """Samples with the fields of all `parts`, which offer different ones."""

    parts: tuple[Source, ...]

    @property
    def offers(self) -> frozenset[str]:
        """As Source has it."""
        return frozenset[str]().union(*(part.offers for part in self.parts))

    def __len__(self) -> int:
        return max(len(part) for part in self.parts)

    def name(self, index: int) -> str:
        """As Source has it."""
        return ", ".join(part.name(index % len(part)) for part in self.parts)

    def load(self, index: int, rng: np.random.Generator, room: Room = new_room) -> Sample:
        """As Source has it."""
        sample: dict[str, np.ndarray] = {}
        for part in self.parts:
            sample |= part.load(index % len(part), rng, room)
        return sample

    def describe(self) -> dict[str, float | int | str]:
        """As Source has it; a figure that the parts disagree on is that of the longest."""
        figures: dict[str, float | int | str] = {}
        for part in sorted(self.parts, key=len):
            figures |= part.describe()
        return figures
