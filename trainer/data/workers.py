"""The loader's processes: where they run, what they are deaf to, how batches come over, and what it means to lose one.

A worker makes a batch when it is asked for one, in memory that both map (`shared_ring.py`), and answers with two numbers that say where
it is described there. Nothing else crosses: so few bytes are there as a whole or not at all, and a worker that is frozen at any
moment keeps nobody waiting longer than `timeout_s`. torch's DataLoader would fetch a handle for each tensor from its worker and wait
for it without end.

A loader process is lost when the kernel kills it for memory, or hangs with the disk or the store that it reads from. Neither is a fault
of the run, so both end it with exit 75 and a sentence that says what to change.
"""

import atexit
import ctypes
import os
import pickle
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from struct import Struct
from typing import Any, NamedTuple

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from trainer.data.read_ahead import late
from trainer.data.shared_ring import Memory, SharedMemory
from trainer.errors import RetryError
from trainer.pool import end_with_parent

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
"""Of malloc.h."""
_ANSWER = Struct("<QQ")
"""Where in its memory a batch is described, and in how many bytes."""


class Made(NamedTuple):
    """A batch: its arrays, and what else belongs to it, which pickles."""

    arrays: Mapping[str, np.ndarray]
    rest: Any


Make = Callable[[int, Iterator[Memory]], Iterator[Made]]
"""From the number of a worker and memories that are free to its batches, the arrays of each laid in the next one."""


def choose_cores(workers: int, *, local_rank: int, local_world_size: int, available: Iterable[int]) -> tuple[int, ...]:
    """A core for each worker of a rank, where every rank of the node can have one for itself and one a worker; else none.

    A pinned worker finds its data in its core's cache. With fewer cores than processes the kernel shares them out better than we could.
    """
    cores = sorted(available)
    of_rank = workers + 1
    if len(cores) < of_rank * local_world_size:
        return ()
    first = local_rank * of_rank + 1
    return tuple(cores[first : first + workers])


@dataclass(frozen=True)
class Worker:
    """A loader process, as its parent sees it."""

    process: BaseProcess
    link: Connection
    ring: Iterator[SharedMemory]
    """In the order in which its batches come."""

    def ask(self) -> None:
        """For one more batch."""
        with suppress(BrokenPipeError):  # `take` says what has become of it
            self.link.send_bytes(b"")

    def take(self, timeout_s: float) -> Made:
        """Its next batch; what went wrong in it is raised here. RetryError where it is lost or silent."""
        ready = wait((self.link, self.process.sentinel), timeout_s)
        if not ready:
            raise late("a batch", timeout_s)
        try:
            answer = self.link.recv_bytes()
        except (EOFError, ConnectionResetError) as error:
            raise self._lost() from error
        arrays, rest = next(self.ring).receive(*_ANSWER.unpack(answer))
        if isinstance(rest, Exception):
            raise rest
        return Made(arrays, rest)

    def _lost(self) -> RetryError:
        self.process.join(1.0)
        return RetryError(
            f"a loader process is gone (pid {self.process.pid}, exit code {self.process.exitcode}), most likely killed for memory; start "
            "the same job again and it resumes, with more memory or with less of data.workers, data.prefetch_batches or "
            "data.reads_in_flight"
        )


def start_workers(make: Make, rings: Sequence[Sequence[SharedMemory]], cores: Sequence[int]) -> list[Worker]:
    """A process for each ring, which it alone fills; they end with this one, or with `end_workers`."""
    context = get_context("fork")  # which is how they come by the memory
    workers = []
    for number, ring in enumerate(rings):
        link, far_end = context.Pipe()
        job = {"number": number, "make": make, "ring": ring, "link": far_end, "cores": cores}
        process = context.Process(target=_work, kwargs=job, name=f"loader {number}", daemon=True)
        process.start()
        atexit.register(process.kill)  # or the interpreter would wait at its end for what is deaf to milder signals
        far_end.close()
        workers.append(Worker(process, link, cycle(ring)))
    return workers


def end_workers(workers: Iterable[Worker]) -> None:
    """Kill what is left of them."""
    for worker in workers:
        worker.process.kill()
        worker.process.join()
        worker.link.close()


def _work(*, number: int, make: Make, ring: Sequence[SharedMemory], link: Connection, cores: Sequence[int]) -> None:
    _settle(cores[number] if cores else None)
    made = make(number, cycle(ring))
    for memory, _ in zip(cycle(ring), _asks(link), strict=False):
        try:
            batch = next(made)
            answer = memory.send(list(batch.arrays), batch.rest)
        except StopIteration:
            return
        except Exception as error:  # for whoever waits for the batch
            answer = memory.send((), _as_sent(error))
        link.send_bytes(_ANSWER.pack(*answer))


def _asks(link: Connection) -> Iterator[bytes]:
    with suppress(EOFError):
        while True:
            yield link.recv_bytes()


def _settle(core: int | None) -> None:
    """A preempted pod signals every process: workers must live until the trainer has saved and ends them."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    torch.set_num_threads(1)
    threadpool_limits(1)  # numpy's BLAS keeps a thread that spins: up to a third of the core, though nothing here is large
    _keep_freed_memory()
    if core is not None:
        os.sched_setaffinity(0, {core})


def _keep_freed_memory() -> None:
    """Have glibc use freed pictures again; it would give them back, and each new one costs a fault of the page table for every 4 KB."""
    tune = getattr(ctypes.CDLL(None), "mallopt", None)
    if tune is not None:
        tune(_MMAP_THRESHOLD, 32 << 20)
        tune(_TRIM_THRESHOLD, 256 << 20)


def _as_sent(error: Exception) -> Exception:
    """The error with its traceback; in words where it does not survive the way."""
    error.add_note(f"in a loader process:\n{''.join(traceback.format_exception(error))}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError("\n".join(error.__notes__))
    return error
