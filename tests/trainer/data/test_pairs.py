"""Pairs: overlap has known values for known cameras, and what is mined is what the bounds say, no more and no less."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer.data.dataroot import FRAMES, YAWS, Tables, make_tables, write_dataroot
from trainer.config.data import SURROUND_CAMERAS, NuscenesData
from trainer.data.columns import Columns
from trainer.data.frames import NO_ROW
from trainer.data.index import Index
from trainer.data.nuscenes import build_index, open_index
from trainer.data.pairs import frustum_points, image_overlap, mine_pairs, pairs_path, visible_share
from trainer.errors import DataError

PIX_FROM_CAM = np.array([[32.0, 0, 32], [0, 32, 18], [0, 0, 1]])
SIZE_PX = (64, 36)
EGO_FROM_CAM = np.array([[0.0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 1.5], [0, 0, 0, 1]])


def overlap_of(
    reference_from_target: np.ndarray,
    *,
    pix_from_reference: np.ndarray = PIX_FROM_CAM,
    reference_size_px: tuple[int, int] = SIZE_PX,
    pix_from_target: np.ndarray = PIX_FROM_CAM,
    target_size_px: tuple[int, int] = SIZE_PX,
) -> float:
    points = frustum_points(pix_from_target, target_size_px, EGO_FROM_CAM)
    sizes = np.array([reference_size_px])
    return float(visible_share(points, reference_from_target[None], pix_from_reference[None], sizes)[0])


def turned(yaw: float, forward_m: float = 0.0) -> np.ndarray:
    """Reference camera from target camera where the reference is turned right by `yaw` and moved ahead."""
    cos, sin = math.cos(yaw), math.sin(yaw)
    world_from_reference = np.array([[cos, 0, sin, 0], [0, 1, 0, 0], [-sin, 0, cos, forward_m], [0, 0, 0, 1]])
    return np.linalg.inv(world_from_reference)


def test_a_camera_sees_all_of_itself_and_nothing_of_what_is_behind_it() -> None:
    assert overlap_of(np.eye(4)) == 1
    assert overlap_of(turned(math.pi)) == 0


@given(st.floats(0, math.pi / 2))
def test_overlap_of_a_turned_camera_is_the_share_of_the_image_plane_beyond_the_angle(yaw: float) -> None:
    # A point at tangent x is seen by a camera of half-angle 45 degrees turned by yaw if atan(x) > yaw - 45 degrees.
    # The reference is tall, so that nothing leaves it at the top or the bottom.
    tall = np.array([[32.0, 0, 32], [0, 32, 1000], [0, 0, 1]])
    found = overlap_of(turned(yaw), pix_from_reference=tall, reference_size_px=(64, 2000))
    least_tangent = math.tan(yaw - math.pi / 4)
    assert found == pytest.approx((1 - least_tangent) / 2, abs=0.02)


@given(st.floats(0.1, 1.2))
def test_overlap_is_the_same_both_ways_for_turns_to_either_side(yaw: float) -> None:
    assert overlap_of(turned(yaw)) == pytest.approx(overlap_of(turned(-yaw)), abs=0.03)


@given(st.floats(0.1, 1.0))
def test_a_window_of_half_the_size_sees_a_quarter_and_is_seen_whole(shift: float) -> None:
    half = np.array([[32.0, 0, 16], [0, 32, 9], [0, 0, 1]])  # the middle half of the picture in both directions
    assert overlap_of(np.eye(4), pix_from_reference=half, reference_size_px=(32, 18)) == pytest.approx(0.25, abs=0.02)
    assert overlap_of(np.eye(4), pix_from_target=half, target_size_px=(32, 18)) == 1
    assert overlap_of(turned(0, -shift), pix_from_target=half, target_size_px=(32, 18)) == 1


def test_moving_ahead_loses_more_the_further_it_goes() -> None:
    overlaps = [overlap_of(turned(0, forward_m)) for forward_m in (0, 1, 2, 5, 10, 20, 45)]
    assert overlaps == sorted(overlaps, reverse=True)
    assert overlaps[-1] == 0, "the farthest sample is 40 m away"
    backwards = overlap_of(turned(0, -5.0))
    assert backwards == 1, "who stands behind sees all that is ahead"


def test_no_sample_lies_under_the_road_and_all_are_in_the_picture() -> None:
    points = frustum_points(PIX_FROM_CAM, SIZE_PX, EGO_FROM_CAM)
    points_ego = points @ EGO_FROM_CAM[:3, :3].T + EGO_FROM_CAM[:3, 3]
    assert points_ego[:, 2].min() > -1e-9
    projected = points @ PIX_FROM_CAM.T
    pixels = projected[:, :2] / projected[:, 2:]
    assert ((pixels > 0) & (pixels < SIZE_PX)).all()
    assert points[:, 2].max() == pytest.approx(40, rel=0.05)


@pytest.fixture(scope="module")
def index(data: NuscenesData) -> Index:
    return open_index(build_index(data))


def candidates_of(pairs: Columns) -> list[tuple[int, int, bool, float]]:
    """(anchor, candidate, is in time, overlap) of every pair."""
    listed = []
    for row, anchor in enumerate(pairs["anchor"]):
        first, end = pairs["first_candidate"][row : row + 2]
        for place in range(first, end):
            in_time = place >= pairs["first_in_time"][row]
            listed.append((int(anchor), int(pairs["candidate"][place]), bool(in_time), float(pairs["overlap"][place])))
    return listed


def change(data: NuscenesData, *, clip: dict | None = None, **pairs: float) -> NuscenesData:
    return data.model_copy(update={"clip": data.clip.model_copy(update=clip or {}), "pairs": data.pairs.model_copy(update=pairs)})


def overlap_of_all(index: Index) -> np.ndarray:
    """Of every image with every other one."""
    N = len(index.columns["image_file"])
    target, reference = np.divmod(np.arange(N * N), N)
    return image_overlap(index, target, reference).reshape(N, N)


def expected_pairs(index: Index, config: NuscenesData) -> dict[tuple[int, int], float]:
    """Of scene 0, by looking at every anchor and every other clip, image by image."""
    V, T = len(config.cameras), config.clip.frames
    images = [np.arange(*index.images_of(0, camera).indices(10**9)) for camera in config.cameras]
    every = round(config.clip.spacing_s / 0.25)  # the drive has four frames a second
    starts = range(FRAMES - every * (T - 1))
    clips = {(start, view): images[view][start : start + every * T : every][:T] for start in starts for view in range(V)}
    centre = index.world_from_cam(np.arange(len(index.columns["image_file"])))[:, :3, 3]
    overlap_between = overlap_of_all(index)
    found = {}
    for (start, view), target in clips.items():
        for (other, other_view), reference in clips.items():
            if (start == other) == (view == other_view):
                continue
            overlap = float(overlap_between[target, reference].mean())
            if view == other_view:
                gap_s = np.ptp(index.timestamp_us(np.array([target[0], reference[0]]))) / 1e6
                all_target, all_reference = (rows.ravel() for rows in np.meshgrid(target, reference))
                motion_m = np.linalg.norm(centre[all_target] - centre[all_reference], axis=-1).min()
                likest = overlap_between[all_target, all_reference].max()
                is_pair = gap_s <= config.pairs.max_gap_s and motion_m >= config.pairs.min_motion_m
            else:
                likest, is_pair = overlap_between[target, reference].max(), True
            if is_pair and overlap >= config.pairs.min_overlap and likest <= config.pairs.max_overlap:
                found[start * V + view, other * V + other_view] = overlap
    return found


@pytest.mark.parametrize("clip", [{"frames": 1}, {"frames": 2, "spacing_s": 0.5}, {"frames": 3, "spacing_s": 0.25}])
def test_mined_pairs_are_those_that_looking_at_every_pair_of_clips_finds(data: NuscenesData, index: Index, clip: dict) -> None:
    config = change(data, clip=clip, max_overlap=0.9)
    mined = candidates_of(Columns(mine_pairs(index, config, [0], split="train")))
    expected = expected_pairs(index, config)
    assert {(anchor, candidate) for anchor, candidate, _, _ in mined} == set(expected)
    for anchor, candidate, in_time, overlap in mined:
        assert overlap == pytest.approx(expected[anchor, candidate], abs=1e-3)
        assert in_time == (anchor % len(YAWS) == candidate % len(YAWS))
    assert len({in_time for _, _, in_time, _ in mined}) == 2, "both kinds are there to be tested"


def test_clips_of_one_camera_never_share_an_image(data: NuscenesData, index: Index) -> None:
    config = change(data, clip={"frames": 3, "spacing_s": 0.25}, max_overlap=1.0, min_motion_m=0.01)
    pairs = Columns(mine_pairs(index, config, [0, 1], split="all"))
    for anchor, candidate, in_time, _ in candidates_of(pairs):
        if in_time:
            target, reference = (pairs["clip_frames"][code // len(YAWS)] for code in (anchor, candidate))
            assert not set(target) & set(reference)


def test_cameras_turned_by_45_degrees_overlap_and_opposite_ones_do_not(data: NuscenesData, index: Index) -> None:
    pairs = Columns(mine_pairs(index, data, [0], split="train"))
    cameras = tuple(YAWS)
    across = {
        (cameras[anchor % 3], cameras[candidate % 3]) for anchor, candidate, in_time, _ in candidates_of(pairs) if not in_time
    }
    assert across == {("CAM_FRONT", "CAM_FRONT_LEFT"), ("CAM_FRONT_LEFT", "CAM_FRONT")}


def test_pairs_stay_within_their_scene(data: NuscenesData, index: Index) -> None:
    pairs = Columns(mine_pairs(index, data, [0, 1], split="all"))
    scene = pairs["frame_scene"]
    listed = candidates_of(pairs)
    assert {int(scene[anchor // 3]) for anchor, *_ in listed} == {0, 1}
    assert all(scene[anchor // 3] == scene[candidate // 3] for anchor, candidate, *_ in listed)
    whole = pairs["clip_frames"][:, 0] != NO_ROW
    rows = pairs["frame_rows"][whole]
    np.testing.assert_array_equal(index.columns["image_scene"][rows], np.broadcast_to(scene[whole, None], rows.shape))


def test_shares_of_0_and_1_leave_one_kind_out(data: NuscenesData, index: Index) -> None:
    for share, kinds in ((0.0, {True}), (1.0, {False})):
        config = change(data, cross_camera_share=share)
        mined = candidates_of(Columns(mine_pairs(index, config, [0], split="train")))
        assert {in_time for _, _, in_time, _ in mined} == kinds


def test_figures_count_what_was_mined(data: NuscenesData, index: Index) -> None:
    pairs = Columns(mine_pairs(index, data, [0], split="train"))
    figures, mined = pairs.header["figures"], candidates_of(pairs)
    overlaps = [overlap for *_, overlap in mined]
    assert figures["clips"] == FRAMES * len(YAWS)
    assert figures["clips"] - figures["clips_without_pair"] == len(pairs["anchor"])
    assert figures["pairs_across_cameras"] == sum(not in_time for _, _, in_time, _ in mined)
    assert figures["pairs_in_time"] == sum(in_time for _, _, in_time, _ in mined)
    assert figures["overlap_p50"] == pytest.approx(np.median(overlaps), abs=1e-3)
    assert 0 < figures["mean_gap_s"] <= data.pairs.max_gap_s
    assert figures["mean_baseline_m"] > 0


def test_pairs_are_kept_apart_by_everything_that_changes_them(data: NuscenesData, index: Index) -> None:
    variants = [
        data,
        change(data, min_overlap=0.2),
        change(data, max_overlap=0.8),
        change(data, max_gap_s=0.6),
        change(data, min_motion_m=0.7),
        change(data, clip={"frames": 2}),
        change(data, clip={"frames": 2, "spacing_s": 0.25}),
        change(data, cross_camera_share=1.0),
        data.model_copy(update={"cameras": data.cameras[:2]}),
    ]
    paths = {pairs_path(index, config, [0]) for config in variants} | {pairs_path(index, data, [0, 1])}
    assert len(paths) == len(variants) + 1
    assert pairs_path(index, change(data, cross_camera_share=0.3), [0]) == pairs_path(index, data, [0])
    assert pairs_path(index, change(data, clip={"height_px": 32}), [0]) == pairs_path(index, data, [0])


def without_images(tables: Tables, channel: str) -> Tables:
    tables["sample_data"] = [row for row in tables["sample_data"] if channel not in row["filename"].split("/")]
    return tables


@pytest.mark.parametrize(
    ("clip", "pairs", "sentence"),
    [
        (
            {"frames": 64, "spacing_s": 1.0},
            {},
            r"64 frames 1 s apart .* longest scene lasts 3\.75 s.*lower data\.clip\.frames",
        ),
        (
            {},
            {"min_overlap": 0.94, "max_overlap": 0.95},
            r"none of its 48 clips .* across cameras: below_min_overlap.*widen",
        ),
        ({}, {"min_motion_m": 100.0, "cross_camera_share": 0.0}, r"turned away: \d+ in time: below_min_motion_m"),
    ],
)
def test_no_pairs_at_all_is_explained(data: NuscenesData, index: Index, clip: dict, pairs: dict, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        mine_pairs(index, change(data, clip=clip, **pairs), [0], split="train")


def test_a_camera_with_no_images_is_explained(data: NuscenesData, tmp_path: Path) -> None:
    root = write_dataroot(tmp_path / "root", without_images(make_tables(), "CAM_FRONT"))
    config = data.model_copy(update={"root": root, "index_folder": tmp_path})
    with pytest.raises(DataError, match="its images of CAM_FRONT stand further apart"):
        mine_pairs(open_index(build_index(config)), config, [0], split="train")


def test_frames_in_which_a_camera_is_missing_are_left_out_of_its_clips(data: NuscenesData, tmp_path: Path) -> None:
    tables = make_tables()
    tables["sample_data"] = [
        row for row in tables["sample_data"] if row["filename"] != "samples/CAM_FRONT_LEFT/scene-0001_005.jpg"
    ]
    root = write_dataroot(tmp_path / "root", tables)
    config = change(data, clip={"frames": 2, "spacing_s": 0.25}).model_copy(update={"root": root, "index_folder": tmp_path})
    index = open_index(build_index(config))
    pairs = Columns(mine_pairs(index, config, [0], split="train"))
    left = list(YAWS).index("CAM_FRONT_LEFT")
    assert pairs["frame_rows"][5, left] == NO_ROW
    used = {code // 3 for anchor, candidate, *_ in candidates_of(pairs) for code in (anchor, candidate) if code % 3 == left}
    assert not used & {4, 5}
    assert {3, 6} <= used


def test_the_six_neighbours_of_the_real_keyframe_overlap_and_no_others_do(keyframe_dataroot: Path, tmp_path: Path) -> None:
    index = open_index(build_index(NuscenesData(root=keyframe_dataroot, index_folder=tmp_path)))
    rows = np.array([index.images_of(0, camera).start for camera in SURROUND_CAMERAS])
    target, reference = np.divmod(np.arange(36), 6)
    overlap = image_overlap(index, rows[target], rows[reference])
    apart = np.minimum((target - reference) % 6, (reference - target) % 6)
    assert (overlap[apart == 0] == 1).all()
    assert (overlap[apart == 1] > 0).all()
    assert (overlap[apart == 1] < 0.25).all()
    assert (overlap[apart > 1] == 0).all()
