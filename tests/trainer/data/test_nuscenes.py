"""The index: what the devkit says, row by row; and every way in which tables can be wrong is a sentence."""

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.trainer.data.dataroot import HEIGHT, VERSION, WIDTH, Tables, make_tables, write_dataroot
from trainer.config.data import NuscenesData
from trainer.data.columns import is_whole
from trainer.data.index import Index
from trainer.data.nuscenes import build_index, find_version, index_path, open_index
from trainer.errors import DataError


def config_for(root: Path, **changes: object) -> NuscenesData:
    return NuscenesData(root=root, index_folder=root.parent / "index", **changes)


def index_of(root: Path) -> Index:
    return open_index(build_index(config_for(root)))


def assert_index_is_what_the_devkit_says(index: Index) -> None:
    from nuscenes.nuscenes import NuScenes
    from nuscenes.utils.geometry_utils import transform_matrix
    from pyquaternion import Quaternion

    devkit = NuScenes(version=index.version, dataroot=str(index.root), verbose=False)

    def parent_from_child(record: dict) -> np.ndarray:
        return transform_matrix(record["translation"], Quaternion(record["rotation"]))

    image_row = {file.decode(): row for row, file in enumerate(index.columns["image_file"])}
    sweep_row = {file.decode(): row for row, file in enumerate(index.columns["sweep_file"])}
    for record in devkit.sample_data:
        mount = devkit.get("calibrated_sensor", record["calibrated_sensor_token"])
        pose = parent_from_child(devkit.get("ego_pose", record["ego_pose_token"]))
        scene = devkit.get("scene", devkit.get("sample", record["sample_token"])["scene_token"])["name"]
        if record["sensor_modality"] == "camera":
            row = image_row.pop(record["filename"])
            rows = np.array([row])
            assert index.timestamp_us(rows) == record["timestamp"]
            assert index.is_key_frame(rows) == record["is_key_frame"]
            assert index.scenes[index.columns["image_scene"][row]] == scene
            assert index.cameras[index.columns["image_camera"][row]] == record["channel"]
            assert index.size_px(rows)[0].tolist() == [record["width"], record["height"]]
            np.testing.assert_array_equal(index.pix_from_cam(rows)[0], mount["camera_intrinsic"])
            np.testing.assert_allclose(index.ego_from_cam(rows)[0], parent_from_child(mount), atol=1e-12)
            np.testing.assert_allclose(index.world_from_ego(rows)[0], pose, atol=1e-12)
        elif record["sensor_modality"] == "lidar":
            row = sweep_row.pop(record["filename"])
            assert index.columns["sweep_timestamp_us"][row] == record["timestamp"]
            assert index.columns["sweep_is_key_frame"][row] == record["is_key_frame"]
            assert index.scenes[index.columns["sweep_scene"][row]] == scene
            np.testing.assert_allclose(index.columns["sweep_ego_from_lidar"][row], parent_from_child(mount), atol=1e-12)
            np.testing.assert_allclose(index.columns["sweep_world_from_ego"][row], pose, atol=1e-12)
    assert not image_row and not sweep_row


def test_every_row_of_the_index_is_what_the_devkit_says(drive: Path) -> None:
    assert_index_is_what_the_devkit_says(index_of(drive))


def test_every_row_of_the_real_keyframe_is_what_the_devkit_says(keyframe_dataroot: Path, tmp_path: Path) -> None:
    index = open_index(build_index(NuscenesData(root=keyframe_dataroot, index_folder=tmp_path)))
    assert_index_is_what_the_devkit_says(index)


def test_images_of_a_camera_in_a_scene_stand_together_in_order_of_time(drive: Path) -> None:
    index = index_of(drive)
    seen = np.zeros(len(index.columns["image_file"]), dtype=int)
    for scene in range(len(index.scenes)):
        for number, camera in enumerate(index.cameras):
            rows = index.images_of(scene, camera)
            seen[rows] += 1
            assert (index.columns["image_scene"][rows] == scene).all()
            assert (index.columns["image_camera"][rows] == number).all()
            assert (np.diff(index.columns["image_timestamp_us"][rows]) > 0).all()
    assert (seen == 1).all()


def test_cam_from_world_undoes_world_from_cam(drive: Path) -> None:
    index = index_of(drive)
    rows = np.arange(len(index.columns["image_file"]))
    there_and_back = index.cam_from_world(rows) @ index.world_from_cam(rows)
    np.testing.assert_allclose(there_and_back, np.broadcast_to(np.eye(4), there_and_back.shape), atol=1e-9)


