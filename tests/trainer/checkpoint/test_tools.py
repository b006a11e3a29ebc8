"""Listing, checking and copying checkpoints, whole and broken ones."""

import logging
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tests.runs import SMALL_RUN
from tests.trainer.checkpoint.toy import FailingStore, Trainer, save_now, unequal, whole
from trainer.checkpoint import tools
from trainer.checkpoint.catalog import MARKER, find_saves, save_at
from trainer.checkpoint.claim import claim_run, read_claims
from trainer.checkpoint.manager import CheckpointManager, read_tensors
from trainer.checkpoint.record import MANIFEST, Record
from trainer.checkpoint.tools import (
    Checkpoint,
    Place,
    choose_checkpoint,
    copy_checkpoint,
    list_checkpoints,
    open_place,
    raise_if_damaged,
    totals_by_kind,
    verify_checkpoint,
)
from trainer.config.training import CheckpointConfig
from trainer.errors import CheckpointError, RefusedError
from trainer.store.base import ObjectInfo, Store, StoreError
from trainer.store.open import open_store

OBJECT = "rank-00000.bin"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "run")


@pytest.fixture
def other(tmp_path: Path) -> Store:
    return open_store(tmp_path / "other")


def save(store: Store, step: int) -> Record:
    return save_now(CheckpointManager(store, CheckpointConfig(keep_last=9)), step, Trainer(step).state())


def flip(store: Store, key: str, place: int) -> None:
    path = Path(store.uri, key)
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(data)


def truncate(store: Store, key: str) -> None:
    path = Path(store.uri, key)
    path.write_bytes(path.read_bytes()[:-1])


def ignore(count: int) -> None:
    """No progress bar."""


def contents(store: Store) -> dict[str, bytes]:
    return {info.key: store.get(info.key) for info in store.list("") if not info.key.startswith("claims/")}


def verify(store: Store, progress: Callable[[int], object] = ignore) -> list[Checkpoint]:
    return [verify_checkpoint(store, checkpoint, progress) for checkpoint in list_checkpoints(Place(store))]


def test_every_save_is_listed_newest_first_with_what_is_wrong_with_it(store: Store) -> None:
    records = {step: save(store, step) for step in (10, 20, 30, 40, 50)}
    claim_run(store, job=None, expiry_s=9.0, find_committed=lambda: [records[step].prefix for step in (10, 20, 30, 50)]).release()
    truncate(store, records[20].prefix + OBJECT)
    truncate(store, records[30].prefix + MANIFEST)
    store.delete(records[50].prefix + MANIFEST)
    found = list(list_checkpoints(Place(store)))
    assert [(checkpoint.save.step, checkpoint.state) for checkpoint in found] == [
        (50, "unfinished"),
        (40, "void"),
        (30, "damaged"),
        (20, "damaged"),
        (10, "whole"),
    ]
    reasons = [
        "has no manifest.json",
        "incarnation 0, had been taken over",
        "does not have the checksum",
        "bytes and was written with",
        "",
    ]
    for checkpoint, reason in zip(found, reasons, strict=True):
        assert reason in checkpoint.reason
        assert bool(checkpoint.reason) == bool(reason)
    assert [checkpoint.record for checkpoint in found] == [None] * 4 + [records[10]]
    assert all(checkpoint.created and checkpoint.created.startswith("20") for checkpoint in found)
    assert found[-1].bytes == sum(info.bytes for info in store.list(records[10].prefix))


def test_a_save_whose_marker_is_gone_or_garbled_is_listed_without_a_time(store: Store) -> None:
    for record, marker in [(save(store, step), marker) for step, marker in ((10, None), (20, b"\0"), (30, b"[]"))]:
        store.delete(record.prefix + MANIFEST)
        store.delete(record.prefix + MARKER)
        if marker:
            store.put(record.prefix + MARKER, marker)
    assert [checkpoint.created for checkpoint in list_checkpoints(Place(store))] == [None, None, None]


