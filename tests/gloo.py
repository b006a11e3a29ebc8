"""Multi-process tests: run a function on N ranks of a gloo group on this machine and collect what each returns.

A rank is a fresh interpreter, since forking under torch's threads can lock up. Shapes and types are checked in it as in the
test session: the import hook is in place before the module of the function, and so anything of ours, is imported. A launch
costs some ten seconds on two cores: put many checks into one.

Left to whom: `function` lives at the top of a test module; arguments and results travel pickled.
"""

import datetime
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

CHECKED_PACKAGES = ["models", "trainer"]


class RankError(AssertionError):
    """A rank raised, died or did not answer in time; the text holds what every such rank left behind."""


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """`function(*args)` on `world_size` ranks that have joined one gloo group; the results by rank.

    RankError when one of them fails: a rank that still runs two seconds later is killed, as is every rank after `timeout_s`.
    """
    context = multiprocessing.get_context("spawn")
    call = pickle.dumps((function, args))
    with tempfile.TemporaryDirectory() as folder:
        processes: list[BaseProcess] = []
        pipes: list[Connection] = []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            process: BaseProcess = context.Process(
                target=_run_rank, args=(rank, world_size, folder, timeout_s, call, sender), daemon=True
            )
            process.start()
            sender.close()
            processes.append(process)
            pipes.append(receiver)
        try:
            outcomes = _collect(pipes, deadline=time.monotonic() + timeout_s)
        finally:
            for process in processes:
                process.join(timeout=2)
                process.kill()
                process.join()
    return _results(outcomes, [process.exitcode for process in processes], timeout_s)


def _collect(pipes: list[Connection], *, deadline: float) -> dict[int, tuple[bool, Any]]:
    """What each rank sent, until all have, or one has failed and the others had a moment to say why, or time is up."""
    outcomes: dict[int, tuple[bool, Any]] = {}
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    while waiting and (left := deadline - time.monotonic()) > 0:
        for pipe in wait(list(waiting), timeout=left):
            assert isinstance(pipe, Connection)
            rank = waiting.pop(pipe)
            try:
                outcomes[rank] = pickle.loads(pipe.recv_bytes())
            except EOFError:
                outcomes[rank] = (False, "it died without a word")
            if not outcomes[rank][0]:
                deadline = min(deadline, time.monotonic() + 2)
    return outcomes


def _results(outcomes: dict[int, tuple[bool, Any]], exit_codes: list[int | None], timeout_s: float) -> list[Any]:
    failures = [
        f"rank {rank} (exit code {exit_codes[rank]}): {text}" for rank, (good, text) in sorted(outcomes.items()) if not good
    ]
    silent = [rank for rank in range(len(exit_codes)) if rank not in outcomes]
    if silent:
        failures.append(f"ranks {silent} had not finished" + ("" if failures else f" after {timeout_s} s"))
    if failures:
        raise RankError("\n".join(failures))
    return [outcomes[rank][1] for rank in range(len(exit_codes))]


def _run_rank(rank: int, world_size: int, folder: str, timeout_s: float, call: bytes, sender: Connection) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size),
        GLOO_SOCKET_IFNAME="lo",
    )
    try:
        outcome = pickle.dumps((True, _call_in_group(rank, world_size, folder, timeout_s, call)))
    except BaseException:
        outcome = pickle.dumps((False, traceback.format_exc()))
    sender.send_bytes(outcome)


def _call_in_group(rank: int, world_size: int, folder: str, timeout_s: float, call: bytes) -> Any:
    import torch
    import torch.distributed as dist
    from jaxtyping import install_import_hook

    torch.set_num_threads(1)
    install_import_hook(CHECKED_PACKAGES, "beartype.beartype")
    function, args = pickle.loads(call)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=timeout_s),
    )
    try:
        return function(*args)
    finally:
        dist.destroy_process_group()
