"""What a rank's memory holds at its highest point, by category.

Traced (`trainer.plan.trace`): activations, what FSDP2 gathers and what it reduces, and how gradients grow while activations go.
By formula, because no tracer gives it: weights and gradients of more shards than were traced; moments and averages; gradients that wait
for the last micro-step; all of DDP's and DeepSpeed's own memory:

    FSDP2      shards 4, gradients 4, moments 8 bytes an element, divided by the shards, rows filled up
    one GPU    weights 4, gradients 4, moments 8
    DDP        weights 4, moments 8, gradients 4 and buckets 4, nothing divided
    ZeRO-1, 2  weights 4; masters 4, moments 8 and gradients 4 divided; two buckets of reduce_bucket_size
    ZeRO-3     shards 4, masters 4, moments 8 and gradients 4, divided; one bucket; float32 weights that are gathered until they are used
               again, if that is within stage3_max_reuse_distance, and as they came, a prefetch at a time

Under autocast DDP and ZeRO keep a bf16 copy of each weight until its backward, FSDP2 computes with what it gathers.
"""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float64

from trainer.hardware import Gpu
from trainer.plan.setup import Setup
from trainer.plan.trace import CATEGORIES
from trainer.plan.tracing import Model
from trainer.plan.weights import BYTES, Weights
from trainer.plan.wire import regathered_elements

USABLE_SHARE = 0.9
"""Of HBM: the rest is for CUDA's context, NCCL's buffers, kernels' own memory and the allocator's fragments."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the peak of a step."""

    weights: float
    gradients: float
    optimiser: float
    """Moments, and masters where an engine has them."""
    average: float
    """The moving average of the encoder."""
    buffers: float
    """Weights that are gathered, gradients that are being reduced, copies of weights in lower precision."""
    activations: float

    @property
    def total(self) -> float:
        return sum(vars(self).values(), 0.0)

    def fits(self, gpu: Gpu) -> bool:
        """Whether it leaves room for what is not counted."""
        return self.total <= USABLE_SHARE * gpu.memory_bytes


def plan_memory(model: Model, setup: Setup, *, averaged: bool) -> Memory:
    """Of a rank under `setup`; `averaged` where the run keeps a moving average."""
    at_rest = _hold_at_rest(model.weights, setup, averaged=averaged)
    computing = _add_traced(at_rest, model, setup)
    updating = _add_update(at_rest, model.weights, setup)
    return max(computing, updating, key=lambda memory: memory.total)


def _add_traced(at_rest: Memory, model: Model, setup: Setup) -> Memory:
    """At the peak of forward and backward."""
    weights, traced = model.weights, model.traced[setup.recompute]
    peak = dict(zip(CATEGORIES, traced.peak(setup.micro_batch, _weigh(weights, setup, traced.shards)).tolist(), strict=True))
    return replace(
        at_rest,
        gradients=at_rest.gradients + peak["gradients"] + _waiting_bytes(weights, setup),
        buffers=at_rest.buffers + peak["gathered"] + peak["reducing"],
        activations=peak["activations"],
    )


def _growing_elements(weights: Weights, setup: Setup) -> float:
    """Gradients that come while activations go, of engines other than FSDP2; ZeRO's last rank takes room for its part at once."""
    return float(weights.learning) if setup.micro_steps == 1 and not setup.is_zero else 0.0


def _waiting_bytes(weights: Weights, setup: Setup) -> float:
    """Gradients of earlier micro-steps, in float32: whole ones but where each micro-step reduces and scatters its own.

    ZeRO-2 takes room for its part anew in each micro-step, beside what it has added up.
    """
    if setup.micro_steps == 1 or setup.engine == "zero3":
        return 0.0
    return BYTES * weights.learning / (setup.gpus if setup.engine == "zero2" else 1)


def _add_update(at_rest: Memory, weights: Weights, setup: Setup) -> Memory:
    """While the optimiser steps: all gradients, and as much again, which it computes with."""
    held = _held_elements(weights, setup)
    kept = 0.0 if setup.is_zero else BYTES * held
    return replace(
        at_rest, gradients=at_rest.gradients + kept, buffers=BYTES * (held + (weights.learning if setup.engine == "ddp" else 0))
    )


def _held_elements(weights: Weights, setup: Setup) -> float:
    """What a rank steps."""
    if setup.engine in ("fsdp2", "hsdp"):
        return float(weights.shard_elements(setup.shards, learning=True))
    return weights.learning / (setup.gpus if setup.is_zero else 1)


def _weigh(weights: Weights, setup: Setup, traced_shards: int) -> Float64[np.ndarray, " K"]:
    """How much of each traced category `setup` has: shares of what FSDP2 over `traced_shards` has."""
    traced_gradient = weights.shard_elements(traced_shards, learning=True)
    if setup.engine in ("fsdp2", "hsdp"):
        gradients = weights.shard_elements(setup.shards, learning=True) / traced_gradient
        padding = weights.padded_elements(setup.shards) / weights.padded_elements(traced_shards)
        share = {"gradients": gradients, "gathered": padding, "reducing": padding, "activations": 1.0}
    else:
        share = {"gradients": _growing_elements(weights, setup) / traced_gradient, "activations": 1.0}
    return np.array([share.get(category, 0.0) for category in CATEGORIES])


def _hold_at_rest(weights: Weights, setup: Setup, *, averaged: bool) -> Memory:
    """What is there all through a step."""
    if setup.engine in ("fsdp2", "hsdp"):
        moments = 2 * BYTES * weights.shard_elements(setup.shards, learning=True)
        average = BYTES * weights.shard_elements(setup.shards, averaged=True) if averaged else 0.0
        return Memory(BYTES * weights.shard_elements(setup.shards), 0.0, moments, average, 0.0, 0.0)
    parts = setup.gpus if setup.is_zero else 1
    average = BYTES * sum(w.elements for w in weights.all if w.averaged) / parts if averaged else 0.0
    masters = BYTES * weights.learning / parts if setup.is_zero else 0.0
    held = weights.elements / (setup.gpus if setup.engine == "zero3" else 1)
    return Memory(
        weights=BYTES * held,
        gradients=BYTES * weights.learning / parts if setup.is_zero else 0.0,
        optimiser=masters + 2 * BYTES * weights.learning / parts,
        average=average,
        buffers=_buffer_bytes(weights, setup),
        activations=0.0,
    )


def _buffer_bytes(weights: Weights, setup: Setup) -> float:
    copies = 2.0 * weights.elements if setup.precision == "bf16" and setup.recompute == "none" else 0.0
    match setup.engine:
        case "single":
            return copies
        case "ddp":
            return copies + BYTES * weights.learning
        case "zero3":
            kept = weights.elements - regathered_elements(weights.elements, setup)
            ahead = min(weights.elements, setup.zero.stage3_prefetch_bucket_size)
            gathered = kept + ahead if setup.gpus > 1 else 0  # the only rank has all weights as they are used
            return copies + BYTES * (gathered + setup.zero.reduce_bucket_size)
        case _:
            return copies + 2 * BYTES * setup.zero.reduce_bucket_size
