"""Rigs are data: each sees all around, fires at its own times, and its data set is read by the devkit and by our sources."""

from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
from nuscenes import NuScenes
from nuscenes.utils.data_classes import LidarPointCloud

from odonata.data import synthesize
from tests.trainer.synthesis.conftest import CONFIGS, WITH_LIDAR, OpenTown
from trainer.config.data import NuscenesData
from trainer.data.build import build_source
from trainer.data.surround_source import CAMERA_FIELDS, SurroundSource
from trainer.synthesis.rig import RIGS, Camera, RigName

CAMERAS_OF_FIVE = ("FRONT", "RIGHT", "REAR_RIGHT", "REAR_LEFT", "LEFT")
EVERY_RIG = pytest.mark.parametrize("rig", RIGS)


def test_the_command_offers_every_rig() -> None:
    assert get_args(RigName) == tuple(RIGS) == get_args(get_type_hints(synthesize)["rig"])


@EVERY_RIG
def test_whole_images_and_sweeps_fit_between_keyframes(rig: RigName) -> None:
    chosen = RIGS[rig]
    assert chosen.camera_hz % chosen.keyframe_hz == 0
    assert chosen.lidar is None or chosen.lidar.hz % chosen.keyframe_hz == 0
    assert len({sensor.channel for sensor in chosen.sensors}) == len(chosen.sensors)


@EVERY_RIG
def test_some_camera_sees_each_direction_around_the_car(rig: RigName) -> None:
    around = np.deg2rad(np.arange(360))
    far_m = 1000 * np.column_stack([np.cos(around), np.sin(around), np.zeros(360)])
    assert np.any([sees(camera, far_m, RIGS[rig].size_px) for camera in RIGS[rig].cameras], axis=0).all()


def test_the_far_camera_of_seven_sees_what_the_front_one_sees_larger() -> None:
    cameras = {camera.channel: camera for camera in RIGS["seven"].cameras}
    around = np.deg2rad(np.arange(-90, 90))
    far_m = 1000 * np.column_stack([np.cos(around), np.sin(around), np.zeros(180)])
    far, front = (sees(cameras[name], far_m, RIGS["seven"].size_px) for name in ("FRONT_FAR", "FRONT"))
    assert 2 * far.sum() < front.sum()
    assert not np.any(far & ~front)


def sees(camera: Camera, points_ego: np.ndarray, size_px: tuple[int, int]) -> np.ndarray:
    """Which points are in the image."""
    rotation, origin = camera.ego_from_sensor[:3, :3], camera.ego_from_sensor[:3, 3]
    u, v, depth = camera.pix_from_cam(1.0) @ rotation.T @ (points_ego - origin).T
    ahead = np.maximum(depth, 1e-9)
    return (depth > 0) & (u > 0) & (u / ahead < size_px[0]) & (v > 0) & (v / ahead < size_px[1])


@EVERY_RIG
def test_images_are_upright(rig: RigName) -> None:
    for camera in RIGS[rig].cameras:
        right, down, _ = camera.ego_from_sensor[:3, :3].T
        assert abs(right[2]) < 0.02  # a degree
        assert down[2] < -0.98


@pytest.mark.parametrize("rig", WITH_LIDAR)
def test_a_camera_fires_as_the_beam_that_turns_clockwise_crosses_its_axis(rig: RigName) -> None:
    """A turn is half done when the beam looks ahead, and an angle to the left of that came before."""
    lidar = RIGS[rig].lidar
    assert lidar is not None
    for camera in RIGS[rig].cameras:
        x, y, _ = camera.ego_from_sensor[:3, 2]
        share_of_turn = np.arctan2(y, x) / (2 * np.pi)
        late_us = RIGS[rig].offset_us(camera) + share_of_turn * 1e6 / lidar.hz
        assert late_us == pytest.approx(0, abs=1)


def test_a_camera_that_looks_straight_back_fires_as_the_turn_begins() -> None:
    (back,) = (camera for camera in RIGS["seven"].cameras if camera.channel == "REAR")
    w, x, y, z = back.rotation
    for error in (-1e-12, 0.0, 1e-12):
        camera = Camera("REAR", back.translation_m, (w + error, x, y, z), back.focal_px, back.centre_px)
        assert RIGS["seven"].offset_us(camera) == -50_000  # half a turn of 100 ms


