"""Staging: copy what this rank will write to host memory, so that training goes on while it is written.

One block of memory, pinned where there is a GPU, serves every save of a run: it is allocated and touched once, since the first
touch of fresh pages costs many times the copy. A save must be done with it before the next one is staged.
"""

import torch
from torch import Tensor

from trainer.checkpoint.boxes import Boxes, State

_ALIGNMENT_BYTES = 64


class Stage:
    """Host memory for one state at a time."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def reserve(self, state: State) -> None:
        """Have the memory that `state` takes, touched."""
        needed = sum(_padded(tensor) for boxes in state.values() for _, tensor in boxes.boxes)
        if needed > self._memory.numel():
            self._memory = torch.zeros(needed, dtype=torch.uint8, pin_memory=torch.cuda.is_available())

    def copy(self, state: State) -> dict[str, Boxes]:
        """`state` as it is now, in the memory of this stage; the copy before is overwritten."""
        self.reserve(state)
        place = 0

        def copy_tensor(tensor: Tensor) -> Tensor:
            nonlocal place
            target = self._memory[place : place + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            place += _padded(tensor)
            return target.copy_(tensor, non_blocking=True)

        copied = {name: boxes.map(copy_tensor) for name, boxes in state.items()}
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copied


def _padded(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
