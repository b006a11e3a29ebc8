"""The boxes of a nuScenes dataroot as columns of the index (`index.py` lists them), through the devkit's tables.

A velocity is how far the centre moved from the annotation before to the one after, or from or to this one at the ends of a track, by the
time between; none over more than 1.5 s an interval: the devkit's `box_velocity`, for all boxes at once.
"""

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float32, Int

from trainer.data.records import Record, check_records, find_rows, read_field, read_numbers, read_transforms

if TYPE_CHECKING:
    from nuscenes.nuscenes import NuScenes

_TABLE = "sample_annotation"
_LONGEST_INTERVAL_S = 1.5


def read_boxes(devkit: "NuScenes") -> dict[str, np.ndarray]:
    """The columns of boxes; without annotations they are there and empty."""
    records: list[Record] = devkit.sample_annotation
    samples = find_rows(read_field(records, "sample_token", _TABLE), devkit.sample, "sample")
    order = np.argsort(samples, kind="stable")
    world_from_box = read_transforms(records, _TABLE)
    sizes_m = read_numbers(records, "size", _TABLE, (3,))
    check_records((sizes_m > 0).all(-1), records, _TABLE, "size", "is no size of a box")
    points = sum(read_numbers(records, name, _TABLE, ()) for name in ("num_lidar_pts", "num_radar_pts"))
    columns = {
        "box_centre_world": world_from_box[:, :3, 3],
        "box_heading_world": world_from_box[:, :3, 0],
        "box_size_m": sizes_m[:, [1, 0, 2]].astype(np.float32),  # nuScenes has the width first
        "box_velocity_world": _find_velocities(devkit, samples, world_from_box[:, :3, 3]),
        "box_points": np.asarray(points).astype(np.int32),
        "box_category": _find_categories(devkit).astype(np.int16),
        "box_attribute": _find_attributes(devkit).astype(np.int16),
    }
    return {
        "attribute_name": np.array(
            [name.encode() for name in read_field(devkit.attribute, "name", "attribute")], dtype=np.bytes_
        ),
        "category_name": np.array([name.encode() for name in read_field(devkit.category, "name", "category")], dtype=np.bytes_),
        "first_box": np.searchsorted(samples[order], np.arange(len(devkit.sample) + 1)),
        **{name: column[order] for name, column in columns.items()},
    }


def _find_categories(devkit: "NuScenes") -> Int[np.ndarray, " K"]:
    """Row of the category of each box, by way of its instance."""
    instances = find_rows(read_field(devkit.sample_annotation, "instance_token", _TABLE), devkit.instance, "instance")
    categories = find_rows(read_field(devkit.instance, "category_token", "instance"), devkit.category, "category")
    return categories[instances]


def _find_attributes(devkit: "NuScenes") -> Int[np.ndarray, " K"]:
    """Row of the attribute of each box, or -1 where it has none, or several."""
    row_of = {attribute["token"]: row for row, attribute in enumerate(devkit.attribute)}
    tokens = read_field(devkit.sample_annotation, "attribute_tokens", _TABLE)
    return np.array([row_of.get(of_box[0], -1) if len(of_box) == 1 else -1 for of_box in tokens], dtype=np.int64)


def _find_velocities(devkit: "NuScenes", samples: Int[np.ndarray, " K"], centres_world: np.ndarray) -> Float32[np.ndarray, "K 3"]:
    records = devkit.sample_annotation
    before, after = (_follow(records, name) for name in ("prev", "next"))
    time_s = read_numbers(devkit.sample, "timestamp", "sample", ())[samples] / 1e6
    own = np.arange(len(records))
    elapsed_s = time_s[after] - time_s[before]
    longest_s = _LONGEST_INTERVAL_S * np.where((before != own) & (after != own), 2, 1)
    is_known = (elapsed_s > 0) & (elapsed_s <= longest_s)
    moved = centres_world[after] - centres_world[before]
    velocity = np.where(is_known[:, None], moved / np.where(is_known, elapsed_s, 1)[:, None], np.nan)
    return velocity.astype(np.float32)


def _follow(records: list[Record], name: str) -> Int[np.ndarray, " K"]:
    """Row of the annotation `prev` or `next` to each, its own where there is none."""
    tokens = [token or own for token, own in zip(*(read_field(records, one, _TABLE) for one in (name, "token")), strict=True)]
    return find_rows(tokens, records, _TABLE)
