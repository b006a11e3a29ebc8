"""Relative pose: the loss by its definition, mirrored pairs, and that the second view is looked at."""

import math

import numpy as np
import pytest
import torch

from models.batch import Batch
from models.config import EncoderConfig, Grid, PoseConfig
from models.objectives.pose import PoseObjective, PosePreparation
from models.pretraining import PretrainingModel, build_model
from tests.models.samples import PATCH_PX, random_batch

ENCODER = EncoderConfig(size="tiny", patch_px=PATCH_PX)
GRID = Grid(1, 1, 2, 3)


def turn_about_y(degrees: float) -> np.ndarray:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])


def motion(degrees: float, translation_m: tuple[float, float, float]) -> np.ndarray:
    moved = np.eye(4)
    moved[:3, :3], moved[:3, 3] = turn_about_y(degrees), translation_m
    return moved


def pair_batch() -> Batch:
    batch = random_batch(ENCODER, GRID)
    truth = np.stack([motion(degrees, (0.1, 0.0, 2.0)) for degrees in (0.0, 5.0, -5.0)]).astype(np.float32)
    return Batch(batch.shared, {"pose": {"truth": torch.from_numpy(truth)}}, batch.clips)


@pytest.fixture
def model() -> PretrainingModel:
    torch.manual_seed(0)
    return build_model(ENCODER, [PoseConfig()], GRID).eval()


def test_the_loss_is_metres_and_weighted_rotation(model: PretrainingModel) -> None:
    objective = model.objectives["pose"]
    assert isinstance(objective, PoseObjective)
    truth, predicted = motion(0, (0, 0, 2)), motion(90, (0, 3, 6))
    loss = objective.measure(*(torch.from_numpy(one[None]).float() for one in (predicted, truth)))
    # |(0, 3, 4)| and |R - 1|_F of a quarter turn: two diagonal and two other entries of size 1
    assert loss.item() == pytest.approx(5 + 3 * 2)


def test_a_mirrored_pair_has_the_mirrored_motion() -> None:
    seen, mirrored = (
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
    np.testing.assert_allclose(mirrored, motion(-10, (-0.5, 0.1, 3)), rtol=1e-5, atol=1e-7)


def test_the_answer_depends_on_both_views_and_on_their_order(model: PretrainingModel) -> None:
    batch = pair_batch()
    answer = model(batch, "predict")["pose"]
    assert answer.shape == (3, 4, 4)
    shared = dict(batch.shared)
    for view, other in (("target", "reference"), ("reference", "target")):
        replaced = shared | {f"{view}_images": shared[f"{other}_images"]}
        assert not torch.allclose(model(Batch(replaced, batch.prepared, batch.clips), "predict")["pose"], answer)


def test_every_parameter_learns_and_the_losses_agree(model: PretrainingModel) -> None:
    batch = pair_batch()
    total = model(batch, "train").total
    torch.testing.assert_close(model(batch, "evaluate")["pose/loss"].mean(), total)
    total.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_pictures_show_both_views(model: PretrainingModel) -> None:
    drawn = model(pair_batch(), "draw")["pose"]
    assert {title: column.shape for title, column in drawn.items()} == dict.fromkeys(("target", "reference"), (3, 1, 3, 8, 12))
