"""A downstream task: an objective with ground truth, for measuring what an encoder is worth.

It trains as any objective does, on single images and an encoder that is frozen or learns along (`optim.train_encoder`). Its preparation
puts what is true of a sample under `truth`, of fixed shape, NaN where nothing is known; `predict` answers in the same shape. Losses
and metrics are functions of the two alone, and metrics are the trainer's business (`trainer.evaluation.scores`).
"""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from models.batch import Batch, Losses
from models.config import DECODER_SHAPES, Grid
from models.decoders import CrossViewDecoder
from models.encoder import VideoEncoder
from models.objectives.base import Encoded, Objective, build_decoder, encode
from models.peers import Peers


class DownstreamObjective(Objective):
    """One downstream task: a head, and a loss between its answer and the truth."""

    @abstractmethod
    def answer(self, encoded: Sequence[Encoded], batch: Batch) -> Float[Tensor, "B ..."]:
        """What the head makes of the tokens, float32, one to one with the truth."""

    @abstractmethod
    def measure(self, predicted: Float[Tensor, "B ..."], truth: Float[Tensor, "B ..."]) -> Float[Tensor, " B"]:
        """The loss of each sample; zero where a sample has no truth."""

    def forward(self, encoded: Sequence[Encoded], batch: Batch, peers: Peers) -> Losses:
        """As Objective has it."""
        loss = self.measure(self.answer(encoded, batch), self.truth(batch)).mean()
        return Losses(loss, {"loss": loss.detach()})

    def predict(self, encoder: VideoEncoder, batch: Batch) -> Float[Tensor, "B ..."]:
        """The answer to each sample, as it is scored."""
        return self.answer(encode(encoder, self.clips(batch)), batch)

    def evaluate(self, encoder: VideoEncoder, batch: Batch) -> dict[str, Tensor]:
        """As Objective has it: the loss alone, since a metric of the task is no mean over samples."""
        return {"loss": self.measure(self.answer(encode(encoder, self.clips(batch)), batch), self.truth(batch))}

    def truth(self, batch: Batch) -> Float[Tensor, "B ..."]:
        """What is true of each sample, as the head is to answer it; NaN where it is not known."""
        return batch.prepared[self.name]["truth"]


def build_pair_decoder(size: str, encoder: VideoEncoder) -> CrossViewDecoder:
    """CroCo's decoder for two whole views, positions and attention as the encoder has them; a token comes out as wide as inside."""
    return build_decoder(CrossViewDecoder, size, encoder, values=DECODER_SHAPES[size].width)


def decode_both_ways(
    decoder: CrossViewDecoder, first: Float[Tensor, "B N C"], second: Float[Tensor, "B N C"], grid: Grid
) -> Float[Tensor, "two_B N E"]:
    """Each image of a pair beside the other, nothing hidden: the first ones of all pairs, then the second ones."""
    both, other = torch.cat([first, second]), torch.cat([second, first])
    return decoder(both, list_all_tokens(both), other, grid)


def list_all_tokens(tokens: Float[Tensor, "B N C"]) -> Int[Tensor, "B N"]:
    """Every token as visible: downstream nothing is hidden (Weinzaepfel et al. 2022)."""
    B, N, _ = tokens.shape
    return torch.arange(N, device=tokens.device).expand(B, N)


def mean_of_known(values: Float[Tensor, "B ..."], known: Bool[Tensor, "B ..."]) -> Float[Tensor, " B"]:
    """Mean over what is known of each sample; zero where nothing is."""
    flat, counted = torch.where(known, values, 0.0).flatten(1), known.flatten(1)
    return flat.sum(dim=1) / counted.sum(dim=1).clamp(min=1)
