"""Monocular depth: which points count, the loss by its definition, and that an image is on its own."""

import math
import pickle

import numpy as np
import pytest
import torch

from models.batch import Batch
from models.config import DepthConfig, EncoderConfig, Grid
from models.objectives.base import Preparation
from models.objectives.depth import DepthObjective, DepthPreparation
from models.pretraining import PretrainingModel, build_model, build_preparations
from tests.models.samples import PATCH_PX, SURROUND_CAMERAS, surround_batch, surround_sample

ENCODER = EncoderConfig(size="tiny", patch_px=PATCH_PX)
GRID = Grid(1, 1, 2, 3)
CONFIG = DepthConfig(head_width=8, points=16)
WIDTH, HEIGHT = 12, 8
STRAIGHT = np.array([[4.0, 0, 6, 0], [0, 4, 4, 0], [0, 0, 1, 0]], dtype=np.float32)
"""A camera at the LiDAR that looks along z: a point (x, y, z) falls on (4 x / z + 6, 4 y / z + 4)."""


def prepare(points: list[tuple[float, float, float]], config: DepthConfig = CONFIG) -> dict[str, np.ndarray]:
    sample = {
        "images": np.zeros((1, 1, 3, HEIGHT, WIDTH), dtype=np.uint8),
        "points_lidar": np.array([(*point, 1.0) for point in points], dtype=np.float32).reshape(-1, 4),
        "first_point": np.array([0, len(points)]),
        "pix_from_lidar": STRAIGHT[None, None],
    }
    return DepthPreparation(config, (WIDTH, HEIGHT), 0).prepare(sample, np.random.default_rng(0))


def clip_batch(seeds: tuple[int, ...] = (0, 1)) -> Batch:
    preparations = build_preparations([CONFIG], GRID, ENCODER, cameras=SURROUND_CAMERAS)
    samples = [surround_sample(GRID, tubelet_frames=1, seed=seed) for seed in seeds]
    return surround_batch(preparations, samples)


@pytest.fixture
def model() -> PretrainingModel:
    torch.manual_seed(0)
    return build_model(ENCODER, [CONFIG], GRID, cameras=SURROUND_CAMERAS).eval()


def objective_of(model: PretrainingModel) -> DepthObjective:
    objective = model.objectives["depth"]
    assert isinstance(objective, DepthObjective)
    return objective


def test_points_in_range_and_in_the_picture_are_kept_at_their_pixels() -> None:
    inside, left, right = (1.0, 0.5, 4.0), (-7.0, 0.0, 4.0), (7.0, 0.0, 4.0)
    behind, near, far = (0.0, 0.0, -4.0), (0.0, 0.0, 0.5), (0.0, 0.0, 81.0)
    prepared = prepare([left, inside, right, behind, near, far])
    known = np.isfinite(prepared["truth"])
    assert known.sum() == 1
    assert prepared["truth"][known] == 4.0
    assert prepared["pixel"][known] == 4 * WIDTH + 7  # (4 * 1 / 4 + 6, 4 * 0.5 / 4 + 4) = (7, 4.5)


def test_of_points_on_one_pixel_the_nearest_counts() -> None:
    prepared = prepare([(0.0, 0.0, 40.0), (0.0, 0.0, 10.0), (0.0, 0.0, 20.0)])
    known = np.isfinite(prepared["truth"])
    assert prepared["truth"][known].tolist() == [10.0]


def test_shapes_are_the_same_with_many_points_few_and_none() -> None:
    config = CONFIG.model_copy(update={"points": 3})
    many = prepare([(0.25 * place, 0.0, 1.5) for place in range(-6, 6)], config)
    none = prepare([], config)
    assert many["truth"].shape == none["truth"].shape == (1, 1, 3)
    assert np.isfinite(many["truth"]).all() and not np.isfinite(none["truth"]).any()


def test_preparing_is_a_function_of_its_stream_and_survives_pickling() -> None:
    dropping = ENCODER.model_copy(update={"drop_path": 0.1})
    preparation = build_preparations([CONFIG], GRID, dropping, cameras=SURROUND_CAMERAS)["depth"]
    assert isinstance(preparation, Preparation)
    sample = surround_sample(GRID, tubelet_frames=1)
    again = pickle.loads(pickle.dumps(preparation))
    first, second = (one.prepare(sample, np.random.default_rng(3)) for one in (preparation, again))
    assert first.keys() == {"pixel", "truth", "drop_path"}
    for name, values in first.items():
        np.testing.assert_array_equal(values, second[name])


def test_the_loss_is_the_scale_invariant_one(model: PretrainingModel) -> None:
    truth = torch.tensor([[[[2.0, 4.0, math.nan], [math.nan, math.nan, math.nan]]]])  # two cameras, one without points
    predicted = torch.tensor([[[[4.0, 4.0, 9.0], [9.0, 9.0, 9.0]]]])
    g = math.log(2)  # of the first point; the second is right
    of_first_camera = g**2 / 2 - 0.5 * (g / 2) ** 2
    assert objective_of(model).measure(predicted, truth).item() == pytest.approx(of_first_camera / 2)


def test_the_right_depth_costs_nothing_and_a_wrong_scale_half(model: PretrainingModel) -> None:
    truth = torch.rand(2, 1, 3, 16) * 50 + 2
    assert objective_of(model).measure(truth, truth).abs().max() < 1e-6
    scaled = objective_of(model).measure(2 * truth, truth)
    torch.testing.assert_close(scaled, torch.full((2,), 0.5 * math.log(2) ** 2))


def test_predictions_lie_one_to_one_with_the_truth_and_within_range(model: PretrainingModel) -> None:
    batch = clip_batch()
    predicted = model(batch, "predict")["depth"]
    assert predicted.shape == batch.prepared["depth"]["truth"].shape == (2, 1, SURROUND_CAMERAS, CONFIG.points)
    assert predicted.min() > CONFIG.near_m and predicted.max() < CONFIG.far_m


def test_one_image_of_a_clip_does_not_see_the_others(model: PretrainingModel) -> None:
    batch = clip_batch()
    images = batch.shared["images"].clone()
    images[:, :, 1] = 255 - images[:, :, 1]
    changed = Batch(dict(batch.shared) | {"images": images}, batch.prepared, batch.clips)
    before, after = (model(one, "predict")["depth"] for one in (batch, changed))
    torch.testing.assert_close(before[:, :, [0, 2]], after[:, :, [0, 2]])
    assert not torch.allclose(before[:, :, 1], after[:, :, 1])


def test_the_mean_of_the_evaluated_losses_is_the_training_loss(model: PretrainingModel) -> None:
    batch = clip_batch()
    figures = model(batch, "evaluate")
    assert figures.keys() == {"depth/loss"}
    torch.testing.assert_close(figures["depth/loss"].mean(), model(batch, "train").total)


def test_every_parameter_learns() -> None:
    model = build_model(ENCODER, [CONFIG], GRID, cameras=SURROUND_CAMERAS)
    model(clip_batch(), "train").total.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_pictures_show_all_cameras_of_a_clip_and_its_points(model: PretrainingModel) -> None:
    batch = clip_batch()
    drawn = model(batch, "draw")["depth"]
    assert list(drawn) == ["image", "predicted depth", "true depth, LiDAR"]
    for column in drawn.values():
        assert column.shape == (2, 1, 3, HEIGHT, SURROUND_CAMERAS * WIDTH)
        assert column.min() >= 0 and column.max() <= 1
