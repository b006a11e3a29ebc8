"""Masks: how many, which, and how evenly."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.config import Grid, MaskConfig
from models.masking import count_visible, draw_visible

grids = st.builds(Grid, st.integers(1, 4), st.integers(1, 3), st.integers(1, 6), st.integers(1, 6))
ratios = st.floats(0.05, 0.95)
seeds = st.integers(0, 2**32 - 1)


@given(grids, ratios, seeds)
def test_a_random_mask_hides_the_whole_part_of_its_share(grid: Grid, ratio: float, seed: int) -> None:
    config = MaskConfig(ratio=ratio)
    visible = draw_visible(np.random.default_rng(seed), grid, config)
    assert len(visible) == grid.tokens - int(ratio * grid.tokens) == count_visible(grid, config)
    assert visible.dtype == np.int64
    assert np.all(np.diff(visible) > 0)
    assert visible.min() >= 0 and visible.max() < grid.tokens


@given(grids, ratios, seeds)
def test_a_tube_shows_the_same_places_in_every_frame_and_camera(grid: Grid, ratio: float, seed: int) -> None:
    config, places = MaskConfig(kind="tube", ratio=ratio), grid.h * grid.w
    visible = draw_visible(np.random.default_rng(seed), grid, config)
    assert len(visible) == count_visible(grid, config) == grid.t * grid.v * (places - int(ratio * places))
    assert np.all(np.diff(visible) > 0)
    frame, place = np.divmod(visible, places)
    shown = {tuple(place[frame == number]) for number in range(grid.t * grid.v)}
    assert len(shown) == 1


@pytest.mark.parametrize("kind", ["random", "tube"])
def test_a_mask_is_a_function_of_its_stream(kind: str) -> None:
    config, grid = MaskConfig(kind=kind, ratio=0.5), Grid(2, 1, 8, 8)
    first, again, other = (draw_visible(np.random.default_rng(seed), grid, config) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_croco_leaves_20_of_196() -> None:
    assert count_visible(Grid(1, 1, 14, 14), MaskConfig(ratio=0.9)) == 20


def test_every_token_is_equally_likely_to_stay() -> None:
    grid, config, draws = Grid(1, 1, 4, 5), MaskConfig(ratio=0.75), 4000
    rng = np.random.default_rng(0)
    counts = np.bincount(np.concatenate([draw_visible(rng, grid, config) for _ in range(draws)]), minlength=grid.tokens)
    share = count_visible(grid, config) / grid.tokens
    deviation = np.sqrt(draws * share * (1 - share))
    assert np.all(np.abs(counts - draws * share) < 5 * deviation)
