"""The watchdog: who is to blame, what is kept, and that it ends the process and nothing else."""

import json
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from monitoring.pulse import Pulse
from tests.gloo import run_ranks
from trainer.errors import EXIT_RETRY
from trainer.store.open import open_store
from trainer.watchdog import Board, Said, Watchdog, blame, dump_flight_recorder


def said(**doings: str) -> dict[int, Said]:
    """The board as rank 0 sees it, which has given up."""
    return {int(rank[1:]): Said(7, doing, gives_up=rank == "r0") for rank, doing in doings.items()}


def spoke_again(board: dict[int, Said], *ranks: int) -> dict[int, Said]:
    return {rank: last._replace(times=last.times + (rank in ranks)) for rank, last in board.items()}


def test_ranks_whose_watchdogs_are_silent_are_frozen() -> None:
    before = said(r0="forward", r1="forward", r2="forward", r3="backward")
    assert blame(before, spoke_again(before, 1, 3), world_size=4) == "frozen: rank 2 (stopped, or its node is gone)"


def test_a_rank_that_gives_up_itself_is_not_frozen_though_it_says_no_more() -> None:
    before = said(r0="backward", r1="backward", r2="backward", r3="backward")
    before[3] = before[3]._replace(gives_up=True)
    assert blame(before, before | {2: Said(8, "backward", gives_up=True)}, world_size=4).startswith("frozen: rank 1 (")


def test_ranks_that_wait_for_a_frozen_one_all_name_that_one_alone(tmp_path: Path) -> None:
    store, ended = dist.HashStore(), threading.Semaphore(0)
    patience = {"factor": 2, "least_s": 0.1, "grace_s": 0.1}
    watchdogs = [
        Watchdog(
            Pulse(**patience), open_store(tmp_path), rank=rank, interval_s=0.02, doing=lambda: "backward",
            board=Board(store, rank=rank, world_size=4), end=lambda code: ended.release(),
        )
        for rank in (0, 2, 3)
    ]  # fmt: skip
    for watchdog in watchdogs:
        watchdog.start()
    assert all(ended.acquire(timeout=10) for _ in watchdogs)
    for watchdog in watchdogs:
        watchdog.close()
    incidents = sorted((tmp_path / "incidents").glob("*.txt"))
    assert [incident.read_text().splitlines()[1] for incident in incidents] == [
        "frozen: rank 1 (stopped, or its node is gone)"
    ] * 3


def test_a_rank_that_never_spoke_is_frozen() -> None:
    before = said(r0="forward")
    assert blame(before, before, world_size=3) == "frozen: rank 1, 2 (stopped, or its node is gone)"


def test_where_none_is_frozen_the_one_that_does_something_else_is_named() -> None:
    before = said(r0="backward", r1="data_wait", r2="backward")
    blamed = blame(before, spoke_again(before, 1, 2), world_size=3)
    assert blamed == "no rank is frozen; most are in backward, but rank 1 in data_wait"


def test_where_all_do_the_same_that_is_said() -> None:
    before = said(r0="backward", r1="backward")
    assert blame(before, spoke_again(before, 1), world_size=2) == "no rank is frozen, all are in backward"


def test_a_hang_leaves_stacks_and_asks_for_a_restart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ended = threading.Event()
    codes: list[int] = []

    def end(code: int) -> None:
        codes.append(code)
        ended.set()

    board = Board(dist.HashStore(), rank=0, world_size=2)
    pulse = Pulse(factor=2, least_s=0.1, grace_s=0.1)
    watchdog = Watchdog(pulse, open_store(tmp_path), rank=0, interval_s=0.02, doing=lambda: "forward", board=board, end=end)
    watchdog.start()
    assert ended.wait(10)
    watchdog.close()
    assert codes == [EXIT_RETRY]
    [incident] = (tmp_path / "incidents").iterdir()
    assert incident.name == "hang-step-00000000-rank-0.txt"
    text = incident.read_text()
    assert "start after step 0 has not ended" in text
    assert "frozen: rank 1" in text
    assert "test_a_hang_leaves_stacks" in text, "this thread's stack is in it"
    assert "rank 0 hangs" in caplog.text


def test_a_run_with_a_pulse_is_left_alone(tmp_path: Path) -> None:
    codes: list[int] = []
    pulse = Pulse(factor=2, least_s=10, grace_s=10)
    watchdog = Watchdog(pulse, open_store(tmp_path), rank=0, interval_s=0.01, doing=lambda: "", end=codes.append)
    watchdog.start()
    threading.Event().wait(0.1)
    watchdog.close()
    assert not codes
    assert watchdog.cpu_seconds < 0.1


def test_the_last_collectives_are_kept_where_torch_records_them() -> None:
    [kept] = run_ranks(_reduce_and_dump, 1)
    before, after = kept
    assert before is None, "nothing was reduced yet"
    entries = json.loads(after)["entries"]
    assert [entry["profiling_name"] for entry in entries] == ["gloo:all_reduce"]
    assert entries[0]["input_sizes"] == [[3]]


def _reduce_and_dump() -> tuple[bytes | None, bytes | None]:
    before = dump_flight_recorder()
    dist.all_reduce(torch.ones(3))
    return before, dump_flight_recorder()


def test_without_a_process_group_nothing_is_recorded() -> None:
    assert dump_flight_recorder() is None
