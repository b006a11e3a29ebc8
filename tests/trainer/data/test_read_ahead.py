"""Reading ahead: in order, as many at once as asked, no further than asked, and errors where they belong."""

import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.read_ahead import read_ahead, waiting
from trainer.errors import RetryError


@pytest.fixture(autouse=True)
def no_thread_outlives_its_test() -> Iterator[None]:
    """They end soon after they are told to; another test that counts threads would count them."""
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(5.0)


class Reads:
    """Counts how many are under way, and how many have begun."""

    def __init__(self, seconds: float = 0.01) -> None:
        self.seconds = seconds
        self.begun = self.under_way = self.most = 0
        self.lock = threading.Lock()

    def __call__(self, item: int) -> int:
        with self.lock:
            self.begun += 1
            self.under_way += 1
            self.most = max(self.most, self.under_way)
        with waiting():
            time.sleep(self.seconds)
        with self.lock:
            self.under_way -= 1
        return -item


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 12), st.integers(1, 5))
def test_results_come_in_order_and_as_many_are_under_way_as_asked(items: int, depth: int) -> None:
    reads = Reads()
    assert list(read_ahead(reads, range(items), depth=depth, timeout_s=10.0)) == [-item for item in range(items)]
    assert reads.most == min(depth, items)


def test_all_may_wait_at_once_and_one_works() -> None:
    all_wait = threading.Barrier(3)
    working: list[int] = []

    def read(item: int) -> int:
        with waiting():
            all_wait.wait(10.0)
        working.append(item)
        time.sleep(0.02)
        assert working == [item]
        working.remove(item)
        return item

    assert list(read_ahead(read, range(6), depth=3, timeout_s=10.0)) == list(range(6))


def test_of_those_whose_bytes_have_come_the_earliest_works_first() -> None:
    first_works, come = threading.Event(), {1: threading.Event(), 2: threading.Event()}
    worked = []

    def read(item: int) -> None:
        with waiting():
            if item == 2:
                first_works.wait(10.0)
            if item == 1:
                come[2].wait(10.0)
                time.sleep(0.05)  # the third stands in line before the second
            if item > 0:
                come[item].set()
        worked.append(item)
        if item == 0:
            first_works.set()
            come[1].wait(10.0)
            time.sleep(0.05)  # both stand in line

    list(read_ahead(read, range(3), depth=3, timeout_s=10.0))
    assert worked == [0, 1, 2]


def test_who_waited_in_vain_works_on() -> None:
    def read(item: int) -> int:
        try:
            with waiting():
                raise OSError("no store")
        except OSError:
            return item

    assert list(read_ahead(read, range(4), depth=2, timeout_s=10.0)) == list(range(4))


def test_waiting_is_nothing_elsewhere() -> None:
    with waiting():
        pass


def test_nothing_is_read_further_ahead_than_asked() -> None:
    reads = Reads(0)
    ahead = read_ahead(reads, iter(range(1000)), depth=3, timeout_s=10.0)
    for taken in range(1, 5):
        next(ahead)
        time.sleep(0.05)
        assert reads.begun == taken + 3
    ahead.close()


def test_an_error_comes_in_its_turn_and_the_threads_end() -> None:
    def read(item: int) -> int:
        if item == 2:
            raise KeyError("two")
        return item

    before = threading.active_count()
    ahead = read_ahead(read, range(5), depth=3, timeout_s=10.0)
    assert [next(ahead), next(ahead)] == [0, 1]
    with pytest.raises(KeyError, match="two"):
        next(ahead)
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_a_time_out_of_the_read_itself_is_not_taken_for_ours() -> None:
    def read(item: int) -> int:
        raise TimeoutError("of a socket")

    with pytest.raises(TimeoutError, match="of a socket"):
        next(read_ahead(read, range(1), depth=1, timeout_s=10.0))


def test_a_read_that_does_not_end_is_given_up() -> None:
    release = threading.Event()
    with pytest.raises(RetryError, match=r"did not come in 0\.1 s"):
        next(read_ahead(lambda item: release.wait(10), range(3), depth=2, timeout_s=0.1))
    release.set()
