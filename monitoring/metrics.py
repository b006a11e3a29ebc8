"""The one list of metrics: what a run exports, as data.

Names follow Prometheus: prefix `odonata_`, base units at the end of the name, `_total` on what only grows. Counters count
since the process started, as Prometheus expects, so `increase()` is right over restarts; steps that a resume takes again
count again. Every metric also carries the constant labels of its exporter (run and rank); labels listed here have few values.
What is the same on every rank is exported by every rank: look at `rank="0"`.

Left to whom: `exporter` serves them, the trainer's `observe/metrics.py` sets them. A metric that is not in this list cannot be exported.
"""

from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["gauge", "counter", "histogram", "info"]
Unit = Literal["seconds", "bytes", "ratio"]


@dataclass(frozen=True)
class Metric:
    """One metric; `name` is what a query says, for a histogram without `_bucket`, `_sum` and `_count`."""

    name: str
    kind: Kind
    meaning: str
    unit: Unit | None = None
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


_STEP_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 7.0, 10.0, 20.0, 30.0, 60.0, 120.0)
"""Dense where steps of a real run lie, since a quantile is interpolated inside one bucket."""

_RUN_LABELS = ("engine", "world_size", "precision")

METRICS: tuple[Metric, ...] = (
    # what the process is
    Metric("odonata_run_info", "info", "The run that this process is part of; always 1.", labels=_RUN_LABELS),
    # is it learning
    Metric("odonata_step", "gauge", "Steps that are finished, over all starts of the run."),
    Metric("odonata_steps", "gauge", "Steps that the run is to take."),
    Metric("odonata_loss", "gauge", "Weighted sum of the objectives' losses in the last step."),
    Metric("odonata_loss_part", "gauge", "One part of the loss in the last step.", labels=("objective", "part")),
    Metric("odonata_grad_norm", "gauge", "Norm of the whole gradient in the last step, before clipping."),
    Metric("odonata_learning_rate", "gauge", "Learning rate of the last step, before layer decay."),
    Metric(
        "odonata_mask_ratio", "gauge", "Share of a masked clip that the encoder does not see.", "ratio", labels=("objective",)
    ),
    Metric("odonata_valid_pairs", "gauge", "Pairs of image and LiDAR in an image, mean of the last step.", labels=("objective",)),
    Metric("odonata_skipped_steps_total", "counter", "Steps whose loss or gradient was not finite, so that no weight moved."),
    # is it fast
    Metric(
        "odonata_step_seconds",
        "histogram",
        "Wall time of a step on this rank, data wait included.",
        "seconds",
        buckets=_STEP_SECONDS,
    ),
    Metric(
        "odonata_step_phase_seconds_total",
        "counter",
        "Step time by phase: data_wait, host_to_device, forward, backward, optimiser, and collective_wait, the wait for other "
        "ranks at the end of the backward; collectives inside a phase count there.",
        "seconds",
        labels=("phase",),
    ),
    Metric(
        "odonata_step_skew_seconds", "gauge", "How much longer than the median rank the slowest was busy with its own.", "seconds"
    ),
    Metric("odonata_slowest_rank", "gauge", "The rank that was busy longest in the last step with what no other can hold up."),
    Metric("odonata_mfu_ratio", "gauge", "Operations that the algorithm needs over what the devices could do.", "ratio"),
    Metric("odonata_hfu_ratio", "gauge", "As MFU, with what the backward makes a second time.", "ratio"),
    Metric("odonata_step_flops", "gauge", "Operations that a step needs, over all ranks.", labels=("objective",)),
    Metric("odonata_peak_flops", "gauge", "Operations a second that all ranks' devices could do."),
    Metric("odonata_data_wait_seconds_total", "counter", "Part of the step time that was spent waiting for data.", "seconds"),
    Metric("odonata_clips_total", "counter", "Clips trained on, over all ranks; every rank reports the same number."),
    Metric("odonata_tokens_total", "counter", "Tokens trained on, over all ranks; every rank reports the same number."),
    Metric("odonata_clips_per_second", "gauge", "Clips in the last step over its wall time, over all ranks."),
    Metric("odonata_tokens_per_second", "gauge", "Tokens in the last step over its wall time, over all ranks."),
    # is it well
    Metric("odonata_last_step_timestamp_seconds", "gauge", "When the last step was finished, since 1970.", "seconds"),
    Metric("odonata_peak_memory_bytes", "gauge", "Most memory this rank has held: CUDA, or resident without a GPU.", "bytes"),
    Metric(
        "odonata_memory_bytes",
        "gauge",
        "Memory now: host, resident; allocated and reserved by torch where there is a GPU.",
        "bytes",
        labels=("kind",),
    ),
    Metric("odonata_cpu_seconds_total", "counter", "CPU time of this process, loader workers not included.", "seconds"),
    Metric("odonata_monitoring_cpu_seconds_total", "counter", "Of that, metrics, their server and the watchdog.", "seconds"),
    # is it fed
    Metric("odonata_data_read_bytes_total", "counter", "Bytes read from files, or fetched from a store, for this rank.", "bytes"),
    Metric("odonata_data_files_total", "counter", "Loose files read for this rank."),
    Metric("odonata_data_fetches_total", "counter", "Requests to a data store for this rank (GET)."),
    Metric("odonata_data_cache_hits_total", "counter", "Ranges that the node's cache had."),
    Metric("odonata_data_decode_seconds_total", "counter", "Loader threads' time in image decoders.", "seconds"),
    Metric("odonata_data_load_seconds_total", "counter", "Loader threads' time to read, decode and prepare.", "seconds"),
    Metric("odonata_replaced_clips_total", "counter", "Clips that could not be read and were replaced, over all ranks."),
    # is it safe
    Metric(
        "odonata_last_checkpoint_timestamp_seconds",
        "gauge",
        "When the last checkpoint was committed, or the run began without one.",
        "seconds",
    ),
    Metric("odonata_last_checkpoint_step", "gauge", "Step of the last committed checkpoint."),
    Metric("odonata_checkpoint_lag_steps", "gauge", "Steps that a kill now would cost."),
    Metric("odonata_checkpoint_seconds", "gauge", "How long the last checkpoint took.", "seconds"),
    Metric("odonata_checkpoint_bytes", "gauge", "Size of the last checkpoint over all ranks.", "bytes"),
    Metric("odonata_checkpoints_total", "counter", "Checkpoints that this process has committed with the others."),
    Metric("odonata_checkpoint_failures_total", "counter", "Saves that the store did not take; training went on."),
    Metric("odonata_checkpoint_stall_seconds_total", "counter", "Time that training waited for checkpoints.", "seconds"),
    # how it went; rank 0 alone knows the record
    Metric("odonata_world_size", "gauge", "Ranks of this start."),
    Metric("odonata_starts", "gauge", "Starts of the run, this one included."),
    Metric("odonata_preemptions", "gauge", "Earlier starts that ended after a signal, with their state saved."),
    Metric("odonata_lost_steps", "gauge", "Steps that kills took and that were made again."),
    Metric("odonata_goodput_seconds", "gauge", "Wall time of the run over all its starts.", "seconds", labels=("bucket",)),
    Metric("odonata_goodput_ratio", "gauge", "Share of the wall time in steps that count, waiting for data left out.", "ratio"),
)