@pytest.mark.parametrize(
    ("rig", "cameras", "camera_hz", "lidar_hz", "keyframe_hz"),
    [("nuscenes", 6, 12, 20, 2), ("five", 5, 10, None, 5), ("seven", 7, 10, 10, 2)],
)
def test_sensors_fire_at_the_rates_of_their_rig(
    open_town: OpenTown, rig: RigName, cameras: int, camera_hz: int, lidar_hz: int | None, keyframe_hz: int
) -> None:
    devkit, keyframes = open_town(rig), int(CONFIGS[rig].duration_s * keyframe_hz)
    rates = {"camera": camera_hz, "lidar": lidar_hz}
    for scene in devkit.scene:
        samples = chain(devkit, "sample", scene["first_sample_token"])
        np.testing.assert_allclose(np.diff([row["timestamp"] for row in samples]), 1e6 / keyframe_hz, atol=1)
        assert len(samples) == keyframes
        assert len(samples[0]["data"]) == cameras + (lidar_hz is not None)
        for first in samples[0]["data"].values():
            rows = chain(devkit, "sample_data", first)
            rate = rates[rows[0]["sensor_modality"]]
            assert rate is not None
            np.testing.assert_allclose(np.diff([row["timestamp"] for row in rows]), 1e6 / rate, atol=1)
            assert [row["is_key_frame"] for row in rows] == [
                number % (rate // keyframe_hz) == 0 for number in range((keyframes - 1) * rate // keyframe_hz + 1)
            ]


@EVERY_RIG
def test_each_camera_of_the_data_set_has_its_own_place_in_the_turn(open_town: OpenTown, rig: RigName) -> None:
    devkit = open_town(rig)
    offset_us = {camera.channel: RIGS[rig].offset_us(camera) for camera in RIGS[rig].cameras}
    for sample in devkit.sample:
        for channel, captured in sample["data"].items():
            late_us = devkit.get("sample_data", captured)["timestamp"] - sample["timestamp"]
            assert late_us == offset_us.get(channel, 0)  # a sweep is the sample's clock
    assert len(set(offset_us.values())) == {"nuscenes": 6, "five": 1, "seven": 6}[rig]  # seven has two that look ahead


def chain(devkit: NuScenes, table: str, token: str) -> list[dict[str, Any]]:
    rows = [devkit.get(table, token)]
    while rows[-1]["next"]:
        rows.append(devkit.get(table, rows[-1]["next"]))
    return rows


def test_five_has_no_lidar_in_its_files_and_tables(open_town: OpenTown) -> None:
    devkit = open_town("five")
    folders = {path.name for part in ("samples", "sweeps") for path in (Path(devkit.dataroot) / part).iterdir()}
    assert folders == {sensor["channel"] for sensor in devkit.sensor} == set(CAMERAS_OF_FIVE)
    assert {row["sensor_modality"] for row in devkit.sample_data} == {"camera"}
    assert {row["num_lidar_pts"] for row in devkit.sample_annotation} == {0}
    width, height = 1280, 720
    assert {(row["width"], row["height"]) for row in devkit.sample_data} == {(round(0.12 * width), round(0.12 * height))}


def test_a_surround_source_reads_five_cameras_that_fire_at_once(open_town: OpenTown, tmp_path: Path) -> None:
    width, height = CONFIGS["five"].size_px
    config = NuscenesData(
        root=open_town("five").dataroot,
        cameras=CAMERAS_OF_FIVE,
        val_split=None,
        clip={"frames": 3, "spacing_s": 0.1, "width_px": width, "height_px": height},
        index_folder=tmp_path,
    )
    source = build_source(config, "train", CAMERA_FIELDS, augment=False)
    assert isinstance(source, SurroundSource)
    assert not source.index.has_sweeps
    assert source.offers == CAMERA_FIELDS
    images = (5 - 1) * 2 + 1  # five keyframes and one image between each two
    assert len(source) == images - 2
    rows = source.clips["clip_images"][0]
    np.testing.assert_array_equal(np.ptp(source.index.timestamp_us(rows), axis=1), 0)
    sample = source.load(0, np.random.default_rng(0))
    assert sample["images"].shape == (3, 5, 3, height, width)
    np.testing.assert_allclose(sample["elapsed_s"], [0.0, 0.1, 0.2], atol=1e-6)
    for view, camera in enumerate(RIGS["five"].cameras):
        pix_from_ego = camera.pix_from_cam(CONFIGS["five"].scale) @ np.linalg.inv(camera.ego_from_sensor)[:3]
        for frame in range(3):  # the car does not move between cameras that fire at once
            np.testing.assert_allclose(sample["pix_from_ego"][frame, view], pix_from_ego, rtol=1e-4, atol=1e-3)


def test_sweeps_of_seven_have_the_beams_and_the_range_of_its_lidar(open_town: OpenTown) -> None:
    devkit = open_town("seven")
    (first,) = (row for row in devkit.sample_data if row["sensor_modality"] == "lidar" and not row["prev"])
    path = Path(devkit.dataroot) / first["filename"]
    x, y, z = LidarPointCloud.from_file(str(path)).points[:3]
    ring = np.fromfile(path, dtype=np.float32).reshape(-1, 5)[:, 4]
    step_deg = (15 - -25) / (40 - 1)
    np.testing.assert_allclose(np.rad2deg(np.arctan2(z, np.hypot(x, y))), -25 + ring * step_deg, atol=1e-3)
    assert (ring.min(), ring.max()) == (0, 39)
    assert 70 < np.sqrt(x**2 + y**2 + z**2).max() < 100
