"""One writer a run: a claim with a number, which every commit must hold.

    claims/00000003.json     incarnation 3: who holds it, when that was last renewed, and which checkpoints it took over

A claim is an object that is created exclusively under the next number, so of two that try one wins. Who finds a claim that is
not his takes over when it was released, when it is of the same job (a restart: the pod before is gone, or is about to be), when its
process ran on this machine and is dead, or when it was not renewed for `expiry_s`; else he is refused (exit 3).

Fencing needs no clock. A writer that was taken over finds a higher number before it commits and ends. If it was stopped between
that look and its put, the manifest comes too late: its successor has written down which checkpoints there were
(`adopted`), and no reader counts others of older numbers (`catalog`). Only the expiry compares clocks, and they need to agree
within it.

Left to whom: one rank of a run holds the claim, `manager` says which.
"""

import dataclasses
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import RefusedError
from trainer.store.base import ObjectExistsError, ObjectMissingError, Store

log = logging.getLogger(__name__)

FOLDER = "claims"
_KEPT = 3


@dataclass(frozen=True)
class Holder:
    """A process, so that another on the same machine can see whether it lives."""

    host: str
    boot: str
    pids: str
    """Namespace of process numbers: pods of one node may share the rest."""
    pid: int
    started: str

    def is_known_dead(self) -> bool:
        """Whether it ran where we run and does no more; what runs elsewhere cannot be seen."""
        here = describe_process(os.getpid())
        return (self.host, self.boot, self.pids) == (here.host, here.boot, here.pids) and describe_process(self.pid) != self


@dataclass(frozen=True)
class Claim:
    """One incarnation of a run's writer."""

    incarnation: int
    job: str | None
    holder: Holder
    renewed_s: float
    """Seconds since 1970, by the holder's clock."""
    released: bool = False
    adopted: tuple[str, ...] | None = None
    """Prefixes of the checkpoints that it found when it took over; none until it has looked."""

    @property
    def key(self) -> str:
        return f"{FOLDER}/{self.incarnation:08d}.json"


class Writer:
    """The right to write to a run, until it is released or taken over."""

    def __init__(self, store: Store, claim: Claim, *, expiry_s: float) -> None:
        self._store = store
        self._claim = claim
        self._changing = threading.Lock()
        self._closed = threading.Event()
        threading.Thread(target=self._keep_renewing, args=(expiry_s / 4,), name="claim", daemon=True).start()

    @property
    def incarnation(self) -> int:
        return self._claim.incarnation

    def adopt(self, prefixes: Sequence[str]) -> None:
        """Say which checkpoints count; what older writers commit from now on does not exist."""
        self._write(adopted=tuple(prefixes))

    def check(self) -> None:
        """RefusedError where another writer has taken over."""
        newest = read_claims(self._store)[0]
        if newest.incarnation > self.incarnation:
            raise RefusedError(
                f"this process wrote to {self._store.uri} as incarnation {self.incarnation} and {_name(newest)} has taken over "
                f"as {newest.incarnation}; nothing is committed any more, and one of the two jobs should be deleted"
            )

    def release(self) -> None:
        """Let the next one in at once."""
        if not self._closed.is_set():
            self._closed.set()
            self._write(released=True)

    def give_up(self) -> None:
        """Let the next one in if the store allows it; in any case the claim is renewed no more and expires. Never raises."""
        try:
            self.release()
        except Exception as error:
            log.warning("the claim on %s could not be released and will expire: %s", self._store.uri, error)

    def _keep_renewing(self, every_s: float) -> None:
        while not self._closed.wait(every_s):
            try:
                self._write(renewed_s=time.time())
            except Exception as error:  # the next commit will say more of it
                log.warning("could not renew the claim on %s: %s", self._store.uri, error)

    def _write(self, **changes: object) -> None:
        with self._changing:
            if self._closed.is_set() and "released" not in changes:
                return
            self._claim = dataclasses.replace(self._claim, **changes)  # type: ignore[arg-type]
            self._store.put(self._claim.key, _dump(self._claim))


