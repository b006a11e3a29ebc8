"""The renderer against its equations with autograd's own gradients, against surfaces known exactly, and where there is nothing."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.geometry import VoxelGrid, normalise, see_through_pixels, voxel_centres
from models.rendering import ColourMlp, Distance, Rays, Renderer, Rendering, RenderShape, SdfMlp, Slope, survive, weigh
from models.volumes import DepthBins, lift
from tests.models.test_geometry import camera

GRID = VoxelGrid((-8.0, -8.0, -2.0), (8.0, 8.0, 4.0), (16, 16, 6))
SHAPE = RenderShape(hidden=8, sdf_blocks=2, rgb_blocks=2, coarse=12, fine=6, near_m=0.5)
CHANNELS = 4
CPU = torch.device("cpu")


def make_renderer(shape: RenderShape = SHAPE) -> Renderer:
    torch.manual_seed(0)
    return Renderer(CHANNELS, GRID, shape)


def random_volume(clips: int = 2, *, requires_grad: bool = False) -> Tensor:
    volume = torch.randn(clips, CHANNELS, *GRID.zyx, generator=torch.Generator().manual_seed(1))
    return volume.requires_grad_(requires_grad)


def random_rays(clips: int = 2, rays: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    """Origins, unit vectors and jitter."""
    generator = torch.Generator().manual_seed(2)
    origin = torch.rand(clips, rays, 3, generator=generator) - 0.5
    direction = F.normalize(torch.randn(clips, rays, 3, generator=generator), dim=-1)
    return origin, direction, torch.rand(clips, rays, 2, generator=generator)


def loss_of(rendering: Rendering) -> Tensor:
    """Some number of everything that is rendered."""
    parts = (rendering.rgb.square(), rendering.depth_m, rendering.opacity, rendering.eikonal)
    return sum((part * torch.linspace(0.5, 1.5, part.numel()).view_as(part)).sum() for part in parts)


def gradients_of(renderer: Renderer, loss: Tensor, volume: Tensor) -> dict[str, Tensor]:
    named = {"volume": volume, **dict(renderer.named_parameters())}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def sdf_by_hand(mlp: SdfMlp, points: Tensor, features: Tensor) -> Tensor:
    x = points @ mlp.point_weight.T + mlp.point_bias
    for block in range(mlp.blocks):
        own = slice(block * mlp.hidden, (block + 1) * mlp.hidden)
        more = features @ mlp.feature_weight[own].T + mlp.feature_bias[own]
        x = (x + more) @ mlp.block_weight[own].T + mlp.block_bias[own]
        x = torch.log1p(torch.exp(100 * x.double())).float() / 100
    return x @ mlp.out_weight.T + mlp.out_bias


def rgb_by_hand(mlp: ColourMlp, points: Tensor, features: Tensor) -> Tensor:
    x = points @ mlp.point_weight.T + mlp.point_bias
    for block in range(mlp.blocks):
        own = slice(block * mlp.hidden, (block + 1) * mlp.hidden)
        more = features @ mlp.feature_weight[own].T + mlp.feature_bias[own]
        x = ((x + more) @ mlp.block_weight[own].T + mlp.block_bias[own]).clamp(min=0)
    return torch.sigmoid(x @ mlp.out_weight.T + mlp.out_bias)


def render_by_hand(
    renderer: Renderer, volume: Tensor, origin_m: Tensor, direction: Tensor, edges: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of one clip: the equations as they stand, sample by sample along a ray, gradients by autograd through grid_sample."""
    points = (origin_m[:, None] * GRID.scale + direction[:, None] * edges[:, :-1, None]).requires_grad_()  # (R, S, 3)
    places = normalise(points / GRID.scale, GRID)[None, None]
    features = F.grid_sample(volume[None], places, align_corners=False)[0, :, 0].movedim(0, -1)
    out = sdf_by_hand(renderer.sdf, points, features)
    sdf, geometry = out[..., 0], out[..., 1:]
    (gradient,) = torch.autograd.grad(sdf.sum(), points, create_graph=True)
    directions = direction[:, None].expand_as(points)
    colour = rgb_by_hand(renderer.rgb, points, torch.cat([directions, features, gradient, geometry], -1))
    cos = -torch.relu(-(directions * gradient).sum(-1))
    half = cos * edges.diff(dim=-1) / 2
    k = torch.exp(10 * renderer.log_sharpness)
    before, after = torch.sigmoid(k * (sdf - half)), torch.sigmoid(k * (sdf + half))
    alpha = ((before - after + 1e-5) / (before + 1e-5)).clamp(0, 1)
    passed, rgb, depth, opacity = torch.ones(len(edges)), 0.0, 0.0, 0.0
    for sample in range(alpha.shape[1]):
        weight = alpha[:, sample] * passed
        rgb, depth = rgb + weight[:, None] * colour[:, sample], depth + weight * edges[:, sample]
        opacity, passed = opacity + weight, passed * (1 - alpha[:, sample] + 1e-7)
    eikonal = (gradient.norm(dim=-1) - 1).square().mean(-1)
    return rgb, depth / (opacity + 1e-10) / GRID.scale, opacity, eikonal


