"""The training loop: fetch, forward, backward, update, report, save, stop on signal.

    a step:        fetch a batch -> engine.train_micro_step (x micro_steps) -> reduce -> engine.update      queued, nothing is waited for
    one later:     read its numbers -> StepReport                                                            the one wait for the device
    after a step:  evaluate? draw? begin to save? (its numbers are read first) tell of saves that ended? stop?
    pulse:         told of every step, and of what is no step, so that a hang is noticed

Everything here is plumbing. What is learnt is the objectives' business, what a step costs the engine's, what a step
means for the run (its clips, crops and masks) a pure function of (seed, step, slot) in `trainer.data`. The parts are put
together in `trainer.start`.
"""

import json
import logging
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import NoReturn

import torch
from jaxtyping import Float64
from torch import Tensor

from models.batch import Batch, Losses
from monitoring.pulse import Pulse
from trainer.checkpoint.manager import CheckpointManager
from trainer.config.run import RunConfig
from trainer.data.counting import sum_counts
from trainer.errors import DataError, DivergedError, PreemptedError
from trainer.garbage import collect_if_due
from trainer.held_out import HeldOut
from trainer.late_read import LateRead
from trainer.memory import peak_memory_bytes
from trainer.observe.observers import Observers
from trainer.observe.report import StepReport
from trainer.optim import learning_rate
from trainer.parallel.engine import Engine
from trainer.profiling import Profiler
from trainer.stop import StopWish
from trainer.store.base import Store, StoreError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """What a run counts beside its steps; it is saved with every checkpoint."""

    step: int = 0
    """Steps that are queued, so also the number of the next one; the counts below are of those that were read."""
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    replaced_clips: int = 0


@dataclass
class Run:
    """The parts of a run, built by `trainer.start`."""

    config: RunConfig
    engine: Engine
    batches: Iterator[Batch]
    micro_steps: int
    held_out: HeldOut
    checkpoints: CheckpointManager
    observer: Observers
    store: Store
    stop: StopWish
    pulse: Pulse
    profiler: Profiler
    progress: Progress = field(default_factory=Progress)
    last_done_s: float = 0.0
    """When the newest step that was read was done."""


def train(run: Run) -> None:
    """Take the steps that are left; PreemptedError after a signal, with the state saved."""
    unread: list[Tally] = []
    while run.progress.step < run.config.steps:
        with run.profiler.around(run.progress.step + 1):
            unread.append(queue_step(run))
        stop = settle(run, unread, keep=0 if anything_is_due(run) else 1)
        if is_due(run, run.config.observe.evaluate_every_steps):
            evaluate(run)
        if is_due(run, run.config.observe.pictures_every_steps):
            draw(run)
        if is_due(run, run.config.checkpoint.every_steps):
            save(run)  # last, so that what a kill takes is done again on resume, evaluation included
        report_saves(run)
        collect_if_due(run.progress.step)
        if stop and run.progress.step < run.config.steps:
            settle(run, unread, keep=0)
            stop_saved(run)
    finish_saves(run)


def queue_step(run: Run) -> "Tally":
    """Give the device all there is to do in one optimiser step; nothing here waits for what comes out."""
    tally = Tally(step=run.progress.step + 1, rate=learning_rate(run.progress.step, run.config.optim, steps=run.config.steps))
    for micro_step in range(run.micro_steps):
        batch = tally.fetch(run)
        last = micro_step + 1 == run.micro_steps
        tally.add(batch, run.engine.train_micro_step(batch, share=1 / run.micro_steps, last=last))
    agreed = tally.agree(run)
    norm = run.engine.update(tally.rate, loss=agreed[0])
    tally.copy(agreed, norm)
    tally.phase_seconds = run.engine.stopwatch.take()
    run.progress = replace(run.progress, step=tally.step)
    return tally


def settle(run: Run, unread: list["Tally"], *, keep: int) -> bool:
    """Read what came out of all steps but the last `keep` and tell of it; whether any rank was asked to stop.

    A step is read once the next one is queued, so the device never waits for this process to have read and told.
    """
    stop = False
    while len(unread) > keep:
        tally = unread.pop(0)
        tally.read(run)
        run.progress = advance(run.progress, skipped=tally.skipped, replaced=tally.replaced)
        if tally.skipped:
            write_incident(run, tally)
        report = describe(run, tally)
        run.observer.step(report)
        run.pulse.tell_step(report.step, report.step_seconds)
        check_health(run, report)
        stop = stop or tally.stop
    return stop


