"""Detection's figures: by hand, perfect and shuffled, what is left out, and equal to the devkit's on the same file and dataroot."""

import json
import math
import shutil
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from models.config import DETECTION_CLASSES, EncoderConfig
from models.pretraining import PretrainingModel, build_model
from trainer.config.run import RunConfig
from trainer.data.boxes import BOX_CLASSES
from trainer.data.level_boxes import ATTRIBUTES, BICYCLE_RACK
from trainer.evaluation.detection import RESULTS_FILE, DetectionScores, choose_attributes, place_frequent_boxes
from trainer.evaluation.planning import ChosenEncoder, plan_run
from trainer.evaluation.scoring import read_clips, repeat_constant, score_model, truth_of

SCORES = DetectionScores()
TINY = ChosenEncoder("tiny", EncoderConfig(size="tiny", patch_px=16), {"height_px": 32, "width_px": 48}, None)
FIGURES = ["mAP", "NDS", "mATE", "mASE", "mAOE", "mAVE", "mAAE"]
MOVING = {"car": 5, "truck": 5, "bus": 5, "trailer": 5, "construction_vehicle": 5, "pedestrian": 0, "motorcycle": 3, "bicycle": 3}


def random_truth(samples: int = 6, boxes: int = 30, seed: int = 0) -> np.ndarray:
    """Moving boxes of all classes within the range of the nearest; every third row is unused."""
    rng = np.random.default_rng(seed)
    truth = np.full((samples, boxes, 12), np.nan, dtype=np.float32)
    classes = np.arange(boxes) % len(BOX_CLASSES)
    bearing, reach = rng.uniform(-math.pi, math.pi, (samples, boxes)), rng.uniform(3, 29, (samples, boxes))
    truth[..., 0], truth[..., 1], truth[..., 2] = (
        reach * np.cos(bearing),
        reach * np.sin(bearing),
        rng.normal(1, 0.2, reach.shape),
    )
    truth[..., 3:6] = rng.uniform(0.5, 5, (samples, boxes, 3))
    truth[..., 6] = rng.uniform(-math.pi, math.pi, reach.shape)
    truth[..., 7:9] = rng.normal(0, 1, (samples, boxes, 2)) + 3
    truth[..., 9], truth[..., 11] = classes, 5
    truth[..., 10] = [MOVING.get(BOX_CLASSES[number], -1) for number in classes]
    return truth


def answer(truth: np.ndarray) -> np.ndarray:
    """Predictions that say the truth, all as sure."""
    return np.concatenate([np.nan_to_num(truth[..., :10]), np.where(np.isnan(truth[..., 9:10]), 0.0, 0.5)], axis=-1).astype(
        np.float32
    )


