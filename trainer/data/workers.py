"""The loader's processes: where they run, what they are deaf to, and what it means to lose one.

A loader process is lost when the kernel kills it for memory, or hangs with the disk or the store that it reads from. Neither is a fault
of the run, so both end it with exit 75 and a sentence that says what to change.
"""

import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess

import torch

from trainer.data.read_ahead import late
from trainer.errors import RetryError

_LOST = "DataLoader worker"
_TIMED_OUT = "DataLoader timed out"
"""How torch's RuntimeErrors begin, which have no class of their own."""


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


def start_worker(worker: int, *, cores: Sequence[int]) -> None:
    """What a loader process does first.

    A preempted pod signals every process: workers must live until the trainer has saved and ends them.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    if cores:
        os.sched_setaffinity(0, {cores[worker]})


def end_workers(processes: Iterable[BaseProcess]) -> None:
    """Kill what is left of them: they are deaf to milder signals, and the interpreter waits at its end for those that hang."""
    alive = [process for process in processes if process.is_alive()]
    if not alive:
        return
    told = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise for every one
    try:
        for process in alive:
            process.kill()
            process.join()
    finally:
        signal.signal(signal.SIGCHLD, told)


@contextmanager
def losses_are_retried(timeout_s: float) -> Iterator[None]:
    """RetryError for torch's errors about a loader process that is gone or silent; its signal handler raises them anywhere."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if text.startswith(_TIMED_OUT):
            raise late("a batch", timeout_s) from error
        if text.startswith(_LOST):
            raise RetryError(
                f"a loader process is gone ({text.splitlines()[0]}), most likely killed for memory; start the same job again and it "
                "resumes, with more memory or with less of data.workers, data.prefetch_batches or data.reads_in_flight"
            ) from error
        raise
