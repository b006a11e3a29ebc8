"""From a run config to a running run: check, build the parts in one stated order, resume, train.

data        the index and both sources; fields that objectives need are offered; no GPU is touched before this
ranks       join the process group
model       seeded weights, warm start, engine (sharding, optimiser, moving average)
state       the newest whole checkpoint, if there is one
batches     from the step that the state says
observers   the run folder, the progress bar, /metrics
"""

import logging
from collections.abc import Mapping

import torch

from models.attention import choose_backend
from models.objectives.base import Preparation
from models.pretraining import PretrainingModel, build_model, build_preparations
from trainer.checkpoint.manager import CheckpointManager, load_into_model
from trainer.checkpoint.record import Record
from trainer.config.run import RunConfig
from trainer.data.build import build_source, prepare_index
from trainer.data.loader import PlacedSamples, PlaceSampler, build_loader, check_needs
from trainer.data.order import Order, Share
from trainer.data.source import Source
from trainer.errors import CheckpointError, ConfigError
from trainer.held_out import read_held_out
from trainer.loop import Progress, Run, train
from trainer.observe.build import build_observer
from trainer.parallel.engine import Engine, build_engine
from trainer.parallel.launch import Launch, micro_steps, start_process_group, stop_process_group
from trainer.stop import listening
from trainer.store.base import Store
from trainer.store.open import open_store

log = logging.getLogger(__name__)


def start(config: RunConfig, launch: Launch, *, resume: bool) -> None:
    """Run `config` on this rank to its end; `resume` goes on from the newest whole checkpoint."""
    micro_batch, micro = micro_steps(launch, config.parallel, config.global_batch)
    preparations = build_preparations(config.objectives, config.token_grid, config.encoder)
    training, held_out = open_sources(config, preparations)
    shown = held_out or build_source(config.data, "train", augment=False)
    assert shown is not None, "every kind of source has a training split"
    start_process_group(launch, timeout_s=config.parallel.timeout_s)
    try:
        store = open_store(config.run.uri)
        engine = build_trained_engine(config, launch)
        checkpoints = CheckpointManager(store, config.checkpoint)
        progress = resume_from(checkpoints, engine, store) if resume else begin_anew(checkpoints, store)
        share = Share(launch.rank, launch.world_size, micro_batch, micro)
        samples = PlacedSamples(training, Order(config.seed, len(training), config.global_batch), preparations)
        batches = build_loader(
            samples,
            PlaceSampler(share, progress.step, config.steps),
            workers=config.data.workers,
            prefetch_batches=config.data.prefetch_batches,
            pin_memory=launch.device.type == "cuda",
        )
        observer = build_observer(config, launch, store, resumed_at=progress.step, source=training.describe())
        with listening() as stop:
            run = Run(
                config=config,
                engine=engine,
                batches=iter(batches),
                micro_steps=micro,
                held_out=read_held_out(
                    held_out,
                    shown,
                    preparations,
                    seed=config.seed,
                    clips=config.observe.evaluate_clips,
                    micro_batch=micro_batch,
                    launch=launch,
                ),
                checkpoints=checkpoints,
                observer=observer,
                store=store,
                stop=stop,
                progress=progress,
            )
            try:
                train(run)
            finally:
                observer.close()
    finally:
        stop_process_group()


def open_sources(config: RunConfig, preparations: Mapping[str, Preparation]) -> tuple[Source, Source | None]:
    """The training clips and the held-out ones; DataError where they cannot serve the objectives."""
    prepare_index(config.data)
    training = build_source(config.data, "train", augment=True)
    assert training is not None, "every kind of source has a training split"
    check_needs(preparations, training, origin=f"data.kind {config.data.kind}")
    return training, build_source(config.data, "val", augment=False)


def build_trained_engine(config: RunConfig, launch: Launch) -> Engine:
    """The model with the weights that the run starts from, spread over the ranks."""
    try:
        choose_backend(config.encoder.attention, launch.device)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    torch.manual_seed(config.seed)
    model: PretrainingModel = build_model(config.encoder, config.objectives, config.token_grid)
    if config.warm_start:
        load_into_model(open_store(config.warm_start.uri), model, parts=config.warm_start.parts)
    return build_engine(model.to(launch.device), launch, config.parallel, config.optim)


def resume_from(checkpoints: CheckpointManager, engine: Engine, store: Store) -> Progress:
    """Take the state of the newest whole checkpoint; the run's beginning where there is none."""
    record = checkpoints.newest()
    if record is None:
        log.info("no checkpoint in %s: starting at step 0", store.uri)
        return Progress()
    checkpoints.load(record, engine.state())
    log.info("resuming %s after step %d", store.uri, record.step)
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
