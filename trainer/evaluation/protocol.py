"""The protocol of each downstream task: its data, its budget, its metrics and the trivial answer that it has to beat.

What is said here is the default of `odonata evaluate`; anything can be overridden on the command line, and the config.yaml of
each run says what it was. Where a number comes from:

    optimiser     AdamW (0.9, 0.999); fine-tuned 1e-4 with layer decay 0.75, as MultiMAE fine-tunes on NYUv2 (Bachmann et al. 2022), whose
                  protocol CroCo takes; frozen 1e-3, ours: a fresh head alone bears more
    steps         ours: what a tiny model needs on a CPU; published schedules are far longer (CroCo-Flow: 240 times 30,000 pairs)
    depth         1 to 80 m, the usual cap on KITTI; all cameras
    pose          the same camera at another time, at most a second away, there and back: poses between cameras are constants of the rig
    flow          the camera's next image, and back; crops above 7/8, since a smaller window sees less of the motion
    bev           100 m x 100 m in cells of 0.5 m; vehicles as LSS has them, visible or not (Philion and Fidler 2020)
    map           60 m x 30 m (HDMapNet, Li et al. 2022), 20 points a line (MapTR, Liao et al. 2023)
    detection     all cameras of a key frame, 100 m x 100 m around the car, nuScenes' own ranges and figures
    augmentation  crops of 7/8 and more, colours by 0.4 (CroCo); depth without crops, which change the scale of what is seen
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from trainer.evaluation.detection import DetectionScores, place_frequent_boxes
from trainer.evaluation.map_scores import MapScores
from trainer.evaluation.scores import BevScores, DepthScores, FlowScores, PoseScores, Scores

TaskName = Literal["depth", "pose", "flow", "bev", "map", "detection"]
Mode = Literal["frozen", "finetuned"]
PAIR_TASKS: tuple[TaskName, ...] = ("pose", "flow")
"""Those in which two images meet in a decoder."""

LEARNING: Mapping[Mode, Mapping[str, Any]] = {
    "frozen": {"train_encoder": False, "lr": 1e-3, "betas": (0.9, 0.999)},
    "finetuned": {"train_encoder": True, "lr": 1e-4, "betas": (0.9, 0.999), "layer_decay": 0.75},
}
WARMUP_SHARE = 0.05
"""Of the steps, during which the learning rate rises."""
SCRATCH_CLIP = {"height_px": 224, "width_px": 400}
"""What an encoder without a past sees: nuScenes' images at a quarter of their size. Others see what they were pre-trained on."""

Truth = Float[np.ndarray, "n ..."]

_LAYOUTS = 8
"""Of so many training clips the trivial answer to `map` is chosen, judged by four times as many."""


@dataclass(frozen=True)
class Protocol:
    """How one task is trained and scored."""

    steps: int
    global_batch: int
    data: Mapping[str, Any]
    """Keys of the run's data section."""
    scores: Scores
    trivial: str
    """What the trivial answer is called in reports."""
    answer_trivially: Callable[[Truth], np.ndarray]
    """The best constant of what is true of training clips, to be broadcast to every sample."""


def median_depth(truth: Truth) -> np.ndarray:
    """Of all points: the constant with the least mean absolute error."""
    return np.array(np.nanmedian(truth))


def mean_pose(truth: Truth) -> np.ndarray:
    """Mean translation of all, both ways, and the rotation nearest to the mean of all (the chordal mean, Hartley et al. 2013)."""
    mean = truth.astype(np.float64).mean(axis=(0, 1))
    left, _, right = np.linalg.svd(mean[:3, :3])
    mean[:3, :3] = left @ np.diag([1, 1, np.linalg.det(left @ right)]) @ right
    return mean


def no_flow(truth: Truth) -> np.ndarray:
    """Everything stays where it is."""
    del truth
    return np.zeros(2)


def usual_map(truth: Truth) -> np.ndarray:
    """Of each layer the cells that are most often true, as many as give the best IoU: the best map that looks at nothing, and is sure."""
    often = truth.mean(axis=0)  # (layers, Y, X)
    usual = np.full_like(often, -np.inf)
    for layer, share in zip(usual.reshape(len(often), -1), often.reshape(len(often), -1), strict=True):
        order = np.argsort(-share, kind="stable")
        hit = np.cumsum(share[order], dtype=np.float64)
        iou = hit / (np.arange(1, len(hit) + 1) + hit[-1] - hit)
        layer[order[: np.argmax(iou) + 1]] = np.inf
    return usual


def usual_layout(truth: Truth) -> np.ndarray:
    """The lines of that clip, of a few, whose lines are most often those of others too: the best layout that looks at nothing."""
    scores, judged = MapScores(), truth[:: max(1, len(truth) // (4 * _LAYOUTS))]
    candidates = truth[:: max(1, len(truth) // _LAYOUTS)]
    figures = [scores.figures(scores.measure(np.broadcast_to(one, judged.shape), judged))["mAP"] for one in candidates]
    return candidates[int(np.nan_to_num(figures).argmax())]


PROTOCOLS: Mapping[TaskName, Protocol] = {
    "depth": Protocol(
        steps=1000,
        global_batch=8,
        data={"augment": {"crop_share": [1.0, 1.0], "flip_probability": 0.5}},
        scores=DepthScores(),
        trivial="the median depth of training clips everywhere",
        answer_trivially=median_depth,
    ),
    "pose": Protocol(
        steps=2000,
        global_batch=16,
        data={"pairs": {"cross_camera_share": 0.0, "max_gap_s": 1.0}, "augment": {"crop_share": [0.875, 1.0]}},
        scores=PoseScores(),
        trivial="the mean pose of training pairs, both ways",
        answer_trivially=mean_pose,
    ),
    "flow": Protocol(
        steps=2000,
        global_batch=16,
        data={"augment": {"crop_share": [0.875, 1.0], "flip_probability": 0.5}},
        scores=FlowScores(),
        trivial="no motion at all",
        answer_trivially=no_flow,
    ),
    "bev": Protocol(
        steps=2000,
        global_batch=8,
        data={"augment": {"crop_share": [0.875, 1.0], "flip_probability": 0.5}},
        scores=BevScores(),
        trivial="the cells that are most often true in training clips, whatever is seen",
        answer_trivially=usual_map,
    ),
    "map": Protocol(
        steps=4000,
        global_batch=8,
        data={"augment": {"crop_share": [0.875, 1.0], "flip_probability": 0.5}},
        scores=MapScores(),
        trivial="the lines of the training clip that are most like those of others, whatever is seen",
        answer_trivially=usual_layout,
    ),
    "detection": Protocol(
        steps=4000,
        global_batch=8,
        data={"augment": {"crop_share": [0.875, 1.0], "flip_probability": 0.5}},
        scores=DetectionScores(),
        trivial="mean boxes at the places where training clips most often have one",
        answer_trivially=place_frequent_boxes,
    ),
}