def claim_run(
    store: Store,
    *,
    job: str | None,
    expiry_s: float,
    find_committed: Callable[[], list[str]],
    clock: Callable[[], float] = time.time,
) -> Writer:
    """Become the writer of the run in `store`; RefusedError names the one that is.

    `job` is the same for every restart of one job. `find_committed` names the checkpoints that there are.
    """
    while True:
        held = refuse_if_held(store, job=job, expiry_s=expiry_s, clock=clock)
        number = held.incarnation + 1 if held else 1
        claim = Claim(number, job, describe_process(os.getpid()), clock())
        try:
            store.put(claim.key, _dump(claim), exclusive=True)
        except ObjectExistsError:
            continue  # somebody was faster: look again at who
        writer = Writer(store, claim, expiry_s=expiry_s)
        try:
            writer.adopt(find_committed())
        except BaseException:
            writer.give_up()
            raise
        _forget_old_claims(store, number)
        return writer


def read_claims(store: Store) -> list[Claim]:
    """All claims, the newest first."""
    claims = []
    for info in reversed(store.list(FOLDER)):
        try:
            claims.append(_parse(store.get(info.key)))
        except ObjectMissingError:  # forgotten since it was listed
            continue
    return claims


def refuse_if_held(store: Store, *, job: str | None, expiry_s: float, clock: Callable[[], float] = time.time) -> Claim | None:
    """The newest claim; RefusedError names its holder where `job` may not take the run over. Nothing is written."""
    held = next(iter(read_claims(store)), None)
    if held:
        _refuse_if_alive(held, job=job, age_s=clock() - held.renewed_s, expiry_s=expiry_s, uri=store.uri)
    return held


def watch_writer(store: Store) -> Callable[[], bool]:
    """Whether the writer that holds the run now, or nobody, still does: asked whenever the answer is called."""
    holder = _newest_incarnation(store)
    return lambda: _newest_incarnation(store) == holder


def _newest_incarnation(store: Store) -> int:
    return next((claim.incarnation for claim in read_claims(store)), 0)


def describe_process(pid: int) -> Holder:
    """Process `pid` of this machine, told apart from later ones of the same number."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        started = "gone" if state == "Z" else fields[18]
    except OSError:
        started = "gone"
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = Path("/proc/self/ns/pid")
    return Holder(
        socket.gethostname(),
        boot.read_text().strip() if boot.exists() else "",
        str(namespace.readlink()) if namespace.is_symlink() else "",
        pid,
        started,
    )


def _refuse_if_alive(held: Claim, *, job: str | None, age_s: float, expiry_s: float, uri: str) -> None:
    same_job = job is not None and job == held.job
    if held.released or same_job or held.holder.is_known_dead() or age_s > expiry_s:
        return
    raise RefusedError(
        f"{uri} was to be written to and {_name(held)} holds it, last heard of {max(0.0, age_s):.0f} s ago; "
        f"stop that job or give another run.uri: a holder that is gone lets go after {expiry_s:.0f} s"
    )


def _name(claim: Claim) -> str:
    job = f"job {claim.job}" if claim.job else "another job"
    return f"{job} (host {claim.holder.host}, process {claim.holder.pid})"


def _forget_old_claims(store: Store, newest: int) -> None:
    for info in store.list(FOLDER)[:-_KEPT]:
        if info.key < f"{FOLDER}/{newest:08d}.json":
            store.delete(info.key)


def _dump(claim: Claim) -> bytes:
    return json.dumps(dataclasses.asdict(claim)).encode()


def _parse(content: bytes) -> Claim:
    fields = json.loads(content)
    adopted = fields["adopted"]
    return Claim(**{**fields, "holder": Holder(**fields["holder"]), "adopted": None if adopted is None else tuple(adopted)})
