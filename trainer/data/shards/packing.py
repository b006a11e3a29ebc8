"""Packing: from a recording to shards in a store, many at once, so that a killed packing goes on where it was.

Drives are packed a group at a time, in the recording's order; each group is up to four shards, one a kind (`layout.py`), written
by one process straight from the files to the store. When they are there, the group's rows and then `packing/PACK/00000/done.json`
are put; a group with that file is never packed again, provided that its drives are still the same. When all groups are done their
rows become the pack's tables, and the version that lists them is written last.

A drive that the data set already holds is left out; one that has the same name and is another one ends the packing.
"""

import hashlib
import io
import json
import logging
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainer.config.store import StoreConfig
from trainer.data.shards.abandoned import remove_abandoned, say_alive
from trainer.data.shards.checking import check_drive
from trainer.data.shards.layout import (
    DRIVE_FILE,
    KINDS,
    PROGRESS,
    SCHEMAS,
    TABLES,
    Pack,
    StoredObject,
    Version,
    check_objects,
    commit_version,
    find_newest,
)
from trainer.data.shards.recording import Captures, Drive, Images, Recording
from trainer.data.shards.tables import read_table, write_table
from trainer.errors import DataError
from trainer.pool import worker_processes
from trainer.store.base import ObjectInfo, Store, check_exclusive
from trainer.store.open import open_store

_BLOCK = tarfile.BLOCKSIZE

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackReport:
    """What was done."""

    uri: str
    version: int
    drives: int
    """New ones."""
    known: int
    """Drives that the data set held already."""
    images: int
    sweeps: int
    bytes: int

    def __str__(self) -> str:
        if not self.drives:
            return f"{self.uri} version {self.version}: all {self.known} drives are in it already"
        kept = f", beside {self.known} that were there" if self.known else ""
        return (
            f"{self.uri} version {self.version}: {self.drives} drives with {self.images} images and {self.sweeps} sweeps, "
            f"{self.bytes / 1e9:.2f} GB{kept}"
        )


def pack(
    recording: Recording,
    uri: str,
    store_config: StoreConfig | None = None,
    *,
    drives_per_shard: int = 8,
    workers: int | None = None,
    advance: Callable[[int, int], object] = lambda done, total: None,
) -> PackReport:
    """Add the drives of `recording` to the data set at `uri`, which need not exist yet, as its next version.

    `advance` is told how many drives are packed, of how many. DataError where a file cannot be read or a drive contradicts one
    that is there; what was packed by then is kept for the next call.
    """
    store = open_store(uri, store_config)
    check_exclusive(store)
    previous = find_newest(store)
    new = find_new_drives(recording, store, previous)
    known = len(recording.drives()) - len(new)
    if not new:
        if previous is None:
            raise DataError(f"{recording.name} was to be packed and has no drive; give logs that have some")
        return PackReport(store.uri, previous.version, 0, known, 0, 0, 0)
    number = previous.version + 1 if previous else 1
    # The same for a packing that is started again, after a kill or because another one has taken its number meanwhile.
    name = hashlib.sha256(repr((recording.name, new, drives_per_shard)).encode()).hexdigest()[:12]
    firsts = range(0, len(new), drives_per_shard)
    groups = [Group(name, place, tuple(new[first : first + drives_per_shard])) for place, first in enumerate(firsts)]
    say_alive(store, name)
    remove_abandoned(store, previous)
    advance(0, len(new))
    pack_groups(recording, groups, uri, store_config, workers=workers, advance=lambda done: advance(done, len(new)))
    added = join_groups(store, recording.name, groups)
    packs = (*previous.packs, added) if previous else (added,)
    version = Version(version=number, created=datetime.now(UTC), packs=packs)
    check_objects(store, version)
    commit_version(store, version)
    store.delete(f"{PROGRESS}{name}")
    return PackReport(store.uri, number, added.drives, known, added.images, added.sweeps, added.bytes)


def find_new_drives(recording: Recording, store: Store, version: Version | None) -> list[str]:
    """Names of the drives that `version` does not hold; DataError where it holds another one of that name."""
    known: dict[str, str] = {}
    for earlier in version.packs if version else ():
        table = read_table(store, earlier.tables["drives"], ["drive", "fingerprint"])
        known |= zip(table["drive"].to_pylist(), table["fingerprint"].to_pylist(), strict=True)
    new = []
    for drive in recording.drives():
        if drive not in known:
            new.append(drive)
        elif recording.read_drive(drive).fingerprint != known[drive]:
            raise DataError(
                f"{drive} of {recording.name} was to be packed into {store.uri}, which holds a drive of that name with other files, "
                "times, poses, calibration or splits; pack into another place, or give the drive another name"
            )
    return new


@dataclass(frozen=True)
class Group:
    """Drives that share shards."""

    pack: str
    place: int
    drives: tuple[str, ...]

    @property
    def progress(self) -> str:
        """Where its rows are kept until the pack is whole."""
        return f"{PROGRESS}{self.pack}/{self.place:05d}"

    def shard(self, kind: str) -> str:
        return f"shards/{self.pack}-{self.place:05d}.{kind}.tar"

    def table(self, name: str) -> str:
        return f"{self.progress}/{name}.parquet"


