"""Columns: a folder of .npy files under one JSON header, written once and mapped read-only by every process of a node.

The header names every array with its type and shape and is written last into a folder that is then renamed into place,
so a folder is whole or it does not count. Pickling carries the path alone: a worker maps the same pages again instead
of receiving them.

Left to others: what the columns mean (`index.py`, `pairs.py`).
"""

import json
import shutil
import tempfile
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

HEADER = "header.json"


class Columns:
    """Arrays by name, each mapped at its first use."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._mapped: dict[str, np.ndarray] = {}

    def __reduce__(self) -> tuple[type["Columns"], tuple[Path]]:
        return type(self), (self.folder,)

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._mapped:
            self._mapped[name] = _map_array(self.folder / f"{name}.npy", tuple(self.header["arrays"][name]["shape"]))
        return self._mapped[name]

    @cached_property
    def header(self) -> dict[str, Any]:
        """What was written beside the arrays."""
        return json.loads((self.folder / HEADER).read_text())


def write_columns(folder: Path, arrays: Mapping[str, np.ndarray], header: Mapping[str, Any]) -> None:
    """Write all arrays, then make them appear at `folder` at once; whatever stood there before is replaced."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name, array in arrays.items():
            np.save(unfinished / f"{name}.npy", array, allow_pickle=False)
        layout = {name: {"dtype": array.dtype.str, "shape": array.shape} for name, array in arrays.items()}
        (unfinished / HEADER).write_text(json.dumps({**header, "arrays": layout}, indent=1))
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
    return np.load(path, mmap_mode="r", allow_pickle=False)
