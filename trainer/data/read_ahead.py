"""Reading ahead of who asks: samples under way in threads of one process, handed over in order.

While threads wait for a store, one at a time works on what has come: a worker has one core, and threads that shared it would all be
done with their samples at the same time, and then all wait for the store together. What is held is bounded: `depth` samples are under
way or done, and another one begins only when one is taken.

The threads are daemons: one that waits for a store which does not answer would keep a process from ending that has given up.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from itertools import islice
from queue import SimpleQueue
from threading import Lock, Thread
from typing import TypeVar

from trainer.errors import RetryError

Item = TypeVar("Item")
Result = TypeVar("Result")

_this_thread = threading.local()
"""`turn`: what a thread of `read_ahead` holds while it works, and its siblings wait for."""


def read_ahead(read: Callable[[Item], Result], items: Iterable[Item], *, depth: int, timeout_s: float) -> Iterator[Result]:
    """`read` of every item in order, `depth` of them under way, and all but one of these in a block of `waiting`.

    RetryError where one is waited for longer than `timeout_s`.
    """
    calls: SimpleQueue[tuple[Future[Result], Item] | None] = SimpleQueue()
    upcoming, under_way, turn = iter(items), deque[Future[Result]](), Lock()

    def begin(count: int) -> None:
        for item in islice(upcoming, count):
            under_way.append(Future())
            calls.put((under_way[-1], item))

    for _ in range(depth):
        Thread(target=_serve, args=(read, calls, turn), daemon=True).start()
    try:
        begin(depth)
        while under_way:
            if not wait([under_way[0]], timeout_s).done:
                raise late("a sample", timeout_s)
            result = under_way.popleft().result()
            begin(1)
            yield result
    finally:
        for future in under_way:
            future.cancel()
        for _ in range(depth):
            calls.put(None)


@contextmanager
def waiting() -> Iterator[None]:
    """Around whatever waits for a store or a disk: meanwhile another thread of the same `read_ahead` works. Nothing on other threads."""
    turn: Lock | None = getattr(_this_thread, "turn", None)
    if turn is None:
        yield
        return
    turn.release()
    try:
        yield
    finally:
        turn.acquire()


def late(what: str, timeout_s: float) -> RetryError:
    """The error of a run whose data does not come."""
    return RetryError(
        f"{what} was waited for and did not come in {timeout_s:g} s (data.timeout_s): the data store is slow or dead, or this node is; "
        "start the same job again and it resumes, or raise data.timeout_s if the store is only slow"
    )


def _serve(read: Callable[[Item], Result], calls: "SimpleQueue[tuple[Future[Result], Item] | None]", turn: Lock) -> None:
    _this_thread.turn = turn
    while (call := calls.get()) is not None:
        future, item = call
        if not future.set_running_or_notify_cancel():
            continue
        try:
            with turn:
                result = read(item)
            future.set_result(result)
        except BaseException as error:  # for whoever waits for it, in the other thread
            future.set_exception(error)
