"""Look at the checkpoints of a run, check them and copy them, beside the run and without its model: `odonata checkpoints`.

    list      every save, newest first: whole by its sizes, or damaged, unfinished or void, and why
    verify    the same after every byte was read and compared with its checksum
    copy      claim the other run -> marker -> objects in pieces, checksums compared -> manifest, exclusively

A copy goes in as a writer of the other run would put it there, under a prefix of its own with the number of its claim: a run
counts what its newest claim has adopted or written (`claim`), so a manifest that was merely put beside its own might not exist
for it, and a run that saves meanwhile would sweep the pieces. Where a writer is alive, another copy included, the copy is refused
as a second writer is.

Left to whom: what the tensors mean is `logical`'s, exporting weights `trainer.export`'s; nothing here imports torch.
"""

import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from trainer.checkpoint.catalog import FOLDER, MARKER, Save, find_saves, name_save, read_record, save_at, why_damaged
from trainer.checkpoint.claim import Writer, claim_run
from trainer.checkpoint.record import DTYPE_BYTES, MANIFEST, Record, StoredTensor, dump_record
from trainer.config.load import parse_run_config
from trainer.config.run import RunConfig
from trainer.config.store import StoreConfig
from trainer.config.training import CheckpointConfig
from trainer.errors import CheckpointError, ConfigError, OdonataError
from trainer.store.base import ObjectInfo, ObjectMissingError, Store, check_exclusive
from trainer.store.open import open_store

log = logging.getLogger(__name__)

CONFIG = "config.yaml"
"""What the run leaves beside its checkpoints of its config (trainer.observe.record)."""
_IN_A_RUN = re.compile(rf"(.*)/({FOLDER}/step-\d+-\d+-[0-9a-f]+)/*")
_PIECE_BYTES = 16 * 2**20

Progress = Callable[[int], object]
"""Told of bytes as they are read."""


@dataclass(frozen=True)
class Place:
    """What a URI names: a run, or the one checkpoint at `prefix` in it."""

    store: Store
    prefix: str = ""

    @property
    def uri(self) -> str:
        return f"{self.store.uri}/{self.prefix}".rstrip("/")

    @property
    def run_name(self) -> str:
        """The last part of where the run lies."""
        return self.store.uri.rstrip("/").rpartition("/")[2]


@dataclass(frozen=True)
class Checkpoint:
    """A save and what is left of it."""

    save: Save
    state: Literal["whole", "damaged", "unfinished", "void"]
    """void: whole or not, it does not count, since its writer had lost the run."""
    reason: str
    """Why it is not whole; empty where it is."""
    record: Record | None
    """Of a whole one."""
    created: str | None
    """When it was committed, or begun where it never was; UTC, ISO 8601."""
    bytes: int
    """What lies in the store now."""


@dataclass(frozen=True)
class Total:
    """What the tensors of one kind come to."""

    tensors: int
    elements: int
    bytes: int


def open_place(uri: str, config: StoreConfig | None = None) -> Place:
    """The run, or the one checkpoint in a run, at `uri`: a folder or s3://bucket/prefix, reached as `config` says; nothing is asked."""
    text = uri if ":/" in uri else str(Path(uri).absolute())
    inside = _IN_A_RUN.fullmatch(text)
    return Place(open_store(inside[1] or "/", config), f"{inside[2]}/") if inside else Place(open_store(text, config))


def list_checkpoints(place: Place, step: int | None = None) -> Iterator[Checkpoint]:
    """Every save at `place`, or only those of `step`, the newest first; manifests are read and sizes compared, bytes are not.

    CheckpointError where there is no run.
    """
    committed, others = find_saves(place.store)
    saves = sorted([*committed, *others], reverse=True)
    if not saves and not place.store.list(CONFIG):
        raise CheckpointError(
            f"checkpoints of {place.uri} were asked for and there is no run: neither {FOLDER}/ nor {CONFIG}; "
            f"give a run's folder or s3://bucket/prefix, or one folder in its {FOLDER}/"
        )
    if place.prefix not in ("", *(save.prefix for save in saves)):
        raise CheckpointError(
            f"the checkpoint {place.uri} was asked for and nothing lies there; "
            f"`odonata checkpoints list {place.store.uri}` says what is there"
        )
    for save in saves:
        if save.prefix.startswith(place.prefix) and step in (None, save.step):
            yield _look_at(place.store, save, counts=save in committed)


def choose_checkpoint(place: Place, step: int | None = None) -> Record:
    """The newest checkpoint at `place`, or the one of `step`, that is whole by its sizes; damaged ones are passed over, and logged."""
    passed = []
    for checkpoint in list_checkpoints(place, step):
        if checkpoint.record:
            return checkpoint.record
        passed.append(checkpoint)
        if checkpoint.state == "damaged":
            log.warning("passed over the checkpoint %s: %s", checkpoint.save.prefix, checkpoint.reason)
    raise CheckpointError(_none_whole(place, "" if step is None else f" of step {step}", passed))


