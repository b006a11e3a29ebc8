"""Contact sheets: what an objective was given, what it made of it and what was there, as one PNG for a person.

    columns   what the objective drew, in its order, titled: masked input | reconstruction | target | reference
    rows      the frames of a clip below each other, time running down; a wider gap and a number where the next clip begins

A clip with more than MAX_FRAMES frames shows that many of them, evenly spread, the first and the last included. Small images
are enlarged by a whole factor without smoothing, so that what the model works on is seen as it is; large ones are reduced.
Pixels that are not finite are magenta.

Left to whom: the objectives draw, the loop says when, `trainer.store` keeps the files.
"""

import io
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import ceil

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from trainer.observe.report import Sheets, SilentObserver
from trainer.store.base import Store

log = logging.getLogger(__name__)

MAX_FRAMES = 2
"""Of each clip; frames lie a fraction of a second apart, and a sheet should fit a screen."""
MIN_WIDTH_PX, MAX_WIDTH_PX = 900, 2000
"""Between these lies the width of the images of one row, unless a single factor cannot bring it there."""
MARGIN_PX, FRAME_GAP_PX, CLIP_GAP_PX, LABEL_PX, LINE_PX, TITLE_PX = 16, 4, 20, 84, 26, 15

_BACKGROUND, _INK, _FAINT, _BROKEN = (255, 255, 255), (25, 25, 25), (110, 110, 110), (255, 0, 255)


class Pictures(SilentObserver):
    """Writes a sheet per objective to pictures/ in `store`."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def pictures(self, step: int, sheets: Sheets) -> None:
        """See Observer."""
        for objective, columns in sheets.items():
            key = f"pictures/step-{step:06d}-{objective}.png"
            file = io.BytesIO()
            draw_sheet(columns, caption=f"{objective} after step {step}").save(file, "PNG", optimize=True)
            self._store.put(key, file.getvalue())
            log.info("picture: %s/%s", self._store.uri, key)


@dataclass(frozen=True)
class Layout:
    """Where things lie on a sheet, all in pixels; images of all columns share the height of a row."""

    widths: tuple[int, ...]
    """Of images."""
    slots: tuple[int, ...]
    """Of columns: a title may be wider than what stands below it."""
    row_height: int
    clips: int
    frames: int

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the sheet."""
        right, bottom = (
            self.left(len(self.slots) - 1) + self.slots[-1],
            self.top(self.clips - 1, self.frames - 1) + self.row_height,
        )
        return right + MARGIN_PX, bottom + MARGIN_PX

    def left(self, column: int) -> int:
        """Left edge of a column."""
        return MARGIN_PX + LABEL_PX + sum(self.slots[:column]) + column * FRAME_GAP_PX

    def top(self, clip: int, row: int) -> int:
        """Top edge of the row `row` of clip `clip`; above the first are caption and titles."""
        clip_height = self.frames * (self.row_height + FRAME_GAP_PX) - FRAME_GAP_PX + CLIP_GAP_PX
        return MARGIN_PX + 2 * LINE_PX + clip * clip_height + row * (self.row_height + FRAME_GAP_PX)


def draw_sheet(columns: Mapping[str, np.ndarray], *, caption: str) -> Image.Image:
    """One contact sheet of images B T 3 H W by title; a column with T = 1 is shown beside the first frame."""
    clips, frames = (max(images.shape[axis] for images in columns.values()) for axis in (0, 1))
    rows = spread_frames(frames)
    layout = lay_out({title: images.shape[-2:] for title, images in columns.items()}, clips=clips, frames=len(rows))
    sheet = Image.new("RGB", layout.size, _BACKGROUND)
    _write_words(sheet, layout, list(columns), rows, caption=f"{caption}: {_explain(clips, frames, len(rows))}")
    for column, images in enumerate(columns.values()):
        for clip, clip_images in enumerate(images):
            for row, frame in enumerate(rows):
                if frame < len(clip_images):
                    size = layout.widths[column], layout.row_height
                    sheet.paste(_to_image(clip_images[frame], size), (layout.left(column), layout.top(clip, row)))
    return sheet


def spread_frames(frames: int) -> list[int]:
    """At most MAX_FRAMES of the frame numbers, evenly spread, first and last included."""
    return sorted({int(place) for place in np.linspace(0, frames - 1, min(frames, MAX_FRAMES)).round()})


def lay_out(sizes: Mapping[str, tuple[int, ...]], *, clips: int, frames: int) -> Layout:
    """The layout for images of H W `sizes` by title, enlarged or reduced so that a row is a good width."""
    height = max(height for height, _ in sizes.values())
    width = sum(width * height / own_height for own_height, width in sizes.values())
    factor = ceil(MIN_WIDTH_PX / width) if width < MIN_WIDTH_PX else min(1.0, MAX_WIDTH_PX / width)
    row_height = max(1, round(height * factor))
    widths = tuple(max(1, round(width * row_height / own_height)) for own_height, width in sizes.values())
    slots = tuple(max(width, ceil(_font(TITLE_PX).getlength(title))) for title, width in zip(sizes, widths, strict=True))
    return Layout(widths, slots, row_height, clips, frames)


def _to_image(pixels: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """Pixels 3 H W in [0, 1] as an image of `size`."""
    shown = np.moveaxis(pixels, 0, -1)
    finite = np.isfinite(shown).all(axis=-1, keepdims=True)
    colours = np.where(finite, (np.nan_to_num(shown).clip(0, 1) * 255).round(), _BROKEN).astype(np.uint8)
    image = Image.fromarray(colours)
    enlarged = size[0] >= image.width
    return image.resize(size, Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS)


def _write_words(sheet: Image.Image, layout: Layout, titles: list[str], rows: list[int], *, caption: str) -> None:
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN_PX, MARGIN_PX), caption, fill=_INK, font=_font(16))
    for column, title in enumerate(titles):
        draw.text((layout.left(column), MARGIN_PX + LINE_PX + 4), title, fill=_INK, font=_font(TITLE_PX))
    for clip in range(layout.clips):
        for row, frame in enumerate(rows):
            top = layout.top(clip, row)
            if row == 0:
                draw.text((MARGIN_PX, top), f"clip {clip + 1}", fill=_INK, font=_font(15))
            if len(rows) > 1:
                draw.text((MARGIN_PX, top + 20), f"frame {frame + 1}", fill=_FAINT, font=_font(13))


def _explain(clips: int, frames: int, shown: int) -> str:
    if frames == 1:
        return f"{clips} clips" if clips > 1 else "1 clip"
    which = f"all {frames}" if shown == frames else f"{shown} of {frames}"
    return f"{clips} clips, {which} frames of each from top to bottom"


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
