"""Which checkpoints a store holds: found by name, judged by their manifests and, where asked, by every byte.

    checkpoints/step-00000010-0003-5e2f91ac/      step 10, written by incarnation 3, and a nonce: no two saves share a prefix
        started.json                              put first, so that what a killed save left can be seen and swept
        rank-00000.bin ...                        raw tensor bytes
        manifest.json                             put last: with it the checkpoint exists

A manifest counts when its writer held the run (`claim`): the newest claim says which checkpoints it found when it took over,
and what an older writer commits after that does not exist.

Left to whom: reading one as tensors is `storage`'s, keeping or deleting them `manager`'s.
"""

import re
from dataclasses import dataclass

from trainer.checkpoint.claim import Claim, read_claims
from trainer.checkpoint.record import MANIFEST, Record, parse_record
from trainer.config.training import Weights
from trainer.errors import CheckpointError
from trainer.store.base import Checksum, ObjectMissingError, Store

FOLDER = "checkpoints"
MARKER = "started.json"
_SAVE_PREFIX = re.compile(rf"{FOLDER}/step-(\d+)-(\d+)-[0-9a-f]+/")
_READ_BYTES = 64 * 2**20


@dataclass(frozen=True, order=True)
class Save:
    """A prefix under which a save has begun; ordered by step."""

    step: int
    writer: int
    prefix: str

    @property
    def origin(self) -> tuple[int, str]:
        """Step and nonce, which a copy in another run shares with what it was copied from, and no other save does."""
        return self.step, self.prefix.rstrip("/").rpartition("-")[2]


def name_save(step: int, *, writer: int, nonce: str) -> Save:
    """The prefix of a new save."""
    return Save(step, writer, f"{FOLDER}/step-{step:08d}-{writer:04d}-{nonce}/")


def save_at(prefix: str) -> Save:
    """The save whose prefix is `prefix`."""
    match = _SAVE_PREFIX.fullmatch(prefix)
    assert match, f"{prefix} is no prefix of a save"
    return Save(int(match[1]), int(match[2]), prefix)


def find_saves(store: Store) -> tuple[list[Save], list[Save]]:
    """Saves that are committed by a writer that held the run, and all others; the newest step first."""
    keys = {info.key for info in store.list(FOLDER)}
    prefixes = {match[0] for key in keys if (match := _SAVE_PREFIX.match(key)) and match[0] != key}
    saves = sorted(map(save_at, prefixes), reverse=True)
    claims = read_claims(store)
    committed = [save for save in saves if save.prefix + MANIFEST in keys and _counts(save, claims)]
    return committed, [save for save in saves if save not in committed]


def read_record(store: Store, prefix: str) -> Record | str:
    """The record at `prefix`, or why there is none that could be whole; objects are looked at, not read."""
    try:
        record = parse_record(store.get(prefix + MANIFEST), prefix=prefix)
    except (CheckpointError, ObjectMissingError) as error:
        return str(error)
    return what_lacks(store, record) or record


def what_lacks(store: Store, record: Record) -> str | None:
    """The first object of `record` that is not there or has another size; none is read."""
    sizes = {info.key.removeprefix(record.prefix): info.bytes for info in store.list(record.prefix)}
    for key, stored in sorted(record.objects.items()):
        if key not in sizes:
            return f"{key} is missing"
        if sizes[key] != stored.bytes:
            return f"{key} has {sizes[key]} bytes and was written with {stored.bytes}"
    return None


def why_damaged(store: Store, record: Record, keys: list[str]) -> str | None:
    """Read the objects `keys` of `record` and say what is wrong with the first that is not as it was written."""
    for key in keys:
        stored, checksum = record.objects[key], Checksum()
        for start in range(0, stored.bytes, _READ_BYTES):
            checksum.update(store.get(record.prefix + key, start, min(_READ_BYTES, stored.bytes - start)))
        if str(checksum) != stored.checksum:
            return f"{key} has the checksum {checksum} and was written with {stored.checksum}"
    return None


def _counts(save: Save, claims: list[Claim]) -> bool:
    """Whether what `save` committed counts, by the newest claim that has said what it found."""
    judge = next((claim for claim in claims if claim.adopted is not None), None)
    return judge is None or judge.adopted is None or save.writer >= judge.incarnation or save.prefix in judge.adopted


def choose_weights(store: Store, record: Record, asked: Weights | None) -> Weights:
    """Which weights of the encoder in `record` are taken: those that are `asked`, else their moving average if there is one.

    CheckpointError where it has no such.
    """
    kinds: tuple[Weights, ...] = ("ema", "model")
    there = [kind for kind in kinds if any(name.startswith(f"{kind}.encoder.") for name in record.tensors)]
    if asked in there or (asked is None and there):
        return asked or there[0]
    raise CheckpointError(
        f"weights {asked or 'of an encoder'} were asked of {store.uri}/{record.prefix}, which holds "
        f"{' and '.join(there) or 'no encoder at all'}; "
        f"{f'ask for weights {there[0]}' if there else 'give the checkpoint of a pre-training run'}"
    )
