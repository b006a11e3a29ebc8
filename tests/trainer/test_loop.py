"""What a step adds up over ranks, who held the others up, and that this process waits for its device once a step."""

from types import SimpleNamespace

import pytest
import torch

from models.batch import Batch, Losses
from models.pretraining import build_model
from tests.models.samples import CROCO, VIDEO_ENCODER, VIDEO_GRID, random_batch
from tests.waits import Waits
from trainer.config.training import OptimConfig, ParallelConfig
from trainer.loop import Progress, Run, Tally, queue_step
from trainer.parallel.engine import build_engine
from trainer.parallel.launch import Launch, Mesh
from trainer.stopwatch import Stopwatch

WORLD_SIZE = 3


class Engine:
    """Rank 0 of three, whose others were busy with their own for `others` seconds."""

    def __init__(self, name: str, others: dict[int, float]) -> None:
        device = torch.device("cpu")
        self.launch = SimpleNamespace(rank=0, world_size=WORLD_SIZE, engine=name, device=device)
        self.stopwatch = Stopwatch(device)
        self.others = others

    def reduce(self, values: torch.Tensor) -> torch.Tensor:
        """Sums over all ranks, equal ones but for the seconds at the end."""
        others = [(WORLD_SIZE - 1) * value for value in values[:-WORLD_SIZE].tolist()]
        return values + torch.tensor([*others, *(self.others.get(rank, 0.0) for rank in range(WORLD_SIZE))])


def agree(name: str, own: dict[str, float], others: dict[int, float]) -> Tally:
    """The tally of a step in which this rank spent `own` by phase."""
    engine = Engine(name, others)
    for phase, seconds in own.items():
        engine.stopwatch._add(phase, seconds)
    run = object.__new__(Run)  # of a run, a tally needs these two
    run.engine, run.stop, run.last_done_s = engine, SimpleNamespace(signal=None), 0.0  # type: ignore[assignment]
    tally = Tally(step=1, rate=0.1)
    batch = Batch({}, {}, ("clip",), reading={"files": 2.0})
    for loss in (1.0, 3.0):
        tally.add(batch, Losses(torch.tensor(loss), {"croco/loss": torch.tensor(loss)}))
    tally.copy(tally.agree(run), torch.tensor(0.5))
    tally.read(run)
    return tally


def test_losses_are_means_and_counts_are_sums() -> None:
    tally = agree("ddp", {}, {})
    assert (tally.loss, tally.parts, tally.grad_norm, tally.stop) == (2.0, {"croco/loss": 2.0}, 0.5, False)
    assert tally.reading == {"files": 4.0}


def test_the_rank_that_was_busy_longest_is_named_with_its_distance_to_the_median() -> None:
    tally = agree("fsdp2", {"data_wait": 0.25, "host_to_device": 0.25}, {1: 2.0, 2: 0.25})
    assert tally.slowest_rank == 1
    assert tally.skew_seconds == pytest.approx(2.0 - 0.5)


@pytest.mark.parametrize(("name", "slowest"), [("ddp", 0), ("zero2", 0), ("fsdp2", 1), ("zero3", 1)])
def test_the_forward_counts_only_where_it_waits_for_nobody(name: str, slowest: int) -> None:
    assert agree(name, {"forward": 5.0}, {1: 1.0, 2: 0.5}).slowest_rank == slowest


@pytest.fixture
def learning() -> Run:
    """Two micro-steps a step of a real engine, with all that is optional."""
    optim = OptimConfig(lr=0.1, clip_grad_norm=1.0, ema_decay=0.9)
    torch.manual_seed(0)
    model = build_model(VIDEO_ENCODER, [CROCO], VIDEO_GRID)
    run = object.__new__(Run)
    run.engine = build_engine(model, Launch(0, 0, 1, 1, "single", "fp32", Mesh(1, 1), True), ParallelConfig(), optim)
    run.config = SimpleNamespace(optim=optim, steps=9)  # type: ignore[assignment]
    run.micro_steps, run.batches, run.progress, run.last_done_s = 2, iter([random_batch()] * 20), Progress(), 0.0
    run.stop = SimpleNamespace(signal=None)  # type: ignore[assignment]
    return run


def test_a_step_waits_for_the_device_once_and_only_when_it_is_read(learning: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    queue_step(learning)  # builds position tables and moments
    reads: list[torch.Tensor] = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: reads.append(tensor) or tolist(tensor))
    with Waits() as waits:
        tally = queue_step(learning)
        assert not reads
        tally.read(learning)
    assert set(waits.found) <= {"lift_fresh"}, "constants of the host are copied behind the queue"
    assert len(reads) == 1
    assert tally.loss > 0 and tally.grad_norm > 0 and not tally.skipped


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_what_is_not_finite_moves_nothing_though_the_host_does_not_look(learning: Run, broken: str) -> None:
    queue_step(learning)
    before = {name: boxes.map(torch.clone) for name, boxes in learning.engine.state().items()}
    if broken == "loss":
        learning.engine.reduce = lambda values: values + torch.tensor([float("nan")] + [0.0] * (len(values) - 1))  # type: ignore[method-assign]
    else:
        learning.engine._grad_norm = lambda: torch.tensor(float("inf"))  # type: ignore[method-assign]
    tally = queue_step(learning)
    tally.read(learning)
    assert tally.skipped
    for name, boxes in learning.engine.state().items():
        for (_, old), (_, new) in zip(before[name].boxes, boxes.boxes, strict=True):
            assert torch.equal(old, new), name
