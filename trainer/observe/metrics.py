"""Reports as metrics: what each report means in the list of `monitoring.metrics`.

Left to whom: names and meanings are `monitoring.metrics`, serving is `monitoring.exporter`.
"""

import time
from collections.abc import Callable

from monitoring.exporter import Exporter
from trainer.observe.report import SavedCheckpoint, SilentObserver, StepReport


class Metrics(SilentObserver):
    """Keeps an exporter up to date; `resumed_at` is the step that this start went on from."""

    def __init__(self, exporter: Exporter, *, resumed_at: int, clock: Callable[[], float] = time.time) -> None:
        self.exporter = exporter
        self._clock = clock
        self._replaced_clips: int | None = None if resumed_at else 0

    def step(self, report: StepReport) -> None:
        """See Observer."""
        self._tell_learning(report)
        self._tell_speed(report)
        self.exporter.increase("odonata_replaced_clips_total", self._newly_replaced(report))
        self.exporter.set("odonata_peak_memory_bytes", report.memory_bytes)
        self.exporter.set("odonata_last_step_timestamp_seconds", self._clock())

    def checkpoint(self, saved: SavedCheckpoint) -> None:
        """See Observer."""
        self.exporter.increase("odonata_checkpoint_stall_seconds_total", saved.stall_seconds)
        self.exporter.increase("odonata_checkpoint_failures_total", int(saved.error is not None))
        if saved.error:
            return
        self.exporter.set("odonata_checkpoint_seconds", saved.seconds)
        self.exporter.set("odonata_checkpoint_bytes", saved.bytes)
        self.exporter.set("odonata_last_checkpoint_step", saved.step)
        self.exporter.set("odonata_last_checkpoint_timestamp_seconds", self._clock())
        self.exporter.increase("odonata_checkpoints_total", 1)

    def close(self) -> None:
        """See Observer."""
        self.exporter.close()

    def _tell_learning(self, report: StepReport) -> None:
        self.exporter.set("odonata_step", report.step)
        self.exporter.set("odonata_steps", report.steps)
        self.exporter.set("odonata_loss", report.loss)
        for name, value in report.parts.items():
            objective, _, part = name.partition("/")
            self.exporter.set("odonata_loss_part", value, objective=objective, part=part)
        self.exporter.set("odonata_grad_norm", report.grad_norm)
        self.exporter.set("odonata_learning_rate", report.learning_rate)
        self.exporter.increase("odonata_skipped_steps_total", int(report.skipped))

    def _tell_speed(self, report: StepReport) -> None:
        self.exporter.observe("odonata_step_seconds", report.step_seconds)
        self.exporter.increase("odonata_data_wait_seconds_total", report.data_seconds)
        self.exporter.increase("odonata_clips_total", report.clips)
        self.exporter.increase("odonata_tokens_total", report.tokens)
        if report.step_seconds:
            self.exporter.set("odonata_clips_per_second", report.clips / report.step_seconds)
            self.exporter.set("odonata_tokens_per_second", report.tokens / report.step_seconds)

    def _newly_replaced(self, report: StepReport) -> int:
        """Clips replaced since the last report; after a resume the first one only says where counting begins."""
        before = report.replaced_clips if self._replaced_clips is None else self._replaced_clips
        self._replaced_clips = report.replaced_clips
        return report.replaced_clips - before
