"""Windows and colours: what augmentation draws for a clip, and what a window does to its intrinsics.

A window is a rectangle of source pixels that becomes the output image, mirrored or not. Since pixel centres lie at
+0.5, it maps corners to corners and scaling the intrinsics is exact. One window and one set of colour factors hold for
all frames of a clip, each view has its own (CroCo draws both views' crops and colours independently and always).

A drawn window lies on whole pixels of the picture as it will be decoded: cropping then is free, where reading between pixels costs
a third of a decode. It moves a random place by half such a pixel at most, and the intrinsics follow.

Left to others: cutting windows out (`decode.py`), what colour factors do to pixels (`models/images.py`).
"""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Float32

_SHRINKS = (8, 4, 2)
"""What a JPEG decoder can divide the size by for less than whole; thirds and the like cost it more than the whole picture."""


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
    def shrink(self) -> int:
        """The largest divisor of the source's size at which a decoder still gives every pixel of the output one of its own."""
        enlarged = min(self.source_width_px / self.width_px, self.source_height_px / self.height_px)
        return next((divisor for divisor in _SHRINKS if divisor <= enlarged + 1e-6), 1)

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
    """A window of uniform size within `crop_share` at a uniform place, on whole pixels of what is decoded."""
    share, across, down = rng.uniform((crop_share[0], 0, 0), (crop_share[1], 1, 1)).tolist()
    window = place_window(source_size_px, out_size_px, share=share, place=(across, down), is_mirrored=is_mirrored)
    return snap_window(window, source_size_px)


def snap_window(window: Window, source_size_px: tuple[int, int]) -> Window:
    """The window next to `window` whose sides lie between pixels of the decoded picture; it still covers the output."""
    step = window.shrink
    left, width = _snap(window.left_px, window.source_width_px, source_size_px[0], step)
    top, height = _snap(window.top_px, window.source_height_px, source_size_px[1], step)
    return replace(window, left_px=left, top_px=top, source_width_px=width, source_height_px=height)


def _snap(first: float, length: float, available: int, step: int) -> tuple[float, float]:
    """Both as multiples of `step`, within what is available."""
    steps = max(1, min(round(length / step), available // step))
    begin = min(round(first / step), available // step - steps)
    return float(step * begin), float(step * steps)


def draw_colours(strength: float, rng: np.random.Generator) -> Float32[np.ndarray, "3"]:
    """Factors of brightness, contrast and saturation, each uniform in 1 - strength to 1 + strength; the pixels change on the device."""
    if strength == 0:
        return np.ones(3, dtype=np.float32)
    return rng.uniform(1 - strength, 1 + strength, size=3).astype(np.float32)
