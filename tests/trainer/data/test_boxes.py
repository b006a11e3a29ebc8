"""Boxes of key frames: as the devkit says, in the ego frame of the images, and refused where there are none."""

from pathlib import Path

import numpy as np
import pytest
from nuscenes.eval.detection.utils import category_to_detection_name
from nuscenes.nuscenes import NuScenes
from pyquaternion import Quaternion

from tests.trainer.packed import packed
from trainer.config.data import NuscenesData
from trainer.data.boxes import BOX_CLASSES, BOX_FIELDS, find_class
from trainer.data.build import build_source, open_nuscenes_index
from trainer.data.frames import NO_ROW
from trainer.data.maps import DRIVABLE_FIELDS
from trainer.data.source import Sample
from trainer.data.surround_source import CAMERA_FIELDS, SurroundSource
from trainer.errors import DataError

CAMERAS = ("CAM_FRONT", "CAM_BACK")


def open_boxes(root: Path, folder: Path) -> SurroundSource:
    clip = {"frames": 1, "height_px": 16, "width_px": 32}
    config = NuscenesData(root=root, cameras=CAMERAS, clip=clip, train_split="all", index_folder=folder)
    source = build_source(config, "train", CAMERA_FIELDS | BOX_FIELDS, augment=False)
    assert isinstance(source, SurroundSource)
    return source


def boxes_of_devkit(devkit: NuScenes, timestamp_us: int) -> tuple[np.ndarray, list[str], list[int]]:
    """In the frame of the car when its front camera fired: boxes, categories and points of that camera's key frame."""
    image = next(
        row
        for row in devkit.sample_data
        if row["timestamp"] == timestamp_us and row["channel"] == "CAM_FRONT" and row["is_key_frame"]
    )
    pose = devkit.get("ego_pose", image["ego_pose_token"])
    boxes, names, points = [], [], []
    for token in devkit.get("sample", image["sample_token"])["anns"]:
        box = devkit.get_box(token)
        box.velocity = devkit.box_velocity(token)
        box.translate(-np.array(pose["translation"]))
        box.rotate(Quaternion(pose["rotation"]).inverse)
        width, length, height = box.wlh
        ahead = box.rotation_matrix[:, 0]
        boxes.append([*box.center, length, width, height, np.arctan2(ahead[1], ahead[0]), *box.velocity[:2]])
        names.append(box.name)
        record = devkit.get("sample_annotation", token)
        points.append(record["num_lidar_pts"] + record["num_radar_pts"])
    return np.array(boxes), names, points


def assert_boxes_are_those_of_the_devkit(sample: Sample, devkit: NuScenes, timestamp_us: int) -> int:
    boxes, names, points = boxes_of_devkit(devkit, timestamp_us)
    assert sample["first_box"].tolist() == [0, len(boxes)]
    order, expected = (np.lexsort(np.round(of_one[:, :3], 3).T) for of_one in (sample["boxes_ego"], boxes))
    found, wanted = sample["boxes_ego"][order], boxes[expected]
    np.testing.assert_allclose(found[:, [0, 1, 2, 3, 4, 5, 7, 8]], wanted[:, [0, 1, 2, 3, 4, 5, 7, 8]], atol=1e-3)
    turned = np.abs((found[:, 6] - wanted[:, 6] + np.pi) % (2 * np.pi) - np.pi)
    assert turned.max() < 1e-4
    assert sample["box_points"][order].tolist() == [points[row] for row in expected]
    classes = [category_to_detection_name(names[row]) for row in expected]
    assert [BOX_CLASSES[row] if row != NO_ROW else None for row in sample["box_class"][order]] == classes
    assert sample["box_is_vehicle"][order].tolist() == [names[row].startswith("vehicle.") for row in expected]
    return len(boxes)


def test_boxes_of_a_city_are_those_of_the_devkit_at_key_frames_alone(city: Path, tmp_path: Path) -> None:
    source = open_boxes(city, tmp_path)
    devkit = NuScenes("v1.0-mini", dataroot=str(city), verbose=False)
    assert len(source) == len(devkit.sample)
    counts = []
    for number in range(len(source)):
        timestamp_us = int(source.index.timestamp_us(source.clips["clip_images"][number])[0, 0])
        sample = source.load(number, np.random.default_rng(0))
        counts.append(assert_boxes_are_those_of_the_devkit(sample, devkit, timestamp_us))
    assert sum(counts) == len(devkit.sample_annotation)
    assert np.isfinite(source.load(1, np.random.default_rng(0))["boxes_ego"][:, 7]).any()


def test_boxes_of_the_real_keyframe_are_those_of_the_devkit(keyframe_dataroot: Path, tmp_path: Path) -> None:
    source = open_boxes(keyframe_dataroot, tmp_path)
    devkit = NuScenes("v1.0-mini", dataroot=str(keyframe_dataroot), verbose=False)
    timestamp_us = int(source.index.timestamp_us(source.clips["clip_images"][0])[0, 0])
    assert assert_boxes_are_those_of_the_devkit(source.load(0, np.random.default_rng(0)), devkit, timestamp_us) == 68


def test_a_category_of_no_class_is_none_and_an_ambulance_is_a_vehicle_of_no_class() -> None:
    assert find_class("vehicle.bus.bendy") == BOX_CLASSES.index("bus")
    assert find_class("vehicle.emergency.ambulance") == find_class("animal") == NO_ROW


def test_a_dataroot_without_annotations_is_refused(data: NuscenesData) -> None:
    assert not open_nuscenes_index(data).has_boxes
    with pytest.raises(DataError, match=r"needs annotated boxes and .* has none: tables of a test set are without"):
        build_source(data, "train", BOX_FIELDS, augment=False)


def test_clips_of_more_than_key_frames_have_no_boxes(city: Path, tmp_path: Path) -> None:
    clip = {"frames": 2, "spacing_s": 0.1, "height_px": 16, "width_px": 32}
    config = NuscenesData(root=city, cameras=CAMERAS, clip=clip, index_folder=tmp_path)
    with pytest.raises(
        DataError, match=r"were asked for .* with boxes, .* none is of annotated key frames alone; set data\.clip\.frames to 1"
    ):
        build_source(config, "train", BOX_FIELDS, augment=False)


@pytest.mark.parametrize(
    ("needs", "sentence"), [(BOX_FIELDS, "packed drives leave them out"), (DRIVABLE_FIELDS, "is packed, which leaves maps out")]
)
def test_packed_drives_have_neither_boxes_nor_maps(
    needs: frozenset[str], sentence: str, packed_folder: Path, loose: NuscenesData
) -> None:
    with pytest.raises(DataError, match=sentence):
        build_source(packed(packed_folder, loose), "train", needs, augment=False)
