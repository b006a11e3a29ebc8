"""Windows and colours: intrinsics move with the pixels, and factors are drawn from their range."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.transforms import Window, draw_colours, draw_window, move_intrinsics, place_window

sizes = st.tuples(st.integers(16, 2000), st.integers(16, 2000))
shares = st.floats(0.1, 1.0)
seeds = st.integers(0, 2**32 - 1)


@given(sizes, sizes, shares, seeds, st.booleans())
def test_windows_lie_inside_the_source_and_keep_the_aspect_ratio_but_for_a_decoded_pixel(
    source: tuple[int, int], out: tuple[int, int], share: float, seed: int, is_mirrored: bool
) -> None:
    window = draw_window(source, out, crop_share=(share, share), is_mirrored=is_mirrored, rng=np.random.default_rng(seed))
    left, top, right, bottom = window.box
    assert left >= 0 and top >= 0
    assert right <= source[0] and bottom <= source[1]
    wanted = place_window(source, out, share=share)
    assert abs(right - left - wanted.source_width_px) < max(1, window.shrink)
    assert abs(bottom - top - wanted.source_height_px) < max(1, window.shrink)
    assert wanted.source_width_px / wanted.source_height_px == pytest.approx(out[0] / out[1])
    assert max(wanted.source_width_px / source[0], wanted.source_height_px / source[1]) == pytest.approx(share)


@given(sizes, sizes, shares, seeds)
def test_corners_of_the_window_become_corners_of_the_output(
    source: tuple[int, int], out: tuple[int, int], share: float, seed: int
) -> None:
    window = draw_window(source, out, crop_share=(share, share), is_mirrored=False, rng=np.random.default_rng(seed))
    left, top, right, bottom = window.box
    corners = window.out_from_source @ np.array([[left, right], [top, bottom], [1, 1]])
    np.testing.assert_allclose(corners[:2], [[0, out[0]], [0, out[1]]], atol=1e-6)


@given(seeds, st.booleans())
def test_a_point_projected_by_moved_intrinsics_is_where_the_window_puts_its_pixel(seed: int, is_mirrored: bool) -> None:
    rng = np.random.default_rng(seed)
    pix_from_cam = np.array([[1266.0, 0, 816], [0, 1266, 491], [0, 0, 1]])
    window = draw_window((1600, 900), (96, 54), crop_share=(0.3, 0.9), is_mirrored=is_mirrored, rng=rng)
    point_cam = rng.uniform((-20, -5, 2), (20, 5, 60))
    before, after = (matrix @ point_cam / point_cam[2] for matrix in (pix_from_cam, move_intrinsics(pix_from_cam, window)))
    left, top, right, bottom = window.box
    across, down = (before[0] - left) / (right - left), (before[1] - top) / (bottom - top)
    expected = ((1 - across if is_mirrored else across) * 96, down * 54)
    np.testing.assert_allclose(after[:2], expected, atol=1e-6)


def test_without_augmentation_the_window_is_the_largest_centred_one() -> None:
    assert place_window((1600, 900), (224, 224)).box == pytest.approx((350, 0, 1250, 900))
    assert place_window((1600, 900), (320, 180)).box == pytest.approx((0, 0, 1600, 900))
    assert place_window((100, 900), (10, 10)).box == pytest.approx((0, 400, 100, 500))


def test_places_of_random_windows_are_uniform() -> None:
    rng = np.random.default_rng(0)
    windows = [draw_window((1000, 1000), (10, 10), crop_share=(0.5, 0.5), is_mirrored=False, rng=rng) for _ in range(2000)]
    lefts = np.sort([window.left_px for window in windows])
    uniform = np.linspace(0, 500, 2000)
    assert np.abs(lefts - uniform).max() < 500 * 1.63 / np.sqrt(2000)  # Kolmogorov and Smirnov, 1 % level


def test_a_mirrored_window_turns_the_focal_length() -> None:
    window = Window(0.0, 0.0, 10.0, 10.0, 10, 10, is_mirrored=True)
    moved = move_intrinsics(np.array([[5.0, 0, 4], [0, 5, 5], [0, 0, 1]]), window)
    np.testing.assert_array_equal(moved, [[-5, 0, 6], [0, 5, 5], [0, 0, 1]])


@given(sizes, sizes, shares, seeds)
def test_a_random_window_lies_on_whole_pixels_of_what_is_decoded_and_covers_the_output(
    source: tuple[int, int], out: tuple[int, int], share: float, seed: int
) -> None:
    window = draw_window(source, out, crop_share=(share, share), is_mirrored=False, rng=np.random.default_rng(seed))
    assert all(side % window.shrink == 0 for side in window.box)
    enlarged = min(window.source_width_px / out[0], window.source_height_px / out[1])
    assert window.shrink == 1 or window.shrink <= enlarged
    assert window.shrink == 8 or 2 * window.shrink > enlarged


def test_colour_factors_reach_both_ends_of_their_range_one_by_one() -> None:
    factors = np.stack([draw_colours(0.4, np.random.default_rng(seed)) for seed in range(300)])
    assert factors.dtype == np.float32
    np.testing.assert_allclose(factors.min(0), 0.6, atol=0.02)
    np.testing.assert_allclose(factors.max(0), 1.4, atol=0.02)
    assert np.abs(np.corrcoef(factors.T) - np.eye(3)).max() < 0.2


def test_no_jitter_changes_nothing_and_draws_nothing() -> None:
    rng, untouched = np.random.default_rng(1), np.random.default_rng(1)
    np.testing.assert_array_equal(draw_colours(0.0, rng), 1)
    assert rng.random() == untouched.random()