def describe(run: Run, tally: "Tally") -> StepReport:
    """What a step that was read did."""
    return StepReport(
        step=tally.step,
        steps=run.config.steps,
        loss=tally.loss,
        parts=tally.parts,
        grad_norm=tally.grad_norm,
        learning_rate=tally.rate,
        skipped=tally.skipped,
        step_seconds=tally.seconds,
        data_seconds=tally.phase_seconds["data_wait"],
        phase_seconds=tally.phase_seconds,
        slowest_rank=tally.slowest_rank,
        skew_seconds=tally.skew_seconds,
        reading=tally.reading,
        clips=run.config.global_batch,
        tokens=run.config.global_batch * run.engine.tokens_per_sample,
        skipped_steps=run.progress.skipped_steps,
        replaced_clips=run.progress.replaced_clips,
        memory_bytes=peak_memory_bytes(run.engine.launch.device),
    )


@dataclass
class Tally:
    """What the micro-batches of a step add up to: while it is queued on this rank and its device, once it is read over all of them."""

    step: int
    rate: float
    loss: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    grad_norm: float = 0.0
    replaced: int = 0
    stop: bool = False
    seconds: float = 0.0
    """From when the step before was done, or from the beginning of this one if that was later, until its numbers were there."""
    phase_seconds: dict[str, float] = field(default_factory=dict)
    slowest_rank: int = 0
    skew_seconds: float = 0.0
    reading: dict[str, float] = field(default_factory=dict)
    clips: list[str] = field(default_factory=list)
    _began_s: float = field(default_factory=time.perf_counter)
    _losses: list[Losses] = field(default_factory=list)
    _coming: LateRead | None = None

    @property
    def skipped(self) -> bool:
        """Whether nothing moved: the engine decides so by the same two numbers."""
        return not (math.isfinite(self.loss) and math.isfinite(self.grad_norm))

    def fetch(self, run: Run) -> Batch:
        """The next micro-batch on the device; waiting for it is counted."""
        stopwatch = run.engine.stopwatch
        with stopwatch.timing_host("data_wait"):
            batch = next(run.batches)
        with stopwatch.timing("host_to_device"):
            return batch.to(run.engine.launch.device)

    def add(self, batch: Batch, losses: Losses) -> None:
        """Note one micro-batch; tensors stay on the device."""
        for reason in batch.replaced:
            log.warning("replaced a clip that could not be read: %s", reason)
        self.clips += batch.clips
        self.replaced += len(batch.replaced)
        self.reading = sum_counts([self.reading, batch.reading])
        self._losses.append(Losses(losses.total.detach(), losses.parts))

    def agree(self, run: Run) -> Float64[Tensor, " n"]:
        """Means over all ranks, on the device, by one collective: the loss and its parts, then what only this rank knows."""
        names = self._names
        micro = torch.stack([torch.stack([losses.total, *(losses.parts[n] for n in names)]) for losses in self._losses])
        own = torch.tensor([self.replaced, run.stop.signal is not None, *own_seconds(run)], dtype=torch.float64)
        values = torch.cat([micro.double().mean(dim=0), own.to(micro.device, non_blocking=True)])
        with run.engine.stopwatch.timing("collective_wait"):
            return run.engine.reduce(values) / run.engine.launch.world_size

    def copy(self, agreed: Float64[Tensor, " n"], norm: Tensor) -> None:
        """Begin to bring what came out to this process."""
        self._coming = LateRead(torch.cat([agreed, norm.to(agreed)[None]]))

    def read(self, run: Run) -> None:
        """Wait for what came out; the losses' tensors are let go."""
        assert self._coming, "a step is queued before it is read"
        *means, self.grad_norm = self._coming.read()
        world_size, names = run.engine.launch.world_size, self._names
        self.loss, *parts = means[: 1 + len(names)]
        self.parts = dict(zip(names, parts, strict=True))
        replaced, stop, *of_ranks = (world_size * mean for mean in means[1 + len(names) :])
        self.replaced, self.stop = round(replaced), stop > 0
        self.slowest_rank = of_ranks.index(max(of_ranks))
        self.skew_seconds = max(of_ranks) - statistics.median(of_ranks)
        self._losses.clear()
        done_s = self._coming.arrived_s
        self.seconds, run.last_done_s = done_s - max(self._began_s, run.last_done_s), done_s

    @property
    def _names(self) -> list[str]:
        return sorted(self._losses[0].parts)


def own_seconds(run: Run) -> list[float]:
    """What each rank, this one alone known, spent in the step on what no other rank can hold up; the sum over ranks knows all.

    Waiting for data and copying it; the forward, too, where weights are not gathered in it.
    """
    launch, stopwatch = run.engine.launch, run.engine.stopwatch
    phases = ("data_wait", "host_to_device") + (() if launch.engine in ("fsdp2", "zero3") else ("forward",))
    seconds = [0.0] * launch.world_size
    seconds[launch.rank] = sum(stopwatch.seconds(phase) for phase in phases)
    return seconds


