"""Many observers as one, and the rule that a monitoring failure never stops training.

The record is what a resume, a benchmark and a post-mortem read, so its errors go on up to the loop. All others are there
for somebody who looks: the first error of one is logged with its traceback, and it is told nothing more.

Left to whom: `build` decides which observers a rank has.
"""

import logging
from collections.abc import Callable, Mapping, Sequence

from trainer.observe.report import Keeper, Observer, SavedCheckpoint, Sheets, StepReport

log = logging.getLogger(__name__)


class Observers:
    """Passes every event to `record`, if this rank keeps one, and then to `monitors`."""

    def __init__(self, record: Keeper | None, monitors: Sequence[Observer] = ()) -> None:
        self._record = record
        self._monitors = list(monitors)

    def step(self, report: StepReport) -> None:
        """See Observer."""
        self._tell(lambda observer: observer.step(report))

    def checkpoint(self, saved: SavedCheckpoint) -> None:
        """See Observer."""
        self._tell(lambda observer: observer.checkpoint(saved))

    def evaluation(self, step: int, figures: Mapping[str, float], *, seconds: float) -> None:
        """See Observer."""
        self._tell(lambda observer: observer.evaluation(step, figures, seconds=seconds))

    def pictures(self, step: int, sheets: Sheets) -> None:
        """See Observer."""
        self._tell(lambda observer: observer.pictures(step, sheets))

    def sync(self) -> None:
        """Bring the record to where it outlives this process."""
        if self._record:
            self._record.sync()

    def preempted(self, step: int) -> None:
        """The run was asked to stop and does."""
        if self._record:
            self._record.preempted(step)

    def close(self) -> None:
        """See Observer; monitors are closed even if the record cannot be."""
        try:
            if self._record:
                self._record.close()
        finally:
            self._tell_monitors(lambda observer: observer.close())

    def _tell(self, event: Callable[[Observer], None]) -> None:
        if self._record:
            event(self._record)
        self._tell_monitors(event)

    def _tell_monitors(self, event: Callable[[Observer], None]) -> None:
        for monitor in tuple(self._monitors):
            try:
                event(monitor)
            except Exception:  # whatever it is: a run of weeks does not end for want of a picture
                log.exception("%s failed and is told no more; training goes on without it", type(monitor).__name__)
                self._monitors.remove(monitor)
