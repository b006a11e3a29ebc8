"""CroCo's loss by its definition, what evaluation compares, and what pictures show."""

import pickle

import numpy as np
import pytest
import torch
from torch import Tensor

from models.batch import Batch
from models.config import CrocoConfig, EncoderConfig, Grid, MaskConfig
from models.encoder import ClipGroup
from models.images import normalise
from models.objectives.base import Preparation, encode
from models.objectives.completion import Completion, patchify, unpatchify
from models.objectives.croco import CrocoObjective
from models.pretraining import PretrainingModel, build_model, build_preparations
from tests.models.samples import CROCO, PATCH_PX, VIDEO_ENCODER, VIDEO_GRID, random_batch

FRAMES = VIDEO_GRID.t * VIDEO_ENCODER.tubelet_frames


@pytest.fixture
def model() -> PretrainingModel:
    torch.manual_seed(0)
    return build_model(VIDEO_ENCODER, [CROCO], VIDEO_GRID).eval()


def objective_of(model: PretrainingModel) -> CrocoObjective:
    objective = model.objectives["croco"]
    assert isinstance(objective, CrocoObjective)
    return objective


def normalised_views(batch: Batch) -> tuple[Tensor, Tensor]:
    shared = batch.shared
    target, reference = (normalise(shared[f"{view}_images"], shared[f"{view}_colours"]) for view in ("target", "reference"))
    return target, reference


def complete(model: PretrainingModel, batch: Batch, target: Tensor, reference: Tensor) -> Completion:
    """What the model makes of these normalised views under the masks of `batch`."""
    groups = [ClipGroup(target, batch.prepared["croco"]["visible"]), ClipGroup(reference)]
    masked, whole = encode(model.encoder, groups)
    return objective_of(model).complete(masked, whole.tokens)


@pytest.mark.parametrize("normalise_target", [True, False])
def test_the_loss_is_the_mean_over_hidden_tokens_of_their_squared_errors(model: PretrainingModel, normalise_target: bool) -> None:
    batch, objective = random_batch(), objective_of(model)
    objective.config = CROCO.model_copy(update={"normalise_target": normalise_target})
    target, reference = normalised_views(batch)
    done = complete(model, batch, target, reference)
    truth = patchify(target, VIDEO_GRID).double().numpy()
    prediction = done.prediction.detach().double().numpy()
    for clip, visible in enumerate(batch.prepared["croco"]["visible"].numpy()):
        errors = []
        for token in sorted(set(range(VIDEO_GRID.tokens)) - set(visible)):
            values = truth[clip, token]  # all frames of the tubelet and all channels together
            if normalise_target:
                values = (values - values.mean()) / np.sqrt(values.var(ddof=1) + 1e-6)
            errors.append(np.mean((prediction[clip, token] - values) ** 2))
        assert len(errors) == int(0.75 * VIDEO_GRID.tokens)
        assert done.loss[clip].item() == pytest.approx(np.mean(errors), rel=1e-5)
    torch.testing.assert_close(model(batch, "train").total, done.loss.mean())


def test_predicting_nothing_costs_the_variance_of_a_normalised_token(model: PretrainingModel) -> None:
    decoder = objective_of(model).decoder
    torch.nn.init.zeros_(decoder.head.weight)
    values = decoder.head.out_features
    # mean square of n numbers of mean 0 and unbiased variance 1, less the 1e-6 under the root
    assert model(random_batch(), "train").total.item() == pytest.approx((values - 1) / values, abs=1e-4)


def test_hidden_pixels_reach_the_loss_as_truth_alone(model: PretrainingModel) -> None:
    batch = random_batch()
    target, reference = normalised_views(batch)
    hidden = complete(model, batch, target, reference).hidden[..., None]
    tokens = patchify(target, VIDEO_GRID)
    other = unpatchify(torch.where(hidden.bool(), tokens.flip(-1), tokens), VIDEO_GRID, FRAMES)
    predictions = [complete(model, batch, t, reference).prediction for t in (target, other)]
    assert torch.equal(*predictions)


