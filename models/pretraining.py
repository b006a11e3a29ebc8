"""One encoder under a weighted list of objectives: the module that is trained.

DDP, FSDP2 and DeepSpeed need one entry: `forward(batch, task)` is it, also for evaluation and pictures, since hooks that
gather sharded weights hang on forward alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import nn

from models.batch import Batch, Losses
from models.config import CrocoConfig, EncoderConfig, Grid
from models.encoder import VideoEncoder, build_encoder
from models.objectives.base import Objective, Preparation
from models.objectives.croco import CrocoPreparation, build_croco

Task = Literal["train", "evaluate", "draw"]


class PretrainingModel(nn.Module):
    """A shared encoder and the objectives that it learns from, each with its weight in the sum."""

    def __init__(self, encoder: VideoEncoder, objectives: Sequence[Objective], weights: Mapping[str, float]) -> None:
        super().__init__()
        self.encoder = encoder
        self.objectives = nn.ModuleDict({objective.name: objective for objective in objectives})
        self.weights = dict(weights)
        self.tokens_per_sample = sum(objective.tokens_per_sample for objective in objectives)

    def forward(self, batch: Batch, task: Task) -> Any:
        """train: Losses. evaluate: name -> (B,). draw: objective -> title -> B T 3 H W."""
        if task == "draw":
            return {name: objective.draw(self.encoder, batch) for name, objective in self._named()}
        if task == "evaluate":
            figures = {name: objective.evaluate(self.encoder, batch) for name, objective in self._named()}
            return {f"{name}/{key}": values for name, of_one in figures.items() for key, values in of_one.items()}
        losses = {name: objective(self.encoder, batch) for name, objective in self._named()}
        total = sum(self.weights[name] * of_one.total for name, of_one in losses.items())
        return Losses(total, {f"{name}/{part}": value for name, of_one in losses.items() for part, value in of_one.parts.items()})

    def _named(self) -> list[tuple[str, Objective]]:
        return [(name, objective) for name, objective in self.objectives.items()]  # type: ignore[misc]


def build_model(encoder_config: EncoderConfig, objectives: Sequence[CrocoConfig], grid: Grid) -> PretrainingModel:
    """The model of a run whose clips have `grid`, with fresh weights from torch's global generator."""
    encoder = build_encoder(encoder_config, grid)
    built: list[Objective] = [build_croco(config, encoder_config, encoder, grid) for config in objectives]
    weights: dict[str, float] = {config.kind: config.weight for config in objectives}
    return PretrainingModel(encoder, built, weights)


def build_preparations(objectives: Sequence[CrocoConfig], grid: Grid, encoder_config: EncoderConfig) -> dict[str, Preparation]:
    """What the loader's workers do for each objective, by its name."""
    blocks = encoder_config.shape.depth if encoder_config.drop_path else 0
    return {config.kind: CrocoPreparation(config, grid, blocks) for config in objectives}
