"""The annotated boxes of a key frame as fields of a sample, in the ego frame of its images.

That frame is the one of `pix_from_ego`: the car as it stood when the frame's first camera fired. A box stands where it was annotated,
at the time of the key frame's LiDAR sweep, so one that moves by itself is off by its motion between the two, at most 0.05 s.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, Int

from trainer.data.frames import NO_ROW
from trainer.data.index import Index
from trainer.errors import DataError

BOX_FIELDS = frozenset({"boxes_ego", "first_box", "box_class", "box_is_vehicle", "box_points"})

BOX_CLASSES = (
    "car",
    "truck",
    "bus",
    "trailer",
    "construction_vehicle",
    "pedestrian",
    "motorcycle",
    "bicycle",
    "traffic_cone",
    "barrier",
)
"""The classes of nuScenes' detection task, in its order."""
_CLASS_OF_CATEGORY = {
    "vehicle.car": "car",
    "vehicle.truck": "truck",
    "vehicle.bus.bendy": "bus",
    "vehicle.bus.rigid": "bus",
    "vehicle.trailer": "trailer",
    "vehicle.construction": "construction_vehicle",
    "human.pedestrian.adult": "pedestrian",
    "human.pedestrian.child": "pedestrian",
    "human.pedestrian.construction_worker": "pedestrian",
    "human.pedestrian.police_officer": "pedestrian",
    "vehicle.motorcycle": "motorcycle",
    "vehicle.bicycle": "bicycle",
    "movable_object.trafficcone": "traffic_cone",
    "movable_object.barrier": "barrier",
}
"""What the detection task takes; other categories are of no class, ambulances and strollers among them."""


@dataclass(frozen=True)
class BoxReader:
    """Boxes of the samples that images belong to."""

    index: Index

    offers = BOX_FIELDS

    def read(self, rows: Int[np.ndarray, "T V"], world_from_ego: Float64[np.ndarray, "T 4 4"]) -> dict[str, np.ndarray]:
        """As Annotations has it; `rows` are images of key frames."""
        slices = [self.index.boxes_of(int(row)) for row in rows[:, 0]]
        boxes = [self._move_boxes(of_frame, pose) for of_frame, pose in zip(slices, world_from_ego, strict=True)]
        columns = self.index.columns
        category, points = (
            np.concatenate([columns[name][of_frame] for of_frame in slices]) for name in ("box_category", "box_points")
        )
        names = [name.decode() for name in columns["category_name"].tolist()]
        class_of = np.array([find_class(name) for name in names], dtype=np.int64)
        return {
            "boxes_ego": np.concatenate(boxes),
            "first_box": np.cumsum([0, *map(len, boxes)]),
            "box_class": class_of[category],
            "box_is_vehicle": np.array([name.startswith("vehicle.") for name in names])[category],
            "box_points": points.astype(np.int64),
        }

    def _move_boxes(self, rows: slice, world_from_ego: Float64[np.ndarray, "4 4"]) -> Float32[np.ndarray, "K 9"]:
        columns = self.index.columns
        turn, origin = world_from_ego[:3, :3], world_from_ego[:3, 3]
        # a row vector times world_from_ego's rotation is ego_from_world's rotation times the vector
        centre = (columns["box_centre_world"][rows] - origin) @ turn
        heading = columns["box_heading_world"][rows] @ turn
        velocity = columns["box_velocity_world"][rows] @ turn
        yaw = np.arctan2(heading[:, 1], heading[:, 0])[:, None]
        return np.concatenate([centre, columns["box_size_m"][rows], yaw, velocity[:, :2]], axis=-1).astype(np.float32)


def find_class(category: str) -> int:
    """Row in BOX_CLASSES of a nuScenes category, or NO_ROW."""
    name = _CLASS_OF_CATEGORY.get(category)
    return NO_ROW if name is None else BOX_CLASSES.index(name)


def open_boxes(index: Index) -> BoxReader:
    """The boxes of a dataroot; DataError where it has none."""
    if not index.has_boxes:
        raise DataError(
            f"a task needs annotated boxes and {index.root} {index.version} has none: tables of a test set are without, and packed drives "
            "leave them out; take an annotated dataroot (data.kind nuscenes or synthetic), or another task"
        )
    return BoxReader(index)