def pack_groups(
    recording: Recording,
    groups: Sequence[Group],
    uri: str,
    store_config: StoreConfig | None,
    *,
    workers: int | None,
    advance: Callable[[int], object],
) -> None:
    """Pack what is not packed yet, in processes of their own."""
    store = open_store(uri, store_config)
    finished = {info.key for info in store.list(PROGRESS)}
    missing = [group for group in groups if not is_packed(recording, store, group, finished)]
    done = sum(len(group.drives) for group in groups) - sum(len(group.drives) for group in missing)
    if done:
        log.info("going on: %d drives of %s are packed already", done, recording.name)
    advance(done)
    with worker_processes(workers) as pool:
        jobs = {pool.submit(pack_group, recording, group, uri, store_config): group for group in missing}
        for job in as_completed(jobs):
            job.result()
            say_alive(store, jobs[job].pack)
            done += len(jobs[job].drives)
            advance(done)
            log.info("packed %d drives", done)


def is_packed(recording: Recording, store: Store, group: Group, finished: set[str]) -> bool:
    """Whether an earlier packing has finished this group, of drives that are still the same."""
    if f"{group.progress}/done.json" not in finished:
        return False
    done = json.loads(store.get(f"{group.progress}/done.json"))
    return done["fingerprints"] == [recording.read_drive(drive).fingerprint for drive in group.drives]


def pack_group(recording: Recording, group: Group, uri: str, store_config: StoreConfig | None) -> None:
    """Write the shards of a group, its rows, and then that it is done."""
    store = open_store(uri, store_config)
    drives = [recording.read_drive(drive) for drive in group.drives]
    for drive in drives:
        check_drive(drive)
    placed: dict[str, Placed] = {}
    shards = [stored for kind in KINDS if (stored := write_shard(recording, drives, store, group.shard(kind), kind, placed))]
    for name, table in tabulate(drives, placed).items():
        write_table(store, group.table(name), [table], SCHEMAS[name])
    fingerprints = [drive.fingerprint for drive in drives]
    done = {"fingerprints": fingerprints, "shards": [shard.model_dump() for shard in shards]}
    store.put(f"{group.progress}/done.json", json.dumps(done).encode())


@dataclass(frozen=True)
class Placed:
    """Where a file lies."""

    shard: str
    offset: int
    bytes: int
    crc32: int


def write_shard(
    recording: Recording, drives: Sequence[Drive], store: Store, key: str, kind: str, placed: dict[str, Placed]
) -> StoredObject | None:
    """Stream the files of one kind to the store and note in `placed` where each lies; nothing where there is none."""
    if not any(len(_rows_of_kind(drive, kind)) for drive in drives):
        return None
    return as_stored(store.put(key, write_members(recording, drives, key, kind, placed)))


def write_members(
    recording: Recording, drives: Sequence[Drive], key: str, kind: str, placed: dict[str, Placed]
) -> Iterator[memoryview]:
    """The bytes of the shard `key`: the files of one kind, each noted in `placed`."""
    offset = 0
    for drive in drives:
        captures, rows = _captures_of_kind(drive, kind), _rows_of_kind(drive, kind)
        if not len(rows):
            continue
        head = _tar_member(f"{drive.name}/{DRIVE_FILE}", _describe(drive, captures, rows), int(captures.timestamp_us[rows[0]]))
        offset += sum(map(len, head))
        yield from head
        for row in rows.tolist():
            file = captures.file[row]
            data = _read_file(recording, file)
            pieces = _tar_member(f"{drive.name}/{_member_name(captures, row)}", data, int(captures.timestamp_us[row]))
            placed[file] = Placed(key, offset + len(pieces[0]), len(data), zlib.crc32(data))
            offset += sum(map(len, pieces))
            yield from pieces
    yield memoryview(bytes(2 * _BLOCK))


def as_stored(info: ObjectInfo) -> StoredObject:
    """What `put` says of an object, as versions list it."""
    assert info.checksum is not None, "put tells the checksum"
    return StoredObject(key=info.key, bytes=info.bytes, checksum=info.checksum)


def tabulate(drives: Sequence[Drive], placed: Mapping[str, Placed]) -> dict[str, pa.Table]:
    """The rows of some drives."""
    columns: dict[str, list[pa.Table]] = {name: [] for name in TABLES}
    for drive in drives:
        times = np.concatenate([drive.images.timestamp_us, drive.sweeps.timestamp_us])
        row = {
            "drive": drive.name,
            "splits": list(drive.splits),
            "fingerprint": drive.fingerprint,
            "begins_us": int(times.min()),
            "ends_us": int(times.max()),
            "images": len(drive.images),
            "sweeps": len(drive.sweeps),
        }
        columns["drives"].append(pa.Table.from_pylist([row], SCHEMAS["drives"]))
        columns["images"].append(_tabulate_captures(drive, drive.images, placed, "images"))
        columns["sweeps"].append(_tabulate_captures(drive, drive.sweeps, placed, "sweeps"))
    return {name: pa.concat_tables(tables).unify_dictionaries() for name, tables in columns.items()}


