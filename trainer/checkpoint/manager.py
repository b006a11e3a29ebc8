"""When a checkpoint counts: save and commit, retention, the newest whole one, load.

    save     agree on a prefix -> stage -> write (each rank its object) -> commit (rank 0 puts the manifest) -> retain
    newest   committed prefixes, newest first -> manifest parses? sizes right? checksums right? -> the first that passes
    load     names, shapes and types equal? -> DCP fills the live tensors, whatever engine and world size wrote them

A checkpoint exists when its manifest exists. Every save has a prefix of its own with a nonce in it, which begins with a small
marker so that what a killed save left can be seen and swept by the next one. Nothing is deleted before the new one is
committed, and of a checkpoint that is deleted the manifest goes first.

`save`, `newest`, `load` and `load_into_model` are collective: every rank of the process group calls them, all get the same
answer or the same kind of error, and an error on one rank ends the call on all. Without a process group there is one rank.

Left to whom: the loop says when to save and what to do with an error; `logical` names the tensors.
"""

import datetime
import json
import logging
import re
import secrets
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from trainer.checkpoint.logical import model_state
from trainer.checkpoint.ranks import Ranks
from trainer.checkpoint.record import MANIFEST, Record, dump_record, parse_record
from trainer.checkpoint.storage import Reader, Writer, load_planner, save_planner, why_damaged
from trainer.config.training import CheckpointConfig
from trainer.errors import CheckpointError, ConfigError, OdonataError
from trainer.store.base import ObjectMissingError, Store, StoreError

log = logging.getLogger(__name__)

_FOLDER = "checkpoints"
_MARKER = "started.json"
_PREFIX = re.compile(rf"({_FOLDER}/step-(\d+)-[0-9a-f]+/)(.+)")
_NAMED = 5


@dataclass(frozen=True)
class SaveReport:
    """A committed checkpoint and what it took."""

    record: Record
    seconds: float
    bytes: int

    @property
    def step(self) -> int:
        """The step whose state it holds."""
        return self.record.step


