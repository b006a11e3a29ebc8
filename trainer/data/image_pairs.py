"""The source of pairs from a plain folder: a list of two image paths a line, relative to the folder.

Blank lines and those that begin with # are passed over. Nothing is known about cameras here, so both windows are drawn
independently, as in CroCo, and every line counts as a scene of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from trainer.config.data import AugmentConfig, ImagePairsData
from trainer.data.decode import decode_window, read_bytes, read_size, split_colours
from trainer.data.read_ahead import waiting
from trainer.data.source import Room, Sample, new_room
from trainer.data.transforms import draw_colours, draw_window, place_window
from trainer.errors import DataError

_VIEWS = ("target", "reference")


@dataclass(frozen=True)
class ImagePairSource:
    """Image pairs by number."""

    config: ImagePairsData
    paths: np.ndarray
    """(pairs, 2) bytes: one block of memory that forked workers share."""
    numbers: np.ndarray
    """Line of each pair in its list, from 1."""
    augment: AugmentConfig | None

    offers = frozenset({"target_images", "reference_images", "target_colours", "reference_colours", "scene"})

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """As Source has it."""
        return f"line {self.numbers[index]} {self.paths[index, 0].decode()}"

    def describe(self) -> dict[str, float | int | str]:
        """As Source has it."""
        return {"kind": self.config.kind, "root": str(self.config.root), "samples": len(self)}

    def load(self, index: int, rng: np.random.Generator, room: Room = new_room) -> Sample:
        """As Source has it."""
        is_mirrored = bool(self.augment and rng.random() < self.augment.flip_probability)
        target, reference = (
            self._read(index, view, is_mirrored, rng, partial(room, f"{name}_images")) for view, name in enumerate(_VIEWS)
        )
        jitter = self.augment.colour_jitter if self.augment else 0.0
        return {
            "target_images": target,
            "reference_images": reference,
            "target_colours": draw_colours(jitter, rng),
            "reference_colours": draw_colours(jitter, rng),
            "scene": np.array(self.numbers[index], dtype=np.int64),
        }

    def _read(
        self, index: int, view: int, is_mirrored: bool, rng: np.random.Generator, room: Callable[[tuple[int, ...]], np.ndarray]
    ) -> np.ndarray:
        """One image as (1, 1, 3, H, W)."""
        path, clip = self.config.root / self.paths[index, view].decode(), self.name(index)
        with waiting():
            data = read_bytes(path, clip=clip)
        size_px = read_size(data, clip=clip, file=str(path))
        out_size_px = (self.config.clip.width_px, self.config.clip.height_px)
        if self.augment is None:
            window = place_window(size_px, out_size_px)
        else:
            crop_share = self.augment.crop_share
            window = draw_window(size_px, out_size_px, crop_share=crop_share, is_mirrored=is_mirrored, rng=rng)
        image = decode_window(data, window, size_px=size_px, clip=clip, file=str(path))
        planes = room((1, 1, 3, *image.shape[:2]))
        split_colours(image, planes[0, 0])
        return planes


def read_image_pairs(config: ImagePairsData, list_name: str, augment: AugmentConfig | None) -> ImagePairSource:
    """The pairs of `list_name`; DataError with the line at fault."""
    path = config.root / list_name
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"the list of image pairs {path} was to be read and cannot be: {error}; "
            "write it with two paths a line, or set data.root, data.train_list and data.val_list"
        ) from error
    kept = [(number, line) for number, line in enumerate(lines, start=1) if line.strip() and line.lstrip()[0] != "#"]
    if not kept:
        raise DataError(f"{path} was to list image pairs and has none in its {len(lines)} lines; write two paths a line")
    paths = np.array([_split_line(path, number, line) for number, line in kept], dtype=np.bytes_)
    return ImagePairSource(config, paths, np.array([number for number, _ in kept]), augment)


def _split_line(path: Path, number: int, line: str) -> tuple[bytes, bytes]:
    words = line.encode().split()
    if len(words) != 2:
        raise DataError(
            f"{path} line {number} was to name two images and has {len(words)} columns: {line.strip()!r}; "
            "write two paths without spaces, relative to the folder, with a space between them"
        )
    return words[0], words[1]
