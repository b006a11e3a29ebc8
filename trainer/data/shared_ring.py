"""Memory that batches lie in: of this process, or of two, a loader worker and whoever takes its batches, used again and again.

Memory that is new costs a fault of the page table for every 4 KB, 200 for an image of 704 x 396: a sixth of its decoding. So the arrays
of a worker's batches go into the same few places in turn, and pixels are decoded straight into them. Each place is an anonymous
file that both map since before the fork: it has no name that could be left behind, asks for no /dev/shm, and an array crosses as
three numbers, with no handle to send that a frozen sender would keep the other waiting for.

How many places there must be follows from what may be under way: a worker is asked for batch n when its batch n - P is handed out,
with P = prefetch_batches, and reads A batches further ahead than it is asked. Whoever reads no batch but the last one taken is done with
n - P - 1 then, so P + A + 1 places are enough, and one more is there for a consumer that is a little late.
"""

import math
import mmap
import os
import pickle
import weakref
from collections.abc import Sequence
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

_SPARE = 2
_LINE_BYTES = 64
"""Arrays begin at lines of the cache."""
_GROWTH = 16
"""A memory that is too small gets this part of itself more than asked: a new mapping is new to the page tables."""
_LEAST_BYTES = 1 << 20
"""Smaller arrays are copied where they are taken, so that they can be kept."""


class Memory:
    """Named arrays of one batch, of this process alone."""

    def __init__(self) -> None:
        self._arrays: dict[str, np.ndarray] = {}

    def clear(self) -> None:
        """Forget the arrays, so that the next batch can have its own."""
        self._arrays = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """The array `name`, which begins as anything; safe in several threads."""
        found = self._arrays.get(name)
        return self._arrays.setdefault(name, np.empty(shape, dtype)) if found is None else found

    def stack(self, name: str, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """Arrays of equal shape as `name`; those that lie there already are not copied."""
        stacked = self.array(name, (len(arrays), *arrays[0].shape), arrays[0].dtype)
        if not all(np.may_share_memory(stacked, array) for array in arrays):
            np.stack(arrays, out=stacked)
        return stacked


class _Laid(NamedTuple):
    """Where an array lies."""

    offset: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class SharedMemory(Memory):
    """The same, shared with processes that are forked; one of them lays arrays, another takes them."""

    def __init__(self) -> None:
        super().__init__()
        self._file = os.memfd_create("odonata-batch")
        weakref.finalize(self, os.close, self._file)  # arrays that were taken stay
        self._memory = np.empty(0, dtype=np.uint8)
        self._laid: dict[str, _Laid] = {}
        self._end = 0
        self._lock = Lock()

    def clear(self) -> None:
        """As Memory has it."""
        self._laid, self._end = {}, 0

    def array(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """As Memory has it."""
        with self._lock:
            if name not in self._laid:
                self._laid[name] = self._lay(shape, dtype)
            return self._view(self._laid[name])

    def send(self, names: Sequence[str], rest: Any) -> tuple[int, int]:
        """Write down where the arrays `names` lie, and anything that pickles; where that is written."""
        text = pickle.dumps(({name: self._laid[name] for name in names}, rest))
        with self._lock:
            laid = self._lay((len(text),), np.dtype(np.uint8))
            self._view(laid)[:] = np.frombuffer(text, dtype=np.uint8)
        return laid.offset, laid.bytes

    def receive(self, offset: int, count: int) -> tuple[dict[str, np.ndarray], Any]:
        """What was sent; large arrays as they lie here, good until it is used again."""
        laid, rest = pickle.loads(self._view(_Laid(offset, (count,), "u1")).tobytes())
        arrays = {name: self._view(where) for name, where in laid.items()}
        return {name: array if array.nbytes >= _LEAST_BYTES else array.copy() for name, array in arrays.items()}, rest

    def _lay(self, shape: tuple[int, ...], dtype: np.dtype) -> _Laid:
        laid = _Laid(self._end, shape, dtype.str)
        self._end += -(-laid.bytes // _LINE_BYTES) * _LINE_BYTES
        if self._end > os.fstat(self._file).st_size:
            os.ftruncate(self._file, self._end + self._end // _GROWTH)
        return laid

    def _view(self, laid: _Laid) -> np.ndarray:
        if laid.offset + laid.bytes > len(self._memory):
            flags = mmap.MAP_SHARED | mmap.MAP_POPULATE  # all faults at once
            self._memory = np.frombuffer(mmap.mmap(self._file, os.fstat(self._file).st_size, flags), dtype=np.uint8)
        return self._memory[laid.offset :][: laid.bytes].view(laid.dtype).reshape(laid.shape)


def shared_memories(prefetch_batches: int, *, batches_ahead: int) -> tuple[SharedMemory, ...]:
    """What the batches of one worker take in turn."""
    return tuple(SharedMemory() for _ in range(prefetch_batches + batches_ahead + _SPARE))
