"""What a person sees of a running run: a bar on a terminal, a line every so many steps elsewhere.

Rates are means over the last steps (`Pace`), the time left is that of the steps alone. The bar begins with the first step:
rich redraws it from a thread, and a loader worker forked while that thread holds the console's lock would hang in its first
log line. By the first step the workers are there.

Left to whom: `logs` owns the console, `metrics` the same numbers for machines.
"""

import logging
from collections import deque
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

from trainer.observe.report import Observer, SavedCheckpoint, SilentObserver, StepReport

log = logging.getLogger(__name__)

_WINDOW_STEPS = 50


class Pace:
    """Means over the last steps."""

    def __init__(self) -> None:
        self._reports: deque[StepReport] = deque(maxlen=_WINDOW_STEPS)

    def add(self, report: StepReport) -> None:
        """Count one more step."""
        self._reports.append(report)

    @property
    def _seconds(self) -> float:
        return sum(report.step_seconds for report in self._reports)

    @property
    def clips_per_second(self) -> float:
        return sum(report.clips for report in self._reports) / self._seconds if self._seconds else 0.0

    @property
    def data_share(self) -> float:
        """Part of the time that was spent waiting for data."""
        return sum(report.data_seconds for report in self._reports) / self._seconds if self._seconds else 0.0

    @property
    def seconds_left(self) -> float:
        """Until the last step is finished."""
        last = self._reports[-1]
        return (last.steps - last.step) * self._seconds / len(self._reports)


class ProgressBar(SilentObserver):
    """A bar at the foot of a terminal."""

    def __init__(self, console: Console) -> None:
        self._pace = Pace()
        self._console = console
        self._bar: Progress | None = None

    def step(self, report: StepReport) -> None:
        """See Observer."""
        self._pace.add(report)
        figures = f"{_learning(report)}  {_pace(self._pace)}"
        if self._bar is None:
            self._bar = _build_bar(self._console, width=len(f"{report.steps}/{report.steps}"))
            self._bar.add_task("steps", total=report.steps, completed=report.step, figures=figures)
            self._bar.start()
        else:
            self._bar.update(self._bar.task_ids[0], completed=report.step, figures=figures)

    def close(self) -> None:
        """See Observer; leaves the bar as it was last."""
        if self._bar:
            self._bar.stop()


class ProgressLines(SilentObserver):
    """A line for the first step seen, the last one, and every `every_steps` between."""

    def __init__(self, every_steps: int) -> None:
        self._every_steps = every_steps
        self._pace = Pace()
        self._first = True

    def step(self, report: StepReport) -> None:
        """See Observer."""
        self._pace.add(report)
        if self._first or report.step == report.steps or report.step % self._every_steps == 0:
            log.info(
                "step %d/%d  %s  grad %.3g  %s", report.step, report.steps, _learning(report), report.grad_norm, _pace(self._pace)
            )
        self._first = False


class Milestones(SilentObserver):
    """A line for what happens rarely, terminal or not."""

    def checkpoint(self, saved: SavedCheckpoint) -> None:
        """See Observer."""
        if saved.error:
            log.error("checkpoint of step %d failed, training goes on: %s", saved.step, saved.error)
        else:
            took = saved.seconds, saved.stall_seconds
            log.info(
                "checkpoint of step %d: %.1f MB in %.1f s, of which training waited %.2f s", saved.step, saved.bytes / 1e6, *took
            )

    def evaluation(self, step: int, figures: Mapping[str, float], *, seconds: float) -> None:
        """See Observer."""
        log.info("held-out clips after step %d: %s", step, "  ".join(f"{name} {value:.4g}" for name, value in figures.items()))


def build_progress(console: Console, *, every_steps: int) -> Observer:
    """What suits `console`."""
    return ProgressBar(console) if console.is_terminal else ProgressLines(every_steps)


def _build_bar(console: Console, *, width: int) -> Progress:
    """A bar whose step numbers, `width` wide, stay whole on a narrow terminal."""
    return Progress(
        MofNCompleteColumn(table_column=Column(min_width=width, no_wrap=True)),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[figures]}"),
        console=console,
        refresh_per_second=4,
        expand=True,
    )


def _learning(report: StepReport) -> str:
    figures = f"loss {report.loss:.4f}  lr {report.learning_rate:.1e}"
    return f"{figures}  skipped {report.skipped_steps}" if report.skipped_steps else figures


def _pace(pace: Pace) -> str:
    return f"{pace.clips_per_second:.3g} clips/s  data {pace.data_share:.0%}  left {_clock(pace.seconds_left)}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
