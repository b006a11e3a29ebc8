"""The nouns that cross the border between trainer and models: Batch goes in, Losses come out.

A Batch holds what the source gave (`shared`, read by any objective) and what each objective prepared for itself in the
loader's workers (`prepared`). Losses is a named tuple because FSDP2 and DDP look for tensors inside what a forward
returns, and they look into tuples and dicts, not into classes of ours.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """B samples of one micro-batch.

    `shared` is what the source offers, for pairs:
        target_images, reference_images   uint8  B T V 3 H W
        scene                             int64  B, equal numbers are the same scene
    `prepared[name]` is what objective `name` asked for, for CroCo:
        visible                           int64  B N, ascending token indices of the target that the encoder sees
    `clips` names each sample for logs and pictures.
    """

    shared: Mapping[str, Tensor]
    prepared: Mapping[str, Mapping[str, Tensor]]
    clips: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.clips)

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`; copies overlap with compute where the memory is pinned."""

        def move(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}

        return Batch(
            shared=move(self.shared),
            prepared={name: move(tensors) for name, tensors in self.prepared.items()},
            clips=self.clips,
        )

    def pin_memory(self) -> "Batch":
        """Called by torch's DataLoader where the batch goes to a GPU."""

        def pin(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.pin_memory() for name, tensor in tensors.items()}

        return Batch(
            shared=pin(self.shared),
            prepared={name: pin(tensors) for name, tensors in self.prepared.items()},
            clips=self.clips,
        )


class Losses(NamedTuple):
    """What a forward returns: the scalar to descend, and what else is worth a curve."""

    total: Tensor
    """Scalar: the weighted sum over objectives, mean over the samples of the batch."""
    parts: dict[str, Tensor]
    """Scalars by name `objective/part`, detached, each a mean over the samples of the batch."""
