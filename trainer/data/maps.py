"""The map around a car as fields of a sample, in the ego frame of its images: the drivable area, and lines.

Lines are those of a patch of 60 m x 30 m around the car, the standard since HDMapNet (Li et al. 2022): 30 m ahead and behind, 15 m to the
left and to the right. Dividers are lines of the map; crossings and boundaries are where the edge of a crossing, or of some that touch, and
of the drivable area runs within the patch. HDMapNet and MapTR take the edge of road segments and lanes for a boundary instead. Lines of
a class that meet end to end are one; a ring that lies within is closed.

Maps are flat: a point has the car's own height and is turned and moved as the car stands. What lies within reach is cut out along the
axes of the world, so the farthest corner of a square of `MAP_REACH_M` around a car that drives askew is still there.
"""

import functools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import shapely  # type: ignore[import-untyped]
from jaxtyping import Float32, Float64, Int

from models.config import LINE_PATCH_M
from models.polylines import LINE_CLASSES
from trainer.data.columns import Columns
from trainer.data.index import Index
from trainer.data.nuscenes_maps import LAYERS

DRIVABLE_FIELDS = frozenset({"drivable_edges", "first_edge"})
LINE_FIELDS = frozenset({"line_points", "first_line_point", "line_class", "first_line"})

MAP_REACH_M = 60.0
"""Ahead, behind, left and right of the car, the drivable area is known at least so far."""
_SHORTEST_M = 0.5
"""What is left of a line at the corner of the patch is no line."""


@dataclass(frozen=True)
class MapReader:
    """Maps of the cities that images were taken in, mapped from columns."""

    index: Index
    maps: Columns

    def find_near(self, layer: str, row: int, world_from_ego: Float64[np.ndarray, "4 4"]) -> np.ndarray:
        """The shapes of a layer around the car, in the world; `row` is an image of the scene."""
        location = self.index.columns["scene_location"][self.index.columns["image_scene"][row]].decode()
        place = self.maps.header["locations"].index(location)
        tree = _open_layer(self.maps.folder, place, LAYERS.index(layer))
        x, y = world_from_ego[:2, 3]
        reach = MAP_REACH_M * math.sqrt(2)
        window = shapely.box(x - reach, y - reach, x + reach, y + reach)
        near = tree.geometries[tree.query(window, predicate="intersects")]
        return shapely.get_parts(shapely.intersection(near, window))


@dataclass(frozen=True)
class DrivableReader(MapReader):
    """The outline of the drivable area."""

    offers = DRIVABLE_FIELDS

    def read(self, rows: Int[np.ndarray, "T V"], world_from_ego: Float64[np.ndarray, "T 4 4"]) -> dict[str, np.ndarray]:
        """As Annotations has it."""
        edges = [
            to_ego(list_edges(self.find_near("drivable", int(row), pose)), pose)
            for row, pose in zip(rows[:, 0], world_from_ego, strict=True)
        ]
        return {"drivable_edges": np.concatenate(edges).astype(np.float32), "first_edge": np.cumsum([0, *map(len, edges)])}


@dataclass(frozen=True)
class LineReader(MapReader):
    """Lines of the map."""

    offers = LINE_FIELDS

    def read(self, rows: Int[np.ndarray, "T V"], world_from_ego: Float64[np.ndarray, "T 4 4"]) -> dict[str, np.ndarray]:
        """As Annotations has it."""
        frames = [self._read_lines(int(row), pose) for row, pose in zip(rows[:, 0], world_from_ego, strict=True)]
        lines = [line for frame in frames for line in frame]
        points = [points for _, points in lines]
        return {
            "line_points": np.concatenate([np.empty((0, 2), np.float32), *points]),
            "first_line_point": np.cumsum([0, *map(len, points)]),
            "line_class": np.array([line_class for line_class, _ in lines], dtype=np.int64),
            "first_line": np.cumsum([0, *map(len, frames)]),
        }

    def _read_lines(self, row: int, world_from_ego: Float64[np.ndarray, "4 4"]) -> list[tuple[int, Float32[np.ndarray, "P 2"]]]:
        """Row of LINE_CLASSES and points of each."""
        near = {layer: self.find_near(layer, row, world_from_ego) for layer in LAYERS}
        of_class = {
            "divider": near["divider"],
            "crossing": shapely.get_parts(shapely.boundary(shapely.union_all(near["crossing"]))),
            "boundary": shapely.boundary(near["drivable"]),
        }
        return [
            (line_class, shapely.get_coordinates(line).astype(np.float32))
            for line_class, name in enumerate(LINE_CLASSES)
            for line in cut_lines(shapely.transform(of_class[name], lambda points: to_ego(points, world_from_ego)))
        ]


def cut_lines(lines_ego: np.ndarray) -> list[shapely.LineString]:
    """What of lines lies within the patch, joined where they meet end to end."""
    ahead, left = LINE_PATCH_M
    cut = shapely.get_parts(shapely.intersection(lines_ego, shapely.box(-ahead, -left, ahead, left)))
    lines = [part for part in cut if isinstance(part, shapely.LineString) and not part.is_empty]
    joined = shapely.line_merge(shapely.MultiLineString(lines))
    return [line for line in shapely.get_parts(joined) if line.length >= _SHORTEST_M]


def list_edges(shapes: np.ndarray) -> Float64[np.ndarray, "K 2 2"]:
    """From corner to corner around all polygons among `shapes`, around holes the other way."""
    polygons = [shape for shape in shapes if isinstance(shape, shapely.Polygon)]
    corners, ring = shapely.get_coordinates(shapely.get_rings(shapely.normalize(polygons)), return_index=True)
    return np.stack([corners[:-1], corners[1:]], axis=1)[ring[:-1] == ring[1:]]


def to_ego(points_world: Float64[np.ndarray, "*n 2"], world_from_ego: Float64[np.ndarray, "4 4"]) -> Float64[np.ndarray, "*n 2"]:
    """Flat points as the car sees them."""
    return (points_world - world_from_ego[:2, 3]) @ world_from_ego[:2, :2]


@functools.lru_cache(maxsize=64)
def _open_layer(folder: Path, location: int, layer: int) -> shapely.STRtree:
    """A layer of one city, held by each process that reads it."""
    columns = Columns(folder)
    first, wkb = columns["first_byte"], columns["wkb"]
    rows = np.flatnonzero((columns["location"] == location) & (columns["layer"] == layer))
    return shapely.STRtree(shapely.from_wkb([wkb[first[row] : first[row + 1]].tobytes() for row in rows]))
