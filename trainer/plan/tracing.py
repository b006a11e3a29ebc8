"""All that is traced of a run, and what follows from it for any depth, micro-batch and engine.

Short models are traced: each stack of blocks has as many as prefetching needs to come into its stride, and in turn one more. What the
whole model takes is the short one's, and for each block that it lacks what one more of that stack took.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar, get_args

import numpy as np
from jaxtyping import Float64
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from models.batch import Batch
from models.flops import Flops, count_flops
from trainer.assembly import assemble_model
from trainer.config.run import RunConfig
from trainer.config.training import Recompute
from trainer.parallel.blocks import recompute_activations
from trainer.plan.samples import build_blank_batch
from trainer.plan.trace import CATEGORIES, Precision, Timeline, cut_stacks, find_stacks, trace_step
from trainer.plan.weights import Weights, list_weights

RECOMPUTE: tuple[Recompute, ...] = get_args(Recompute)
TRACED_SHARDS = 8
"""At most: more are computed."""
_BLOCKS_BESIDE_PREFETCHED = 2

_Number = TypeVar("_Number", float, np.ndarray)


@dataclass(frozen=True)
class Traced:
    """A run's model with one kind of activation checkpointing."""

    shards: int
    timelines: tuple[Timeline, ...]
    """Of the short model, and of it with one block more in each stack."""
    flops: tuple[Flops, ...]
    """Of one sample, of the same models."""
    missing: tuple[int, ...]
    """Blocks that the whole model has beyond the short one, by stack."""

    def peak(self, samples: int, weigh: Float64[np.ndarray, " K"]) -> Float64[np.ndarray, " K"]:
        """Bytes of each category, times `weigh`, where their sum is largest, of a micro-batch of `samples`."""
        return self._of_whole([_highest(timeline.replay(samples) * weigh) for timeline in self.timelines])

    def traffic_bytes(self, samples: int) -> float:
        """What operations other than matrix products read and write, for a micro-batch of `samples`."""
        return self._of_whole([timeline.traffic(samples) for timeline in self.timelines])

    @property
    def needed_flops(self) -> float:
        """Of one sample, as MFU counts."""
        return self._of_whole([float(one.needed) for one in self.flops])

    @property
    def repeated_flops(self) -> float:
        """Of one sample, made again to save memory."""
        return self._of_whole([float(one.again) for one in self.flops])

    @property
    def peer_bytes(self) -> float:
        """What a sample gives to contrasts over all ranks."""
        return self.timelines[0].peer_bytes

    @property
    def peer_gradient_bytes(self) -> float:
        """What comes back."""
        return self.timelines[0].peer_gradient_bytes

    def _of_whole(self, values: list[_Number]) -> _Number:
        short = values[0]
        return short + sum((lacks * (longer - short) for lacks, longer in zip(self.missing, values[1:], strict=True)), 0 * short)


@dataclass(frozen=True)
class Model:
    """What a plan knows of a run's model."""

    weights: Weights
    width: int
    tokens_per_sample: int
    traced: dict[Recompute, Traced]
    """By what its blocks make again."""


def count_traces(config: RunConfig) -> int:
    """How often `trace_model` will tell that it got on."""
    with FakeTensorMode():
        model = assemble_model(config)
    return len(RECOMPUTE) * (1 + len(_depths(model)))


def trace_model(config: RunConfig, *, shards: int, precision: Precision, advance: Callable[[], object] = lambda: None) -> Model:
    """Trace the model of `config` over `shards`, of which there are no more than TRACED_SHARDS."""
    batch = build_blank_batch(config)
    with FakeTensorMode():
        model = assemble_model(config)
        weights = list_weights(model)
    depths = _depths(model)
    return Model(
        weights,
        config.encoder.shape.width,
        model.tokens_per_sample,
        {what: _trace(config, depths, batch, shards, precision, what, advance) for what in RECOMPUTE},
    )


def _trace(
    config: RunConfig,
    depths: Sequence[int],
    batch: Batch,
    shards: int,
    precision: Precision,
    what: Recompute,
    advance: Callable[[], object],
) -> Traced:
    parallel = config.parallel.model_copy(update={"activation_checkpointing": what})
    config = config.model_copy(update={"parallel": parallel})
    depth = config.parallel.prefetch_blocks + _BLOCKS_BESIDE_PREFETCHED
    timelines, flops = [], []
    for extra in (None, *range(len(depths))):
        timelines.append(trace_step(config, batch, shards=shards, precision=precision, depth=depth, extra=extra))
        flops.append(_count_flops(config, batch, depth, extra))
        advance()
    return Traced(shards, tuple(timelines), tuple(flops), tuple(max(0, whole - depth) for whole in depths))


def _count_flops(config: RunConfig, batch: Batch, depth: int, extra: int | None) -> Flops:
    def build() -> nn.Module:
        model = assemble_model(config)
        cut_stacks(model, depth, extra)
        recompute_activations(model, config.parallel.activation_checkpointing)
        return model

    return count_flops(build, batch, samples=1)


def _depths(model: nn.Module) -> list[int]:
    return [len(stack) for stack in find_stacks(model)]


def _highest(bytes_of: Float64[np.ndarray, "E K"]) -> Float64[np.ndarray, " K"]:
    assert bytes_of.shape[1] == len(CATEGORIES)
    return bytes_of[bytes_of.sum(axis=1).argmax()]
