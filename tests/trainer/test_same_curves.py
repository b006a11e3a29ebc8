"""What makes a step cheaper changes no loss curve: to the bit where the arithmetic is the same, to rounding where only its order is not."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import models.contrast
import trainer.optim
from benchmarks.naive_croco import NaiveCroco
from models.batch import Batch
from models.config import EncoderConfig, Grid
from models.pretraining import PretrainingModel, build_model, build_preparations
from models.rendering import Renderer
from tests.models.samples import CROCO, MIM4D, PATCH_PX, SIMIPU, random_batch, surround_batch, surround_sample
from trainer.config.training import OptimConfig
from trainer.optim import build_optimizer, set_learning_rate
from trainer.parallel.blocks import recompute_activations

STEPS = 8
ROUNDING = 2e-5
"""Of a loss after STEPS steps, relative."""
PAIRS = EncoderConfig(size="nano", patch_px=PATCH_PX, positions="sincos")
IMAGE = Grid(t=1, v=1, h=4, w=4)
VIDEO = EncoderConfig(size="nano", patch_px=PATCH_PX)
CLIP = Grid(t=3, v=1, h=2, w=4)
CAMERAS = 3


def pairs_model() -> PretrainingModel:
    torch.manual_seed(0)
    return build_model(PAIRS, [CROCO], IMAGE)


def pairs_batch(step: int) -> Batch:
    return random_batch(PAIRS, IMAGE, seed=step)


def surround_model() -> PretrainingModel:
    torch.manual_seed(0)
    return build_model(VIDEO, [SIMIPU, MIM4D], CLIP, cameras=CAMERAS)


def random_surround_batch(step: int) -> Batch:
    preparations = build_preparations([SIMIPU, MIM4D], CLIP, VIDEO, cameras=CAMERAS)
    sample = surround_sample(CLIP, tubelet_frames=1, cameras=CAMERAS, seed=step)
    return surround_batch(preparations, [sample], seed=step)


def train(model: nn.Module, loss_of: Callable[[int], torch.Tensor], *, lr: float) -> list[float]:
    """The loss of each step."""
    config = OptimConfig(lr=lr)
    optimizer, curve = build_optimizer(model, config, depth=6), []
    for step in range(STEPS):
        set_learning_rate(optimizer, config.lr * step / STEPS)
        loss = loss_of(step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.append(loss.item())
    return curve


def train_pairs(change: Callable[[PretrainingModel], None] = lambda model: None) -> list[float]:
    model = pairs_model()
    change(model)
    return train(model, lambda step: model(pairs_batch(step), "train").total, lr=1e-3)


def train_surround() -> list[float]:
    """At a rate at which the kinks of ReLU, of maxima and of rays that hit or miss do not blow rounding up."""
    model = surround_model()
    return train(model, lambda step: model(random_surround_batch(step), "train").total, lr=3e-5)


@pytest.fixture(scope="module")
def pairs_curve() -> list[float]:
    return train_pairs()


@pytest.fixture(scope="module")
def surround_curve() -> list[float]:
    return train_surround()


@pytest.mark.parametrize("what", ["selective", "full"])
def test_recomputed_activations_give_the_same_curve_to_the_bit(what: str, pairs_curve: list[float]) -> None:
    assert train_pairs(lambda model: recompute_activations(model, what)) == pairs_curve


def test_packed_views_and_fused_attention_give_the_curve_of_the_naive_twin(pairs_curve: list[float]) -> None:
    naive = NaiveCroco(pairs_model(), IMAGE)
    assert train(naive, lambda step: naive(pairs_batch(step)), lr=1e-3) == pytest.approx(pairs_curve, rel=ROUNDING)


def test_a_fused_optimiser_gives_the_curve_of_one_that_walks_from_weight_to_weight(
    pairs_curve: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Walking(torch.optim.AdamW):
        def __init__(self, *arguments: object, **keywords: object) -> None:
            super().__init__(*arguments, **keywords | {"fused": False, "foreach": False})  # type: ignore[arg-type]

    monkeypatch.setattr(trainer.optim.torch.optim, "AdamW", Walking)
    assert train_pairs() == pytest.approx(pairs_curve, rel=ROUNDING)


def test_logits_in_chunks_give_the_same_curve(surround_curve: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.contrast, "LOGITS_BYTES", 4096)
    assert train_surround() == pytest.approx(surround_curve, rel=ROUNDING)


def test_rays_in_chunks_give_the_same_curve(surround_curve: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Renderer, "rays_at_once", lambda renderer, chunk_bytes: 5)
    assert train_surround() == pytest.approx(surround_curve, rel=ROUNDING)
