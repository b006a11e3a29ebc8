"""Batches in memory that is used again: never written over while they are read, and few places however many batches."""

import hashlib
import os
import time
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

import numpy as np
import pytest

from trainer.data.loader import PlacedSamples, PlaceSampler, read_batches
from trainer.data.order import Order, Portion, Share
from trainer.data.shared_ring import Memory, SharedMemory, shared_memories
from trainer.data.source import Room, Sample, new_room


class LargeSource:
    """Samples of 1 MB that are nothing but their number."""

    offers = frozenset({"image", "worker"})

    def __len__(self) -> int:
        return 50

    def name(self, index: int) -> str:
        return str(index)

    def load(self, index: int, rng: np.random.Generator, room: Room = new_room) -> Sample:
        image = room("image", (1, 3, 512, 700))
        image[...] = rng.integers(0, 255, image.shape, dtype=np.uint8)
        return {"image": image, "worker": np.array(os.getpid())}

    def describe(self) -> dict[str, float | int | str]:
        return {}


class KeepAll:
    """Keeps the image."""

    needs = keeps = frozenset({"image", "worker"})

    def prepare(self, sample: Sample, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {"doubled": sample["image"] // 2}


def digests(workers: int, *, slow: bool = False, prefetch_batches: int = 2, reads_in_flight: int = 3) -> list[str]:
    """Of each batch, read as training does: looked at until the next one is taken."""
    samples = PlacedSamples(LargeSource(), Order(0, (Portion(50),), 2), {"all": KeepAll()})
    found = []
    for batch in read_batches(
        samples,
        PlaceSampler(Share(0, 1, 2, 1), 0, 14),
        workers=workers,
        prefetch_batches=prefetch_batches,
        reads_in_flight=reads_in_flight,
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


@pytest.mark.parametrize("reads_in_flight", [1, 2, 7])
def test_reading_further_ahead_overwrites_nothing(reads_in_flight: int) -> None:
    assert digests(1, slow=True, prefetch_batches=1, reads_in_flight=reads_in_flight) == digests(0)


def test_memories_are_as_many_as_may_be_under_way() -> None:
    # one asked for and ready, the one in hand, two read ahead of what is asked, one to spare
    assert len(shared_memories(1, batches_ahead=2)) == 1 + 1 + 2 + 1


def there_and_back(lay: Callable[[SharedMemory], tuple[int, int]]) -> tuple[dict[str, np.ndarray], Any]:
    """What this process receives of what a forked one has laid."""
    memory = SharedMemory()
    near_end, far_end = get_context("fork").Pipe()
    process = get_context("fork").Process(target=lambda: far_end.send(lay(memory)))
    process.start()
    received = memory.receive(*near_end.recv())
    process.join()
    return received


def test_arrays_that_another_process_has_laid_come_as_they_are() -> None:
    arrays = {
        "image": np.arange(3 << 20, dtype=np.uint8).reshape(3, 1024, 1024),
        "scene": np.array(7),
        "none": np.empty((0, 4), dtype=np.float32),
        "poses": np.random.default_rng(0).random((5, 4, 4)),
    }

    def lay(memory: SharedMemory) -> tuple[int, int]:
        for name, array in arrays.items():
            memory.array(name, array.shape, array.dtype)[...] = array
        memory.array("not sent", (9,), np.dtype(np.int64))
        return memory.send(list(arrays), "the rest")

    received, rest = there_and_back(lay)
    assert rest == "the rest" and received.keys() == arrays.keys()
    for name, array in arrays.items():
        assert received[name].dtype == array.dtype and np.array_equal(received[name], array)


def test_only_what_is_large_lies_in_memory_that_is_used_again() -> None:
    memory = SharedMemory()
    laid = {name: memory.array(name, (count,), np.dtype(np.uint8)) for name, count in (("small", 1 << 10), ("large", 1 << 20))}
    received, _ = memory.receive(*memory.send(list(laid), None))
    assert np.may_share_memory(received["large"], laid["large"]) and not np.may_share_memory(received["small"], laid["small"])


@pytest.mark.parametrize("kind", [Memory, SharedMemory])
def test_arrays_that_lie_in_their_batch_are_not_copied_and_others_are(kind: type[Memory]) -> None:
    memory = kind()
    batch = memory.array("image", (2, 3, 5), np.dtype(np.uint8))
    batch[0], batch[1] = 1, 2
    assert np.may_share_memory(memory.stack("image", [batch[0], batch[1]]), batch)
    assert batch[0].max() == 1 and batch[1].min() == 2
    others = [np.full((3, 5), value) for value in (4, 5)]
    assert np.array_equal(memory.stack("other", others), np.stack(others))


def test_samples_of_unequal_shapes_are_no_batch() -> None:
    with pytest.raises(ValueError, match="same shape"):
        SharedMemory().stack("image", [np.zeros(3), np.zeros(1)])