def verify_checkpoint(store: Store, checkpoint: Checkpoint, progress: Progress) -> Checkpoint:
    """`checkpoint` as it turns out when every byte of it is read; one that is not whole stays as it is."""
    record = checkpoint.record
    if record is None:
        return checkpoint
    try:
        damage = why_damaged(WatchedStore(store, progress), record, sorted(record.objects))
    except ObjectMissingError as error:  # a run that goes on has removed it meanwhile, or somebody else a part of it
        now = _look_at(store, checkpoint.save, counts=True)
        return now if now.reason else _damaged(checkpoint, str(error))
    return _damaged(checkpoint, damage) if damage else checkpoint


def raise_if_damaged(place: Place, verified: Iterable[Checkpoint]) -> None:
    """CheckpointError that names the damaged ones, or says why none is whole."""
    checkpoints = list(verified)
    damaged = [checkpoint for checkpoint in checkpoints if checkpoint.state == "damaged"]
    if damaged:
        raise CheckpointError(
            f"{place.uri} was verified and {len(damaged)} of {len(checkpoints)} checkpoints are damaged{_reasons(damaged)}; "
            "a resume passes over them: copy a whole one back with `odonata checkpoints copy` once the damaged folder is gone"
        )
    if not any(checkpoint.state == "whole" for checkpoint in checkpoints):
        raise CheckpointError(_none_whole(place, "", checkpoints))


def copy_checkpoint(source: Store, record: Record, target: Store, progress: Progress) -> str:
    """Bring the checkpoint `record` of `source` into the run at `target`; the answer says where it lies.

    CheckpointError where it is there already or its bytes are not as they were written, RefusedError where another process
    writes to that run, or has not been silent for as long as the config there asks; nothing is left of a copy that fails. Where
    `target` has no config it gets that of `source`, so that the copy can be exported.
    """
    _refuse_a_second_copy(source, record, target)
    theirs = read_run_config(target)
    check_exclusive(target)
    claim = claim_run(
        target,
        job=None,
        expiry_s=(theirs.checkpoint if theirs else CheckpointConfig()).claim_expiry_s,
        find_committed=lambda: [save.prefix for save in find_saves(target)[0]],
    )
    try:
        _refuse_a_second_copy(source, record, target)  # one may have been made since
        return _copy_as(claim, source, record, target, progress)
    finally:
        claim.give_up()


def holds_run(store: Store) -> bool:
    """Whether a run lies in `store`: its config, or anything of a checkpoint."""
    return bool(store.list(CONFIG) or store.list(FOLDER))


def read_run_config(store: Store) -> RunConfig | None:
    """The config of the last start of the run in `store`; none where there is none, ConfigError where it cannot be read."""
    if not store.list(CONFIG):
        return None
    origin = f"{store.uri}/{CONFIG}"
    try:
        content = yaml.safe_load(store.get(CONFIG))
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin} was to be read and is not YAML: {error}; put the one of its run there") from error
    return parse_run_config(content, origin=origin)


def totals_by_kind(record: Record) -> dict[str, Total]:
    """Model, optim and ema, as far as they are there: what the tensors under these names come to."""
    kinds: dict[str, list[StoredTensor]] = {}
    for name, tensor in record.tensors.items():
        kinds.setdefault(name.partition(".")[0], []).append(tensor)
    return {
        kind: Total(len(tensors), sum(math.prod(tensor.shape) for tensor in tensors), sum(map(tensor_bytes, tensors)))
        for kind, tensors in sorted(kinds.items())
    }


def tensor_bytes(tensor: StoredTensor) -> int:
    """Size of the whole tensor."""
    return math.prod(tensor.shape) * DTYPE_BYTES[tensor.dtype]


def describe_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """A line of the list as plain data."""
    record = checkpoint.record
    return {
        "prefix": checkpoint.save.prefix,
        "step": checkpoint.save.step,
        "writer": checkpoint.save.writer,
        "created": checkpoint.created,
        "bytes": checkpoint.bytes,
        "engine": record and record.engine,
        "world_size": record and record.world_size,
        "state": checkpoint.state,
        "reason": checkpoint.reason,
    }


def describe_record(record: Record) -> dict[str, Any]:
    """A record as plain data, without saying where in the objects its tensors lie."""
    head = ("prefix", "step", "writer", "created", "engine", "world_size", "progress", "bytes")
    return {
        **{name: getattr(record, name) for name in head},
        "totals": {kind: asdict(total) for kind, total in totals_by_kind(record).items()},
        "objects": {key: asdict(stored) for key, stored in sorted(record.objects.items())},
        "tensors": {
            name: {"shape": tensor.shape, "dtype": tensor.dtype, "bytes": tensor_bytes(tensor)}
            for name, tensor in sorted(record.tensors.items())
        },
    }


