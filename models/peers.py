"""All ranks of a run, as far as a loss may know them: means over what is valid anywhere, and rows of everybody.

A loss that is a mean over a number of things that differs between ranks must be divided by their number on all of them, or
the world size would change what is learnt. Process groups are not known here: `Peers` is handed in (`trainer.parallel.peers`).
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor


@runtime_checkable
class Peers(Protocol):
    """All ranks of a run, as far as a loss may know them. Both calls are collective: every rank makes them, with equal shapes."""

    @property
    def rank(self) -> int:
        """Of this process."""
        ...

    @property
    def world_size(self) -> int:
        """How many ranks there are."""
        ...

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of rank 0, then of rank 1, ...; a gradient goes back to the rank whose row it is, summed over all ranks."""
        ...

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all ranks, without gradient."""
        ...


@dataclass(frozen=True)
class Alone:
    """One process, or one that keeps to itself."""

    rank: int = 0
    world_size: int = 1

    def gather(self, rows: Tensor) -> Tensor:
        """As Peers has it."""
        return rows

    def sum(self, value: Tensor) -> Tensor:
        """As Peers has it."""
        return value


ALONE = Alone()


def share_of_mean(valid: Float[Tensor, ""], peers: Peers) -> Float[Tensor, ""]:
    """What a sum on this rank is multiplied by so that the mean over ranks is the mean over the `valid` things of all of them."""
    return peers.world_size / valid.clamp(min=1)


def mean_over_all(values: Float[Tensor, "*n"], valid: Bool[Tensor, "*n"], peers: Peers) -> Float[Tensor, ""]:
    """This rank's part of the mean of what is `valid` on all ranks; 0 where nothing is. Whoever trains averages over ranks."""
    return (values * valid).sum() * share_of_mean(peers.sum(valid.sum().float()), peers)
