"""What an objective is: four parts, each with one contract.

    needs     the names of the fields it reads from a sample; a run refuses a source that does not offer them all
    prepare   numpy, in the loader's workers: a sample and a random stream -> arrays of fixed shape
    clips     torch, on the device: the batch -> groups of clips that the shared encoder is to encode
    forward   torch, on the device: their tokens and the batch -> losses

`Preparation` carries the first two and is pickled into the workers; `Objective` is the trained module. The clips of all
objectives of a run go through the encoder in one packed call, so FSDP2 gathers every block once a step. A rank must never
branch on data: the same modules run on every rank whatever the batch holds, or sharded ranks wait for each other.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Float
from torch import Tensor, nn

from models.batch import Batch, Losses
from models.config import DECODER_SHAPES
from models.decoders import CompletingDecoder
from models.encoder import ClipGroup, VideoEncoder
from models.peers import Peers

_Decoder = TypeVar("_Decoder", bound=CompletingDecoder)


@runtime_checkable
class Preparation(Protocol):
    """What an objective does to a sample before it is batched."""

    @property
    def needs(self) -> frozenset[str]:
        """Names of the fields that it reads, or keeps."""
        ...

    @property
    def keeps(self) -> frozenset[str]:
        """Those of them that go to the device as they are, for `forward`."""
        ...

    def prepare(self, sample: Mapping[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Arrays for this objective alone, a pure function of sample and stream, of the same shape for every sample."""
        ...


class Encoded(NamedTuple):
    """Clips and what the encoder made of them."""

    clips: ClipGroup
    tokens: Float[Tensor, "B n C"]


class Objective(nn.Module, ABC):
    """One pre-training task on a shared encoder."""

    name: str
    tokens_per_sample: int
    """Tokens of one sample that go through the encoder."""

    @abstractmethod
    def clips(self, batch: Batch) -> list[ClipGroup]:
        """What the encoder is to encode for the loss."""

    @abstractmethod
    def forward(self, encoded: Sequence[Encoded], batch: Batch, peers: Peers) -> Losses:
        """The loss to descend; `total` is not yet weighted. `encoded` is one to one with `clips`."""

    @abstractmethod
    def evaluate(self, encoder: VideoEncoder, batch: Batch) -> dict[str, Tensor]:
        """Per-sample (B,) figures of the pretext task by name, for held-out clips; `loss` is among them."""

    @abstractmethod
    def draw(self, encoder: VideoEncoder, batch: Batch) -> dict[str, Tensor]:
        """Columns of a contact sheet by title, left to right: each B T 3 H W in [0, 1]."""


def encode(encoder: VideoEncoder, groups: Sequence[ClipGroup]) -> list[Encoded]:
    """Groups with their tokens, from one packed call."""
    return [Encoded(group, tokens) for group, tokens in zip(groups, encoder(groups), strict=True)]


def build_decoder(kind: type[_Decoder], size: str, encoder: VideoEncoder, *, values: int) -> _Decoder:
    """A decoder of the size of that name for tokens of `encoder`, positions and attention as the encoder has them."""
    return kind(
        DECODER_SHAPES[size],
        encoder_width=encoder.shape.width,
        values=values,
        positions=encoder.fixed_positions,
        has_time=encoder.has_time,
        attention=encoder.attention,
    )
