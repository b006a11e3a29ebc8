"""When a checkpoint counts: stage, write and commit in the background, retention, the newest whole one, load.

    save     wait for the one before -> stage (training goes on) ~> mark -> write (each rank its object) -> commit -> retain
    newest   committed saves, newest first -> manifest parses? sizes right? checksums right? -> the first that passes
    load     names, shapes and types equal? -> DCP fills the live tensors, whatever engine and world size wrote them

A checkpoint exists when its manifest exists and its writer held the run (`claim`). Nothing is deleted before the new one is
committed, and of a checkpoint that is deleted the manifest goes first. At most one save is in flight: a store that is slower
than the cadence holds training up at the next save. What went wrong in the background is told by `poll`; a store that fails
is borne a configured number of times in a row, everything else ends the run at the next save.

`save`, `finish`, `newest` and `load` are collective: every rank of the process group calls them, all get the same answer or the
same kind of error, and an error on one rank ends the call on all. Without a process group there is one rank. The background
has a group of its own, since collectives of two threads on one group get mixed up.

Left to whom: the loop says when to save and what to do with an error; `logical` names the tensors.
"""

import datetime
import json
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from trainer.checkpoint.boxes import LoadPlanner, SavePlanner, State, boxes_of, take_share
from trainer.checkpoint.catalog import (
    FOLDER,
    MARKER,
    Save,
    choose_weights,
    find_saves,
    name_save,
    read_record,
    what_lacks,
    why_damaged,
)
from trainer.checkpoint.claim import Writer as RunWriter
from trainer.checkpoint.claim import claim_run
from trainer.checkpoint.logical import model_state
from trainer.checkpoint.ranks import Ranks
from trainer.checkpoint.record import MANIFEST, Record, dump_record
from trainer.checkpoint.staging import Stage
from trainer.checkpoint.storage import Reader, Writer
from trainer.config.training import CheckpointConfig, WarmParts, Weights
from trainer.errors import CheckpointError, ConfigError, OdonataError
from trainer.store.base import Store, StoreError, check_exclusive

log = logging.getLogger(__name__)

_NAMED = 5


@dataclass(frozen=True)
class SaveReport:
    """A save that is over: the checkpoint that it committed, or why there is none."""

    step: int
    record: Record | None
    error: OdonataError | None
    seconds: float
    """From the beginning to the commit."""
    stall_seconds: float
    """Of those, the time that training waited."""

    @property
    def bytes(self) -> int:
        """Size of the checkpoint."""
        return self.record.bytes if self.record else 0


