"""One encoder under a weighted list of objectives: the module that is trained.

DDP, FSDP2 and DeepSpeed need one entry: `forward(batch, task)` is it, also for evaluation and pictures, since hooks that
gather sharded weights hang on forward alone.
"""

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn

from models.batch import Batch, Losses
from models.config import (
    BevConfig,
    CrocoConfig,
    DepthConfig,
    DetectionConfig,
    EncoderConfig,
    FlowConfig,
    Grid,
    MaeConfig,
    MapConfig,
    Mim4dConfig,
    ObjectiveConfig,
    PoseConfig,
    SimipuConfig,
    TaskConfig,
)
from models.encoder import VideoEncoder, build_encoder
from models.objectives.base import Objective, Preparation, encode
from models.objectives.bev import BevPreparation, build_bev
from models.objectives.croco import CrocoPreparation, build_croco
from models.objectives.depth import DepthPreparation, build_depth
from models.objectives.detection import DetectionPreparation, build_detection
from models.objectives.downstream import DownstreamObjective
from models.objectives.flow import FlowPreparation, build_flow
from models.objectives.mae import MaePreparation, build_mae
from models.objectives.map import MapPreparation, build_map
from models.objectives.mim4d import Mim4dObjective
from models.objectives.mim4d_prepare import Instants, Mim4dPreparation
from models.objectives.pose import PosePreparation, build_pose
from models.objectives.simipu import SimipuPreparation, build_simipu
from models.peers import ALONE, Peers

Task = Literal["train", "evaluate", "draw", "predict"]


