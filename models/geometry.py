"""Rigid motion, cameras, voxel grids, rays through them, and reading between cells. Float32 whatever the autocast.

Frames are in names: `a_from_b` takes points of frame b to frame a. A grid's cells are areas, not points: cell i of an axis spans
[low + i size, low + (i + 1) size], a value belongs to its centre, and what is normalised is for grid_sample with
align_corners=False. MIM4D as released lifts to the lower corners of cells and reads them as centres, half a cell off.

Products of few numbers are written out, so neither autocast nor TF32 rounds a coordinate: at 50 m bf16 knows 25 cm, TF32 3 cm.

Everything that reads a volume, an image or a map between its cells is one trilinear form, with a table of rows v, and for each
of n outputs k rows of it with weights w:

    T(v, w, g) = sum over n, k of  w[n, k]  g[n] . v[index[n, k]]

`sum_rows`, `dot_rows` and `spread_rows` are its three partial derivatives, so the gradient of each is the two others, to any
order, on any device, and no tensor of n k rows ever exists. `sum_rows` is torch's embedding_bag; `spread_rows` sorts instead
of adding atomically, which is faster here and gives the same bits every time.

Letters: K points, M rows of a table, E numbers in a row, n outputs of k rows each, d axes.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

_IN_FRONT_M = 1e-3
"""Points nearer to the plane of a camera, or behind it, have no pixel."""
_ALMOST_ZERO = 1e-9
"""Least size of a direction's component when it divides."""
_BLOCK_BYTES = {"cpu": 2**20}
"""Of rows that `dot_rows` holds at once: what a core's cache holds ..."""
_DEVICE_BLOCK_BYTES = 2**28
"""... and elsewhere so many that a kernel is worth its launch."""


class VoxelGrid(NamedTuple):
    """A box of space cut into X Y Z cells. Volumes over it lie as (Z, Y, X), x running fastest."""

    low_m: tuple[float, float, float]
    """Smallest x, y, z."""
    high_m: tuple[float, float, float]
    """Largest x, y, z."""
    shape: tuple[int, int, int]
    """X, Y, Z."""

    @property
    def voxel_m(self) -> tuple[float, float, float]:
        """Sides of a cell along x, y, z."""
        x, y, z = ((high - low) / cells for low, high, cells in zip(*self, strict=True))
        return x, y, z

    @property
    def scale(self) -> float:
        """Times metres, coordinates lie within [-1, 1]: the unit of NeuS' signed distances."""
        return 1 / max(abs(bound) for bound in self.low_m + self.high_m)

    @property
    def zyx(self) -> tuple[int, int, int]:
        """Sizes in the order of memory."""
        X, Y, Z = self.shape
        return Z, Y, X

    @property
    def voxels(self) -> int:
        X, Y, Z = self.shape
        return X * Y * Z


def transform(a_from_b: Float[Tensor, "*n 4 4"], points_b: Float[Tensor, "*n K 3"]) -> Float[Tensor, "*n K 3"]:
    """Points in metres, from frame b to frame a."""
    return _apply(a_from_b[..., :3, :], points_b)


def invert(a_from_b: Float[Tensor, "*n 4 4"]) -> Float[Tensor, "*n 4 4"]:
    """b_from_a of a rigid motion."""
    turned_back = a_from_b[..., :3, :3].mT
    origin_b = -(turned_back * a_from_b[..., None, :3, 3]).sum(-1, keepdim=True)
    return torch.cat([torch.cat([turned_back, origin_b], dim=-1), a_from_b[..., 3:, :]], dim=-2)


class Projected(NamedTuple):
    """Where a camera sees points."""

    pixels: Float[Tensor, "*n K 2"]
    """u right, v down, the centre of the first pixel at (0.5, 0.5); of points not in front of it, anything finite."""
    depth_m: Float[Tensor, "*n K"]
    """Along the camera's axis."""


def project(pix_from_a: Float[Tensor, "*n 3 4"], points_a: Float[Tensor, "*n K 3"]) -> Projected:
    """Pixels of points in metres; `pix_from_a` is intrinsics times motion, its third row gives metres along the axis."""
    u, v, depth_m = _apply(pix_from_a, points_a).unbind(-1)
    divisor = depth_m.clamp(min=_IN_FRONT_M)
    return Projected(torch.stack([u / divisor, v / divisor], dim=-1), depth_m)


class PixelRays(NamedTuple):
    """Lines of sight: the point at depth z along a camera's axis is origin + z reach."""

    origin: Float[Tensor, "*n 1 3"]
    """The camera, in metres."""
    reach: Float[Tensor, "*n K 3"]
    """Metres to go for one metre along the axis; its length is what a pixel's depth is multiplied by to be a distance."""

    @property
    def direction(self) -> Float[Tensor, "*n K 3"]:
        """Unit vectors; zero where the camera is absent."""
        return F.normalize(self.reach, dim=-1)


