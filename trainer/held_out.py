"""Held-out clips: always the same ones, read once and kept, for the figures of the pretext task and for pictures.

The clips are the places of step 0 of their own order, each once however data sets are weighted, without augmentation, so that two
evaluations differ by the weights alone. Every rank runs the same number of forwards; places beyond the last clip are computed and not
counted.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from models.batch import Batch
from models.objectives.base import Preparation
from trainer.data.loader import PlacedSamples, PlaceSampler, read_batches
from trainer.data.mixed_source import portions_of
from trainer.data.order import Order, Portion, Share
from trainer.data.source import Source
from trainer.observe.report import Sheets
from trainer.parallel.engine import Engine
from trainer.parallel.launch import Launch

log = logging.getLogger(__name__)

PICTURE_CLIPS = 4
_LEAST_BATCH = 8
"""Clips in a forward: a wrong reference comes from the same batch, so there must be several scenes in it."""


@dataclass(frozen=True)
class HeldOut:
    """Batches of this rank with, for each sample, whether it counts."""

    batches: Sequence[Batch]
    counted: Sequence[torch.Tensor]
    pictures: Batch

    def evaluate(self, engine: Engine) -> dict[str, float]:
        """Means over all held-out clips and ranks, by name; empty where nothing is held out."""
        sums: dict[str, float] = {}
        total = 0.0
        for batch, counted in zip(self.batches, self.counted, strict=True):
            figures = engine.apply(batch.to(engine.launch.device), "evaluate")
            for name in sorted(figures):
                sums[name] = sums.get(name, 0.0) + float((figures[name].double().cpu() * counted).sum())
            total += float(counted.sum())
        if not self.batches:
            return {}
        *values, total = engine.reduce(torch.tensor([*sums.values(), total], dtype=torch.float64)).tolist()
        return {name: value / total for name, value in zip(sums, values, strict=True)}

    def draw(self, engine: Engine) -> Sheets:
        """Contact sheet columns of the first clips, by objective."""
        drawn = engine.apply(self.pictures.to(engine.launch.device), "draw")
        return {
            objective: {title: column.float().cpu().numpy() for title, column in columns.items()}
            for objective, columns in drawn.items()
        }


def read_held_out(
    held_out: Source | None,
    shown: Source,
    preparations: Mapping[str, Preparation],
    *,
    seed: int,
    clips: int,
    micro_batch: int,
    launch: Launch,
) -> HeldOut:
    """Read this rank's part of `clips` clips of `held_out`, and the clips of `shown` that are drawn."""
    picture_order = Order(seed, portions_of(shown), PICTURE_CLIPS)
    pictures = _read(PlacedSamples(shown, picture_order, preparations), Share(0, 1, PICTURE_CLIPS, 1))
    if held_out is None:
        return HeldOut([], [], pictures[0])
    clips = min(clips, len(held_out))
    batch = max(micro_batch, _LEAST_BATCH)
    micro_steps = -(-clips // (batch * launch.world_size))
    share = Share(launch.rank, launch.world_size, batch, micro_steps)
    batches = _read(PlacedSamples(held_out, Order(seed, (Portion(len(held_out)),), clips), preparations), share)
    counted = [torch.tensor([slot < clips for slot in share.slots(m)], dtype=torch.float64) for m in range(micro_steps)]
    return HeldOut(batches, counted, pictures[0])


def _read(samples: PlacedSamples, share: Share) -> list[Batch]:
    sampler = PlaceSampler(share, first_step=0, last_step=1)
    batches = list(read_batches(samples, sampler, workers=0))
    for reason in (reason for batch in batches for reason in batch.replaced):
        log.warning("held out another clip in place of one that could not be read: %s", reason)
    return batches
