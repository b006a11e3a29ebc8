"""Reports and sheets for tests of observers."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from trainer.observe.report import SilentObserver, StepReport

CPU = torch.device("cpu")

REPORT = StepReport(
    step=1,
    steps=4,
    loss=0.5,
    parts={"croco/pixels": 0.5},
    grad_norm=2.0,
    learning_rate=1e-3,
    skipped=False,
    step_seconds=0.5,
    data_seconds=0.125,
    phase_seconds={"data_wait": 0.125, "forward": 0.125, "backward": 0.25},
    slowest_rank=1,
    skew_seconds=0.0625,
    reading={"files": 8.0, "bytes": 8000.0, "decode_seconds": 1.0, "load_seconds": 1.5, "fetches": 4.0, "cache_hits": 2.0},
    clips=8,
    tokens=1000,
    skipped_steps=0,
    replaced_clips=0,
    memory_bytes=2**30,
)


def report(step: int = 1, **changes: object) -> StepReport:
    """A plausible report of `step`, with `changes`."""
    return replace(REPORT, step=step, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Saved:
    """A save that is over, as far as observers see it."""

    step: int = 1
    seconds: float = 0.5
    stall_seconds: float = 0.125
    bytes: int = 2_000_000
    error: Exception | None = None


@dataclass(frozen=True)
class Seat:
    """A place among the ranks."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 2
    local_world_size: int = 2
    device: torch.device = CPU
    engine: str = "fsdp2"
    precision: str = "bf16"


def sheets(*, clips: int = 2, frames: int = 4, height: int = 6, width: int = 10) -> dict[str, dict[str, np.ndarray]]:
    """Random pictures of one objective."""
    rng = np.random.default_rng(0)
    titles = ("masked input", "reconstruction", "target", "reference")
    return {"croco": {title: rng.random((clips, frames, 3, height, width), dtype=np.float32) for title in titles}}


class SilentKeeper(SilentObserver):
    """Keeps nothing."""

    def sync(self) -> None:
        """See Keeper."""

    def preempted(self, step: int) -> None:
        """See Keeper."""


class FailingObserver(SilentKeeper):
    """Fails at each step and counts how often it was asked."""

    def __init__(self) -> None:
        self.calls = 0

    def step(self, report: StepReport) -> None:
        self.calls += 1
        raise RuntimeError("broken on purpose")


class NotingObserver(SilentKeeper):
    """Remembers the steps it was told of, and whether it was closed."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.closed = False

    def step(self, report: StepReport) -> None:
        self.steps.append(report.step)

    def close(self) -> None:
        self.closed = True
