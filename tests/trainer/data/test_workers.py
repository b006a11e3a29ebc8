"""Loader processes: a core for each where there are enough, and what it means to lose one."""

import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from multiprocessing import get_context

import numpy as np
import psutil
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from trainer.data.shared_ring import Memory, shared_memories
from trainer.data.workers import Made, Worker, choose_cores, end_workers, start_workers
from trainer.errors import RetryError


def test_every_rank_keeps_a_core_and_every_worker_has_one_of_its_own() -> None:
    available = {3, 4, 5, 6, 10, 11, 12, 13, 20}
    of_ranks = [choose_cores(3, local_rank=rank, local_world_size=2, available=available) for rank in range(2)]
    assert of_ranks == [(4, 5, 6), (11, 12, 13)]
    assert choose_cores(0, local_rank=0, local_world_size=1, available={0}) == ()


@pytest.mark.parametrize(("workers", "ranks", "cores"), [(1, 1, 1), (3, 2, 7), (2, 8, 16)])
def test_with_too_few_cores_the_kernel_places_workers(workers: int, ranks: int, cores: int) -> None:
    assert choose_cores(workers, local_rank=0, local_world_size=ranks, available=range(cores)) == ()


class StubbornError(Exception):
    """Pickles, and does not come back."""

    def __init__(self, one: int, other: int) -> None:
        super().__init__(f"{one} and {other}")


def worker_of(batches: Callable[[], Iterator[int]]) -> Worker:
    """A worker whose batches are numbers."""

    def make(worker: int, memories: Iterator[Memory]) -> Iterator[Made]:
        for number, memory in zip(batches(), memories, strict=False):
            memory.clear()
            yield Made({"large": memory.stack("large", [np.full(1 << 20, number, dtype=np.uint8)])}, number)

    (worker,) = start_workers(make, [shared_memories(1, batches_ahead=0)], cores=())
    return worker


@contextmanager
def running(batches: Callable[[], Iterator[int]]) -> Iterator[Worker]:
    worker = worker_of(batches)
    try:
        yield worker
    finally:
        end_workers([worker])
        assert not worker.process.is_alive()


def test_batches_come_when_they_are_asked_for() -> None:
    with running(count) as worker:
        for number in range(7):
            worker.ask()
            made = worker.take(10.0)
            assert made.rest == number and (made.arrays["large"] == number).all()
        with pytest.raises(RetryError, match=r"a batch was waited for and did not come in 0\.2 s"):
            worker.take(0.2)


def test_a_worker_keeps_no_threads_for_linear_algebra() -> None:
    def count_threads() -> Iterator[int]:
        yield max(library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas")

    with threadpool_limits(2), running(count_threads) as worker:
        worker.ask()
        assert worker.take(10.0).rest == 1


@pytest.mark.parametrize("moment", ["idle", "reading", "answering"])
def test_a_frozen_worker_keeps_nobody_waiting_longer_than_asked(moment: str) -> None:
    def read() -> Iterator[int]:
        if moment == "reading":
            os.kill(os.getpid(), signal.SIGSTOP)
        yield 0

    with running(read) as worker:
        assert worker.process.pid is not None
        if moment == "idle":
            os.kill(worker.process.pid, signal.SIGSTOP)
        worker.ask()
        if moment == "answering":
            assert worker.link.poll(10.0)
            os.kill(worker.process.pid, signal.SIGSTOP)
            assert worker.take(1.0).rest == 0  # it lies there as a whole
        began = time.monotonic()
        with pytest.raises(RetryError, match=r"did not come in 0\.5 s \(data\.timeout_s\)"):
            worker.take(0.5)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("batches_before", [0, 3])
def test_a_killed_worker_is_a_reason_to_start_again(batches_before: int) -> None:
    with running(count) as worker:
        for _ in range(batches_before):
            worker.ask()
            worker.take(10.0)
        worker.process.kill()
        worker.process.join()
        worker.ask()
        with pytest.raises(RetryError, match=r"a loader process is gone \(pid \d+, exit code -9\).*killed for memory"):
            worker.take(10.0)


@pytest.mark.parametrize(("error", "found"), [(KeyError("a slip"), KeyError), (StubbornError(1, 2), RuntimeError)])
def test_an_error_comes_over_with_its_traceback(error: Exception, found: type[Exception]) -> None:
    def fail() -> Iterator[int]:
        raise error
        yield 0

    with running(fail) as worker:
        worker.ask()
        with pytest.raises(found) as caught:
            worker.take(10.0)
    assert "in fail" in "".join(traceback.format_exception(caught.value))


def test_workers_end_with_a_parent_that_is_killed() -> None:
    near_end, far_end = get_context("fork").Pipe()

    def parent() -> None:
        far_end.send(worker_of(count).process.pid)
        time.sleep(60)

    process = get_context("fork").Process(target=parent)
    process.start()
    worker = psutil.Process(near_end.recv())
    process.kill()
    process.join()
    _, alive = psutil.wait_procs([worker], timeout=10)
    assert not alive
