"""What processes hold themselves: anonymous and shared memory, without the files and libraries that they map.

A page that several processes share counts in equal parts, so that it counts once in their sum. Linux only.
"""

import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

_HELD = ("Pss_Anon:", "Pss_Shmem:")
_SAMPLE_S = 0.005


def held_bytes(pids: Iterable[int]) -> int:
    """What these processes hold together; nothing for one that has ended."""
    return sum(_held_by(pid) for pid in pids)


class Peak:
    """`extra_bytes` says after the block by how much it rose above what was there before."""

    extra_bytes = 0


@contextmanager
def watching_held() -> Iterator[Peak]:
    """Look at what this process holds every few milliseconds while the block runs, and at its end."""
    peak, before, ended = Peak(), _held_by(os.getpid()), threading.Event()

    def look() -> None:
        peak.extra_bytes = max(peak.extra_bytes, _held_by(os.getpid()) - before)

    def watch() -> None:
        while not ended.wait(_SAMPLE_S):
            look()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
        look()
    finally:
        ended.set()
        watcher.join()


def _held_by(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(_HELD))
