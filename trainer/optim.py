"""AdamW as masked pre-training uses it: parameter groups, the learning rate of a step, and the moving average.

No decay on vectors, biases, learned positions and registers, decay on the rest (the mask token included, as CroCo has it); layer-wise
decay of the learning rate (Clark et al. 2020, BEiT): block i of L learns at layer_decay ** (L - i) of it, the patch embedding,
learned positions and registers below all of them. The rate of a step is a pure function of the step: linear from zero, then half a
cosine (Loshchilov and Hutter 2017).
"""

import math
import re
from collections.abc import Iterable

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainer.config.training import OptimConfig

_BELOW_THE_BLOCKS = re.compile(r"encoder\.(embed|table|registers)\b")
_ENCODER_BLOCK = re.compile(r"encoder\.blocks\.(\d+)\.")


def build_optimizer(model: nn.Module, config: OptimConfig, *, depth: int) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of `model`, whose encoder has `depth` blocks."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = 0.0 if _has_no_decay(name, parameter) else config.weight_decay
            groups.setdefault((decay, _rate_share(name, depth, config.layer_decay)), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": params, "weight_decay": decay, "rate_share": share} for (decay, share), params in groups.items()],
        lr=config.lr,
        betas=config.betas,
        fused=True,
    )


def learning_rate(step: int, config: OptimConfig, *, steps: int) -> float:
    """Learning rate of step `step`, counted from 0, in a run of `steps`."""
    if step < config.warmup_steps:
        return config.lr * step / config.warmup_steps
    end = config.cosine_steps or steps
    done = min(1.0, (step - config.warmup_steps) / max(1, end - config.warmup_steps))
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its share of `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_share"]


class MovingAverage:
    """Exponential moving average of the encoder's weights among `weights`, sharded as they are."""

    def __init__(self, weights: Iterable[tuple[str, Tensor]], decay: float) -> None:
        self.decay = decay
        self.live = {name: weight for name, weight in weights if "encoder." in name}
        self.averages: dict[str, Tensor] = {name: weight.detach().clone() for name, weight in self.live.items()}

    @torch.no_grad()
    def update(self, is_finite: Bool[Tensor, ""]) -> None:
        """Move every average towards its weight by 1 - decay, unless the step was none."""
        share = (1 - self.decay) * is_finite
        for average, weight in zip(self.averages.values(), self.live.values(), strict=True):
            local_part(average).lerp_(local_part(weight), share)


def local_part(tensor: Tensor) -> Tensor:
    """The shard of a DTensor that this rank holds, sharing its memory; a plain tensor is all its own."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _has_no_decay(name: str, parameter: Tensor) -> bool:
    return parameter.ndim <= 1 or name.endswith((".bias", "encoder.table.weight", "encoder.registers"))


def _rate_share(name: str, depth: int, layer_decay: float) -> float:
    block = _ENCODER_BLOCK.search(name)
    if block:
        return layer_decay ** (depth - int(block[1]))
    return layer_decay ** (depth + 1) if _BELOW_THE_BLOCKS.search(name) else 1.0
