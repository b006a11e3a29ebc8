"""Sampling and neighbours against their definitions, matching, and transforms there and back."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from models.clouds import (
    Similarity,
    describe_cloud,
    draw_similarity,
    find_neighbours,
    match_centres,
    order_farthest_first,
    transform_points,
)
from models.config import POINT_SHAPES, PointShape, SetAbstractionShape

SMALL = PointShape(
    96,
    (
        SetAbstractionShape(32, (1.0, 2.5), (6, 8), ((8, 12), (8, 16)), 24),
        SetAbstractionShape(12, (2.0, 6.0), (4, 6), ((16, 20),) * 2, 28),
    ),
)
"""Rings that are partly full, and more inputs than outputs."""

Points = NDArray[np.float32]
Rows = NDArray[np.integer]


def random_points(seed: int, count: int = SMALL.points, *, size_m: float = 10.0) -> Points:
    """Coordinates and an intensity, denser towards the middle as a sweep is; no two distances are equal."""
    rng = np.random.default_rng(seed)
    xyz = rng.normal(size=(count, 3)) * size_m * [0.3, 0.3, 0.1]
    return np.column_stack([xyz, rng.random(count)]).astype(np.float32)


@st.composite
def lattices(draw: st.DrawFn, max_points: int = 40) -> Points:
    """Points at multiples of a quarter: distances are exact, many are equal, and many points coincide."""
    coordinates = st.tuples(*(st.integers(-4, 4),) * 3)
    return np.array(draw(st.lists(coordinates, min_size=1, max_size=max_points)), dtype=np.float32) / 4


def farthest_by_definition(xyz: Points, count: int, start: int) -> list[int]:
    picks = [start]
    while len(picks) < count:
        gaps = ((xyz[:, None] - xyz[picks]) ** 2).sum(-1).min(1)
        left = [row for row in range(len(xyz)) if row not in picks]
        picks.append(min(left, key=lambda row: (-gaps[row], xyz[row, 0], row)))
    return picks


def ring_by_definition(xyz: Points, centre: int, inner: float, outer: float) -> dict[int, float]:
    """Every row of the ring, and its distance."""
    distance = np.sqrt(((xyz.astype(np.float64) - xyz[centre]) ** 2).sum(-1))
    is_inside = (distance > 0) & (distance >= inner) & (distance < outer)
    return {int(row): float(distance[row]) for row in np.flatnonzero(is_inside)}


def check_ring(xyz: Points, nearest: Rows, *, inner: float, outer: float) -> None:
    """That each row of `nearest` is the centre, the nearest of its ring in order, then the centre again."""
    for centre, (first, *rows) in enumerate(nearest.tolist()):
        expected = ring_by_definition(xyz, centre, inner, outer)
        held = min(len(rows), len(expected))
        assert first == centre
        assert len(set(rows[:held])) == held
        # Which of equally near ones is kept is free, so distances are compared and not rows.
        assert [expected[row] for row in rows[:held]] == pytest.approx(sorted(expected.values())[:held], abs=1e-12)
        assert set(rows[held:]) <= {centre}


@given(lattices(), st.data())
def test_centres_are_taken_greedily_farthest_first(xyz: Points, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(xyz)))
    start = data.draw(st.integers(0, len(xyz) - 1))
    assert order_farthest_first(xyz, count, start=start).rows.tolist() == farthest_by_definition(xyz, count, start)


def test_centres_of_a_cloud_without_ties_are_taken_farthest_first() -> None:
    xyz = random_points(0, 300)[:, :3]
    assert order_farthest_first(xyz, 120, start=7).rows.tolist() == farthest_by_definition(xyz, 120, 7)


@given(lattices(), st.data())
def test_sampling_its_own_order_again_changes_nothing(xyz: Points, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(xyz)))
    ordered = xyz[order_farthest_first(xyz, count, start=data.draw(st.integers(0, len(xyz) - 1))).rows]
    assert order_farthest_first(ordered, count).rows.tolist() == list(range(count))


@given(lattices(), st.data())
def test_all_distinct_points_come_before_any_repetition(xyz: Points, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(xyz)))
    rows, distinct = order_farthest_first(xyz, count)
    assert len(set(rows.tolist())) == count
    assert distinct == min(count, len(np.unique(xyz, axis=0))) == len(np.unique(xyz[rows[:distinct]], axis=0))


@given(lattices(), st.lists(st.integers(1, 10), min_size=1, max_size=3, unique=True), st.data())
def test_rings_hold_the_nearest_points_between_their_radii(xyz: Points, quarters: list[int], data: st.DataObject) -> None:
    radii = [quarter / 4 for quarter in sorted(quarters)]  # exactly some distances
    counts = [data.draw(st.integers(1, 9)) for _ in radii]
    centres = xyz[: data.draw(st.integers(1, len(xyz)))]
    found = find_neighbours(xyz, centres, radii_m=radii, counts=counts)
    assert [nearest.shape for nearest in found] == [(len(centres), count) for count in counts]
    for nearest, (inner, outer) in zip(found, itertools.pairwise((0.0, *radii)), strict=True):
        check_ring(xyz, nearest, inner=inner, outer=outer)


def test_rings_are_filled_also_where_far_more_points_lie_within_them_than_are_kept() -> None:
    xyz = random_points(1, 400, size_m=1.0)[:, :3]
    radii, counts = (0.3, 0.6), (5, 40)
    closer = [len(ring_by_definition(xyz, centre, 0, 0.3)) for centre in range(100)]
    assert max(closer) > 100, "no centre has a crowd around it"
    found = find_neighbours(xyz, xyz[:100], radii_m=radii, counts=counts)
    check_ring(xyz, found[0], inner=0, outer=0.3)
    check_ring(xyz, found[1], inner=0.3, outer=0.6)


def test_a_described_cloud_holds_the_same_points_with_the_centres_of_every_level_first() -> None:
    points = random_points(2)
    cloud = describe_cloud(points, SMALL, start=5)
    assert np.array_equal(np.unique(cloud.points, axis=0), np.unique(points, axis=0))
    assert np.array_equal(cloud.points[0], points[5])
    for inputs, level in zip((SMALL.points, *(level.centres for level in SMALL.levels)), SMALL.levels, strict=False):
        rows = order_farthest_first(np.ascontiguousarray(cloud.points[:inputs, :3]), level.centres).rows
        assert rows.tolist() == list(range(level.centres))
    assert cloud.distinct == SMALL.centres


@pytest.mark.parametrize("name", POINT_SHAPES)
def test_neighbours_are_rows_of_the_inputs_of_their_level(name: str) -> None:
    shape = POINT_SHAPES[name]
    cloud = describe_cloud(random_points(3, shape.points, size_m=60.0), shape)
    inputs = shape.points
    for level, rings in zip(shape.levels, cloud.neighbours, strict=True):
        assert [ring.shape for ring in rings] == [(level.centres, count) for count in level.neighbours]
        for nearest in rings:
            assert nearest.dtype == np.int32
            assert nearest.min() >= 0 and nearest.max() < inputs
            assert nearest[:, 0].tolist() == list(range(level.centres))
        inputs = level.centres


def test_every_ring_of_every_level_is_as_defined() -> None:
    cloud = describe_cloud(random_points(4), SMALL)
    inputs = SMALL.points
    for level, rings in zip(SMALL.levels, cloud.neighbours, strict=True):
        for nearest, (inner, outer) in zip(rings, itertools.pairwise((0.0, *level.radii_m)), strict=True):
            check_ring(cloud.points[:inputs, :3], nearest, inner=inner, outer=outer)
        inputs = level.centres


def test_a_cloud_of_fewer_distinct_points_than_centres_says_so() -> None:
    few = random_points(5, 10)
    points = few[np.random.default_rng(0).integers(0, len(few), SMALL.points)]
    cloud = describe_cloud(points, SMALL)
    assert cloud.distinct == len(np.unique(points, axis=0)) <= len(few) < SMALL.centres
    assert len(np.unique(cloud.points[: cloud.distinct], axis=0)) == cloud.distinct
    for level, rings in zip(SMALL.levels, cloud.neighbours, strict=True):
        for nearest, (inner, outer) in zip(rings, itertools.pairwise((0.0, *level.radii_m)), strict=True):
            for centre, (first, *rows) in enumerate(nearest.tolist()):
                distinct = cloud.points[: cloud.distinct, :3]
                away = np.linalg.norm(distinct - cloud.points[centre, :3], axis=-1)
                in_ring = np.flatnonzero((away > 0) & (away >= inner) & (away < outer))
                assert first == centre
                assert set(rows) - {centre} <= set(in_ring.tolist())
                assert len(set(rows) - {centre}) == min(len(rows), len(in_ring))


def test_one_point_repeated_is_a_cloud() -> None:
    cloud = describe_cloud(np.ones((SMALL.points, 4), dtype=np.float32), SMALL)
    assert cloud.distinct == 1
    assert all((nearest == np.arange(len(nearest))[:, None]).all() for rings in cloud.neighbours for nearest in rings)


def test_a_cloud_of_another_size_than_asked_is_an_error() -> None:
    with pytest.raises(AssertionError, match="a cloud of 96 points was asked, this one has 95"):
        describe_cloud(random_points(0, 95), SMALL)


@pytest.mark.parametrize("exact", [Similarity(is_flipped=True), Similarity(math.pi / 2), Similarity(-math.pi / 2, 1.0, True)])
def test_turned_and_mirrored_clouds_have_the_same_centres_and_neighbours(exact: Similarity) -> None:
    points = random_points(6)
    turned = points.copy()
    turned[:, :3] = points[:, :3] @ np.round(exact.matrix[:3, :3]).T.astype(np.float32)  # quarter turns without rounding
    before, after = describe_cloud(points, SMALL), describe_cloud(turned, SMALL)
    assert np.array_equal(before.points[:, 3], after.points[:, 3])
    assert same_neighbours(before.neighbours, after.neighbours)


def test_a_cloud_twice_as_large_has_the_same_neighbours_within_twice_the_radii_only() -> None:
    points = random_points(7)
    larger = points * np.array([2, 2, 2, 1], dtype=np.float32)
    levels = (level._replace(radii_m=tuple(2 * radius for radius in level.radii_m)) for level in SMALL.levels)
    before = describe_cloud(points, SMALL)
    assert same_neighbours(before.neighbours, describe_cloud(larger, PointShape(SMALL.points, tuple(levels))).neighbours)
    assert not same_neighbours(before.neighbours, describe_cloud(larger, SMALL).neighbours)


def same_neighbours(before: Sequence[Sequence[Rows]], after: Sequence[Sequence[Rows]]) -> bool:
    pairs = zip(itertools.chain(*before), itertools.chain(*after), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.sampled_from([None, 0.5, 100.0]))
def test_matching_finds_the_way_back_from_a_shuffle(seed: int, count: int, gate_m: float | None) -> None:
    rng = np.random.default_rng(seed)
    centres, shuffle = random_points(seed, count)[:, :3], rng.permutation(count)
    match, distance_m = match_centres(centres, centres[shuffle], gate_m=gate_m)
    assert np.array_equal(shuffle[match], np.arange(count))
    assert not distance_m.any()


def test_matching_recovers_the_pairs_of_a_transformed_view() -> None:
    centres = random_points(8, 64)[:, :3]
    matrix = Similarity(0.7, 1.2, True, (3.0, 0.0, -1.0)).matrix
    view = transform_points(matrix, centres)[::-1]
    match, distance_m = match_centres(centres, transform_points(np.linalg.inv(matrix), view), gate_m=1.0)
    assert match.tolist() == list(range(63, -1, -1))
    assert distance_m.max() < 1e-4


def test_a_gate_keeps_a_point_without_partner_from_displacing_another() -> None:
    a = np.array([[0, 0, 0], [1, 0, 0]], dtype=np.float32)
    b = np.array([[0.6, 0, 0], [10, 0, 0]], dtype=np.float32)
    # 0.6 + 9 is less than 0.4 + 10, but with all beyond half a metre alike, 0.5 + 0.5 is more than 0.4 + 0.5.
    match, distance_m = match_centres(a, b, gate_m=None)
    assert match.tolist() == [0, 1] and distance_m.tolist() == pytest.approx([0.6, 9])
    match, distance_m = match_centres(a, b, gate_m=0.5)
    assert match.tolist() == [1, 0] and distance_m.tolist() == pytest.approx([10, 0.4])


similarities = st.builds(
    Similarity,
    st.floats(-math.pi, math.pi),
    st.floats(0.5, 2.0),
    st.booleans(),
    st.tuples(*(st.floats(-50, 50),) * 3),
)


@given(similarities, st.integers(0, 2**32 - 1))
def test_a_transform_is_undone_by_its_inverse(similarity: Similarity, seed: int) -> None:
    xyz = np.random.default_rng(seed).uniform(-70, 70, (50, 3)).astype(np.float32)
    there = transform_points(similarity.matrix, xyz)
    back = transform_points(np.linalg.inv(similarity.matrix), there)
    assert np.abs(back - xyz).max() < 1e-4
    before, after = np.linalg.norm(xyz[1:] - xyz[:-1], axis=-1), np.linalg.norm(there[1:] - there[:-1], axis=-1)
    assert after == pytest.approx(similarity.scale * before, rel=1e-4, abs=1e-4)


def test_a_similarity_turns_about_its_centre_then_scales_about_the_origin_then_flips() -> None:
    quarter_turn = Similarity(math.pi / 2, 2.0, True, (10.0, 0.0, -1.0))
    # (11, 0) is 1 ahead of the centre, and after the turn 1 to its left: (10, 1); twice that is (20, 2); flipped (20, -2).
    turned = transform_points(quarter_turn.matrix, np.array([[11.0, 0.0, 5.0]], dtype=np.float32))
    np.testing.assert_allclose(turned, [[20.0, -2.0, 10.0]], atol=1e-5)
    assert np.array_equal(Similarity().matrix, np.eye(4))


def test_drawn_similarities_are_functions_of_their_stream_and_keep_their_bounds() -> None:
    def draw(seed: int) -> Similarity:
        stream = np.random.default_rng(seed)
        return draw_similarity(
            stream, max_yaw_rad=0.5, min_scale=0.75, max_scale=1.25, flip_share=0.25, centre_m=(35.2, 0.0, -1.0)
        )

    drawn = [draw(seed) for seed in range(400)]
    assert draw(3) == drawn[3] != drawn[4]
    assert all(abs(one.yaw_rad) <= 0.5 and 0.75 <= one.scale <= 1.25 and one.centre_m == (35.2, 0.0, -1.0) for one in drawn)
    # 400 draws of one in four: 100, and five standard deviations of sqrt(400 / 4 * 3 / 4)
    assert abs(sum(one.is_flipped for one in drawn) - 100) < 5 * math.sqrt(75)
    assert dataclasses.replace(drawn[0], scale=1.0).matrix[2, 2] == 1.0
