"""Relative pose: from two images, how each camera stands to the other.

    loss = mean over both ways of |t - t*| + weight |R - R*|_F        (PoseNet, Kendall et al. 2015, equation 2; R by Zhou et al. 2019)

Both images go through the encoder, then each beside the other through CroCo's decoder, whose tokens are pooled (as
Weinzaepfel et al. 2022 have it for pose). Beyond them both ways are asked, as in Reloc3r (Dong et al. 2025): overlap decides which pairs
there are, and what a camera sees that drives forward lies in its past image more than in its next one. So one image of a pair
tells which came first, and a head that is asked one way alone learns which camera it is, and of motion nothing.

Metres come from what streets look like, since two images alone leave the scale open. A mirrored pair has a mirrored motion; it is
known by its negative focal length.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from models.batch import Batch
from models.config import Grid, PoseConfig
from models.decoders import CrossViewDecoder
from models.encoder import ClipGroup, VideoEncoder
from models.heads.pose import PoseHead
from models.images import denormalise, normalise, paint_lines
from models.objectives.base import Encoded
from models.objectives.downstream import DownstreamObjective, build_pair_decoder, decode_both_ways

_KEPT = frozenset({"target_images", "reference_images", "target_colours", "reference_colours"})
_COLOURS = ((0.12, 0.35, 0.86), (0.90, 0.47, 0.08))
"""Of the true and the predicted motion in pictures: blue and orange."""
_REACH_M, _DRAWN_M = 12.0, 8.0
"""Half a picture, and how long the true motion is drawn in it."""


@dataclass(frozen=True)
class PosePreparation:
    """The motion between the cameras of a pair, mirrored where its images are."""

    drop_path_blocks: int
    """Blocks that need numbers; 0 without drop-path."""
    needs: frozenset[str] = _KEPT | {"reference_from_target", "target_pix_from_cam"}
    keeps: frozenset[str] = _KEPT

    def prepare(self, sample: Mapping[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """As Preparation has it: `truth` 2 4 4 is reference_from_target and back, and `drop_path` (2, L, 2) for target and reference."""
        is_mirrored = sample["target_pix_from_cam"][0, 0, 0, 0] < 0
        mirror = np.diag([-1.0 if is_mirrored else 1.0, 1, 1, 1])
        there = mirror @ sample["reference_from_target"].astype(np.float64) @ mirror
        prepared: dict[str, np.ndarray] = {"truth": np.stack([there, np.linalg.inv(there)]).astype(np.float32)}
        if self.drop_path_blocks:
            prepared["drop_path"] = rng.random((2, self.drop_path_blocks, 2), dtype=np.float32)
        return prepared


class PoseObjective(DownstreamObjective):
    """The decoder in which the images meet, and the head of pose."""

    name = "pose"

    def __init__(self, config: PoseConfig, decoder: CrossViewDecoder, head: PoseHead, grid: Grid) -> None:
        super().__init__()
        self.config = config
        self.decoder = decoder
        self.head = head
        self.grid = grid
        self.tokens_per_sample = 2 * grid.tokens

    def clips(self, batch: Batch) -> list[ClipGroup]:
        """Targets and references."""
        shared, numbers = batch.shared, batch.prepared[self.name].get("drop_path")
        return [
            ClipGroup(
                normalise(shared[f"{view}_images"], shared[f"{view}_colours"]),
                drop_path=None if numbers is None else numbers[:, place],
            )
            for place, view in enumerate(("target", "reference"))
        ]

    def answer(self, encoded: Sequence[Encoded], batch: Batch) -> Float[Tensor, "B 2 4 4"]:
        """reference_from_target and target_from_reference, in metres."""
        target, reference = (view.tokens for view in encoded)
        return self.head(*decode_both_ways(self.decoder, target, reference, self.grid).chunk(2))

    def measure(self, predicted: Float[Tensor, "B 2 4 4"], truth: Float[Tensor, "B 2 4 4"]) -> Float[Tensor, " B"]:
        """As the formula above has it."""
        difference = predicted - truth
        translation = torch.linalg.vector_norm(difference[..., :3, 3], dim=-1)
        rotation = torch.linalg.vector_norm(difference[..., :3, :3], dim=(-2, -1))
        return (translation + self.config.rotation_weight * rotation).mean(dim=1)

    def draw(self, encoder: VideoEncoder, batch: Batch) -> dict[str, Tensor]:
        """Target, reference, and where the camera stood for the target: from above, as it looks up in the reference."""
        target, reference = (denormalise(group.images)[:, :, 0] for group in self.clips(batch))
        predicted, true = self.predict(encoder, batch)[:, 0], self.truth(batch)[:, 0]
        motions = torch.stack([paint_motions(*pair) for pair in zip(true, predicted, strict=True)])
        return {"target": target, "reference": reference, "true (blue), predicted (orange)": motions[:, None]}


def paint_motions(true: Float[Tensor, "4 4"], predicted: Float[Tensor, "4 4"]) -> Float[Tensor, "3 H W"]:
    """Ways along the ground in the frame of a camera, blue and orange; the true one always has the same length."""
    right_ahead = torch.stack([moved[[0, 2], 3] for moved in (true, predicted)])
    scaled = right_ahead * _DRAWN_M / torch.linalg.vector_norm(right_ahead[0]).clamp(min=1e-6)
    scaled = scaled * (_REACH_M / torch.linalg.vector_norm(scaled, dim=1, keepdim=True).clamp(min=1e-6)).clamp(max=1)
    ways = torch.stack([torch.zeros_like(scaled), torch.stack([scaled[:, 1], -scaled[:, 0]], dim=1)], dim=1)  # (2, 2, 2)
    return paint_lines(ways, torch.tensor(_COLOURS, device=ways.device), (_REACH_M, _REACH_M))


def build_pose(config: PoseConfig, encoder: VideoEncoder, grid: Grid) -> PoseObjective:
    """Pose on `encoder`, of pairs of images with `grid`."""
    decoder = build_pair_decoder(config.decoder, encoder)
    return PoseObjective(config, decoder, PoseHead(decoder.shape.width), grid)
