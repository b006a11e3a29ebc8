"""The point encoder against its formula, what it does not see, and its parameters."""

import copy
import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.clouds import Cloud, Similarity, describe_cloud, transform_points
from models.config import POINT_SHAPES, PointShape
from models.points import NeighbourLinear, PointEncoder, PointNorm, Ring
from tests.models.test_clouds import SMALL, random_points

VARIANTS = [
    pytest.param(norm, use_xyz, id=f"{norm}-{'xyz' if use_xyz else 'blind'}")
    for norm in ("layer", "batch")
    for use_xyz in (False, True)
]


def build(norm: PointNorm, use_xyz: bool, shape: PointShape = SMALL) -> PointEncoder:
    torch.manual_seed(0)
    return PointEncoder(shape, features=1, use_xyz=use_xyz, norm=norm)


def stack(clouds: Sequence[Cloud]) -> tuple[Tensor, Tensor, list[list[Tensor]]]:
    """What the encoder takes of a batch of clouds."""
    points = torch.from_numpy(np.stack([cloud.points for cloud in clouds]))
    levels = zip(*(cloud.neighbours for cloud in clouds), strict=True)
    neighbours = [[torch.from_numpy(np.stack(ring)) for ring in zip(*rings, strict=True)] for rings in levels]
    return points[..., :3], points[..., 3:], neighbours


def random_clouds(*seeds: int) -> tuple[Tensor, Tensor, list[list[Tensor]]]:
    return stack([describe_cloud(random_points(seed), SMALL, start=seed) for seed in seeds])


