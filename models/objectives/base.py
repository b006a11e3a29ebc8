"""What an objective is: three parts, each with one contract.

    needs     the names of the fields it reads from a sample; a run refuses a source that does not offer them all
    prepare   numpy, in the loader's workers: a sample and a random stream -> arrays of fixed shape
    forward   torch, on the device: the shared encoder and the batch -> losses

`Preparation` carries the first two and is pickled into the workers; `Objective` is the trained module. A rank must never
branch on data: the same modules run on every rank whatever the batch holds, or sharded ranks wait for each other.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import numpy as np
from torch import Tensor, nn

from models.batch import Batch, Losses
from models.encoder import VideoEncoder


@runtime_checkable
class Preparation(Protocol):
    """What an objective does to a sample before it is batched."""

    @property
    def needs(self) -> frozenset[str]:
        """Names of the fields that it reads."""
        ...

    def prepare(self, sample: Mapping[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Arrays for this objective alone, a pure function of sample and stream, of the same shape for every sample."""
        ...


class Objective(nn.Module, ABC):
    """One pre-training task on a shared encoder."""

    name: str
    tokens_per_sample: int
    """Tokens of one sample that go through the encoder."""

    @abstractmethod
    def forward(self, encoder: VideoEncoder, batch: Batch) -> Losses:
        """The loss to descend; `total` is not yet weighted."""

    @abstractmethod
    def evaluate(self, encoder: VideoEncoder, batch: Batch) -> dict[str, Tensor]:
        """Per-sample (B,) figures of the pretext task by name, for held-out clips; `loss` is among them."""

    @abstractmethod
    def draw(self, encoder: VideoEncoder, batch: Batch) -> dict[str, Tensor]:
        """Columns of a contact sheet by title, left to right: each B T 3 H W in [0, 1]."""
