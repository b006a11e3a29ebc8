"""Lifting: what is seen where lands there, by both ways; warping: metres; and what is not there changes nothing."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.geometry import VoxelGrid, invert, normalise, project, see_through_pixels, transform, voxel_centres
from models.volumes import DepthBins, Lift, VolumeConv, VolumeHead, lift, patch_centres, warp
from tests.models.test_geometry import camera, motion

GRID = VoxelGrid((-16.0, -16.0, -1.0), (16.0, 16.0, 3.0), (32, 32, 4))
BINS = DepthBins(1.0, 17.0, 32)
SIZE_PX = (60, 80)
PATCHES = (15, 20)
KINDS: tuple[Lift, ...] = ("pull", "push")
CENTRES = voxel_centres(GRID, torch.device("cpu"))


def rig(*yaws: float) -> Tensor:
    return torch.stack([camera(yaw) for yaw in yaws])[None]


def present(cameras: int) -> Tensor:
    return torch.ones(1, cameras, dtype=torch.bool)


def lift_here(features: Tensor, density: Tensor, pix_from_volume: Tensor, cameras: Tensor | None = None, **how: Any) -> Tensor:
    cameras = torch.ones(features.shape[:2], dtype=torch.bool) if cameras is None else cameras
    return lift(features, density, pix_from_volume, cameras, grid=GRID, bins=BINS, size_px=SIZE_PX, **how)


def random_patches(clips: int, cameras: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(clips, cameras, 3, *PATCHES, generator=generator)
    return features, torch.randn(clips, cameras, BINS.count, *PATCHES, generator=generator).softmax(2)


def one_patch_sees(row: int, column: int, depth_bin: int) -> tuple[Tensor, Tensor]:
    """One patch of value 1, all others 0, and everything at one depth."""
    features, density = torch.zeros(1, 1, 1, *PATCHES), torch.zeros(1, 1, BINS.count, *PATCHES)
    features[0, 0, 0, row, column] = 1
    density[0, 0, depth_bin] = 1
    return features, density


def where_mass_lies(volume: Tensor) -> Tensor:
    """Mean place of what is in a volume of one channel, metres."""
    mass = volume[0, 0]
    return (mass[..., None] * CENTRES).sum((0, 1, 2)) / mass.sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("yaw", [0.0, 2.0])
def test_what_one_patch_sees_lands_at_its_point(kind: Lift, yaw: float) -> None:
    row, column, depth_bin = 9, 12, 15
    pix_from_volume = rig(yaw)
    pixel = torch.tensor([[column + 0.5, row + 0.5]]) * 4
    rays = see_through_pixels(pix_from_volume[0, 0], pixel)
    point = (rays.origin + rays.reach * (BINS.near_m + (depth_bin + 0.5) * BINS.size_m))[0]
    volume = lift_here(*one_patch_sees(row, column, depth_bin), pix_from_volume, kind=kind)
    # within a cell, and for pull within what two patches and two bins on either side reach
    assert (where_mass_lies(volume) - point).abs().max() < max(GRID.voxel_m) / 2 + 0.1
    far_off = (CENTRES - point).norm(dim=-1) > 2.5
    assert volume.sum() > 0 and not volume[0, 0][far_off].any()


def test_push_and_pull_agree_on_where_mass_lies() -> None:
    """An object of some patches and bins: each of both ways smears a single one, by half a cell or by half a patch."""
    rows, columns, depths = (torch.arange(count) + 0.5 for count in (*PATCHES, BINS.count))
    for row, column, depth_bin in ((6, 5, 10), (8, 10, 20), (8, 15, 22)):
        features = torch.exp(-((rows[:, None] - row) ** 2 + (columns - column) ** 2) / 2)[None, None, None]
        density = torch.softmax(-((depths - depth_bin) ** 2) / 2, 0)[:, None, None].expand(1, 1, -1, *PATCHES)
        pulled, pushed = (lift_here(features, density, rig(0.3), kind=kind) for kind in KINDS)
        assert (where_mass_lies(pulled) - where_mass_lies(pushed)).norm() < 0.3


def test_pull_is_feature_times_density_where_a_centre_projects() -> None:
    features, density = random_patches(1, 2)
    pix_from_volume = rig(0.05, 1.2)  # no centre falls on the very border of an image
    expected = torch.zeros(3, GRID.voxels)
    for view in range(2):
        pixels, depth_m = project(pix_from_volume[0, view], CENTRES.view(-1, 3))
        u, v = pixels.unbind(-1)
        x, y, d = 2 * u / SIZE_PX[1] - 1, 2 * v / SIZE_PX[0] - 1, 2 * (depth_m - BINS.near_m) / (BINS.far_m - BINS.near_m) - 1
        how = {"align_corners": False, "padding_mode": "border"}
        feature = F.grid_sample(features[:, view], torch.stack([x, y], -1)[None, None], **how)[0, :, 0]
        weight = F.grid_sample(density[:, view, None], torch.stack([x, y, d], -1)[None, None, None], **how).flatten()
        expected += feature * weight * ((torch.stack([x, y, d]).abs() < 1).all(0) & (depth_m > 0))
    volume = lift_here(features, density, pix_from_volume)
    assert (volume != 0).float().mean() > 0.05
    torch.testing.assert_close(volume.flatten(2)[0], expected, atol=1e-4, rtol=1e-3)


def test_push_adds_feature_times_density_of_every_bin_to_its_cell() -> None:
    features, density = random_patches(1, 2)
    pix_from_volume = rig(0.0, 1.2)
    expected = torch.zeros(3, *GRID.zyx)
    for view in range(2):
        rays = see_through_pixels(pix_from_volume[0, view], patch_centres(PATCHES, SIZE_PX, torch.device("cpu")))
        for depth_bin in range(BINS.count):
            points = rays.origin + rays.reach * (BINS.near_m + (depth_bin + 0.5) * BINS.size_m)
            cells = torch.floor((points - torch.tensor(GRID.low_m)) / torch.tensor(GRID.voxel_m)).long()
            for patch, (x, y, z) in enumerate(cells.tolist()):
                if 0 <= x < 32 and 0 <= y < 32 and 0 <= z < 4:
                    row, column = divmod(patch, PATCHES[1])
                    expected[:, z, y, x] += features[0, view, :, row, column] * density[0, view, depth_bin, row, column]
    torch.testing.assert_close(lift_here(features, density, pix_from_volume, kind="push")[0], expected, atol=1e-4, rtol=1e-3)


def test_taking_each_cells_own_cameras_changes_nothing_where_no_more_see_it() -> None:
    features, density = random_patches(2, 6)
    pix_from_volume = rig(*(view * math.pi / 3 for view in range(6))).expand(2, -1, -1, -1)
    everything = lift_here(features, density, pix_from_volume)
    torch.testing.assert_close(lift_here(features, density, pix_from_volume, overlap=2), everything)
    assert not torch.allclose(lift_here(features, density, pix_from_volume, overlap=1), everything)


@pytest.mark.parametrize("kind", KINDS)
def test_a_clip_is_lifted_as_if_it_were_alone(kind: Lift) -> None:
    features, density = random_patches(2, 2)
    pix_from_volume = torch.cat([rig(0.0, 1.2), rig(0.7, -2.0)])
    together = lift_here(features, density, pix_from_volume, kind=kind)
    for clip in range(2):
        alone = slice(clip, clip + 1)
        torch.testing.assert_close(together[alone], lift_here(features[alone], density[alone], pix_from_volume[alone], kind=kind))


@pytest.mark.parametrize("kind", KINDS)
def test_an_absent_camera_changes_nothing_whatever_it_holds(kind: Lift) -> None:
    features, density = random_patches(1, 3)
    pix_from_volume = rig(0.0, 1.2, 2.4)
    without = lift_here(features[:, :2], density[:, :2], pix_from_volume[:, :2], kind=kind)
    for last in (pix_from_volume[:, 2:], torch.zeros(1, 1, 3, 4)):
        matrices = torch.cat([pix_from_volume[:, :2], last], dim=1)
        absent = lift_here(features, density, matrices, torch.tensor([[True, True, False]]), kind=kind)
        torch.testing.assert_close(absent, without, atol=0, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_volume_that_no_camera_sees_is_zero_and_its_gradients_are_finite(kind: Lift) -> None:
    features, density = (patches.requires_grad_() for patches in random_patches(1, 2))
    conv = VolumeConv(3, 8)
    volume = lift_here(features, density, rig(0.0, 1.2), ~present(2), kind=kind)
    seen = conv(volume)
    seen.square().sum().backward()
    assert not volume.any() and seen.isfinite().all()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in (features, density, *conv.parameters()))


@pytest.mark.parametrize("kind", KINDS)
def test_lifting_gives_gradients_to_features_and_depths(kind: Lift) -> None:
    grid, bins = VoxelGrid((0.0, -4, 0), (8.0, 4, 2), (3, 3, 2)), DepthBins(1.0, 8.0, 3)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 2, 2, 2, 3, generator=generator, requires_grad=True)
    density = torch.rand(1, 2, 3, 2, 3, generator=generator, requires_grad=True)

    def loss(features: Tensor, density: Tensor) -> Tensor:
        volume = lift(features, density, rig(0.0, 0.4), present(2), grid=grid, bins=bins, size_px=SIZE_PX, kind=kind)
        return (volume * torch.linspace(0.5, 1.5, volume.numel()).view_as(volume)).sum()

    gradients = torch.autograd.grad(loss(features, density), (features, density))
    # it is bilinear: the gradient times the leaf is the loss
    for leaf, gradient in zip((features, density), gradients, strict=True):
        assert gradient.any()
        torch.testing.assert_close((leaf * gradient).sum(), loss(features, density))


def test_warping_there_and_back_leaves_the_interior_of_a_smooth_volume() -> None:
    x, y, z = CENTRES.unbind(-1)
    volume = (torch.sin(0.3 * x) * torch.cos(0.2 * y) + 0.1 * z)[None, None]
    other_from_this = motion(0.0, 0.0, 0.15, (1.3, -0.7, 0.0))[None]
    there = warp(volume, invert(other_from_this), GRID)  # the other frame sees what this frame holds
    back = warp(there, other_from_this, GRID)
    interior = (CENTRES[..., :2].norm(dim=-1) < 12) & (CENTRES[..., 2].abs() < 2)
    assert (there - volume)[0, 0][interior].abs().max() > 0.2
    assert (back - volume)[0, 0][interior].abs().max() < 0.05


def test_a_translation_by_whole_cells_moves_values_exactly_in_metres() -> None:
    volume = torch.randn(1, 3, *GRID.zyx)
    source_from_target = torch.eye(4)[None].clone()
    source_from_target[0, :3, 3] = torch.tensor([2.0, -3.0, 1.0])  # cells are 1 m: the car went 2 cells ahead ...
    moved = warp(volume, source_from_target, GRID)
    assert torch.equal(moved[:, :, :-1, 3:, :-2], volume[:, :, 1:, :-3, 2:])
    assert not moved[:, :, -1].any() and not moved[:, :, :, :3].any() and not moved[..., -2:].any()


def test_warping_is_grid_sample_at_the_moved_centres() -> None:
    volume = torch.randn(2, 3, *GRID.zyx)
    source_from_target = torch.stack([motion(0.02, -0.05, 1.0, (3.3, 1.1, 0.2)), motion(0, 0, -0.4, (-7.0, 2.0, -0.1))])
    centres = transform(source_from_target, CENTRES.view(1, -1, 3).expand(2, -1, -1)).view(2, *GRID.zyx, 3)
    expected = F.grid_sample(volume, normalise(centres, GRID), align_corners=False)
    torch.testing.assert_close(warp(volume, source_from_target, GRID), expected, atol=1e-4, rtol=1e-4)


def test_the_head_gives_features_of_nothing_for_tokens_of_nothing_and_depths_that_sum_to_one() -> None:
    head = VolumeHead(8, 5, 7)
    tokens = torch.randn(2, 3, 4, 6, 8)
    tokens[0, 1, 2, 3] = 0
    with torch.autocast("cpu", torch.bfloat16):
        features, density = head(tokens)
    assert features.shape == (2, 3, 5, 4, 6) and density.shape == (2, 3, 7, 4, 6)
    assert features.dtype == density.dtype == torch.float32
    assert not features[0, 1, :, 2, 3].any()
    torch.testing.assert_close(density.sum(2), torch.ones(2, 3, 4, 6))


@pytest.mark.parametrize("kind", KINDS)
def test_lifting_is_float32_under_autocast(kind: Lift) -> None:
    features, density = random_patches(1, 2)
    pix_from_volume = rig(0.0, 1.2)
    expected = lift_here(features, density, pix_from_volume, kind=kind)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lift_here(features, density, pix_from_volume, kind=kind), expected)
