"""Detection: which boxes become which maps, the loss by its definition, and that maps become the boxes they were drawn from."""

import math
import pickle

import numpy as np
import pytest
import torch

from models.batch import Batch
from models.config import DETECTION_CLASSES as CLASSES
from models.config import DetectionConfig, EncoderConfig, Grid, LiftConfig
from models.heads.centre import find_boxes
from models.heads.lift import build_bev_grid
from models.objectives.base import Preparation
from models.objectives.detection import DetectionObjective, draw_maps, focal_loss
from models.pretraining import PretrainingModel, build_model, build_preparations
from tests.models.samples import PATCH_PX, SURROUND_CAMERAS, surround_batch, surround_sample

ENCODER = EncoderConfig(size="tiny", patch_px=PATCH_PX)
GRID = Grid(1, 1, 2, 3)
CONFIG = DetectionConfig(
    lift=LiftConfig(range_m=16, cell_m=1, far_m=17, depth_bins=8, channels=8, width=16), head_width=16, boxes=20
)
BEV = build_bev_grid(16.0, 1.0)
CAR = (4.3, -2.6, 0.8, 4.5, 1.9, 1.6, 0.7, 3.0, 1.0, 0, 5, 10)
"""x, y, z, length, width, height, yaw, vx, vy; class, attribute, points."""
WALKER = (-7.2, 5.9, 0.9, 0.7, 0.6, 1.7, -2.0, math.nan, math.nan, 5, 0, 3)


def boxed(*boxes: tuple[float, ...]) -> np.ndarray:
    return np.array(boxes, dtype=np.float32).reshape(-1, 12)