class EdgesSeen:
    """Where a renderer samples its rays."""

    def __init__(self, renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.edges: list[Tensor] = []
        shade = renderer._shade

        def shade_and_note(table: Tensor, sharpness: Tensor, rays: Rays) -> tuple[Tensor, ...]:
            self.edges.append(rays.edges)
            return shade(table, sharpness, rays)

        monkeypatch.setattr(renderer, "_shade", shade_and_note)


def test_values_and_gradients_are_those_of_the_equations(monkeypatch: pytest.MonkeyPatch) -> None:
    renderer, volume, (origin, direction, jitter) = make_renderer(), random_volume(1, requires_grad=True), random_rays(1)
    with torch.no_grad():
        renderer.log_sharpness.fill_(0.2)
    seen = EdgesSeen(renderer, monkeypatch)
    rendering = renderer(volume, origin, direction, jitter)
    expected = render_by_hand(renderer, volume[0], origin[0], direction[0], seen.edges[0])
    expected = Rendering(*(part[None] for part in expected[:3]), hit=rendering.hit, eikonal=expected[3][None])
    assert rendering.hit.all()
    for name in ("rgb", "depth_m", "opacity", "eikonal"):
        torch.testing.assert_close(getattr(rendering, name), getattr(expected, name), atol=1e-4, rtol=1e-3)
    ours, autograds = (gradients_of(renderer, loss_of(result), volume) for result in (rendering, expected))
    for name, gradient in ours.items():
        scale = autograds[name].abs().max()
        assert scale > 0
        assert (gradient - autograds[name]).abs().max() < 2e-3 * scale, name


def test_the_slope_of_a_distance_is_autograds_and_can_be_differentiated_again() -> None:
    torch.manual_seed(0)
    points, features = (torch.randn(5, 3, requires_grad=True) for _ in range(2))
    mlp = SdfMlp(3, 6, 3)
    sdf, _, slope = mlp(points, features, with_slope=True)
    expected = torch.autograd.grad(sdf.sum(), (points, features), create_graph=True)
    for ours, autograds in zip(slope, expected, strict=True):
        torch.testing.assert_close(ours, autograds, atol=1e-6, rtol=1e-5)
        leaves = [points, features, mlp.block_weight, mlp.point_weight]
        again = (torch.autograd.grad(value.square().sum(), leaves, retain_graph=True) for value in (ours, autograds))
        for left, right in zip(*again, strict=True):
            torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-4)


class StoredDistance(nn.Module):
    """Says that the volume's first channel is the signed distance."""

    def forward(self, points: Tensor, features: Tensor, *, with_slope: bool) -> Distance:
        by_feature = F.one_hot(torch.zeros(len(points), dtype=torch.long), features.shape[1]).to(points)
        return Distance(features[:, 0], points.new_zeros(len(points), 16), Slope(torch.zeros_like(points), by_feature))


def exact_renderer(grid: VoxelGrid) -> Renderer:
    """The renderer at its true size and a sharpness of 403."""
    renderer = Renderer(1, grid, RenderShape())
    renderer.sdf = StoredDistance()
    nn.init.constant_(renderer.log_sharpness, 0.6)
    return renderer


# Cells of 0.8 m, as the release has them.
FINE_GRID = VoxelGrid((-25.6, -25.6, -8.0), (25.6, 25.6, 8.0), (64, 64, 20))