def test_splits_json_names_the_splits_and_all_is_always_there(drive: Path) -> None:
    splits = index_of(drive).splits
    assert splits == {"train": ["scene-0001"], "val": ["scene-0002"], "all": ["scene-0001", "scene-0002"]}


def test_without_splits_json_a_mini_version_has_the_devkits_mini_splits(tmp_path: Path) -> None:
    tables = make_tables(frames=2)
    tables["scene"][0]["name"], tables["scene"][1]["name"] = "scene-0061", "scene-0103"
    splits = index_of(write_dataroot(tmp_path / "root", tables)).splits
    assert splits["train"] == splits["mini_train"] == ["scene-0061"]
    assert splits["val"] == splits["mini_val"] == ["scene-0103"]
    assert splits["test"] == []


def test_changed_tables_have_another_index_and_unchanged_ones_the_same(tmp_path: Path) -> None:
    config = config_for(write_dataroot(tmp_path / "root", make_tables(frames=2)))
    first = index_path(config)
    assert index_path(config) == first
    table = config.root / VERSION / "scene.json"
    os.utime(table, ns=(1, 1))
    assert index_path(config) != first


def test_a_dataroot_without_lidar_is_indexed(tmp_path: Path) -> None:
    tables = make_tables(frames=2)
    tables["sample_data"] = [record for record in tables["sample_data"] if record["fileformat"] == "jpg"]
    index = index_of(write_dataroot(tmp_path / "root", tables))
    assert len(index.columns["sweep_file"]) == 0
    assert len(index.columns["image_file"]) == 2 * 2 * 3


def test_an_index_that_is_not_whole_is_not_opened(tmp_path: Path) -> None:
    path = build_index(config_for(write_dataroot(tmp_path / "root", make_tables(frames=2))))
    assert is_whole(path)
    (path / "image_world_from_ego.npy").unlink()
    with pytest.raises(DataError, match="missing or half-written; remove that folder and start again"):
        open_index(path)


def test_a_missing_dataroot_and_a_wrong_version_say_what_there_is(drive: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"/nowhere was to be read as a dataroot and is not a folder; give .* synthesize"):
        find_version(tmp_path / "nowhere", None)
    with pytest.raises(DataError, match=r"version v1\.0-trainval was asked for and .* holds v1\.0-mini; name one"):
        find_version(drive, "v1.0-trainval")
    with pytest.raises(DataError, match=r"no version was named.* holds no folder with nuScenes tables; give a"):
        find_version(tmp_path, None)
    for version in ("v1.0-test", "v1.0-trainval"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "sample_data.json").write_text("[]")
    with pytest.raises(DataError, match=r"takes the only one there is, and .* holds v1\.0-test, v1\.0-trainval"):
        find_version(tmp_path, None)
    assert find_version(drive, None) == VERSION


def test_missing_tables_are_listed(tmp_path: Path) -> None:
    root = write_dataroot(tmp_path / "root", make_tables(frames=2))
    (root / VERSION / "ego_pose.json").unlink()
    (root / VERSION / "log.json").unlink()
    with pytest.raises(DataError, match=r"lacks ego_pose\.json, log\.json of the 13 tables"):
        build_index(config_for(root))


@pytest.mark.parametrize(
    ("table", "text", "sentence"),
    [
        ("ego_pose", '[{"token": "a", ', r"ego_pose\.json was to be read .* does not parse: .*line 1"),
        ("scene", "", r"scene\.json .* does not parse"),
        ("calibrated_sensor", '{"token": "a"}', r"calibrated_sensor\.json .* is not a list of records"),
        ("sample", '[{"timestamp": 3}]', r"sample\.json .* is not a list of records with a token"),
        (
            "map",
            '[{"token": "map", "log_tokens": [], "filename": "maps/gone.png"}]',
            r"devkit was to open .*maps/gone\.png",
        ),
        ("splits", '{"train": ["scene-0001"', r"splits\.json was to be read as splits and does not parse"),
        ("splits", '["scene-0001"]', r"splits\.json .* is not of the form"),
    ],
)
def test_a_table_that_cannot_be_read_is_named(tmp_path: Path, table: str, text: str, sentence: str) -> None:
    root = write_dataroot(tmp_path / "root", make_tables(frames=2), {"train": []})
    (root / VERSION / f"{table}.json").write_text(text)
    with pytest.raises(DataError, match=sentence):
        build_index(config_for(root))


