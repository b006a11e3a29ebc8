"""The watchdog of a rank: notices a step that does not end, says which rank is to blame, and ends the process so that it is restarted.

Every rank's watchdog is a thread that now and then says on a board, outside of any collective, what its rank is doing. Where the
`Pulse` says that a step has lasted too long, it says that it gives up, as all that wait do at about the same time, and reads the board
twice: a rank whose watchdog is silent and has not given up is frozen (stopped, swapped out, its node gone); where none is, a rank that
does something else than most is the one that others wait for. That, the stacks of all threads and torch's record of the last
collectives go to incidents/, and the process ends with the code that asks for a restart.

gloo and NCCL give up, too, after parallel.timeout_s, without saying whom they waited for.

Left to whom: how long a step may last is `monitoring.pulse`'s; who starts processes again is outside.
"""

import faulthandler
import json
import logging
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from monitoring.pulse import Pulse
from trainer.errors import EXIT_RETRY
from trainer.store.base import Store, StoreError

log = logging.getLogger(__name__)

_LONGEST_INTERVAL_S = 5.0
_MESSAGES_A_SECOND = 200
"""That the one store of a process group is to bear from all ranks."""
_UPLOAD_S = 30.0


class Said(NamedTuple):
    """What a rank last said of itself."""

    times: int
    """That it has spoken."""
    doing: str
    gives_up: bool = False
    """Its watchdog has seen the hang too; it says no more."""


class Board:
    """What each rank last said of itself, kept by the store of the process group."""

    def __init__(self, store: dist.Store, *, rank: int, world_size: int) -> None:
        self._store = store
        self._rank = str(rank)
        self.world_size = world_size
        self._said = 0

    def say(self, doing: str, *, gives_up: bool = False) -> None:
        """Show that this rank's watchdog lives, and what its rank is doing."""
        self._said += 1
        self._store.set(self._rank, json.dumps(Said(self._said, doing, gives_up)))

    def read(self) -> dict[int, Said]:
        """By rank what it said last; a rank that never did is not there."""
        ranks = [str(rank) for rank in range(self.world_size)]
        if not self._store.check(ranks):
            ranks = [rank for rank in ranks if self._store.check([rank])]
        said = zip(
            ranks, map(json.loads, self._store.multi_get(ranks)), strict=True
        )  # one request, for all ranks may ask at once
        return {int(rank): Said(*last) for rank, last in said}


class Watchdog:
    """Looks at `pulse` every `interval_s`; `doing` says what the rank is at, `end` ends the process."""

    def __init__(
        self,
        pulse: Pulse,
        store: Store,
        *,
        rank: int,
        interval_s: float,
        doing: Callable[[], str],
        board: Board | None = None,
        end: Callable[[int], Any] = os._exit,
    ) -> None:
        self._pulse, self._store, self._board = pulse, store, board
        self._rank, self._interval_s = rank, interval_s
        self._doing, self._end = doing, end
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="odonata-watchdog")
        self.cpu_seconds = 0.0

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def close(self) -> None:
        """Look no more."""
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._closed.wait(self._interval_s):
            if time.monotonic() - looked > 3 * self._interval_s:
                self._pulse.forgive()  # this process was itself stopped, as by Ctrl-Z
            looked = time.monotonic()
            self._say()
            reason = self._pulse.why_hung()
            if reason:
                self._give_up(reason)
                return
            self.cpu_seconds = time.thread_time()

    def _say(self, *, gives_up: bool = False) -> None:
        if self._board:
            try:
                self._board.say(f"{self._pulse.activity} after step {self._pulse.step}: {self._doing()}", gives_up=gives_up)
            except RuntimeError as error:  # its store goes with the process that serves it: then nobody can be named
                log.warning("the board of the ranks is gone, so a hang will not say whose it is: %s", error)
                self._board = None

    def _give_up(self, reason: str) -> None:
        self._say(gives_up=True)
        blame = self._blame()
        log.error(
            "rank %d hangs: %s; %s; stacks are in %s/incidents; ending for a restart", self._rank, reason, blame, self._store.uri
        )
        upload = threading.Thread(target=self._keep_incident, args=(f"{reason}\n{blame}\n",), daemon=True)
        upload.start()
        upload.join(_UPLOAD_S)  # the store may be what hangs
        self._end(EXIT_RETRY)

    def _blame(self) -> str:
        if self._board is None:
            return f"this rank was in {self._doing()}"
        try:
            before = self._board.read()
            self._closed.wait(3 * self._interval_s)
            return blame(before, self._board.read(), world_size=self._board.world_size)
        except RuntimeError as error:
            return f"nobody can be named, for the board of the ranks is gone: {error}"

    def _keep_incident(self, text: str) -> None:
        name = f"incidents/hang-step-{self._pulse.step:08d}-rank-{self._rank}"
        try:
            self._store.put(f"{name}.txt", text.encode() + dump_stacks())
            recorded = dump_flight_recorder()
            if recorded:
                self._store.put(f"{name}-collectives.json", recorded)
        except StoreError as error:
            log.warning("could not keep the incident: %s", error)


