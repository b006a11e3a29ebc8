"""One writer a run: who may take over, who is refused, and that a writer which was taken over commits nothing that counts."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.checkpoint.toy import Trainer, save_now
from trainer.checkpoint.catalog import find_saves
from trainer.checkpoint.claim import Claim, Holder, Writer, claim_run, describe_process, read_claims, watch_writer
from trainer.checkpoint.manager import CheckpointManager
from trainer.config.training import CheckpointConfig
from trainer.errors import RefusedError
from trainer.store.base import Store, StoreError
from trainer.store.open import open_store

EXPIRY_S = 60.0


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "run")


@pytest.fixture(autouse=True)
def released(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A writer renews its claim in a thread until it lets go: none outlives its test."""
    writers: list[Writer] = []
    begin = Writer.__init__

    def note(writer: Writer, *args: Any, **options: Any) -> None:
        writers.append(writer)
        begin(writer, *args, **options)

    monkeypatch.setattr(Writer, "__init__", note)
    yield
    for writer in writers:
        writer.release()


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claims of this test come from another machine, whose processes cannot be seen."""
    monkeypatch.setattr(
        "trainer.checkpoint.claim.describe_process", lambda pid: Holder("another-node", "another-boot", "pid:[1]", pid, "1")
    )


def claim(store: Store, job: str | None = None, *, expiry_s: float = EXPIRY_S, later_s: float = 0.0) -> Writer:
    return claim_run(
        store,
        job=job,
        expiry_s=expiry_s,
        find_committed=lambda: [save.prefix for save in find_saves(store)[0]],
        clock=lambda: time.time() + later_s,
    )


def manage(store: Store, job: str | None = None) -> CheckpointManager:
    manager = CheckpointManager(store, CheckpointConfig(claim_expiry_s=EXPIRY_S))
    manager.claim(job=job)
    return manager


def test_a_second_trainer_is_refused_with_the_name_of_the_first(store: Store) -> None:
    claim(store, "pretrain-7")
    with pytest.raises(RefusedError, match=rf"job pretrain-7 \(host .*, process {os.getpid()}\) holds it") as caught:
        claim(store, "pretrain-8")
    assert caught.value.exit_code == 3
    with pytest.raises(RefusedError, match="job pretrain-7"):
        claim(store)


def test_a_restart_of_the_same_job_takes_over_at_once(store: Store) -> None:
    assert claim(store, "pretrain-7").incarnation == 1
    assert claim(store, "pretrain-7").incarnation == 2


def test_two_jobs_without_a_name_are_not_the_same(store: Store) -> None:
    claim(store)
    with pytest.raises(RefusedError, match="another job"):
        claim(store)


def test_a_run_that_ended_lets_the_next_one_in(store: Store) -> None:
    claim(store, "a").release()
    assert claim(store, "b").incarnation == 2


@pytest.mark.usefixtures("elsewhere")
def test_a_foreign_job_is_refused_until_the_claim_expires(store: Store) -> None:
    claim(store, "a")
    with pytest.raises(RefusedError, match="lets go after 60 s"):
        claim(store, "b", later_s=0.9 * EXPIRY_S)
    assert claim(store, "b", later_s=1.1 * EXPIRY_S).incarnation == 2


@pytest.mark.usefixtures("elsewhere")
def test_a_claim_that_is_renewed_does_not_expire(store: Store) -> None:
    claim(store, "a", expiry_s=0.4)
    time.sleep(0.8)
    with pytest.raises(RefusedError):
        claim(store, "b", expiry_s=0.4)


def test_a_holder_that_was_killed_on_this_machine_is_seen_to_be_dead(store: Store) -> None:
    program = """
import sys, time
from tests.trainer.checkpoint.test_claim import claim, open_store
claim(open_store(sys.argv[1]), "a")
print("held", flush=True)
time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", program, store.uri], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(RefusedError, match=f"process {holder.pid}"):
        claim(store, "b")
    holder.send_signal(signal.SIGKILL)  # a zombie, until we wait for it
    time.sleep(0.2)
    assert claim(store, "b").incarnation == 2
    holder.communicate()


