"""The pulse of a process: whether it still makes steps, judged by how long its own steps usually take.

A step may last `factor` times the median of the last ones, and never less than `least_s` before it counts as hung. What is not a
step (the first ones, which compile and fill caches, a checkpoint that is waited for, an evaluation) has `grace_s`.

Left to whom: `exporter` answers probes with it, the trainer's watchdog acts on it.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STARTING, STEPPING = "start", "step"
_STEPS_TO_LEARN = 3
_WINDOW_STEPS = 51


class Pulse:
    """Told by the training thread, asked by others."""

    def __init__(self, *, factor: float, least_s: float, grace_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._factor, self._least_s, self._grace_s = factor, least_s, grace_s
        self._clock = clock
        self._beat = clock()
        self._took: deque[float] = deque(maxlen=_WINDOW_STEPS)
        self._typical_s: float | None = None
        self.activity = STARTING
        self.step = 0

    def tell_step(self, step: int, seconds: float) -> None:
        """`step` is finished and took so long."""
        self._took.append(seconds)
        if len(self._took) >= _STEPS_TO_LEARN:
            self._typical_s = statistics.median(self._took)
        self.step, self.activity, self._beat = step, STEPPING, self._clock()

    @contextmanager
    def during(self, activity: str) -> Iterator[None]:
        """What the block does is no step."""
        before, self.activity, self._beat = self.activity, activity, self._clock()
        yield
        self.activity, self._beat = before, self._clock()

    def forgive(self) -> None:
        """Begin anew to wait for what is under way."""
        self._beat = self._clock()

    @property
    def silence_s(self) -> float:
        """Since anything was finished."""
        return self._clock() - self._beat

    @property
    def allowed_s(self) -> float:
        """How long the silence may last."""
        if self.activity != STEPPING or self._typical_s is None:
            return self._grace_s
        return max(self._least_s, self._factor * self._typical_s)

    def why_hung(self, patience: float = 1.0) -> str | None:
        """A sentence where the silence is longer than `patience` times what is allowed."""
        silence_s, allowed_s = self.silence_s, patience * self.allowed_s
        if silence_s <= allowed_s:
            return None
        return f"{self.activity} after step {self.step} has not ended for {silence_s:.0f} s, and {allowed_s:.0f} s are allowed"

    def why_not_ready(self) -> str | None:
        """A sentence where no step was made yet, or none for too long."""
        return self.why_hung() or (None if self.step else "no step is finished yet")
