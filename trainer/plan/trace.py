"""One training step of the real model under the real FSDP2 engine, without memory, devices or other ranks.

Tensors are fake (they have shapes and no contents) and so is the process group. torch's FSDPMemTracker sees every storage
that comes, changes its size and goes, and of which category it is; here each such event is kept, so that a step is a timeline. Left out,
as by any such tracker: what kernels and NCCL take inside, the allocator's fragments and CUDA's own context.

Two ideas make a plan of a thousand GPUs a matter of seconds:

    batch     the same operations run whatever the micro-batch, so every event is a line in it: of two timelines the third follows
    depth     blocks repeat, so a peak is a line in the depth of each stack of them: stacks are cut to a few blocks, and then to one more

Beyond the shards that are traced they are divided by formula (`trainer.plan.memory`): fully_shard takes an operation for each rank and
weight. The optimiser's step decides on data and is not traced: its memory follows from the weights.
"""

import gc
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float64, Int64
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import _UpdateType
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from models.batch import Batch
from models.flops import ShapedPeers, resize_batch
from models.layers import Block, DecoderBlock
from trainer.assembly import assemble_model
from trainer.config.run import RunConfig
from trainer.parallel.engine import build_engine
from trainer.parallel.launch import Launch, Mesh

Precision = Literal["fp32", "bf16"]
Category = Literal["shards", "gradients", "gathered", "reducing", "activations"]
CATEGORIES: tuple[Category, ...] = ("shards", "gradients", "gathered", "reducing", "activations")
_CATEGORY_OF: Mapping[str, Category] = {
    "Sharded Param": "shards",
    "Buffer": "activations",
    "Sharded Grad": "gradients",
    "Unsharded Param": "gathered",
    "All Gather": "gathered",
    "Unsharded Grad": "reducing",
    "Reduce Scatter": "reducing",
    "Activation": "activations",
    "Temp": "activations",
    "Inputs": "activations",
    "OptState": "activations",
}
_BATCHES = (2, 3)
"""Samples of the two traces; of one, torch treats some shapes in its own way."""


@dataclass(frozen=True)
class Timeline:
    """What memory a step takes on one rank, event by event, for any micro-batch; and what it moves."""

    category: Int64[np.ndarray, " E"]
    fixed_bytes: Float64[np.ndarray, " E"]
    sample_bytes: Float64[np.ndarray, " E"]
    """By how much an event grows with each sample."""
    fixed_traffic: float
    sample_traffic: float
    """Bytes that operations other than matrix products read and write."""
    peer_bytes: float
    """What a sample gives to the contrast with other ranks."""
    peer_gradient_bytes: float
    """... of which gradients come back."""

    def replay(self, samples: int) -> Float64[np.ndarray, "E K"]:
        """Bytes of each category after every event."""
        deltas = np.zeros((len(self.category), len(CATEGORIES)))
        deltas[np.arange(len(deltas)), self.category] = self.fixed_bytes + samples * self.sample_bytes
        return deltas.cumsum(axis=0)

    def traffic(self, samples: int) -> float:
        """Bytes that operations other than matrix products read and write in a step of `samples`."""
        return self.fixed_traffic + samples * self.sample_traffic


@dataclass(frozen=True)
class PaperLaunch(Launch):
    """A place among ranks that do not exist; on a CPU, whatever this machine has."""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")


@dataclass(frozen=True)
class MeteredPeers(ShapedPeers):
    """Ranks of which only their number is known, and what is gathered from one of them."""

    rows: list[tuple[int, bool]] = field(default_factory=list)
    """Bytes, and whether gradients go back."""

    def gather(self, rows: Tensor) -> Tensor:
        """As Peers has it."""
        self.rows.append((rows.nbytes, rows.requires_grad and torch.is_grad_enabled()))
        return super().gather(rows)


