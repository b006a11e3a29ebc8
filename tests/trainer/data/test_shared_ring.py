"""Batches in memory that is used again: never written over while they are read, and few places however many batches."""

import hashlib
import os
import time

import numpy as np
import pytest

from trainer.data.loader import PlacedSamples, PlaceSampler, read_batches
from trainer.data.order import Order, Portion, Share
from trainer.data.shared_ring import SharedRing
from trainer.data.source import Sample


class LargeSource:
    """Samples of 1 MB that are nothing but their number."""

    offers = frozenset({"image", "worker"})

    def __len__(self) -> int:
        return 50

    def name(self, index: int) -> str:
        return str(index)

    def load(self, index: int, rng: np.random.Generator) -> Sample:
        return {"image": rng.integers(0, 255, (1, 3, 512, 700), dtype=np.uint8), "worker": np.array(os.getpid())}

    def describe(self) -> dict[str, float | int | str]:
        return {}


class KeepAll:
    """Keeps the image."""

    needs = keeps = frozenset({"image", "worker"})

    def prepare(self, sample: Sample, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {"doubled": sample["image"] // 2}


def digests(workers: int, *, slow: bool = False, prefetch_batches: int = 2) -> list[str]:
    """Of each batch, read as training does: looked at until the next one is taken."""
    samples = PlacedSamples(LargeSource(), Order(0, (Portion(50),), 2), {"all": KeepAll()})
    found = []
    for batch in read_batches(
        samples, PlaceSampler(Share(0, 1, 2, 1), 0, 14), workers=workers, prefetch_batches=prefetch_batches, reads_in_flight=3
    ):
        before = hashlib.sha256(batch.shared["image"].numpy().tobytes()).hexdigest()
        if slow:
            time.sleep(0.05)  # the workers get as far ahead as they may
        after = hashlib.sha256(batch.shared["image"].numpy().tobytes()).hexdigest()
        doubled = hashlib.sha256(batch.prepared["all"]["doubled"].numpy().tobytes()).hexdigest()
        found.append(f"{before} {after} {doubled}")
    return found


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("prefetch_batches", [1, 3])
def test_a_batch_stays_as_it_is_until_the_next_one_is_taken(workers: int, prefetch_batches: int) -> None:
    found = digests(workers, slow=True, prefetch_batches=prefetch_batches)
    assert found == digests(0)
    assert all(before == after for before, after, _ in map(str.split, found))


def test_large_arrays_take_turns_in_as_many_places_as_may_be_under_way() -> None:
    ring, image = SharedRing(prefetch_batches=3), np.ones((3, 600, 600), dtype=np.uint8)
    places = []
    for _ in range(20):
        ring.next_batch()
        places.append(ring.stack("image", [image, image]).data_ptr())
    assert len(set(places)) == 3 + 2
    assert all(place not in places[max(0, n - 4) : n] for n, place in enumerate(places))


def test_small_arrays_and_other_shapes_get_memory_of_their_own() -> None:
    ring = SharedRing(prefetch_batches=1)
    small = np.zeros(3)
    assert not ring.stack("small", [small]).is_shared()
    first = ring.stack("image", [np.ones((2, 800, 800), np.uint8)])
    other = ring.stack("image", [np.ones((3, 800, 800), np.uint8)])
    assert first.is_shared() and other.is_shared() and first.shape != other.shape
    assert first.eq(1).all()