class PretrainingModel(nn.Module):
    """A shared encoder and the objectives that it learns from, each with its weight in the sum."""

    encoder_is_frozen = False

    def __init__(
        self, encoder: VideoEncoder, objectives: Sequence[Objective], weights: Mapping[str, float], peers: Peers = ALONE
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.objectives = nn.ModuleDict({objective.name: objective for objective in objectives})
        self.weights = dict(weights)
        self.peers = peers
        self.tokens_per_sample = sum(objective.tokens_per_sample for objective in objectives)

    def forward(self, batch: Batch, task: Task) -> Any:
        """train: Losses. evaluate: name -> (B,). draw: objective -> title -> B T 3 H W. predict: downstream task -> its answer."""
        if task == "predict":
            tasks = ((name, objective) for name, objective in self._named() if isinstance(objective, DownstreamObjective))
            return {name: objective.predict(self.encoder, batch) for name, objective in tasks}
        if task == "draw":
            return {name: self.draw_one(name, batch) for name in self.objectives}
        if task == "evaluate":
            figures = {name: objective.evaluate(self.encoder, batch) for name, objective in self._named()}
            return {f"{name}/{key}": values for name, of_one in figures.items() for key, values in of_one.items()}
        losses = self._losses(batch)
        total = torch.stack([self.weights[name] * of_one.total for name, of_one in losses.items()]).sum()
        return Losses(total, {f"{name}/{part}": value for name, of_one in losses.items() for part, value in of_one.parts.items()})

    def draw_one(self, name: str, batch: Batch) -> dict[str, Tensor]:
        """Titles and columns B T 3 H W of the contact sheet of objective `name`, of a batch that was prepared for it."""
        objective: Objective = dict(self._named())[name]
        return objective.draw(self.encoder, batch)

    def freeze_encoder(self) -> None:
        """From here on the encoder stays as it is: it has no gradients and drops nothing."""
        self.encoder.requires_grad_(False)
        self.encoder.eval()
        self.encoder_is_frozen = True

    def train(self, mode: bool = True) -> "PretrainingModel":
        """As torch has it; a frozen encoder stays in evaluation mode."""
        super().train(mode)
        if self.encoder_is_frozen:
            self.encoder.eval()
        return self

    def _losses(self, batch: Batch) -> dict[str, Losses]:
        """Every objective's loss, after one call of the encoder for the clips of all."""
        groups = {name: objective.clips(batch) for name, objective in self._named()}
        encoded = iter(encode(self.encoder, [group for of_one in groups.values() for group in of_one]))
        return {name: objective(list(islice(encoded, len(groups[name]))), batch, self.peers) for name, objective in self._named()}

    def _named(self) -> list[tuple[str, Objective]]:
        return [(name, objective) for name, objective in self.objectives.items()]  # type: ignore[misc]


def build_model(
    encoder_config: EncoderConfig, objectives: Sequence[ObjectiveConfig], grid: Grid, *, cameras: int = 1, peers: Peers = ALONE
) -> PretrainingModel:
    """The model of a run of `cameras` cameras, a clip of each having `grid`, with fresh weights from torch's global generator."""
    encoder = build_encoder(encoder_config, grid)
    built = [_build_objective(config, encoder_config, encoder, grid, cameras) for config in objectives]
    weights: dict[str, float] = {config.kind: config.weight for config in objectives}
    return PretrainingModel(encoder, built, weights, peers)


def _build_objective(
    config: ObjectiveConfig, encoder_config: EncoderConfig, encoder: VideoEncoder, grid: Grid, cameras: int
) -> Objective:
    match config:
        case CrocoConfig():
            return build_croco(config, encoder_config, encoder, grid)
        case MaeConfig():
            return build_mae(config, encoder_config, encoder, grid)
        case SimipuConfig():
            return build_simipu(config, encoder, grid, cameras=cameras)
        case Mim4dConfig():
            return Mim4dObjective(_find_instants(config, encoder_config, grid, cameras), encoder_width=encoder.shape.width)
        case _:
            return _build_task(config, encoder_config, encoder, grid, cameras)


def _build_task(
    config: TaskConfig, encoder_config: EncoderConfig, encoder: VideoEncoder, grid: Grid, cameras: int
) -> DownstreamObjective:
    match config:
        case DepthConfig():
            return build_depth(config, encoder_config, encoder, grid, cameras=cameras)
        case PoseConfig():
            return build_pose(config, encoder, grid)
        case FlowConfig():
            return build_flow(config, encoder_config, encoder, grid)
        case BevConfig():
            return build_bev(config, encoder_config, encoder, grid, cameras=cameras)
        case MapConfig():
            return build_map(config, encoder_config, encoder, grid, cameras=cameras)
        case DetectionConfig():
            return build_detection(config, encoder_config, encoder, grid, cameras=cameras)


def build_preparations(
    objectives: Sequence[ObjectiveConfig], grid: Grid, encoder_config: EncoderConfig, *, cameras: int = 1
) -> dict[str, Preparation]:
    """What the loader's workers do for each objective, by its name."""
    return {config.kind: _build_preparation(config, grid, encoder_config, cameras) for config in objectives}


def _build_preparation(config: ObjectiveConfig, grid: Grid, encoder_config: EncoderConfig, cameras: int) -> Preparation:
    blocks = encoder_config.shape.depth if encoder_config.drop_path else 0
    match config:
        case CrocoConfig():
            return CrocoPreparation(config, grid, blocks)
        case MaeConfig():
            return MaePreparation(config, grid, blocks)
        case SimipuConfig():
            return SimipuPreparation(config, grid, encoder_config.patch_px, encoder_config.tubelet_frames, cameras, blocks)
        case Mim4dConfig():
            return Mim4dPreparation(_find_instants(config, encoder_config, grid, cameras), blocks)
        case _:
            return _prepare_task(config, grid, encoder_config, blocks)


def _prepare_task(config: TaskConfig, grid: Grid, encoder_config: EncoderConfig, blocks: int) -> Preparation:
    match config:
        case DepthConfig():
            return DepthPreparation(config, (grid.w * encoder_config.patch_px, grid.h * encoder_config.patch_px), blocks)
        case PoseConfig():
            return PosePreparation(blocks)
        case FlowConfig():
            return FlowPreparation(blocks)
        case BevConfig():
            return BevPreparation(config, blocks)
        case MapConfig():
            return MapPreparation(config, blocks)
        case DetectionConfig():
            return DetectionPreparation(config, blocks)


def _find_instants(config: Mim4dConfig, encoder_config: EncoderConfig, grid: Grid, cameras: int) -> Instants:
    return Instants(config, grid, encoder_config.patch_px, encoder_config.tubelet_frames, cameras)