class _Recorder(FSDPMemTracker):
    """Keeps every change of memory, and adds up what operations read and write."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.events: list[tuple[str, int]] = []
        self.traffic = 0

    def _update_snap(self, u_type: Any, winfo: Any, old_mem_consumed: Any = None, old_reftype: Any = None) -> None:
        name, size = winfo.reftype.value, winfo.mem_consumed
        match u_type:
            case _UpdateType.ADD:
                self.events.append((name, size))
            case _UpdateType.DEL:
                self.events.append((name, -size))
            case _UpdateType.REF:
                self.events += [(old_reftype.value, -size), (name, size)]
            case _:
                self.events.append((name, size - old_mem_consumed))

    def _update_peak_stats(self, peak_state: Any) -> None:
        pass  # the timeline has it, and asking every module after every operation takes most of the tracker's time

    def get_tracker_snapshot(self, type: str = "current") -> dict[torch.device, dict[str, int]]:  # noqa: A002
        """Nothing: who wants to know replays the timeline."""
        return {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if out is not NotImplemented and _moves_memory(func):
            tensors = {id(leaf): leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)}
            self.traffic += sum(min(tensor.nbytes, tensor.untyped_storage().nbytes()) for tensor in tensors.values())
        return out


def _moves_memory(func: Any) -> bool:
    return func.namespace in ("aten", "fsdp") and not func.is_view and func._overloadpacket not in _NOT_COUNTED


_NOT_COUNTED = frozenset(flop_registry) | {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward,
    torch.ops.aten.empty,
    torch.ops.aten.empty_like,
    torch.ops.aten.new_empty,
    torch.ops.aten._unsafe_view,
}
"""Products, whose time is that of their operations, and what touches no memory."""


@contextmanager
def paper_ranks(ranks: int) -> Iterator[None]:
    """A process group of `ranks` in which collectives return at once; this process is its first."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def trace_step(config: RunConfig, batch: Batch, *, shards: int, precision: Precision, depth: int, extra: int | None) -> Timeline:
    """Forward and backward of one rank of FSDP2 over `shards`, every stack of blocks cut to `depth`, that of number `extra` to one more."""
    small, large = (record_step(config, batch, shards, precision, (depth, extra), samples) for samples in _BATCHES)
    assert [name for name, _ in small.events] == [name for name, _ in large.events], (
        "a step's operations do not depend on its batch"
    )
    sizes = np.array([[size for _, size in one.events] for one in (small, large)], dtype=np.float64)
    slope = (sizes[1] - sizes[0]) / (_BATCHES[1] - _BATCHES[0])
    sample_traffic = (large.traffic - small.traffic) / (_BATCHES[1] - _BATCHES[0])
    return Timeline(
        category=np.array([CATEGORIES.index(_CATEGORY_OF[name]) for name, _ in small.events]),
        fixed_bytes=sizes[0] - _BATCHES[0] * slope,
        sample_bytes=slope,
        fixed_traffic=small.traffic - _BATCHES[0] * sample_traffic,
        sample_traffic=sample_traffic,
        peer_bytes=sum(size for size, _ in small.rows) / _BATCHES[0],
        peer_gradient_bytes=sum(size for size, learns in small.rows if learns) / _BATCHES[0],
    )


class Recorded(NamedTuple):
    """What one trace saw."""

    events: list[tuple[str, int]]
    traffic: float
    rows: list[tuple[int, bool]]


def record_step(
    config: RunConfig, batch: Batch, shards: int, precision: Precision, cut: tuple[int, int | None], samples: int
) -> Recorded:
    """Forward and backward of `samples` samples, stacks cut as `cut_stacks` does it."""
    launch = PaperLaunch(0, 0, shards, shards, "fsdp2", precision, Mesh(1, shards), reshard_after_forward=True)
    # No float8 was measured: planned as bf16, which takes more.
    parallel = config.parallel.model_copy(update={"fp8_linears": False})
    mode, peers = FakeTensorMode(), MeteredPeers(shards)
    with mode:
        model = assemble_model(config, peers=peers)
        cut_stacks(model, *cut)
        fake_batch = resize_batch(batch, samples)
    with paper_ranks(shards), warnings.catch_warnings(), _collected_by_count_alone():
        warnings.filterwarnings("ignore", "Set timeout is now only supported")
        engine = build_engine(model, launch, parallel, config.optim)  # outside of the mode: its mesh must be real
        recorder = _Recorder(model)
        recorder.track_inputs((fake_batch.shared, fake_batch.prepared))
        with mode, recorder:
            engine.train_micro_step(fake_batch, share=1.0, last=True)
        return Recorded(recorder.events, recorder.traffic, peers.rows)


@contextmanager
def _collected_by_count_alone() -> Iterator[None]:
    """Storages go when nobody holds them, at the same place in every trace."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def find_stacks(model: nn.Module) -> list[nn.ModuleList]:
    """Lists of like blocks, in the order of the model."""
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(isinstance(block, Block | DecoderBlock) for block in module)
    ]


def cut_stacks(model: nn.Module, depth: int, extra: int | None) -> None:
    """Leave `depth` blocks of every stack, or one more of the stack of number `extra`; shorter stacks stay as they are."""
    for number, stack in enumerate(find_stacks(model)):
        del stack[depth + (number == extra) :]
