"""A trace of the steps that were asked for, by the ranks that were asked for."""

import gzip
import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from trainer.config.training import ProfileConfig
from trainer.parallel.launch import Launch, Mesh
from trainer.profiling import Profiler
from trainer.store.base import StoreError
from trainer.store.open import open_store

LAUNCH = Launch(0, 0, 1, 1, "single", "fp32", Mesh(1, 1), True)
CONFIG = ProfileConfig(steps=(2, 3))
TRACE = "profile/steps-2-3/rank-0.trace.json.gz"


def take_steps(profiler: Profiler) -> None:
    for step in range(1, 6):
        with profiler.around(step), torch.profiler.record_function(f"step {step}"):
            torch.ones(8, 8) @ torch.ones(8, 8)


def test_the_trace_shows_the_steps_that_were_asked_for_and_no_others(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    take_steps(Profiler(CONFIG, LAUNCH, store))
    events = json.loads(gzip.decompress(store.get(TRACE)))["traceEvents"]
    names = [event.get("name") for event in events]
    assert {name for name in names if str(name).startswith("step ")} == {"step 2", "step 3"}
    assert names.count("aten::mm") == 2


@pytest.mark.parametrize(("config", "launch"), [(None, LAUNCH), (CONFIG, replace(LAUNCH, rank=1))], ids=["unasked", "rank 1"])
def test_nothing_is_written_by_who_was_not_asked(config: ProfileConfig | None, launch: Launch, tmp_path: Path) -> None:
    take_steps(Profiler(config, launch, open_store(str(tmp_path))))
    assert not list(tmp_path.iterdir())


def test_a_trace_that_cannot_be_written_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(str(tmp_path))

    def refuse(*_arguments: object) -> None:
        raise StoreError("full")

    monkeypatch.setattr(store, "put", refuse)
    with caplog.at_level(logging.WARNING):
        take_steps(Profiler(CONFIG, LAUNCH, store))
    assert "the profile of steps 2 to 3 could not be written: full" in caplog.text


@pytest.mark.parametrize("steps", [(0, 3), (4, 3)])
def test_steps_that_make_no_sense_are_refused(steps: tuple[int, int]) -> None:
    with pytest.raises(ValidationError, match="counted from 1; give the first and the last one"):
        ProfileConfig(steps=steps)
