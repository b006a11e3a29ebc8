"""Reading ahead of who asks: samples under way in threads of one process, handed over in order.

While threads wait for a store, one at a time works on what has come, the earliest sample first: a worker has one core, and threads that
shared it or took turns in another order would all be done at the same time, and then all wait for the store together. What is held is
bounded: `depth` samples are under way or done, and another one begins only when one is taken.

The threads are daemons: one that waits for a store which does not answer would keep a process from ending that has given up.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from heapq import heappop, heappush
from itertools import islice
from queue import SimpleQueue
from threading import Condition, Thread
from typing import Generic, NamedTuple, TypeVar

from trainer.errors import RetryError

Item = TypeVar("Item")
Result = TypeVar("Result")

_this_thread = threading.local()
"""The `turn` of a thread of `read_ahead`, and the `place` of the sample that it reads."""


class Turn:
    """To work: one sample at a time has it, and of those that want it the earliest gets it next."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._taken_by: int | None = None
        self._wanted_by: list[int] = []

    def take(self, place: int) -> None:
        """Wait for it."""
        with self._changed:
            heappush(self._wanted_by, place)
            self._changed.wait_for(lambda: self._taken_by is None and self._wanted_by[0] == place)
            self._taken_by = heappop(self._wanted_by)

    def give(self, place: int) -> None:
        """Let another sample have it, if it is this one's to give."""
        with self._changed:
            if self._taken_by == place:
                self._taken_by = None
                self._changed.notify_all()


class Call(NamedTuple, Generic[Item, Result]):
    """A sample to be read, and where its result goes."""

    place: int
    item: Item
    future: Future[Result]


Calls = SimpleQueue[Call[Item, Result] | None]


def read_ahead(read: Callable[[Item], Result], items: Iterable[Item], *, depth: int, timeout_s: float) -> Iterator[Result]:
    """`read` of every item in order, `depth` of them under way; of those that have left a block of `waiting` one at a time goes on.

    RetryError where one is waited for longer than `timeout_s`.
    """
    calls: Calls[Item, Result] = SimpleQueue()
    upcoming, under_way, turn = enumerate(items), deque[Future[Result]](), Turn()

    def begin(count: int) -> None:
        for place, item in islice(upcoming, count):
            under_way.append(Future())
            calls.put(Call(place, item, under_way[-1]))

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
    """Around whatever waits for a store or a disk: meanwhile another thread of the same `read_ahead` works. Nothing on other threads.

    One such block does not lie in another: the inner one's turn would be waited for by the outer one.
    """
    turn: Turn | None = getattr(_this_thread, "turn", None)
    if turn is None:
        yield
        return
    turn.give(_this_thread.place)
    try:
        yield
    finally:
        turn.take(_this_thread.place)


def late(what: str, timeout_s: float) -> RetryError:
    """The error of a run whose data does not come."""
    return RetryError(
        f"{what} was waited for and did not come in {timeout_s:g} s (data.timeout_s): the data store is slow or dead, or this node is; "
        "start the same job again and it resumes, or raise data.timeout_s if the store is only slow"
    )


def _serve(read: Callable[[Item], Result], calls: Calls[Item, Result], turn: Turn) -> None:
    _this_thread.turn = turn
    while (call := calls.get()) is not None:
        if not call.future.set_running_or_notify_cancel():
            continue
        _this_thread.place = call.place
        try:
            result = read(call.item)
        except BaseException as error:  # for whoever waits for it, in the other thread
            call.future.set_exception(error)
        else:
            call.future.set_result(result)
        finally:
            turn.give(call.place)
