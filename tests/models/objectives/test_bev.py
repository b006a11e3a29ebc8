"""Segmentation from above: what is true, the loss by its definition, and that a map follows the cameras."""

import math

import numpy as np
import pytest
import torch

from models.batch import Batch
from models.config import BevConfig, EncoderConfig, Grid, LiftConfig
from models.objectives.bev import BevObjective, BevPreparation
from models.pretraining import PretrainingModel, build_model, build_preparations
from tests.models.samples import PATCH_PX, SURROUND_CAMERAS, surround_batch, surround_sample

ENCODER = EncoderConfig(size="tiny", patch_px=PATCH_PX)
GRID = Grid(1, 1, 2, 3)
CONFIG = BevConfig(lift=LiftConfig(range_m=16, cell_m=2, far_m=17, depth_bins=8, channels=8, width=16), cell_m=1)
CELLS = 32
CAR = (4.4, 3.0, 0.8, 4.0, 2.0, 1.5, 0.0, math.nan, math.nan)
PERSON = (-5.0, 0.0, 0.8, 2.0, 2.0, 1.5, 0.0, 0.0, 0.0)


def annotated_sample(seed: int = 0) -> dict[str, np.ndarray]:
    """A car, a person, and a street 6 m wide along x."""
    street = np.array([[-40, -3], [40, -3], [40, 3], [-40, 3]], dtype=np.float32)
    return {
        **surround_sample(GRID, tubelet_frames=1, seed=seed),
        "boxes_ego": np.array([CAR, PERSON], dtype=np.float32),
        "box_is_vehicle": np.array([True, False]),
        "drivable_edges": np.stack([street, np.roll(street, -1, axis=0)], axis=1),
    }


def clip_batch(seeds: tuple[int, ...] = (0, 1)) -> Batch:
    preparations = build_preparations([CONFIG], GRID, ENCODER, cameras=SURROUND_CAMERAS)
    return surround_batch(preparations, [annotated_sample(seed) for seed in seeds])


@pytest.fixture
def model() -> PretrainingModel:
    torch.manual_seed(0)
    return build_model(ENCODER, [CONFIG], GRID, cameras=SURROUND_CAMERAS).eval()


def test_vehicles_and_the_drivable_area_are_true_and_people_are_not() -> None:
    prepared = BevPreparation(CONFIG, 0).prepare(annotated_sample(), np.random.default_rng(0))
    vehicle, drivable = prepared["truth"]
    expected = np.zeros((CELLS, CELLS))
    expected[18:20, 18:22] = 1  # from 2 to 4 m along y and from 2.4 to 6.4 m along x, counted in metres from -16
    np.testing.assert_array_equal(vehicle, expected)
    assert drivable[13:19].all() and drivable.sum() == 6 * CELLS


def test_a_sample_without_boxes_has_no_vehicle_and_drop_path_has_its_numbers() -> None:
    sample = annotated_sample() | {"boxes_ego": np.empty((0, 9), np.float32), "box_is_vehicle": np.empty(0, bool)}
    prepared = BevPreparation(CONFIG, 12).prepare(sample, np.random.default_rng(0))
    assert prepared["truth"][0].sum() == 0
    assert prepared["drop_path"].shape == (1, SURROUND_CAMERAS, 12, 2)


def test_the_loss_is_the_cross_entropy_in_which_vehicle_cells_weigh_more(model: PretrainingModel) -> None:
    objective = model.objectives["bev"]
    assert isinstance(objective, BevObjective)
    truth = torch.zeros(2, 2, 4, 4)
    truth[0, 0, 0, 0] = truth[1, 1, 0, 0] = 1
    # every logit is zero, so every cell costs log 2, that of the vehicle 2.13 times
    expected = math.log(2) * torch.tensor([(31 + 2.13) / 32, 1.0])
    torch.testing.assert_close(objective.measure(torch.zeros_like(truth), truth), expected)
    assert objective.measure(40 * truth - 20, truth).max() < 1e-6


def test_predictions_lie_one_to_one_with_the_truth_and_follow_the_images(model: PretrainingModel) -> None:
    batch = clip_batch()
    predicted = model(batch, "predict")["bev"]
    assert predicted.shape == batch.prepared["bev"]["truth"].shape == (2, 2, CELLS, CELLS)
    changed = Batch(dict(batch.shared) | {"images": 255 - batch.shared["images"]}, batch.prepared, batch.clips)
    assert not torch.allclose(predicted, model(changed, "predict")["bev"])


def test_the_mean_of_the_evaluated_losses_is_the_training_loss(model: PretrainingModel) -> None:
    batch = clip_batch()
    figures = model(batch, "evaluate")
    assert figures.keys() == {"bev/loss"}
    torch.testing.assert_close(figures["bev/loss"].mean(), model(batch, "train").total)


def test_every_parameter_learns() -> None:
    torch.manual_seed(0)
    model = build_model(ENCODER, [CONFIG], GRID, cameras=SURROUND_CAMERAS)
    model(clip_batch(), "train").total.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_pictures_show_the_cameras_and_both_maps_with_the_car_driving_up(model: PretrainingModel) -> None:
    drawn = model(clip_batch(), "draw")["bev"]
    assert list(drawn) == ["cameras", "predicted", "true"]
    true = drawn["true"][0, 0]
    assert true.shape == (3, CELLS, CELLS) and all(column.min() >= 0 and column.max() <= 1 for column in drawn.values())
    # the car stands 4.4 m ahead and 3 m to the left: up and left of the middle, redder than the street, which runs up and down
    red, _, blue = true[:, CELLS // 2 - 5, CELLS // 2 - 4]
    assert red > 2 * blue
    assert (true[:, 0, 14:18] < 0.8).all() and (true[:, 0, 0] == 1).all()
