"""From the bytes of an image file to the pixels of a window.

A JPEG is decoded by libjpeg-turbo (simplejpeg brings it) at the smallest of the scales 1, 1/2, 1/4 and 1/8 at which the window still
covers the output, and what is left is one resize by less than two, which needs no filter beyond linear. Where a window lies on
whole pixels of the decoded picture, OpenCV's resize of that part is exact; anywhere else its affine map is, three times as
slow. Only what is still more than twice too large goes through Pillow's filter, which averages over what it shrinks.
The part in the window alone is not decoded: no well-kept package that brings its library offers that, and a JPEG's entropy coding,
most of the work at reduced scales, has to be read from its beginning anyhow.

Colour between samples of chroma is repeated rather than interpolated: 0.15 grey levels on average, for a tenth of a whole decode.
The decoder is strict, where OpenCV returns a truncated file as a picture with a grey rest. What is no plain JPEG (PNG, CMYK, odd
sampling) is read by Pillow. What cannot be read becomes a ClipError, which the loader replaces and counts.
"""

import contextlib
import io
import math
import struct
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image, ImageFile

from trainer.data.counting import count, counting_seconds
from trainer.data.transforms import Window
from trainer.errors import ClipError

ImageFile.LOAD_TRUNCATED_IMAGES = False
"""Pillow's default; a library that turned it on would have us train on half-grey pictures."""

cv2.setNumThreads(0)  # its pool of threads does not survive the fork of loader workers, each of which has one core anyhow

_PLAIN = ("YCbCr", "Gray", "RGB")
"""Colour spaces of JPEGs that libjpeg-turbo turns into RGB."""

_WHOLE_PX = 1e-3
"""Nearer to a whole pixel than this is rounding."""

_UNREADABLE = (OSError, SyntaxError, ValueError, IndexError, struct.error, Image.DecompressionBombError)
"""What decoders raise on bytes that are no whole image."""

Decoded = UInt8[np.ndarray, "rows columns 3"]
"""A whole picture, perhaps smaller."""
Pixels = UInt8[np.ndarray, "H W 3"]
"""What a window shows."""


def read_bytes(path: Path, *, clip: str) -> bytes:
    """A whole file; ClipError where that is not possible."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ClipError(clip, f"{path} cannot be read: {error.strerror or error}") from error
    count("files")
    count("bytes", float(len(data)))
    return data


def read_size(data: bytes, *, clip: str, file: str) -> tuple[int, int]:
    """Width and height, from the first bytes of the file."""
    try:
        return _look_at(data)[0]
    except _UNREADABLE as error:
        raise ClipError(clip, f"{file} is no image: {error}") from error


def decode_window(data: bytes, window: Window, *, size_px: tuple[int, int], clip: str, file: str) -> Pixels:
    """The pixels of `window` in an image that has to be `size_px` wide and high; `file` is named in the error."""
    try:
        found_px, is_plain_jpeg = _look_at(data)
        if found_px != size_px:
            raise ClipError(clip, f"{file} is {found_px} pixels wide and high and was to be {size_px}")
        with counting_seconds("decode_seconds"):
            pixels = _cut_out(_decode_jpeg(data, size_px, window.shrink), window) if is_plain_jpeg else _read_other(data, window)
    except _UNREADABLE as error:
        raise ClipError(clip, f"{file} is no whole image ({len(data)} bytes): {error}") from error
    return cv2.flip(pixels, 1) if window.is_mirrored else pixels


def split_colours(pixels: Pixels, planes: UInt8[np.ndarray, "3 H W"]) -> None:
    """Write colours into planes of their own, as the encoder wants them; seven times as fast as numpy's copy of a moved axis."""
    cv2.split(pixels, list(planes))


def _look_at(data: bytes) -> tuple[tuple[int, int], bool]:
    """Width and height, and whether libjpeg-turbo makes RGB of it."""
    with contextlib.suppress(ValueError):
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours in _PLAIN:
            return (width, height), True
    with Image.open(io.BytesIO(data)) as image:
        return image.size, False


def _decode_jpeg(data: bytes, size_px: tuple[int, int], shrink: int) -> Decoded:
    width, height = (math.ceil(side / shrink) for side in size_px)
    return simplejpeg.decode_jpeg(data, "RGB", fastupsample=True, min_width=width, min_height=height)


def _cut_out(pixels: Decoded, window: Window) -> Pixels:
    """`window` of a source that was decoded at 1 / window.shrink."""
    left, top, right, bottom = (side / window.shrink for side in window.box)
    size = (window.width_px, window.height_px)
    scale_x, scale_y = (right - left) / size[0], (bottom - top) / size[1]
    if max(scale_x, scale_y) > 2:
        return _resize(Image.fromarray(pixels), (left, top, right, bottom), size)
    whole = [round(side) for side in (left, top, right, bottom)]
    if max(abs(side - near) for side, near in zip((left, top, right, bottom), whole, strict=True)) < _WHOLE_PX:
        part = pixels[whole[1] : whole[3], whole[0] : whole[2]]
        return cv2.resize(part, size, interpolation=cv2.INTER_LINEAR)
    # OpenCV counts from the middle of the first pixel, we from its corner.
    in_from_out = np.array([[scale_x, 0, left + scale_x / 2 - 0.5], [0, scale_y, top + scale_y / 2 - 0.5]])
    how = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(pixels, in_from_out, size, flags=how, borderMode=cv2.BORDER_REPLICATE)


def _read_other(data: bytes, window: Window) -> Pixels:
    with Image.open(io.BytesIO(data)) as image:
        coloured = image if image.mode == "RGB" else image.convert("RGB")  # which copies where there is nothing to convert
        return _resize(coloured, window.box, (window.width_px, window.height_px))


def _resize(image: Image.Image, box: tuple[float, float, float, float], size: tuple[int, int]) -> Pixels:
    left, top, right, bottom = box
    inside = (left, top, min(right, image.width), min(bottom, image.height))  # else a rounding error is an error of Pillow
    return np.asarray(image.resize(size, Image.Resampling.BILINEAR, box=inside, reducing_gap=3.0))
