"""From a run config to a running run: check, build the parts in one stated order, resume, train.

data        the version of packed data, the index and both sources; fields that objectives need are offered; no GPU is touched before this
ranks       join the process group, become the run's writer
model       seeded weights, warm start, freeze, engine (sharding, optimiser, moving average)
state       the newest whole checkpoint, if there is one
batches     from the step that the state says
observers   the run folder, the progress bar, /metrics, the watchdog
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from models.attention import choose_backend
from models.batch import Batch
from models.config import SimipuConfig
from models.objectives.base import Preparation
from models.pretraining import build_preparations
from monitoring.pulse import Pulse
from trainer.assembly import assemble_model
from trainer.checkpoint.manager import CheckpointManager, load_into_model
from trainer.checkpoint.record import Record
from trainer.config.run import RunConfig
from trainer.data.build import build_source
from trainer.data.loader import PlacedSamples, PlaceSampler, check_needs, needed_fields, read_batches
from trainer.data.mixed_source import portions_of
from trainer.data.order import Order, Share
from trainer.data.source import Source
from trainer.data.workers import choose_cores
from trainer.errors import CheckpointError, ConfigError
from trainer.experiment import check_same_beginning, check_same_experiment, pin_data
from trainer.garbage import collecting_between_steps
from trainer.held_out import HeldOut, read_held_out
from trainer.loop import Progress, Run, train
from trainer.observe.build import build_observer, check_extras
from trainer.observe.metrics import Work
from trainer.observe.observers import Observers
from trainer.parallel.engine import Engine, build_engine
from trainer.parallel.launch import Launch, micro_steps, process_group
from trainer.parallel.peers import find_peers
from trainer.profiling import Profiler
from trainer.stop import listening
from trainer.store.base import Store
from trainer.store.open import open_store
from trainer.utilisation import measure_work
from trainer.watchdog import watching

log = logging.getLogger(__name__)


def start(config: RunConfig, launch: Launch, *, resume: bool, job: str | None = None) -> None:
    """Run `config` on this rank to its end; `resume` goes on from the newest whole checkpoint.

    `job` is the same for every restart of one job, which may take the run over at once.
    """
    check_extras(config.observe)
    store = open_store(config.run.uri, config.store)
    config = pin_data(config, store)
    micro_batch, micro = micro_steps(launch, config.parallel, config.global_batch)
    share = Share(launch.rank, launch.world_size, micro_batch, micro)
    preparations = build_preparations(config.objectives, config.token_grid, config.encoder, cameras=config.cameras)
    training, held_out = open_sources(config, preparations)
    if launch.is_main:
        warn_of_fewer_negatives(config, accumulated=micro)
    with process_group(launch, timeout_s=config.parallel.timeout_s):
        check_same_beginning(config)
        with claimed_checkpoints(config, store, job=job) as checkpoints:
            engine = build_trained_engine(config, launch)
            progress = resume_from(config, checkpoints, engine, store) if resume else begin_anew(checkpoints, store)
            checkpoints.prepare(engine.state())
            batches = build_batches(config, launch, training, preparations, share, first_step=progress.step)
            held_out_clips = read_held_out_clips(config, launch, held_out, preparations, micro_batch=micro_batch)
            work = partial(measure_work, config, launch, held_out_clips.pictures, micro_batch=micro_batch)
            watched = observing(config, launch, store, engine, work, resumed_at=progress.step, source=training.describe())
            with watched as (observer, pulse), listening() as stop, collecting_between_steps():
                train(
                    Run(
                        config=config,
                        engine=engine,
                        batches=batches,
                        micro_steps=micro,
                        held_out=held_out_clips,
                        checkpoints=checkpoints,
                        observer=observer,
                        store=store,
                        stop=stop,
                        pulse=pulse,
                        profiler=Profiler(config.profile, launch, store),
                        progress=progress,
                    )
                )


@contextmanager
def observing(
    config: RunConfig,
    launch: Launch,
    store: Store,
    engine: Engine,
    work: Callable[[], Work],
    *,
    resumed_at: int,
    source: Mapping[str, Any],
) -> Iterator[tuple[Observers, Pulse]]:
    """What shows the run and what watches over it, until the end of the block; `work` is called where utilisation can be shown."""
    observe = config.observe
    pulse = Pulse(factor=observe.hang_factor, least_s=observe.hang_least_s, grace_s=observe.hang_grace_s)
    watched = watching(
        pulse,
        store,
        rank=launch.rank,
        world_size=launch.world_size,
        least_s=observe.hang_least_s,
        doing=lambda: engine.stopwatch.phase,
    )
    with watched as watchdog:
        observer = build_observer(
            config,
            launch,
            store,
            resumed_at=resumed_at,
            source=source,
            pulse=pulse,
            measure_work=work,
            watchdog_cpu_seconds=lambda: watchdog.cpu_seconds,
        )
        try:
            yield observer, pulse
        finally:
            with pulse.during("close"):
                observer.close()


@contextmanager
def claimed_checkpoints(config: RunConfig, store: Store, *, job: str | None) -> Iterator[CheckpointManager]:
    """The checkpoints of the run, whose only writer this is until the end of the block."""
    checkpoints = CheckpointManager(store, config.checkpoint, timeout_s=config.parallel.timeout_s)
    checkpoints.claim(job=job)
    try:
        yield checkpoints
    finally:
        checkpoints.close()


def open_sources(config: RunConfig, preparations: Mapping[str, Preparation]) -> tuple[Source, Source | None]:
    """The training clips and the held-out ones; DataError where they cannot serve the objectives."""
    needs = needed_fields(preparations)
    training = build_source(config.data, "train", needs, augment=True)
    assert training is not None, "every kind of source has a training split"
    check_needs(preparations, training, origin=f"data.kind {config.data.kind}")
    return training, build_source(config.data, "val", needs, augment=False)


def warn_of_fewer_negatives(config: RunConfig, *, accumulated: int) -> None:
    """Accumulation changes a loss that compares samples with each other, because each micro-step knows its own alone: say so."""
    gathering = [each.kind for each in config.objectives if isinstance(each, SimipuConfig) and each.gather_negatives]
    if accumulated > 1 and gathering:
        log.warning(
            "%s takes its negatives from one micro-step, and %d of them make a step: each pair is told from those of %d samples, not "
            "of all %d; a larger parallel.micro_batch or more ranks bring more",
            ", ".join(gathering),
            accumulated,
            config.global_batch // accumulated,
            config.global_batch,
        )


def build_batches(
    config: RunConfig, launch: Launch, training: Source, preparations: Mapping[str, Preparation], share: Share, *, first_step: int
) -> Iterator[Batch]:
    """This rank's micro-batches from `first_step` to the end of the run."""
    samples = PlacedSamples(training, Order(config.seed, portions_of(training), config.global_batch), preparations)
    data = config.data
    return read_batches(
        samples,
        PlaceSampler(share, first_step, config.steps),
        workers=data.workers,
        prefetch_batches=data.prefetch_batches,
        reads_in_flight=data.reads_in_flight,
        timeout_s=data.timeout_s,
        pin_memory=launch.device.type == "cuda",
        cores=choose_cores(
            data.workers,
            local_rank=launch.local_rank,
            local_world_size=launch.local_world_size,
            available=os.sched_getaffinity(0),
        ),
    )


