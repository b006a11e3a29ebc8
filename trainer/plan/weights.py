"""The weights of a run's model as engines see them: by FSDP2 unit, with the rows that sharding cuts.

FSDP2 cuts a weight along its first dimension into as many parts as there are shards and fills up the last ones, so that a weight of 1408
rows over 1,024 shards takes the room of 2,048. DeepSpeed cuts flat memory and hardly pads. Weights are float32 at rest.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from models.layers import Block, DecoderBlock
from models.rendering import Renderer

BYTES = 4.0
"""Of an element at rest, and of a gradient on its way."""


@dataclass(frozen=True)
class Weight:
    """One parameter."""

    rows: int
    row_elements: int
    learns: bool
    averaged: bool
    """Whether a moving average would be kept of it."""

    @property
    def elements(self) -> int:
        return self.rows * self.row_elements

    def shard_elements(self, shards: int) -> int:
        """What the first of `shards` ranks holds."""
        return -(-self.rows // shards) * self.row_elements


@dataclass(frozen=True)
class Unit:
    """Weights that FSDP2 gathers together."""

    weights: tuple[Weight, ...]
    is_block: bool
    """Freed after the forward and gathered again for the backward; else gathered once a micro-step."""
    is_float32: bool
    """Gathered in float32 whatever the precision."""

    @property
    def learns(self) -> bool:
        return any(weight.learns for weight in self.weights)

    def padded_elements(self, shards: int, *, learning: bool = False) -> int:
        """Elements of all shards together, of those that learn alone or of all."""
        return shards * sum(w.shard_elements(shards) for w in self.weights if w.learns or not learning)


@dataclass(frozen=True)
class Weights:
    """All of a model."""

    units: tuple[Unit, ...]

    @property
    def all(self) -> Iterable[Weight]:
        return (weight for unit in self.units for weight in unit.weights)

    @property
    def elements(self) -> int:
        return sum(weight.elements for weight in self.all)

    @property
    def learning(self) -> int:
        """Elements that learn."""
        return sum(weight.elements for weight in self.all if weight.learns)

    def shard_elements(self, shards: int, *, learning: bool = False, averaged: bool = False) -> int:
        """What the first of `shards` ranks holds under FSDP2: of all weights, or of those that learn, or are averaged."""
        kept = (w for w in self.all if (w.learns or not learning) and (w.averaged or not averaged))
        return sum(weight.shard_elements(shards) for weight in kept)

    def padded_elements(self, shards: int) -> int:
        """Elements of all shards together."""
        return sum(unit.padded_elements(shards) for unit in self.units)


def list_weights(model: nn.Module) -> Weights:
    """The weights of `model`, in the units that `trainer.parallel.fsdp2` makes of it."""
    taken: set[int] = set()
    units = []
    for path, module in model.named_modules():
        if isinstance(module, Block | DecoderBlock | Renderer):
            units.append(_unit(module, path, taken))
    return Weights((*units, _unit(model, "", taken)))


def _unit(module: nn.Module, path: str, taken: set[int]) -> Unit:
    weights = []
    for name, parameter in module.named_parameters(prefix=path):
        if id(parameter) not in taken:
            taken.add(id(parameter))
            rows = parameter.shape[0] if parameter.ndim else 1
            weights.append(Weight(rows, parameter.numel() // max(1, rows), parameter.requires_grad, "encoder." in name))
    return Unit(tuple(weights), isinstance(module, Block | DecoderBlock), isinstance(module, Renderer))