def randomise(module: nn.Module) -> None:
    """Weights and biases that are all of some size, so that none can be forgotten."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))


def layer_by_hand(linear: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    x = x @ linear.weight.T
    if linear.bias is not None:
        x = x + linear.bias
        dims, eps = (-1,), 1e-6
    else:
        dims, eps = tuple(range(x.dim() - 1)), 1e-3
    centred = x - x.mean(dims, keepdim=True)
    return torch.relu(centred / (centred.square().mean(dims, keepdim=True) + eps).sqrt() * norm.weight + norm.bias)


def ring_by_hand(ring: Ring, xyz: Tensor, features: Tensor, neighbours: Tensor) -> Tensor:
    """Gather everything, then all layers: what the split first layer must equal."""
    batch = torch.arange(len(xyz))[:, None, None]
    x = features[batch, neighbours.long()]  # (B, M, k, F)
    if ring.embed.use_xyz:
        offset = xyz[batch, neighbours.long()] - xyz[:, : neighbours.shape[1], None]
        x = torch.cat([x, offset / ring.embed.radius_m], dim=-1)
    x = layer_by_hand(ring.embed, ring.norm, x)
    for layer in ring.layers:
        x = layer_by_hand(layer.linear, layer.norm, x)
    return x.amax(dim=2)


def encode_by_hand(encoder: PointEncoder, xyz: Tensor, features: Tensor, neighbours: list[list[Tensor]]) -> Tensor:
    for level, rings in zip(encoder.levels, neighbours, strict=True):
        found = [ring_by_hand(ring, xyz, features, around) for ring, around in zip(level.rings, rings, strict=True)]
        features = layer_by_hand(level.join.linear, level.join.norm, torch.cat(found, dim=-1))
        xyz = xyz[:, : features.shape[1]]
    return features


@pytest.mark.parametrize(("norm", "use_xyz"), VARIANTS)
def test_splitting_the_first_layer_changes_nothing(norm: PointNorm, use_xyz: bool) -> None:
    encoder, (xyz, features, neighbours) = build(norm, use_xyz), random_clouds(0, 1)
    randomise(encoder)
    encoded = encoder(xyz, features, neighbours)
    expected = encode_by_hand(encoder.double(), xyz.double(), features.double(), neighbours)
    assert encoded.shape == (2, SMALL.centres, SMALL.width)
    assert (encoded - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(("norm", "use_xyz"), VARIANTS)
def test_gradients_are_those_of_the_plain_formula(norm: PointNorm, use_xyz: bool) -> None:
    encoder, (xyz, features, neighbours) = build(norm, use_xyz), random_clouds(2, 3)
    randomise(encoder)
    plain = copy.deepcopy(encoder).double()
    weights = torch.randn(SMALL.width, generator=torch.Generator().manual_seed(1))
    (encoder(xyz, features, neighbours) * weights).sum().backward()
    (encode_by_hand(plain, xyz.double(), features.double(), neighbours) * weights).sum().backward()
    for (name, parameter), expected in zip(encoder.named_parameters(), plain.parameters(), strict=True):
        assert parameter.grad is not None and expected.grad is not None
        assert (parameter.grad - expected.grad).abs().max() < 1e-4 * expected.grad.abs().max(), name


@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize(
    "similarity", [Similarity(1.1), Similarity(is_flipped=True), Similarity(-0.4, 1.0, True, (35.2, 0.0, -1.0))]
)
def test_an_encoder_that_sees_no_coordinates_does_not_notice_turns_and_flips(norm: PointNorm, similarity: Similarity) -> None:
    encoder, (xyz, features, neighbours) = build(norm, use_xyz=False), random_clouds(0, 1)
    assert torch.equal(encoder(transform(similarity, xyz), features, neighbours), encoder(xyz, features, neighbours))


def test_an_encoder_that_sees_coordinates_notices_turns_and_flips() -> None:
    encoder, (xyz, features, neighbours) = build("layer", use_xyz=True), random_clouds(0, 1)
    before = encoder(xyz, features, neighbours)
    for similarity in (Similarity(1.1), Similarity(is_flipped=True)):
        after = encoder(transform(similarity, xyz), features, neighbours)
        assert (after - before).norm() > 0.05 * before.norm()


@pytest.mark.parametrize("use_xyz", [False, True])
def test_an_encoder_does_not_notice_where_the_cloud_is(use_xyz: bool) -> None:
    encoder, (xyz, features, neighbours) = build("layer", use_xyz), random_clouds(0)
    shifted = encoder(xyz + torch.tensor([4.0, -2.0, 1.0]), features, neighbours)
    torch.testing.assert_close(shifted, encoder(xyz, features, neighbours), atol=1e-4, rtol=1e-4)


def test_scale_is_noticed_through_the_neighbours_alone_when_coordinates_are_not_seen() -> None:
    encoder, points = build("layer", use_xyz=False), random_points(0)
    before, clouds = describe_cloud(points, SMALL), []
    for scale in (2.0, 1.0):
        larger = points * np.array([scale, scale, scale, 1], dtype=np.float32)
        clouds.append(describe_cloud(larger, SMALL))
    xyz, features, neighbours = stack([before])
    assert torch.equal(encoder(2 * xyz, features, neighbours), encoder(xyz, features, neighbours))
    changed, same = (encoder(*stack([cloud])) for cloud in clouds)
    assert torch.equal(same, encoder(xyz, features, neighbours))
    assert not torch.allclose(changed, same, atol=1e-3)


def transform(similarity: Similarity, xyz: Tensor) -> Tensor:
    return torch.from_numpy(transform_points(similarity.matrix, xyz.flatten(0, 1).numpy())).unflatten(0, xyz.shape[:2])


@pytest.mark.parametrize(("norm", "use_xyz"), VARIANTS)
def test_intensity_is_seen_from_the_start(norm: PointNorm, use_xyz: bool) -> None:
    encoder, (xyz, features, neighbours) = build(norm, use_xyz), random_clouds(0)
    before = encoder(xyz, features, neighbours)
    changed = encoder(xyz, features.square(), neighbours)
    assert (changed - before).norm() > 0.02 * before.norm()


def test_clouds_of_a_batch_do_not_see_each_other_under_layer_norm() -> None:
    encoder = build("layer", use_xyz=True)
    together = encoder(*random_clouds(0, 1, 2))
    for place in range(3):
        torch.testing.assert_close(together[place], encoder(*random_clouds(place))[0], atol=1e-5, rtol=1e-5)


def test_batch_norm_takes_the_same_statistics_in_evaluation() -> None:
    encoder, clouds = build("batch", use_xyz=False), random_clouds(0, 1)
    assert torch.equal(encoder.eval()(*clouds), encoder.train()(*clouds))


@pytest.mark.parametrize(("norm", "use_xyz"), VARIANTS)
def test_every_parameter_gets_a_finite_gradient(norm: PointNorm, use_xyz: bool) -> None:
    encoder = build(norm, use_xyz)
    encoder(*random_clouds(0, 1)).square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.dim() > 0, name
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name
    assert not list(encoder.buffers())


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_gradients_are_the_same_bits_every_time(norm: PointNorm) -> None:
    encoder, clouds = build(norm, use_xyz=True), random_clouds(0, 1)
    weights = torch.randn(SMALL.width)
    first, again = (torch.autograd.grad((encoder(*clouds) * weights).sum(), list(encoder.parameters())) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(("norm", "use_xyz"), VARIANTS)
def test_repeated_points_and_a_single_one_give_finite_features_and_gradients(norm: PointNorm, use_xyz: bool) -> None:
    few = random_points(0, 5)
    repeated = few[np.random.default_rng(0).integers(0, 5, SMALL.points)]
    single = np.zeros((SMALL.points, 4), dtype=np.float32)
    encoder = build(norm, use_xyz)
    encoded = encoder(*stack([describe_cloud(repeated, SMALL), describe_cloud(single, SMALL)]))
    encoded.sum().backward()
    assert encoded.isfinite().all()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in encoder.parameters())


def test_centres_that_coincide_have_the_same_features() -> None:
    few = random_points(1, 5)
    cloud = describe_cloud(few[np.random.default_rng(0).integers(0, 5, SMALL.points)], SMALL)
    encoded = build("layer", use_xyz=True)(*stack([cloud]))[0]
    for centre in range(cloud.distinct, SMALL.centres):
        (twin,) = np.flatnonzero((cloud.points[: cloud.distinct, :3] == cloud.points[centre, :3]).all(-1))
        torch.testing.assert_close(encoded[centre], encoded[twin], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("norm", "use_xyz"), VARIANTS)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_bf16_stays_near_float32_with_weights_of_either_kind(norm: PointNorm, use_xyz: bool, weights: torch.dtype) -> None:
    encoder, (xyz, features, neighbours) = build(norm, use_xyz), random_clouds(0, 1)
    expected = encoder(xyz, features, neighbours)
    xyz = xyz + torch.tensor([60.0, -60.0, 0.0])  # where bf16 coordinates would be a quarter of a metre apart
    rounded = copy.deepcopy(encoder).to(weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        encoded = rounded(xyz, features, neighbours)
    encoded.sum().backward()
    assert encoded.dtype == torch.float32
    # bf16 keeps 8 bits: up to 0.4 % an operation, a dozen of them on the way, and a BatchNorm enlarges what differs little.
    assert (encoded - expected).norm() < (0.04 if norm == "layer" else 0.1) * expected.norm()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in rounded.parameters())


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_linear_layers_start_xavier_uniform(norm: PointNorm) -> None:
    encoder = build(norm, use_xyz=True, shape=POINT_SHAPES["lean"])
    maps = [module for module in encoder.modules() if isinstance(module, nn.Linear | NeighbourLinear)]
    assert len(maps) == 3 * 3 * 3 + 3  # levels, rings and layers, and what joins the rings of a level
    for linear in maps:
        bound = math.sqrt(6 / sum(linear.weight.shape))
        assert linear.weight.abs().max() <= bound
        assert linear.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.2)
        if norm == "batch":
            assert linear.bias is None
        else:
            assert linear.bias.any() == isinstance(linear, NeighbourLinear)


def count_by_hand(shape: PointShape, *, features: int, use_xyz: bool, has_bias: bool) -> int:
    """Weights, perhaps a bias, and the two vectors of a norm, of every layer."""
    total = 0
    for level in shape.levels:
        for widths in level.widths:
            for before, after in itertools.pairwise((features + 3 * use_xyz, *widths)):
                total += before * after + (2 + has_bias) * after
        joined = sum(widths[-1] for widths in level.widths)
        total += joined * level.out + (2 + has_bias) * level.out
        features = level.out
    return total


@pytest.mark.parametrize("name", POINT_SHAPES)
@pytest.mark.parametrize(("norm", "use_xyz"), VARIANTS)
def test_parameters_are_as_many_as_counted_by_hand(name: str, norm: PointNorm, use_xyz: bool) -> None:
    shape = POINT_SHAPES[name]
    encoder = build(norm, use_xyz, shape)
    expected = count_by_hand(shape, features=1, use_xyz=use_xyz, has_bias=norm == "layer")
    assert sum(parameter.numel() for parameter in encoder.parameters()) == expected


def test_the_reference_has_the_size_of_simipus() -> None:
    # With its biases before each BatchNorm, which do nothing, that has 1.778 M parameters.
    assert count_by_hand(POINT_SHAPES["reference"], features=1, use_xyz=False, has_bias=True) == pytest.approx(1.778e6, rel=1e-3)
    encoder = build("batch", use_xyz=False, shape=POINT_SHAPES["reference"])
    assert sum(parameter.numel() for parameter in encoder.parameters()) == pytest.approx(1.778e6, rel=5e-3)


@pytest.mark.parametrize(("norm", "use_xyz"), VARIANTS)
def test_the_tiny_encoder_runs_on_clouds_of_its_size(norm: PointNorm, use_xyz: bool) -> None:
    shape = POINT_SHAPES["tiny"]
    clouds = stack([describe_cloud(random_points(seed, shape.points, size_m=20.0), shape) for seed in range(2)])
    encoded = build(norm, use_xyz, shape)(*clouds)
    encoded.sum().backward()
    assert encoded.shape == (2, shape.centres, shape.width) and encoded.isfinite().all()
