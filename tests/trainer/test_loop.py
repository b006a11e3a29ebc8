"""What a step adds up over ranks, beside its losses: who held the others up."""

from types import SimpleNamespace

import pytest
import torch

from models.batch import Batch, Losses
from trainer.loop import Run, Tally
from trainer.stopwatch import Stopwatch

WORLD_SIZE = 3


class Engine:
    """Rank 0 of three, whose others were busy with their own for `others` seconds."""

    def __init__(self, name: str, others: dict[int, float]) -> None:
        device = torch.device("cpu")
        self.launch = SimpleNamespace(rank=0, world_size=WORLD_SIZE, engine=name, device=device)
        self.stopwatch = Stopwatch(device)
        self.others = others

    def reduce(self, values: list[float]) -> list[float]:
        """Sums over all ranks, equal ones but for the seconds at the end."""
        shared, own = values[:-WORLD_SIZE], values[-WORLD_SIZE:]
        return [WORLD_SIZE * value for value in shared] + [one + self.others.get(rank, 0.0) for rank, one in enumerate(own)]


def agree(name: str, own: dict[str, float], others: dict[int, float]) -> Tally:
    """The tally of a step in which this rank spent `own` by phase."""
    engine = Engine(name, others)
    for phase, seconds in own.items():
        engine.stopwatch._add(phase, seconds)
    run = object.__new__(Run)  # of a run, a tally needs these two
    run.engine, run.stop = engine, SimpleNamespace(signal=None)  # type: ignore[assignment]
    tally = Tally()
    batch = Batch({}, {}, ("clip",), reading={"files": 2.0})
    for loss in (1.0, 3.0):
        tally.add(batch, Losses(torch.tensor(loss), {"croco/loss": torch.tensor(loss)}))
    tally.agree(run)
    return tally


def test_losses_are_means_and_counts_are_sums() -> None:
    tally = agree("ddp", {}, {})
    assert (tally.loss, tally.parts, tally.stop) == (2.0, {"croco/loss": 2.0}, False)
    assert tally.reading == {"files": 4.0}


def test_the_rank_that_was_busy_longest_is_named_with_its_distance_to_the_median() -> None:
    tally = agree("fsdp2", {"data_wait": 0.25, "host_to_device": 0.25}, {1: 2.0, 2: 0.25})
    assert tally.slowest_rank == 1
    assert tally.skew_seconds == pytest.approx(2.0 - 0.5)


@pytest.mark.parametrize(("name", "slowest"), [("ddp", 0), ("zero2", 0), ("fsdp2", 1), ("zero3", 1)])
def test_the_forward_counts_only_where_it_waits_for_nobody(name: str, slowest: int) -> None:
    assert agree(name, {"forward": 5.0}, {1: 1.0, 2: 0.5}).slowest_rank == slowest
