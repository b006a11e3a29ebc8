"""Reports become metrics: every metric of the list has a report that sets it, and counters count what this process did."""

from collections.abc import Iterator

import pytest

from models.flops import Flops
from monitoring.exporter import Exporter
from monitoring.goodput import BUCKETS, Goodput
from monitoring.metrics import METRICS
from tests.trainer.observe_fakes import Saved, Seat, report
from trainer.config.load import parse_run_config
from trainer.config.run import RunConfig
from trainer.observe.build import build_metrics
from trainer.observe.metrics import Metrics, Work


def value(exporter: Exporter, name: str, **labels: str) -> float | None:
    return exporter.registry.get_sample_value(name, {"rank": "1"} | labels)


@pytest.fixture
def exporter() -> Exporter:
    return Exporter({"rank": "1"})


@pytest.fixture
def config() -> RunConfig:
    content = {
        "schema_version": 1,
        "steps": 4,
        "global_batch": 8,
        "run": {"uri": "/runs/first/"},
        "data": {"kind": "synthetic", "root": "/data"},
        "objectives": [{"kind": "croco"}],
        "observe": {"metrics_port": 0, "metrics_host": "127.0.0.1"},
    }
    return parse_run_config(content, origin="the test")


@pytest.fixture
def metrics(config: RunConfig) -> Iterator[Metrics]:
    goodput = Goodput(dict.fromkeys(BUCKETS, 1.0), starts=3, preemptions=1, lost_steps=5)
    work = Work({"croco": Flops(needed=300, again=100)}, peak_flops=1000.0)
    metrics = build_metrics(config, Seat(rank=1, local_rank=1), resumed_at=0, work=work, goodput=goodput)
    yield metrics
    metrics.close()


def test_a_step_and_a_checkpoint_set_every_metric_of_the_list(metrics: Metrics) -> None:
    metrics.step(report(parts={"simipu/loss": 0.5, "simipu/pairs_per_image": 40.0}))
    metrics.checkpoint(Saved())
    served = {sample.name for family in metrics.exporter.registry.collect() for sample in family.samples}
    assert {metric.name + ("_sum" if metric.kind == "histogram" else "") for metric in METRICS} <= served


def test_the_run_is_named_after_its_folder(metrics: Metrics) -> None:
    assert value(metrics.exporter, "odonata_run_info", run="first", engine="fsdp2", world_size="2", precision="bf16") == 1


def test_a_step_is_told_in_full(exporter: Exporter) -> None:
    Metrics(exporter, resumed_at=0, clock=lambda: 1234.0).step(report(3, steps=4, parts={"croco/pixels": 0.25}))
    assert value(exporter, "odonata_step") == 3
    assert value(exporter, "odonata_steps") == 4
    assert value(exporter, "odonata_loss") == 0.5
    assert value(exporter, "odonata_loss_part", objective="croco", part="pixels") == 0.25
    assert value(exporter, "odonata_clips_per_second") == 8 / 0.5
    assert value(exporter, "odonata_tokens_per_second") == 1000 / 0.5
    assert value(exporter, "odonata_data_wait_seconds_total") == 0.125
    assert value(exporter, "odonata_step_seconds_bucket", le="0.5") == 1
    assert value(exporter, "odonata_last_step_timestamp_seconds") == 1234
    assert value(exporter, "odonata_peak_memory_bytes") == 2**30


def test_counters_add_up_over_steps(exporter: Exporter) -> None:
    metrics = Metrics(exporter, resumed_at=0)
    metrics.step(report(1, replaced_clips=1))
    metrics.step(report(2, replaced_clips=3, skipped=True, skipped_steps=1))
    metrics.step(report(3, replaced_clips=3, skipped_steps=1))
    assert value(exporter, "odonata_clips_total") == 24
    assert value(exporter, "odonata_tokens_total") == 3000
    assert value(exporter, "odonata_step_seconds_count") == 3
    assert value(exporter, "odonata_replaced_clips_total") == 3
    assert value(exporter, "odonata_skipped_steps_total") == 1


