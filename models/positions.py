"""Where a token is: sin-cos or learned tables added to tokens, and rotary angles that turn queries and keys.

Tokens of a clip lie in the order (t, v, y, x), each with integer coordinates from 0.

Sin-cos: the fixed 2D table of MAE (He et al. 2022), whose first half of channels encodes x and second half y, each
[sin | cos]. Time and camera add 1D tables of the same kind less their value at 0, so a clip of one frame and one camera is
exactly an image.

Rotary (Su et al. 2021, in 2D by CroCo v2): the width of a head is split into one part an axis, y before x; in a part of
width d, element j turns with element j + d/2 by the angle p / base^(2j/d). A video encoder puts a part for time before
them: 2 (3D // 16) channels for each of y and x, the rest for time (24, 24 and 16 of 64). Cameras of one instant share their
angles. Sine and cosine are float32 whatever the tokens are: in bf16 an angle of 76 patches turns a value by 0.34 too far.

Learned: one vector for each (t, y, x), which cameras share; what most published ViTs have, so their weights can be taken in. A clip of
another grid gets the table resampled, bicubic over the image and linear over time (Dosovitskiy et al. 2021, section 3.2).
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn

from models.config import Grid, TransformerShape

FixedPositions = Literal["sincos", "rope"]
Positions = Literal["sincos", "rope", "learned"]

ROPE_BASE = 100.0


class Rotation(NamedTuple):
    """Cosine and sine of every token's angles, for `rotate`."""

    cos: Float[Tensor, "N 1 D"]
    sin: Float[Tensor, "N 1 D"]
    parts: tuple[int, ...]
    """Channels of a head that turn by each axis."""

    def of(self, tokens: Int[Tensor, "B N"] | None, batch: int) -> "Rotation":
        """The rotations of packed tokens: of `batch` whole clips, or of the `tokens` of each clip."""
        cos, sin = (take_tokens(table[:, 0], tokens, batch).flatten(0, 1)[:, None] for table in (self.cos, self.sin))
        return Rotation(cos, sin, self.parts)

    def after(self, still: int, batch: int) -> "Rotation":
        """The same after `still` tokens that do not turn, in each of `batch` clips."""
        cos, sin = (
            F.pad(table.unflatten(0, (batch, -1)), (0, 0, 0, 0, still, 0), value=value).flatten(0, 1)
            for table, value in ((self.cos, 1.0), (self.sin, 0.0))
        )
        return Rotation(cos, sin, self.parts)

    @classmethod
    def join(cls, rotations: "Sequence[Rotation]") -> "Rotation | None":
        """The rotations of one pack after another; none of none."""
        if not rotations:
            return None
        cos = torch.cat([rotation.cos for rotation in rotations])
        sin = torch.cat([rotation.sin for rotation in rotations])
        return cls(cos, sin, rotations[0].parts)


def take_tokens(table: Float[Tensor, "N C"], tokens: Int[Tensor, "B n"] | None, batch: int) -> Float[Tensor, "B n C"]:
    """Rows of `table` for the `tokens` of each clip, or all of them for each of `batch` clips."""
    if tokens is None:
        return table.expand(batch, -1, -1)
    return table[tokens]


@lru_cache(maxsize=64)
def coordinates(grid: Grid) -> Int[np.ndarray, "N 4"]:
    """(t, v, y, x) of each token."""
    axes = np.meshgrid(*(np.arange(size) for size in grid), indexing="ij")
    return np.stack(axes, axis=-1).reshape(-1, 4)


class LearnedTable(nn.Module):
    """A vector for each place of a clip, that of its `grid` but for cameras."""

    def __init__(self, grid: Grid, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(grid.t, grid.h, grid.w, width))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, grid: Grid) -> Float[Tensor, "N C"]:
        """What is added to the tokens of clips of `grid`."""
        table = resample_table(self.weight.float(), grid)
        return repeat(table, "t h w C -> (t v h w) C", v=grid.v)


def resample_table(table: Float[Tensor, "t1 h1 w1 C"], grid: Grid) -> Float[Tensor, "t h w C"]:
    """A learned table for clips of `grid`: as it is where that is its own."""
    if table.shape[1:3] != (grid.h, grid.w):
        images = rearrange(table, "t h w C -> t C h w")
        images = F.interpolate(images, size=(grid.h, grid.w), mode="bicubic", antialias=True, align_corners=False)
        table = rearrange(images, "t C h w -> t h w C")
    if len(table) != grid.t:
        series = rearrange(table, "t h w C -> (h w) C t")
        series = F.interpolate(series, size=grid.t, mode="linear", align_corners=False)
        table = rearrange(series, "(h w) C t -> t h w C", h=grid.h)
    return table


