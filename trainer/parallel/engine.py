"""An engine: a module spread over the ranks together with its optimiser, behind five methods.

    train_micro_step   forward and backward of one micro-batch
    update             clip, step, zero; refuses by agreement a gradient that is not finite
    apply              forward without gradients, for evaluation and pictures
    reduce             sums of a few numbers over all ranks
    state              the logical state, live, for checkpoints

Order of composition (each one line below): activation checkpointing, sharding, optimiser, moving average.
Matrix products run in bf16 under autocast whatever the engine, so FSDP2 gathers bf16 weights and the residual stream,
norms, softmax and losses stay float32.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from models.batch import Batch, Losses
from models.pretraining import PretrainingModel, Task
from trainer.checkpoint.logical import logical_state
from trainer.config.training import OptimConfig, ParallelConfig
from trainer.optim import MovingAverage, build_optimizer, local_part, set_learning_rate
from trainer.parallel.fsdp2 import checkpoint_activations, shard
from trainer.parallel.launch import Launch


class Engine:
    """One process, DDP or FSDP2: they differ in how the module is wrapped and when gradients are exchanged."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.AdamW,
        average: MovingAverage | None,
        *,
        launch: Launch,
        clip_grad_norm: float | None,
        tokens_per_sample: int,
    ) -> None:
        self.module = module
        self.optimizer = optimizer
        self.average = average
        self.launch = launch
        self.clip_grad_norm = clip_grad_norm
        self.tokens_per_sample = tokens_per_sample

    def train_micro_step(self, batch: Batch, *, share: float, last: bool) -> Losses:
        """Add the gradient of `share` times the loss of `batch`; gradients are exchanged on the last one of a step."""
        self.module.train()
        with self._exchange_gradients(last):
            with self._autocast():
                losses: Losses = self.module(batch, "train")
            (losses.total * share).backward()
        return losses

    def update(self, rate: float, *, loss: float) -> float:
        """One optimiser step at learning rate `rate`; returns the norm of the gradient.

        Nothing moves when `loss`, the mean over all ranks, or the norm is not finite. The norm is that of the whole
        gradient, so every rank sees the same two numbers and they skip together.
        """
        norm = self._grad_norm()
        if math.isfinite(loss) and norm.isfinite():
            self._clip(norm)
            set_learning_rate(self.optimizer, rate)
            self.optimizer.step()
            if self.average:
                self.average.update()
        self.optimizer.zero_grad()
        return float(norm)

    @torch.no_grad()
    def apply(self, batch: Batch, task: Task) -> Any:
        """What the model says to `batch` for evaluation or pictures; every rank must call it."""
        self.module.eval()
        with self._autocast():
            return self.module(batch, task)

    def reduce(self, values: list[float]) -> list[float]:
        """Sums over all ranks, in double precision; one collective."""
        if not dist.is_initialized():
            return values
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums)
        return sums.tolist()

    def state(self) -> dict[str, Tensor]:
        """Weights, moments and averages by logical name; the tensors that train, not copies."""
        return logical_state(self.module, self.optimizer, self.average.averages if self.average else None)

    def _autocast(self) -> torch.autocast:
        enabled = self.launch.precision == "bf16"
        return torch.autocast(self.launch.device.type, torch.bfloat16, enabled=enabled)

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

    def _clip(self, norm: Tensor) -> None:
        if self.clip_grad_norm:
            factor = (self.clip_grad_norm / (norm + 1e-6)).clamp(max=1.0)
            for gradient in self._gradients():
                local_part(gradient).mul_(factor)


def build_engine(model: PretrainingModel, launch: Launch, parallel: ParallelConfig, optim: OptimConfig) -> Engine:
    """Spread `model`, on its device already, over the ranks as `launch` says, and give it an optimiser."""
    depth = len(model.encoder.blocks)
    if parallel.activation_checkpointing:
        checkpoint_activations(model)
    module: nn.Module = model
    if launch.engine == "fsdp2":
        shard(model, launch, parallel)
    elif launch.engine == "ddp":
        module = DistributedDataParallel(model, device_ids=[launch.device] if launch.device.type == "cuda" else None)
    optimizer = build_optimizer(module, optim, depth=depth)
    average = MovingAverage(module, optim.ema_decay) if optim.ema_decay else None
    return Engine(
        module,
        optimizer,
        average,
        launch=launch,
        clip_grad_norm=optim.clip_grad_norm,
        tokens_per_sample=model.tokens_per_sample,
    )
