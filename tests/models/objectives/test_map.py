"""Lines of the map: what is true, equal orders of points, matching, and a loss that finds them."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from models.batch import Batch
from models.config import EncoderConfig, Grid, MapConfig, PatchLiftConfig
from models.objectives.map import MapObjective, MapPreparation, focal_loss, list_orders
from models.pretraining import PretrainingModel, build_model, build_preparations
from tests.models.samples import PATCH_PX, SURROUND_CAMERAS, surround_batch, surround_sample

ENCODER = EncoderConfig(size="tiny", patch_px=PATCH_PX)
GRID = Grid(1, 1, 2, 3)
LIFT = PatchLiftConfig(cell_m=3, far_m=31, depth_bins=8, channels=8, width=16)
CONFIG = MapConfig(lift=LIFT, queries=6, points=5)
DIVIDER, CROSSING, BOUNDARY = np.eye(3)


def annotated_sample(seed: int = 0) -> dict[str, np.ndarray]:
    """A divider straight ahead of 8 m, and a crossing that is a square of 4 m."""
    points = [(0, 1), (8, 1), (10, -2), (14, -2), (14, 2), (10, 2), (10, -2)]
    return {
        **surround_sample(GRID, tubelet_frames=1, seed=seed),
        "line_points": np.array(points, dtype=np.float32),
        "first_line_point": np.array([0, 2, 7]),
        "line_class": np.array([0, 1]),
    }


def clip_batch(seeds: tuple[int, ...] = (0, 1)) -> Batch:
    preparations = build_preparations([CONFIG], GRID, ENCODER, cameras=SURROUND_CAMERAS)
    return surround_batch(preparations, [annotated_sample(seed) for seed in seeds])


@pytest.fixture
def model() -> PretrainingModel:
    torch.manual_seed(0)
    return build_model(ENCODER, [CONFIG], GRID, cameras=SURROUND_CAMERAS).eval()


def objective_of(model: PretrainingModel) -> MapObjective:
    objective = model.objectives["map"]
    assert isinstance(objective, MapObjective)
    return objective


def test_lines_are_points_at_even_steps_the_longest_first() -> None:
    truth = MapPreparation(CONFIG, 0).prepare(annotated_sample(), np.random.default_rng(0))["truth"]
    assert truth.shape == (128, 3 + 2 * 5) and np.isnan(truth[2:]).all()
    np.testing.assert_array_equal(truth[0], [*CROSSING, 10, -2, 14, -2, 14, 2, 10, 2, 10, -2])
    np.testing.assert_array_equal(truth[1], [*DIVIDER, 0, 1, 2, 1, 4, 1, 6, 1, 8, 1])


def test_what_is_true_does_not_depend_on_how_many_lines_a_head_can_find() -> None:
    few = CONFIG.model_copy(update={"queries": 1})
    truths = [MapPreparation(one, 0).prepare(annotated_sample(), np.random.default_rng(0))["truth"] for one in (few, CONFIG)]
    np.testing.assert_array_equal(*truths)


def test_of_too_many_lines_the_longest_stay_and_a_place_without_lines_has_none() -> None:
    length = np.arange(130, dtype=np.float32) / 10
    many = {
        "line_points": np.stack([np.zeros(260, np.float32), np.stack([0 * length, length], axis=1).reshape(-1)], axis=1),
        "first_line_point": np.arange(0, 261, 2),
        "line_class": np.zeros(130, np.int64),
    }
    truth = MapPreparation(CONFIG, 12).prepare(annotated_sample() | many, np.random.default_rng(0))["truth"]
    np.testing.assert_allclose(truth[:, -1], length[:1:-1])  # the end of each line, the two shortest left out
    nothing = {
        "line_points": np.empty((0, 2), np.float32),
        "first_line_point": np.array([0]),
        "line_class": np.empty(0, np.int64),
    }
    empty = MapPreparation(CONFIG, 0).prepare(annotated_sample() | nothing, np.random.default_rng(0))["truth"]
    assert np.isnan(empty).all()


def test_a_line_is_the_same_from_both_ends_and_a_ring_from_every_point() -> None:
    ring = torch.tensor([(0.0, 0), (1, 0), (1, 1), (0, 1), (0, 0)])
    line = torch.tensor([(0.0, 0), (1, 0), (2, 0), (3, 0), (4, 0)])
    orders = list_orders(torch.stack([ring, line]))
    of_ring = {tuple(map(tuple, order.tolist())) for order in orders[0]}
    corners = [(0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0)]
    turned = [corners[k:] + corners[:k] for k in range(4)]
    assert of_ring == {(*way, way[0]) for one in turned for way in (one, one[::-1])}
    assert {tuple(map(tuple, order.tolist())) for order in orders[1]} == {
        tuple(map(tuple, way.tolist())) for way in (line, line.flip(0))
    }


def test_the_truth_in_any_order_of_lines_and_points_costs_nothing(model: PretrainingModel) -> None:
    objective, truth = objective_of(model), clip_batch((0,)).prepared["map"]["truth"]
    lines = truth[0, :2].clone()
    answer = torch.zeros(1, 6, 13)
    answer[..., :3] = -20
    answer[0, 5] = torch.cat([40 * lines[0, :3] - 20, lines[0, 3:].view(5, 2).flip(0).flatten()])
    answer[0, 2] = torch.cat([40 * lines[1, :3] - 20, lines[1, 3:].view(5, 2).flip(0).flatten()])
    assert objective.measure(answer, truth).item() < 1e-6
    moved = answer.clone()
    moved[0, 2, 4::2] += 3  # 3 m of 15 m for the y of one of two lines: 10 * mean(0, 0.2) / 2
    torch.testing.assert_close(objective.measure(moved, truth), torch.tensor([10 * 0.1 / 2]))


def test_where_nothing_is_only_sure_answers_cost(model: PretrainingModel) -> None:
    objective, nothing = objective_of(model), torch.full((1, 6, 13), torch.nan)
    answer = torch.zeros(1, 6, 13)
    assert objective.measure(answer, nothing).item() == pytest.approx(18 * 0.75 * 0.25 * np.log(2), rel=1e-5)
    torch.testing.assert_close(focal_loss(answer[0, :, :3], torch.zeros(6, 3)), objective.measure(answer, nothing)[0])


def test_every_parameter_has_a_gradient_even_where_nothing_is() -> None:
    model = build_model(ENCODER, [CONFIG], GRID, cameras=SURROUND_CAMERAS)
    batch = clip_batch()
    batch.prepared["map"]["truth"].fill_(torch.nan)
    model(batch, "train").total.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_predictions_lie_one_to_one_with_the_truth_and_within_the_patch(model: PretrainingModel) -> None:
    batch = clip_batch()
    predicted = model(batch, "predict")["map"]
    assert predicted.shape == (len(batch), CONFIG.queries, batch.prepared["map"]["truth"].shape[-1])
    points = predicted[..., 3:].unflatten(-1, (-1, 2))
    assert points[..., 0].abs().max() <= 30 and points[..., 1].abs().max() <= 15


def test_the_mean_of_the_evaluated_losses_is_the_training_loss_and_every_parameter_learns(model: PretrainingModel) -> None:
    batch = clip_batch()
    figures = model(batch, "evaluate")
    assert figures.keys() == {"map/loss"}
    total = model(batch, "train").total
    torch.testing.assert_close(figures["map/loss"].mean(), total)
    total.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_pictures_show_the_cameras_and_the_lines_with_the_car_driving_up(model: PretrainingModel) -> None:
    drawn = model(clip_batch(), "draw")["map"]
    assert list(drawn) == ["cameras", "predicted", "true"]
    true = drawn["true"][0, 0]
    assert true.shape == (3, 300, 150)
    red, _, blue = true[:, 150 - 4 * 5, 75 - 5]  # 4 m ahead and 1 m to the left: the divider
    assert red > 0.8 and blue < 0.2
    assert (true[:, 0] == 1).all()


def test_a_lift_that_ends_within_the_patch_is_refused() -> None:
    with pytest.raises(ValidationError, match="range_m"):
        MapConfig(lift=PatchLiftConfig(range_m=20))


@pytest.mark.parametrize("cell_m", [4, 20, 60])
def test_cells_that_do_not_hold_the_patch_are_refused(cell_m: float) -> None:
    with pytest.raises(ValidationError, match=rf"lift.cell_m {cell_m}\.0 cuts the patch of 60 m x 30 m into"):
        MapConfig(lift=PatchLiftConfig(cell_m=cell_m))


def test_cells_that_leave_over_a_part_of_the_patch_take_a_little_more_of_it() -> None:
    assert MapConfig(lift=PatchLiftConfig(cell_m=2)).patch_cells == (16, 30)  # 32 m of 30 m
