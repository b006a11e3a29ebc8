"""The source of surround clips: all cameras, each sweep on the pixels it belongs to, and data with holes."""

import dataclasses
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.data.dataroot import (
    FOCAL,
    HEIGHT,
    PERIOD_US,
    SPEED_M_S,
    SWEEP,
    TRIGGER_US,
    WIDTH,
    YAWS,
    make_tables,
    read_ramp,
    write_dataroot,
)
from trainer.config.data import NuscenesData
from trainer.data.build import build_source
from trainer.data.joint_source import JointSource
from trainer.data.pair_source import PAIR_FIELDS
from trainer.data.surround_source import CAMERA_FIELDS, LIDAR_FIELDS, SurroundSource
from trainer.errors import ClipError, DataError

ALL_FIELDS = CAMERA_FIELDS | LIDAR_FIELDS
FRAMES = 3


def stream(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def video(data: NuscenesData) -> NuscenesData:
    """Clips of three neighbouring frames."""
    return data.model_copy(update={"clip": data.clip.model_copy(update={"frames": FRAMES, "spacing_s": 0.25})})


def source_of(config: NuscenesData, *, augment: bool = True) -> SurroundSource:
    source = build_source(config, "train", ALL_FIELDS, augment=augment)
    assert isinstance(source, SurroundSource)
    return source


def dataroot_without(tmp_path: Path, is_left_out: Any) -> NuscenesData:
    """A dataroot whose sample_data lacks some rows."""
    tables = make_tables()
    tables["sample_data"] = [row for row in tables["sample_data"] if not is_left_out(row)]
    root = write_dataroot(tmp_path / "root", tables, {"train": list(SPEED_M_S)})
    clip = {"frames": 1, "height_px": 16, "width_px": 32}
    return NuscenesData(root=root, cameras=tuple(YAWS), val_split=None, clip=clip, index_folder=tmp_path / "index")


def test_a_sample_has_every_field_it_offers_in_the_documented_shape(video: NuscenesData) -> None:
    source = source_of(video)
    sample = source.load(5, stream())
    assert {name: (array.dtype.name, array.shape) for name, array in sample.items()} == {
        "images": ("uint8", (FRAMES, len(YAWS), 3, 16, 32)),
        "images_colours": ("float32", (3,)),
        "pix_from_ego": ("float32", (FRAMES, len(YAWS), 3, 4)),
        "first_from_ego": ("float32", (FRAMES, 4, 4)),
        "elapsed_s": ("float32", (FRAMES,)),
        "ego_from_lidar": ("float32", (FRAMES, 4, 4)),
        "points_lidar": ("float32", (FRAMES * 2, 4)),
        "first_point": ("int64", (FRAMES + 1,)),
        "pix_from_lidar": ("float32", (FRAMES, len(YAWS), 3, 4)),
    }
    assert set(sample) == source.offers == ALL_FIELDS


def test_points_that_are_not_finite_are_left_out_and_intensity_ends_at_one(video: NuscenesData) -> None:
    sample = source_of(video).load(0, stream())
    expected = [[*point[:3], point[3] / 255] for point in SWEEP if np.isfinite(point).all()]
    np.testing.assert_allclose(sample["points_lidar"][:2], expected, rtol=1e-6)
    np.testing.assert_array_equal(sample["first_point"], [0, 2, 4, 6])


def world_of(point_ego: np.ndarray, time_s: float, speed_m_s: float) -> np.ndarray:
    """The pose of the hand-made drive, written out."""
    yaw = 0.1 * time_s
    turn = np.array([[math.cos(yaw), -math.sin(yaw), 0], [math.sin(yaw), math.cos(yaw), 0], [0, 0, 1]])
    return turn @ point_ego + np.array([600 + speed_m_s * time_s, 1600, 0])


def ego_of(point_world: np.ndarray, time_s: float, speed_m_s: float) -> np.ndarray:
    yaw = 0.1 * time_s
    turn = np.array([[math.cos(yaw), -math.sin(yaw), 0], [math.sin(yaw), math.cos(yaw), 0], [0, 0, 1]])
    return turn.T @ (point_world - np.array([600 + speed_m_s * time_s, 1600, 0]))


@settings(max_examples=60)
@given(
    st.integers(0, 10), st.integers(0, 2), st.integers(0, 2**32 - 1), st.booleans(), st.floats(-0.7, 0.7), st.floats(-0.4, 0.4)
)
def test_a_point_falls_on_its_pixel_through_motion_crop_scale_and_mirror(
    video: NuscenesData, index: int, view: int, seed: int, flips: bool, across: float, down: float
) -> None:
    source = source_of(video)
    augment = video.augment.model_copy(update={"flip_probability": float(flips), "colour_jitter": 0.0})
    sample = dataclasses.replace(source, augment=augment).load(index, stream(seed))
    camera, frame = list(YAWS)[view], 1
    # a point 20 m before this camera, in the frame of the LiDAR at the time of its sweep
    yaw = YAWS[camera]
    ahead, left = np.array([math.cos(yaw), math.sin(yaw), 0]), np.array([-math.sin(yaw), math.cos(yaw), 0])
    mount = np.array([1.0, 0.25, 1.5])
    at_camera = mount + 20 * ahead - 20 * across * left - 20 * down * np.array([0, 0, 1])
    begin_s = (index + frame) * PERIOD_US / 1e6
    camera_s, lidar_s = begin_s + TRIGGER_US[camera] / 1e6, begin_s + TRIGGER_US["LIDAR_TOP"] / 1e6
    speed = SPEED_M_S["scene-0001"]
    point_lidar = ego_of(world_of(at_camera, camera_s, speed), lidar_s, speed) - mount
    u, v, depth = sample["pix_from_lidar"][frame, view] @ np.append(point_lidar, 1)
    assert depth == pytest.approx(20, abs=1e-2)
    # where the ramp says that this pixel was in the source
    u, v = u / depth, v / depth
    row, column = math.floor(v), math.floor(u)
    source_pixel = np.array([WIDTH / 2 + FOCAL * across, HEIGHT / 2 + FOCAL * down])
    if 0 <= row < 16 and 0 <= column < 32:
        shown = read_ramp(sample["images"][frame, view, :, row, column], WIDTH, HEIGHT)
        pixel = max(WIDTH / 32, HEIGHT / 16)  # of the output, in pixels of the source; JPEG and rounding blur the ramp by one
        assert np.abs(shown - source_pixel).max() < pixel / 2 + 1


def test_ego_frames_join_images_sweeps_and_times(video: NuscenesData) -> None:
    sample = source_of(video).load(4, stream(1))
    speed, begin_s = SPEED_M_S["scene-0001"], 4 * PERIOD_US / 1e6
    np.testing.assert_allclose(sample["elapsed_s"], np.arange(FRAMES) * PERIOD_US / 1e6, atol=1e-6)
    point = np.array([10.0, -3.0, 0.5])
    for frame in range(FRAMES):
        time_s = begin_s + frame * PERIOD_US / 1e6
        seen_by_first = ego_of(world_of(point, time_s, speed), begin_s, speed)
        np.testing.assert_allclose(sample["first_from_ego"][frame] @ np.append(point, 1), [*seen_by_first, 1], atol=1e-4)
        through_ego = sample["pix_from_ego"][frame] @ sample["ego_from_lidar"][frame]
        np.testing.assert_allclose(through_ego, sample["pix_from_lidar"][frame], rtol=1e-4, atol=1e-3)


def test_without_augmentation_the_stream_does_not_matter(video: NuscenesData) -> None:
    source = source_of(video, augment=False)
    for name, array in source.load(2, stream(0)).items():
        np.testing.assert_array_equal(array, source.load(2, stream(1))[name])


def test_a_pickled_source_is_small_and_gives_the_same_samples(video: NuscenesData) -> None:
    source = source_of(video)
    pickled = pickle.dumps(source)
    assert len(pickled) < 10_000
    for name, array in pickle.loads(pickled).load(3, stream(7)).items():
        np.testing.assert_array_equal(array, source.load(3, stream(7))[name])


def test_the_figures_of_a_source_count_its_clips(video: NuscenesData) -> None:
    figures = source_of(video).describe()
    assert figures["clips"] == figures["clips_with_lidar"] == figures["samples"] == len(source_of(video))


def test_a_frame_without_a_sweep_has_no_points_and_no_projection(tmp_path: Path, video: NuscenesData) -> None:
    config = dataroot_without(tmp_path, lambda row: "LIDAR" in row["token"] and not row["token"].endswith("4"))
    config = config.model_copy(update={"clip": video.clip})
    source = source_of(config)
    assert {source.name(index).split()[1] for index in range(len(source))} == {
        str(begin + frame * PERIOD_US) for begin in (1_500_000_000_000_000, 1_500_000_060_000_000) for frame in (2, 3, 4, 12, 13)
    }
    sample = source.load(0, stream())
    np.testing.assert_array_equal(np.diff(sample["first_point"]), [0, 0, 2])
    assert not sample["pix_from_lidar"][:2].any() and sample["pix_from_lidar"][2].any()


def test_a_dataroot_without_lidar_serves_cameras_and_says_so_where_lidar_is_needed(tmp_path: Path) -> None:
    config = dataroot_without(tmp_path, lambda row: "LIDAR" in row["token"])
    source = build_source(config, "train", CAMERA_FIELDS, augment=False)
    assert source is not None and source.offers == CAMERA_FIELDS and set(source.load(0, stream())) == CAMERA_FIELDS
    with pytest.raises(DataError, match=r"needs LiDAR and .* has no LiDAR sweep"):
        build_source(config, "train", ALL_FIELDS, augment=False)


def test_sweeps_are_left_alone_where_nobody_needs_them(tmp_path: Path) -> None:
    config = dataroot_without(tmp_path, lambda row: False)
    source = build_source(config, "train", CAMERA_FIELDS, augment=False)
    assert isinstance(source, SurroundSource) and source.index.has_sweeps
    Path(source.index.files.name_sweep(0)).unlink()
    assert set(source.load(0, stream())) == source.offers == CAMERA_FIELDS
    _, sweeps = source.draw_reads(0, stream())
    assert not len(sweeps)


def test_sweeps_far_from_every_frame_are_an_error_that_says_how_far(tmp_path: Path) -> None:
    tables = make_tables()
    for row in tables["sample_data"]:
        if "LIDAR" in row["token"]:
            row["timestamp"] += 10_000_000
    config = dataroot_without(tmp_path / "other", lambda row: False)
    root = write_dataroot(tmp_path / "root", tables, {"train": list(SPEED_M_S)})
    with pytest.raises(DataError, match=r"32 clips with all 3 cameras none has a sweep within 0.1 s"):
        build_source(config.model_copy(update={"root": root}), "train", ALL_FIELDS, augment=False)


def test_a_camera_that_never_fired_leaves_no_clip_and_an_error_that_names_the_cameras(tmp_path: Path) -> None:
    config = dataroot_without(tmp_path, lambda row: "CAM_BACK" in row["token"] and not row["token"].endswith("000"))
    config = config.model_copy(update={"clip": config.clip.model_copy(update={"frames": 2, "spacing_s": 0.25})})
    with pytest.raises(DataError, match=r"2 frames 0\.25 s apart with an image of each of CAM_FRONT, CAM_FRONT_LEFT, CAM_BACK"):
        source_of(config)


@pytest.mark.parametrize(("content", "complaint"), [(b"", "no points"), (b"x" * 30, "30 bytes"), (None, "cannot be read")])
def test_a_damaged_sweep_is_named(tmp_path: Path, content: bytes | None, complaint: str) -> None:
    config = dataroot_without(tmp_path, lambda row: False)
    source = source_of(config)
    path = Path(source.index.files.name_sweep(0))
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    if content == b"":  # an empty sweep is a frame that saw nothing
        assert not np.diff(source.load(0, stream())["first_point"]).any()
        return
    with pytest.raises(ClipError, match=complaint):
        source.load(0, stream())


def test_a_camera_without_calibration_is_an_error_that_names_it(tmp_path: Path) -> None:
    tables = make_tables()
    tables["calibrated_sensor"] = [row for row in tables["calibrated_sensor"] if "CAM_BACK" not in row["token"]]
    root = write_dataroot(tmp_path / "root", tables, {"train": list(SPEED_M_S)})
    config = NuscenesData(root=root, cameras=tuple(YAWS), val_split=None, index_folder=tmp_path / "index")
    with pytest.raises(DataError, match="mount CAM_BACK"):
        build_source(config, "train", ALL_FIELDS, augment=False)


def test_pairs_and_surround_clips_come_joined_where_both_are_needed(data: NuscenesData) -> None:
    source = build_source(data, "train", PAIR_FIELDS | ALL_FIELDS, augment=True)
    assert isinstance(source, JointSource)
    parts = [len(part) for part in source.parts]
    assert len(source) == max(parts) > min(parts)
    assert source.offers == PAIR_FIELDS | ALL_FIELDS
    last = len(source) - 1
    assert set(source.load(last, stream())) == source.offers
    assert source.name(last).count("scene-0001") == 2
