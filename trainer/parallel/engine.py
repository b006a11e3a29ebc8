"""An engine: a module spread over the ranks together with its optimiser, behind six methods.

    train_micro_step   forward and backward of one micro-batch
    update             clip, step, zero; refuses by agreement a gradient that is not finite, without waiting for the device
    apply              forward without gradients, for evaluation and pictures
    reduce             sums of a few numbers over all ranks
    state              the logical state, live, for checkpoints
    state_was_loaded   to be called once a checkpoint was written into it

Order of composition (each one line below): float8 products, activation checkpointing, compilation, sharding, optimiser, moving average.
Matrix products run in bf16 under autocast whatever the engine, those of blocks in float8 where asked; the residual stream, norms,
softmax and losses stay float32.
FSDP2 gathers bf16 weights, ZeRO-3 float32 ones, twice the bytes. Every engine exchanges float32 gradients.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float64
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from models.batch import Batch, Losses
from models.pretraining import PretrainingModel, Task
from trainer.checkpoint.boxes import Boxes
from trainer.checkpoint.logical import logical_state
from trainer.config.training import OptimConfig, ParallelConfig
from trainer.optim import MovingAverage, build_optimizer, local_part, set_learning_rate
from trainer.parallel.blocks import compile_blocks, recompute_activations
from trainer.parallel.float8 import use_float8
from trainer.parallel.fsdp2 import shard
from trainer.parallel.launch import Launch
from trainer.parallel.zero import Zero, shard_with_deepspeed
from trainer.stopwatch import Stopwatch


class Engine(ABC):
    """What every engine does the same way, and the places where they differ."""

    module: nn.Module
    """What is called to compute: the model itself, or what spreads it."""
    average: MovingAverage | None

    def __init__(self, optimizer: torch.optim.AdamW, *, launch: Launch, optim: OptimConfig, tokens_per_sample: int) -> None:
        self.optimizer = optimizer
        self.launch = launch
        self.clip_grad_norm = optim.clip_grad_norm
        self.tokens_per_sample = tokens_per_sample
        self.stopwatch = Stopwatch(launch.device)

    @abstractmethod
    def train_micro_step(self, batch: Batch, *, share: float, last: bool) -> Losses:
        """Add the gradient of `share` times the loss of `batch`; gradients are exchanged at the latest on the last one of a step."""

    def update(self, rate: float, *, loss: Tensor) -> Tensor:
        """One optimiser step at learning rate `rate`; returns the norm of the gradient, on the device.

        Nothing moves when `loss`, the mean over all ranks, or the norm is not finite. The norm is that of the whole
        gradient, so every rank sees the same two numbers and they skip together; the device does, where this process need not know.
        """
        with self.stopwatch.timing("optimiser"):
            norm = self._grad_norm()
            is_finite = loss.isfinite() & norm.isfinite()
            self._clip(norm)
            set_learning_rate(self.optimizer, rate)
            self._step(is_finite)
            if self.average:
                self.average.update(is_finite)
            self._drop_gradients()
        return norm

    @torch.no_grad()
    def apply(self, batch: Batch, task: Task) -> Any:
        """What the model says to `batch` for evaluation or pictures; every rank must call it."""
        self.module.eval()
        with self._autocast():
            return self.module(batch, task)

    def reduce(self, values: Float64[Tensor, " n"]) -> Float64[Tensor, " n"]:
        """Sums over all ranks; one collective, on the device where the values are."""
        if dist.is_initialized():
            dist.all_reduce(values)
        return values

    @abstractmethod
    def state(self) -> dict[str, Boxes]:
        """Weights, moments and averages by logical name; the tensors that train, not copies."""

    @abstractmethod
    def state_was_loaded(self) -> None:
        """Must be called on every rank once `state()` has been written to: an engine may keep copies of it."""

    def _autocast(self) -> AbstractContextManager:
        enabled = self.launch.precision == "bf16"
        return torch.autocast(self.launch.device.type, torch.bfloat16, enabled=enabled)

    def _clip(self, norm: Tensor) -> None:
        if self.clip_grad_norm:
            factor = (self.clip_grad_norm / (norm + 1e-6)).clamp(max=1.0)
            factor = torch.where(norm.isfinite(), factor, 0.0)  # NaN would stay in buffers that a later backward does not write
            for gradient in self._gradients():
                local_part(gradient).mul_(factor)

    @abstractmethod
    def _gradients(self) -> list[Tensor]:
        """The mean gradient over all ranks, as much of it as this rank steps."""

    @abstractmethod
    def _grad_norm(self) -> Tensor:
        """The norm of the whole gradient, the same on every rank."""

    @abstractmethod
    def _step(self, is_finite: Bool[Tensor, ""]) -> None:
        """Let the optimiser step, unless it must not."""

    @abstractmethod
    def _drop_gradients(self) -> None:
        """Forget the gradients, whether they were used or not."""


class TorchEngine(Engine):
    """One process, DDP or FSDP2: they differ in how the module is wrapped and when gradients are exchanged."""

    def __init__(self, module: nn.Module, *, launch: Launch, optim: OptimConfig, depth: int, tokens_per_sample: int) -> None:
        optimizer = build_optimizer(module, optim, depth=depth)
        super().__init__(optimizer, launch=launch, optim=optim, tokens_per_sample=tokens_per_sample)
        self.module = module
        self.average = MovingAverage(module.named_parameters(), optim.ema_decay) if optim.ema_decay else None

    def train_micro_step(self, batch: Batch, *, share: float, last: bool) -> Losses:
        self.module.train()
        with self._exchange_gradients(last):
            with self.stopwatch.timing("forward"), self._autocast():
                losses: Losses = self.module(batch, "train")
            with self.stopwatch.timing("backward"):
                (losses.total * share).backward()
        return losses

    def state(self) -> dict[str, Boxes]:
        return logical_state(self.module, self.optimizer, self.average.averages if self.average else None)

    def state_was_loaded(self) -> None:
        pass  # it is what trains

    @contextmanager
    def _exchange_gradients(self, wanted: bool) -> Iterator[None]:
        if isinstance(self.module, DistributedDataParallel) and not wanted:
            with self.module.no_sync():
                yield
            return
        if self.launch.engine == "fsdp2":
            self.module.set_requires_gradient_sync(wanted)  # type: ignore[operator]
        yield

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.module.parameters() if p.grad is not None]

    def _grad_norm(self) -> Tensor:
        norm = nn.utils.get_total_norm(self._gradients())
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _step(self, is_finite: Bool[Tensor, ""]) -> None:
        # Fused AdamW, as under a GradScaler, looks at this on the device and leaves weights, moments and its count of steps alone.
        self.optimizer.found_inf = (~is_finite).float()  # type: ignore[attr-defined]
        self.optimizer.step()

    def _drop_gradients(self) -> None:
        self.optimizer.zero_grad()


class ZeroEngine(Engine):
    """ZeRO by DeepSpeed, which wraps the module, exchanges gradients and steps the optimiser."""

    def __init__(
        self, zero: Zero, optimizer: torch.optim.AdamW, *, launch: Launch, optim: OptimConfig, tokens_per_sample: int
    ) -> None:
        super().__init__(optimizer, launch=launch, optim=optim, tokens_per_sample=tokens_per_sample)
        self.zero = zero
        self.module = zero.engine
        held = ((name, fragment.elements) for name, fragment in zero.fragments.items())
        self.average = MovingAverage(held, optim.ema_decay) if optim.ema_decay else None

    def train_micro_step(self, batch: Batch, *, share: float, last: bool) -> Losses:
        self.module.train()
        with self.stopwatch.timing("forward"):
            losses: Losses = self.module(batch, "train")
        with self.stopwatch.timing("backward"):
            self.zero.backward(losses.total * share, last=last)
        return losses

    def state(self) -> dict[str, Boxes]:
        averages = self.average.averages if self.average else {}
        return self.zero.state() | {f"ema.{name}": self.zero.fragments[name].boxes(part) for name, part in averages.items()}

    def state_was_loaded(self) -> None:
        self.zero.state_was_loaded()

    def _autocast(self) -> AbstractContextManager:
        return nullcontext()  # DeepSpeed turns it on, and would turn ours off

    def _gradients(self) -> list[Tensor]:
        return self.zero.gradients()

    def _grad_norm(self) -> Tensor:
        held = nn.utils.get_total_norm(self._gradients())
        return self.reduce(held.double().square()[None])[0].sqrt().float()

    def _step(self, is_finite: Bool[Tensor, ""]) -> None:
        if bool(is_finite):  # DeepSpeed's own step waits for the device, too
            self.zero.step()

    def _drop_gradients(self) -> None:
        self.zero.drop_gradients()


def build_engine(model: PretrainingModel, launch: Launch, parallel: ParallelConfig, optim: OptimConfig) -> Engine:
    """Spread `model`, on its device already, over the ranks as `launch` says, and give it an optimiser."""
    depth, tokens = len(model.encoder.blocks), model.tokens_per_sample
    if parallel.fp8_linears:
        use_float8(model, launch)
    recompute_activations(model, parallel.activation_checkpointing)
    if parallel.compile:
        compile_blocks(model)
    if launch.zero:
        optimizer = build_optimizer(model, optim, depth=depth)
        zero = shard_with_deepspeed(model, optimizer, launch, parallel)
        return ZeroEngine(zero, optimizer, launch=launch, optim=optim, tokens_per_sample=tokens)
    module: nn.Module = model
    if launch.engine == "fsdp2":
        shard(model, launch, parallel)
    elif launch.engine == "ddp":
        module = DistributedDataParallel(model, device_ids=[launch.device] if launch.device.type == "cuda" else None)
    return TorchEngine(module, launch=launch, optim=optim, depth=depth, tokens_per_sample=tokens)
