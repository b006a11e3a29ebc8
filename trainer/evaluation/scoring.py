"""Scoring a trained head: its last checkpoint on held-out clips, and the trivial answer on the same ones.

The clips are the first of an order of their own, each once, whatever the seed of the run and the weights of its data sets, without
augmentation: runs and encoders are compared on the same ones. What the trivial answer knows it has from training clips. One process
does it, batch by batch, so memory does not grow with the number of clips.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from models.batch import Batch
from models.objectives.base import Preparation
from models.pretraining import PretrainingModel, build_preparations
from trainer.assembly import assemble_model
from trainer.checkpoint.manager import load_into_model
from trainer.config.run import RunConfig
from trainer.data.build import Split, build_source
from trainer.data.loader import PlacedSamples, PlaceSampler, needed_fields, read_batches
from trainer.data.order import Order, Portion, Share
from trainer.errors import DataError
from trainer.evaluation.protocol import PROTOCOLS, Protocol, TaskName, Truth
from trainer.experiment import pin_data
from trainer.store.open import open_store

log = logging.getLogger(__name__)

_SEED = 0
_BATCH = 16
_TRIVIAL_CLIPS = 256
"""Training clips that the trivial answer is made of; their truth is held at once."""


@dataclass(frozen=True)
class ScoredRun:
    """What a run came to."""

    figures: Mapping[str, float]
    trivial: Mapping[str, float]
    """Of the trivial answer to the same clips."""
    clips: int
    files: Mapping[str, bytes]
    """What is kept of the answers, by name."""


def score_run(config: RunConfig, task: TaskName, *, clips: int, device: torch.device) -> ScoredRun:
    """The figures of a run that has ended, on at most `clips` held-out clips; files of its answers go beside it."""
    store = open_store(config.run.uri, config.store)
    config = pin_data(config, store)
    model = assemble_model(config)
    load_into_model(store, model, parts="model")
    scored = score_model(model.to(device).eval(), config, task, clips=clips, device=device)
    for name, content in scored.files.items():
        store.put(name, content)
    return scored


@torch.no_grad()
def score_model(model: PretrainingModel, config: RunConfig, task: TaskName, *, clips: int, device: torch.device) -> ScoredRun:
    """The figures of a model in evaluation mode."""
    protocol = PROTOCOLS[task]
    constant = find_trivial_answer(config, task, protocol)
    scores, rows, trivial = protocol.scores, [], []
    kept: dict[str, list[np.ndarray]] = {name: [] for name in scores.keeps}
    for batch, count in read_clips(config, "val", clips):
        truth = truth_of(batch, task)[:count]
        predicted = model(batch.to(device), "predict")[task].cpu().numpy()[:count]
        rows.append(scores.measure(predicted, truth))
        trivial.append(scores.measure(repeat_constant(constant, predicted.shape), truth))
        for name, parts in kept.items():
            parts.append(batch.prepared[task][name].numpy()[:count].copy())
    pooled, of_trivial = np.concatenate(rows), np.concatenate(trivial)
    files = scores.write_files(pooled, {name: np.concatenate(parts) for name, parts in kept.items()})
    return ScoredRun(scores.figures(pooled), scores.figures(of_trivial), len(pooled), files)


def find_trivial_answer(config: RunConfig, task: TaskName, protocol: Protocol) -> np.ndarray:
    """The constant that the protocol makes of training clips."""
    truths = [truth_of(batch, task)[:count].copy() for batch, count in read_clips(config, "train", _TRIVIAL_CLIPS)]
    return protocol.answer_trivially(np.concatenate(truths))


def repeat_constant(constant: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """`constant` as it stands, as often as the leading axes of an answer of this shape have it."""
    return np.broadcast_to(constant, (*shape[: len(shape) - constant.ndim], *constant.shape))


def truth_of(batch: Batch, task: TaskName) -> Truth:
    """What is true of the samples of a batch."""
    return batch.prepared[task]["truth"].numpy()


def read_clips(config: RunConfig, split: Split, clips: int) -> Iterator[tuple[Batch, int]]:
    """Batches of at most `clips` clips of a split, with how many of each count; the next one may lie where the last one lay.

    DataError where more of them cannot be read than `data.max_replaced_share` allows.
    """
    preparations = prepare_as(config)
    source = build_source(config.data, split, needed_fields(preparations), augment=False)
    assert source is not None, "it was checked that the data has both splits"
    clips = min(clips, len(source))
    size = min(_BATCH, clips)
    batches = read_batches(
        PlacedSamples(source, Order(_SEED, (Portion(len(source)),), size), preparations),
        PlaceSampler(Share(0, 1, size, 1), 0, -(-clips // size)),
        workers=config.data.workers,
        prefetch_batches=config.data.prefetch_batches,
        reads_in_flight=config.data.reads_in_flight,
        timeout_s=config.data.timeout_s,
    )
    replaced = 0
    for place, batch in enumerate(batches):
        for reason in batch.replaced:
            log.warning("scored another clip in place of one that could not be read: %s", reason)
        replaced += len(batch.replaced)
        if not config.data.tolerates(replaced, clips):
            raise DataError(
                f"{clips} clips of the {split} split were to be scored and {replaced} could not be read; data.max_replaced_share allows "
                f"{config.data.max_replaced_share:.1%}: mend the data (the log names the clips) or raise it"
            )
        yield batch, min(size, clips - place * size)


def prepare_as(config: RunConfig) -> dict[str, Preparation]:
    """The preparations of a run's objectives."""
    return build_preparations(config.objectives, config.token_grid, config.encoder, cameras=config.cameras)