@pytest.fixture(scope="module")
def held_out(city: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The city with a split that the devkit takes: its own names are tied to its own versions."""
    root = tmp_path_factory.mktemp("held-out")
    for part in city.iterdir():
        if part.name != "v1.0-mini":
            (root / part.name).symlink_to(part)
    shutil.copytree(city / "v1.0-mini", root / "v1.0-mini")
    splits = json.loads((city / "v1.0-mini" / "splits.json").read_text())
    (root / "v1.0-mini" / "splits.json").write_text(json.dumps(splits | {"held_out": splits["val"]}))
    return root


def devkit_figures(root: Path, split: str, results: bytes, folder: Path) -> dict[str, float]:
    """What the devkit's own evaluator says of a submission."""
    from nuscenes.eval.common.config import config_factory
    from nuscenes.eval.detection.evaluate import DetectionEval
    from nuscenes.nuscenes import NuScenes

    file = folder / RESULTS_FILE
    file.write_bytes(results)
    devkit = NuScenes(version="v1.0-mini", dataroot=str(root), verbose=False)
    config = config_factory("detection_cvpr_2019")
    metrics, _ = DetectionEval(devkit, config, str(file), split, str(folder / "out"), verbose=False).evaluate()
    errors = ("trans_err", "scale_err", "orient_err", "vel_err", "attr_err")
    return dict(zip(FIGURES, (metrics.mean_ap, metrics.nd_score, *(metrics.tp_errors[name] for name in errors)), strict=True))


def read_truth(folder: Path, split: Literal["train", "val"], *data: str) -> dict[str, np.ndarray]:
    """What is prepared for all clips of a split."""
    config = plan_run("detection", TINY, "frozen", seed=0, out=str(folder), data=["workers=0", *data])
    parts = [
        {name: tensor.numpy()[:count] for name, tensor in batch.prepared["detection"].items()}
        for batch, count in read_clips(config, split, 100)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def guess(truth: np.ndarray, seed: int = 0) -> np.ndarray:
    """The truth, a little off in everything, some of it left out, and as many boxes where there are none."""
    rng = np.random.default_rng(seed)
    predicted = answer(truth)[:, :80]
    predicted[..., 10] *= rng.choice([0, 1, 1, 1], predicted.shape[:2]) * rng.uniform(0.2, 1, predicted.shape[:2])
    predicted[..., :3] += rng.normal(0, 0.8, predicted[..., :3].shape)
    predicted[..., 3:6] *= rng.uniform(0.8, 1.2, predicted[..., 3:6].shape)
    predicted[..., 6:9] += rng.normal(0, 0.4, predicted[..., 6:9].shape)
    astray = predicted[:, ::2].copy()
    astray[..., :2] += rng.normal(0, 8, astray[..., :2].shape)
    return np.concatenate([predicted, astray], axis=1)


def assert_devkit_agrees(prepared: dict[str, np.ndarray], root: Path, split: str, folder: Path) -> dict[str, float]:
    predicted = guess(prepared["truth"])
    rows = SCORES.measure(predicted, prepared["truth"])
    results = SCORES.write_files(rows, {name: prepared[name] for name in SCORES.keeps})[RESULTS_FILE]
    figures = SCORES.figures(rows)
    assert devkit_figures(root, split, results, folder) == pytest.approx(figures, abs=1e-5)
    return figures


def test_the_devkit_says_the_same_of_the_submission_on_a_synthetic_dataroot(held_out: Path, tmp_path: Path) -> None:
    prepared = read_truth(tmp_path, "val", f"root={held_out}", "kind=synthetic")
    figures = assert_devkit_agrees(prepared, held_out, "held_out", tmp_path)
    assert 0.05 < figures["mAP"] < 0.6 and figures["mAAE"] < 1


def test_the_devkit_says_the_same_of_the_submission_on_the_real_keyframe(keyframe_dataroot: Path, tmp_path: Path) -> None:
    prepared = read_truth(tmp_path, "train", f"root={keyframe_dataroot}", "train_split=all", "val_split=all")
    figures = assert_devkit_agrees(prepared, keyframe_dataroot, "mini_train", tmp_path)
    assert 0.05 < figures["mAP"] < 0.6


SMALL_HEAD = [
    f"objectives.0.{key}"
    for key in (
        "lift.range_m=24",
        "lift.cell_m=2",
        "lift.channels=8",
        "lift.width=32",
        "lift.depth_bins=8",
        "head_width=32",
        "boxes=60",
    )
]


def plan_small(city: Path, folder: Path) -> tuple[RunConfig, PretrainingModel]:
    data = [f"root={city}", "kind=synthetic", "cameras=[CAM_FRONT, CAM_BACK]", "workers=0"]
    config = plan_run("detection", TINY, "frozen", seed=0, out=str(folder), data=data, overrides=SMALL_HEAD)
    torch.manual_seed(0)
    return config, build_model(config.encoder, config.objectives, config.token_grid, cameras=config.cameras)


def test_a_head_learns_the_boxes_that_it_is_shown_beyond_the_trivial_answer(city: Path, tmp_path: Path) -> None:
    config, model = plan_small(city, tmp_path)
    batch, _ = next(read_clips(config, "train", 4))
    model.freeze_encoder()  # features of a random encoder are enough to tell four clips apart
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=3e-3)
    for _ in range(60):
        model(batch, "train").total.backward()
        optimizer.step()
        optimizer.zero_grad()
    truth = truth_of(batch, "detection")
    truth = np.where((np.abs(truth[..., :2]) < 24).all(-1, keepdims=True), truth, np.float32(np.nan))  # what the small map holds
    with torch.no_grad():
        learnt = figures_of(model.eval()(batch, "predict")["detection"].numpy(), truth)
    trivial = figures_of(repeat_constant(place_frequent_boxes(truth), (4, 60, 11)), truth)
    assert learnt["mAP"] > 1.5 * trivial["mAP"] and learnt["NDS"] > trivial["NDS"], (learnt, trivial)


def test_a_submission_has_every_clip_that_is_scored(city: Path, tmp_path: Path) -> None:
    config, model = plan_small(city, tmp_path)
    scored = score_model(model.eval(), config, "detection", clips=3, device=torch.device("cpu"))
    assert list(scored.figures) == list(scored.trivial) == FIGURES
    content = json.loads(scored.files[RESULTS_FILE])
    assert len(content["results"]) == scored.clips == 3
    boxes = next(iter(content["results"].values()))
    assert 0 < len(boxes) <= 60 and boxes[0]["detection_name"] in BOX_CLASSES


def figures_of(predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    return SCORES.figures(SCORES.measure(predicted, truth))


def a_car(x: float, y: float = 0.0, **changed: float) -> list[float]:
    names = ("x", "y", "z", "length", "width", "height", "yaw", "vx", "vy", "kind", "attribute", "points")
    values = dict(zip(names, (x, y, 1, 4, 2, 1.5, 0, 3, 0, 0, 5, 9), strict=True))
    return list((values | changed).values())


def boxes(*rows: list[float]) -> np.ndarray:
    """One sample."""
    return np.array(rows, dtype=np.float32)[None]


def test_the_truth_scores_perfectly() -> None:
    truth = random_truth()
    truth[:, ::7] = np.nan
    expected = {"mAP": 1.0, "NDS": 1.0} | dict.fromkeys(FIGURES[2:], 0.0)
    assert figures_of(answer(truth), truth) == pytest.approx(expected, abs=1e-6)


def test_the_truth_of_other_samples_scores_badly() -> None:
    truth = random_truth(samples=20)
    figures = figures_of(answer(np.roll(truth, 1, axis=0)), truth)
    assert list(figures) == FIGURES
    assert figures["mAP"] < 0.1 and figures["NDS"] < 0.2
    assert min(figures[name] for name in FIGURES[2:5]) > 0.8


def test_rows_of_several_batches_make_the_figures_of_all() -> None:
    truth = random_truth(samples=9)
    predicted = answer(truth)
    predicted[..., :2] += np.random.default_rng(1).normal(0, 1, (9, 30, 2))
    parts = [SCORES.measure(predicted[first:end], truth[first:end]) for first, end in ((0, 2), (2, 7), (7, 9))]
    assert SCORES.figures(np.concatenate(parts)) == pytest.approx(figures_of(predicted, truth))


def test_one_class_by_hand() -> None:
    truth = boxes(a_car(10), a_car(20))
    # one car 1.5 m off in place, half as long, turned by 0.3, 1 m/s too fast; the other not found; one where there is none
    predicted = boxes([11.5, 0, 1, 2, 2, 1.5, 0.3, 4, 0, 0, 0.9], [40, 0, 1, 4, 2, 1.5, 0, 0, 0, 0, 0.5])
    figures = figures_of(predicted, truth)
    # within 2 and 4 m, for one of ten classes: of 90 steps of recall 39 have a precision of 1, the last that of both; a tenth is taken off
    assert figures["mAP"] == pytest.approx((39 + (0.5 - 0.1) / 0.9) / 90 / 2 / 10)
    assert figures["mATE"] == pytest.approx((1.5 + 9) / 10)
    assert figures["mASE"] == pytest.approx((0.5 + 9) / 10)
    assert figures["mAOE"] == pytest.approx((0.3 + 8) / 9, abs=1e-6)
    assert figures["mAVE"] == pytest.approx((1 + 7) / 8)
    assert figures["mAAE"] == pytest.approx(7 / 8)


def test_what_is_too_far_unseen_or_in_a_rack_is_left_out() -> None:
    cycle, rack = BOX_CLASSES.index("bicycle"), a_car(5, 5, kind=BICYCLE_RACK, yaw=0.5, attribute=-1)
    seen = a_car(10)
    truth = boxes(seen, a_car(50.5), a_car(20, points=0), a_car(5.5, 5.2, kind=cycle, attribute=3), rack)
    predicted = answer(truth)
    predicted[0, 4, 10] = 0  # a rack is no answer
    expected = figures_of(answer(boxes(seen)), boxes(seen))
    assert expected["mAP"] == pytest.approx(0.1)
    assert figures_of(predicted[:, [0, 1, 3]], truth) == pytest.approx(expected)
    outside = truth.copy()
    outside[0, 4, 0] = -20  # the bicycle is in it no longer
    assert figures_of(predicted[:, [0, 1, 3]], outside)["mAP"] == pytest.approx(0.2)


def test_nothing_predicted_scores_nothing_and_nothing_true_is_not_scored() -> None:
    truth = random_truth(samples=2)
    none = np.zeros((2, 5, 11), dtype=np.float32)
    assert figures_of(none, truth) == pytest.approx({"mAP": 0.0, "NDS": 0.0} | dict.fromkeys(FIGURES[2:], 1.0))
    unknown = figures_of(answer(truth), np.full_like(truth, np.nan))
    assert list(unknown) == FIGURES and all(math.isnan(value) for value in unknown.values())


def test_attributes_follow_from_class_and_speed() -> None:
    predicted = np.zeros((1, 20, 11))
    predicted[0, :, 9] = np.arange(20) // 2
    predicted[0, ::2, 7] = -3
    names = [ATTRIBUTES[int(number)] if number >= 0 else "" for number in choose_attributes(predicted)[0, :, 0]]
    assert names[:6] == ["vehicle.moving", "vehicle.parked"] * 2 + ["vehicle.moving", "vehicle.stopped"]
    assert names[10:16] == ["pedestrian.moving", "pedestrian.standing"] + ["cycle.with_rider", "cycle.without_rider"] * 2
    assert names[16:] == [""] * 4


def test_the_trivial_answer_has_the_mean_box_where_boxes_often_are() -> None:
    often = [
        boxes(a_car(9 + 0.5 * shift, 1, yaw=0.1 * shift, length=4 + shift), a_car(-30, -30, points=0)) for shift in (-1, 0, 1)
    ]
    truth = np.concatenate([*often, boxes(a_car(21, 1, vx=math.nan, vy=math.nan, length=8.0), a_car(1, 1, kind=BICYCLE_RACK))])
    placed = place_frequent_boxes(truth)
    assert (placed[:, 10] > 0).sum() == 2
    np.testing.assert_allclose(placed[0], [9, 1, 1, 5, 2, 1.5, 0, 3, 0, 0, 3 / 4], atol=1e-6)
    np.testing.assert_allclose(placed[1], [21, 1, 1, 5, 2, 1.5, 0, 0, 0, 0, 1 / 4], atol=1e-6)


def test_there_are_as_many_classes_as_the_head_has_and_they_are_those_of_the_devkit() -> None:
    from nuscenes.eval.detection.constants import ATTRIBUTE_NAMES, DETECTION_NAMES

    assert len(BOX_CLASSES) == DETECTION_CLASSES
    assert list(BOX_CLASSES) == DETECTION_NAMES and list(ATTRIBUTES) == ATTRIBUTE_NAMES