class CheckpointManager:
    """The checkpoints of one run, under checkpoints/ in its store."""

    def __init__(self, store: Store, config: CheckpointConfig, *, process_group: dist.ProcessGroup | None = None) -> None:
        self._store = store
        self._config = config
        self._ranks = Ranks(process_group)
        self._broken: set[str] = set()

    def save(self, step: int, state: Mapping[str, Tensor], *, engine: str, progress: Mapping[str, int]) -> SaveReport:
        """Write `state` and commit it, then let old checkpoints go. Collective.

        An error leaves the state, and every checkpoint that was there, as they were.
        """
        started = time.perf_counter()
        prefix = self._ranks.on_main(lambda: self._begin(step))
        try:
            writer = self._write(prefix, self._stage(state))
            record = self._commit(prefix, writer, step=step, engine=engine, progress=progress)
        except OdonataError:
            self._discard(prefix)
            raise
        if self._ranks.is_main:
            self._retain(record)
        return SaveReport(record, time.perf_counter() - started, record.bytes)

    def newest(self) -> Record | None:
        """The newest whole checkpoint; none where nothing was ever committed. Collective.

        Every byte of it has been read and compared, each rank a share of the objects. What is passed over is logged with
        the reason; CheckpointError where checkpoints are there and none of them is whole.
        """
        reasons: list[str] = []
        for prefix in self._ranks.on_main(lambda: _find_saves(self._store)[0]):
            record = self._whole_record(prefix, reasons)
            if record is not None:
                return record
            self._broken.add(prefix)
        if reasons:
            raise CheckpointError(
                f"the newest whole checkpoint in {self._store.uri} was asked for and none of the {len(reasons)} there is whole: "
                f"{'; '.join(reasons[:_NAMED])}; restore one of them, or move {_FOLDER}/ away to begin anew"
            )
        return None

    def load(self, record: Record, state: Mapping[str, Tensor]) -> None:
        """Fill the live tensors of `state` from `record`, in place. Collective; each rank reads what it holds.

        CheckpointError names what differs in name, shape or type, and then nothing has been touched.
        """
        _load(self._store, record, state, self._ranks)

    def _begin(self, step: int) -> str:
        """Name the save and mark that it has begun."""
        prefix = f"{_FOLDER}/step-{step:08d}-{secrets.token_hex(4)}/"
        self._store.put(prefix + _MARKER, json.dumps({"step": step, "created": _now()}).encode())
        return prefix

    def _stage(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors to write: the live ones, since training waits; an asynchronous save (issue 3) copies them here."""
        return dict(state)

    def _write(self, prefix: str, staged: dict[str, Tensor]) -> Writer:
        """Bring this rank's boxes into the store; sizes and checksums of all ranks are gathered on the first."""
        writer = Writer(self._store, prefix, rank=self._ranks.rank)
        with _told_to_all(f"writing {self._store.uri}/{prefix}", self._ranks):
            dcp_save(
                staged,
                storage_writer=writer,
                planner=save_planner(),
                process_group=self._ranks.group,
                no_dist=self._ranks.alone,
            )
        return writer

    def _commit(self, prefix: str, writer: Writer, *, step: int, engine: str, progress: Mapping[str, int]) -> Record:
        """Put the manifest: from here on the checkpoint exists."""

        def put_manifest() -> Record:
            record = Record(
                step=step,
                engine=engine,
                world_size=self._ranks.world_size,
                created=_now(),
                progress=dict(progress),
                tensors=writer.tensors,
                objects=writer.objects,
                prefix=prefix,
            )
            _check_all_in(self._store, record)
            self._store.put(prefix + MANIFEST, dump_record(record), exclusive=True)
            return record

        return self._ranks.on_main(put_manifest)

    def _discard(self, prefix: str) -> None:
        """Make room again after a save that failed; a later sweep gets what cannot be removed now."""
        if self._ranks.is_main:
            try:
                self._store.delete(prefix)
            except OdonataError as error:
                log.warning("could not remove the unfinished %s: %s", prefix, error)

    def _retain(self, record: Record) -> None:
        """Remove what the configured retention does not keep, and what killed saves left. Only the first rank does."""
        try:
            for prefix in self._superseded(record):
                self._store.delete(prefix + MANIFEST)
                self._store.delete(prefix)
                log.debug("removed %s", prefix)
        except OdonataError as error:
            log.warning("could not remove old checkpoints of %s: %s", self._store.uri, error)

    def _superseded(self, record: Record) -> Iterator[str]:
        """Prefixes that may go now that `record` is committed.

        Checkpoints of later steps stay: they were passed over as broken, and go once the run has come past them.
        """
        committed, unfinished = _find_saves(self._store)
        yield from unfinished
        yield from (prefix for prefix in committed if _step(prefix) == record.step and prefix != record.prefix)
        older = [prefix for prefix in committed if _step(prefix) < record.step]
        yield from (prefix for prefix in older if prefix in self._broken)
        whole = [prefix for prefix in older if prefix not in self._broken]
        every = self._config.keep_every_steps
        yield from (prefix for prefix in whole[self._config.keep_last - 1 :] if not every or _step(prefix) % every)

    def _whole_record(self, prefix: str, reasons: list[str]) -> Record | None:
        """The record at `prefix` if all of it is as it was written; else one more reason, logged."""
        found = self._ranks.on_main(lambda: _read_record(self._store, prefix))
        if isinstance(found, Record):
            record = found
            keys = sorted(record.objects)[self._ranks.rank :: self._ranks.world_size]
            damage = self._ranks.on_all(lambda: why_damaged(self._store, record, keys))
            found = next((reason for reason in damage if reason), record)
        if isinstance(found, Record):
            return found
        reasons.append(f"{prefix}: {found}")
        if self._ranks.is_main:
            log.warning("passed over the checkpoint %s: %s", prefix, found)
        return None


def load_into_model(
    store: Store,
    model: nn.Module,
    *,
    parts: Literal["encoder", "model"],
    process_group: dist.ProcessGroup | None = None,
) -> Record:
    """Fill `model`, or only what is under encoder. in it, from the newest checkpoint of the run, or the one checkpoint, in `store`.

    Collective, so that all ranks take the same one. Names and shapes must be the same on both sides; the bytes are
    compared with their checksums as they are read.
    """
    ranks = Ranks(process_group)
    record = ranks.on_main(lambda: _find_to_warm_start(store))
    root = "model." if parts == "model" else "model.encoder."
    state = {name: tensor for name, tensor in model_state(model).items() if name.startswith(root)}
    tensors = {name: tensor for name, tensor in record.tensors.items() if name.startswith(root)}
    _load(store, replace(record, tensors=tensors), state, ranks)
    return record


def read_tensors(store: Store, record: Record, *, prefix: str = "") -> dict[str, Tensor]:
    """Whole tensors of `record` whose names begin with `prefix`, on the host. Not collective: this process reads them all."""
    tensors = {name: tensor for name, tensor in record.tensors.items() if name.startswith(prefix)}
    state = {name: torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype)) for name, tensor in tensors.items()}
    _load(store, replace(record, tensors=tensors), state, Ranks(alone=True))
    return state


def _load(store: Store, record: Record, state: Mapping[str, Tensor], ranks: Ranks) -> None:
    place = f"{store.uri}/{record.prefix}"
    _check_fits(record, state, asked=place)
    with _told_to_all(f"reading {place}", ranks):
        dcp_load(
            dict(state),
            storage_reader=Reader(store, record),
            planner=load_planner(),
            process_group=ranks.group,
            no_dist=ranks.alone,
        )


