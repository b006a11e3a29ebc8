"""Optical flow: what of the truth counts, the loss by its definition, and that the next image is looked at."""

import numpy as np
import pytest
import torch

from models.batch import Batch
from models.config import EncoderConfig, FlowConfig, Grid
from models.objectives.flow import FlowObjective, FlowPreparation
from models.pretraining import PretrainingModel, build_model
from tests.models.samples import PATCH_PX

ENCODER = EncoderConfig(size="tiny", patch_px=PATCH_PX)
GRID = Grid(1, 1, 2, 3)
HEIGHT, WIDTH = 8, 12


def flow_batch() -> Batch:
    rng = np.random.default_rng(0)
    shared = {
        "consecutive_images": torch.from_numpy(rng.integers(0, 256, (2, 2, 1, 3, HEIGHT, WIDTH), dtype=np.uint8)),
        "consecutive_colours": torch.ones(2, 3),
    }
    truth = torch.from_numpy(rng.normal(size=(2, 2, HEIGHT, WIDTH, 2)).astype(np.float32))
    truth[0, :, :2] = float("nan")
    return Batch(shared, {"flow": {"truth": truth}}, ("clip 0", "clip 1"))


@pytest.fixture
def model() -> PretrainingModel:
    torch.manual_seed(0)
    return build_model(ENCODER, [FlowConfig(head_width=8)], GRID).eval()


def test_the_loss_is_the_mean_end_point_error_of_known_pixels(model: PretrainingModel) -> None:
    objective = model.objectives["flow"]
    assert isinstance(objective, FlowObjective)
    truth = torch.zeros(2, 2, 2, 2, 2)
    truth[0, 0] = float("nan")
    predicted = torch.zeros(2, 2, 2, 2, 2)
    predicted[..., 0], predicted[:, 1, ..., 1] = 3.0, 4.0
    # first sample: the way back alone, |(3, 4)|; second: half of it |(3, 0)|, half |(3, 4)|
    torch.testing.assert_close(objective.measure(predicted, truth), torch.tensor([5.0, 4.0]))


def test_flow_beyond_the_size_of_the_picture_is_not_known() -> None:
    flow_px = np.zeros((2, HEIGHT, WIDTH, 2), dtype=np.float16)
    flow_px[0, 0, 0], flow_px[0, 0, 1], flow_px[0, 0, 2] = (11.0, 0.0), (9.0, 9.0), (np.nan, 0.0)
    truth = FlowPreparation(0).prepare({"flow_px": flow_px}, np.random.default_rng(0))["truth"]
    assert truth.dtype == np.float32
    assert np.isfinite(truth).all(-1)[0, 0, :4].tolist() == [True, False, False, True]  # 9 * sqrt(2) > 12


def test_a_fresh_head_stays_within_the_picture_looks_at_both_images_and_turns_round_with_them(model: PretrainingModel) -> None:
    batch = flow_batch()
    answer = model(batch, "predict")["flow"]
    assert answer.shape == batch.prepared["flow"]["truth"].shape
    assert answer.abs().max() < WIDTH
    images = batch.shared["consecutive_images"]
    for place in range(2):
        changed = images.clone()
        changed[:, place] = 255 - changed[:, place]
        replaced = Batch(dict(batch.shared) | {"consecutive_images": changed}, batch.prepared, batch.clips)
        assert not torch.allclose(model(replaced, "predict")["flow"], answer, atol=1e-6)
    turned = Batch(dict(batch.shared) | {"consecutive_images": images.flip(1)}, batch.prepared, batch.clips)
    torch.testing.assert_close(model(turned, "predict")["flow"], answer.flip(1))


def test_every_parameter_learns_and_the_losses_agree(model: PretrainingModel) -> None:
    batch = flow_batch()
    total = model(batch, "train").total
    torch.testing.assert_close(model(batch, "evaluate")["flow/loss"].mean(), total)
    total.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_pictures_show_images_and_flows(model: PretrainingModel) -> None:
    drawn = model(flow_batch(), "draw")["flow"]
    flows = ["predicted flow", "true flow"]
    assert list(drawn) == ["image", *flows, "next image", *(f"{title} back" for title in flows)]
    for column in drawn.values():
        assert column.shape == (2, 1, 3, HEIGHT, WIDTH)
        assert column.min() >= 0 and column.max() <= 1
