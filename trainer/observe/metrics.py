"""Reports as metrics: what each report means in the list of `monitoring.metrics`.

Left to whom: names and meanings are `monitoring.metrics`, serving is `monitoring.exporter`.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from models.flops import Flops
from monitoring.exporter import Exporter
from monitoring.goodput import Goodput
from trainer.memory import memory_now
from trainer.observe.report import SavedCheckpoint, SilentObserver, StepReport

_CPU = torch.device("cpu")

_READING = {
    "files": "odonata_data_files_total",
    "bytes": "odonata_data_read_bytes_total",
    "fetches": "odonata_data_fetches_total",
    "cache_hits": "odonata_data_cache_hits_total",
    "decode_seconds": "odonata_data_decode_seconds_total",
    "load_seconds": "odonata_data_load_seconds_total",
}
"""What the loader counts."""

_PAIRS = "pairs_per_image"
"""The part of a loss that counts pairs."""


@dataclass(frozen=True)
class Work:
    """What a step of the run asks of its devices."""

    flops: Mapping[str, Flops]
    """By objective, of all ranks together."""
    peak_flops: float
    """A second, of all ranks together."""


class Metrics(SilentObserver):
    """Keeps an exporter up to date; `resumed_at` is the step that this start went on from.

    `goodput` is that of the run until now, where this rank knows it; `other_cpu_seconds` what monitoring costs beside this class;
    `pushgateway` where the summary goes in the end; `saved_s` when the checkpoint that it goes on from was committed.
    """

    def __init__(
        self,
        exporter: Exporter,
        *,
        resumed_at: int,
        device: torch.device = _CPU,
        work: Work | None = None,
        goodput: Goodput | None = None,
        other_cpu_seconds: Callable[[], float] = lambda: 0.0,
        pushgateway: str | None = None,
        saved_s: float | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.exporter = exporter
        self._device, self._work, self._clock = device, work, clock
        self._other_cpu_seconds = other_cpu_seconds
        self._replaced_clips: int | None = None if resumed_at else 0
        self._saved_step = resumed_at
        self._cpu_seconds = {"all": 0.0, "own": 0.0, "monitoring": 0.0}
        self._pushgateway = pushgateway
        self._goodput = _Growing(goodput, clock) if goodput else None
        if goodput:
            self._tell_history(goodput)
            self.exporter.set("odonata_last_checkpoint_step", resumed_at)
            self.exporter.set("odonata_last_checkpoint_timestamp_seconds", saved_s or clock())
        if work:
            self.exporter.set("odonata_peak_flops", work.peak_flops)
            for objective, flops in work.flops.items():
                self.exporter.set("odonata_step_flops", flops.needed, objective=objective)

    def step(self, report: StepReport) -> None:
        """See Observer."""
        started = time.thread_time()
        self._tell_learning(report)
        self._tell_speed(report)
        self._tell_reading(report)
        self.exporter.set("odonata_peak_memory_bytes", report.memory_bytes)
        for kind, held in memory_now(self._device).items():
            self.exporter.set("odonata_memory_bytes", held, kind=kind)
        self.exporter.set("odonata_last_step_timestamp_seconds", self._clock())
        self.exporter.set("odonata_checkpoint_lag_steps", report.step - self._saved_step)
        if self._goodput:
            self._goodput.add("productive", report.step_seconds - report.data_seconds)
            self._goodput.add("data_wait", report.data_seconds)
            self._goodput.tell(self.exporter)
        self._cpu_seconds["own"] += time.thread_time() - started
        self._tell_cost()

    def checkpoint(self, saved: SavedCheckpoint) -> None:
        """See Observer."""
        self.exporter.increase("odonata_checkpoint_stall_seconds_total", saved.stall_seconds)
        self.exporter.increase("odonata_checkpoint_failures_total", int(saved.error is not None))
        if self._goodput:
            self._goodput.add("checkpoint", saved.stall_seconds)
        if saved.error:
            return
        self._saved_step = saved.step
        self.exporter.set("odonata_checkpoint_seconds", saved.seconds)
        self.exporter.set("odonata_checkpoint_bytes", saved.bytes)
        self.exporter.set("odonata_last_checkpoint_step", saved.step)
        self.exporter.set("odonata_last_checkpoint_timestamp_seconds", self._clock())
        self.exporter.increase("odonata_checkpoints_total", 1)

    def evaluation(self, step: int, figures: Mapping[str, float], *, seconds: float) -> None:
        """See Observer."""
        if self._goodput:
            self._goodput.add("evaluation", seconds)

    def close(self) -> None:
        """See Observer; OSError where the Pushgateway does not take the summary."""
        self.exporter.close()
        gateway, self._pushgateway = self._pushgateway, None
        if gateway:
            self.exporter.push_summary(gateway)

    def _tell_learning(self, report: StepReport) -> None:
        self.exporter.set("odonata_step", report.step)
        self.exporter.set("odonata_steps", report.steps)
        self.exporter.set("odonata_loss", report.loss)
        for name, value in report.parts.items():
            objective, _, part = name.partition("/")
            if part == _PAIRS:
                self.exporter.set("odonata_valid_pairs", value, objective=objective)
            else:
                self.exporter.set("odonata_loss_part", value, objective=objective, part=part)
        self.exporter.set("odonata_grad_norm", report.grad_norm)
        self.exporter.set("odonata_learning_rate", report.learning_rate)
        self.exporter.increase("odonata_skipped_steps_total", int(report.skipped))

    def _tell_speed(self, report: StepReport) -> None:
        self.exporter.observe("odonata_step_seconds", report.step_seconds)
        self.exporter.increase("odonata_data_wait_seconds_total", report.data_seconds)
        for phase, seconds in report.phase_seconds.items():
            self.exporter.increase("odonata_step_phase_seconds_total", seconds, phase=phase)
        self.exporter.set("odonata_slowest_rank", report.slowest_rank)
        self.exporter.set("odonata_step_skew_seconds", report.skew_seconds)
        self.exporter.increase("odonata_clips_total", report.clips)
        self.exporter.increase("odonata_tokens_total", report.tokens)
        if report.step_seconds:
            self.exporter.set("odonata_clips_per_second", report.clips / report.step_seconds)
            self.exporter.set("odonata_tokens_per_second", report.tokens / report.step_seconds)
            self._tell_utilisation(report.step_seconds)

    def _tell_utilisation(self, step_seconds: float) -> None:
        if self._work:
            possible = self._work.peak_flops * step_seconds
            needed, again = (sum(getattr(one, name) for one in self._work.flops.values()) for name in ("needed", "again"))
            self.exporter.set("odonata_mfu_ratio", needed / possible)
            self.exporter.set("odonata_hfu_ratio", (needed + again) / possible)

    def _tell_reading(self, report: StepReport) -> None:
        for name, amount in report.reading.items():
            self.exporter.increase(_READING[name], amount)
        self.exporter.increase("odonata_replaced_clips_total", self._newly_replaced(report))

    def _tell_history(self, goodput: Goodput) -> None:
        self.exporter.set("odonata_starts", goodput.starts)
        self.exporter.set("odonata_preemptions", goodput.preemptions)
        self.exporter.set("odonata_lost_steps", goodput.lost_steps)

    def _tell_cost(self) -> None:
        spent = {"all": time.process_time(), "monitoring": self._cpu_seconds["own"] + self._other_cpu_seconds()}
        for name, metric in (("all", "odonata_cpu_seconds_total"), ("monitoring", "odonata_monitoring_cpu_seconds_total")):
            self.exporter.increase(metric, max(0.0, spent[name] - self._cpu_seconds[name]))
            self._cpu_seconds[name] = spent[name]

    def _newly_replaced(self, report: StepReport) -> int:
        """Clips replaced since the last report; after a resume the first one only says where counting begins."""
        before = report.replaced_clips if self._replaced_clips is None else self._replaced_clips
        self._replaced_clips = report.replaced_clips
        return report.replaced_clips - before


class _Growing:
    """The goodput of a run that goes on."""

    def __init__(self, until_now: Goodput, clock: Callable[[], float]) -> None:
        self._seconds = dict(until_now.seconds)
        self._clock = clock
        self._began_s = clock() - until_now.wall_s

    def add(self, bucket: str, seconds: float) -> None:
        self._seconds[bucket] += seconds

    def tell(self, exporter: Exporter) -> None:
        wall_s = self._clock() - self._began_s
        explained = sum(seconds for bucket, seconds in self._seconds.items() if bucket != "other")
        self._seconds["other"] = max(0.0, wall_s - explained)
        for bucket, seconds in self._seconds.items():
            exporter.set("odonata_goodput_seconds", seconds, bucket=bucket)
        if wall_s > 0:
            exporter.set("odonata_goodput_ratio", self._seconds["productive"] / wall_s)
