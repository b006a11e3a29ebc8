"""The same run under every engine and world size: 20 steps through the public command, on gloo; and from each to each."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.runs import Finished, Runner
from trainer.checkpoint.manager import find_one, read_tensors
from trainer.store.open import open_store

LOSS_RTOL = 1e-6
WEIGHT_RTOL = 1e-4

ENGINES: dict[str, tuple[str | None, int]] = {
    "alone": (None, 1),
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
    return run_under(runner, "alone")


SLOW = {"fsdp2 x4", "hsdp 2x2", "zero1 x2", "zero2 x2"}
"""Four ranks are twice as many as the cores that they get here; tests/trainer/parallel/test_zero.py has all stages of ZeRO."""


@pytest.fixture(
    params=[pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in ENGINES if name != "alone"]
)
def spread(runner: Runner, request: pytest.FixtureRequest) -> Finished:
    return run_under(runner, request.param)


def run_under(runner: Runner, name: str) -> Finished:
    """20 unbroken steps, with checkpoints of steps 10 and 20."""
    engine, processes = ENGINES[name]
    return runner.once(name.replace(" ", "-"), engine=engine, processes=processes)


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


def copy_less_newest_checkpoint(run: Path, copy: Path) -> None:
    """The run as it was before its last checkpoint was committed."""
    shutil.copytree(run, copy)
    shutil.rmtree(max((copy / "checkpoints").iterdir()))


def test_the_loss_of_a_run_alone_falls(alone: Finished) -> None:
    assert len(alone.losses) == 20
    assert np.mean(alone.losses[-5:]) < np.mean(alone.losses[:5])


def test_every_engine_learns_the_same(spread: Finished, alone: Finished) -> None:
    assert_same_run(spread, alone)


@pytest.mark.slow
def test_accumulated_micro_batches_learn_the_same_alone(runner: Runner, alone: Finished) -> None:
    assert_same_run(runner.run("accumulated", "parallel.micro_batch=1"), alone)


@pytest.mark.slow
def test_accumulated_micro_batches_learn_the_same_sharded(runner: Runner, alone: Finished) -> None:
    sharded = runner.run("accumulated-fsdp2", "parallel.micro_batch=1", engine="fsdp2", processes=2)
    assert_same_run(sharded, alone)


@pytest.mark.slow
def test_recomputed_activations_give_the_same_gradients_under_drop_path(runner: Runner) -> None:
    kept = runner.run("drop-path", "encoder.drop_path=0.3")
    recomputed = runner.run(
        "drop-path-fsdp2",
        "encoder.drop_path=0.3",
        "parallel.activation_checkpointing=full",
        engine="fsdp2",
        processes=2,
    )
    assert_same_run(recomputed, kept)


FAST_MOVES = [("zero3 x2", "fsdp2 x2")]
ALL_MOVES = [(origin, target) for origin in ENGINES for target in ENGINES]


@pytest.mark.parametrize(
    ("origin", "target"),
    [*FAST_MOVES, *(pytest.param(*move, marks=pytest.mark.slow) for move in ALL_MOVES if move not in FAST_MOVES)],
)
def test_what_one_engine_saved_another_goes_on_with(runner: Runner, origin: str, target: str) -> None:
    unbroken = run_under(runner, origin)
    name = f"{origin} to {target}".replace(" ", "-")
    copy_less_newest_checkpoint(unbroken.folder, runner.folder / name)
    engine, processes = ENGINES[target]
    moved = runner.run(name, engine=engine, processes=processes)
    assert "after step 10" in moved.output
    if origin == target:
        assert moved.losses == unbroken.losses
        assert all(torch.equal(weight, final_weights(unbroken.folder)[k]) for k, weight in final_weights(moved.folder).items())
    else:
        assert_same_run(moved, unbroken)


@pytest.mark.slow
def test_bf16_learns_under_fsdp2_as_it_does_alone(runner: Runner, alone: Finished) -> None:
    short = ("parallel.precision=bf16", "steps=6")
    single = runner.run("bf16", *short)
    sharded = runner.run("bf16-fsdp2", *short, engine="fsdp2", processes=2)
    # bf16 keeps 8 bits: a product is off by up to 2^-9, and the loss averages thousands of them.
    np.testing.assert_allclose(single.losses[:3], alone.losses[:3], rtol=2**-7)
    np.testing.assert_allclose(sharded.losses, single.losses, rtol=2**-7)


@pytest.mark.slow
def test_float8_learns_under_fsdp2_as_it_does_alone_and_bf16_goes_on_with_its_checkpoint(runner: Runner) -> None:
    short = ("parallel.precision=bf16", "steps=6", "checkpoint.every_steps=3")
    bf16 = runner.run("beside-float8", *short)
    single = runner.run("float8", *short, "parallel.fp8_linears=true")
    sharded = runner.run("float8-fsdp2", *short, "parallel.fp8_linears=true", engine="fsdp2", processes=2)
    # e4m3 keeps 4 bits; ranks scale by the largest value of their own tokens.
    np.testing.assert_allclose(single.losses, bf16.losses, rtol=2**-5)
    np.testing.assert_allclose(sharded.losses, single.losses, rtol=2**-5)
    assert single.losses != bf16.losses
    copy_less_newest_checkpoint(sharded.folder, runner.folder / "float8-to-bf16")
    moved = runner.run("float8-to-bf16", *short)
    assert "after step 3" in moved.output
    np.testing.assert_allclose(moved.losses, sharded.losses, rtol=2**-5)
