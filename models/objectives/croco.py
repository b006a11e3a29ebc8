"""CroCo: complete a masked clip from a second view of the same scene (Weinzaepfel et al. 2022, 2023).

Loss and targets are `models.objectives.completion`'s.

Beyond the paper: target and reference are clips, another camera's or another moment's of the same drive; with one frame
each this is the paper's form, equation by equation.

Which second view goes with a target is chosen in `trainer.data.pairs`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from models.batch import Batch, Losses
from models.config import CrocoConfig, EncoderConfig, Grid
from models.decoders import CrossViewDecoder
from models.encoder import ClipGroup, VideoEncoder
from models.images import denormalise, normalise
from models.masking import count_visible, draw_visible
from models.objectives.base import Encoded, Objective, build_decoder, encode
from models.objectives.completion import Completion, draw_completion, first_camera, measure_completion
from models.peers import Peers

_FIELDS = frozenset({"target_images", "reference_images", "target_colours", "reference_colours", "scene"})


@dataclass(frozen=True)
class CrocoPreparation:
    """Draws the mask of a pair, and the numbers of drop-path where the encoder has it."""

    config: CrocoConfig
    grid: Grid
    drop_path_blocks: int
    """Blocks that need numbers; 0 without drop-path."""
    needs: frozenset[str] = _FIELDS
    keeps: frozenset[str] = _FIELDS

    def prepare(self, sample: Mapping[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """As Preparation has it: `visible` (n), and `drop_path` (2, L, 2) for target and reference."""
        del sample
        prepared: dict[str, np.ndarray] = {"visible": draw_visible(rng, self.grid, self.config.mask)}
        if self.drop_path_blocks:
            prepared["drop_path"] = rng.random((2, self.drop_path_blocks, 2), dtype=np.float32)
        return prepared


class CrocoObjective(Objective):
    """The decoder of cross-view completion, and its loss on a shared encoder."""

    name = "croco"

    def __init__(self, config: CrocoConfig, decoder: CrossViewDecoder, grid: Grid) -> None:
        super().__init__()
        self.config = config
        self.decoder = decoder
        self.grid = grid
        self.tokens_per_sample = count_visible(grid, config.mask) + grid.tokens

    def clips(self, batch: Batch) -> list[ClipGroup]:
        """The visible part of the targets, and the references."""
        shared, prepared = batch.shared, batch.prepared[self.name]
        target = normalise(shared["target_images"], shared["target_colours"])
        reference = normalise(shared["reference_images"], shared["reference_colours"])
        numbers = prepared.get("drop_path")
        return [
            ClipGroup(target, prepared["visible"], None if numbers is None else numbers[:, 0]),
            ClipGroup(reference, None, None if numbers is None else numbers[:, 1]),
        ]

    def forward(self, encoded: Sequence[Encoded], batch: Batch, peers: Peers) -> Losses:
        """As Objective has it."""
        target, reference = encoded
        loss = self.complete(target, reference.tokens).loss.mean()
        return Losses(loss, {"loss": loss.detach()})

    def evaluate(self, encoder: VideoEncoder, batch: Batch) -> dict[str, Tensor]:
        """The loss of each pair with its own reference, with that of another scene, and with a blank one.

        The other scene is the next one in the batch that differs; a batch of one scene falls back on another sample.
        """
        masked, whole = self.clips(batch)
        target, own, blank = encode(encoder, [masked, whole, replace(whole, images=torch.zeros_like(whole.images))])
        references = {
            "loss": own.tokens,
            "loss_wrong_reference": own.tokens[_another_scene(batch.shared["scene"])],
            "loss_blank_reference": blank.tokens,
        }
        return {name: self.complete(target, tokens).loss for name, tokens in references.items()}

    def draw(self, encoder: VideoEncoder, batch: Batch) -> dict[str, Tensor]:
        """Masked input, reconstruction, target and reference."""
        target, reference = encode(encoder, self.clips(batch))
        done = self.complete(target, reference.tokens)
        return {
            **draw_completion(done, target, self.grid, normalise_target=self.config.normalise_target),
            "reference": first_camera(denormalise(reference.clips.images)),
        }

    def complete(self, target: Encoded, reference: Float[Tensor, "B N C"]) -> Completion:
        """Predict every token of the target, of which the encoder saw the visible ones, with the tokens of `reference` beside it."""
        visible = target.clips.visible
        assert visible is not None, "a target is masked"
        prediction = self.decoder(target.tokens, visible, reference, self.grid)
        return measure_completion(prediction, target, self.grid, normalise_target=self.config.normalise_target)


def build_croco(config: CrocoConfig, encoder_config: EncoderConfig, encoder: VideoEncoder, grid: Grid) -> CrocoObjective:
    """CroCo on `encoder`, positions and attention as the encoder has them."""
    pixels = encoder_config.tubelet_frames * encoder_config.patch_px**2 * 3
    decoder = build_decoder(CrossViewDecoder, config.decoder, encoder, values=pixels)
    return CrocoObjective(config, decoder, grid)


def _another_scene(scene: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
    """For each sample the nearest later one, cyclically, of another scene; the next one where there is none."""
    B = len(scene)
    later = (torch.arange(B, device=scene.device)[:, None] + torch.arange(1, B + 1, device=scene.device)) % B
    differs = scene[later] != scene[:, None]
    return later.gather(1, differs.int().argmax(dim=1, keepdim=True))[:, 0]