def see_through_pixels(pix_from_a: Float[Tensor, "*n 3 4"], pixels: Float[Tensor, "*n K 2"]) -> PixelRays:
    """The line of sight of each pixel in frame a. A matrix of zeros, of an absent camera, gives zeros."""
    rows = pix_from_a[..., :3].double().unbind(-2)
    # The inverse by cross products: without LAPACK, and without the wait for the device that its error check costs.
    columns = [torch.linalg.cross(rows[(i + 1) % 3], rows[(i + 2) % 3]) for i in range(3)]
    determinant = (rows[0] * columns[0]).sum(-1, keepdim=True)
    determinant = torch.where(determinant == 0, 1.0, determinant)
    a_from_pix = torch.stack([column / determinant for column in columns], dim=-1)  # (*n, 3, 3)
    origin = -(a_from_pix * pix_from_a[..., None, :, 3]).sum(-1).to(pixels)
    u_step, v_step, corner = (column[..., None, :] for column in a_from_pix.to(pixels).unbind(-1))
    reach = torch.addcmul(torch.addcmul(corner, u_step, pixels[..., :1]), v_step, pixels[..., 1:])
    return PixelRays(origin[..., None, :], reach)


def _apply(matrix: Float[Tensor, "*n 3 4"], points: Float[Tensor, "*n K 3"]) -> Float[Tensor, "*n K 3"]:
    columns = matrix[..., None, :, :].unbind(-1)  # 4 x (*n, 1, 3)
    moved = columns[3]
    for axis in range(3):
        moved = torch.addcmul(moved, columns[axis], points[..., axis, None])
    return moved


def voxel_centres(grid: VoxelGrid, device: torch.device) -> Float[Tensor, "Z Y X 3"]:
    """(x, y, z) of the centres of all cells, metres."""
    axes = [
        low + (torch.arange(cells, device=device, dtype=torch.float32) + 0.5) * size
        for low, size, cells in zip(grid.low_m, grid.voxel_m, grid.shape, strict=True)
    ]
    z, y, x = torch.meshgrid(*reversed(axes), indexing="ij")
    return torch.stack([x, y, z], dim=-1)


def to_cells(points_m: Float[Tensor, "*n 3"], grid: VoxelGrid) -> Float[Tensor, "*n 3"]:
    """(x, y, z) counted in cells from the low corner: i + 0.5 is the centre of cell i."""
    # Axis by axis, by numbers: a tensor of constants would be copied to the device, which waits for it, in every step.
    axes = zip(points_m.unbind(-1), grid.low_m, grid.voxel_m, strict=True)
    return torch.stack([(along - low) / size for along, low, size in axes], dim=-1)


def normalise(points_m: Float[Tensor, "*n 3"], grid: VoxelGrid) -> Float[Tensor, "*n 3"]:
    """(x, y, z) from -1 at the low face to 1 at the high one: for grid_sample with align_corners=False."""
    axes = zip(points_m.unbind(-1), grid.low_m, grid.high_m, strict=True)
    return torch.stack([(along - low) * (2 / (high - low)) - 1 for along, low, high in axes], dim=-1)


class Interval(NamedTuple):
    """Where rays are inside a box, in metres along them."""

    near_m: Float[Tensor, "*n"]
    far_m: Float[Tensor, "*n"]
    hit: Bool[Tensor, "*n"]
    """Whether they are at all; the interval of those that are not is empty, at the least distance."""


def enter_and_leave(
    origin_m: Float[Tensor, "*n 3"], direction: Float[Tensor, "*n 3"], grid: VoxelGrid, near_m: float
) -> Interval:
    """Where each ray enters and leaves the grid's box (Kay and Kajiya 1986), from `near_m` on.

    `direction` is a unit vector, or zeros for a ray that is none. No component of it needs to differ from zero.
    """
    near, far = torch.full_like(origin_m[..., 0], near_m), torch.full_like(origin_m[..., 0], float("inf"))
    for axis, (low, high) in enumerate(zip(grid.low_m, grid.high_m, strict=True)):
        along = direction[..., axis]
        along = torch.where(along.abs() < _ALMOST_ZERO, _ALMOST_ZERO, along)
        first, second = (low - origin_m[..., axis]) / along, (high - origin_m[..., axis]) / along
        near, far = torch.maximum(near, torch.minimum(first, second)), torch.minimum(far, torch.maximum(first, second))
    hit = (near < far) & (direction != 0).any(-1)
    return Interval(torch.where(hit, near, near_m), torch.where(hit, far, near_m), hit)


class Corners(NamedTuple):
    """The 2^d cells around each of n places: rows of a table of all cells, and their linear weights."""

    rows: Int[Tensor, "n k"]
    weight: Float[Tensor, "n k"]


def find_corners(places: Float[Tensor, "n d"], sizes: Sequence[int]) -> Corners:
    """The cells around places that are counted in cells, axes in the order of memory (z, y, x) or (y, x).

    Beyond the border everything is zero, as grid_sample has it: such cells weigh nothing, and stand for one within.
    """
    axes = [_along(place, size) for place, size in zip(places.unbind(-1), sizes, strict=True)]
    index = axes[0].cells
    for axis, size in zip(axes[1:], sizes[1:], strict=True):
        index = (index[:, None] * size + axis.cells).flatten(0, 1)
    return Corners(index.T.contiguous(), _outer([axis.weight for axis in axes]).T.contiguous())