def turned(yaw: float = 0.0, pitch: float = 0.0, shift: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> np.ndarray:
    c, s, p, q = math.cos(yaw), math.sin(yaw), math.cos(pitch), math.sin(pitch)
    matrix = np.eye(4)
    matrix[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array([[p, 0, q], [0, 1, 0], [-q, 0, p]])
    matrix[:3, 3] = shift
    return matrix


def clip(*boxes: tuple[float, ...], seed: int = 0, level_from_ego: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """A random surround clip of one instant with these boxes."""
    table = boxed(*boxes)
    return surround_sample(GRID, tubelet_frames=1, seed=seed) | {
        "level_boxes": table,
        "first_level_box": np.array([0, len(table)]),
        "level_from_ego": (np.eye(4) if level_from_ego is None else level_from_ego)[None],
        "world_from_level": turned(0.3, shift=(1000.0, 2000.0, 3.0))[None],
        "sample_token": np.frombuffer(b"0123456789abcdef" * 2, dtype=np.uint8)[None],
    }


def preparation() -> Preparation:
    return build_preparations([CONFIG], GRID, ENCODER, cameras=SURROUND_CAMERAS)["detection"]


def prepare(sample: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return preparation().prepare(sample, np.random.default_rng(0))


def clip_batch() -> Batch:
    preparations = build_preparations([CONFIG], GRID, ENCODER, cameras=SURROUND_CAMERAS)
    return surround_batch(preparations, [clip(CAR, WALKER), clip(seed=1)])


@pytest.fixture
def model() -> PretrainingModel:
    torch.manual_seed(0)
    return build_model(ENCODER, [CONFIG], GRID, cameras=SURROUND_CAMERAS).eval()


def objective_of(model: PretrainingModel) -> DetectionObjective:
    objective = model.objectives["detection"]
    assert isinstance(objective, DetectionObjective)
    return objective


def as_answer(maps: np.ndarray) -> torch.Tensor:
    """What a head that is sure of `maps` would say."""
    heat, regressed = torch.from_numpy(maps[:CLASSES]), torch.from_numpy(maps[CLASSES:]).nan_to_num()
    return torch.cat([torch.logit(heat.clamp(1e-6, 1 - 1e-6)), regressed])[None]


def test_maps_become_the_boxes_that_they_were_drawn_from() -> None:
    maps = draw_maps(boxed(CAR, WALKER), BEV)
    found = find_boxes(as_answer(maps), BEV, 2)[0].numpy()
    found = found[np.argsort(found[:, 9])]
    np.testing.assert_allclose(found[:, :10], np.nan_to_num(boxed(CAR, WALKER)[:, :10]), atol=1e-5)


def test_a_spot_is_one_at_its_centre_and_falls_off_over_two_cells() -> None:
    heat = draw_maps(boxed(CAR), BEV)[0]
    row, column = 16 - 3, 16 + 4  # y -2.6 lies in [-3, -2), x 4.3 in [4, 5)
    assert heat[row, column] == 1
    assert heat[row, column + 1] == pytest.approx(math.exp(-1 / (2 * (5 / 6) ** 2)))
    assert (heat > 0).sum() == 25
    assert not draw_maps(boxed(CAR), BEV)[1:CLASSES].any()


def test_spots_at_the_border_are_cut_and_overlapping_ones_keep_the_higher() -> None:
    corner = (*boxed(CAR)[0],)
    at_border, beside = (-15.9, 15.9, *corner[2:]), (-14.9, 15.9, *corner[2:])
    heat = draw_maps(boxed(at_border, beside), BEV)[0]
    assert heat[31, 0] == heat[31, 1] == 1
    assert (heat > 0).sum() == 3 * 4


def test_what_is_beyond_the_map_unseen_or_a_rack_is_not_learnt() -> None:
    outside, unseen, rack = (17.0, *CAR[1:]), (*CAR[:11], 0), (*CAR[:9], CLASSES, -1, 10)
    maps = draw_maps(boxed(outside, unseen, rack), BEV)
    assert not maps[:CLASSES].any() and np.isnan(maps[CLASSES:]).all()


def test_of_two_boxes_in_one_cell_the_nearest_to_its_centre_is_regressed() -> None:
    centred, aside = (4.5, -2.5, 1.0, *CAR[3:]), (4.1, -2.9, 2.0, *CAR[3:])
    for order in ((centred, aside), (aside, centred)):
        maps = draw_maps(boxed(*order), BEV)
        assert maps[CLASSES + 2, 13, 20] == 1.0
        assert np.isfinite(maps[CLASSES]).sum() == 1


def test_an_unknown_velocity_is_not_learnt_and_the_rest_of_the_box_is() -> None:
    regressed = draw_maps(boxed(WALKER), BEV)[CLASSES:]
    assert np.isfinite(regressed).sum(axis=(1, 2)).tolist() == [1] * 8 + [0] * 2


def test_pixels_of_the_level_frame_are_those_of_the_ego_frame() -> None:
    level_from_ego = turned(0.1, pitch=0.05, shift=(0.4, 0.0, 0.1))
    sample = clip(CAR, level_from_ego=level_from_ego)
    matrices = prepare(sample)["pix_from_level"]
    point = np.array([5.0, 2.0, 1.0, 1.0])
    np.testing.assert_allclose(matrices @ level_from_ego @ point, sample["pix_from_ego"][0] @ point, atol=1e-4)


def test_other_things_are_left_out_of_the_truth_and_the_nearest_boxes_come_first() -> None:
    tree = (*CAR[:9], -1, -1, 10)
    truth = prepare(clip(WALKER, tree, CAR))["truth"]
    np.testing.assert_allclose(truth[:2], boxed(CAR, WALKER), rtol=1e-5)
    assert np.isnan(truth[2:]).all()


def test_shapes_are_the_same_with_many_boxes_and_none() -> None:
    many, none = prepare(clip(*[CAR] * 500)), prepare(clip())
    assert {name: values.shape for name, values in many.items()} == {name: values.shape for name, values in none.items()}
    assert np.isnan(none["truth"]).all() and not none["maps"][:CLASSES].any()


def test_preparing_is_a_function_of_its_stream_and_survives_pickling() -> None:
    dropping = ENCODER.model_copy(update={"drop_path": 0.1})
    made = build_preparations([CONFIG], GRID, dropping, cameras=SURROUND_CAMERAS)["detection"]
    assert isinstance(made, Preparation)
    first, second = (one.prepare(clip(CAR), np.random.default_rng(3)) for one in (made, pickle.loads(pickle.dumps(made))))
    assert first["drop_path"].shape == (1, SURROUND_CAMERAS, 12, 2)
    for name, values in first.items():
        np.testing.assert_array_equal(values, second[name])


def test_the_focal_loss_by_hand() -> None:
    heat = torch.tensor([[[[1.0, 0.5, 0.0]]]])
    logits = torch.logit(torch.tensor([[[[0.8, 0.4, 0.1]]]]))
    centre = 0.2**2 * math.log(0.8)
    elsewhere = 0.5**4 * 0.4**2 * math.log(0.6) + 0.1**2 * math.log(0.9)
    assert focal_loss(logits, heat).item() == pytest.approx(-(centre + elsewhere), rel=1e-5)


def test_boxes_cost_a_quarter_of_their_errors_and_velocities_a_fifth_of_that(model: PretrainingModel) -> None:
    truth = torch.from_numpy(draw_maps(boxed(CAR, WALKER), BEV))[None]
    right = as_answer(truth[0].numpy())
    measure = objective_of(model).measure
    wrong = right.clone()
    wrong[:, CLASSES + 2] += 3.0  # heights of both boxes
    wrong[:, CLASSES + 8] += 2.0  # the one velocity that is known
    assert (measure(wrong, truth) - measure(right, truth)).item() == pytest.approx(0.25 * (3.0 + 0.2 * 2.0), rel=1e-5)


def test_a_sample_without_boxes_costs_its_heat_alone(model: PretrainingModel) -> None:
    truth = torch.from_numpy(draw_maps(boxed(), BEV))[None]
    quiet, loud = as_answer(truth[0].numpy()), as_answer(truth[0].numpy())
    loud[:, :CLASSES] = 1.0
    measure = objective_of(model).measure
    assert measure(quiet, truth).item() < 1e-3 < measure(loud, truth).item()


def test_predictions_are_as_many_as_asked_for_and_finite(model: PretrainingModel) -> None:
    predicted = model(clip_batch(), "predict")["detection"]
    assert predicted.shape == (2, CONFIG.boxes, 11) and predicted.isfinite().all()
    assert (predicted[..., 9] < CLASSES).all()


def test_a_camera_changes_boxes_only_where_it_looks(model: PretrainingModel) -> None:
    batch = clip_batch()
    images = batch.shared["images"].clone()
    images[:, :, 0] = 255 - images[:, :, 0]
    changed = Batch(dict(batch.shared) | {"images": images}, batch.prepared, batch.clips)
    lift, seen = objective_of(model).lift, []
    hook = lift.fold.register_forward_hook(lambda _, __, folded: seen.append(folded))
    for one in (batch, changed):
        model(one, "predict")
    hook.remove()
    differs = (seen[0] != seen[1]).any(1)[0]  # Y X; camera 0 looks along x, 120 degrees wide
    assert differs[:, 20:].any() and not differs[:, :14].any()


def test_the_mean_of_the_evaluated_losses_is_the_training_loss(model: PretrainingModel) -> None:
    batch = clip_batch()
    figures = model(batch, "evaluate")
    assert figures.keys() == {"detection/loss"}
    torch.testing.assert_close(figures["detection/loss"].mean(), model(batch, "train").total)


def test_every_parameter_learns() -> None:
    model = build_model(ENCODER, [CONFIG], GRID, cameras=SURROUND_CAMERAS)
    model(clip_batch(), "train").total.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_pictures_show_predicted_and_true_boxes_on_images_and_from_above(model: PretrainingModel) -> None:
    drawn = model(clip_batch(), "draw")["detection"]
    assert list(drawn) == ["predicted boxes", "predicted, from above", "true boxes", "true, from above"]
    for column in drawn.values():
        assert column.shape[:3] == (2, 1, 3)
        assert column.min() >= 0 and column.max() <= 1
    one, none = drawn["true, from above"][:, 0]
    is_coloured = one.amax(0) > one.amin(0)  # heat and the car itself are grey
    assert is_coloured[:200].any()  # the car ahead is in the upper half
    assert torch.equal(none.amax(0), none.amin(0))
