"""Goodput: how much of a run's wall time made steps that count, and where the rest went, over all its starts.

    goodput = productive / wall,     wall = first start to the last sign of life

    productive    steps of the record, without their waiting for data
    data_wait     waiting for data in those steps
    checkpoint    waiting for checkpoints
    evaluation    evaluations on held-out clips
    init          from a process' start to its first step could begin
    lost          steps that a kill took and a later start made again
    down          from the last sign of life of one start to the next start: noticing, scheduling, pulling images
    other         what none of these explains: record, pictures, logs

(The definition is that of Google's ML productivity goodput.) A pure function of the run's journals: `starts.jsonl`, `steps.jsonl`,
`checkpoints.jsonl`, `evaluations.jsonl`. Where the record is no folder, a killed pod takes the steps since its last checkpoint along,
and what they took shows as down and not as lost.

Left to whom: who writes the journals, and reads them (`trainer.observe`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

BUCKETS = ("productive", "data_wait", "checkpoint", "evaluation", "init", "lost", "down", "other")

Entry = Mapping[str, Any]
"""One line of a journal."""


@dataclass(frozen=True)
class Goodput:
    """Seconds of a run by bucket; all of them together are its wall time."""

    seconds: Mapping[str, float]
    starts: int
    preemptions: int
    """Starts that ended after a signal, with their state saved."""
    lost_steps: int

    @property
    def wall_s(self) -> float:
        return sum(self.seconds.values())

    @property
    def ratio(self) -> float:
        return self.seconds["productive"] / self.wall_s if self.wall_s else 0.0


def measure_goodput(
    starts: Iterable[Entry], steps: Iterable[Entry], checkpoints: Iterable[Entry], evaluations: Iterable[Entry]
) -> Goodput:
    """From the entries of a run's journals, each in the order in which they were written."""
    starts, steps, checkpoints, evaluations = list(starts), list(steps), list(checkpoints), list(evaluations)
    begun, preempted = ([entry for entry in starts if entry["event"] == event] for event in ("start", "preempted"))
    if not begun:
        return Goodput(dict.fromkeys(BUCKETS, 0.0), 0, 0, 0)
    waiting = sum(step["data_seconds"] for step in steps)
    lasts = [journal[-1]["time_s"] for journal in (begun, preempted, steps, checkpoints, evaluations) if journal]
    seconds = {
        "productive": sum(step["step_seconds"] for step in steps) - waiting,
        "data_wait": waiting,
        "checkpoint": sum(save["stall_seconds"] for save in checkpoints),
        "evaluation": sum(evaluation.get("seconds", 0.0) for evaluation in evaluations),
        "init": sum(start["time_s"] - start["began_s"] for start in begun),
        "lost": sum(start["lost_seconds"] for start in begun),
        "down": sum(max(0.0, after["began_s"] - after["last_sign_s"]) for _, after in pairwise(begun)),
    }
    wall_s = max(lasts) - begun[0]["began_s"]
    seconds["other"] = max(0.0, wall_s - sum(seconds.values()))
    return Goodput(
        {bucket: seconds[bucket] for bucket in BUCKETS},
        len(begun),
        len(preempted),
        sum(start["lost_steps"] for start in begun),
    )
