"""What a start finds of those before it: lost steps, the last sign of life, and the age of its own process."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.observe_fakes import Saved, report
from trainer.errors import ConfigError
from trainer.observe.history import describe_start, find_age_s, read_entries, read_goodput, read_last_save_s
from trainer.observe.record import RunRecord
from trainer.store.open import open_store


def write(folder: Path, name: str, *entries: dict[str, Any], torn: str = "") -> None:
    (folder / name).write_text("".join(json.dumps(entry) + "\n" for entry in entries) + torn)


def test_steps_after_the_checkpoint_are_lost_with_the_time_that_they_took(tmp_path: Path) -> None:
    steps = [{"step": step, "step_seconds": float(step), "time_s": 100.0 + step} for step in (1, 2, 3, 4)]
    write(tmp_path, "steps.jsonl", *steps, torn='{"step": 5, "step_seconds": 5.0, "ti')
    start = describe_start(open_store(tmp_path), resumed_at=2)
    assert (start["lost_steps"], start["lost_seconds"], start["last_sign_s"]) == (2, 7.0, 104.0)


def test_a_first_start_has_lost_nothing(tmp_path: Path) -> None:
    start = describe_start(open_store(tmp_path), resumed_at=0)
    assert (start["lost_steps"], start["lost_seconds"]) == (0, 0.0)
    assert start["last_sign_s"] == start["began_s"] <= time.time()


def test_a_process_knows_its_age() -> None:
    first = find_age_s()
    time.sleep(0.05)
    assert 0.04 < find_age_s() - first < 5
    assert first > 0.1  # an interpreter with torch does not start faster


def test_goodput_of_a_folder_without_a_run_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no starts\.jsonl; give the run\.uri of a run"):
        read_goodput(open_store(tmp_path))


def test_what_is_no_entry_is_passed_over(tmp_path: Path) -> None:
    foreign = '[1]\nnonsense\n{"step": "2", "time_s": 2.0}\n'
    write(tmp_path, "starts.jsonl", {"step": 1, "time_s": 1.0}, {"time_s": 2.0}, torn=foreign + '{"step": 3, "time_s": 3.0}')
    assert read_entries(open_store(tmp_path), "starts.jsonl") == [{"step": 1, "time_s": 1.0}]


def record(folder: Path, *, resumed_at: int, clock: list[float]) -> RunRecord:
    return RunRecord(open_store(folder), resumed_at=resumed_at, config_yaml="a: 1\n", environment={}, clock=lambda: clock[0])


def test_a_run_that_was_killed_and_preempted_adds_up(tmp_path: Path) -> None:
    now = [time.time() + 10]
    first = record(tmp_path, resumed_at=0, clock=now)
    for step in (1, 2, 3):
        now[0] += 2
        first.step(report(step, step_seconds=2.0, data_seconds=0.5))
    first.checkpoint(Saved(step=2, stall_seconds=0.25))
    first.close()  # leaves the lines that a kill would leave; step 3 is lost

    second = record(tmp_path, resumed_at=2, clock=now)
    now[0] += 2
    second.step(report(3, step_seconds=2.0, data_seconds=0.5))
    second.preempted(3)
    second.close()
    goodput = read_goodput(open_store(tmp_path))
    assert (goodput.starts, goodput.preemptions, goodput.lost_steps) == (2, 1, 1)
    assert goodput.seconds["productive"] == 3 * 1.5
    assert goodput.seconds["lost"] == 2
    assert goodput.seconds["checkpoint"] == 0.25


def test_the_last_save_is_the_last_one_that_did_not_fail(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    assert read_last_save_s(store) is None
    saves = [{"step": 2, "time_s": 20.0}, {"step": 4, "time_s": 40.0}, {"step": 6, "time_s": 60.0, "error": "full"}]
    store.put("checkpoints.jsonl", b"".join(json.dumps(save).encode() + b"\n" for save in saves))
    assert read_last_save_s(store) == 40