class WatchedStore:
    """A store that tells `progress` of all that is read from it."""

    def __init__(self, store: Store, progress: Progress) -> None:
        self.uri = store.uri
        self._store = store
        self._progress = progress

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        """See Store."""
        data = self._store.get(key, offset, length)
        self._progress(len(data))
        return data

    def read_into(self, key: str, offset: int, places: Sequence[memoryview]) -> None:
        """See Store."""
        self._store.read_into(key, offset, places)
        self._progress(sum(place.nbytes for place in places))

    def put(self, key: str, payload: bytes | Iterable[memoryview], *, exclusive: bool = False) -> ObjectInfo:
        """See Store."""
        return self._store.put(key, payload, exclusive=exclusive)

    def list(self, prefix: str) -> list[ObjectInfo]:
        """See Store."""
        return self._store.list(prefix)

    def delete(self, prefix: str) -> None:
        """See Store."""
        self._store.delete(prefix)


def _look_at(store: Store, save: Save, *, counts: bool) -> Checkpoint:
    """What `save` is by its names and sizes; `counts` says whether its writer held the run."""
    sizes = {info.key: info.bytes for info in store.list(save.prefix)}
    looked = Checkpoint(save, "unfinished", "", None, _begun(store, save.prefix), sum(sizes.values()))
    if save.prefix + MANIFEST not in sizes:
        return replace(looked, reason=f"it has no {MANIFEST}: its save, or its removal, goes on or was killed")
    if not counts:
        reason = f"its writer, incarnation {save.writer}, had been taken over when it committed"
        return replace(looked, state="void", reason=reason)
    found = read_record(store, save.prefix)
    if isinstance(found, Record):
        return replace(looked, state="whole", record=found, created=found.created)
    return _damaged(looked, found)


def _damaged(checkpoint: Checkpoint, reason: str) -> Checkpoint:
    return replace(checkpoint, state="damaged", reason=reason, record=None)


def _begun(store: Store, prefix: str) -> str | None:
    """When the save at `prefix` began, by its marker."""
    try:
        return str(json.loads(store.get(prefix + MARKER))["created"])
    except (ObjectMissingError, ValueError, LookupError, TypeError):
        return None


def _refuse_a_second_copy(source: Store, record: Record, target: Store) -> None:
    origin = save_at(record.prefix).origin
    for save in find_saves(target)[0]:
        if save.origin == origin:
            raise CheckpointError(
                f"{source.uri}/{record.prefix} was to be copied to {target.uri}/{save.prefix}, where a checkpoint is already; "
                "nothing is written over: give another run, or remove that one first"
            )


def _copy_as(writer: Writer, source: Store, record: Record, target: Store, progress: Progress) -> str:
    """Write the copy as `writer`, under a prefix that no other save has."""
    step, nonce = save_at(record.prefix).origin
    prefix = name_save(step, writer=writer.incarnation, nonce=nonce).prefix
    watched, marker = WatchedStore(source, progress), {"step": step, "created": record.created}
    try:
        target.put(prefix + MARKER, json.dumps(marker).encode())
        for key in sorted(record.objects):
            _copy_object(watched, record, key, target, prefix)
        _copy_config(source, target)
        writer.check()
        target.put(prefix + MANIFEST, dump_record(replace(record, writer=writer.incarnation)), exclusive=True)
    except OdonataError:
        target.delete(prefix)
        raise
    return f"{target.uri}/{prefix}"


def _copy_object(source: Store, record: Record, key: str, target: Store, prefix: str) -> None:
    stored = record.objects[key]
    put = target.put(prefix + key, _pieces(source, record.prefix + key, stored.bytes))
    if put.checksum != stored.checksum:
        raise CheckpointError(
            f"{source.uri}/{record.prefix} was to be copied and its {key} is damaged: it has the checksum {put.checksum} "
            f"and was written with {stored.checksum}; nothing is left of the copy, take another step"
        )


def _pieces(store: Store, key: str, size: int) -> Iterator[memoryview]:
    for start in range(0, size, _PIECE_BYTES):
        yield memoryview(store.get(key, start, min(_PIECE_BYTES, size - start)))


def _copy_config(source: Store, target: Store) -> None:
    if source.list(CONFIG) and not target.list(CONFIG):
        target.put(CONFIG, source.get(CONFIG))


def _none_whole(place: Place, of_step: str, found: Sequence[Checkpoint]) -> str:
    return (
        f"a checkpoint{of_step} was asked for in {place.uri}, which holds no whole one{of_step}{_reasons(found)}; "
        f"`odonata checkpoints list {place.store.uri}` says what is there"
    )


def _reasons(found: Sequence[Checkpoint]) -> str:
    named = "; ".join(f"{checkpoint.save.prefix}: {checkpoint.reason}" for checkpoint in found)
    return f" ({named})" if named else ""
