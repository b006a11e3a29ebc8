"""From nuScenes' map expansion (version 1.3) to columns, through the devkit's map API, once.

What tasks read of a map, and of which layers of the expansion it is made, in the metres of the map, which are those of `world`:

    drivable   polygons that do not overlap: the union of drivable_area
    divider    lines: road_divider and lane_divider                       (those of HDMapNet, Li et al. 2022)
    crossing   polygons: ped_crossing

    wkb  bytes of all shapes on end (OGC's well-known binary)      first_byte  K + 1, where each begins
    location  K  row of the header's `locations`                   layer       K  row of LAYERS

The devkit is slow to import and never in a worker: `build.py` runs this in a process of its own. Left to others: cutting out what is
near a car (`maps.py`).
"""

import hashlib
import itertools
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import shapely  # type: ignore[import-untyped]

from trainer.data.columns import write_columns
from trainer.data.index import Index
from trainer.errors import DataError

if TYPE_CHECKING:
    from nuscenes.map_expansion.map_api import NuScenesMap

LAYERS = ("drivable", "divider", "crossing")
_MAPS_FORMAT = 1
"""Raised whenever the columns change, so that older ones are made again."""


def maps_path(index: Index, folder: Path) -> Path:
    """Where the maps of all cities of `index` are kept; DataError where one is missing."""
    if "scene_location" not in index.columns.header["arrays"]:
        raise DataError(
            f"a task needs the map and {index.root} {index.version} is packed, which leaves maps out; "
            "take a dataroot (data.kind nuscenes or synthetic) with its map expansion, or another task"
        )
    files = [expansion_file(Path(index.root), location) for location in list_locations(index)]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise DataError(
            f"a task needs the map of {index.root} {index.version} and {', '.join(missing)} is not there; put nuScenes' map expansion "
            "(version 1.3, a download of its own) into maps/ of the dataroot, or take another task"
        )
    key = hashlib.sha256(repr((_MAPS_FORMAT, index.root)).encode())
    for file in files:
        key.update(repr((file.name, file.stat().st_size, file.stat().st_mtime_ns)).encode())
    return folder / f"maps-{index.version}-{key.hexdigest()[:16]}"


def has_maps(index: Index) -> bool:
    """Whether the maps of all cities of `index` are there."""
    if "scene_location" not in index.columns.header["arrays"]:
        return False
    return all(expansion_file(Path(index.root), location).is_file() for location in list_locations(index))


def list_locations(index: Index) -> list[str]:
    """Cities of the scenes of `index`, by name."""
    return sorted({name.decode() for name in index.columns["scene_location"].tolist()})


def expansion_file(root: Path, location: str) -> Path:
    """Where a dataroot has the map expansion of a city."""
    return root / "maps" / "expansion" / f"{location}.json"


def build_maps(root: Path, locations: list[str], path: Path) -> None:
    """Read the expansions of these cities and write their columns to `path`."""
    rows = [
        (place, LAYERS.index(layer), shapely.to_wkb(shape))
        for place, location in enumerate(locations)
        for layer, shapes in _read_layers(root, location).items()
        for shape in shapes
    ]
    arrays = {
        "wkb": np.frombuffer(b"".join(wkb for *_, wkb in rows), dtype=np.uint8),
        "first_byte": np.cumsum([0, *(len(wkb) for *_, wkb in rows)]),
        "location": np.array([place for place, *_ in rows], dtype=np.int16),
        "layer": np.array([layer for _, layer, _ in rows], dtype=np.int8),
    }
    write_columns(path, arrays, {"locations": locations})


def _read_layers(root: Path, location: str) -> dict[str, list[shapely.Geometry]]:
    from nuscenes.map_expansion.map_api import NuScenesMap  # slow, and never in a worker

    try:
        city = NuScenesMap(dataroot=str(root), map_name=location)
        drivable = [token for record in city.drivable_area for token in record["polygon_tokens"]]
        lines = [record["line_token"] for record in (*city.road_divider, *city.lane_divider)]
        return {
            "drivable": list(shapely.get_parts(shapely.union_all(_read_polygons(city, drivable)))),
            "divider": [line for line in map(city.extract_line, lines) if not line.is_empty],
            "crossing": _read_polygons(city, [record["polygon_token"] for record in city.ped_crossing]),
        }
    except Exception as error:
        raise DataError(
            f"the nuScenes devkit was to open {expansion_file(root, location)} and stopped with {type(error).__name__}: {error}; "
            "write or download that map again, version 1.3 of the map expansion"
        ) from error


def _read_polygons(city: "NuScenesMap", tokens: list[str]) -> list[shapely.Polygon]:
    """Some that people drew touch themselves: what they enclose is kept."""
    parts = (shapely.get_parts(shapely.make_valid(city.extract_polygon(token))) for token in tokens)
    return [part for part in itertools.chain.from_iterable(parts) if isinstance(part, shapely.Polygon)]
