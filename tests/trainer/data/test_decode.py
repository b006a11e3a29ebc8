"""Decoding: the window's pixels and no others, at a scale that suffices, and a ClipError for anything unreadable."""

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.trainer.data.dataroot import ramp, read_ramp
from trainer.data.decode import decode_window, read_bytes, read_size, split_colours
from trainer.data.transforms import Window, draw_window, place_window
from trainer.errors import ClipError

WIDTH, HEIGHT = 199, 113  # divisible by none of JPEG's scales


def encode(picture: np.ndarray, kind: str = "JPEG") -> bytes:
    data = io.BytesIO()
    Image.fromarray(picture).save(data, kind, **({"quality": 97, "subsampling": 0} if kind == "JPEG" else {}))
    return data.getvalue()


def texture(width: int, height: int) -> np.ndarray:
    """Blobs of several sizes: what a camera sees has little at the finest scale."""
    rng = np.random.default_rng(0)
    layers = [Image.fromarray(rng.integers(0, 256, (side, 2 * side, 3), dtype=np.uint8)) for side in (4, 9, 24)]
    layers = [np.asarray(layer.resize((width, height), Image.Resampling.BICUBIC), dtype=float) for layer in layers]
    return np.clip(np.mean(layers, axis=0), 0, 255).astype(np.uint8)


RAMPS = {kind: encode(ramp(WIDTH, HEIGHT), kind) for kind in ("JPEG", "PNG")}
TEXTURE = encode(texture(WIDTH, HEIGHT))
WHOLE_BLOCKS = encode(texture(208, 120))  # at the edge of a cut block the scales of JPEG differ, and rightly
windows = st.builds(
    lambda seed, width, height, least, is_mirrored: draw_window(
        (WIDTH, HEIGHT),
        (width, height),
        crop_share=(least, 1.0),
        is_mirrored=is_mirrored,
        rng=np.random.default_rng(seed),
    ),
    st.integers(0, 2**32 - 1),
    st.integers(8, 90),
    st.integers(8, 60),
    st.floats(0.2, 1.0),
    st.booleans(),
)


def decode(data: bytes, window: Window, size_px: tuple[int, int] = (WIDTH, HEIGHT)) -> np.ndarray:
    return decode_window(data, window, size_px=size_px, clip="scene-1 7 CAM", file="a.jpg")


def source_pixels(window: Window) -> np.ndarray:
    """(H W, 2) source pixels that the centres of the output's pixels stand for."""
    u, v = np.meshgrid(np.arange(window.width_px) + 0.5, np.arange(window.height_px) + 0.5)
    source = np.linalg.inv(window.out_from_source) @ np.stack([u.ravel(), v.ravel(), np.ones(u.size)])
    return source[:2].T


@given(windows, st.sampled_from(["JPEG", "PNG"]))
def test_every_output_pixel_shows_the_source_pixel_that_the_intrinsics_say(window: Window, kind: str) -> None:
    pixels = decode(RAMPS[kind], window)
    assert pixels.shape == (window.height_px, window.width_px, 3)
    source = source_pixels(window)
    inner = ((source > 8) & (source < (WIDTH - 8, HEIGHT - 8))).all(-1)  # filters are cut at the picture's edge
    error_px = (read_ramp(pixels, WIDTH, HEIGHT).reshape(-1, 2) - source)[inner]
    assert (np.abs(error_px) < 3.5 / 175 * np.array([WIDTH, HEIGHT])).all(), "some grey levels of rounding and compression"


@pytest.mark.parametrize(("scale", "size"), [(1, (150, 85)), (2, (99, 56)), (4, (49, 28)), (8, (24, 13))])
@pytest.mark.parametrize("is_mirrored", [False, True])
def test_no_scale_shifts_the_picture(scale: int, size: tuple[int, int], is_mirrored: bool) -> None:
    window = place_window((WIDTH, HEIGHT), size, place=(1.0, 1.0), is_mirrored=is_mirrored)
    assert window.shrink == scale
    seen = read_ramp(decode(RAMPS["JPEG"], window), WIDTH, HEIGHT).reshape(-1, 2)
    error_px = seen - source_pixels(window)
    # Pixel by pixel rounding hides a shift, on average it does not: half a pixel lost at scale 8 would be 4 here.
    assert np.abs(error_px.mean(0)).max() < 0.25


@pytest.mark.parametrize("size", [(150, 85), (99, 56), (49, 28), (24, 13)])
@pytest.mark.parametrize("left_px", [30.0, 30.25, 30.5, 30.75, 31.0])
def test_a_window_between_pixels_shows_what_lies_there(size: tuple[int, int], left_px: float) -> None:
    window = Window(left_px, 9.6, 150.0, 85.0, *size)
    seen = read_ramp(decode(RAMPS["JPEG"], window), WIDTH, HEIGHT).reshape(-1, 2)
    error_px = (seen - source_pixels(window)).mean(0)
    # A grey level of the ramp is 1.1 px wide and 0.6 px high; rounding it averages out over the picture.
    assert np.abs(error_px).max() < 0.12


