"""How long the phases of a step take, without waiting for the device.

On a CPU a phase lasts as long as its code runs. On CUDA the code only queues work, so a phase is bounded by two events on the
stream, which are read once the device has passed them: what is not yet known counts in a later step, and nothing ever waits.

Left to whom: which phases there are is decided where they are timed (`trainer.loop`, `trainer.parallel.engine`).
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Seconds by phase on one device."""

    def __init__(self, device: torch.device) -> None:
        self._has_events = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._open: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self.phase = ""
        """What this process is at, or was last."""

    @contextmanager
    def timing_host(self, phase: str) -> Iterator[None]:
        """Count what this process spends in the block."""
        self.phase, started = phase, time.perf_counter()
        yield
        self._add(phase, time.perf_counter() - started)

    @contextmanager
    def timing(self, phase: str) -> Iterator[None]:
        """Count what the device spends on the work of the block."""
        if not self._has_events:
            with self.timing_host(phase):
                yield
            return
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.phase = phase
        first.record()
        yield
        last.record()
        self._open.append((phase, first, last))

    def seconds(self, phase: str) -> float:
        """Of `phase` since the last `take`, as far as it is known."""
        return self._seconds.get(phase, 0.0)

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call."""
        passed = [each for each in self._open if each[2].query()]
        self._open = [each for each in self._open if each not in passed]
        for phase, first, last in passed:
            self._add(phase, first.elapsed_time(last) / 1000)
        taken, self._seconds = self._seconds, {}
        return taken

    def _add(self, phase: str, seconds: float) -> None:
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds
