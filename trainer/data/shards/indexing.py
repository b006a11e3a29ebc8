"""Indexing: the tables of a packed data set as the columns of `trainer.data.index`, once on each node.

The rows already stand in the order of the index, so they are copied a batch at a time: memory does not grow with the data set.
Drives become scenes; images of the same calibration share a mount.
"""

import hashlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Float64, Int

from trainer.config.data import CacheConfig
from trainer.config.store import StoreConfig
from trainer.data.columns import Columns, NewColumns, new_columns
from trainer.data.index import INDEX_FORMAT, Index
from trainer.data.shards.layout import SCHEMAS, Table, Version, check_objects
from trainer.data.shards.reading import ShardFiles
from trainer.data.shards.tables import read_batches, read_table
from trainer.errors import DataError
from trainer.store.base import Store

_CAPTURES = {
    "timestamp_us": (np.int64, ()),
    "is_key_frame": (np.bool_, ()),
    "world_from_ego": (np.float64, (4, 4)),
    "shard": (np.int32, ()),
    "offset": (np.int64, ()),
    "bytes": (np.int32, ()),
    "crc32": (np.uint32, ()),
}
"""Columns that images and sweeps take over from the tables as they are: type and shape of a row."""

Arrays = Mapping[str, np.ndarray]
Codes = Mapping[str, Mapping[str, int]]
"""For each column of names the number of each name."""

log = logging.getLogger(__name__)


def packed_index_path(store: Store, version: Version, folder: Path) -> Path:
    """Where the index of this very version is kept on this node."""
    key = hashlib.sha256(repr((INDEX_FORMAT, store.uri, version.model_dump_json())).encode()).hexdigest()[:16]
    return folder / f"version-{version.version}-{key}"


def open_packed_index(path: Path, store: StoreConfig, cache: CacheConfig | None, *, patience_s: float = 0.0) -> Index:
    """Map the index at `path`, with files that are ranges of shards; `patience_s` as ShardFiles has it."""
    columns = Columns(path)
    return Index(columns, ShardFiles(columns, store, cache, patience_s))


def write_packed_index(store: Store, version: Version, path: Path) -> None:
    """Copy the tables of `version` into columns at `path`. DataError where an object is missing or a table is wrong."""
    began = time.monotonic()
    check_objects(store, version)
    splits = _read_splits(store, version)
    cameras = _read_cameras(store, version)
    shards = [shard.key for pack in version.packs for shard in pack.shards]
    codes = {"drive": _numbered(splits["all"]), "shard": _numbered(shards), "sensor": _numbered(cameras)}
    header = {"root": store.uri, "version": f"version {version.version}", "splits": splits}
    with new_columns(path, header) as new:
        for name, texts in (("scene_name", splits["all"]), ("camera_name", cameras), ("shard_key", shards)):
            _fill(new, name, np.array([text.encode() for text in texts], dtype=np.bytes_))
        _copy_images(store, version, codes, new)
        _copy_sweeps(store, version, codes, new)
    log.info("indexed version %d of %s in %.1f s", version.version, store.uri, time.monotonic() - began)


class Mounts:
    """Calibrated cameras, each once, by number."""

    def __init__(self) -> None:
        self._number_of: dict[bytes, int] = {}

    def number(
        self, pix_from_cam: Float64[np.ndarray, "K 3 3"], ego_from_cam: Float64[np.ndarray, "K 4 4"]
    ) -> Int[np.ndarray, " K"]:
        """Numbers of the cameras of these calibrations."""
        both = np.concatenate([pix_from_cam.reshape(-1, 9), ego_from_cam.reshape(-1, 16)], axis=1)
        is_new = np.concatenate([[True], (both[1:] != both[:-1]).any(-1)])  # a drive's images of a camera stand together
        numbers = [self._number_of.setdefault(row.tobytes(), len(self._number_of)) for row in both[is_new]]
        return np.array(numbers, dtype=np.int64)[np.cumsum(is_new) - 1]

    @property
    def rows(self) -> Float64[np.ndarray, "M 25"]:
        """Intrinsics and mounting of each, on end."""
        return np.frombuffer(b"".join(self._number_of), dtype=np.float64).reshape(-1, 25)


def _read_splits(store: Store, version: Version) -> dict[str, list[str]]:
    splits: dict[str, list[str]] = {}
    every: list[str] = []
    for pack in version.packs:
        for drive in read_table(store, pack.tables["drives"], ["drive", "splits"]).to_pylist():
            every.append(drive["drive"])
            for split in drive["splits"]:
                splits.setdefault(split, []).append(drive["drive"])
    return {**splits, "all": every}