def _find_to_warm_start(store: Store) -> Record:
    reasons: list[str] = []
    for prefix in [""] if store.list(MANIFEST) else _find_saves(store)[0]:
        found = _read_record(store, prefix)
        if isinstance(found, Record):
            return found
        reasons.append(f"{prefix}{': ' if prefix else ''}{found}")
        log.warning("passed over the checkpoint %s/%s: %s", store.uri, prefix, found)
    raise CheckpointError(
        f"weights to start from were asked for in {store.uri}, which holds no whole checkpoint"
        f"{' (' + '; '.join(reasons[:_NAMED]) + ')' if reasons else ''}; give a run's folder, or one folder in its {_FOLDER}/"
    )


def _read_record(store: Store, prefix: str) -> Record | str:
    """The record at `prefix`, or why there is none that could be whole; objects are looked at, not read."""
    try:
        record = parse_record(store.get(prefix + MANIFEST), prefix=prefix)
    except (CheckpointError, ObjectMissingError) as error:
        return str(error)
    return _what_lacks(store, record) or record


def _what_lacks(store: Store, record: Record) -> str | None:
    """The first object of `record` that is not there or has another size; none is read."""
    sizes = {info.key.removeprefix(record.prefix): info.bytes for info in store.list(record.prefix)}
    for key, stored in sorted(record.objects.items()):
        if key not in sizes:
            return f"{key} is missing"
        if sizes[key] != stored.bytes:
            return f"{key} has {sizes[key]} bytes and was written with {stored.bytes}"
    return None


def _check_all_in(store: Store, record: Record) -> None:
    """Before the commit: what every rank says it wrote is there for the first rank too."""
    lacking = _what_lacks(store, record)
    if lacking:
        raise ConfigError(
            f"all ranks have written their part of {store.uri}/{record.prefix} and rank 0 finds that {lacking}; "
            "run.uri must be one place for all nodes, not a folder on each"
        )


def _find_saves(store: Store) -> tuple[list[str], list[str]]:
    """Prefixes that have a manifest, and those under which a save has begun and has none; newest step first."""
    keys = {info.key for info in store.list(_FOLDER)}
    prefixes = {match[1] for key in keys if (match := _PREFIX.fullmatch(key))}
    newest_first = sorted(prefixes, key=lambda prefix: (_step(prefix), prefix), reverse=True)
    committed = [prefix for prefix in newest_first if prefix + MANIFEST in keys]
    return committed, [prefix for prefix in newest_first if prefix not in committed]


def _step(prefix: str) -> int:
    match = _PREFIX.fullmatch(prefix + MANIFEST)
    assert match is not None
    return int(match[2])


def _check_fits(record: Record, state: Mapping[str, Tensor], *, asked: str) -> None:
    stored = {name: (tensor.shape, tensor.dtype) for name, tensor in record.tensors.items()}
    live = {name: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for name, tensor in state.items()}
    common = sorted(stored.keys() & live.keys())
    differing = [
        _list_up("only in the checkpoint", sorted(stored.keys() - live.keys())),
        _list_up("only in this run", sorted(live.keys() - stored.keys())),
        _list_up(
            "different in shape or type",
            [f"{name} (stored {_say(stored[name])}, here {_say(live[name])})" for name in common if stored[name] != live[name]],
        ),
    ]
    if any(differing):
        raise CheckpointError(
            f"{asked} was to be loaded and does not fit this model: {'; '.join(text for text in differing if text)}; "
            "use the config that it was written with"
        )


def _list_up(heading: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{heading}: {', '.join(names[:_NAMED])}{more}"


def _say(tensor: tuple[tuple[int, ...], str]) -> str:
    return f"{' x '.join(str(size) for size in tensor[0]) or 'scalar'} {tensor[1]}"


@contextmanager
def _told_to_all(doing: str, ranks: Ranks) -> Iterator[None]:
    """DCP tells every rank what one of them met; here it becomes an error of ours again, with its class and so its exit code."""
    try:
        with warnings.catch_warnings():
            if ranks.alone:
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as failure:
        _raise_cause(doing, failure)


def _raise_cause(doing: str, failure: CheckpointException) -> NoReturn:
    rank, (cause, _) = min(failure.failures.items())
    sentence = f"{doing} failed on rank {rank}: {cause}"
    if isinstance(cause, StoreError):
        raise StoreError(sentence) from cause
    if isinstance(cause, OdonataError):
        raise type(cause)(sentence) from cause
    raise OdonataError(f"{doing} failed on rank {rank}: {type(cause).__name__}: {cause}") from cause


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
