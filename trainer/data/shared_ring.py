"""Shared memory that a loader worker's batches lie in, used again and again.

Memory that is new costs a fault of the page table for every 4 KB, 200 for an image of 704 x 396: a sixth of its decoding. So the large
arrays of a worker's batches go into the same few places in turn. How many there must be follows from what may be under way: a
worker is asked for batch n when its batch n - P is handed out, with P = prefetch_batches. Whoever reads no batch but the last one taken is
done with n - P - 1 then, so P + 1 places are enough, and one more is there for a consumer that is a little late.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_SPARE = 2
_LEAST_BYTES = 1 << 20
"""Smaller arrays cost little to share and a file handle each to keep."""


class SharedRing:
    """Places for the batches of one worker, which has at most `prefetch_batches` under way."""

    def __init__(self, prefetch_batches: int) -> None:
        self._places: list[dict[str, Tensor]] = [{} for _ in range(prefetch_batches + _SPARE)]
        self._turn = 0

    def next_batch(self) -> None:
        """Go on to the next place."""
        self._turn = (self._turn + 1) % len(self._places)

    def stack(self, name: str, arrays: Sequence[np.ndarray]) -> Tensor:
        """Arrays of equal shape in one tensor."""
        shape, dtype = (len(arrays), *arrays[0].shape), torch.from_numpy(arrays[0]).dtype
        if arrays[0].nbytes * len(arrays) < _LEAST_BYTES:
            return torch.from_numpy(np.stack(arrays))
        place = self._places[self._turn]
        if name not in place or place[name].shape != shape or place[name].dtype != dtype:
            place[name] = torch.empty(shape, dtype=dtype).share_memory_()
        np.stack(arrays, out=place[name].numpy())
        return place[name]