def test_of_many_that_claim_at_once_each_number_has_one_holder(store: Store) -> None:
    program = (
        "import sys; from tests.trainer.checkpoint.test_claim import *; print(claim(open_store(sys.argv[1]), 'a').incarnation)"
    )
    started = [subprocess.Popen([sys.executable, "-c", program, store.uri], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    numbers = sorted(int(process.communicate()[0]) for process in started)
    assert numbers == [1, 2, 3, 4]


def test_a_writer_that_was_taken_over_cannot_commit(store: Store) -> None:
    first = manage(store, "a")
    save_now(first, 1, Trainer(0).state())
    manage(store, "a")
    with pytest.raises(RefusedError, match=r"incarnation 1 and job a .* has taken over as 2"):
        save_now(first, 2, Trainer(0).state())
    assert [save.step for save in find_saves(store)[0]] == [1]


def test_what_was_committed_just_too_late_does_not_exist_and_is_swept(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    first = manage(store, "a")
    whole = save_now(first, 1, Trainer(0).state())
    second = manage(store, "a")
    monkeypatch.setattr(Writer, "check", lambda writer: None)  # it was stopped between this look and its put
    late = save_now(first, 2, Trainer(0).state())
    assert late.prefix + "manifest.json" in {info.key for info in store.list("")}
    assert second.newest() == whole
    newer = save_now(second, 2, Trainer(0).state())
    assert second.newest() == newer
    assert not store.list(late.prefix)


def test_a_writer_that_was_taken_over_sweeps_nothing_of_its_successor(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    first = manage(store, "a")
    second = manage(store, "a")
    assert second.newest() is None
    begun = f"checkpoints/step-00000005-{2:04d}-abcdef01/"
    store.put(begun + "started.json", b"{}")
    monkeypatch.setattr(Writer, "check", lambda writer: None)
    save_now(first, 6, Trainer(0).state())
    assert store.list(begun)


def test_a_claim_whose_holder_cannot_look_is_let_go(store: Store) -> None:
    def fail() -> list[str]:
        raise StoreError("the store is gone")

    others = set(threading.enumerate())
    with pytest.raises(StoreError, match="the store is gone"):
        claim_run(store, job="a", expiry_s=EXPIRY_S, find_committed=fail)
    for thread in set(threading.enumerate()) - others:
        thread.join(timeout=5)
        assert not thread.is_alive(), "it would renew the claim for ever"
    assert claim(store, "b").incarnation == 2


def test_whoever_watches_the_writer_sees_it_taken_over(store: Store) -> None:
    claim(store, "a")
    is_still_held = watch_writer(store)
    assert is_still_held()
    claim(store, "a")
    assert not is_still_held()


def test_old_claims_are_forgotten_and_numbers_go_on(store: Store) -> None:
    for _ in range(6):
        claim(store, "a")
    assert [held.incarnation for held in read_claims(store)] == [6, 5, 4]


def test_checkpoints_count_by_the_last_writer_that_looked(store: Store) -> None:
    """A successor that was killed before it had looked changes nothing."""
    whole = save_now(manage(store, "a"), 1, Trainer(0).state())
    stillborn = replace(read_claims(store)[0], incarnation=2, adopted=None)
    store.put(stillborn.key, _dump_as_stored(stillborn))
    assert [save.prefix for save in find_saves(store)[0]] == [whole.prefix]


def _dump_as_stored(claim: Claim) -> bytes:
    from trainer.checkpoint.claim import _dump

    return _dump(claim)


def test_a_process_is_told_apart_from_a_later_one_of_the_same_number() -> None:
    here = describe_process(os.getpid())
    assert not here.is_known_dead()
    assert replace(here, started="1").is_known_dead()
    assert not replace(here, started="1", host="another").is_known_dead()
    assert not replace(here, started="1", pids="pid:[1]").is_known_dead(), "another pod of this node"