class PositionTables:
    """The fixed tables of one module, made once for each grid and device.

    The module keeps them, not the process: a model under fake tensors must leave nothing behind that a real one finds.
    """

    def __init__(self, kind: FixedPositions | None, shape: TransformerShape, *, has_time: bool) -> None:
        self.kind = kind
        self.shape = shape
        self.has_time = has_time
        self._added: dict[tuple[Grid, torch.device], Tensor] = {}
        self._rotations: dict[tuple[Grid, torch.device], Rotation] = {}

    def added(self, grid: Grid, device: torch.device) -> Float[Tensor, "N C"] | None:
        """What is added to tokens; none with other positions."""
        if self.kind != "sincos":
            return None
        if (grid, device) not in self._added:
            self._added[grid, device] = sincos_table(grid, self.shape.width, device)
        return self._added[grid, device]

    def rotation(self, grid: Grid, device: torch.device) -> Rotation | None:
        """By what queries and keys turn; none with other positions."""
        if self.kind != "rope":
            return None
        if (grid, device) not in self._rotations:
            head_width = self.shape.width // self.shape.heads
            self._rotations[grid, device] = rotary_table(grid, head_width, device, has_time=self.has_time)
        return self._rotations[grid, device]


def sincos_table(grid: Grid, width: int, device: torch.device) -> Float[Tensor, "N C"]:
    """The table that is added to tokens, float32."""
    assert width % 4 == 0, f"a 2D table needs a width that 4 divides, not {width}"
    t, v, y, x = coordinates(grid).T
    table = np.concatenate([_sincos(x, width // 2), _sincos(y, width // 2)], axis=1)
    for place in (t, v):
        table = table + _sincos(place, width) - _sincos(np.zeros_like(place), width)
    return torch.from_numpy(table.astype(np.float32)).to(device)


def rotary_table(grid: Grid, head_width: int, device: torch.device, *, has_time: bool) -> Rotation:
    """Rotation of each token of `grid`, float32; `has_time` gives a part of every head to time."""
    t, _, y, x = coordinates(grid).T
    parts = rotary_parts(head_width, has_time=has_time)
    places = (t, y, x) if has_time else (y, x)
    angles = np.concatenate([_angles(place, part) for place, part in zip(places, parts, strict=True)], axis=1)
    cos, sin = (torch.from_numpy(turn(angles).astype(np.float32)).to(device)[:, None] for turn in (np.cos, np.sin))
    return Rotation(cos, sin, parts)


def rotary_parts(head_width: int, *, has_time: bool) -> tuple[int, ...]:
    """Channels of a head for (y, x), or (t, y, x)."""
    if not has_time:
        assert head_width % 4 == 0, f"2D rotary positions need a head width that 4 divides, not {head_width}"
        return (head_width // 2, head_width // 2)
    assert head_width % 2 == 0, f"rotary positions need an even head width, not {head_width}"
    space = 2 * (3 * head_width // 16)
    return (head_width - 2 * space, space, space)


def rotate(x: Float[Tensor, "N A D"], rotation: Rotation) -> Float[Tensor, "N A D"]:
    """Turn queries or keys by their tokens' angles, in float32."""
    turned = x.float() * rotation.cos + _half_turn(x.float(), rotation.parts) * rotation.sin
    return turned.to(x.dtype)


def _half_turn(x: Tensor, parts: Sequence[int]) -> Tensor:
    """(a, b) -> (-b, a) of the two halves of each part."""
    halves = x.split([width // 2 for width in parts for _ in range(2)], dim=-1)
    return torch.cat([half for a, b in zip(halves[::2], halves[1::2], strict=True) for half in (-b, a)], dim=-1)


def _angles(place: Int[np.ndarray, " N"], width: int) -> Float[np.ndarray, "N D"]:
    frequencies = ROPE_BASE ** (-2 * np.arange(width // 2) / width)
    return np.tile(place[:, None] * frequencies, 2)


def _sincos(place: Int[np.ndarray, " N"], width: int) -> Float[np.ndarray, "N C"]:
    frequencies = 10000 ** (-np.arange(width // 2) / (width / 2))
    angles = place[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