def find_slopes(places: Float[Tensor, "n d"], sizes: Sequence[int]) -> Float[Tensor, "d n k"]:
    """How the weights of `find_corners` change along each axis, a cell."""
    axes = [_along(place, size) for place, size in zip(places.unbind(-1), sizes, strict=True)]
    weights = [axis.weight for axis in axes]
    slopes = [_outer([*weights[:place], axis.slope, *weights[place + 1 :]]) for place, axis in enumerate(axes)]
    return torch.stack(slopes).mT.contiguous()


class _Along(NamedTuple):
    """The cells below and above each place on one axis. Places run fastest, so that this is done many at a time."""

    cells: Int[Tensor, "2 n"]
    weight: Float[Tensor, "2 n"]
    slope: Float[Tensor, "2 n"]


def _along(place: Float[Tensor, " n"], size: int) -> _Along:
    place = place.clamp(-1, size + 1) - 0.5  # from beyond the border nothing is read, however far it is
    below = torch.floor(place.detach())
    share = place - below
    cells = torch.stack([below, below + 1])
    # 1 where there is a cell and 0 beyond the border
    exists = ((cells >= 0) & (cells < size)).to(place.dtype)
    weight = torch.stack([1 - share, share]) * exists
    slope = torch.stack([-exists[0], exists[1]])
    return _Along(cells.clamp_(0, size - 1).int(), weight, slope)


def _outer(axes: Sequence[Float[Tensor, "2 n"]]) -> Float[Tensor, "k n"]:
    product = axes[0]
    for axis in axes[1:]:
        product = (product[:, None] * axis).flatten(0, 1)
    return product


def sum_rows(table: Float[Tensor, "M E"], index: Int[Tensor, "n k"], weight: Float[Tensor, "n k"]) -> Float[Tensor, "n E"]:
    """out[n] = sum over k of weight[n, k] table[index[n, k]]: interpolation, where the weights are those of corners."""
    return _SumRows.apply(table, index, weight)


def dot_rows(table: Float[Tensor, "M E"], index: Int[Tensor, "n k"], vectors: Float[Tensor, "n E"]) -> Float[Tensor, "n k"]:
    """out[n, k] = vectors[n] . table[index[n, k]]"""
    return _DotRows.apply(table, index, vectors)


def spread_rows(
    vectors: Float[Tensor, "n E"], index: Int[Tensor, "n k"], weight: Float[Tensor, "n k"], rows: int
) -> Float[Tensor, "rows E"]:
    """out[m] = sum over all n, k with index[n, k] = m of weight[n, k] vectors[n]"""
    return _SpreadRows.apply(vectors, index, weight, rows)


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(table, index, weight)
        return F.embedding_bag(index, table, mode="sum", per_sample_weights=weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        table, index, weight = ctx.saved_tensors
        of_table, _, of_weight = ctx.needs_input_grad
        return (
            spread_rows(gradient, index, weight, len(table)) if of_table else None,
            None,
            dot_rows(table, index, gradient) if of_weight else None,
        )


class _DotRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor, vectors: Tensor) -> Tensor:
        ctx.save_for_backward(table, index, vectors)
        (n, k), E = index.shape, table.shape[1]
        dots = vectors.new_empty(n, k)
        block_bytes = _BLOCK_BYTES.get(table.device.type, _DEVICE_BLOCK_BYTES)
        block = max(1, block_bytes // (k * E * table.element_size()))
        for rows, part, into in zip(index.split(block), vectors.split(block), dots.split(block), strict=True):
            found = table.index_select(0, rows.flatten()).view(-1, k, E)
            torch.sum(found.mul_(part[:, None]), dim=-1, out=into)
        return dots

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        table, index, vectors = ctx.saved_tensors
        of_table, _, of_vectors = ctx.needs_input_grad
        return (
            spread_rows(vectors, index, gradient, len(table)) if of_table else None,
            None,
            sum_rows(table, index, gradient) if of_vectors else None,
        )


class _SpreadRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vectors: Tensor, index: Tensor, weight: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(vectors, index, weight)
        by_row, order = torch.sort(index.flatten(), stable=True)
        count = order.new_zeros(rows).index_add_(0, by_row, torch.ones_like(order))
        first = count.cumsum(0) - count
        weight = weight.flatten()[order]
        return F.embedding_bag(order // index.shape[1], vectors, first, mode="sum", per_sample_weights=weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        vectors, index, weight = ctx.saved_tensors
        of_vectors, _, of_weight, _ = ctx.needs_input_grad
        return (
            sum_rows(gradient, index, weight) if of_vectors else None,
            None,
            dot_rows(gradient, index, vectors) if of_weight else None,
            None,
        )
