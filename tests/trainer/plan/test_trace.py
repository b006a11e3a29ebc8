"""Timelines of a short real model: what they say of memory must hold for the model that they were not made of."""

import numpy as np
import pytest

import models.attention
from models.flops import train_flops
from tests.trainer.plan.short import run_config
from trainer.plan.samples import build_blank_batch
from trainer.plan.trace import CATEGORIES, Timeline, record_step, trace_step
from trainer.plan.tracing import trace_model
from trainer.plan.weights import Weights


@pytest.fixture(scope="module")
def timeline() -> Timeline:
    config = run_config()
    return trace_step(config, build_blank_batch(config), shards=2, precision="fp32", depth=1, extra=None)


def test_a_timeline_of_two_batches_is_that_of_a_third(timeline: Timeline) -> None:
    config = run_config()
    recorded = record_step(config, build_blank_batch(config), 2, "fp32", (1, None), samples=7)
    measured = np.array([size for _, size in recorded.events]).cumsum()
    np.testing.assert_array_equal(timeline.replay(7).sum(axis=1), measured)
    assert timeline.traffic(7) == pytest.approx(recorded.traffic)


def test_a_run_in_float8_is_planned_as_one_in_bf16() -> None:
    plain = run_config()
    float8 = plain.model_copy(update={"parallel": plain.parallel.model_copy(update={"fp8_linears": True})})
    recorded = [record_step(config, build_blank_batch(config), 2, "bf16", (1, None), samples=2) for config in (plain, float8)]
    assert recorded[0].events == recorded[1].events


def test_a_plan_does_not_take_the_way_round_that_cpus_take_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config()
    recorded = record_step(config, build_blank_batch(config), 2, "bf16", (1, None), samples=2)
    monkeypatch.setattr(models.attention, "_SHORT", 0)
    assert record_step(config, build_blank_batch(config), 2, "bf16", (1, None), samples=2).events == recorded.events


def test_a_step_leaves_shards_and_their_gradients(timeline: Timeline) -> None:
    left = dict(zip(CATEGORIES, timeline.replay(4)[-1], strict=True))
    assert left["shards"] > 0
    assert left["gradients"] == left["shards"]
    assert left["gathered"] == left["reducing"] == 0


def test_activations_grow_with_the_batch_and_shards_do_not(timeline: Timeline) -> None:
    few, many = (dict(zip(CATEGORIES, timeline.replay(samples).max(axis=0), strict=True)) for samples in (2, 20))
    assert many["activations"] > 2 * few["activations"]
    assert many["shards"] == few["shards"]


@pytest.mark.slow
def test_the_whole_model_takes_the_operations_of_the_formula() -> None:
    config = run_config()
    model = trace_model(config, shards=2, precision="fp32")
    (croco,) = config.objectives
    assert model.traced["none"].needed_flops == train_flops(config.encoder, croco, config.token_grid)
    assert model.traced["none"].repeated_flops == 0
    assert 0.2 < model.traced["full"].repeated_flops / model.traced["full"].needed_flops < 1 / 3
    everything = np.ones(len(CATEGORIES))
    kept, some, again = (model.traced[what].peak(8, everything).sum() for what in ("none", "selective", "full"))
    assert again < some < kept
    assert model.traced["selective"].repeated_flops == 0
    assert isinstance(model.weights, Weights)
    assert model.traced["none"].missing == (12 - 2, 4 - 2)