def blame(before: dict[int, Said], after: dict[int, Said], *, world_size: int) -> str:
    """Which ranks are to blame for a hang, from two looks at the board; who looks has given up, as others may have."""
    awake = {rank for rank, said in after.items() if said.gives_up}
    frozen = [rank for rank in range(world_size) if rank not in awake and before.get(rank) == after.get(rank)]
    if frozen:
        return f"frozen: rank {_join(frozen)} (stopped, or its node is gone)"
    doings = {rank: said.doing for rank, said in after.items()}
    usual, _ = Counter(doings.values()).most_common(1)[0]
    others = {rank: doing for rank, doing in doings.items() if doing != usual}
    if not others:
        return f"no rank is frozen, all are in {usual}"
    listing = ", ".join(f"rank {rank} in {doing}" for rank, doing in sorted(others.items()))
    return f"no rank is frozen; most are in {usual}, but {listing}"


def dump_stacks() -> bytes:
    """Where every thread of this process is."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file=file, all_threads=True)
        file.seek(0)
        return file.read()


def dump_flight_recorder() -> bytes | None:
    """This process' last collectives as JSON, where torch's flight recorder keeps them (TORCH_FR_BUFFER_SIZE); NCCL has its own."""
    if not dist.is_initialized():
        return None
    name = "_dump_nccl_trace_json" if "nccl" in str(dist.get_backend_config()) else "_dump_fr_trace_json"
    dump = getattr(torch._C._distributed_c10d, name, None)  # private: another version of torch may have none
    recorded = dump() if dump else None
    text = recorded.encode() if isinstance(recorded, str) else recorded
    return text if text and json.loads(text).get("entries") else None


@contextmanager
def watching(
    pulse: Pulse, store: Store, *, rank: int, world_size: int, least_s: float, doing: Callable[[], str]
) -> Iterator[Watchdog]:
    """A watchdog of this rank while the block runs."""
    interval_s = max(world_size / _MESSAGES_A_SECOND, min(_LONGEST_INTERVAL_S, least_s / 8))
    board = _open_board(rank, world_size, timeout_s=10 * interval_s) if dist.is_initialized() else None
    watchdog = Watchdog(pulse, store, rank=rank, interval_s=interval_s, doing=doing, board=board)
    watchdog.start()
    try:
        yield watchdog
    finally:
        watchdog.close()


def _open_board(rank: int, world_size: int, *, timeout_s: float) -> Board:
    """On a connection of its own: the group's may be waiting for a peer."""
    store = _get_default_store().clone()  # type: ignore[attr-defined]
    store.set_timeout(timedelta(seconds=timeout_s))
    return Board(PrefixStore("odonata-watchdog", store), rank=rank, world_size=world_size)


def _join(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))