class CheckpointManager:
    """The checkpoints of one run, under checkpoints/ in its store."""

    def __init__(self, store: Store, config: CheckpointConfig, *, timeout_s: float | None = None) -> None:
        """Collective. `timeout_s` is that of the collectives in the background."""
        self._store = store
        self._config = config
        self._ranks = Ranks()
        self._background = Ranks(_new_group(timeout_s)) if dist.is_initialized() else self._ranks
        self._stage = Stage()
        self._writer: RunWriter | None = None
        self._in_flight: _Background | None = None
        self._reports: list[SaveReport] = []
        self._failed_in_a_row = 0
        self._last_error: OdonataError | None = None
        self._last_seconds = 0.0
        self.last_committed_step = 0
        self._broken: set[str] = set()

    def claim(self, *, job: str | None) -> None:
        """Become the run's writer, or RefusedError. Collective; the first rank holds the claim for all."""

        def become_writer() -> None:
            check_exclusive(self._store)
            self._writer = claim_run(
                self._store,
                job=job,
                expiry_s=self._config.claim_expiry_s,
                find_committed=lambda: [save.prefix for save in find_saves(self._store)[0]],
            )

        self._ranks.on_main(become_writer)

    def prepare(self, state: State) -> None:
        """Allocate what staging `state` takes, so that the first save does not."""
        self._stage.reserve(take_share(state))

    def save(
        self,
        step: int,
        state: State,
        *,
        engine: str,
        progress: Mapping[str, int],
        before_commit: Callable[[], None] = lambda: None,
    ) -> None:
        """Copy `state` and begin to write it; training may go on. Collective.

        `before_commit` brings to the store what has to be there when the checkpoint counts; the first rank calls it, in the
        background. Waits for the save before. StoreError when too many in a row have failed, and whatever else the one before met.
        """
        started = time.perf_counter()
        self.finish()
        staged = self._stage.copy(take_share(state))
        stall = time.perf_counter() - started

        def write() -> SaveReport:
            try:
                record, error = self._write_and_commit(step, staged, engine, progress, before_commit), None
            except OdonataError as failure:
                record, error = None, failure
            return SaveReport(step, record, error, time.perf_counter() - started, stall)

        self._in_flight = _Background(write)

    def poll(self) -> list[SaveReport]:
        """Saves that have ended since the last call, on this rank; never waits."""
        if self._in_flight and self._in_flight.done():
            self._take(self._in_flight.result())
        reports, self._reports = self._reports, []
        return reports

    def fits_into(self, seconds: float) -> bool:
        """Whether a save would end in `seconds`, the least of all ranks, if it took as long as the last one. Collective.

        The one in flight is waited for first: until it has ended no other begins, and how long it takes is what counts.
        """
        if self._in_flight:
            asked = time.perf_counter()
            self._take(self._in_flight.result())
            seconds -= time.perf_counter() - asked
        return max(self._ranks.on_all(lambda: self._last_seconds - seconds)) <= 0

    @property
    def last_error(self) -> OdonataError | None:
        """Why the save that ended last has failed, if it has."""
        return self._last_error

    def finish(self) -> None:
        """Wait for the save in flight. Collective; StoreError when too many in a row have failed, and any other error at once."""
        if self._in_flight:
            self._take(self._in_flight.result())
        last = self._last_error
        if last and not isinstance(last, StoreError):
            raise last
        if last and self._failed_in_a_row >= self._config.max_failed_saves:
            raise StoreError(f"{self._failed_in_a_row} saves in a row have failed, the last one so: {last}") from last

    def close(self) -> None:
        """Let the save in flight end, whatever comes of it, and let the next writer in. Never raises: it also ends failed runs."""
        try:
            if self._in_flight:
                self._in_flight.result()
        except Exception as error:
            log.warning("the run ended before its last save did: %s", error)
        if self._writer:
            self._writer.give_up()

    def newest(self) -> Record | None:
        """The newest whole checkpoint; none where nothing was ever committed. Collective.

        Every byte of it has been read and compared, each rank a share of the objects. What is passed over is logged with
        the reason; CheckpointError where checkpoints are there and none of them is whole.
        """
        reasons: list[str] = []
        for save in self._ranks.on_main(lambda: find_saves(self._store)[0]):
            record = self._whole_record(save.prefix, reasons)
            if record is not None:
                return record
            self._broken.add(save.prefix)
        if reasons:
            raise CheckpointError(
                f"the newest whole checkpoint in {self._store.uri} was asked for and none of the {len(reasons)} there is whole: "
                f"{'; '.join(reasons[:_NAMED])}; restore one of them, or move {FOLDER}/ away to begin anew"
            )
        return None

    def load(self, record: Record, state: State) -> None:
        """Fill the live tensors of `state` from `record`, in place. Collective; each rank reads what it holds.

        CheckpointError names what differs in name, shape or type, and then nothing has been touched.
        """
        _load(self._store, record, state, self._ranks)

    def _take(self, report: SaveReport) -> None:
        self._in_flight = None
        self._failed_in_a_row = self._failed_in_a_row + 1 if report.error else 0
        self._last_error = report.error
        self._last_seconds = report.seconds
        if report.record:
            self.last_committed_step = report.step
        self._reports.append(report)

    def _write_and_commit(
        self, step: int, staged: State, engine: str, progress: Mapping[str, int], before_commit: Callable[[], None]
    ) -> Record:
        """All that happens in the background; an error leaves every checkpoint that was there as it was."""
        save = self._background.on_main(lambda: self._begin(step))
        try:
            written = self._write(save.prefix, staged)
            self._background.on_main(self._check_writer)  # a writer that was taken over leaves the record of its successor alone
            self._background.on_main(before_commit)
            record = self._commit(save, written, engine=engine, progress=progress)
        except OdonataError:
            self._discard(save.prefix)
            raise
        if self._background.is_main:
            self._retain(save)
        return record

    def _begin(self, step: int) -> Save:
        """Name the save and mark that it has begun."""
        save = name_save(step, writer=self._writer.incarnation if self._writer else 0, nonce=secrets.token_hex(4))
        self._store.put(save.prefix + MARKER, json.dumps({"step": step, "created": _now()}).encode())
        return save

    def _write(self, prefix: str, staged: State) -> Writer:
        """Bring this rank's boxes into the store; sizes and checksums of all ranks are gathered on the first."""
        writer = Writer(self._store, prefix, rank=self._background.rank)
        with _told_to_all(f"writing {self._store.uri}/{prefix}"):
            dcp_save(
                dict(staged),
                storage_writer=writer,
                planner=SavePlanner(),
                process_group=self._background.group,
                no_dist=self._background.alone,
            )
        return writer

    def _commit(self, save: Save, written: Writer, *, engine: str, progress: Mapping[str, int]) -> Record:
        """Put the manifest: from here on the checkpoint exists."""

        def put_manifest() -> Record:
            record = Record(
                step=save.step,
                writer=save.writer,
                engine=engine,
                world_size=self._background.world_size,
                created=_now(),
                progress=dict(progress),
                tensors=written.tensors,
                objects=written.objects,
                prefix=save.prefix,
            )
            _check_all_in(self._store, record)
            self._check_writer()
            self._store.put(save.prefix + MANIFEST, dump_record(record), exclusive=True)
            return record

        return self._background.on_main(put_manifest)

    def _check_writer(self) -> None:
        if self._writer:
            self._writer.check()

    def _discard(self, prefix: str) -> None:
        """Make room again after a save that failed; a later sweep gets what cannot be removed now."""
        if self._background.is_main:
            try:
                self._store.delete(prefix)
            except OdonataError as error:
                log.warning("could not remove the unfinished %s: %s", prefix, error)

    def _retain(self, newest: Save) -> None:
        """Remove what the configured retention does not keep, and what killed saves left. Only the first rank does."""
        try:
            for save in self._superseded(newest):
                self._store.delete(save.prefix + MANIFEST)
                self._store.delete(save.prefix)
                log.debug("removed %s", save.prefix)
        except OdonataError as error:
            log.warning("could not remove old checkpoints of %s: %s", self._store.uri, error)

    def _superseded(self, newest: Save) -> Iterator[Save]:
        """Saves that may go now that `newest` is committed.

        Checkpoints of later steps stay: they were passed over as broken, and go once the run has come past them. A writer
        that was taken over removes nothing of its successor's.
        """
        committed, others = find_saves(self._store)
        if newest not in committed:
            return
        yield from (save for save in others if save.writer <= newest.writer)
        yield from (save for save in committed if save.step == newest.step and save != newest)
        older = [save for save in committed if save.step < newest.step]
        yield from (save for save in older if save.prefix in self._broken)
        whole = [save for save in older if save.prefix not in self._broken]
        every = self._config.keep_every_steps
        yield from (save for save in whole[self._config.keep_last - 1 :] if not every or save.step % every)

    def _whole_record(self, prefix: str, reasons: list[str]) -> Record | None:
        """The record at `prefix` if all of it is as it was written; else one more reason, logged."""
        found = self._ranks.on_main(lambda: read_record(self._store, prefix))
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
    parts: WarmParts,
    weights: Weights = "model",
) -> Record:
    """Fill these parts of `model` from the newest checkpoint of the run, or the one checkpoint, in `store`.

    Collective, so that all ranks take the same one. Names and shapes must be the same on both sides, but for the task whose
    decoder CroCo's becomes; the bytes are compared with their checksums as they are read.
    """
    ranks = Ranks()
    record = ranks.on_main(lambda: find_one(store))
    choose_weights(store, record, weights)
    roots = _pair_roots(model, parts, weights)
    state = {name: boxes for name, boxes in model_state(model).items() if name.startswith(tuple(live for live, _ in roots))}
    stored = {
        live + name.removeprefix(root): tensor for live, root in roots for name, tensor in _only(record, root).tensors.items()
    }
    _load(store, replace(record, tensors=stored), state, ranks)
    return record


