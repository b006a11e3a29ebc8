"""Frames and clips: nearest images within tolerance, and nothing where there is none."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.frames import NO_ROW, find_clips, nearest_within

times = st.lists(st.integers(0, 1000), min_size=0, max_size=20, unique=True).map(sorted)


@given(times, st.lists(st.integers(-100, 1100), min_size=1, max_size=10), st.floats(0, 200))
def test_nearest_within_is_what_looking_at_all_of_them_gives(there: list[int], wanted: list[int], tolerance: float) -> None:
    found = nearest_within(np.array(there, dtype=np.int64), np.array(wanted, dtype=np.int64), tolerance)
    for want, place in zip(wanted, found, strict=True):
        nearest = min((abs(time - want) for time in there), default=np.inf)
        if nearest > tolerance:
            assert place == NO_ROW
        else:
            assert abs(there[place] - want) == nearest


def test_a_clip_takes_the_frames_nearest_to_its_spacing() -> None:
    twelve_hz_us = np.round(np.arange(24) * 1e6 / 12).astype(np.int64)
    clips = find_clips(twelve_hz_us, 4, 0.5)
    np.testing.assert_array_equal(clips[0], [0, 6, 12, 18])
    np.testing.assert_array_equal(clips[5], [5, 11, 17, 23])
    np.testing.assert_array_equal(clips[7], [7, 13, 19, 23])  # 0.17 s early is still nearer than half a spacing
    assert (clips[8:] == NO_ROW).all()


def test_a_clip_does_not_reach_over_a_hole_in_time() -> None:
    times_us = np.array([0, 250, 500, 2000, 2250, 2500], dtype=np.int64) * 1000
    clips = find_clips(times_us, 2, 0.25)
    np.testing.assert_array_equal(clips, [[0, 1], [1, 2], [-1, -1], [3, 4], [4, 5], [-1, -1]])


def test_spacing_below_the_frame_rate_finds_no_clip_rather_than_repeating_a_frame() -> None:
    assert (find_clips(np.arange(10, dtype=np.int64) * 250_000, 2, 0.05) == NO_ROW).all()


@given(st.integers(1, 6), st.floats(0.05, 1.0), st.integers(0, 2**32 - 1))
def test_frames_of_a_clip_are_distinct_and_each_within_half_a_spacing_of_its_time(
    frames: int, spacing_s: float, seed: int
) -> None:
    gaps_us = np.random.default_rng(seed).integers(1, 300_000, 40)
    times_us = np.cumsum(gaps_us)
    for start, clip in enumerate(find_clips(times_us, frames, spacing_s)):
        if clip[0] == NO_ROW:
            continue
        due_us = times_us[start] + np.arange(frames) * spacing_s * 1e6
        assert clip[0] == start
        assert (np.abs(times_us[clip] - due_us) <= spacing_s * 1e6 / 2 + 1).all()
        assert (np.diff(clip) > 0).all()