@pytest.mark.parametrize(
    ("scenes", "others"), [((0, 0, 1, 1), [2, 2, 0, 0]), ((0, 1, 0, 2), [1, 2, 3, 0]), ((5, 5, 5), [1, 2, 0])]
)
def test_the_wrong_reference_is_of_another_scene_where_there_is_one(
    model: PretrainingModel, scenes: tuple[int, ...], others: list[int]
) -> None:
    batch = random_batch(scenes=scenes)
    swapped = batch.shared | {"reference_images": batch.shared["reference_images"][others]}
    wrong = model(Batch(swapped, batch.prepared, batch.clips), "evaluate")["croco/loss"]
    torch.testing.assert_close(model(batch, "evaluate")["croco/loss_wrong_reference"], wrong)


def test_the_blank_reference_is_the_mean_colour(model: PretrainingModel) -> None:
    batch = random_batch()
    target, reference = normalised_views(batch)
    done = complete(model, batch, target, torch.zeros_like(reference))
    torch.testing.assert_close(model(batch, "evaluate")["croco/loss_blank_reference"], done.loss)


def test_evaluation_does_not_depend_on_the_other_clips_but_for_the_wrong_reference(model: PretrainingModel) -> None:
    batch = random_batch()
    alone = Batch(
        {name: tensor[:1] for name, tensor in batch.shared.items()},
        {"croco": {name: tensor[:1] for name, tensor in batch.prepared["croco"].items()}},
        batch.clips[:1],
    )
    both = model(batch, "evaluate"), model(alone, "evaluate")
    for name in ("croco/loss", "croco/loss_blank_reference"):
        torch.testing.assert_close(both[0][name][:1], both[1][name])


def test_pictures_show_the_truth_where_it_was_visible_and_grey_where_it_was_not(model: PretrainingModel) -> None:
    batch = random_batch()
    drawn = model(batch, "draw")["croco"]
    truth = batch.shared["target_images"][:, :, 0] / 255
    assert all(image.shape == truth.shape and image.min() >= 0 and image.max() <= 1 for image in drawn.values())
    torch.testing.assert_close(drawn["target"], truth, atol=1e-6, rtol=0)
    torch.testing.assert_close(drawn["reference"], batch.shared["reference_images"][:, :, 0] / 255, atol=1e-6, rtol=0)
    shown = torch.zeros(3, VIDEO_GRID.tokens, dtype=torch.bool).scatter(1, batch.prepared["croco"]["visible"], True)
    values = 2 * PATCH_PX**2 * 3
    is_shown = unpatchify(shown[..., None].expand(-1, -1, values).float(), VIDEO_GRID, FRAMES)[:, :, 0].bool()
    torch.testing.assert_close(drawn["masked input"], torch.where(is_shown, truth, 0.5), atol=1e-6, rtol=0)
    torch.testing.assert_close(drawn["reconstruction, patch means given"][is_shown], truth[is_shown], atol=1e-6, rtol=0)
    assert not torch.allclose(drawn["reconstruction, patch means given"][~is_shown], truth[~is_shown], atol=1e-2)


def test_a_perfect_prediction_draws_the_target(model: PretrainingModel, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, objective = random_batch(), objective_of(model)
    tokens = patchify(normalised_views(batch)[0], VIDEO_GRID)
    perfect = (tokens - tokens.mean(-1, keepdim=True)) / (tokens.var(-1, keepdim=True) + 1e-6).sqrt()
    monkeypatch.setattr(objective.decoder, "forward", lambda *views: perfect)
    drawn = model(batch, "draw")["croco"]
    torch.testing.assert_close(drawn["reconstruction, patch means given"], drawn["target"], atol=1e-5, rtol=0)
    assert model(batch, "train").total < 1e-9


@pytest.mark.parametrize("kind", ["random", "tube"])
def test_preparing_is_a_function_of_its_stream_and_survives_pickling(kind: str) -> None:
    croco = CrocoConfig(decoder="tiny", mask=MaskConfig(kind=kind, ratio=0.5))
    encoder = EncoderConfig(size="tiny", drop_path=0.1)
    preparation = build_preparations([croco], Grid(2, 1, 4, 4), encoder)["croco"]
    assert isinstance(preparation, Preparation)
    assert preparation.needs == {"target_images", "reference_images", "target_colours", "reference_colours", "scene"}
    again = pickle.loads(pickle.dumps(preparation))
    first, second, other = (p.prepare({}, np.random.default_rng(s)) for p, s in ((preparation, 0), (again, 0), (preparation, 1)))
    for name in ("visible", "drop_path"):
        assert np.array_equal(first[name], second[name])
        assert not np.array_equal(first[name], other[name])
        assert first[name].shape == other[name].shape and first[name].dtype == other[name].dtype
