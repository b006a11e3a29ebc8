"""Which sample stands where, and the random stream it gets: pure functions of (seed, step, slot).

A step of the run takes `global_batch` slots. Slot s of step k holds number k * global_batch + s of an endless walk through
the data; every epoch of the walk is another permutation of all samples. The permutation is computed, not stored: a
four-round Feistel network on the smallest even number of bits that holds the index, walked until it lands inside (Black
and Rogaway 2002, cycle walking), so memory does not grow with the data and a resume needs one integer.

Data sets are mixed in blocks of 1,024 numbers: each has its share of every block, rounded to whole numbers, scattered over it by
another permutation, and walks through its own samples in its own epochs.

Random numbers come from Philox (Salmon et al. 2011), a counter-based generator: the counter is (step, slot, attempt), so
no stream depends on how many numbers another one took, on the world size or on the worker that draws it.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property, lru_cache
from itertools import accumulate

import numpy as np

_MASK_64 = (1 << 64) - 1
_FEISTEL_ROUNDS = 4
_BLOCK = 1024


class Purpose(IntEnum):
    """What a stream is for; each has its own key, so that a new use does not move the old ones."""

    LOAD = 1
    REPLACE = 2
    PREPARE = 3


def random_stream(seed: int, purpose: Purpose, *, step: int, slot: int, attempt: int = 0) -> np.random.Generator:
    """The generator for one purpose at one place of the run."""
    bits = np.random.Philox(key=[seed, int(purpose)], counter=[0, attempt, slot, step])
    return np.random.Generator(bits)


@dataclass(frozen=True)
class Portion:
    """One data set of a mixture."""

    length: int
    """Samples in it."""
    weight: float = 1.0
    """Its share of the run, against the weights of the others."""


@dataclass(frozen=True)
class Order:
    """The endless walk through the samples of `portions`, whose numbers stand on end, in steps of `global_batch`."""

    seed: int
    portions: tuple[Portion, ...]
    global_batch: int

    def sample(self, step: int, slot: int) -> int:
        """Index of the sample at `slot` of `step`."""
        portion, number = self._draw(step, slot)
        length = self.portions[portion].length
        epoch, place = divmod(number, length)
        return self._first[portion] + permuted(place, length, key=_mix(self.seed ^ _mix(epoch) ^ portion))

    def replacement(self, step: int, slot: int, attempt: int) -> int:
        """Index to try when the sample at this place could not be read for the `attempt`-th time, from 1; of the same portion."""
        stream = random_stream(self.seed, Purpose.REPLACE, step=step, slot=slot, attempt=attempt)
        portion, _ = self._draw(step, slot)
        return self._first[portion] + int(stream.integers(self.portions[portion].length))

    def _draw(self, step: int, slot: int) -> tuple[int, int]:
        """The portion that this place draws from, and how many it has drawn from it before."""
        block, place = divmod(step * self.global_batch + slot, _BLOCK)
        portion, earlier = _scatter(self._quotas, _mix(self.seed ^ _mix(~block & _MASK_64)))[place]
        return portion, block * self._quotas[portion] + earlier

    @cached_property
    def _first(self) -> tuple[int, ...]:
        return (0, *accumulate(portion.length for portion in self.portions))

    @cached_property
    def _quotas(self) -> tuple[int, ...]:
        return tuple(share_out(_BLOCK, [portion.weight for portion in self.portions]))


@dataclass(frozen=True)
class Share:
    """The slots of a step that belong to one rank, micro-batch by micro-batch."""

    rank: int
    world_size: int
    micro_batch: int
    micro_steps: int

    def slots(self, micro_step: int) -> range:
        """Micro-batch m of rank r is block number m * world_size + r of the step."""
        first = (micro_step * self.world_size + self.rank) * self.micro_batch
        return range(first, first + self.micro_batch)


def share_out(count: int, weights: Sequence[float]) -> list[int]:
    """`count` things by `weights`, at least one each, by largest remainders."""
    assert len(weights) <= count
    exact = [(count - len(weights)) * weight / sum(weights) for weight in weights]
    shares = [1 + int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda place: int(exact[place]) - exact[place])
    for place in by_remainder[: count - sum(shares)]:
        shares[place] += 1
    return shares


@lru_cache(maxsize=16)
def _scatter(quotas: tuple[int, ...], key: int) -> list[tuple[int, int]]:
    """For every place of a block the portion that it draws from, and how many places before it do."""
    ends = list(accumulate(quotas))
    drawn = [0] * len(quotas)
    places = []
    for place in range(_BLOCK):
        portion = bisect_right(ends, permuted(place, _BLOCK, key=key))
        places.append((portion, drawn[portion]))
        drawn[portion] += 1
    return places


def permuted(place: int, length: int, *, key: int) -> int:
    """Where a pseudo-random permutation of range(length), chosen by `key`, sends `place`."""
    half_bits = max(1, ((length - 1).bit_length() + 1) // 2)
    while True:
        place = _feistel(place, half_bits, key)
        if place < length:
            return place


def _feistel(value: int, half_bits: int, key: int) -> int:
    mask = (1 << half_bits) - 1
    left, right = value >> half_bits, value & mask
    for round_number in range(_FEISTEL_ROUNDS):
        left, right = right, left ^ (_mix(key + round_number * 0x9E3779B97F4A7C15 + right) & mask)
    return left << half_bits | right


def _mix(value: int) -> int:
    """The finaliser of splitmix64: every bit of the input moves half of the output's."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK_64
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & _MASK_64
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & _MASK_64
    return value ^ value >> 31