def test_a_uri_names_a_run_or_one_checkpoint_in_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for run, uri in ((tmp_path, "."), (tmp_path / "a", "a/"), ("s3://bucket/a", "s3://bucket/a"), ("/", "/")):
        assert (open_place(uri).uri, open_place(uri).prefix) == (str(run).rstrip("/"), "")
    name = "checkpoints/step-00000010-0003-5e2f91ac"
    for run, uri in ((str(tmp_path), name), ("/a/checkpoints", f"/a/checkpoints/{name}/"), ("s3://b", f"s3://b/{name}//")):
        place = open_place(uri)
        assert (place.store.uri, place.prefix, place.uri) == (run, name + "/", f"{run}/{name}")


def test_a_run_that_lies_in_a_folder_called_checkpoints_is_a_run() -> None:
    assert open_place("/data/checkpoints/croco").prefix == ""


def test_what_is_not_there_is_told_with_what_to_do(store: Store) -> None:
    with pytest.raises(CheckpointError, match=r"there is no run: neither checkpoints/ nor config\.yaml; give a run's folder"):
        list(list_checkpoints(Place(store)))
    store.put("config.yaml", b"")
    assert list(list_checkpoints(Place(store))) == []
    with pytest.raises(CheckpointError, match="holds no whole one; `odonata checkpoints list"):
        choose_checkpoint(Place(store))
    save(store, 10)
    with pytest.raises(CheckpointError, match=r"of step 11 was asked for .* no whole one of step 11;"):
        choose_checkpoint(Place(store), 11)
    with pytest.raises(CheckpointError, match="nothing lies there"):
        list(list_checkpoints(Place(store, "checkpoints/step-00000010-0000-0/")))


