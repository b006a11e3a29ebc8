"""Verifying: every byte of a packed data set read again and compared with its checksums.

A shard or table that is as it was written has its checksum as a whole. Where one does not, its files are compared one by one, so that
the answer names what is lost.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from trainer.data.shards.layout import Pack, StoredObject, Version
from trainer.data.shards.tables import read_batches
from trainer.errors import DataError
from trainer.store.base import Checksum, ObjectMissingError, Store

_PIECE_BYTES = 32 << 20
_NAMED = 5

Progress = Callable[[int], object]
"""Told of bytes as they are read."""


@dataclass(frozen=True)
class Damage:
    """What is wrong with one object."""

    key: str
    reason: str
    files: tuple[str, ...]
    """Files of the recording that cannot be read from it any more, as DRIVE: FILE."""

    def __str__(self) -> str:
        if not self.files:
            return f"{self.key} {self.reason}"
        more = f" and {len(self.files) - _NAMED} more" if len(self.files) > _NAMED else ""
        return f"{self.key} {self.reason}; lost: {', '.join(self.files[:_NAMED])}{more}"


def verify(store: Store, version: Version, progress: Progress = lambda count: None) -> list[Damage]:
    """What is damaged in `version`."""
    damaged = []
    for pack in version.packs:
        tables = [verify_object(store, table, progress) for table in pack.tables.values()]
        damaged += [Damage(key, reason, ()) for key, reason in filter(None, tables)]
        for shard in pack.shards:
            found = verify_object(store, shard, progress)
            if found:
                damaged.append(Damage(*found, files=() if any(tables) else find_lost_files(store, pack, shard)))
    return damaged


def verify_object(store: Store, stored: StoredObject, progress: Progress) -> tuple[str, str] | None:
    """Name and fault of an object that is not as it was written."""
    checksum = Checksum()
    try:
        for offset in range(0, stored.bytes, _PIECE_BYTES):
            piece = store.get(stored.key, offset, min(_PIECE_BYTES, stored.bytes - offset))
            checksum.update(piece)
            progress(len(piece))
    except ObjectMissingError:
        return stored.key, f"is missing or ends before its {stored.bytes} bytes"
    return None if str(checksum) == stored.checksum else (stored.key, "has other bytes than were written")


def find_lost_files(store: Store, pack: Pack, shard: StoredObject) -> tuple[str, ...]:
    """The files of a damaged shard that do not have their own checksum."""
    lost = []
    for table in ("images", "sweeps"):
        for batch in read_batches(store, pack.tables[table], ["drive", "file", "shard", "offset", "bytes", "crc32"]):
            names = np.array(batch.column("shard").to_pylist(), dtype=np.str_)
            rows = batch.take(np.flatnonzero(names == shard.key)).to_pylist()
            lost += [f"{row['drive']}: {row['file']}" for row in rows if not _is_whole(store, row)]
    return tuple(lost)


def raise_if_damaged(store: Store, version: Version, damaged: list[Damage]) -> None:
    """DataError that names what is damaged."""
    if damaged:
        listing = "\n  ".join(map(str, damaged))
        raise DataError(
            f"version {version.version} of {store.uri} was verified and objects are damaged: {len(damaged)}; have "
            "`odonata pack --repair SOURCE DEST` write shards anew, or bring the objects back from where they were copied from. "
            "Training replaces and counts clips of damaged files, and "
            f"does not start where an object is missing:\n  {listing}"
        )


def _is_whole(store: Store, row: dict) -> bool:
    try:
        return zlib.crc32(store.get(row["shard"], row["offset"], row["bytes"])) == row["crc32"]
    except ObjectMissingError:
        return False
