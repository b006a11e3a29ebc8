"""Detection's figures, by nuScenes' own code, its submission file, and the trivial answer.

    mAP, NDS    mean average precision over classes and distances of centres (0.5, 1, 2, 4 m); nuScenes' detection score
    mATE mASE   mean errors of true positives: of centres in metres, of sizes as 1 - IoU,
    mAOE mAVE   of headings in radians, of velocities in m/s,
    mAAE        of attributes as 1 - accuracy                                                   (Caesar et al. 2020)

The devkit's `DetectionEval` reads a result file and a dataroot. Here boxes come from the model and its preparation, and `evaluate` of that
class does the rest. What its constructor leaves out is left out here by the same rules: boxes beyond the range of their class
around the car, true ones without any point of LiDAR or radar, bicycles and motorcycles in a rack.

Boxes are in the frame `level` (`models/objectives/detection.py`), whose origin is where the devkit measures ranges from, and no figure
changes with a turn about z. `results_nusc.json` has them in the world, for the devkit's own command. A class without any true box
counts as 0 in mAP and as 1 in the errors, as the devkit has it: on data without all ten classes a perfect answer stays below 1.

The attribute of a predicted box follows from its class and speed, CenterPoint's rule (Yin et al. 2021).

Letters: n samples, K predicted and G true boxes of each, b of both. A row of a box: nine numbers, class, score, attribute, points; as
the devkit has it true boxes have a score of -1 and predicted ones -1 points.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Float64

from trainer.data.boxes import BOX_CLASSES
from trainer.data.level_boxes import ATTRIBUTES, BICYCLE_RACK
from trainer.evaluation.scores import Rows, Scores

if TYPE_CHECKING:
    from nuscenes.eval.common.data_classes import EvalBoxes

RESULTS_FILE = "results_nusc.json"

Boxes = Float64[np.ndarray, "_ 13"]

_CLASS, _SCORE, _ATTRIBUTE, _POINTS = 9, 10, 11, 12
_MOVING_MPS = 0.2
_ATTRIBUTE_OF_CLASS = {
    "car": ("vehicle.moving", "vehicle.parked"),
    "truck": ("vehicle.moving", "vehicle.parked"),
    "bus": ("vehicle.moving", "vehicle.stopped"),
    "trailer": ("vehicle.moving", "vehicle.parked"),
    "construction_vehicle": ("vehicle.moving", "vehicle.parked"),
    "pedestrian": ("pedestrian.moving", "pedestrian.standing"),
    "motorcycle": ("cycle.with_rider", "cycle.without_rider"),
    "bicycle": ("cycle.with_rider", "cycle.without_rider"),
    "traffic_cone": ("", ""),
    "barrier": ("", ""),
}
"""Of what moves and of what stands."""
_ERRORS = {"trans_err": "mATE", "scale_err": "mASE", "orient_err": "mAOE", "vel_err": "mAVE", "attr_err": "mAAE"}
_META = {"use_camera": True, "use_lidar": False, "use_radar": False, "use_map": False, "use_external": False}
_TRIVIAL_BOXES = 300
_TRIVIAL_CELL_M = 4.0


class DetectionScores(Scores):
    """nuScenes' detection metrics."""

    keeps = ("world_from_level", "sample_token")

    def measure(self, predicted: Float[np.ndarray, "n K 11"], truth: Float[np.ndarray, "n G 12"]) -> Rows:
        """The rows of all boxes (n, K + G, 13); NaN fills up."""
        predicted, truth = predicted.astype(np.float64), truth.astype(np.float64)
        attribute = choose_attributes(predicted)
        points, score = np.full_like(attribute, -1), np.full_like(truth[..., :1], -1)
        answers = np.concatenate([predicted, attribute, points], axis=-1)
        return np.concatenate([answers, np.concatenate([truth[..., :10], score, truth[..., 10:]], axis=-1)], axis=1)

    def figures(self, rows: Rows) -> dict[str, float]:
        """As Scores has it."""
        scored = [_leave_out(boxes) for boxes in rows]
        if not any(_is_true(boxes).any() for boxes in scored):
            return dict.fromkeys(("mAP", "NDS", *_ERRORS.values()), float("nan"))
        true, predicted = (_as_devkit_boxes([boxes[_is_true(boxes) == wanted] for boxes in scored]) for wanted in (True, False))
        return _evaluate(true, predicted)

    def write_files(self, rows: Rows, kept: Mapping[str, np.ndarray]) -> dict[str, bytes]:
        """The predicted boxes in the format of a submission."""
        results = {}
        for boxes, world_from_level, letters in zip(rows, kept["world_from_level"], kept["sample_token"], strict=True):
            token = letters.tobytes().decode().rstrip("\0")
            answers = _leave_out(boxes)
            results[token] = list(_to_world(answers[~_is_true(answers)], world_from_level, token))
        return {RESULTS_FILE: json.dumps({"meta": _META, "results": results}).encode()}


def choose_attributes(predicted: Float64[np.ndarray, "n K 11"]) -> Float64[np.ndarray, "n K 1"]:
    """By class and speed."""
    number_of = {"": -1} | {name: number for number, name in enumerate(ATTRIBUTES)}
    table = np.array([[number_of[name] for name in _ATTRIBUTE_OF_CLASS[of_class]] for of_class in BOX_CLASSES], dtype=np.float64)
    stands = np.hypot(predicted[..., 7], predicted[..., 8]) <= _MOVING_MPS
    return table[predicted[..., 9].astype(np.int64), stands.astype(np.int64)][..., None]


