"""What one rank does for all, and what all do for one, with the errors told to everybody.

An error that only one rank sees leaves the others waiting in the next collective until its time-out. Here whatever a rank
meets travels in the collective in place of its answer, and every rank raises. A peer that is gone is torch's own error and
passes through. Without a process group there is one rank.

Left to whom: what is done; and the exit code, which the class of the error carries.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed as dist

from trainer.errors import OdonataError

T = TypeVar("T")


class Ranks:
    """The ranks of a process group; the first of them is the one that decides."""

    def __init__(self, group: dist.ProcessGroup | None = None, *, alone: bool = False) -> None:
        """The ranks of `group`, by default all; with `alone` this process by itself, whatever others there are."""
        self.group = group
        self.alone = alone or not dist.is_initialized()
        self.rank = 0 if self.alone else dist.get_rank(group)
        self.world_size = 1 if self.alone else dist.get_world_size(group)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def on_main(self, function: Callable[[], T]) -> T:
        """Run `function` on the first rank; its value, or its error, on all. Collective."""
        if self.alone:
            return function()
        box: list[Any] = [self._attempt(function) if self.is_main else None]
        dist.broadcast_object_list(box, group=self.group, group_src=0)
        return cast(T, _raise_failures(box)[0])

    def on_all(self, function: Callable[[], T]) -> list[T]:
        """Run `function` on every rank; all values, by rank, on all, or one error. Collective."""
        if self.alone:
            return [function()]
        box: list[Any] = [None] * self.world_size
        dist.all_gather_object(box, self._attempt(function), group=self.group)
        return _raise_failures(box)

    def _attempt(self, function: Callable[[], T]) -> T | OdonataError:
        try:
            return function()
        except OdonataError as error:
            return error
        except Exception as error:
            failure = OdonataError(f"rank {self.rank}: {type(error).__name__}: {error}")
            failure.__cause__ = error
            return failure


def _raise_failures(outcomes: list[Any]) -> list[Any]:
    failure = next((outcome for outcome in outcomes if isinstance(outcome, OdonataError)), None)
    if failure:
        raise failure
    return outcomes
