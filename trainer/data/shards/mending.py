"""Mending: damaged shards of a packed data set, written once more from the recording that they were packed from.

Packing is a pure function of the drives and their order, so what is packed again has the checksum that the version lists, or the
recording is another one by now: then nothing is written. Which drives a shard holds stand in the tables of its pack; a table that
is damaged itself has to be brought back from elsewhere.
"""

from collections.abc import Container, Sequence
from dataclasses import replace

from trainer.data.shards.layout import Pack, StoredObject, Version
from trainer.data.shards.packing import write_members
from trainer.data.shards.recording import Recording
from trainer.data.shards.tables import read_batches, read_table
from trainer.data.shards.verifying import Damage
from trainer.store.base import Checksum, Store


def mend(recording: Recording, store: Store, version: Version, damaged: Sequence[Damage]) -> list[Damage]:
    """Write the damaged shards of `version` anew; what could not be mended, and why. DataError where a file cannot be read."""
    broken = {damage.key: damage for damage in damaged}
    found = [
        (broken[stored.key], _mend(recording, store, pack, stored, broken.keys()))
        for pack in version.packs
        for stored in (*pack.tables.values(), *pack.shards)
        if stored.key in broken
    ]
    return [replace(damage, reason=f"{damage.reason}, and {reason}") for damage, reason in found if reason]


def _mend(recording: Recording, store: Store, pack: Pack, shard: StoredObject, broken: Container[str]) -> str | None:
    """Why the object stays as it is, or nothing where it is whole again."""
    tables = [table.key for table in pack.tables.values() if table.key in broken]
    if tables:
        return f"tables of its pack are damaged, which cannot be mended: {', '.join(tables)}"
    drives = find_drives(store, pack, shard)
    different = _find_different(recording, store, pack, drives)
    if different:
        return f"{recording.name} does not have its drive {different}, or another one of that name"
    described = [recording.read_drive(drive) for drive in drives]
    kind = shard.key.rsplit(".", 2)[1]
    checksum = Checksum()
    for piece in write_members(recording, described, shard.key, kind, {}):
        checksum.update(piece)
    if (str(checksum), checksum.bytes) != (shard.checksum, shard.bytes):
        return f"{recording.name} has other files by now: packed again it would be another shard"
    store.put(shard.key, write_members(recording, described, shard.key, kind, {}))
    return None


def find_drives(store: Store, pack: Pack, shard: StoredObject) -> list[str]:
    """Names of the drives that have files in `shard`, in their order there."""
    drives: dict[str, None] = {}
    for table in ("images", "sweeps"):
        for batch in read_batches(store, pack.tables[table], ["drive", "shard"]):
            shards = batch.column("shard").to_pylist()
            drives |= dict.fromkeys(
                drive for drive, of_row in zip(batch.column("drive").to_pylist(), shards, strict=True) if of_row == shard.key
            )
    return list(drives)


def _find_different(recording: Recording, store: Store, pack: Pack, drives: Sequence[str]) -> str | None:
    """The first of `drives` that is not in the recording as it was packed."""
    table = read_table(store, pack.tables["drives"], ["drive", "fingerprint"])
    packed = dict(zip(table["drive"].to_pylist(), table["fingerprint"].to_pylist(), strict=True))
    there = set(recording.drives())
    return next((each for each in drives if each not in there or recording.read_drive(each).fingerprint != packed[each]), None)