def test_windows_on_and_between_pixels_are_cut_alike() -> None:
    """The two ways of OpenCV agree where they meet."""
    on, beside = (Window(left_px, 16.0, 160.0, 90.0, 75, 40) for left_px in (24.0, 24.05))
    difference = decode(WHOLE_BLOCKS, on, (208, 120)).astype(int) - decode(WHOLE_BLOCKS, beside, (208, 120))
    assert np.abs(difference).max() <= 4 and abs(difference.mean()) < 0.2


@given(windows)
def test_decoding_small_is_decoding_whole_and_resizing_within_a_few_grey_levels(window: Window) -> None:
    small = decode(WHOLE_BLOCKS, window, (208, 120)).astype(int)
    whole = Image.open(io.BytesIO(WHOLE_BLOCKS)).convert("RGB")
    size = (window.width_px, window.height_px)
    resized = np.asarray(whole.resize(size, Image.Resampling.BILINEAR, box=window.box)).astype(int)
    resized = resized[:, ::-1] if window.is_mirrored else resized
    assert np.abs(small - resized).mean() < 6  # of 256; an eighth of the size is block means, not a triangle filter


@pytest.mark.parametrize("factor", [4, 9, 15, 20])
def test_stripes_as_fine_as_pixels_become_grey_however_much_smaller_they_get(factor: int) -> None:
    stripes = np.zeros((30 * factor, 40 * factor, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    source = (40 * factor, 30 * factor)
    shown = decode(encode(stripes), place_window(source, (40, 30)), source)
    assert np.abs(shown.astype(int) - 127).max() < 12


@pytest.mark.parametrize(
    ("mode", "kind"), [("L", "PNG"), ("RGBA", "PNG"), ("P", "PNG"), ("CMYK", "TIFF"), ("L", "JPEG"), ("CMYK", "JPEG")]
)
def test_pictures_of_other_colour_modes_become_rgb(mode: str, kind: str) -> None:
    picture, data = Image.fromarray(ramp(WIDTH, HEIGHT)), io.BytesIO()
    picture.convert(mode).save(data, kind)
    window = place_window((WIDTH, HEIGHT), (20, 10))
    assert read_size(data.getvalue(), clip="c", file="f") == (WIDTH, HEIGHT)
    expected = np.asarray(picture.convert(mode).convert("RGB").resize((20, 10), Image.Resampling.BILINEAR, box=window.box))
    assert np.abs(decode(data.getvalue(), window).astype(int) - expected).mean() < 4


def test_a_jpeg_with_bytes_of_another_file_in_it_is_no_picture() -> None:
    """Pillow and OpenCV show such a file with a few wrong blocks in it."""
    damaged = TEXTURE[: len(TEXTURE) // 2] + b"\x00\x00\xff\xd9" + TEXTURE[len(TEXTURE) // 2 :]
    with pytest.raises(ClipError, match="is no whole image"):
        decode(damaged, place_window((WIDTH, HEIGHT), (20, 10)))


def test_colours_in_planes_are_the_same_colours() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    planes = np.empty((2, 3, 5, 7), dtype=np.uint8)
    split_colours(pixels, planes[1])
    np.testing.assert_array_equal(planes[1], np.moveaxis(pixels, -1, 0))


@given(st.integers(0, len(TEXTURE) - 3), st.sampled_from(["JPEG", "PNG"]))
def test_a_truncated_file_is_never_a_picture(length: int, kind: str) -> None:
    data = TEXTURE if kind == "JPEG" else RAMPS["PNG"]
    cut = data[: min(length, len(data) // 2)] if kind == "PNG" else data[:length]
    with pytest.raises(ClipError, match=r"scene-1 7 CAM: a\.jpg is no whole image"):
        decode(cut, place_window((WIDTH, HEIGHT), (20, 10)))


@given(st.integers(0, len(TEXTURE) - 1), st.binary(min_size=1, max_size=8))
def test_damaged_bytes_are_a_picture_or_a_clip_error_and_nothing_else(place: int, damage: bytes) -> None:
    data = TEXTURE[:place] + damage + TEXTURE[place + len(damage) :]
    with contextlib.suppress(ClipError):
        assert decode(data, place_window((WIDTH, HEIGHT), (20, 10))).shape == (10, 20, 3)


def test_a_file_that_is_missing_a_folder_or_of_another_size_is_named_with_its_clip(tmp_path: Path) -> None:
    window = place_window((WIDTH, HEIGHT), (20, 10))
    assert decode_window(RAMPS["PNG"], window, size_px=(WIDTH, HEIGHT), clip="c", file="right.png").shape == (10, 20, 3)
    with pytest.raises(ClipError, match=r"clip c: right\.png is \(199, 113\) .* to be \(1600, 900\)"):
        decode_window(RAMPS["PNG"], window, size_px=(1600, 900), clip="c", file="right.png")
    with pytest.raises(ClipError, match=r"clip c: .*gone\.jpg cannot be read: No such file"):
        read_bytes(tmp_path / "gone.jpg", clip="c")
    with pytest.raises(ClipError, match="cannot be read: Is a directory"):
        read_bytes(tmp_path, clip="c")
