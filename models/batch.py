"""The nouns that cross the border between trainer and models: Batch goes in, Losses come out.

A Batch holds what the source gave (`shared`, read by any objective) and what each objective prepared for itself in the
loader's workers (`prepared`). Losses is a named tuple because FSDP2 and DDP look for tensors inside what a forward
returns, and they look into tuples and dicts, not into classes of ours.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """B samples of one micro-batch.

    `shared` is what the source offers, for pairs:
        target_images, reference_images             uint8    B T V 3 H W
        target_pix_from_cam, reference_pix_from_cam  float32  B T V 3 3
        reference_from_target                        float32  B 4 4, of the first frames
        scene                                        int64    B, equal numbers are the same scene
    `prepared[name]` is what objective `name` asked for, for CroCo:
        visible                                      int64    B N, ascending token indices of the target that the encoder sees
    `clips` names each sample for logs and pictures, `replaced` says which clips could not be read, and why.
    """

    shared: Mapping[str, Tensor]
    prepared: Mapping[str, Mapping[str, Tensor]]
    clips: tuple[str, ...]
    replaced: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.clips)

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`; copies overlap with compute where the memory is pinned."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Called by torch's DataLoader where the batch goes to a GPU."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        shared = {name: change(tensor) for name, tensor in self.shared.items()}
        prepared = {
            objective: {name: change(tensor) for name, tensor in tensors.items()} for objective, tensors in self.prepared.items()
        }
        return replace(self, shared=shared, prepared=prepared)


class Losses(NamedTuple):
    """What a forward returns: the scalar to descend, and what else is worth a curve."""

    total: Tensor
    """Scalar: the weighted sum over objectives, mean over the samples of the batch."""
    parts: dict[str, Tensor]
    """Scalars by name `objective/part`, detached, each a mean over the samples of the batch."""
