"""The wish to stop: SIGTERM and SIGINT are noted, and acted upon at the end of the step.

A pod that is preempted gets SIGTERM on every process; the step at hand finishes, the state is saved, and the process ends
with the code that asks to be started again. All ranks stop at the same step because the wish travels with the step's
sums (`trainer.loop`).
"""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopWish:
    """Which signal came, if any."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._noted_s = 0.0

    def note(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        del frame
        if self.signal is None:
            self._noted_s = time.monotonic()
        self.signal = signal.Signals(number)

    @property
    def seconds_ago(self) -> float:
        """How long ago the first signal came; 0 where none came to this process."""
        return time.monotonic() - self._noted_s if self.signal else 0.0


@contextmanager
def listening() -> Iterator[StopWish]:
    """Note signals while the block runs; the handlers from before are put back after it."""
    wish = StopWish()
    before = {number: signal.signal(number, wish.note) for number in _SIGNALS}
    try:
        yield wish
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