def _pair_roots(model: nn.Module, parts: WarmParts, weights: Weights) -> list[tuple[str, str]]:
    """What names of a part begin with, in this model and in a checkpoint; of two that fit a name the last one counts.

    Of CroCo's decoder the head stays behind: it answers with pixels, where a task wants tokens. Averages are kept of the encoder alone.
    """
    encoder = ("model.encoder.", f"{weights}.encoder.")
    if parts == "model":
        return [("model.", "model."), encoder]
    if parts == "encoder":
        return [encoder]
    decoders = {name.split(".decoder.")[0] for name, _ in model.named_parameters() if ".decoder." in name}
    kept = ("embed.", "mask_token", "blocks.", "norm.")
    return [encoder] + [
        (f"model.{live}.decoder.{part}", f"model.objectives.croco.decoder.{part}") for live in sorted(decoders) for part in kept
    ]


def find_one(store: Store) -> Record:
    """The newest checkpoint of the run, or the one checkpoint, in `store`; its sizes are right, its bytes were not read."""
    reasons: list[str] = []
    for prefix in [""] if store.list(MANIFEST) else [save.prefix for save in find_saves(store)[0]]:
        found = read_record(store, prefix)
        if isinstance(found, Record):
            return found
        reasons.append(f"{prefix}{': ' if prefix else ''}{found}")
        log.warning("passed over the checkpoint %s/%s: %s", store.uri, prefix, found)
    raise CheckpointError(
        f"a checkpoint was asked for in {store.uri}, which holds no whole one"
        f"{' (' + '; '.join(reasons[:_NAMED]) + ')' if reasons else ''}; give a run's folder, or one folder in its {FOLDER}/"
    )


