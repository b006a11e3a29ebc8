"""Columns: a folder of .npy files under one JSON header, written once and mapped read-only by every process of a node.

The header names every array with its type and shape and is written last into a folder that is then renamed into place,
so a folder is whole or it does not count. Pickling carries the path alone: a worker maps the same pages again instead
of receiving them.

Left to others: what the columns mean (`index.py`, `pairs.py`).
"""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

HEADER = "header.json"

_mapping = Lock()
"""numpy reads an array's header with Python's own parser, which in 3.11 fails now and then in two threads at once."""


class Columns:
    """Arrays by name, each mapped at its first use."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._mapped: dict[str, np.ndarray] = {}

    def __reduce__(self) -> tuple[type["Columns"], tuple[Path]]:
        return type(self), (self.folder,)

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._mapped:
            with _mapping:
                self._mapped[name] = _map_array(self.folder / f"{name}.npy", tuple(self.header["arrays"][name]["shape"]))
        return self._mapped[name]

    @cached_property
    def header(self) -> dict[str, Any]:
        """What was written beside the arrays."""
        return json.loads((self.folder / HEADER).read_text())


def write_columns(folder: Path, arrays: Mapping[str, np.ndarray], header: Mapping[str, Any]) -> None:
    """Write all arrays, then make them appear at `folder` at once; whatever stood there before is replaced."""
    with new_columns(folder, header) as new:
        for name, array in arrays.items():
            new.create(name, array.dtype, array.shape)[...] = array


class NewColumns:
    """Columns that are being written; one that is longer than memory is filled a piece at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.layout: dict[str, dict[str, Any]] = {}

    def create(self, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        """A mapped array of zeros, to be filled."""
        self.layout[name] = {"dtype": dtype.str, "shape": shape}
        path = self._folder / f"{name}.npy"
        if 0 in shape:  # an empty file region cannot be mapped
            empty = np.empty(shape, dtype)
            np.save(path, empty, allow_pickle=False)
            return empty
        return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)


@contextmanager
def new_columns(folder: Path, header: Mapping[str, Any]) -> Iterator[NewColumns]:
    """Columns to fill in the block, at whose end they appear at `folder` at once; an error leaves what stood there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        new = NewColumns(unfinished)
        yield new
        (unfinished / HEADER).write_text(json.dumps({**header, "arrays": new.layout}, indent=1))
        if folder.exists():
            shutil.rmtree(folder)
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def is_whole(folder: Path) -> bool:
    """Whether `folder` holds a header and every array that it lists, complete."""
    try:
        columns = Columns(folder)
        for name, layout in columns.header["arrays"].items():
            array = columns[name]
            if array.dtype.str != layout["dtype"] or list(array.shape) != layout["shape"]:
                return False
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        return False
    return True


def _map_array(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    if 0 in shape:  # an empty file region cannot be mapped
        return np.load(path, allow_pickle=False)
    # A plain array of the same pages: an index into numpy's memmap is four times as slow.
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