def advance(progress: Progress, *, skipped: bool, replaced: int) -> Progress:
    """The counts after one more step was read."""
    return replace(
        progress,
        skipped_steps=progress.skipped_steps + skipped,
        skipped_in_a_row=progress.skipped_in_a_row + 1 if skipped else 0,
        replaced_clips=progress.replaced_clips + replaced,
    )


def anything_is_due(run: Run) -> bool:
    """Whether something happens after this step that has to know how it went."""
    observe, checkpoint = run.config.observe, run.config.checkpoint
    every = (observe.evaluate_every_steps, observe.pictures_every_steps, checkpoint.every_steps)
    return any(is_due(run, every_steps) for every_steps in every)


def is_due(run: Run, every_steps: int | None) -> bool:
    """Whether something that happens every so often, and always at the end, happens after this step."""
    step = run.progress.step
    return step == run.config.steps or (every_steps is not None and step % every_steps == 0)


def check_health(run: Run, report: StepReport) -> None:
    """End a run that no longer learns (DivergedError) or whose data is falling apart (DataError)."""
    limit = run.config.optim.max_skipped_steps
    if run.progress.skipped_in_a_row >= limit:
        raise DivergedError(
            f"loss or gradient was not finite for {limit} steps in a row, up to step {report.step}; the clips are named in "
            f"{run.store.uri}/incidents; lower optim.lr, set optim.clip_grad_norm, or look at those clips"
        )
    replaced, clips, data = run.progress.replaced_clips, report.step * run.config.global_batch, run.config.data
    if not data.tolerates(replaced, clips):
        raise DataError(
            f"{replaced} clips, {replaced / clips:.1%} of those up to step {report.step}, could not be read and were replaced; "
            f"data.max_replaced_share allows {data.max_replaced_share:.1%}: mend the data (the log names the clips) or raise it"
        )


def save(run: Run) -> None:
    """Begin a checkpoint of the state after this step; every rank takes part, and training goes on once the state is copied."""
    with run.pulse.during("checkpoint"):
        run.checkpoints.save(
            run.progress.step,
            run.engine.state(),
            engine=run.engine.launch.engine,
            progress=asdict(run.progress),
            before_commit=run.observer.sync,
        )


def report_saves(run: Run) -> None:
    """Tell of the saves that have ended since."""
    for report in run.checkpoints.poll():
        run.observer.checkpoint(report)


def finish_saves(run: Run) -> None:
    """Wait for the save in flight, whose failure is now an error: no later one will make up for it."""
    with run.pulse.during("checkpoint"):
        run.checkpoints.finish()
    report_saves(run)
    if run.checkpoints.last_error:
        raise run.checkpoints.last_error


def stop_saved(run: Run) -> NoReturn:
    """End after a signal with this step saved, or with the newest checkpoint where the grace period is too short for one more."""
    if not is_due(run, run.config.checkpoint.every_steps):
        with run.pulse.during("checkpoint"):
            fits = run.checkpoints.fits_into(run.config.checkpoint.grace_s - run.stop.seconds_ago)
        if fits:
            save(run)
        else:
            log.warning("too little of the grace period is left for a checkpoint of step %d", run.progress.step)
    finish_saves(run)
    run.observer.preempted(run.progress.step)
    raise PreemptedError(
        f"stopped by a signal after step {run.progress.step}; step {run.checkpoints.last_committed_step} is saved; "
        "start the same job again to go on"
    )


def evaluate(run: Run) -> None:
    """Figures of the pretext task on the held-out clips."""
    started = time.perf_counter()
    with run.pulse.during("evaluation"):
        figures = run.held_out.evaluate(run.engine)
    if figures:
        run.observer.evaluation(run.progress.step, figures, seconds=time.perf_counter() - started)


def draw(run: Run) -> None:
    """Contact sheets of a few held-out clips."""
    with run.pulse.during("pictures"):
        run.observer.pictures(run.progress.step, run.held_out.draw(run.engine))


def write_incident(run: Run, tally: Tally) -> None:
    """Keep which clips this rank saw in a step whose loss or gradient was not finite."""
    rank = run.engine.launch.rank
    incident = {"step": tally.step, "rank": rank, "loss": repr(tally.loss), "clips": tally.clips}
    try:
        run.store.put(f"incidents/step-{tally.step:08d}-rank-{rank}.json", json.dumps(incident, indent=2).encode())
    except StoreError as error:  # one rank that ends here would take the others along
        log.warning("could not keep the incident %s: %s", incident, error)
    log.warning("step %d skipped: loss %s is not finite, or its gradient; clips in incidents/", tally.step, tally.loss)
