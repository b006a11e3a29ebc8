"""All ranks as a contrastive loss sees them: rows of everybody, with gradients that find their way home.

In the forward everybody's rows are gathered; in the backward the gradients that all ranks have for all rows are summed, and
each rank takes those of its own. Putting only the local slice back into a detached gather loses what other ranks' losses
say about it (measured: gradients wrong by a third).
"""

import torch
import torch.distributed as dist
from torch import Tensor

from models.peers import Alone, Peers


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor) -> Tensor:
        return _all_gather(rows)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


class AllRanks:
    """Every rank of the default process group, which must exist."""

    @property
    def rank(self) -> int:
        """As Peers has it."""
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        """As Peers has it."""
        return dist.get_world_size()

    def gather(self, rows: Tensor) -> Tensor:
        """As Peers has it."""
        if rows.requires_grad and torch.is_grad_enabled():
            return _Gather.apply(rows)
        return _all_gather(rows)

    def sum(self, value: Tensor) -> Tensor:
        """As Peers has it."""
        total = value.detach().clone()
        dist.all_reduce(total)
        return total


def find_peers() -> Peers:
    """All ranks where there is a process group, else this process alone."""
    return AllRanks() if dist.is_initialized() else Alone()


def _all_gather(rows: Tensor) -> Tensor:
    gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, rows.contiguous())
    return torch.cat(gathered)
