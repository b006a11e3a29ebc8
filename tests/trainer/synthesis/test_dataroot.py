"""The data set through the eyes of the unmodified devkit: tables, LiDAR on depth, boxes on pixels, flow on pictures, maps."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nuscenes import NuScenes
from nuscenes.map_expansion.map_api import NuScenesMap
from nuscenes.utils.data_classes import LidarPointCloud
from nuscenes.utils.geometry_utils import view_points
from PIL import Image
from pyquaternion import Quaternion

from tests.trainer.synthesis.conftest import CONFIG, WITH_LIDAR, OpenTown
from trainer.data.ground_truth import load_ground_truth
from trainer.errors import DataError
from trainer.synthesis.config import SynthesisConfig
from trainer.synthesis.dataroot import VERSION, synthesize
from trainer.synthesis.rig import RIGS, RigName
from trainer.synthesis.scene import build_scene


def keyframe_images(devkit: NuScenes) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    for sample in devkit.sample:
        for captured in sample["data"].values():
            row = devkit.get("sample_data", captured)
            if row["sensor_modality"] == "camera":
                yield sample, row


def project_lidar(devkit: NuScenes, sample: dict[str, Any], image: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Pixels and depths of the keyframe's sweep in `image`, by the devkit's classes and steps."""
    sweep = devkit.get("sample_data", sample["data"]["LIDAR_TOP"])
    cloud = LidarPointCloud.from_file(str(Path(devkit.dataroot) / sweep["filename"]))
    for row, inverse in ((sweep, False), (image, True)):
        sensor = devkit.get("calibrated_sensor", row["calibrated_sensor_token"])
        pose = devkit.get("ego_pose", row["ego_pose_token"])
        for frame in (pose, sensor) if inverse else (sensor, pose):
            if inverse:
                cloud.translate(-np.array(frame["translation"]))
                cloud.rotate(Quaternion(frame["rotation"]).rotation_matrix.T)
            else:
                cloud.rotate(Quaternion(frame["rotation"]).rotation_matrix)
                cloud.translate(np.array(frame["translation"]))
    depth = cloud.points[2]
    intrinsic = np.array(devkit.get("calibrated_sensor", image["calibrated_sensor_token"])["camera_intrinsic"])
    pixels = view_points(cloud.points[:3], intrinsic, normalize=True)[:2].T
    inside = (depth > 1) & np.all((pixels >= 0) & (pixels < (image["width"], image["height"])), axis=1)
    return pixels[inside], depth[inside]


@pytest.mark.parametrize("rig", RIGS)
def test_every_token_resolves_and_every_chain_is_whole(open_town: OpenTown, rig: RigName) -> None:
    devkit = open_town(rig)
    for table in ("sample", "sample_data", "sample_annotation"):
        rows = getattr(devkit, table)
        assert rows
        for row in rows:
            for here, back in (("next", "prev"), ("prev", "next")):
                if row[here]:
                    assert devkit.get(table, row[here])[back] == row["token"]
    for row in devkit.sample_data:
        assert (Path(devkit.dataroot) / row["filename"]).stat().st_size
        assert devkit.get("ego_pose", row["ego_pose_token"])["timestamp"] == row["timestamp"]
        assert devkit.get("sample", row["sample_token"])
    for row in devkit.instance:
        chain = [row["first_annotation_token"]]
        while following := devkit.get("sample_annotation", chain[-1])["next"]:
            chain.append(following)
        assert (len(chain), chain[-1]) == (row["nbr_annotations"], row["last_annotation_token"])
    for log in devkit.log:
        assert devkit.get("map", log["map_token"])


