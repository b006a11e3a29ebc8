"""MAE: complete a masked clip from what is left of it (He et al. 2022; for clips Tong et al. 2022, VideoMAE).

CroCo without its second view, and the measure of what that view is worth: the same targets, masks and loss
(`models.objectives.completion`), and a decoder of the same size whose blocks attend to the clip alone.

Its clips are the targets of CroCo's pairs, so both can be given the same ones.

Beside the paper: positions and Xavier weights as CroCo's, no class token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from models.batch import Batch, Losses
from models.config import EncoderConfig, Grid, MaeConfig
from models.decoders import SingleViewDecoder
from models.encoder import ClipGroup, VideoEncoder
from models.images import normalise
from models.masking import count_visible, draw_visible
from models.objectives.base import Encoded, Objective, build_decoder, encode
from models.objectives.completion import Completion, draw_completion, measure_completion
from models.peers import Peers

_FIELDS = frozenset({"target_images", "target_colours"})


@dataclass(frozen=True)
class MaePreparation:
    """Draws the mask of a clip, and the numbers of drop-path where the encoder has it."""

    config: MaeConfig
    grid: Grid
    drop_path_blocks: int
    """Blocks that need numbers; 0 without drop-path."""
    needs: frozenset[str] = _FIELDS
    keeps: frozenset[str] = _FIELDS

    def prepare(self, sample: Mapping[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """As Preparation has it: `visible` (n), and `drop_path` (L, 2)."""
        del sample
        prepared: dict[str, np.ndarray] = {"visible": draw_visible(rng, self.grid, self.config.mask)}
        if self.drop_path_blocks:
            prepared["drop_path"] = rng.random((self.drop_path_blocks, 2), dtype=np.float32)
        return prepared


class MaeObjective(Objective):
    """The decoder that completes single clips, and its loss on a shared encoder."""

    name = "mae"

    def __init__(self, config: MaeConfig, decoder: SingleViewDecoder, grid: Grid) -> None:
        super().__init__()
        self.config = config
        self.decoder = decoder
        self.grid = grid
        self.tokens_per_sample = count_visible(grid, config.mask)

    def clips(self, batch: Batch) -> list[ClipGroup]:
        """The visible part of the targets."""
        prepared = batch.prepared[self.name]
        images = normalise(batch.shared["target_images"], batch.shared["target_colours"])
        return [ClipGroup(images, prepared["visible"], prepared.get("drop_path"))]

    def forward(self, encoded: Sequence[Encoded], batch: Batch, peers: Peers) -> Losses:
        """As Objective has it."""
        (target,) = encoded
        loss = self.complete(target).loss.mean()
        return Losses(loss, {"loss": loss.detach()})

    def evaluate(self, encoder: VideoEncoder, batch: Batch) -> dict[str, Tensor]:
        """The loss of each clip."""
        (target,) = encode(encoder, self.clips(batch))
        return {"loss": self.complete(target).loss}

    def draw(self, encoder: VideoEncoder, batch: Batch) -> dict[str, Tensor]:
        """Masked input, reconstruction and target."""
        (target,) = encode(encoder, self.clips(batch))
        return draw_completion(self.complete(target), target, self.grid, normalise_target=self.config.normalise_target)

    def complete(self, target: Encoded) -> Completion:
        """Predict every token of the target, of which the encoder saw the visible ones."""
        visible = target.clips.visible
        assert visible is not None, "a target is masked"
        prediction = self.decoder(target.tokens, visible, self.grid)
        return measure_completion(prediction, target, self.grid, normalise_target=self.config.normalise_target)


def build_mae(config: MaeConfig, encoder_config: EncoderConfig, encoder: VideoEncoder, grid: Grid) -> MaeObjective:
    """MAE on `encoder`, positions and attention as the encoder has them."""
    pixels = encoder_config.tubelet_frames * encoder_config.patch_px**2 * 3
    decoder = build_decoder(SingleViewDecoder, config.decoder, encoder, values=pixels)
    return MaeObjective(config, decoder, grid)
