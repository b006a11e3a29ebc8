"""Layout: what a packed data set is made of, in a folder or under an s3:// prefix.

    versions/000001.json                   a version: its packs with the size and checksum of every object; written last, never changed
    packs/PACK/{drives,images,sweeps}.parquet   a pack's index: where each file lies, when it was taken, calibration, pose
    shards/PACK-00000.KIND.tar             some drives' files of one kind, byte for byte, a plain tar in the order of time

A version that follows lists the packs before it and its own, so a data set grows and nothing is written twice; a reader that
names a version always sees the same rows in the same order. A kind is what is fetched together: key frames of the cameras, the
other images, sweeps of key frames, the other sweeps. In each drive the images of one instant are neighbours, so T instants in a
row are one range of bytes. Each drive begins with drive.json, its calibration and poses: a shard can be read without the index.

Rows of the tables are sorted by drive, in the order of packing, sensor and time: reading them on end gives the columns of
`trainer.data.index`. Matrices are rows of numbers, last index fastest.
"""

from datetime import datetime
from typing import Literal

import pyarrow as pa
from pydantic import ValidationError

from models.config import Section
from trainer.errors import DataError
from trainer.store.base import ObjectExistsError, Store

Table = Literal["drives", "images", "sweeps"]
FORMAT: Literal[1] = 1
VERSIONS = "versions/"
PROGRESS = "packing/"
KINDS = ("camera-key", "camera-other", "lidar-key", "lidar-other")
TABLES: tuple[Table, ...] = ("drives", "images", "sweeps")
DRIVE_FILE = "drive.json"

_NAME = pa.dictionary(pa.int32(), pa.string())
_CAPTURES = [
    pa.field("drive", _NAME),
    pa.field("sensor", _NAME),
    pa.field("timestamp_us", pa.int64()),
    pa.field("is_key_frame", pa.bool_()),
    pa.field("ego_from_sensor", pa.list_(pa.float64(), 16)),
    pa.field("world_from_ego", pa.list_(pa.float64(), 16)),
    pa.field("file", pa.string()),
    pa.field("shard", _NAME),
    pa.field("offset", pa.int64()),
    pa.field("bytes", pa.int32()),
    pa.field("crc32", pa.uint32()),
]
SCHEMAS = {
    "drives": pa.schema(
        [
            pa.field("drive", pa.string()),
            pa.field("splits", pa.list_(pa.string())),
            pa.field("fingerprint", pa.string()),
            pa.field("begins_us", pa.int64()),
            pa.field("ends_us", pa.int64()),
            pa.field("images", pa.int32()),
            pa.field("sweeps", pa.int32()),
        ]
    ),
    "images": pa.schema(
        [
            *_CAPTURES,
            pa.field("pix_from_cam", pa.list_(pa.float64(), 9)),
            pa.field("width_px", pa.int32()),
            pa.field("height_px", pa.int32()),
        ]
    ),
    "sweeps": pa.schema(_CAPTURES),
}


class StoredObject(Section):
    """An object of the store as it was written."""

    key: str
    bytes: int
    checksum: str


class Pack(Section):
    """What one run of `odonata pack` added."""

    name: str
    source: str
    """What was packed, for people."""
    drives: int
    images: int
    sweeps: int
    tables: dict[Table, StoredObject]
    shards: tuple[StoredObject, ...]

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)


class Version(Section):
    """One state of a data set."""

    format: Literal[1] = FORMAT
    version: int
    created: datetime
    packs: tuple[Pack, ...]

    @property
    def key(self) -> str:
        return f"{VERSIONS}{self.version:06d}.json"

    @property
    def bytes(self) -> int:
        """Of shards and tables."""
        return sum(stored.bytes for pack in self.packs for stored in (*pack.tables.values(), *pack.shards))


def list_versions(store: Store) -> list[int]:
    """Numbers of all versions in `store`, ascending."""
    names = [info.key.removeprefix(VERSIONS).removesuffix(".json") for info in store.list(VERSIONS)]
    return sorted(int(name) for name in names if name.isdigit())


def choose_version(store: Store, number: int | None = None) -> int:
    """`number`, or that of the newest version; DataError where there is none such."""
    found = list_versions(store)
    if not found:
        raise DataError(
            f"{store.uri} was to be read as a packed data set and has no version in {VERSIONS}; "
            f"pack one with `odonata pack SOURCE {store.uri}`, or give the right place"
        )
    if number is not None and number not in found:
        raise DataError(
            f"version {number} of {store.uri} was asked for and it has only {', '.join(map(str, found))}; ask for one that it has"
        )
    return number or found[-1]


def read_version(store: Store, number: int | None = None) -> Version:
    """Version `number`, or the newest; DataError where there is none such."""
    return _read(store, choose_version(store, number))


def find_newest(store: Store) -> Version | None:
    """The newest version, if there is any."""
    found = list_versions(store)
    return _read(store, found[-1]) if found else None


def _read(store: Store, number: int) -> Version:
    key = f"{VERSIONS}{number:06d}.json"
    try:
        return Version.model_validate_json(store.get(key))
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(
            f"{store.uri}/{key} was to be read as a version of format {FORMAT} and is not: "
            f"{'.'.join(map(str, first['loc']))}: {first['msg']}; read it with the odonata that wrote it, or pack it again elsewhere"
        ) from error


def commit_version(store: Store, version: Version) -> None:
    """Make `version` exist; DataError where somebody else has made it meanwhile."""
    try:
        store.put(version.key, version.model_dump_json(indent=1).encode(), exclusive=True)
    except ObjectExistsError as error:
        raise DataError(
            f"version {version.version} of {store.uri} was to be written and another `odonata pack` has written one of that number "
            "meanwhile; start the same command again: what it has packed is kept, and becomes the next version"
        ) from error


def check_objects(store: Store, version: Version) -> None:
    """DataError where a shard or table of `version` is missing or has another size; contents are not read."""
    found = {info.key: info.bytes for prefix in ("packs/", "shards/") for info in store.list(prefix)}
    for stored in (stored for pack in version.packs for stored in (*pack.tables.values(), *pack.shards)):
        if found.get(stored.key) != stored.bytes:
            state = f"has {found[stored.key]} bytes" if stored.key in found else "is missing"
            raise DataError(
                f"version {version.version} of {store.uri} lists {stored.key} with {stored.bytes} bytes and it {state}; "
                "bring that object back from where it was copied from, or read another version"
            )
