"""What it takes to bring a sample: counts of the thread that reads it, so that nobody else's get mixed in.

    files, bytes        read of loose files, or fetched from a store
    fetches             requests to a store
    cache_hits          ranges that the cache of the node had
    decode_seconds      in decoders of images
    load_seconds        all of it, preparation for the objectives included

Left to whom: the loader carries the sums over with each batch.
"""

import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

_local = threading.local()


@contextmanager
def counting() -> Iterator[dict[str, float]]:
    """What is counted in the block, on this thread, with the seconds that the block takes."""
    counts: dict[str, float] = {}
    _local.counts, started = counts, time.perf_counter()
    try:
        yield counts
    finally:
        count("load_seconds", time.perf_counter() - started)
        _local.counts = {}


def count(name: str, amount: float = 1.0) -> None:
    """Add to what is being counted on this thread; nobody may be."""
    counts = getattr(_local, "counts", {})
    counts[name] = counts.get(name, 0.0) + amount


@contextmanager
def counting_seconds(name: str) -> Iterator[None]:
    """Count the seconds of the block."""
    started = time.perf_counter()
    yield
    count(name, time.perf_counter() - started)


def sum_counts(counts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """All of them together, by name."""
    total: dict[str, float] = {}
    for each in counts:
        for name, amount in each.items():
            total[name] = total.get(name, 0.0) + amount
    return total
