"""The same run under every engine and world size: 20 steps through the public command, on gloo."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.runs import Finished, Runner
from trainer.checkpoint.manager import find_one, read_tensors
from trainer.store.open import open_store

LOSS_RTOL = 1e-6
WEIGHT_RTOL = 1e-4

ENGINES = {
    "ddp x2": ("ddp", 2),
    "fsdp2 x2": ("fsdp2", 2),
    "fsdp2 x4": ("fsdp2", 4),
    "hsdp 2x2": ("hsdp", 4),
    "zero1 x2": ("zero1", 2),
    "zero2 x2": ("zero2", 2),
    "zero3 x2": ("zero3", 2),
}


@pytest.fixture(scope="module")
def alone(runner: Runner) -> Finished:
    return runner.run("alone")


@pytest.fixture(scope="module", params=ENGINES)
def spread(runner: Runner, request: pytest.FixtureRequest) -> Finished:
    engine, processes = ENGINES[request.param]
    return runner.run(request.param.replace(" ", "-"), engine=engine, processes=processes)


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Logical weights of the newest checkpoint of a run."""
    store = open_store(folder)
    return read_tensors(store, find_one(store), prefix="model.")


def assert_same_run(found: Finished, expected: Finished) -> None:
    """Equal to float32's accumulation order: losses to 1e-6, weights to 1e-4 of their norm."""
    np.testing.assert_allclose(found.losses, expected.losses, rtol=LOSS_RTOL)
    weights, reference = final_weights(found.folder), final_weights(expected.folder)
    assert weights.keys() == reference.keys()
    for name, weight in weights.items():
        distance = (weight.double() - reference[name].double()).norm()
        assert distance <= WEIGHT_RTOL * reference[name].double().norm() + 1e-12, name


def test_the_loss_of_a_run_alone_falls(alone: Finished) -> None:
    assert len(alone.losses) == 20
    assert np.mean(alone.losses[-5:]) < np.mean(alone.losses[:5])


def test_every_engine_learns_the_same(spread: Finished, alone: Finished) -> None:
    assert_same_run(spread, alone)


def test_accumulated_micro_batches_learn_the_same_alone_and_sharded(runner: Runner, alone: Finished) -> None:
    assert_same_run(runner.run("accumulated", "parallel.micro_batch=1"), alone)
    sharded = runner.run("accumulated-fsdp2", "parallel.micro_batch=1", engine="fsdp2", processes=2)
    assert_same_run(sharded, alone)


def test_recomputed_activations_give_the_same_gradients_under_drop_path(runner: Runner) -> None:
    kept = runner.run("drop-path", "encoder.drop_path=0.3")
    recomputed = runner.run(
        "drop-path-fsdp2",
        "encoder.drop_path=0.3",
        "parallel.activation_checkpointing=true",
        engine="fsdp2",
        processes=2,
    )
    assert_same_run(recomputed, kept)


@pytest.mark.slow
def test_bf16_learns_under_fsdp2_as_it_does_alone(runner: Runner, alone: Finished) -> None:
    short = ("parallel.precision=bf16", "steps=6")
    single = runner.run("bf16", *short)
    sharded = runner.run("bf16-fsdp2", *short, engine="fsdp2", processes=2)
    # bf16 keeps 8 bits: a product is off by up to 2^-9, and the loss averages thousands of them.
    np.testing.assert_allclose(single.losses[:3], alone.losses[:3], rtol=2**-7)
    np.testing.assert_allclose(sharded.losses, single.losses, rtol=2**-7)
