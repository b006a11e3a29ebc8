"""Collectives between all ranks: do they add up, and how fast?

Bandwidth is counted as NCCL's own tests count it, by what each rank has to send in a ring whatever the algorithm, so that it can be held
against the links' (nccl-tests, doc/PERFORMANCE.md):

    all_reduce       2 (n - 1) / n x bytes / seconds
    all_gather       (n - 1) / n x bytes / seconds
    reduce_scatter   (n - 1) / n x bytes / seconds
"""

import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from trainer.doctor.finding import Finding
from trainer.parallel.launch import Launch

_BYTES = {"cuda": 256 * 2**20, "cpu": 4 * 2**20}
_REPEATS = 3


def check_collectives(launch: Launch) -> Finding:
    """What FSDP2 and ZeRO do in each step, on tensors whose sums are known, at the pace of the slowest rank."""
    ranks, device = launch.world_size, launch.device
    if ranks == 1:
        return Finding("collectives", "one rank: there is nobody to talk to")
    count = _BYTES[device.type] // 4 // ranks * ranks
    own = torch.full((count,), float(launch.rank + 1), device=device)
    share = own[: count // ranks]
    summed, gathered, scattered = own.clone(), torch.empty_like(own), torch.empty_like(share)
    total = float(ranks * (ranks + 1) // 2)
    of_each_rank = torch.arange(1.0, ranks + 1, device=device).repeat_interleave(len(share))

    rates, wrong = {}, []
    for name, act, result, expected in (
        ("all_reduce", lambda: dist.all_reduce(summed.copy_(own)), summed, torch.full_like(summed, total)),
        ("all_gather", lambda: dist.all_gather_into_tensor(gathered, share), gathered, of_each_rank),
        ("reduce_scatter", lambda: dist.reduce_scatter_tensor(scattered, own), scattered, torch.full_like(scattered, total)),
    ):
        seconds = min(_measure(act, device) for _ in range(_REPEATS))
        rates[name] = (2 if name == "all_reduce" else 1) * (ranks - 1) / ranks * own.nbytes / seconds
        wrong += [] if torch.equal(result, expected) else [name]
    found = ", ".join(f"{name} {rate / 1e9:.2f} GB/s" for name, rate in rates.items())
    cure = f"{' and '.join(wrong)} brought wrong sums: take this node out and have it tested" if wrong else ""
    return Finding("collectives", f"{ranks} ranks: {found}", cure)


def _measure(act: Callable[[], object], device: torch.device) -> float:
    """Seconds that the slowest rank took."""
    dist.barrier()
    started = time.perf_counter()
    act()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = torch.tensor(time.perf_counter() - started, device=device)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds)
