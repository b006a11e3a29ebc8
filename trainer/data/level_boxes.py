"""The annotated boxes of a key frame as nuScenes' detection task scores them: upright, around the car as it stood when its LiDAR swept.

The frame `level` has z up in the world, x where the car heads and its origin where the car stood at the key frame's sweep, from
where the devkit measures ranges; on a rig without LiDAR it is where the first camera fired. Cameras pitch and roll with the car and
boxes do not: here they are as they were annotated.

Bicycle racks have a number of their own, since bicycles inside are not scored; other categories outside the ten classes have -1.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float64, Int, Int64

from trainer.data.boxes import BOX_CLASSES, BoxReader, open_boxes
from trainer.data.frames import NO_ROW
from trainer.data.index import Index
from trainer.errors import DataError

LEVEL_FIELDS = frozenset({"level_boxes", "first_level_box", "level_from_ego", "world_from_level", "sample_token"})

ATTRIBUTES = (
    "pedestrian.moving",
    "pedestrian.sitting_lying_down",
    "pedestrian.standing",
    "cycle.with_rider",
    "cycle.without_rider",
    "vehicle.moving",
    "vehicle.parked",
    "vehicle.stopped",
)
"""What nuScenes says of the state of a box, one of these or nothing."""
BICYCLE_RACK = len(BOX_CLASSES)
"""Stands for a class where a box is a rack."""
_RACK = b"static_object.bicycle_rack"


@dataclass(frozen=True)
class LevelBoxReader:
    """Boxes of the samples that images belong to, and where these are in the world."""

    boxes: BoxReader

    offers = LEVEL_FIELDS

    @property
    def index(self) -> Index:
        return self.boxes.index

    def read(self, rows: Int[np.ndarray, "T V"], world_from_ego: Float64[np.ndarray, "T 4 4"]) -> dict[str, np.ndarray]:
        """As Annotations has it; `rows` are images of key frames. A box is nine numbers, class, attribute and points."""
        columns, images = self.index.columns, rows[:, 0].tolist()
        samples = columns["image_sample"][rows[:, 0]]
        world_from_level = find_level(world_from_ego, columns["sample_origin_world"][samples])
        found = self.boxes.read(rows, world_from_level)
        members = np.concatenate([np.arange(of_frame.start, of_frame.stop) for of_frame in map(self.index.boxes_of, images)])
        is_rack = self._is_rack[columns["box_category"][members]]
        labels = [
            np.where(is_rack, BICYCLE_RACK, found["box_class"]),
            self._attribute_of[columns["box_attribute"][members]],
            found["box_points"],
        ]
        return {
            "level_boxes": np.concatenate([found["boxes_ego"], np.stack(labels, axis=-1)], axis=1).astype(np.float32),
            "first_level_box": found["first_box"],
            "level_from_ego": (np.linalg.inv(world_from_level) @ world_from_ego).astype(np.float32),
            "world_from_level": world_from_level,
            "sample_token": columns["sample_token"][samples].view(np.uint8).reshape(len(samples), -1),
        }

    @cached_property
    def _is_rack(self) -> Bool[np.ndarray, " categories"]:
        return self.index.columns["category_name"][:] == _RACK

    @cached_property
    def _attribute_of(self) -> Int64[np.ndarray, " attributes"]:
        """The last one is for boxes that have none."""
        names = [name.decode() for name in self.index.columns["attribute_name"].tolist()]
        return np.array([*(ATTRIBUTES.index(name) if name in ATTRIBUTES else NO_ROW for name in names), NO_ROW], dtype=np.int64)


def find_level(
    world_from_ego: Float64[np.ndarray, "T 4 4"], origin_world: Float64[np.ndarray, "T 3"]
) -> Float64[np.ndarray, "T 4 4"]:
    """world_from_level: turned by the car's heading alone; where no origin is known it is the car's."""
    ahead = world_from_ego[:, :2, 0] / np.linalg.norm(world_from_ego[:, :2, 0], axis=-1, keepdims=True)
    pose = np.zeros_like(world_from_ego)
    pose[:, 0, 0], pose[:, 0, 1], pose[:, 1, 0], pose[:, 1, 1] = ahead[:, 0], -ahead[:, 1], ahead[:, 1], ahead[:, 0]
    pose[:, 2, 2] = pose[:, 3, 3] = 1
    pose[:, :3, 3] = np.where(np.isnan(origin_world), world_from_ego[:, :3, 3], origin_world)
    return pose


def open_level_boxes(index: Index) -> LevelBoxReader:
    """The boxes of a dataroot; DataError where it has none that is scored."""
    boxes = open_boxes(index)
    points = index.columns["box_points"]
    if not (points > 0).any():
        raise DataError(
            f"detection learns and scores boxes with points of LiDAR or radar in them, and {index.root} {index.version} was to have some: "
            f"none of its {len(points)} boxes has any; take data of a rig with LiDAR, or another task"
        )
    return LevelBoxReader(boxes)