def test_a_sphere_is_seen_at_its_distance_to_centimetres() -> None:
    centre, radius_m, cell_m = torch.tensor([14.0, 2.0, -1.0]), 6.0, 0.8
    sdf = (voxel_centres(FINE_GRID, CPU) - centre).norm(dim=-1) - radius_m
    aims = centre + torch.tensor([[0.0, y, z] for y in (-2.5, 0.0, 1.2, 2.9) for z in (-2.4, 0.0, 2.4)])
    direction = F.normalize(aims, dim=-1)
    with torch.no_grad():
        seen = exact_renderer(FINE_GRID)(FINE_GRID.scale * sdf[None, None], torch.zeros(1, len(aims), 3), direction[None])
    along = direction @ centre
    expected_m = along - (radius_m**2 - centre @ centre + along**2).sqrt()
    error_m = (seen.depth_m[0] - expected_m).abs()
    assert seen.hit.all() and (seen.opacity > 0.99).all()
    # linear interpolation cuts a curve off by up to cell^2 / (8 radius) in each of two directions
    assert error_m.mean() < cell_m**2 / (4 * radius_m) and error_m.max() < 0.05


def test_the_ground_is_seen_at_its_distance_to_centimetres() -> None:
    ground_m, camera_m = -1.7, 0.3
    sdf = voxel_centres(FINE_GRID, CPU)[..., 2] - ground_m
    angles = torch.linspace(0.15, 1.2, 15)
    direction = torch.stack([angles.cos(), torch.zeros(15), -angles.sin()], dim=-1)
    origin = torch.tensor([0.0, 0.0, camera_m]).expand(15, 3)
    with torch.no_grad():
        seen = exact_renderer(FINE_GRID)(FINE_GRID.scale * sdf[None, None], origin[None], direction[None])
    expected_m = (camera_m - ground_m) / angles.sin()
    assert ((seen.depth_m[0] - expected_m).abs() / expected_m).max() < 0.02
    assert (seen.depth_m[0] - expected_m).abs().mean() < 0.04


def test_what_a_camera_lifts_is_rendered_at_its_depth() -> None:
    """Every bin of depth holds its distance to a wall: lifted it is the wall's signed distance, rendered along pixels it is depth."""
    wall_m, bins, size_px, patches = 9.3, DepthBins(1.0, 15.0, 70), (60, 80), (30, 40)
    grid = VoxelGrid((0.0, -8.0, -4.0), (14.0, 8.0, 8.0), (35, 40, 30))
    depth_m = bins.near_m + bins.size_m * (torch.arange(bins.count) + 0.5)
    distance_m = (wall_m - depth_m)[:, None, None].expand(1, 1, -1, *patches)
    present = torch.ones(1, 1, dtype=torch.bool)
    pix_from_volume = camera(height_m=0.8)
    volume = lift(
        torch.ones(1, 1, 1, *patches), distance_m, pix_from_volume[None, None], present, grid=grid, bins=bins, size_px=size_px
    )
    rays = see_through_pixels(pix_from_volume, torch.tensor([[40.0, 30.0], [30.0, 25.0], [55.0, 35.0], [20.0, 40.0]]))
    with torch.no_grad():
        seen = exact_renderer(grid)(grid.scale * volume, rays.origin.expand(4, -1)[None], rays.direction[None])
    expected_m = wall_m * rays.reach.norm(dim=-1)
    assert (seen.depth_m[0] - expected_m).abs().max() < 0.05