def read_held_out_clips(
    config: RunConfig, launch: Launch, held_out: Source | None, preparations: Mapping[str, Preparation], *, micro_batch: int
) -> HeldOut:
    """The clips of evaluations and pictures; where nothing is held out, pictures show training clips."""
    shown = held_out or build_source(config.data, "train", needed_fields(preparations), augment=False)
    assert shown is not None, "every kind of source has a training split"
    return read_held_out(
        held_out,
        shown,
        preparations,
        seed=config.seed,
        clips=config.observe.evaluate_clips,
        micro_batch=micro_batch,
        launch=launch,
    )


def build_trained_engine(config: RunConfig, launch: Launch) -> Engine:
    """The model with the weights that the run starts from, spread over the ranks."""
    try:
        choose_backend(config.encoder.attention, launch.device)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    torch.manual_seed(config.seed)
    model = assemble_model(config, peers=find_peers())
    if config.warm_start:
        warm = config.warm_start
        load_into_model(open_store(warm.uri, config.store), model, parts=warm.parts, weights=warm.weights)
    return build_engine(model.to(launch.device), launch, config.parallel, config.optim)


def resume_from(config: RunConfig, checkpoints: CheckpointManager, engine: Engine, store: Store) -> Progress:
    """Take the state of the newest whole checkpoint; the run's beginning where there is none."""
    record = checkpoints.newest()
    if record is None:
        log.info("no checkpoint in %s: starting at step 0", store.uri)
        return Progress()
    check_same_experiment(config, store)
    checkpoints.load(record, engine.state())
    engine.state_was_loaded()
    log.info("resuming %s after step %d", store.uri, record.step)
    if record.step >= config.steps:
        log.info("that was the last of its %d steps: nothing is left to do; set steps= higher to go on", config.steps)
    return Progress(**record.progress)


def begin_anew(checkpoints: CheckpointManager, store: Store) -> Progress:
    """Refuse to write over what a run has saved."""
    record: Record | None = checkpoints.newest()
    if record is not None:
        raise CheckpointError(
            f"a run that begins anew was asked for and {store.uri} holds a checkpoint of step {record.step}; "
            "give another run.uri, or --resume auto to go on"
        )
    return Progress()