def place_frequent_boxes(truth: Float[np.ndarray, "n G 12"]) -> Float64[np.ndarray, "K 11"]:
    """The mean box of each class at the places where training clips most often have one, as sure as that is frequent.

    Places are cells of 4 m around the car; heights, yaws and velocities are means of the boxes there, sizes of the class.
    """
    boxes = truth.reshape(-1, truth.shape[-1]).astype(np.float64)
    boxes = boxes[(boxes[:, 9] < len(BOX_CLASSES)) & (boxes[:, 11] > 0)]
    answer = np.zeros((_TRIVIAL_BOXES, 11))
    answer[:, 3:6] = 1.0
    places = np.concatenate([boxes[:, 9:10], np.floor(boxes[:, :2] / _TRIVIAL_CELL_M)], axis=1)
    distinct, member, count = np.unique(places, axis=0, return_inverse=True, return_counts=True)
    for row, place in enumerate(np.argsort(-count, kind="stable")[:_TRIVIAL_BOXES]):
        here, of_class = boxes[member.reshape(-1) == place], boxes[boxes[:, 9] == distinct[place, 0]]
        yaw = np.arctan2(np.sin(here[:, 6]).mean(), np.cos(here[:, 6]).mean())
        velocity = np.nan_to_num(here[:, 7:9]).mean(axis=0)
        answer[row] = [
            *here[:, :3].mean(axis=0),
            *of_class[:, 3:6].mean(axis=0),
            yaw,
            *velocity,
            distinct[place, 0],
            count[place] / len(truth),
        ]
    return answer


def _is_true(boxes: Boxes) -> Bool[np.ndarray, " b"]:
    return boxes[:, _SCORE] < 0


def _leave_out(boxes: Boxes) -> Boxes:
    """Those of one sample that nuScenes scores: no racks, nothing too far, unseen or in a rack."""
    boxes = boxes[np.isfinite(boxes[:, _CLASS]) & (boxes[:, _SCORE] != 0)]
    classes = boxes[:, _CLASS].astype(np.int64)
    racks, boxes, classes = boxes[classes == BICYCLE_RACK], boxes[classes != BICYCLE_RACK], classes[classes != BICYCLE_RACK]
    ranges_m = np.array([_config().class_range[name] for name in BOX_CLASSES])
    is_scored = (np.hypot(boxes[:, 0], boxes[:, 1]) < ranges_m[classes]) & (boxes[:, _POINTS] != 0)
    is_cycle = np.isin(classes, [BOX_CLASSES.index(name) for name in ("bicycle", "motorcycle")])
    for rack in racks:
        is_scored &= ~(is_cycle & _is_within(boxes[:, :3], rack))
    return boxes[is_scored]


def _is_within(points: Float64[np.ndarray, "b 3"], box: Float64[np.ndarray, " values"]) -> Bool[np.ndarray, " b"]:
    x, y, z = (points - box[:3]).T
    cos, sin = np.cos(box[6]), np.sin(box[6])
    apart = np.stack([cos * x + sin * y, cos * y - sin * x, z], axis=-1)
    return (np.abs(apart) <= box[3:6] / 2).all(-1)


@cache
def _config() -> Any:
    from nuscenes.eval.common.config import config_factory  # slow, as all of the devkit

    return config_factory("detection_cvpr_2019")


def _as_devkit_boxes(samples: Sequence[Boxes]) -> "EvalBoxes":
    from nuscenes.eval.common.data_classes import EvalBoxes
    from nuscenes.eval.detection.data_classes import DetectionBox

    boxes = EvalBoxes()
    for number, of_sample in enumerate(samples):
        contents = _describe(of_sample, str(number))
        numbered = zip(contents, of_sample[:, _POINTS].astype(int).tolist(), strict=True)
        boxes.add_boxes(str(number), [DetectionBox(**content, num_pts=points) for content, points in numbered])
    return boxes


def _evaluate(true: "EvalBoxes", predicted: "EvalBoxes") -> dict[str, float]:
    from nuscenes.eval.detection.evaluate import DetectionEval

    scorer = DetectionEval.__new__(DetectionEval)  # its constructor reads a file and a dataroot
    scorer.cfg, scorer.verbose, scorer.gt_boxes, scorer.pred_boxes = _config(), False, true, predicted
    metrics, _ = scorer.evaluate()
    errors = metrics.tp_errors
    return {"mAP": metrics.mean_ap, "NDS": metrics.nd_score} | {name: errors[of] for of, name in _ERRORS.items()}


def _to_world(boxes: Boxes, world_from_level: Float64[np.ndarray, "4 4"], token: str) -> Iterator[dict[str, Any]]:
    turn, moved = np.arctan2(world_from_level[1, 0], world_from_level[0, 0]), boxes.copy()
    moved[:, :3] = boxes[:, :3] @ world_from_level[:3, :3].T + world_from_level[:3, 3]
    moved[:, 6] += turn
    moved[:, 7:9] = boxes[:, 7:9] @ world_from_level[:2, :2].T
    return _describe(moved, token)


def _describe(boxes: Boxes, token: str) -> Iterator[dict[str, Any]]:
    """As a submission has boxes: width before length, upright quaternions."""
    for x, y, z, length, width, height, yaw, vx, vy, number, score, attribute, _ in boxes.tolist():
        yield {
            "sample_token": token,
            "translation": (x, y, z),
            "size": (width, length, height),
            "rotation": (np.cos(yaw / 2).item(), 0.0, 0.0, np.sin(yaw / 2).item()),
            "velocity": (vx, vy),
            "detection_name": BOX_CLASSES[int(number)],
            "detection_score": score,
            "attribute_name": ATTRIBUTES[int(attribute)] if attribute >= 0 else "",
        }