@pytest.mark.parametrize("rig", WITH_LIDAR)
def test_lidar_points_lie_on_the_rendered_depth(open_town: OpenTown, rig: RigName) -> None:
    devkit, relative, count = open_town(rig), [], 0
    for sample, image in keyframe_images(devkit):
        pixels, depth = project_lidar(devkit, sample, image)
        truth = load_ground_truth(Path(devkit.dataroot), image["filename"])
        moving = truth.thing >= 0  # the camera fires up to half a turn off the sweep: what moves has moved
        columns, rows = pixels.astype(int).T
        there = ~moving[rows, columns] & np.isfinite(truth.depth_m[rows, columns])
        relative.append(np.abs(truth.depth_m[rows, columns] / depth - 1)[there])
        count += int(there.sum())
    assert count > 10_000
    assert np.median(np.concatenate(relative)) < 0.005


@pytest.mark.parametrize("rig", WITH_LIDAR)
def test_lidar_points_are_within_a_pixel_of_where_the_depth_image_has_them(open_town: OpenTown, rig: RigName) -> None:
    """Lift each pixel that a point falls into by its depth, and see how far from the point's pixel it comes down."""
    devkit, distances = open_town(rig), []
    for sample, image in keyframe_images(devkit):
        pixels, depth = project_lidar(devkit, sample, image)
        truth = load_ground_truth(Path(devkit.dataroot), image["filename"])
        columns, rows = pixels.astype(int).T
        seen = truth.depth_m[rows, columns]
        same_surface = np.isfinite(seen) & (np.abs(seen / depth - 1) < 0.1)
        intrinsic = np.array(devkit.get("calibrated_sensor", image["calibrated_sensor_token"])["camera_intrinsic"])
        centres = np.column_stack([columns + 0.5, rows + 0.5, np.ones(len(rows))])
        lifted = centres @ np.linalg.inv(intrinsic).T * np.where(same_surface, seen, 1.0)[:, None]
        landed = (lifted / lifted[:, 2:] @ intrinsic.T)[:, :2]
        distances.append(np.linalg.norm(landed - pixels, axis=1)[same_surface])
    assert np.median(np.concatenate(distances)) < 1.0


@pytest.mark.parametrize("rig", RIGS)
def test_boxes_by_the_devkit_outline_the_rendered_things(open_town: OpenTown, rig: RigName) -> None:
    devkit, covered = open_town(rig), []
    for sample, image in keyframe_images(devkit):
        _, boxes, intrinsic = devkit.get_sample_data(image["token"])
        truth = load_ground_truth(Path(devkit.dataroot), image["filename"])
        numbers = {instance: number for number, instance in enumerate(things_of(devkit, sample))}
        for box in boxes:
            corners = view_points(box.corners(), np.array(intrinsic), normalize=True)[:2]
            low, high = corners.min(axis=1), corners.max(axis=1)
            annotation = devkit.get("sample_annotation", box.token)
            rows, columns = np.nonzero(truth.thing == numbers[annotation["instance_token"]])
            if len(rows) < 30 or box.corners()[2].min() < 1:
                continue
            slack = 2 + 0.1 * (high - low)  # moving things move up to half a turn between box and exposure
            inside = (columns >= low[0] - slack[0]) & (columns <= high[0] + slack[0])
            inside &= (rows >= low[1] - slack[1]) & (rows <= high[1] + slack[1])
            covered.append(inside.mean())
    assert len(covered) > 5
    assert np.median(covered) == 1.0
    assert np.mean(covered) > 0.97


def things_of(devkit: NuScenes, sample: dict[str, Any]) -> list[str]:
    """Instance tokens by the numbers of the ground truth."""
    scene = devkit.get("scene", sample["scene_token"])["name"]
    tokens: list[str] = json.loads((Path(devkit.dataroot) / "ground_truth" / f"{scene}.json").read_text())
    return tokens


