"""Loader processes: a core for each where there are enough, and what it means to lose one."""

import pytest

from trainer.data.workers import choose_cores, losses_are_retried
from trainer.errors import RetryError


def test_every_rank_keeps_a_core_and_every_worker_has_one_of_its_own() -> None:
    available = {3, 4, 5, 6, 10, 11, 12, 13, 20}
    of_ranks = [choose_cores(3, local_rank=rank, local_world_size=2, available=available) for rank in range(2)]
    assert of_ranks == [(4, 5, 6), (11, 12, 13)]
    assert choose_cores(0, local_rank=0, local_world_size=1, available={0}) == ()


@pytest.mark.parametrize(("workers", "ranks", "cores"), [(1, 1, 1), (3, 2, 7), (2, 8, 16)])
def test_with_too_few_cores_the_kernel_places_workers(workers: int, ranks: int, cores: int) -> None:
    assert choose_cores(workers, local_rank=0, local_world_size=ranks, available=range(cores)) == ()


def test_other_errors_of_torch_are_no_lost_worker() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), losses_are_retried(1.0):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied; Caught RuntimeError in DataLoader worker process 0.")
    with (
        pytest.raises(RetryError, match=r"a loader process is gone \(DataLoader worker \(pid 7\) is killed"),
        losses_are_retried(1.0),
    ):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
