"""Windows and colours: what augmentation does to the pixels of a clip and, with them, to its intrinsics.

A window is a rectangle of source pixels that becomes the output image, mirrored or not. Since pixel centres lie at
+0.5, it maps corners to corners and scaling the intrinsics is exact. One window and one set of colour factors hold for
all frames of a clip, each view has its own (CroCo draws both views' crops and colours independently and always).

We differ from torchvision's ColorJitter in one place: contrast pulls towards the mean grey of the whole clip, not of
each frame, so that colours do not flicker. Hue stays, as in CroCo.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8

_GREY = np.array([0.299, 0.587, 0.114], dtype=np.float32)
"""Rec. 601 luma, as JPEG and Pillow have it."""


@dataclass(frozen=True)
class Window:
    """A rectangle of the source, in its pixels from its top-left corner, and the image it becomes."""

    left_px: float
    top_px: float
    source_width_px: float
    source_height_px: float
    width_px: int
    height_px: int
    is_mirrored: bool = False

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom."""
        return self.left_px, self.top_px, self.left_px + self.source_width_px, self.top_px + self.source_height_px

    @property
    def out_from_source(self) -> Float[np.ndarray, "3 3"]:
        """Homogeneous pixels of the output from those of the source."""
        scale_x, scale_y = self.width_px / self.source_width_px, self.height_px / self.source_height_px
        scaled = np.array([[scale_x, 0, -scale_x * self.left_px], [0, scale_y, -scale_y * self.top_px], [0, 0, 1]])
        mirror = np.array([[-1.0, 0, self.width_px], [0, 1, 0], [0, 0, 1]])
        return mirror @ scaled if self.is_mirrored else scaled


def move_intrinsics(pix_from_cam: Float[np.ndarray, "*n 3 3"], window: Window) -> Float[np.ndarray, "*n 3 3"]:
    """Intrinsics of the window's output; a mirrored one has a negative focal length in x."""
    return window.out_from_source @ pix_from_cam


def largest_window(source_size_px: tuple[int, int], out_size_px: tuple[int, int]) -> tuple[float, float]:
    """Width and height of the largest rectangle in the source that has the aspect ratio of the output."""
    (source_width, source_height), (width, height) = source_size_px, out_size_px
    scale = min(source_width / width, source_height / height)
    return width * scale, height * scale


def place_window(
    source_size_px: tuple[int, int],
    out_size_px: tuple[int, int],
    *,
    share: float = 1.0,
    place: tuple[float, float] = (0.5, 0.5),
    is_mirrored: bool = False,
) -> Window:
    """`share` of the largest window, at `place` from (0, 0) top left to (1, 1) bottom right; centred if not told."""
    width, height = (share * side for side in largest_window(source_size_px, out_size_px))
    left = place[0] * max(source_size_px[0] - width, 0)
    top = place[1] * max(source_size_px[1] - height, 0)
    return Window(left, top, width, height, *out_size_px, is_mirrored)


def draw_window(
    source_size_px: tuple[int, int],
    out_size_px: tuple[int, int],
    *,
    crop_share: tuple[float, float],
    is_mirrored: bool,
    rng: np.random.Generator,
) -> Window:
    """A window of uniform size within `crop_share` at a uniform place."""
    share, across, down = rng.uniform((crop_share[0], 0, 0), (crop_share[1], 1, 1)).tolist()
    return place_window(source_size_px, out_size_px, share=share, place=(across, down), is_mirrored=is_mirrored)


def jitter_colours(
    images: UInt8[np.ndarray, "*frames H W 3"], strength: float, rng: np.random.Generator
) -> UInt8[np.ndarray, "*frames H W 3"]:
    """Brightness, contrast and saturation in random order, each by a factor uniform in 1 - strength to 1 + strength."""
    if strength == 0:
        return images
    colours = images.astype(np.float32)
    factors = rng.uniform(1 - strength, 1 + strength, size=3).astype(np.float32)
    for change in rng.permutation(3):
        colours = np.clip(_CHANGES[change](colours, factors[change]), 0, 255)
    return np.round(colours).astype(np.uint8)


def _brighten(colours: np.ndarray, factor: np.float32) -> np.ndarray:
    return colours * factor


def _contrast(colours: np.ndarray, factor: np.float32) -> np.ndarray:
    return colours * factor + (colours @ _GREY).mean() * (1 - factor)


def _saturate(colours: np.ndarray, factor: np.float32) -> np.ndarray:
    keep_or_grey = factor * np.eye(3, dtype=np.float32) + (1 - factor) * _GREY[:, None]
    return colours @ keep_or_grey


_CHANGES = (_brighten, _contrast, _saturate)
