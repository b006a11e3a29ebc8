"""Files: the bytes behind the rows of an index, wherever they lie.

Rows of one clip are asked for together, so that a place where they are neighbours can bring them at once.

Left to others: shards of a store (`shards/reading.py`), what the bytes mean (`decode.py`, `surround_source.py`).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from trainer.data.columns import Columns
from trainer.data.decode import read_bytes
from trainer.data.read_ahead import waiting


@runtime_checkable
class Files(Protocol):
    """Images and LiDAR sweeps by their row in the index."""

    def read_images(self, rows: Int[np.ndarray, " K"], *, clip: str) -> list[bytes]:
        """The image files of `rows`, byte for byte. ClipError where one is missing, cut short or damaged."""
        ...

    def read_sweeps(self, rows: Int[np.ndarray, " K"], *, clip: str) -> list[bytes]:
        """The LiDAR files of `rows`, as `read_images` has it."""
        ...

    def name_image(self, row: int) -> str:
        """Where an image lies, for messages."""
        ...

    def name_sweep(self, row: int) -> str:
        """Where a sweep lies, for messages."""
        ...


@dataclass(frozen=True)
class LooseFiles:
    """The files of a dataroot."""

    columns: Columns

    def read_images(self, rows: Int[np.ndarray, " K"], *, clip: str) -> list[bytes]:
        """As Files has it."""
        with waiting():
            return [read_bytes(Path(self.name_image(int(row))), clip=clip) for row in rows]

    def read_sweeps(self, rows: Int[np.ndarray, " K"], *, clip: str) -> list[bytes]:
        """As Files has it."""
        with waiting():
            return [read_bytes(Path(self.name_sweep(int(row))), clip=clip) for row in rows]

    def name_image(self, row: int) -> str:
        """As Files has it."""
        return f"{self.columns.header['root']}/{self.columns['image_file'][row].decode()}"

    def name_sweep(self, row: int) -> str:
        """As Files has it."""
        return f"{self.columns.header['root']}/{self.columns['sweep_file'][row].decode()}"
