"""MAE: what it needs, its loss beside CroCo's, its pictures."""

import numpy as np
import pytest
import torch

from models.batch import Batch
from models.config import CrocoConfig, EncoderConfig, MaeConfig, MaskConfig
from models.decoders import SingleViewDecoder
from models.objectives.base import Encoded, encode
from models.objectives.completion import measure_completion, patchify
from models.objectives.mae import MaeObjective
from models.pretraining import PretrainingModel, build_model, build_preparations
from tests.models.samples import PATCH_PX, SMALL, VIDEO_ENCODER, VIDEO_GRID, random_batch

MAE = MaeConfig(decoder="tiny")


@pytest.fixture
def model() -> PretrainingModel:
    torch.manual_seed(0)
    return build_model(VIDEO_ENCODER, [MAE], VIDEO_GRID).eval()


def batch_of(encoder: EncoderConfig = VIDEO_ENCODER) -> Batch:
    """The targets of random pairs, hidden as MAE hides them."""
    pairs = random_batch(encoder)
    preparation = build_preparations([MAE], VIDEO_GRID, encoder)["mae"]
    drawn = [preparation.prepare({}, np.random.default_rng(clip)) for clip in range(len(pairs.clips))]
    prepared = {name: torch.from_numpy(np.stack([of_clip[name] for of_clip in drawn])) for name in drawn[0]}
    return Batch({name: pairs.shared[name] for name in preparation.keeps}, {"mae": prepared}, pairs.clips)


def encode_target(model: PretrainingModel, batch: Batch) -> Encoded:
    objective = model.objectives["mae"]
    assert isinstance(objective, MaeObjective)
    (target,) = encode(model.encoder, objective.clips(batch))
    return target


def test_it_reads_no_second_view_and_hides_three_quarters() -> None:
    preparation = build_preparations([MAE], VIDEO_GRID, VIDEO_ENCODER)["mae"]
    assert preparation.needs == {"target_images", "target_colours"}
    visible = preparation.prepare({}, np.random.default_rng(0))["visible"]
    assert len(visible) == VIDEO_GRID.tokens - int(0.75 * VIDEO_GRID.tokens)


def test_the_same_seed_hides_the_same_tokens_as_croco() -> None:
    croco = CrocoConfig(mask=MaskConfig(ratio=0.75))
    drawn = [
        next(iter(build_preparations([config], VIDEO_GRID, VIDEO_ENCODER).values())).prepare({}, np.random.default_rng(3))
        for config in (MAE, croco)
    ]
    np.testing.assert_array_equal(drawn[0]["visible"], drawn[1]["visible"])


def test_its_loss_is_that_of_completion_and_reaches_all_weights(model: PretrainingModel) -> None:
    batch = batch_of()
    target = encode_target(model, batch)
    objective = model.objectives["mae"]
    done = measure_completion(
        objective.decoder(target.tokens, batch.prepared["mae"]["visible"], VIDEO_GRID), target, VIDEO_GRID, normalise_target=True
    )
    losses = model(batch, "train")
    torch.testing.assert_close(losses.total, done.loss.mean())
    torch.testing.assert_close(model(batch, "evaluate")["mae/loss"], done.loss)
    losses.total.backward()
    without = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
    assert without == []


def test_a_clip_is_completed_from_itself_alone() -> None:
    torch.manual_seed(0)
    decoder = SingleViewDecoder(SMALL, encoder_width=16, values=6, positions="rope", has_time=True)
    visible = torch.tensor([[1, 6], [0, 3]])
    tokens = torch.randn(2, 2, 16)
    before = decoder(tokens, visible, VIDEO_GRID)
    tokens[1] += torch.randn(2, 16)
    after = decoder(tokens, visible, VIDEO_GRID)
    torch.testing.assert_close(after[0], before[0])
    assert not torch.allclose(after[1], before[1])


def test_drop_path_is_drawn_for_one_view() -> None:
    encoder = VIDEO_ENCODER.model_copy(update={"drop_path": 0.5})
    assert batch_of(encoder).prepared["mae"]["drop_path"].shape == (3, encoder.shape.depth, 2)
    model = build_model(encoder, [MAE], VIDEO_GRID).train()
    assert model(batch_of(encoder), "train").total.isfinite()


def test_a_perfect_prediction_draws_the_target(model: PretrainingModel, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = batch_of()
    tokens = patchify(encode_target(model, batch).clips.images, VIDEO_GRID)
    perfect = (tokens - tokens.mean(-1, keepdim=True)) / (tokens.var(-1, keepdim=True) + 1e-6).sqrt()
    monkeypatch.setattr(model.objectives["mae"].decoder, "forward", lambda *views: perfect)
    drawn = model(batch, "draw")["mae"]
    assert set(drawn) == {"masked input", "reconstruction, patch means given", "target"}
    torch.testing.assert_close(drawn["reconstruction, patch means given"], drawn["target"], atol=1e-5, rtol=0)
    assert drawn["target"].shape[-1] == VIDEO_GRID.w * PATCH_PX
