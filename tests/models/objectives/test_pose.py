"""Relative pose: the loss by its definition, mirrored pairs, and that the second view is looked at."""

import math

import numpy as np
import pytest
import torch

from models.batch import Batch
from models.config import EncoderConfig, Grid, PoseConfig
from models.objectives.pose import _COLOURS, _DRAWN_M, _REACH_M, PoseObjective, PosePreparation, paint_motions
from models.pretraining import PretrainingModel, build_model
from tests.models.samples import PATCH_PX, random_batch

ENCODER = EncoderConfig(size="tiny", patch_px=PATCH_PX)
GRID = Grid(1, 1, 2, 3)
_VIEWS = (("target", "reference"), ("reference", "target"))


def turn_about_y(degrees: float) -> np.ndarray:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])


def motion(degrees: float, translation_m: tuple[float, float, float]) -> np.ndarray:
    moved = np.eye(4)
    moved[:3, :3], moved[:3, 3] = turn_about_y(degrees), translation_m
    return moved


def pair_batch() -> Batch:
    batch = random_batch(ENCODER, GRID)
    there = np.stack([motion(degrees, (0.1, 0.0, 2.0)) for degrees in (0.0, 5.0, -5.0)])
    truth = np.stack([there, np.linalg.inv(there)], axis=1).astype(np.float32)
    return Batch(batch.shared, {"pose": {"truth": torch.from_numpy(truth)}}, batch.clips)


@pytest.fixture
def model() -> PretrainingModel:
    torch.manual_seed(0)
    return build_model(ENCODER, [PoseConfig()], GRID).eval()


def test_the_loss_is_metres_and_weighted_rotation(model: PretrainingModel) -> None:
    objective = model.objectives["pose"]
    assert isinstance(objective, PoseObjective)
    truth = np.stack([motion(0, (0, 0, 2)), motion(0, (0, 0, -2))])
    predicted = np.stack([motion(90, (0, 3, 6)), motion(0, (0, 0, -2))])
    loss = objective.measure(*(torch.from_numpy(one[None]).float() for one in (predicted, truth)))
    # there |(0, 3, 4)| and |R - 1|_F of a quarter turn, two diagonal and two other entries of size 1; back nothing
    assert loss.item() == pytest.approx((5 + 3 * 2) / 2)


def test_a_mirrored_pair_has_the_mirrored_motion_and_the_way_back_undoes_it() -> None:
    (seen, back), (mirrored, _) = (
        PosePreparation(0).prepare(
            {
                "reference_from_target": motion(10, (0.5, 0.1, 3)).astype(np.float32),
                "target_pix_from_cam": np.diag([focal, 30.0, 1.0]).astype(np.float32)[None, None],
            },
            np.random.default_rng(0),
        )["truth"]
        for focal in (30.0, -30.0)
    )
    np.testing.assert_allclose(seen, motion(10, (0.5, 0.1, 3)), rtol=1e-6)
    np.testing.assert_allclose(back @ seen, np.eye(4), atol=1e-6)
    np.testing.assert_allclose(mirrored, motion(-10, (-0.5, 0.1, 3)), rtol=1e-5, atol=1e-7)


def test_the_answer_depends_on_both_views_and_turns_round_with_them(model: PretrainingModel) -> None:
    batch = pair_batch()
    answer = model(batch, "predict")["pose"]
    assert answer.shape == (3, 2, 4, 4)
    shared = dict(batch.shared)
    swapped = {f"{view}_{what}": shared[f"{other}_{what}"] for view, other in _VIEWS for what in ("images", "colours")}
    turned = model(Batch(shared | swapped, batch.prepared, batch.clips), "predict")["pose"]
    torch.testing.assert_close(turned, answer.flip(1))
    assert not torch.allclose(turned, answer)
    for view, other in _VIEWS:
        replaced = shared | {f"{view}_images": shared[f"{other}_images"]}
        assert not torch.allclose(model(Batch(replaced, batch.prepared, batch.clips), "predict")["pose"], answer)


def test_every_parameter_learns_and_the_losses_agree(model: PretrainingModel) -> None:
    batch = pair_batch()
    total = model(batch, "train").total
    torch.testing.assert_close(model(batch, "evaluate")["pose/loss"].mean(), total)
    total.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_pictures_show_both_views_and_the_motion(model: PretrainingModel) -> None:
    drawn = model(pair_batch(), "draw")["pose"]
    views = {title: drawn.pop(title).shape for title in ("target", "reference")}
    assert views == dict.fromkeys(("target", "reference"), (3, 1, 3, 8, 12))
    (motions,) = drawn.values()
    assert motions.shape[:3] == (3, 1, 3)


@pytest.mark.parametrize(("length_m", "right", "ahead"), [(0.5, 0, 1), (12.0, 0, -1), (3.0, 1, 0)])
def test_a_motion_is_drawn_from_above_as_long_whatever_it_is(length_m: float, right: int, ahead: int) -> None:
    true, astray = torch.eye(4), torch.eye(4)
    true[:3, 3] = length_m * torch.tensor([float(right), 0.0, float(ahead)])
    astray[:3, 3] = -100 * true[:3, 3]  # the other way, and out of the picture
    picture = paint_motions(true, astray)
    middle = picture.shape[-1] / 2
    for colour, length, sign in zip(torch.tensor(_COLOURS), (_DRAWN_M, _REACH_M), (1, -1), strict=True):
        rows, columns = (picture == colour[:, None, None]).all(0).nonzero().T
        reach = middle * length / _REACH_M
        tip_row, tip_column = middle - sign * ahead * reach, middle + sign * right * reach
        assert torch.hypot(rows - tip_row, columns - tip_column).min() < 2
        assert torch.hypot(rows - middle, columns - middle).max() < reach + 2
