"""From records of nuScenes tables to arrays: every fault becomes a DataError that names table, field and record.

Left to others: which tables there are and what becomes of them (`nuscenes.py`, `nuscenes_boxes.py`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int

from trainer.errors import DataError

Record = Mapping[str, Any]


def read_transforms(records: Sequence[Record], table: str) -> Float64[np.ndarray, "K 4 4"]:
    """Parent from child, from `translation` and the quaternion `rotation` (w, x, y, z)."""
    quaternions = read_numbers(records, "rotation", table, (4,))
    lengths = np.linalg.norm(quaternions, axis=-1, keepdims=True)
    check_records(np.abs(lengths[:, 0] - 1) < 0.01, records, table, "rotation", "is no unit quaternion")
    transforms = np.zeros((len(records), 4, 4))
    transforms[:, :3, :3] = _rotations(quaternions / lengths)
    transforms[:, :3, 3] = read_numbers(records, "translation", table, (3,))
    transforms[:, 3, 3] = 1
    return transforms


def _rotations(quaternions: Float64[np.ndarray, "K 4"]) -> Float64[np.ndarray, "K 3 3"]:
    w, x, y, z = quaternions.T
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return np.moveaxis(np.array(rows), -1, 0)


def read_field(records: Sequence[Record], name: str, table: str) -> list[Any]:
    """The field of every record."""
    try:
        return [record[name] for record in records]
    except KeyError:
        token = next(record["token"] for record in records if name not in record)
        raise DataError(
            f"every record of {table}.json was to have a field {name!r} and {token} has none; write or download that table again"
        ) from None


def read_numbers(records: Sequence[Record], name: str, table: str, shape: tuple[int, ...]) -> Float64[np.ndarray, " ..."]:
    """The field of every record, each finite numbers of this shape."""
    values = read_field(records, name, table)
    if records and not _has_shape(values, (len(records), *shape)):
        fits = np.array([_has_shape(value, shape) for value in values])
        check_records(fits, records, table, name, f"is no array of shape {shape}")
    numbers = np.array(values, dtype=np.float64).reshape(len(records), *shape)
    is_finite = np.isfinite(numbers).all(axis=tuple(range(1, numbers.ndim)))
    check_records(is_finite, records, table, name, "is not finite")
    return numbers


def _has_shape(value: Any, shape: tuple[int, ...]) -> bool:
    try:
        return np.array(value, dtype=np.float64).shape == shape
    except (TypeError, ValueError):
        return False


def check_records(good: Bool[np.ndarray, " K"], records: Sequence[Record], table: str, name: str, fault: str) -> None:
    """DataError that names the first record of which `fault` is said."""
    bad = np.flatnonzero(~good)
    if len(bad):
        record = records[bad[0]]
        raise DataError(
            f"every record of {table}.json was to have a usable {name} and in {len(bad)} of {len(records)} it {fault}, "
            f"first in {record['token']}: {[record.get(part) for part in name.split(', ')]}; repair or leave out those records"
        )


def find_rows(tokens: Sequence[str], records: Sequence[Record], table: str) -> Int[np.ndarray, " N"]:
    """Row of each token in its table."""
    row_of = {record["token"]: row for row, record in enumerate(records)}
    try:
        return np.array([row_of[token] for token in tokens], dtype=np.int64)
    except KeyError as error:
        raise DataError(
            f"a record refers to token {error} of {table}.json and that table of {len(records)} has no such record; "
            "the tables are of different versions, write or download them again"
        ) from None
