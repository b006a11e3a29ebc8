"""How far a run is: what an exporter serves, and what the store remembers."""

import json
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from k8s.progress import Progress, parse_metrics, read_stored
from monitoring.exporter import Exporter
from trainer.checkpoint.catalog import name_save
from trainer.checkpoint.record import MANIFEST
from trainer.store.local import LocalStore


def exported(**values: float) -> str:
    exporter = Exporter({"run": "mine", "rank": "0"})
    for name, value in values.items():
        exporter.set(f"odonata_{name}", value)
    return generate_latest(exporter.registry).decode()


STEP = {
    "step": 12,
    "steps": 400,
    "loss": 0.5,
    "clips_per_second": 8.0,
    "checkpoint_lag_steps": 2,
    "last_step_timestamp_seconds": 7.0,
}


def test_the_exporter_s_page_says_how_far_the_run_is() -> None:
    page = exported(**STEP, mfu_ratio=0.4, starts=3, last_checkpoint_timestamp_seconds=5.0)
    assert parse_metrics(page) == Progress(12, 400, 0.5, 8.0, 0.4, saved_step=10, saved_s=5.0, starts=3, seen_s=7.0)


def test_what_nobody_has_set_is_not_told() -> None:
    assert parse_metrics(exported(goodput_ratio=1.0)) is None
    started = parse_metrics(exported(**STEP | {"checkpoint_lag_steps": 12}))
    assert started is not None
    assert (started.mfu, started.saved_step, started.saved_s, started.starts) == (None, None, None, None)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


def write(store: LocalStore, key: str, *lines: dict[str, object]) -> None:
    store.put(key, b"".join(json.dumps(line).encode() + b"\n" for line in lines))


def test_the_record_says_how_far_the_run_was(store: LocalStore) -> None:
    write(store, "starts.jsonl", *({"event": event, "step": 0, "time_s": 1.0} for event in ("start", "preempted", "start")))
    step = {"steps": 400, "loss": 0.5, "clips": 8, "step_seconds": 2.0}
    write(store, "steps.jsonl", {**step, "step": 11, "time_s": 6.0}, {**step, "step": 12, "time_s": 7.0})
    write(store, "checkpoints.jsonl", {"step": 10, "time_s": 5.0}, {"step": 11, "time_s": 6.0, "error": "no room"})
    store.put(name_save(10, writer=1, nonce="00ff").prefix + MANIFEST, b"{}")
    assert read_stored(store) == Progress(12, 400, 0.5, 4.0, None, saved_step=10, saved_s=5.0, starts=2, seen_s=7.0)


def test_a_run_that_has_not_begun_has_no_progress(store: LocalStore) -> None:
    assert read_stored(store) is None