def join_groups(store: Store, source: str, groups: Sequence[Group]) -> Pack:
    """Make the tables of the pack from the rows of its groups, one group in memory at a time."""
    tables = {
        name: write_table(
            store,
            f"packs/{groups[0].pack}/{name}.parquet",
            (pq.read_table(io.BytesIO(store.get(group.table(name)))) for group in groups),
            SCHEMAS[name],
        )
        for name in TABLES
    }
    rows = {name: count for name, (_, count) in tables.items()}
    shards = [shard for group in groups for shard in json.loads(store.get(f"{group.progress}/done.json"))["shards"]]
    return Pack(
        name=groups[0].pack,
        source=source,
        **rows,
        tables={name: as_stored(info) for name, (info, _) in tables.items()},
        shards=tuple(StoredObject(**shard) for shard in shards),
    )


def _captures_of_kind(drive: Drive, kind: str) -> Captures:
    return drive.images if kind.startswith("camera") else drive.sweeps


def _rows_of_kind(drive: Drive, kind: str) -> np.ndarray:
    """In the order of time, so that the images of an instant, and instants that follow each other, are neighbours."""
    captures = _captures_of_kind(drive, kind)
    rows = np.flatnonzero(captures.is_key_frame == kind.endswith("key"))
    sensors = np.array(captures.sensor, dtype=np.str_)[rows]
    return rows[np.lexsort((sensors, captures.timestamp_us[rows]))]


def _tabulate_captures(drive: Drive, captures: Captures, placed: Mapping[str, Placed], table: str) -> pa.Table:
    rows = np.lexsort((captures.timestamp_us, np.array(captures.sensor, dtype=np.str_)))
    files = [captures.file[row] for row in rows]
    places = [placed[file] for file in files]
    columns = {
        "drive": [drive.name] * len(rows),
        "sensor": [captures.sensor[row] for row in rows],
        "timestamp_us": captures.timestamp_us[rows],
        "is_key_frame": captures.is_key_frame[rows],
        "ego_from_sensor": _flat(captures.ego_from_sensor[rows]),
        "world_from_ego": _flat(captures.world_from_ego[rows]),
        "file": files,
        "shard": [place.shard for place in places],
        "offset": [place.offset for place in places],
        "bytes": [place.bytes for place in places],
        "crc32": [place.crc32 for place in places],
    }
    if isinstance(captures, Images):
        columns["pix_from_cam"] = _flat(captures.pix_from_cam[rows])
        columns["width_px"], columns["height_px"] = captures.size_px[rows].T
    schema = SCHEMAS[table]
    return pa.table([_array(columns[field.name], field.type) for field in schema], schema=schema)


def _array(values: Sequence | np.ndarray, kind: pa.DataType) -> pa.Array:
    if pa.types.is_fixed_size_list(kind):
        return pa.FixedSizeListArray.from_arrays(pa.array(values, kind.value_type), kind.list_size)
    if pa.types.is_dictionary(kind):
        return pa.array(values, kind.value_type).dictionary_encode()
    return pa.array(values, kind)


def _flat(matrices: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(matrices, dtype=np.float64).reshape(-1)


def _describe(drive: Drive, captures: Captures, rows: np.ndarray) -> bytes:
    """The calibration and poses of some files, as JSON."""
    described = []
    for row in rows.tolist():
        one = {
            "file": _member_name(captures, row),
            "sensor": captures.sensor[row],
            "timestamp_us": int(captures.timestamp_us[row]),
            "ego_from_sensor": captures.ego_from_sensor[row].tolist(),
            "world_from_ego": captures.world_from_ego[row].tolist(),
        }
        if isinstance(captures, Images):
            one["pix_from_cam"] = captures.pix_from_cam[row].tolist()
            one["size_px"] = captures.size_px[row].tolist()
        described.append(one)
    return json.dumps({"drive": drive.name, "splits": drive.splits, "files": described}).encode()


def _read_file(recording: Recording, file: str) -> bytes:
    try:
        return recording.read_file(file)
    except OSError as error:
        raise DataError(
            f"{file} of {recording.name} was to be packed and cannot be read: {error.strerror or error}; bring the file back, "
            "or take it out of its drive"
        ) from error


def _member_name(captures: Captures, row: int) -> str:
    return f"{captures.sensor[row]}/{PurePosixPath(captures.file[row]).name}"


def _tar_member(name: str, data: bytes, timestamp_us: int) -> list[memoryview]:
    """Header, bytes and padding of a file of a tar; the same bytes whoever packs it, and whenever."""
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = len(data), timestamp_us // 1_000_000, 0o644
    padding = bytes(-len(data) % _BLOCK)
    return [memoryview(part) for part in (info.tobuf(tarfile.PAX_FORMAT), data, padding)]
