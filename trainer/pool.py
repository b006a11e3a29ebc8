"""Processes that work beside this one and end with it."""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import active_children, get_context


@contextmanager
def worker_processes(workers: int | None) -> Iterator[ProcessPoolExecutor]:
    """`workers` fresh processes, one a core by default; an error or a signal in the block ends them at once.

    The pool alone would wait for their jobs, or leave them behind.
    """
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        try:
            yield pool
        except BaseException:
            for process in active_children():
                process.terminate()
            raise
