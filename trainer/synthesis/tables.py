"""The 13 tables of nuScenes: the rows that scenes share, tokens, and joining what scenes wrote.

Tokens are 32 hexadecimal digits, computed from what they name, so that the same config gives the same tables.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trainer.synthesis.rig import Camera, Rig
from trainer.synthesis.traffic import KINDS

Row = dict[str, Any]
Tables = dict[str, list[Row]]

TABLES = (
    "attribute",
    "calibrated_sensor",
    "category",
    "ego_pose",
    "instance",
    "log",
    "map",
    "sample",
    "sample_annotation",
    "sample_data",
    "scene",
    "sensor",
    "visibility",
)
_VISIBILITY = {"1": (0, 40), "2": (40, 60), "3": (60, 80), "4": (80, 100)}


def token(*parts: object) -> str:
    """The token of what `parts` name."""
    return hashlib.md5("/".join(map(str, parts)).encode(), usedforsecurity=False).hexdigest()


def category_token(name: str) -> str:
    """Token of a category."""
    return token("category", name)


def attribute_token(name: str) -> str:
    """Token of an attribute."""
    return token("attribute", name)


def sensor_token(channel: str) -> str:
    """Token of a sensor."""
    return token("sensor", channel)


def visibility_token(share: float) -> str:
    """nuScenes' bin of the visible share of a thing."""
    return next(name for name, (_, most) in _VISIBILITY.items() if share * 100 <= most or most == 100)


def shared_rows(rig: Rig) -> Tables:
    """Rows that do not depend on scenes."""
    attributes = sorted({name for kind in KINDS for name in (kind.moving, kind.standing) if name})
    return {
        "attribute": [{"token": attribute_token(name), "name": name, "description": ""} for name in attributes],
        "category": [{"token": category_token(kind.category), "name": kind.category, "description": ""} for kind in KINDS],
        "sensor": [
            {
                "token": sensor_token(sensor.channel),
                "channel": sensor.channel,
                "modality": "camera" if isinstance(sensor, Camera) else "lidar",
            }
            for sensor in rig.sensors
        ],
        "visibility": [
            {"token": name, "level": f"v{low}-{high}", "description": f"visibility of whole object is between {low} and {high}%"}
            for name, (low, high) in _VISIBILITY.items()
        ],
    }


def join_tables(parts: Iterable[Mapping[str, list[Row]]]) -> Tables:
    """All rows of all parts, table by table."""
    joined: Tables = {name: [] for name in TABLES}
    for part in parts:
        for name, rows in part.items():
            joined[name] += rows
    return joined


def link(rows: list[Row]) -> list[Row]:
    """Set prev and next along a list."""
    for before, after in zip([None, *rows], [*rows, None], strict=True):
        if before is not None:
            before["next"] = after["token"] if after else ""
        if after is not None:
            after["prev"] = before["token"] if before else ""
    return rows


def write_json(path: Path, content: Any) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(json.dumps(content, indent=0))
    unfinished.replace(path)
