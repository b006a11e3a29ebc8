"""Optical flow: from two images of one camera, where what each shows stands in the other.

    loss = mean over known pixels, both ways, of |flow - flow*|        (the end-point error, FlowNet: Dosovitskiy et al. 2015)

Both images go through the encoder, then each beside the other through CroCo's decoder, as in CroCo-Flow (Weinzaepfel et al. 2023). Their
tokens are matched (`models.heads.matching`), and a dense head adds what matching at the size of patches leaves.

Beyond CroCo-Flow, whose DPT regresses one flow from the decoder's tokens alone: both ways are asked, since the rig of a car that always
drives forward answers one way by what each camera usually sees. Then whoever does not match does best to say that nothing moves, and a
fresh head stays there: so tokens are matched, and say where they stand (`models.heads.places`). Less than CroCo-Flow: hooks into
earlier blocks, and its confidence. What leaves the picture by more than its own size has no truth here: it is no longer a matter of
looking.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from models.batch import Batch
from models.config import EncoderConfig, FlowConfig, Grid
from models.decoders import CrossViewDecoder
from models.encoder import ClipGroup, VideoEncoder
from models.heads.dense import DenseHead
from models.heads.matching import match
from models.heads.places import PlaceSignal
from models.images import denormalise, normalise, paint_flow_px
from models.objectives.base import Encoded
from models.objectives.downstream import DownstreamObjective, build_pair_decoder, decode_both_ways, mean_of_known


@dataclass(frozen=True)
class FlowPreparation:
    """The flow that is learnt and scored."""

    drop_path_blocks: int
    """Blocks that need numbers; 0 without drop-path."""
    needs: frozenset[str] = frozenset({"consecutive_images", "consecutive_colours", "flow_px"})
    keeps: frozenset[str] = frozenset({"consecutive_images", "consecutive_colours"})

    def prepare(self, sample: Mapping[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """As Preparation has it: `truth` 2 H W 2, there and back, NaN where it is not known, and `drop_path` (2, L, 2) for both images."""
        flow_px = sample["flow_px"].astype(np.float32)
        with np.errstate(invalid="ignore"):
            is_near = np.linalg.norm(flow_px, axis=-1, keepdims=True) < max(flow_px.shape[1:3])
        prepared: dict[str, np.ndarray] = {"truth": np.where(is_near, flow_px, np.float32(np.nan))}
        if self.drop_path_blocks:
            prepared["drop_path"] = rng.random((2, self.drop_path_blocks, 2), dtype=np.float32)
        return prepared


class FlowObjective(DownstreamObjective):
    """The decoder in which the images meet, and the head of flow."""

    name = "flow"

    def __init__(self, places: PlaceSignal, decoder: CrossViewDecoder, head: DenseHead, grid: Grid) -> None:
        super().__init__()
        self.places = places
        self.decoder = decoder
        self.head = head
        self.grid = grid
        self.tokens_per_sample = 2 * grid.tokens

    def clips(self, batch: Batch) -> list[ClipGroup]:
        """First images and next ones."""
        images = normalise(batch.shared["consecutive_images"], batch.shared["consecutive_colours"])  # (B, 2, 1, 3, H, W)
        numbers = batch.prepared[self.name].get("drop_path")
        return [ClipGroup(images[:, place, None], drop_path=None if numbers is None else numbers[:, place]) for place in range(2)]

    def answer(self, encoded: Sequence[Encoded], batch: Batch) -> Float[Tensor, "B 2 H W 2"]:
        """Pixels to the right and down, from the first image to the next one and back."""
        size = (self.grid.h, self.grid.w)
        first, following = (self.places(image.tokens) for image in encoded)
        tokens = decode_both_ways(self.decoder, first, following, self.grid)  # (2 B, N, C)
        refinement = self.head(tokens, size)  # (2 B, 2, H, W), in patches
        matched = F.interpolate(match(tokens, tokens.roll(len(first), dims=0), size), size=refinement.shape[-2:], mode="bilinear")
        flow_px = (matched + refinement).movedim(1, -1) * self.head.patch_px
        return torch.stack(flow_px.chunk(2), dim=1)

    def measure(self, predicted: Float[Tensor, "B 2 H W 2"], truth: Float[Tensor, "B 2 H W 2"]) -> Float[Tensor, " B"]:
        """End-point error."""
        known = truth.isfinite()
        error = torch.linalg.vector_norm(torch.where(known, predicted - truth, 0.0), dim=-1)
        return mean_of_known(error, known[..., 0])

    def draw(self, encoder: VideoEncoder, batch: Batch) -> dict[str, Tensor]:
        """Both images, each with both flows: direction as hue, length as how strong the colour is, by the longest true one."""
        truth, predicted = self.truth(batch).nan_to_num(), self.predict(encoder, batch)
        longest = torch.linalg.vector_norm(truth, dim=-1).amax(dim=(1, 2, 3))
        columns = {}
        for way, (group, title, back) in enumerate(zip(self.clips(batch), ("image", "next image"), ("", " back"), strict=True)):
            columns[title] = denormalise(group.images)[:, :, 0]
            columns[f"predicted flow{back}"] = paint_flow_px(predicted[:, way], longest)[:, None]
            columns[f"true flow{back}"] = paint_flow_px(truth[:, way], longest)[:, None]
        return columns


def build_flow(config: FlowConfig, encoder_config: EncoderConfig, encoder: VideoEncoder, grid: Grid) -> FlowObjective:
    """Flow on `encoder`, of pairs of images with `grid`."""
    decoder = build_pair_decoder(config.decoder, encoder)
    head = DenseHead(encoder_width=decoder.shape.width, width=config.head_width, values=2, patch_px=encoder_config.patch_px)
    return FlowObjective(PlaceSignal(encoder.shape, grid), decoder, head, grid)
