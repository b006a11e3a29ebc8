"""The map around a car: the drivable area as the mask of the same map has it, and sentences where there is no map."""

from pathlib import Path

import numpy as np
import pytest
import shapely
from nuscenes.map_expansion.map_api import NuScenesMap
from PIL import Image
from scipy.spatial import cKDTree

from models.heads.lift import build_bev_grid
from models.polylines import LINE_CLASSES, resample_line
from models.rasters import fill_outlines
from tests.trainer.data.dataroot import YAWS, make_tables, write_dataroot
from trainer.config.data import ClipConfig, NuscenesData
from trainer.data.build import build_source
from trainer.data.maps import DRIVABLE_FIELDS, LINE_FIELDS, cut_lines, list_edges
from trainer.data.surround_source import CAMERA_FIELDS, SurroundSource
from trainer.errors import DataError
from trainer.synthesis.maps import MASK_PX_PER_M

CLIP = ClipConfig(frames=1, height_px=16, width_px=32)


def open_map(root: Path, folder: Path) -> SurroundSource:
    config = NuscenesData(root=root, cameras=("CAM_FRONT",), clip=CLIP, train_split="all", index_folder=folder)
    source = build_source(config, "train", CAMERA_FIELDS | DRIVABLE_FIELDS | LINE_FIELDS, augment=False)
    assert isinstance(source, SurroundSource)
    return source


def test_the_drivable_area_around_a_car_is_that_of_the_mask(city: Path, tmp_path: Path) -> None:
    source, grid = open_map(city, tmp_path), build_bev_grid(50.0, 1.0)
    mask = np.asarray(Image.open(next((city / "maps").glob("*.png")))) > 0  # north is up; all cities have the same streets
    at = -50 + np.arange(100) + 0.5
    places = np.stack([*np.meshgrid(at, at), np.zeros((100, 100)), np.ones((100, 100))], axis=-1)
    for number in (0, len(source) // 2, len(source) - 1):
        row = source.clips["clip_images"][number][0, 0]
        world = places @ source.index.world_from_ego(np.array([row]))[0].T
        column, up = (np.floor(world[..., axis] * MASK_PX_PER_M).astype(int) for axis in range(2))
        inside = (column >= 0) & (column < mask.shape[1]) & (up >= 0) & (up < mask.shape[0])
        expected = mask[mask.shape[0] - 1 - up.clip(0, mask.shape[0] - 1), column.clip(0, mask.shape[1] - 1)] & inside
        sample = source.load(number, np.random.default_rng(0))
        assert sample["first_edge"].tolist() == [0, len(sample["drivable_edges"])]
        filled = fill_outlines(sample["drivable_edges"], grid)
        assert (filled == expected).mean() > 0.995  # a centre on the very edge may fall to either side
        assert 0.1 < filled.mean() < 0.9


def test_edges_run_around_polygons_and_the_other_way_around_holes() -> None:
    ring = shapely.Polygon([(0, 0), (4, 0), (4, 4), (0, 4)], [[(1, 1), (2, 1), (2, 2), (1, 2)]])
    edges = list_edges(np.array([ring, shapely.Point(9, 9)]))
    assert edges.shape == (8, 2, 2)
    (x0, y0), (x1, y1) = edges.transpose(1, 2, 0)
    area = (x0 * y1 - x1 * y0).sum() / 2
    assert abs(area) == 16 - 1
    assert list_edges(np.empty(0, dtype=object)).shape == (0, 2, 2)


def test_dividers_around_a_car_are_those_of_the_devkits_map(city: Path, tmp_path: Path) -> None:
    source = open_map(city, tmp_path)
    number = len(source) // 2
    row = source.clips["clip_images"][number][0, 0]
    location = source.index.columns["scene_location"][source.index.columns["image_scene"][row]].decode()
    devkit = NuScenesMap(str(city), location)
    records = [*devkit.road_divider, *devkit.lane_divider]
    drawn = [np.array(devkit.extract_line(record["line_token"]).coords) for record in records]
    world = np.concatenate([resample_line(line, 2000) for line in drawn])
    ego_from_world = np.linalg.inv(source.index.world_from_ego(np.array([row]))[0])
    expected = (np.concatenate([world, np.zeros((len(world), 1)), np.ones((len(world), 1))], axis=1) @ ego_from_world.T)[:, :2]
    expected = expected[(np.abs(expected) <= (30, 15)).all(axis=1)]
    sample = source.load(number, np.random.default_rng(0))
    first, kinds = sample["first_line_point"], sample["line_class"]
    assert sample["first_line"].tolist() == [0, len(kinds)] and set(kinds) <= set(range(3))
    lines = [
        sample["line_points"][first[line] : first[line + 1]] for line in np.flatnonzero(kinds == LINE_CLASSES.index("divider"))
    ]
    found = np.concatenate([resample_line(line, 2000) for line in lines])
    assert len(expected) and (np.abs(found) <= (30.001, 15.001)).all()
    assert cKDTree(found).query(expected)[0].max() < 0.6  # what is shorter than 0.5 m is left out
    assert cKDTree(expected).query(found)[0].max() < 0.1


def test_lines_are_cut_at_the_patch_joined_and_left_out_where_little_is_left() -> None:
    far, near = shapely.LineString([(-90, 3), (0, 3)]), shapely.LineString([(0, 3), (90, 3)])
    outside, corner = shapely.LineString([(40, 0), (50, 0)]), shapely.LineString([(29.8, 20), (29.8, 14.8)])
    ring = shapely.LinearRing([(1, 1), (2, 1), (2, 2), (1, 2)])
    cut = cut_lines(np.array([near, outside, far, corner, ring]))
    assert sorted(line.length for line in cut) == [4, 60]
    assert [line.is_ring for line in sorted(cut, key=lambda line: line.length)] == [True, False]
    assert cut_lines(np.empty(0, dtype=object)) == []


def test_a_missing_map_expansion_is_named(data: NuscenesData) -> None:
    with pytest.raises(
        DataError, match=r"needs the map of .*maps/expansion/here\.json is not there; put nuScenes' map expansion"
    ):
        build_source(data, "train", DRIVABLE_FIELDS, augment=False)


@pytest.mark.parametrize(("text", "sentence"), [("{", "JSONDecodeError"), ('{"version": "1.2"}', "KeyError|outdated")])
def test_a_map_expansion_that_cannot_be_read_is_named(text: str, sentence: str, tmp_path: Path) -> None:
    tables = make_tables()
    tables["log"][0]["location"] = "boston-seaport"
    root = write_dataroot(tmp_path / "root", tables, {"train": ["scene-0001"]})
    (root / "maps" / "expansion").mkdir(parents=True)
    (root / "maps" / "expansion" / "boston-seaport.json").write_text(text)
    config = NuscenesData(root=root, cameras=tuple(YAWS), clip=CLIP, index_folder=tmp_path / "index")
    with pytest.raises(DataError, match=rf"boston-seaport\.json and stopped with .*({sentence}).*version 1\.3"):
        build_source(config, "train", DRIVABLE_FIELDS, augment=False)
