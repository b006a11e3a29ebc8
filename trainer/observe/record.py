"""The record of a run: what is left to read when the run is over, and what a resume goes on from.

    config.yaml          the resolved config of the last start; config-until-step-N.yaml is one that was changed then
    environment.json     versions, revision, hardware and launch of the last start
    steps.jsonl          one object a step, StepReport's fields but `reading`, and `time_s`, seconds since 1970
    evaluations.jsonl    one object an evaluation: step, time_s and the figures by name
    checkpoints.jsonl    one object a save: step, time_s, seconds, stall_seconds, bytes, and the error of one that failed
    starts.jsonl         one object a start, with what the kill before it cost, and one for each stop after a signal

A run that resumes after step k keeps the lines up to step k, so each step is there once; of starts all lines stay. Only rank 0 keeps
a record.

Left to whom: contact sheets are `pictures`, checkpoints `trainer.checkpoint`, incidents the loop's.
"""

import json
import logging
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from trainer.checkpoint.claim import watch_writer
from trainer.observe.history import STARTS, describe_start
from trainer.observe.journal import Journal
from trainer.observe.report import SavedCheckpoint, SilentObserver, StepReport
from trainer.store.base import ObjectMissingError, Store

log = logging.getLogger(__name__)


class RunRecord(SilentObserver):
    """Writes the record of one run to `store`; errors are StoreError."""

    def __init__(
        self,
        store: Store,
        *,
        resumed_at: int,
        config_yaml: str,
        environment: Mapping[str, Any],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._clock = clock
        self._is_ours = watch_writer(store)
        start = describe_start(store, resumed_at=resumed_at)
        _keep_last_config(store, config_yaml, resumed_at)
        store.put("config.yaml", config_yaml.encode())
        store.put("environment.json", json.dumps(environment, indent=2).encode() + b"\n")
        self._steps = Journal(store, "steps.jsonl", last_step=resumed_at)
        self._evaluations = Journal(store, "evaluations.jsonl", last_step=resumed_at)
        self._checkpoints = Journal(store, "checkpoints.jsonl", last_step=resumed_at)
        self._starts = Journal(store, STARTS, last_step=sys.maxsize)
        self._append(self._starts, start)
        self._starts.sync()  # a kill before the first checkpoint counts, too

    def step(self, report: StepReport) -> None:
        """See Observer."""
        entry = asdict(report) | {"phase_seconds": {phase: round(seconds, 6) for phase, seconds in report.phase_seconds.items()}}
        del entry["reading"]  # of one rank, and the file is put whole with every checkpoint
        self._append(self._steps, entry)

    def checkpoint(self, saved: SavedCheckpoint) -> None:
        """See Observer."""
        entry = {"step": saved.step, "seconds": saved.seconds, "stall_seconds": saved.stall_seconds, "bytes": saved.bytes}
        self._append(self._checkpoints, entry | ({"error": str(saved.error)} if saved.error else {}))

    def sync(self) -> None:
        """Bring all lines to where they outlive this process: a resume does not write those up to its checkpoint again."""
        for journal in self._journals:
            journal.sync()

    def evaluation(self, step: int, figures: Mapping[str, float], *, seconds: float) -> None:
        """See Observer."""
        self._append(self._evaluations, {"step": step, "seconds": seconds, **figures})

    def preempted(self, step: int) -> None:
        """See Keeper."""
        self._append(self._starts, {"event": "preempted", "step": step})

    def close(self) -> None:
        """See Observer; what lies in the store is left alone where another writer has taken the run over and goes on with it."""
        if self._is_ours():
            self.sync()
        else:
            log.warning("another writer has taken over; its record of the run stays as it is")
        for journal in self._journals:
            journal.close()

    @property
    def _journals(self) -> tuple[Journal, ...]:
        return self._steps, self._evaluations, self._checkpoints, self._starts

    def _append(self, journal: Journal, entry: Mapping[str, Any]) -> None:
        journal.append({**entry, "time_s": self._clock()})


def _keep_last_config(store: Store, config_yaml: str, resumed_at: int) -> None:
    """Steps up to `resumed_at` were taken with the config that is there: keep it where it is another one."""
    try:
        before = store.get("config.yaml")
    except ObjectMissingError:
        return
    if resumed_at and before != config_yaml.encode():
        store.put(f"config-until-step-{resumed_at:08d}.yaml", before)