def test_the_newest_whole_checkpoint_is_chosen_or_that_of_a_step(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    older, newer = save(store, 10), save(store, 20)
    assert choose_checkpoint(Place(store)) == newer
    assert choose_checkpoint(Place(store), 10) == choose_checkpoint(Place(store, older.prefix)) == older
    truncate(store, newer.prefix + OBJECT)
    with caplog.at_level(logging.WARNING):
        assert choose_checkpoint(Place(store)) == older
    assert newer.prefix in caplog.text
    for place, step in ((Place(store), 20), (Place(store, newer.prefix), None)):
        with pytest.raises(CheckpointError, match=rf"{OBJECT} has .* bytes"):
            choose_checkpoint(place, step)


def test_a_flipped_byte_is_found_by_reading_and_by_nothing_else(store: Store) -> None:
    older, newer = save(store, 10), save(store, 20)
    flip(store, newer.prefix + OBJECT, 999)
    assert all(checkpoint.state == "whole" for checkpoint in list_checkpoints(Place(store)))
    read: list[int] = []
    damaged, good = verify(store, read.append)
    assert (damaged.state, damaged.record, good.state) == ("damaged", None, "whole")
    assert "has the checksum" in damaged.reason
    assert sum(read) == older.bytes + newer.bytes
    with pytest.raises(CheckpointError, match=rf"1 of 2 checkpoints are damaged \({newer.prefix}: {OBJECT} has") as caught:
        raise_if_damaged(Place(store), [damaged, good])
    assert caught.value.exit_code == 2


def test_an_unfinished_save_is_no_damage_unless_nothing_else_is_there(store: Store) -> None:
    save(store, 10)
    store.delete(save(store, 20).prefix + MANIFEST)
    unfinished, good = verify(store)
    raise_if_damaged(Place(store), [unfinished, good])
    with pytest.raises(CheckpointError, match=r"no whole one .*has no manifest"):
        raise_if_damaged(Place(store), [unfinished])


@pytest.mark.parametrize(("gone", "state"), [("", "unfinished"), (OBJECT, "damaged")])
def test_a_checkpoint_that_goes_away_while_it_is_read_is_told_as_what_is_left(store: Store, gone: str, state: str) -> None:
    class Vanishing(FailingStore):
        def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
            if length:
                self.delete(record.prefix + gone)
            return super().get(key, offset, length)

    record = save(store, 10)
    store.put(record.prefix + "more", b"")
    (checkpoint,) = list_checkpoints(Place(store))
    verified = verify_checkpoint(Vanishing(store, "none"), checkpoint, ignore)
    assert verified.state == state
    assert verified.reason


def test_a_copy_is_the_same_bytes_and_resumes_and_comes_back(store: Store, other: Store) -> None:
    save(store, 10)
    record = save(store, 20)
    store.put("config.yaml", SMALL_RUN.encode())
    read: list[int] = []
    place = copy_checkpoint(store, record, other, read.append)
    assert sum(read) == record.bytes
    copied = choose_checkpoint(Place(other))
    assert place == f"{other.uri}/{copied.prefix}"
    assert as_at(record, copied) == record
    assert other.get(copied.prefix + OBJECT) == store.get(record.prefix + OBJECT)
    assert other.get("config.yaml") == store.get("config.yaml")
    resumed = CheckpointManager(other, CheckpointConfig())
    resumed.claim(job=None)
    assert resumed.newest() == copied
    resumed.close()
    assert unequal(read_tensors(other, copied), whole(Trainer(20).state())) == []
    store.delete(record.prefix)
    copy_checkpoint(other, copied, store, ignore)
    assert as_at(record, choose_checkpoint(Place(store))) == record
    assert {checkpoint.state for checkpoint in verify(store)} == {"whole"}


def as_at(record: Record, copied: Record) -> Record:
    """`copied` with the writer and the place of `record`, which are all that a copy changes."""
    return replace(copied, writer=record.writer, prefix=record.prefix)


def test_a_copy_is_written_under_the_number_of_its_own_claim(store: Store, other: Store) -> None:
    for _ in range(3):
        claim_run(store, job=None, expiry_s=9.0, find_committed=list).release()
    manager = CheckpointManager(store, CheckpointConfig())
    manager.claim(job=None)
    record = save_now(manager, 10, Trainer(0).state())
    manager.close()
    assert record.writer == 4
    copy_checkpoint(store, record, other, ignore)
    copied = choose_checkpoint(Place(other))
    assert copied.writer == save_at(copied.prefix).writer == read_claims(other)[0].incarnation == 1
    assert save_at(copied.prefix).origin == save_at(record.prefix).origin


def test_a_copy_that_another_was_faster_with_is_refused_and_undoes_nothing(
    store: Store, other: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def let_another_copy_in(target: Store) -> None:
        monkeypatch.setattr(tools, "check_exclusive", lambda target: None)
        copy_checkpoint(store, record, other, ignore)

    record = save(store, 10)
    monkeypatch.setattr(tools, "check_exclusive", let_another_copy_in)
    with pytest.raises(CheckpointError, match="where a checkpoint is already"):
        copy_checkpoint(store, record, other, ignore)
    assert [checkpoint.state for checkpoint in verify(other)] == ["whole"]


def test_two_copies_in_one_run_at_once_do_not_undo_each_other(
    store: Store, other: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one is stopped in its object for so long that its claim expires, and goes on when the second has ended."""

    class Stopping(FailingStore):
        def put(self, key: str, payload: bytes | Iterable[memoryview], *, exclusive: bool = False) -> ObjectInfo:
            if key.endswith(OBJECT):
                with monkeypatch.context() as patch:
                    patch.setattr("trainer.checkpoint.claim._refuse_if_alive", lambda held, **_: None)
                    copy_checkpoint(store, record, other, ignore)
            return super().put(key, payload, exclusive=exclusive)

    record = save(store, 10)
    with pytest.raises(RefusedError, match="has taken over"):
        copy_checkpoint(store, record, Stopping(other, "none"), ignore)
    assert [checkpoint.state for checkpoint in verify(other)] == ["whole"]


def test_a_copy_counts_in_a_run_that_has_had_writers(store: Store, other: Store) -> None:
    theirs, ours = save(other, 5), save(store, 10)
    for _ in range(3):
        claim_run(other, job=None, expiry_s=9.0, find_committed=lambda: [theirs.prefix]).release()
    theirs_config = SMALL_RUN.encode() + b"seed: 2\n"
    other.put("config.yaml", theirs_config)
    store.put("config.yaml", SMALL_RUN.encode())
    copy_checkpoint(store, ours, other, ignore)
    assert [found.origin for found in find_saves(other)[0]] == [save_at(ours.prefix).origin, save_at(theirs.prefix).origin]
    assert other.get("config.yaml") == theirs_config


def test_nothing_is_copied_into_a_run_that_is_being_written_to(store: Store, other: Store) -> None:
    record, theirs = save(store, 10), save(other, 5)
    writer = claim_run(other, job="theirs", expiry_s=9.0, find_committed=lambda: [theirs.prefix])
    before = contents(other)
    with pytest.raises(RefusedError, match=r"job theirs .* holds it"):
        copy_checkpoint(store, record, other, ignore)
    assert contents(other) == before
    writer.release()


def test_a_writer_holds_its_run_against_a_copy_as_long_as_its_own_config_says(store: Store, other: Store) -> None:
    record, silent_s = save(store, 10), 200.0
    content = yaml.safe_load(SMALL_RUN)
    assert silent_s > CheckpointConfig().claim_expiry_s
    writer = claim_run(other, job=None, expiry_s=600.0, find_committed=list, clock=lambda: time.time() - silent_s)
    for expiry_s in (600, 100):
        content["checkpoint"]["claim_expiry_s"] = expiry_s
        other.put("config.yaml", yaml.safe_dump(content).encode())
        if expiry_s > silent_s:
            with pytest.raises(RefusedError, match="holds it"):
                copy_checkpoint(store, record, other, ignore)
        else:
            copy_checkpoint(store, record, other, ignore)
    with pytest.raises(RefusedError, match="has taken over"):
        writer.check()


@pytest.mark.parametrize("broken", [False, True])
def test_a_checkpoint_is_never_copied_over_one_that_is_there(store: Store, other: Store, broken: bool) -> None:
    record = save(store, 10)
    copy_checkpoint(store, record, other, ignore)
    if broken:
        truncate(other, choose_checkpoint(Place(other)).prefix + OBJECT)
    before = contents(other)
    with pytest.raises(CheckpointError, match="where a checkpoint is already; nothing is written over"):
        copy_checkpoint(store, record, other, ignore)
    assert contents(other) == before


def test_damage_that_is_found_while_copying_leaves_no_copy(store: Store, other: Store) -> None:
    record = save(store, 10)
    flip(store, record.prefix + OBJECT, 999)
    with pytest.raises(CheckpointError, match=f"its {OBJECT} is damaged"):
        copy_checkpoint(store, record, other, ignore)
    assert contents(other) == {}


@pytest.mark.parametrize("ending", [MARKER, ".bin", MANIFEST])
def test_a_copy_that_breaks_off_does_not_count_and_can_be_made_again(store: Store, other: Store, ending: str) -> None:
    record = save(store, 10)
    full = FailingStore(other, ending)
    with pytest.raises(StoreError, match="No space left on device"):
        copy_checkpoint(store, record, full, ignore)
    assert [key for key in contents(other) if key.startswith("checkpoints/")] == []
    full.full = False
    copy_checkpoint(store, record, full, ignore)
    assert as_at(record, choose_checkpoint(Place(other))) == record


def test_a_copy_holds_one_piece_at_a_time_and_puts_the_manifest_last(
    store: Store, other: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Observed(FailingStore):
        def put(self, key: str, payload: bytes | Iterable[memoryview], *, exclusive: bool = False) -> ObjectInfo:
            keys.append((key.rpartition("/")[2], exclusive))
            return super().put(key, payload, exclusive=exclusive)

    monkeypatch.setattr(tools, "_PIECE_BYTES", 1000)
    keys: list[tuple[str, bool]] = []
    pieces: list[int] = []
    record = save(store, 10)
    copy_checkpoint(store, record, Observed(other, "none"), pieces.append)
    of_checkpoint = [key for key in keys if key[0] in (MARKER, OBJECT, MANIFEST)]
    assert of_checkpoint == [(MARKER, False), (OBJECT, False), (MANIFEST, True)]
    assert max(pieces) == 1000
    assert len(pieces) == math.ceil(record.bytes / 1000)


def test_totals_count_every_tensor_once_by_kind(store: Store) -> None:
    record = save(store, 10)
    state = whole(Trainer(10).state())
    totals = totals_by_kind(record)
    assert list(totals) == ["ema", "model", "optim"]
    for kind, total in totals.items():
        tensors = [tensor for name, tensor in state.items() if name.startswith(kind + ".")]
        assert total.tensors == len(tensors)
        assert total.elements == sum(tensor.numel() for tensor in tensors)
        assert total.bytes == sum(tensor.nbytes for tensor in tensors)
    assert sum(total.bytes for total in totals.values()) == record.bytes


def test_the_tools_need_no_torch() -> None:
    code = "import sys, trainer.checkpoint.tools; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3]).returncode == 0