def _read_cameras(store: Store, version: Version) -> list[str]:
    names: set[str] = set()
    for pack in version.packs:
        for batch in read_batches(store, pack.tables["images"], ["sensor"]):
            names.update(batch.column("sensor").dictionary.to_pylist())
    return sorted(names)


def _copy_images(store: Store, version: Version, codes: Codes, new: NewColumns) -> None:
    count = sum(pack.images for pack in version.packs)
    columns = _create_captures(new, "image", count)
    for name, dtype, shape in (("camera", np.int16, ()), ("mount", np.int32, ()), ("size_px", np.int32, (2,))):
        columns[name] = new.create(f"image_{name}", np.dtype(dtype), (count, *shape))
    groups = np.zeros(len(codes["drive"]) * len(codes["sensor"]), dtype=np.int64)
    mounts = Mounts()
    for rows, arrays in _pieces(store, version, "images", codes):
        _copy_captures(arrays, columns, rows)
        columns["camera"][rows] = arrays["sensor"]
        columns["mount"][rows] = mounts.number(arrays["pix_from_cam"], arrays["ego_from_sensor"])
        columns["size_px"][rows] = np.stack([arrays["width_px"], arrays["height_px"]], axis=-1)
        np.add.at(groups, arrays["drive"].astype(np.int64) * len(codes["sensor"]) + arrays["sensor"], 1)
    _fill(new, "first_image", np.concatenate([[0], np.cumsum(groups)]))
    _fill(new, "mount_pix_from_cam", mounts.rows[:, :9].reshape(-1, 3, 3))
    _fill(new, "mount_ego_from_cam", mounts.rows[:, 9:].reshape(-1, 4, 4))


def _copy_sweeps(store: Store, version: Version, codes: Codes, new: NewColumns) -> None:
    count = sum(pack.sweeps for pack in version.packs)
    columns = _create_captures(new, "sweep", count)
    ego_from_lidar = new.create("sweep_ego_from_lidar", np.dtype(np.float64), (count, 4, 4))
    for rows, arrays in _pieces(store, version, "sweeps", codes):
        _copy_captures(arrays, columns, rows)
        ego_from_lidar[rows] = arrays["ego_from_sensor"]


def _create_captures(new: NewColumns, kind: str, count: int) -> dict[str, np.ndarray]:
    columns = {name: new.create(f"{kind}_{name}", np.dtype(dtype), (count, *shape)) for name, (dtype, shape) in _CAPTURES.items()}
    return {**columns, "drive": new.create(f"{kind}_scene", np.dtype(np.int32), (count,))}


def _copy_captures(arrays: Arrays, columns: Arrays, rows: slice) -> None:
    for name in (*_CAPTURES, "drive"):
        columns[name][rows] = arrays[name]


def _pieces(store: Store, version: Version, table: Table, codes: Codes) -> Iterator[tuple[slice, dict[str, np.ndarray]]]:
    """All rows of a table of all packs, some at a time, and which rows of the index they are."""
    first = 0
    names = [name for name in SCHEMAS[table].names if name != "file" and (name != "sensor" or table == "images")]
    for pack in version.packs:
        for batch in read_batches(store, pack.tables[table], names):
            yield slice(first, first + len(batch)), {name: _as_array(batch.column(name), codes.get(name), name) for name in names}
            first += len(batch)


def _as_array(column: pa.Array, code_of: Mapping[str, int] | None, name: str) -> np.ndarray:
    if pa.types.is_fixed_size_list(column.type):
        side = 3 if column.type.list_size == 9 else 4
        return column.flatten().to_numpy().reshape(-1, side, side)
    if code_of is None or not pa.types.is_dictionary(column.type):
        return column.to_numpy(zero_copy_only=False)
    names = column.dictionary.to_pylist()
    unknown = [text for text in names if text not in code_of]
    if unknown:
        raise DataError(
            f"a table of a packed data set names the {name} {unknown[0]!r} and its version does not; "
            "tables and version are of different packings: bring the objects back as they were written"
        )
    return np.array([code_of[text] for text in names], dtype=np.int64)[column.indices.to_numpy()]


def _numbered(names: Sequence[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(names)}


def _fill(new: NewColumns, name: str, array: np.ndarray) -> None:
    new.create(name, array.dtype, array.shape)[...] = array
