"""Processes that work beside this one and end with it."""

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import active_children, get_context, parent_process
from threading import Thread


@contextmanager
def worker_processes(workers: int | None) -> Iterator[ProcessPoolExecutor]:
    """`workers` fresh processes, one a core by default; an error or a signal in the block ends them at once.

    The pool alone would wait for their jobs, or leave them behind, and for ever where this process is killed.
    """
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=end_with_parent) as pool:
        try:
            yield pool
        except BaseException:
            for process in active_children():
                process.terminate()
            raise


def end_with_parent() -> None:
    """Have this process, a worker, end at once when its parent does."""
    Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