_LASTING = frozenset(
    {
        "odonata_step",
        "odonata_steps",
        "odonata_loss",
        "odonata_last_step_timestamp_seconds",
        "odonata_last_checkpoint_step",
        "odonata_starts",
        "odonata_preemptions",
        "odonata_lost_steps",
        "odonata_goodput_seconds",
        "odonata_goodput_ratio",
    }
)

SUMMARY: dict[str, Metric] = {
    metric.name: replace(metric, name=metric.name.replace("odonata_", "odonata_final_", 1))
    for metric in METRICS
    if metric.name in _LASTING
}
"""What is still of interest when the process is gone, and its name then: another one, for a Pushgateway keeps its last value for ever,
and an alert on it would never end."""

PROBE_METRICS: tuple[Metric, ...] = (
    Metric("odonata_probe_score", "gauge", "A figure of the newest frozen probe, on held-out clips.", labels=("task", "metric")),
    Metric("odonata_probe_step", "gauge", "Step of the checkpoint that the newest probe has looked at.", labels=("task",)),
    Metric("odonata_probe_seconds", "gauge", "How long the newest probe took: head and score.", "seconds", labels=("task",)),
    Metric(
        "odonata_probe_failures_total", "counter", "Probes given up: a checkpoint was gone, or a head diverged.", labels=("task",)
    ),
)
"""What `odonata probe` exports, a process beside the run; no rank has them."""