@pytest.mark.parametrize("rig", RIGS)
@pytest.mark.parametrize(("neighbour", "flow"), [("next", "flow_px"), ("prev", "backward_flow_px")])
def test_flow_warps_the_images_beside_each_image_onto_it(open_town: OpenTown, rig: RigName, neighbour: str, flow: str) -> None:
    devkit, still, warped = open_town(rig), [], []
    for _, image in keyframe_images(devkit):
        if not image[neighbour]:
            continue
        now, other = (read_image(devkit, row) for row in (image, devkit.get("sample_data", image[neighbour])))
        truth = load_ground_truth(Path(devkit.dataroot), image["filename"])
        truth_other = load_ground_truth(Path(devkit.dataroot), devkit.get("sample_data", image[neighbour])["filename"])
        width, height = image["width"], image["height"]
        here = np.stack(np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5), axis=-1)
        there = here + getattr(truth, flow)
        inside = np.all((there > 1) & (there < np.array([width, height]) - 1), axis=-1) & np.isfinite(truth.depth_m)
        columns, rows = np.where(inside[..., None], there, 1).astype(int).reshape(-1, 2).T
        same_thing = (truth.thing == truth_other.thing[rows, columns].reshape(height, width)) & inside
        nearer = truth_other.depth_m[rows, columns].reshape(height, width)
        depth = np.where(inside, truth.depth_m, 0.0)  # finite wherever `inside` holds
        visible = same_thing & (np.abs(np.where(np.isfinite(nearer), nearer, 1e6) - depth) < 0.05 * depth + 0.9)
        sampled = sample_bilinear(other, there)
        warped.append(np.abs(sampled - now)[visible].mean())
        still.append(np.abs(other - now)[visible].mean())
    assert np.mean(warped) < 0.4 * np.mean(still)
    assert np.mean(warped) < 6.0  # of 255: JPEG and resampling remain


def read_image(devkit: NuScenes, row: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(Path(devkit.dataroot) / row["filename"]), dtype=np.float64)