def set_field(table: str, token: str, field: str, value: object) -> Callable[[Tables], None]:
    def change(tables: Tables) -> None:
        next(record for record in tables[table] if record["token"] == token)[field] = value

    return change


def drop_field(table: str, token: str, field: str) -> Callable[[Tables], None]:
    def change(tables: Tables) -> None:
        del next(record for record in tables[table] if record["token"] == token)[field]

    return change


def drop_record(table: str, token: str) -> Callable[[Tables], None]:
    def change(tables: Tables) -> None:
        tables[table] = [record for record in tables[table] if record["token"] != token]

    return change


IMAGE = "scene-0002 CAM_BACK 001"
MOUNT = "mount CAM_BACK"
NAN = float("nan")


@pytest.mark.parametrize(
    ("break_it", "sentence"),
    [
        (
            set_field("ego_pose", IMAGE, "translation", [0.0, NAN, 0.0]),
            f"translation .* is not finite, first in {IMAGE}",
        ),
        (
            set_field("ego_pose", IMAGE, "translation", [0.0, None, 0.0]),
            f"translation .* is not finite, first in {IMAGE}",
        ),
        (set_field("ego_pose", IMAGE, "rotation", [0.0, 0.0, 0.0, 0.0]), f"is no unit quaternion, first in {IMAGE}"),
        (set_field("ego_pose", IMAGE, "rotation", [1.0, 0.0, 0.0]), rf"is no array of shape \(4,\), first in {IMAGE}"),
        (
            set_field("ego_pose", IMAGE, "rotation", "north"),
            rf"is no array of shape \(4,\), first in {IMAGE}: \['north'\]",
        ),
        (set_field("calibrated_sensor", MOUNT, "rotation", [NAN] * 4), f"rotation .* is not finite, first in {MOUNT}"),
        (
            set_field("calibrated_sensor", MOUNT, "camera_intrinsic", []),
            rf"no array of shape \(3, 3\), first in {MOUNT}",
        ),
        (
            set_field("calibrated_sensor", MOUNT, "camera_intrinsic", [[0, 0, 8], [0, 9, 8], [0, 0, 1]]),
            f"singular .*{MOUNT}",
        ),
        (
            set_field("calibrated_sensor", MOUNT, "camera_intrinsic", [[9, 0, 8], [0, 9, 8], [0, 1, 1]]),
            f"no pinhole .*{MOUNT}",
        ),
        (
            set_field("sample_data", IMAGE, "width", 0),
            f"width, height and in 1 of 12 it is no image size, first in {IMAGE}",
        ),
        (set_field("sample_data", IMAGE, "timestamp", None), f"timestamp .* is not finite, first in {IMAGE}"),
        (set_field("sample_data", IMAGE, "ego_pose_token", "gone"), r"refers to token 'gone' of ego_pose\.json"),
        (set_field("sample_data", IMAGE, "sample_token", "gone"), r"devkit .* KeyError: 'gone'|'gone' of sample\.json"),
        (drop_record("sensor", "sensor CAM_BACK"), "devkit .* contradict each other"),
        (drop_record("scene", "scene-0002"), r"refers to token 'scene-0002' of scene\.json"),
        (
            drop_field("sample_data", IMAGE, "filename"),
            f"sample_data.json was to have a field 'filename' and {IMAGE} has none",
        ),
        (
            drop_field("ego_pose", IMAGE, "rotation"),
            f"ego_pose.json was to have a field 'rotation' and {IMAGE} has none",
        ),
    ],
)
def test_records_that_cannot_be_used_are_named(tmp_path: Path, break_it: Callable[[Tables], None], sentence: str) -> None:
    tables = make_tables(frames=2)
    break_it(tables)
    root = write_dataroot(tmp_path / "root", tables)
    with pytest.raises(DataError, match=sentence):
        build_index(config_for(root))
    assert not list((tmp_path / "index").glob("*")), "nothing half-made is left"


def test_tables_survive_a_trip_through_json_unchanged() -> None:
    tables = make_tables(frames=2)
    assert json.loads(json.dumps(tables)) == copy.deepcopy(tables)
    assert {(record["width"], record["height"]) for record in tables["sample_data"]} == {(WIDTH, HEIGHT), (0, 0)}