def test_samples_are_ordered_within_the_ray_and_the_fine_ones_are_where_the_surface_is(monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = exact_renderer(FINE_GRID)
    seen = EdgesSeen(renderer, monkeypatch)
    wall_m = 12.0
    sdf = (wall_m - voxel_centres(FINE_GRID, CPU)[..., 0]) * FINE_GRID.scale
    for jitter in (None, torch.zeros(1, 1, 2), torch.full((1, 1, 2), 0.999)):
        renderer(sdf[None, None], torch.zeros(1, 1, 3), torch.tensor([[[1.0, 0, 0]]]), jitter)
        edges_m = seen.edges.pop()[0] / FINE_GRID.scale
        assert len(edges_m) == renderer.shape.samples + 1
        assert (edges_m.diff() >= 0).all() and edges_m[0] >= 1 - 1e-5 and edges_m[-1] <= 25.6 + 1e-4
        step_m = 24.6 / renderer.shape.coarse
        # 2 intervals on either side of the wall hold 4 or 5 coarse samples, and most of the fine ones
        assert ((edges_m - wall_m).abs() < 2 * step_m).sum() > 4 + renderer.shape.fine * 0.6


def test_weights_are_those_of_light_that_is_taken_interval_by_interval() -> None:
    alpha = torch.rand(3, 7)
    expected, passed = [], torch.ones(3)
    for place in range(7):
        expected.append(alpha[:, place] * passed)
        passed = passed * (1 - alpha[:, place])
    torch.testing.assert_close(weigh(1 - alpha), torch.stack(expected, -1), atol=1e-5, rtol=1e-4)
    opaque = weigh(torch.tensor([[1.0, 0.0, 0.0, 1.0]]))
    torch.testing.assert_close(opaque, torch.tensor([[0.0, 1.0, 0.0, 0.0]]), atol=1e-5, rtol=0)


def test_survival_is_one_less_the_papers_alpha() -> None:
    sdf, change, k = torch.randn(4, 5), -torch.rand(4, 5), 20.0
    before, after = torch.sigmoid(k * (sdf - change / 2)), torch.sigmoid(k * (sdf + change / 2))
    alpha = ((before - after + 1e-5) / (before + 1e-5)).clamp(0, 1)
    torch.testing.assert_close(1 - survive(sdf, change, k), alpha, atol=1e-5, rtol=1e-4)


def test_a_clip_is_rendered_as_if_it_were_alone() -> None:
    renderer, volume, rays = make_renderer(), random_volume(), random_rays()
    together = renderer(volume, *rays)
    for clip in range(2):
        alone = renderer(volume[clip : clip + 1], *(part[clip : clip + 1] for part in rays))
        for both, one in zip(together, alone, strict=True):
            torch.testing.assert_close(both[clip], one[0], atol=1e-5, rtol=1e-4)


def test_recomputing_and_chunks_change_no_gradient() -> None:
    renderer, volume, rays = make_renderer(), random_volume(requires_grad=True), random_rays()
    kept = gradients_of(renderer, loss_of(renderer(volume, *rays)), volume)
    again = gradients_of(renderer, loss_of(renderer(volume, *rays, recompute=True)), volume)
    for name, gradient in kept.items():
        assert torch.equal(again[name], gradient), name
    seven_rays = 7 * renderer.kept_numbers * 4 * SHAPE.samples
    assert renderer.rays_at_once(seven_rays) == 7
    parts = gradients_of(renderer, loss_of(renderer(volume, *rays, recompute=True, chunk_bytes=seven_rays)), volume)
    for name, gradient in kept.items():
        torch.testing.assert_close(parts[name], gradient, atol=1e-5 * gradient.abs().max().item(), rtol=1e-3)


def kept_bytes(renderer: Renderer, volume: Tensor, rays: tuple[Tensor, Tensor, Tensor], *, recompute: bool) -> int:
    """What a render keeps for its backward, each storage once."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        rendering = renderer(volume, *rays, recompute=recompute)
    del rendering
    return sum(kept.values())


def test_recomputing_keeps_little_more_than_the_volume_and_the_bound_on_chunks_is_what_is_kept() -> None:
    renderer = make_renderer(RenderShape(coarse=24, fine=8))
    volume, rays = random_volume(1, requires_grad=True), random_rays(1, 400)
    samples = 400 * 32
    kept, recomputed = (kept_bytes(renderer, volume, rays, recompute=recompute) for recompute in (False, True))
    of_volume = volume.numel() * volume.element_size()
    assert recomputed < of_volume + 0.02 * kept
    per_sample = (kept - of_volume) / samples / 4
    assert per_sample == pytest.approx(renderer.kept_numbers, rel=0.1)


def test_rays_that_all_miss_give_zeros_and_finite_gradients() -> None:
    renderer, volume, (origin, direction, jitter) = make_renderer(), random_volume(requires_grad=True), random_rays()
    origin = origin + torch.tensor([0.0, 0.0, 100.0])
    direction = torch.where(direction[..., 2:] < 0, -direction, direction)
    direction[:, :3] = 0  # and some that are none
    rendering = renderer(volume, origin, direction, jitter, recompute=True)
    assert not rendering.hit.any()
    assert not any(part.any() for part in (rendering.rgb, rendering.depth_m, rendering.opacity, rendering.eikonal))
    assert all(not gradient.any() for gradient in gradients_of(renderer, loss_of(rendering), volume).values())


def test_rays_that_miss_do_not_disturb_others() -> None:
    renderer, volume, (origin, direction, jitter) = make_renderer(), random_volume(), random_rays()
    away = torch.arange(20) % 3 == 0
    expected = renderer(volume, origin, direction, jitter)
    origin = torch.where(away[:, None], torch.tensor([1e6, 0.0, 0.0]), origin)
    mixed = renderer(volume, origin, direction, jitter)
    assert torch.equal(mixed.hit, (~away).expand(2, -1))
    for both, alone in zip(mixed[:3], expected[:3], strict=True):
        torch.testing.assert_close(both[:, ~away], alone[:, ~away])


def test_an_empty_volume_and_absurd_sharpness_give_finite_gradients() -> None:
    for log_sharpness in (-3.0, 0.3, 1.3, 3.0):
        renderer = make_renderer()
        nn.init.constant_(renderer.log_sharpness, log_sharpness)
        volume = torch.zeros(2, CHANNELS, *GRID.zyx, requires_grad=True)
        rendering = renderer(volume, *random_rays())
        gradients = gradients_of(renderer, loss_of(rendering), volume)
        assert all(part.isfinite().all() for part in (*rendering[:3], *gradients.values()))


def test_autocast_does_not_reach_the_renderer() -> None:
    renderer, volume, rays = make_renderer(), random_volume(requires_grad=True), random_rays()
    expected = renderer(volume, *rays)
    expected_gradients = gradients_of(renderer, loss_of(expected), volume)
    with torch.autocast("cpu", torch.bfloat16):
        rendering = renderer(volume, *rays, recompute=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(rendering, expected, strict=True))
    for name, gradient in gradients_of(renderer, loss_of(rendering), volume).items():
        assert torch.equal(gradient, expected_gradients[name])


def test_evaluation_without_gradients_gives_the_same_numbers() -> None:
    renderer, volume, (origin, direction, _) = make_renderer(), random_volume(), random_rays()
    expected = renderer(volume, origin, direction)
    for without in (torch.no_grad, torch.inference_mode):
        with without():
            rendering = renderer(volume, origin, direction)
        assert not rendering.rgb.requires_grad
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(rendering, expected, strict=True))


def test_no_jitter_is_the_middle_and_jitter_moves_samples() -> None:
    renderer, volume, (origin, direction, jitter) = make_renderer(), random_volume(), random_rays()
    middle = renderer(volume, origin, direction)
    assert torch.equal(renderer(volume, origin, direction, torch.full_like(jitter, 0.5)).depth_m, middle.depth_m)
    assert not torch.equal(renderer(volume, origin, direction, jitter).depth_m, middle.depth_m)


def test_all_parameters_have_a_dimension_and_the_sharpness_starts_as_released() -> None:
    renderer = make_renderer()
    assert all(parameter.ndim > 0 for parameter in renderer.parameters())
    assert torch.exp(10 * renderer.log_sharpness).item() == pytest.approx(math.exp(3), rel=1e-6)


def test_a_scene_can_be_learnt() -> None:
    """A volume fitted to the depth of a wall 5 m ahead renders it."""
    renderer = make_renderer(RenderShape(coarse=24, fine=12, near_m=0.5))
    volume = (0.1 * random_volume(1)).requires_grad_()
    angles = torch.linspace(-0.4, 0.4, 32)
    direction = torch.stack([angles.cos(), angles.sin(), torch.zeros(32)], dim=-1)[None]
    target_m = (5.0 / angles.cos())[None]
    optimizer = torch.optim.Adam([{"params": renderer.parameters(), "lr": 5e-3}, {"params": [volume], "lr": 5e-2}])
    generator, errors_m = torch.Generator().manual_seed(0), []
    for _ in range(80):
        rendering = renderer(volume, torch.zeros(1, 32, 3), direction, torch.rand(1, 32, 2, generator=generator))
        error_m = (rendering.depth_m - target_m).abs().mean()
        optimizer.zero_grad()
        error_m.backward()
        optimizer.step()
        errors_m.append(error_m.item())
    assert sum(errors_m[-5:]) / 5 < 0.25 * errors_m[0]
