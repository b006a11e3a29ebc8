"""The map of a city: the mask that nuScenes shows, and the map expansion, version 1.3, that its map API opens.

Layers: drivable area, road segments, lanes, pedestrian crossings, pavements (walkway), stop lines, and the dividers between and
beside lanes. Nodes are corners in metres; polygons and lines list them.
"""

from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import UInt8

from trainer.synthesis.city import (
    CITY_M,
    CROSSING_FROM_M,
    CROSSING_TO_M,
    HALF_STREET_M,
    LANE_M,
    PAVEMENT_M,
    from_street_m,
    street_centres_m,
)
from trainer.synthesis.tables import token

MASK_PX_PER_M = 10
"""What the devkit assumes of a mask."""


def draw_mask() -> UInt8[np.ndarray, "H W"]:
    """Where one can drive: 255 on streets; north is up."""
    at = (np.arange(round(CITY_M * MASK_PX_PER_M)) + 0.5) / MASK_PX_PER_M
    on_street = np.abs(from_street_m(at)) < HALF_STREET_M
    return np.where(on_street[None, :] | on_street[::-1, None], np.uint8(255), np.uint8(0))


class MapExpansion:
    """Collects nodes, polygons and lines, and the records that refer to them."""

    def __init__(self, location: str) -> None:
        self.location = location
        self.layers: dict[str, list[dict[str, Any]]] = {
            name: []
            for name in (
                "polygon",
                "line",
                "node",
                "drivable_area",
                "road_segment",
                "road_block",
                "lane",
                "ped_crossing",
                "walkway",
                "stop_line",
                "carpark_area",
                "road_divider",
                "lane_divider",
                "traffic_light",
                "lane_connector",
            )
        }

    def as_json(self) -> dict[str, Any]:
        """What stands in maps/expansion/LOCATION.json."""
        edges = {"canvas_edge": [CITY_M, CITY_M], "version": "1.3"}
        return self.layers | edges | {"arcline_path_3": {}, "connectivity": {}}

    def add(self, layer: str, **fields: Any) -> str:
        """A record with a token of its own."""
        name = token(self.location, layer, len(self.layers[layer]))
        self.layers[layer].append({"token": name, **fields})
        return name

    def add_rectangle(self, x: tuple[float, float], y: tuple[float, float]) -> str:
        """A polygon from its bounds in metres."""
        corners = [(x[0], y[0]), (x[1], y[0]), (x[1], y[1]), (x[0], y[1])]
        return self.add("polygon", exterior_node_tokens=self._add_nodes(corners), holes=[])

    def add_line(self, *points: tuple[float, float]) -> str:
        """A line through points in metres."""
        return self.add("line", node_tokens=self._add_nodes(points))

    def _add_nodes(self, points: Any) -> list[str]:
        return [self.add("node", x=float(x), y=float(y)) for x, y in points]


def build_map(location: str) -> dict[str, Any]:
    """The map expansion of a city; all have the same streets."""
    expansion = MapExpansion(location)
    streets = [_Street(float(centre), is_vertical) for is_vertical in (False, True) for centre in street_centres_m()]
    areas = [expansion.add_rectangle(*street.bounds(HALF_STREET_M)) for street in streets]
    expansion.add("drivable_area", polygon_tokens=areas)
    for street in streets:
        _add_street(expansion, street)
    return expansion.as_json()


class _Street:
    """A street along x or, if vertical, along y; turns (along, across) into (x, y)."""

    def __init__(self, centre_m: float, is_vertical: bool) -> None:
        self.centre_m = centre_m
        self.is_vertical = is_vertical

    def bounds(
        self, half_m: float, along: tuple[float, float] = (0.0, CITY_M), across: float = 0.0
    ) -> tuple[tuple[float, float], tuple[float, float]]:
        """x and y bounds of a strip of the street, `across` to the left of its centre."""
        low, high = sorted((self.point(0.0, across - half_m), self.point(0.0, across + half_m)))
        axis = 0 if self.is_vertical else 1
        band = (min(low[axis], high[axis]), max(low[axis], high[axis]))
        return (band, along) if self.is_vertical else (along, band)

    def point(self, along: float, across: float) -> tuple[float, float]:
        """Across grows to the left of the direction in which along grows."""
        if self.is_vertical:
            return self.centre_m - across, along
        return along, self.centre_m + across


def _add_street(expansion: MapExpansion, street: _Street) -> None:
    """Everything between each pair of junctions, and the crossings at both ends."""
    centres = [0.0, *street_centres_m(), CITY_M]
    for begin, end in pairwise(centres):
        low = begin + (CROSSING_TO_M + 1.0 if begin > 0 else 0.0)
        high = end - (CROSSING_TO_M + 1.0 if end < CITY_M else 0.0)
        _add_stretch(expansion, street, low, high)
        _add_pavements(expansion, street, begin, end)
        if begin > 0:
            _add_crossing(expansion, street, begin + CROSSING_FROM_M, begin + CROSSING_TO_M)
        if end < CITY_M:
            _add_crossing(expansion, street, end - CROSSING_TO_M, end - CROSSING_FROM_M)


def _add_stretch(expansion: MapExpansion, street: _Street, low: float, high: float) -> None:
    segment = expansion.add_rectangle(*street.bounds(HALF_STREET_M, (low, high)))
    segment_token = expansion.add("road_segment", polygon_token=segment, is_intersection=False, drivable_area_token="")
    middle = expansion.add_line(street.point(low, 0.0), street.point(high, 0.0))
    expansion.add("road_divider", line_token=middle, road_segment_token=segment_token)
    for side in (-1.0, 1.0):
        polygon = expansion.add_rectangle(*street.bounds(LANE_M / 2, (low, high), side * LANE_M / 2))
        expansion.add(
            "lane",
            polygon_token=polygon,
            lane_type="CAR",
            from_edge_line_token="",
            to_edge_line_token="",
            left_lane_divider_segments=[],
            right_lane_divider_segments=[],
        )
        edge = expansion.add_line(street.point(low, side * LANE_M), street.point(high, side * LANE_M))
        expansion.add("lane_divider", line_token=edge, lane_divider_segments=[])


def _add_crossing(expansion: MapExpansion, street: _Street, low: float, high: float) -> None:
    polygon = expansion.add_rectangle(*street.bounds(HALF_STREET_M, (low, high)))
    crossing = expansion.add("ped_crossing", polygon_token=polygon, road_segment_token="")
    stop = expansion.add_rectangle(*street.bounds(HALF_STREET_M, (low - 0.5, low)))
    expansion.add(
        "stop_line",
        polygon_token=stop,
        stop_line_type="PED_CROSSING",
        ped_crossing_tokens=[crossing],
        traffic_light_tokens=[],
        road_block_token="",
    )


def _add_pavements(expansion: MapExpansion, street: _Street, begin: float, end: float) -> None:
    low = begin + (HALF_STREET_M if begin > 0 else 0.0)
    high = end - (HALF_STREET_M if end < CITY_M else 0.0)
    for side in (-1.0, 1.0):
        across = side * (HALF_STREET_M + PAVEMENT_M / 2)
        expansion.add("walkway", polygon_token=expansion.add_rectangle(*street.bounds(PAVEMENT_M / 2, (low, high), across)))
