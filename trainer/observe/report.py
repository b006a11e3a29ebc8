"""What observers are told, and what an observer is.

The loop makes one StepReport a step and knows nothing of who looks at it. Losses, the gradient's norm and the counts are
those of the whole step over all ranks, so every rank reports the same ones; seconds and memory are those of this rank.

Left to whom: `trainer.loop` fills the reports in, `observers` says what happens when an observer fails.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

Sheets = Mapping[str, Mapping[str, np.ndarray]]
"""Objective -> column title -> float images B T 3 H W in [0, 1]."""


@dataclass(frozen=True)
class StepReport:
    """One finished optimiser step."""

    step: int
    """Steps that are finished, this one included."""
    steps: int
    """Steps that the run is to take."""
    loss: float
    parts: dict[str, float]
    """Losses by name `objective/part`."""
    grad_norm: float
    """Norm of the whole gradient before clipping."""
    learning_rate: float
    skipped: bool
    """The loss or the gradient was not finite, so no weight moved."""
    step_seconds: float
    """All of the step, waiting for data included."""
    data_seconds: float
    """Of those, waiting for data."""
    phase_seconds: dict[str, float]
    """Of those, by phase: data_wait, host_to_device, forward, backward, collective_wait, optimiser; on CUDA some of them come late."""
    slowest_rank: int
    """The rank that spent most on what no other rank can hold up: data, copying, and the forward where weights are not gathered."""
    skew_seconds: float
    """How much longer that took it than the median rank."""
    reading: dict[str, float]
    """What bringing this rank's clips took, as the loader counts: files, fetches, bytes, cache_hits, decode_ and load_seconds."""
    clips: int
    tokens: int
    skipped_steps: int
    """Since the run began, also over resumes."""
    replaced_clips: int
    """Clips that could not be read and were replaced, since the run began."""
    memory_bytes: int
    """Most memory that this rank has held: CUDA allocations where there is a GPU, else resident memory."""

    @property
    def data_share(self) -> float:
        """Part of the step that was spent waiting for data."""
        return self.data_seconds / self.step_seconds if self.step_seconds else 0.0


@runtime_checkable
class SavedCheckpoint(Protocol):
    """A save that is over; `trainer.checkpoint` has the class, observers need only this much of it."""

    @property
    def step(self) -> int: ...
    @property
    def seconds(self) -> float: ...
    @property
    def stall_seconds(self) -> float: ...
    @property
    def bytes(self) -> int: ...
    @property
    def error(self) -> Exception | None: ...


@runtime_checkable
class Observer(Protocol):
    """Something that is told what a run does. Its methods return soon, since the next step waits for them."""

    def step(self, report: StepReport) -> None:
        """A step is finished."""
        ...

    def checkpoint(self, saved: SavedCheckpoint) -> None:
        """A checkpoint is committed, or has failed."""
        ...

    def evaluation(self, step: int, figures: Mapping[str, float], *, seconds: float) -> None:
        """The held-out clips were evaluated after `step`, which took so long."""
        ...

    def pictures(self, step: int, sheets: Sheets) -> None:
        """The objectives drew what they see after `step`."""
        ...

    def close(self) -> None:
        """The run ends, in whatever way; nothing is reported after it, and closing twice is no error."""
        ...


@runtime_checkable
class Keeper(Observer, Protocol):
    """The observer that keeps the run's record."""

    def sync(self) -> None:
        """Bring the record to where it outlives this process."""
        ...

    def preempted(self, step: int) -> None:
        """The run was asked to stop and does, with `step` or an earlier one saved."""
        ...


class SilentObserver:
    """Shows nothing: observers that care for some of the events inherit the rest."""

    def step(self, report: StepReport) -> None:
        """See Observer."""

    def checkpoint(self, saved: SavedCheckpoint) -> None:
        """See Observer."""

    def evaluation(self, step: int, figures: Mapping[str, float], *, seconds: float) -> None:
        """See Observer."""

    def pictures(self, step: int, sheets: Sheets) -> None:
        """See Observer."""

    def close(self) -> None:
        """See Observer."""