def sample_bilinear(image: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Values of `image` at pixel coordinates whose pixel centres are at +0.5."""
    height, width = image.shape[:2]
    x, y = np.clip(np.nan_to_num(at[..., 0]) - 0.5, 0, width - 1.001), np.clip(np.nan_to_num(at[..., 1]) - 0.5, 0, height - 1.001)
    column, row = x.astype(int), y.astype(int)
    across, down = (x - column)[..., None], (y - row)[..., None]
    top = image[row, column] * (1 - across) + image[row, column + 1] * across
    bottom = image[row + 1, column] * (1 - across) + image[row + 1, column + 1] * across
    return top * (1 - down) + bottom * down


def test_boxes_that_the_devkit_interpolates_between_keyframes_are_where_the_things_are(devkit: NuScenes) -> None:
    distances = []
    for scene_number, scene in enumerate(devkit.scene):
        simulated = build_scene(CONFIG, scene_number)
        numbers = {simulated.token("instance", n): n for n in range(len(simulated.traffic.things))}
        first = devkit.get("sample", scene["first_sample_token"])
        row = devkit.get("sample_data", first["data"]["CAM_FRONT"])
        while row["next"]:
            row = devkit.get("sample_data", row["next"])
            poses = simulated.traffic.poses_at((row["timestamp"] - simulated.start_us) / 1e6)
            for box in devkit.get_boxes(row["token"]):
                annotation = devkit.get("sample_annotation", box.token)
                if not row["is_key_frame"] and annotation["prev"]:
                    distances.append(np.linalg.norm(box.center[:2] - poses[numbers[annotation["instance_token"]], :2]))
    assert len(distances) > 100
    assert np.quantile(distances, 0.9) < 0.05


def test_velocities_by_the_devkit_are_those_of_the_simulation(devkit: NuScenes) -> None:
    compared = 0
    for scene_number, scene in enumerate(devkit.scene):
        simulated = build_scene(CONFIG, scene_number)
        numbers = {simulated.token("instance", n): n for n in range(len(simulated.traffic.things))}
        for annotation in devkit.sample_annotation:
            if devkit.get("sample", annotation["sample_token"])["scene_token"] != scene["token"]:
                continue
            velocity = devkit.box_velocity(annotation["token"])
            if not np.isfinite(velocity).all():
                continue
            route = simulated.traffic.things[numbers[annotation["instance_token"]]].route
            heading = Quaternion(annotation["rotation"]).yaw_pitch_roll[0]
            expected = route.speed_mps * np.array([np.cos(heading), np.sin(heading)])
            np.testing.assert_allclose(velocity[:2], expected, atol=1e-6)
            compared += route.speed_mps > 0
    assert compared > 5


def test_lidar_counts_and_visibility_are_those_of_the_scene(devkit: NuScenes) -> None:
    hits = {annotation["num_lidar_pts"] for annotation in devkit.sample_annotation}
    assert max(hits) > 50
    assert {annotation["visibility_token"] for annotation in devkit.sample_annotation} == {"1", "2", "3", "4"}
    assert {row["category_name"] for row in devkit.sample_annotation} >= {"vehicle.car", "human.pedestrian.adult"}


def test_the_car_stays_on_its_lane_and_the_map_knows_it(devkit: NuScenes) -> None:
    for scene in devkit.scene:
        location = devkit.get("log", scene["log_token"])["location"]
        city = NuScenesMap(dataroot=devkit.dataroot, map_name=location)
        mask = devkit.get("map", devkit.get("log", scene["log_token"])["map_token"])["mask"]
        sample = devkit.get("sample", scene["first_sample_token"])
        pose = devkit.get("ego_pose", sample["data"]["LIDAR_TOP"])
        x, y, _ = pose["translation"]
        layers = city.layers_on_point(x, y)
        assert layers["drivable_area"]
        assert mask.is_on_mask(x, y)
        drivable = city.get_map_mask((x, y, 60, 60), 0, ["drivable_area", "lane", "ped_crossing"], (120, 120))
        assert all(0.02 < layer.mean() < 0.9 for layer in drivable)
        assert city.road_divider
        assert city.lane_divider


def test_the_same_seed_gives_the_same_bytes_and_a_stopped_run_goes_on_to_them(tmp_path: Path) -> None:
    once, again = tmp_path / "once", tmp_path / "again"
    short = CONFIG.model_copy(update={"duration_s": 0.5})
    synthesize(once, short, workers=2, progress=False)
    synthesize(again, short, workers=1, progress=False)
    assert contents(again) == contents(once)
    finished = json.loads((again / "synthesis" / "scene-0001.json").read_text())
    (again / "synthesis" / "scene-0002.json").unlink()
    for path in (again / VERSION).iterdir():
        path.unlink()
    some_image = again / finished["sample_data"][0]["filename"]
    before = some_image.stat().st_mtime_ns
    report = synthesize(again, short, workers=1, progress=False)
    assert report.rendered == 1
    assert some_image.stat().st_mtime_ns == before
    assert contents(again) == contents(once)


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_splits_name_every_scene_once(town: Path) -> None:
    splits = json.loads((town / VERSION / "splits.json").read_text())
    assert sorted(splits["train"] + splits["val"]) == ["scene-0001", "scene-0002"]
    assert splits["train"]
    assert splits["val"]


def test_another_data_set_in_the_folder_is_refused(town: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="seed 5, asked for 6"):
        synthesize(town, CONFIG.model_copy(update={"seed": 6}), progress=False)
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(DataError, match="is not empty"):
        synthesize(tmp_path, CONFIG, progress=False)


def test_a_data_set_from_before_there_were_rigs_is_one_of_the_nuscenes_rig(town: Path, tmp_path: Path) -> None:
    shutil.copytree(town / "synthesis", tmp_path / "synthesis")
    settings = json.loads((town / "synthesis" / "config.json").read_text())
    del settings["rig"]
    (tmp_path / "synthesis" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(DataError, match="rig nuscenes, asked for five"):
        synthesize(tmp_path, CONFIG.model_copy(update={"rig": "five"}), progress=False)
    assert synthesize(tmp_path, CONFIG, progress=False).rendered == 0


@pytest.mark.parametrize(("scenes", "held_out"), [(1, []), (2, [1]), (3, [2]), (4, [3]), (8, [3, 7])])
def test_one_scene_in_four_is_held_out(scenes: int, held_out: list[int]) -> None:
    config = SynthesisConfig(scenes=scenes)
    assert [scene for scene in range(scenes) if config.is_held_out(scene)] == held_out