def read_tensors(store: Store, record: Record, *, prefix: str = "") -> dict[str, Tensor]:
    """Whole tensors of `record` whose names begin with `prefix`, on the host. Not collective: this process reads them all."""
    wanted = _only(record, prefix)
    tensors = {name: torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype)) for name, tensor in wanted.tensors.items()}
    _load(store, wanted, {name: boxes_of(tensor) for name, tensor in tensors.items()}, Ranks(alone=True))
    return tensors


def save_weights(store: Store, weights: Mapping[str, Tensor], config: CheckpointConfig, *, step: int, engine: str) -> None:
    """A checkpoint of a model's weights alone, without an optimiser, as the one writer of the run in `store`. Not collective."""
    checkpoints = CheckpointManager(store, config)
    checkpoints.claim(job=None)
    try:
        state = {f"model.{name}": boxes_of(tensor) for name, tensor in weights.items()}
        checkpoints.save(step, state, engine=engine, progress={"step": step})
        checkpoints.finish()
        (saved,) = checkpoints.poll()
    finally:
        checkpoints.close()
    if saved.error:
        raise saved.error


def _only(record: Record, root: str) -> Record:
    """`record` with the tensors whose names begin with `root`."""
    return replace(record, tensors={name: tensor for name, tensor in record.tensors.items() if name.startswith(root)})


def _load(store: Store, record: Record, state: State, ranks: Ranks) -> None:
    place = f"{store.uri}/{record.prefix}"
    _check_fits(record, state, asked=place)
    with _told_to_all(f"reading {place}"):
        dcp_load(
            dict(state),
            storage_reader=Reader(store, record),
            planner=LoadPlanner(),
            process_group=ranks.group,
            no_dist=ranks.alone,
        )


def _check_all_in(store: Store, record: Record) -> None:
    """Before the commit: what every rank says it wrote is there for the first rank too."""
    lacking = what_lacks(store, record)
    if lacking:
        raise ConfigError(
            f"all ranks have written their part of {store.uri}/{record.prefix} and rank 0 finds that {lacking}; "
            "run.uri must be one place for all nodes, not a folder on each"
        )


def _check_fits(record: Record, state: State, *, asked: str) -> None:
    stored = {name: (tensor.shape, tensor.dtype) for name, tensor in record.tensors.items()}
    live = {name: (boxes.shape, str(boxes.dtype).removeprefix("torch.")) for name, boxes in state.items()}
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


def _new_group(timeout_s: float | None) -> dist.ProcessGroup:
    """A gloo group of all ranks; no group inherits the time-out of the world."""
    timeout = None if timeout_s is None else datetime.timedelta(seconds=timeout_s)
    group = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(group, dist.ProcessGroup)
    return group


class _Background:
    """A function in a thread that does not keep a dying process alive."""

    def __init__(self, function: Callable[[], SaveReport]) -> None:
        self._function = function
        self._future: Future[SaveReport] = Future()
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def done(self) -> bool:
        return self._future.done()

    def result(self) -> SaveReport:
        """Wait for what the function returned, or raised: a lost peer, say.

        The thread is waited for too: one that still holds objects of gloo when the interpreter ends aborts the process.
        """
        self._thread.join()
        return self._future.result()

    def _run(self) -> None:
        try:
            self._future.set_result(self._function())
        except BaseException as error:
            self._future.set_exception(error)


@contextmanager
def _told_to_all(doing: str) -> Iterator[None]:
    """DCP tells every rank what one of them met; here it becomes an error of ours again, with its class and so its exit code."""
    try:
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
