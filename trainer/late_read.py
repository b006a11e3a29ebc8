"""Numbers on their way from the device to this process, which goes on meanwhile.

On CUDA they are copied into pinned memory behind the work that makes them, and only who reads them waits, and only for that work:
what was queued since goes on. Without a device there is nothing to wait for.
"""

import time

import torch
from jaxtyping import Float64
from torch import Tensor


class LateRead:
    """A few numbers that will be read later."""

    def __init__(self, values: Float64[Tensor, " n"]) -> None:
        self._values = values.detach()
        self._arrived: torch.cuda.Event | None = None
        self.arrived_s = time.perf_counter()
        """When the numbers were there, as far as this process knows."""
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(self._values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> list[float]:
        """The numbers; the one place of a step that waits for the device."""
        if self._arrived:
            self._arrived.synchronize()
            self.arrived_s = time.perf_counter()
        return self._values.tolist()
