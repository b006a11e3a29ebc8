"""From the bytes of an image file to the pixels of a window.

A JPEG is decoded at the smallest of its own scales (1, 1/2, 1/4, 1/8 of the discrete cosine transform) at which the
window still covers the output, and cropping and resizing are then one step, with a filter that averages over what it
shrinks. Pillow does it all: measured on nuScenes' 1600 x 900 JPEGs, OpenCV and simplejpeg save at most half of a decode
that takes 2 to 7 ms, and OpenCV returns a truncated file as a picture with a grey rest.

What cannot be read becomes a ClipError, which the loader replaces and counts.
"""

import io
import struct
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageFile

from trainer.data.transforms import Window
from trainer.errors import ClipError

ImageFile.LOAD_TRUNCATED_IMAGES = False
"""Pillow's default; a library that turned it on would have us train on half-grey pictures."""

_JPEG_SCALES = (8, 4, 2)

_UNREADABLE = (OSError, SyntaxError, ValueError, IndexError, struct.error, Image.DecompressionBombError)
"""What Pillow's decoders raise on bytes that are no whole image."""


def read_window(path: Path, window: Window, *, size_px: tuple[int, int], clip: str) -> UInt8[np.ndarray, "H W 3"]:
    """The pixels of `window` in the image at `path`, which has to be `size_px` wide and high."""
    return decode_window(read_bytes(path, clip=clip), window, size_px=size_px, clip=clip, file=str(path))


def read_bytes(path: Path, *, clip: str) -> bytes:
    """A whole file; ClipError where that is not possible."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ClipError(clip, f"{path} cannot be read: {error.strerror or error}") from error


def read_size(data: bytes, *, clip: str, file: str) -> tuple[int, int]:
    """Width and height, from the first bytes of the file."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.size
    except _UNREADABLE as error:
        raise ClipError(clip, f"{file} is no image: {error}") from error


def decode_window(data: bytes, window: Window, *, size_px: tuple[int, int], clip: str, file: str) -> UInt8[np.ndarray, "H W 3"]:
    """As `read_window`, from bytes; `file` is named in the error."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.size != size_px:
                raise ClipError(clip, f"{file} is {image.size} pixels wide and high and was to be {size_px}")
            pixels = _resize(image, window)
    except _UNREADABLE as error:
        raise ClipError(clip, f"{file} is no whole image ({len(data)} bytes): {error}") from error
    array = np.asarray(pixels)
    return np.ascontiguousarray(array[:, ::-1]) if window.is_mirrored else array


def shrink(image: Image.Image, window: Window) -> int:
    """Tell a JPEG decoder the largest divisor of the size at which `window` still covers its output, and return it."""
    enlarged = min(window.source_width_px / window.width_px, window.source_height_px / window.height_px)
    scale = next((scale for scale in _JPEG_SCALES if scale <= enlarged + 1e-6), 1)
    drafted = image.draft(None, (image.width // scale, image.height // scale))
    return scale if drafted else 1


def _resize(image: Image.Image, window: Window) -> Image.Image:
    scale = shrink(image, window)
    left, top, right, bottom = (side / scale for side in window.box)
    box = (left, top, min(right, image.width), min(bottom, image.height))  # else a rounding error is an error of Pillow
    size = (window.width_px, window.height_px)
    coloured = image if image.mode == "RGB" else image.convert("RGB")  # which copies where there is nothing to convert
    return coloured.resize(size, Image.Resampling.BILINEAR, box=box, reducing_gap=3.0)