def test_after_a_resume_only_what_is_new_is_counted(exporter: Exporter) -> None:
    metrics = Metrics(exporter, resumed_at=10)
    metrics.step(report(11, replaced_clips=5, skipped_steps=2))
    metrics.step(report(12, replaced_clips=6, skipped_steps=2))
    assert value(exporter, "odonata_replaced_clips_total") == 1
    assert value(exporter, "odonata_skipped_steps_total") == 0


def test_a_checkpoint_is_told_in_full(exporter: Exporter) -> None:
    Metrics(exporter, resumed_at=0, clock=lambda: 1234.0).checkpoint(Saved(step=3, seconds=0.5, bytes=100))
    assert value(exporter, "odonata_last_checkpoint_step") == 3
    assert value(exporter, "odonata_last_checkpoint_timestamp_seconds") == 1234
    assert value(exporter, "odonata_checkpoint_seconds") == 0.5
    assert value(exporter, "odonata_checkpoint_bytes") == 100
    assert value(exporter, "odonata_checkpoints_total") == 1
    assert value(exporter, "odonata_checkpoint_failures_total") == 0
    assert value(exporter, "odonata_checkpoint_stall_seconds_total") == 0.125


def test_a_failed_save_is_counted_and_is_no_checkpoint(exporter: Exporter) -> None:
    Metrics(exporter, resumed_at=0).checkpoint(Saved(error=OSError("full")))
    assert value(exporter, "odonata_checkpoint_failures_total") == 1
    assert not value(exporter, "odonata_checkpoints_total")


def test_utilisation_is_what_a_step_needs_over_what_devices_can_do(metrics: Metrics) -> None:
    metrics.step(report(1, step_seconds=0.5))
    assert value(metrics.exporter, "odonata_mfu_ratio", run="first") == 300 / (1000 * 0.5)
    assert value(metrics.exporter, "odonata_hfu_ratio", run="first") == 400 / (1000 * 0.5)


def test_goodput_grows_from_where_the_record_ends(exporter: Exporter) -> None:
    before = Goodput({**dict.fromkeys(BUCKETS, 0.0), "productive": 6.0, "down": 4.0}, starts=2, preemptions=0, lost_steps=0)
    times = iter([100.0, 100.0, 102.0, 102.0])
    metrics = Metrics(exporter, resumed_at=1, goodput=before, clock=lambda: next(times))
    metrics.step(report(2, step_seconds=2.0, data_seconds=0.5))
    assert value(exporter, "odonata_goodput_seconds", bucket="productive") == 7.5
    assert value(exporter, "odonata_goodput_seconds", bucket="data_wait") == 0.5
    assert value(exporter, "odonata_goodput_ratio") == 7.5 / 12


def test_pairs_are_no_part_of_a_loss(exporter: Exporter) -> None:
    Metrics(exporter, resumed_at=0).step(report(parts={"simipu/loss": 0.5, "simipu/pairs_per_image": 40.0}))
    assert value(exporter, "odonata_valid_pairs", objective="simipu") == 40
    assert value(exporter, "odonata_loss_part", objective="simipu", part="pairs_per_image") is None


@pytest.mark.parametrize(("saved_s", "known_s"), [(1000.0, 1000), (None, 1234)])
def test_before_its_first_save_a_start_has_the_age_of_what_it_goes_on_from_or_its_own(
    exporter: Exporter, saved_s: float | None, known_s: float
) -> None:
    goodput = Goodput(dict.fromkeys(BUCKETS, 1.0), starts=2, preemptions=0, lost_steps=0)
    Metrics(exporter, resumed_at=7, goodput=goodput, saved_s=saved_s, clock=lambda: 1234.0)
    assert value(exporter, "odonata_last_checkpoint_timestamp_seconds") == known_s
    assert value(exporter, "odonata_last_checkpoint_step") == 7


def test_what_is_hidden_is_said_of_objectives_that_hide(metrics: Metrics) -> None:
    assert value(metrics.exporter, "odonata_mask_ratio", run="first", objective="croco") == 0.9


def test_the_lag_of_checkpoints_is_what_a_kill_would_cost(exporter: Exporter) -> None:
    metrics = Metrics(exporter, resumed_at=10)
    metrics.step(report(14))
    assert value(exporter, "odonata_checkpoint_lag_steps") == 4
    metrics.checkpoint(Saved(step=14))
    metrics.step(report(15))
    assert value(exporter, "odonata_checkpoint_lag_steps") == 1
