"""The loader: the same samples whatever the ranks and workers, and broken clips replaced, not fatal."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from multiprocessing import active_children
from typing import Any

import numpy as np
import pytest
import torch

from models.batch import Batch
from trainer.data.loader import PlacedSamples, PlaceSampler, check_needs, read_batches
from trainer.data.mixed_source import portions_of
from trainer.data.order import Order, Portion, Share
from trainer.data.source import Room, Sample, new_room
from trainer.errors import ClipError, DataError, OdonataError, RetryError
from trainer.store.base import StoreError

GLOBAL_BATCH = 8


class NumberSource:
    """A source whose sample tells its index and one draw of its stream; `broken` ones cannot be read."""

    offers = frozenset({"index", "draw"})

    def __init__(self, length: int = 100, broken: frozenset[int] = frozenset()) -> None:
        self.length = length
        self.broken = broken

    def __len__(self) -> int:
        return self.length

    def name(self, index: int) -> str:
        return f"number {index}"

    def load(self, index: int, rng: np.random.Generator, room: Room = new_room) -> Sample:
        if index in self.broken:
            raise ClipError(self.name(index), "broken on purpose")
        return {"index": np.array(index), "draw": np.array(rng.random())}

    def describe(self) -> dict[str, float | int | str]:
        return {"samples": self.length}


class DrawPreparation:
    """Prepares one random number."""

    needs = keeps = frozenset({"index", "draw"})

    def prepare(self, sample: Mapping[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        del sample
        return {"mask": rng.permutation(5)}


def samples(source: NumberSource | None = None) -> PlacedSamples:
    source = source or NumberSource()
    return PlacedSamples(source, Order(7, portions_of(source), GLOBAL_BATCH), {"draws": DrawPreparation()})


def load(
    share: Share, *, workers: int = 0, first: int = 0, last: int = 3, source: NumberSource | None = None, **settings: Any
) -> list[Batch]:
    sampler = PlaceSampler(share, first, last)
    return list(read_batches(samples(source), sampler, workers=workers, prefetch_batches=2, **settings))


def as_step(batches: list[Batch]) -> set[tuple[float, ...]]:
    """The samples of batches as a set: index, its draw, its mask."""
    return {
        (float(index), float(draw), *mask.tolist())
        for batch in batches
        for index, draw, mask in zip(batch.shared["index"], batch.shared["draw"], batch.prepared["draws"]["mask"], strict=True)
    }


def test_a_step_is_the_same_on_1_2_and_4_ranks_with_and_without_accumulation() -> None:
    alone = as_step(load(Share(0, 1, GLOBAL_BATCH, 1), first=2, last=3))
    for world in (2, 4):
        for micro_steps in (1, 2):
            micro_batch = GLOBAL_BATCH // world // micro_steps
            ranks = [load(Share(rank, world, micro_batch, micro_steps), first=2, last=3) for rank in range(world)]
            assert as_step([batch for rank in ranks for batch in rank]) == alone


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("reads_in_flight", [1, 3])
@pytest.mark.parametrize("first", [0, 2])
def test_workers_threads_and_a_late_start_change_nothing(workers: int, reads_in_flight: int, first: int) -> None:
    share = Share(1, 2, 2, 2)  # the second of two ranks, two micro-steps of two samples
    expected = load(share, last=5)[2 * first :]
    found = load(share, workers=workers, reads_in_flight=reads_in_flight, first=first, last=5)
    assert [batch.clips for batch in found] == [batch.clips for batch in expected]
    for left, right in zip(found, expected, strict=True):
        assert left.shared.keys() == right.shared.keys()
        assert all(torch.equal(left.shared[name], right.shared[name]) for name in right.shared)
        assert torch.equal(left.prepared["draws"]["mask"], right.prepared["draws"]["mask"])


def test_batches_of_workers_can_be_kept_where_they_are_small() -> None:
    kept = load(Share(0, 1, GLOBAL_BATCH, 1), workers=1, last=20)
    assert as_step(kept) == as_step(load(Share(0, 1, GLOBAL_BATCH, 1), last=20))


def test_a_broken_clip_is_replaced_by_the_same_other_one_and_named() -> None:
    broken = frozenset(range(0, 100, 4))
    first, second = (load(Share(0, 1, GLOBAL_BATCH, 1), source=NumberSource(broken=broken)) for _ in range(2))
    read = [int(index) for batch in first for index in batch.shared["index"]]
    assert not broken & set(read)
    assert [batch.clips for batch in first] == [batch.clips for batch in second]
    replaced = [reason for batch in first for reason in batch.replaced]
    assert replaced and all("broken on purpose" in reason for reason in replaced)
    wanted = [Order(7, (Portion(100),), GLOBAL_BATCH).sample(step, slot) for step in range(3) for slot in range(GLOBAL_BATCH)]
    assert len(replaced) >= sum(index in broken for index in wanted) > 0


def test_samples_that_are_not_broken_do_not_move_when_others_are() -> None:
    whole = load(Share(0, 1, GLOBAL_BATCH, 1))
    damaged = load(Share(0, 1, GLOBAL_BATCH, 1), source=NumberSource(broken=frozenset({whole[0].shared["index"][0].item()})))
    assert damaged[0].clips[0] != whole[0].clips[0]
    assert damaged[0].clips[1:] == whole[0].clips[1:]


def test_a_source_that_is_all_broken_ends_with_a_sentence() -> None:
    source = NumberSource(length=5, broken=frozenset(range(5)))
    with pytest.raises(DataError, match="in a row could not be read"):
        load(Share(0, 1, GLOBAL_BATCH, 1), source=source)


def test_an_objective_whose_fields_are_not_offered_is_refused() -> None:
    preparation = DrawPreparation()
    preparation.needs = frozenset({"index", "lidar_points"})
    with pytest.raises(DataError, match=r"missing: \['lidar_points'\]"):
        check_needs({"draws": preparation}, NumberSource(), origin="numbers")


class FailingSource(NumberSource):
    """Reads a few samples, then does what it is told to instead."""

    def __init__(self, harm: Callable[[], object]) -> None:
        super().__init__()
        self.harm = harm
        self.reads = 0

    def load(self, index: int, rng: np.random.Generator, room: Room = new_room) -> Sample:
        self.reads += 1
        if self.reads > GLOBAL_BATCH:
            self.harm()
        return super().load(index, rng, room)


def fail_with(error: Exception) -> Callable[[], object]:
    def fail() -> None:
        raise error

    return fail


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("error", [DataError("no such camera"), StoreError("the store is gone"), RetryError("start again")])
def test_an_error_of_ours_keeps_its_class_and_sentence_from_a_worker(workers: int, error: OdonataError) -> None:
    with pytest.raises(type(error)) as caught:
        load(Share(0, 1, GLOBAL_BATCH, 1), workers=workers, source=FailingSource(fail_with(error)))
    assert type(caught.value) is type(error) and str(caught.value) == str(error)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_defect_of_ours_stays_one(workers: int) -> None:
    with pytest.raises(ZeroDivisionError):
        load(Share(0, 1, GLOBAL_BATCH, 1), workers=workers, source=FailingSource(fail_with(ZeroDivisionError("a slip"))))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_that_does_not_answer_is_waited_for_as_long_as_asked_and_no_longer(workers: int) -> None:
    source, began = FailingSource(lambda: time.sleep(60)), time.monotonic()
    with pytest.raises(RetryError, match=r"was waited for and did not come in 1 s \(data\.timeout_s\).*raise data\.timeout_s"):
        load(Share(0, 1, GLOBAL_BATCH, 1), workers=workers, source=source, timeout_s=1.0)
    assert time.monotonic() - began < 20
    assert not active_children()


def test_a_batch_of_samples_that_are_each_in_time_may_still_be_late() -> None:
    source = FailingSource(lambda: time.sleep(0.6))
    with pytest.raises(RetryError, match=r"a batch was waited for and did not come in 1 s"):
        load(Share(0, 1, GLOBAL_BATCH, 1), workers=1, source=source, timeout_s=1.0)
    assert not active_children()


def test_a_worker_that_the_kernel_killed_is_a_reason_to_start_again() -> None:
    source = FailingSource(lambda: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(RetryError, match=r"a loader process is gone .*killed for memory.*less of data\.workers"):
        load(Share(0, 1, GLOBAL_BATCH, 1), workers=2, source=source)
    assert not active_children()


class CoreSource(NumberSource):
    """Tells the cores that the process reading it may use."""

    def load(self, index: int, rng: np.random.Generator, room: Room = new_room) -> Sample:
        return {"index": np.array(len(os.sched_getaffinity(0))), "draw": np.array(min(os.sched_getaffinity(0)))}


def test_a_worker_and_its_threads_run_on_the_core_they_are_given() -> None:
    core = max(os.sched_getaffinity(0))
    (batch,) = load(Share(0, 1, GLOBAL_BATCH, 1), last=1, workers=1, source=CoreSource(), cores=(core,))
    assert (batch.shared["index"] == 1).all() and (batch.shared["draw"] == core).all()


@pytest.mark.parametrize("seed", range(4))
def test_workers_frozen_at_any_moment_end_the_run_in_time(seed: int) -> None:
    batches = read_batches(samples(), PlaceSampler(Share(0, 1, GLOBAL_BATCH, 1), 0, 10**6), workers=2, timeout_s=0.5)
    next(batches)
    pids = [process.pid for process in active_children() if process.pid]
    delay_s = random.Random(seed).uniform(0, 0.1)
    freezing = threading.Timer(delay_s, lambda: [os.kill(pid, signal.SIGSTOP) for pid in pids[seed % 2 :]])
    freezing.start()
    began = time.monotonic()
    with pytest.raises(RetryError, match=r"was waited for and did not come in 0\.5 s"):
        deque(batches, maxlen=0)
    assert time.monotonic() - began < delay_s + 5
    freezing.join()
    assert not active_children()


def test_batches_that_nobody_takes_do_not_keep_the_interpreter() -> None:
    code = (
        "from tests.trainer.data.test_loader import *\n"
        "kept = [read_batches(samples(), PlaceSampler(Share(0, 1, 8, 1), 0, 9), workers=1) for _ in range(2)]\n"
        "next(kept[0])"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
