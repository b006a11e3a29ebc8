"""Motion there and back, grids cell by cell, rays into boxes, and reading between cells against grid_sample and autograd."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from models.geometry import (
    VoxelGrid,
    dot_rows,
    enter_and_leave,
    find_corners,
    find_slopes,
    invert,
    normalise,
    project,
    see_through_pixels,
    spread_rows,
    sum_rows,
    to_cells,
    transform,
    voxel_centres,
)

GRID = VoxelGrid((-4.0, -2.0, -1.0), (8.0, 2.0, 2.0), (6, 4, 3))
CPU = torch.device("cpu")
metres = st.floats(-100, 100)
angles = st.floats(-math.pi, math.pi)


def motion(roll: float, pitch: float, yaw: float, origin: tuple[float, float, float]) -> Tensor:
    """A rigid motion, by turns about x, y and z."""
    matrix = torch.eye(4, dtype=torch.float64)
    for axis, angle in enumerate((roll, pitch, yaw)):
        turn = torch.eye(3, dtype=torch.float64)
        i, j = (axis + 1) % 3, (axis + 2) % 3
        turn[i, i] = turn[j, j] = math.cos(angle)
        turn[i, j], turn[j, i] = -math.sin(angle), math.sin(angle)
        matrix[:3, :3] = turn @ matrix[:3, :3]
    matrix[:3, 3] = torch.tensor(origin)
    return matrix.float()


def camera(yaw: float = 0.0, height_m: float = 1.5, focal_px: float = 40.0) -> Tensor:
    """Pixels of a 60 x 80 image from a frame with x forward, y left, z up."""
    forward = torch.tensor([math.cos(yaw), math.sin(yaw), 0.0])
    right, down = torch.tensor([math.sin(yaw), -math.cos(yaw), 0.0]), torch.tensor([0.0, 0.0, -1.0])
    cam_from_frame = torch.stack([right, down, forward])
    origin = cam_from_frame @ torch.tensor([0.0, 0.0, height_m])
    pix_from_cam = torch.tensor([[focal_px, 0, 40.0], [0, focal_px, 30.0], [0, 0, 1]])
    return pix_from_cam @ torch.cat([cam_from_frame, -origin[:, None]], dim=1)


@given(angles, angles, angles, st.tuples(metres, metres, metres), st.tuples(metres, metres, metres))
def test_a_motion_and_its_inverse_bring_points_back(
    roll: float, pitch: float, yaw: float, origin: tuple[float, float, float], point: tuple[float, float, float]
) -> None:
    a_from_b, points = motion(roll, pitch, yaw, origin), torch.tensor([point])
    there = transform(a_from_b, points)
    torch.testing.assert_close(there, points @ a_from_b[:3, :3].T + a_from_b[:3, 3], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(transform(invert(a_from_b), there), points, atol=1e-3, rtol=0)


def test_motions_and_points_may_come_in_batches() -> None:
    motions = torch.stack([motion(0.1, 0.2, 0.3, (1, 2, 3)), motion(-1, 0.5, 2, (-3, 0, 1))])
    points = torch.randn(2, 5, 3)
    for clip in range(2):
        torch.testing.assert_close(transform(motions, points)[clip], transform(motions[clip], points[clip]))
        torch.testing.assert_close(invert(motions)[clip] @ motions[clip], torch.eye(4), atol=1e-6, rtol=0)


def test_autocast_does_not_round_coordinates() -> None:
    a_from_b, points = motion(0.1, 0.2, 0.3, (1, 2, 3)), 50 * torch.randn(4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        moved = transform(a_from_b, points)
    assert moved.dtype == torch.float32
    assert torch.equal(moved, transform(a_from_b, points))


@given(angles, st.floats(5, 75), st.floats(5, 55), st.floats(0.5, 100))
def test_a_pixel_and_its_depth_are_a_point_that_projects_back_to_them(yaw: float, u: float, v: float, depth_m: float) -> None:
    pix_from_frame, pixels = camera(yaw), torch.tensor([[u, v]])
    rays = see_through_pixels(pix_from_frame, pixels)
    points = rays.origin + rays.reach * depth_m
    seen = project(pix_from_frame, points)
    torch.testing.assert_close(seen.pixels, pixels, atol=2e-3, rtol=1e-4)
    torch.testing.assert_close(seen.depth_m, torch.tensor([depth_m]), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(rays.origin, torch.tensor([[0.0, 0.0, 1.5]]), atol=1e-4, rtol=0)
    torch.testing.assert_close(rays.direction.norm(dim=-1), torch.ones(1))


def test_behind_a_camera_pixels_are_finite_and_an_absent_camera_has_rays_of_zeros() -> None:
    seen = project(camera(), torch.tensor([[-5.0, 0, 0], [0, 0, 1.5]]))
    assert seen.pixels.isfinite().all() and (seen.depth_m <= 1e-6).all()
    rays = see_through_pixels(torch.zeros(3, 4), torch.tensor([[3.0, 4.0]]))
    assert not rays.origin.any() and not rays.direction.any()


def test_a_grid_knows_its_cells() -> None:
    assert GRID.voxel_m == (2.0, 1.0, 1.0)
    assert GRID.scale == 1 / 8
    assert GRID.voxels == 72 and GRID.zyx == (3, 4, 6)
    centres = voxel_centres(GRID, CPU)
    assert centres.shape == (3, 4, 6, 3)
    assert centres[0, 0, 0].tolist() == [-3.0, -1.5, -0.5]
    assert centres[2, 1, 4].tolist() == [5.0, -0.5, 1.5]


def test_centres_are_half_cells_and_normalised_as_grid_sample_has_them() -> None:
    centres = voxel_centres(GRID, CPU)
    z, y, x = torch.meshgrid(*(torch.arange(size) + 0.5 for size in GRID.zyx), indexing="ij")
    torch.testing.assert_close(to_cells(centres, GRID), torch.stack([x, y, z], -1))
    volume = torch.randn(1, 2, *GRID.zyx)
    torch.testing.assert_close(F.grid_sample(volume, normalise(centres, GRID)[None], align_corners=False), volume)


@given(st.tuples(metres, metres, metres))
def test_normalised_places_lie_within_one_exactly_for_points_in_the_box(point: tuple[float, float, float]) -> None:
    place = normalise(torch.tensor(point), GRID)
    inside = [low <= value <= high for value, low, high in zip(point, GRID.low_m, GRID.high_m, strict=True)]
    for value, is_inside in zip(place.tolist(), inside, strict=True):
        assert (abs(value) <= 1 + 1e-5) if is_inside else (abs(value) > 1 - 1e-5)
    lows, sizes = torch.tensor(GRID.low_m), torch.tensor(GRID.high_m) - torch.tensor(GRID.low_m)
    torch.testing.assert_close((place + 1) / 2 * sizes + lows, torch.tensor(point), atol=1e-4, rtol=1e-5)


def test_a_ray_along_an_axis_enters_and_leaves_where_the_faces_are() -> None:
    origin = torch.tensor([[-10.0, 0.5, 0.5], [0.0, 0.0, 0.0], [0.0, -5.0, 1.0]])
    direction = torch.tensor([[1.0, 0, 0], [-1.0, 0, 0], [0, 1.0, 0]])
    inside = enter_and_leave(origin, direction, GRID, near_m=1.0)
    assert inside.hit.all()
    torch.testing.assert_close(inside.near_m, torch.tensor([6.0, 1.0, 3.0]))
    torch.testing.assert_close(inside.far_m, torch.tensor([18.0, 4.0, 7.0]))


def test_rays_beside_behind_too_near_and_of_no_direction_miss() -> None:
    origin = torch.tensor([[-10.0, 2.5, 0], [10.0, 0, 0], [-4.5, 0, 0], [0.0, 0, 0]])
    direction = torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [-1.0, 0, 0], [0.0, 0, 0]])
    inside = enter_and_leave(origin, direction, GRID, near_m=1.0)
    assert not inside.hit.any()
    assert (inside.near_m == 1).all() and (inside.far_m == 1).all()
    assert not enter_and_leave(torch.tensor([0.0, 0, 0]), torch.tensor([1.0, 0, 0]), GRID, near_m=9.0).hit


@given(st.tuples(metres, metres, metres), angles, angles)
def test_a_ray_that_hits_does_so_on_the_faces(origin: tuple[float, float, float], yaw: float, pitch: float) -> None:
    direction = torch.tensor([math.cos(pitch) * math.cos(yaw), math.cos(pitch) * math.sin(yaw), math.sin(pitch)])
    start = torch.tensor(origin)
    near_m, far_m, hit = enter_and_leave(start, direction, GRID, near_m=0.0)
    middle = normalise(start + (near_m + far_m) / 2 * direction, GRID).abs().max()
    assert near_m.isfinite() and far_m.isfinite()
    if hit:
        assert middle <= 1 + 1e-3
        assert normalise(start + far_m * direction, GRID).abs().max().item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("sizes", [(3, 4, 6), (4, 5)])
def test_reading_between_cells_is_grid_sample(sizes: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    volume = torch.randn(1, 7, *sizes, generator=generator)
    # some of them beyond the border, where both have zeros
    places = torch.rand(200, len(sizes), generator=generator) * (torch.tensor(sizes) + 3.0) - 1.5
    rows, weight = find_corners(places, sizes)
    read = sum_rows(volume[0].flatten(1).T, rows, weight)
    normalised = (2 * places / torch.tensor(sizes) - 1).flip(-1).view(1, -1, *[1] * (len(sizes) - 1), len(sizes))
    expected = F.grid_sample(volume, normalised, align_corners=False)[0].flatten(1).T
    torch.testing.assert_close(read, expected, atol=1e-5, rtol=1e-5)


def test_a_place_at_infinity_reads_zero() -> None:
    rows, weight = find_corners(torch.tensor([[1e30, 0.5], [-1e30, 0.5], [0.5, torch.inf]]), (4, 5))
    assert (rows >= 0).all() and (rows < 20).all()
    assert not weight.any()


def test_slopes_are_the_derivatives_of_the_weights() -> None:
    sizes = (3, 4, 6)
    places = (torch.rand(20, 3, dtype=torch.float64) * torch.tensor(sizes)).requires_grad_()
    slopes = find_slopes(places.detach(), sizes)
    for corner in range(8):
        weight = find_corners(places, sizes).weight[:, corner]
        (expected,) = torch.autograd.grad(weight.sum(), places)
        torch.testing.assert_close(slopes[:, :, corner].T, expected)


def rows_and_weights() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(6, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(5, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    vectors = torch.randn(5, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    return table, torch.randint(0, 6, (5, 4), generator=generator, dtype=torch.int32), weight, vectors


def test_the_three_derivatives_of_one_form_agree_with_its_sum() -> None:
    table, index, weight, vectors = rows_and_weights()
    form = (weight[..., None] * vectors[:, None] * table[index.long()]).sum()
    expected = torch.autograd.grad(form, (vectors, weight, table))
    given_back = sum_rows(table, index, weight), dot_rows(table, index, vectors), spread_rows(vectors, index, weight, 6)
    for value, gradient in zip(given_back, expected, strict=True):
        torch.testing.assert_close(value, gradient)


def test_each_of_the_three_is_twice_differentiable() -> None:
    table, index, weight, vectors = rows_and_weights()
    cases = [
        (lambda table, weight: sum_rows(table, index, weight), (table, weight)),
        (lambda table, vectors: dot_rows(table, index, vectors), (table, vectors)),
        (lambda vectors, weight: spread_rows(vectors, index, weight, 6), (vectors, weight)),
    ]
    for function, inputs in cases:
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


def test_interpolation_is_twice_differentiable_in_volume_and_place() -> None:
    sizes = (2, 3, 3)
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(18, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    # in the middle half of cells: finite differences must not cross from one to the next
    whole = torch.rand(6, 3, dtype=torch.float64, generator=generator) * torch.tensor(sizes)
    places = (whole.floor() + 1.0 + 0.25 + 0.5 * (whole - whole.floor()) - 0.5).requires_grad_()

    def read(table: Tensor, places: Tensor) -> Tensor:
        rows, weight = find_corners(places, sizes)
        return sum_rows(table, rows, weight)

    assert torch.autograd.gradcheck(read, (table, places))
    assert torch.autograd.gradgradcheck(read, (table, places))
