"""Boxes in the level frame: as the devkit has them in the world, on synthetic and real data; and data that has none."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from trainer.config.data import NuscenesData
from trainer.data.boxes import BOX_CLASSES
from trainer.data.build import build_source, open_nuscenes_index
from trainer.data.level_boxes import ATTRIBUTES, BICYCLE_RACK, LEVEL_FIELDS, find_level, open_level_boxes
from trainer.data.nuscenes import open_devkit
from trainer.errors import DataError

NEEDS = LEVEL_FIELDS | {"pix_from_ego"}


def read_samples(config: NuscenesData) -> dict[str, dict[str, np.ndarray]]:
    """Fields of all key frames by token."""
    source = build_source(config, "train", frozenset(NEEDS), augment=False)
    assert source is not None
    samples = [source.load(place, np.random.default_rng(0)) for place in range(len(source))]
    return {sample["sample_token"][0].tobytes().decode(): dict(sample) for sample in samples}


def assert_as_the_devkit_has_them(config: NuscenesData) -> int:
    from nuscenes.eval.common.loaders import add_center_dist, load_gt_of_sample_tokens
    from nuscenes.eval.common.utils import quaternion_yaw
    from nuscenes.eval.detection.data_classes import DetectionBox
    from pyquaternion import Quaternion

    devkit = open_devkit(config.root, "v1.0-mini")
    samples = read_samples(config)
    truth = add_center_dist(devkit, load_gt_of_sample_tokens(devkit, list(samples), DetectionBox))
    for token, sample in samples.items():
        boxes, pose = sample["level_boxes"], sample["world_from_level"][0]
        boxes = boxes[(boxes[:, 9] >= 0) & (boxes[:, 9] < BICYCLE_RACK)].astype(np.float64)
        assert len(boxes) == len(truth[token])
        for box, true in zip(boxes, truth[token], strict=True):
            np.testing.assert_allclose(pose[:3, :3] @ box[:3], true.ego_translation, atol=1e-4)
            np.testing.assert_allclose(pose[:3, :3] @ box[:3] + pose[:3, 3], true.translation, atol=1e-4)
            np.testing.assert_allclose(box[[4, 3, 5]], true.size, rtol=1e-6)
            apart = box[6] + math.atan2(pose[1, 0], pose[0, 0]) - quaternion_yaw(Quaternion(true.rotation))
            assert math.remainder(apart, 2 * math.pi) == pytest.approx(0, abs=1e-5)
            np.testing.assert_allclose(pose[:2, :2] @ box[7:9], true.velocity, atol=1e-4)
            assert BOX_CLASSES[int(box[9])] == true.detection_name
            assert (ATTRIBUTES[int(box[10])] if box[10] >= 0 else "") == true.attribute_name
            assert box[11] == true.num_pts
    return len(truth.all)


def test_boxes_of_a_synthetic_dataroot_are_those_of_the_devkit(city: Path) -> None:
    assert assert_as_the_devkit_has_them(NuscenesData(kind="synthetic", root=city)) > 50


def test_boxes_of_the_real_keyframe_are_those_of_the_devkit(keyframe_dataroot: Path) -> None:
    assert assert_as_the_devkit_has_them(NuscenesData(root=keyframe_dataroot, train_split="all")) > 30


def test_the_level_frame_turns_with_the_car_and_neither_pitches_nor_rolls() -> None:
    c, s = math.cos(0.7), math.sin(0.7)
    yaw = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    c, s = math.cos(0.05), math.sin(0.05)
    pitch = np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])
    world_from_ego = np.eye(4)[None].copy()
    world_from_ego[0, :3, :3], world_from_ego[0, :3, 3] = yaw @ pitch, (5.0, 6.0, 7.0)
    level = find_level(world_from_ego, np.array([[5.5, 6.5, 7.0]]))[0]
    np.testing.assert_allclose(level[:3, :3], yaw, atol=1e-12)
    np.testing.assert_allclose(level[:3, 3], (5.5, 6.5, 7.0))
    unknown = find_level(world_from_ego, np.full((1, 3), np.nan))[0]
    np.testing.assert_allclose(unknown[:3, 3], (5.0, 6.0, 7.0))


def test_boxes_stand_where_the_devkit_shows_them_in_an_image(city: Path) -> None:
    """By way of the camera's own pose, which knows no level frame."""
    devkit, config = open_devkit(city, "v1.0-mini"), NuscenesData(kind="synthetic", root=city)
    place = config.cameras.index("CAM_FRONT_LEFT")
    shown = 0
    for token, sample in read_samples(config).items():
        record = devkit.get("sample", token)
        image = record["data"]["CAM_FRONT_LEFT"]
        width_px, height_px = (devkit.get("sample_data", image)[side] for side in ("width", "height"))
        scale, left_px = config.clip.height_px / height_px, (width_px - height_px) / 2  # the largest centred square
        pix_from_level = sample["pix_from_ego"][0, place] @ np.linalg.inv(sample["level_from_ego"][0])
        _, boxes, pix_from_cam = devkit.get_sample_data(image)
        for box in boxes:
            u, v, depth_m = pix_from_cam @ box.center
            centre = sample["level_boxes"][record["anns"].index(box.token)][:3]
            pixel = pix_from_level @ np.append(centre, 1)
            expected = ((u / depth_m - left_px) * scale, v / depth_m * scale, depth_m)
            assert (pixel[0] / pixel[2], pixel[1] / pixel[2], pixel[2]) == pytest.approx(expected, rel=1e-4, abs=0.01)
            shown += 1
    assert shown > 5


def change_table(root: Path, target: Path, name: str, change: dict[str, int]) -> NuscenesData:
    """A copy of the tables with other values in every record of one."""
    for part in root.iterdir():
        if part.name != "v1.0-mini":
            (target / part.name).symlink_to(part)
    shutil.copytree(root / "v1.0-mini", target / "v1.0-mini")
    table = target / "v1.0-mini" / f"{name}.json"
    table.write_text(json.dumps([record | change for record in json.loads(table.read_text())]))
    return NuscenesData(kind="synthetic", root=target)


def test_boxes_that_no_point_hits_are_refused(city: Path, tmp_path: Path) -> None:
    config = change_table(city, tmp_path, "sample_annotation", {"num_lidar_pts": 0, "num_radar_pts": 0})
    with pytest.raises(
        DataError, match=r"boxes with points of LiDAR or radar .* none of its \d+ boxes has any; take data of a rig"
    ):
        open_level_boxes(open_nuscenes_index(config))
